"""Independent fp64 optimizers, one parameter at a time, and the small problem on which they are compared."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

DEFAULTS = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "amsgrad": False,
    "maximize": False,
    "l2_sp": 0.0,
    "rho": 0.05,
    "adaptive": False,
}


@dataclass
class Entry:
    """One parameter in fp64 and everything an optimizer remembers about it."""

    name: str | None
    weight: Tensor
    anchor: Tensor | None
    group: dict
    step: int
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor
    mask: Tensor
    squares: list[Tensor] = field(default_factory=list)
    orthogonal: Tensor | None = None


def double(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64, copy=True)


class ReferenceAdamW:
    """AdamW (arXiv 1711.05101) with AMSGrad (1904.09237), L2-SP (1802.01483) and global clipping, in fp64.

    `params` is what torch.optim takes: tensors, (name, tensor) pairs, or group dicts of either. The tensors are copied.
    """

    def __init__(self, params: Iterable, *, anchors="initial", max_grad_norm: float | None = None, **defaults):
        groups = list(params)
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        self.max_grad_norm = max_grad_norm
        self.entries: list[Entry] = []
        for group in groups:
            hyper = {**DEFAULTS, **defaults, **group}
            for item in hyper.pop("params"):
                name, parameter = item if isinstance(item, tuple) else (None, item)
                self.entries.append(self._entry(name, double(parameter), anchors, hyper))

    @staticmethod
    def _entry(name: str | None, weight: Tensor, anchors, group: dict) -> Entry:
        values = {name: weight} if anchors == "initial" else anchors
        anchor = double(values[name]) if name in values else None
        zeros = [torch.zeros_like(weight) for _ in range(3)]
        return Entry(name, weight, anchor, group, 0, *zeros, mask=torch.ones_like(weight, dtype=torch.bool))

    @property
    def weights(self) -> list[Tensor]:
        return [entry.weight for entry in self.entries]

    def filled(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradients in fp64, zeros for missing ones."""
        pairs = zip(self.entries, gradients, strict=True)
        return [torch.zeros_like(entry.weight) if g is None else double(g) for entry, g in pairs]

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """One update; a parameter whose gradient is None is left alone altogether."""
        gradients = [None if g is None else double(g) for g in gradients]
        if self.max_grad_norm is not None:
            norm = global_norm(gradients)
            gradients = [None if g is None else g * min(1.0, self.max_grad_norm / (norm + 1e-6)) for g in gradients]
        for entry, gradient in zip(self.entries, gradients, strict=True):
            if gradient is not None:
                self._update(entry, -gradient if entry.group["maximize"] else gradient)

    @staticmethod
    def _update(entry: Entry, g: Tensor) -> None:
        lr, eps = float(entry.group["lr"]), float(entry.group["eps"])
        beta1, beta2 = (float(beta) for beta in entry.group["betas"])
        entry.step += 1

        weight = entry.weight
        if entry.group["l2_sp"] > 0 and entry.anchor is not None:
            weight = weight - lr * entry.group["l2_sp"] * (weight - entry.anchor)
        else:
            weight = weight - lr * entry.group["weight_decay"] * weight

        exp_avg = beta1 * entry.exp_avg + (1 - beta1) * g
        exp_avg_sq = beta2 * entry.exp_avg_sq + (1 - beta2) * g * g
        max_exp_avg_sq = torch.maximum(entry.max_exp_avg_sq, exp_avg_sq)
        second = max_exp_avg_sq if entry.group["amsgrad"] else exp_avg_sq
        denominator = (second / (1 - beta2**entry.step)).sqrt() + eps
        weight = weight - lr * (exp_avg / (1 - beta1**entry.step)) / denominator

        finite = g.isfinite()
        entry.weight = torch.where(finite, weight, entry.weight)
        entry.exp_avg = torch.where(finite, exp_avg, entry.exp_avg)
        entry.exp_avg_sq = torch.where(finite, exp_avg_sq, entry.exp_avg_sq)
        entry.max_exp_avg_sq = torch.where(finite, max_exp_avg_sq, entry.max_exp_avg_sq)


def inner(first: Iterable[Tensor], second: Iterable[Tensor]) -> float:
    return sum(float((a * b).sum()) for a, b in zip(first, second, strict=True))


def global_norm(tensors: Iterable[Tensor | None]) -> float:
    return math.sqrt(sum(float((t * t).sum()) for t in tensors if t is not None))


def share(of: Sequence[Tensor], along: Sequence[Tensor]) -> float | None:
    """c of the projection c * along; None if `along` is zero or something is not finite."""
    square = inner(along, along)
    c = inner(of, along) / square if square else math.nan
    return c if math.isfinite(c) else None


@dataclass(frozen=True)
class ReferenceMask:
    """What Fisher-SAM perturbs: the `keep_ratio` largest squared gradients of all tensors that are not excluded.

    They are chosen by `unit`: "element", "row" (slices along the first dimension), "tensor" or runs of so many
    consecutive weights of a contiguous tensor; a unit's score is the mean of its squares.
    """

    keep_ratio: float
    interval: int = 1
    samples: int = 1
    excluded: str = "always"
    norm: str = "all"
    is_excluded: Callable[[Entry], bool] = lambda entry: entry.weight.dim() <= 1
    unit: str | int = "element"

    def unit_sizes(self, weight: Tensor) -> list[int]:
        n = weight.numel()
        rows = weight.shape[0] if weight.dim() else 1
        length = {"element": 1, "tensor": n, "row": n // max(rows, 1)}.get(self.unit, self.unit)
        return [min(length, n - start) for start in range(0, n, max(length, 1))]


def ranking(scores: Tensor) -> list[int]:
    """Positions by falling score, of equal scores the lower first."""
    return sorted(range(scores.numel()), key=lambda index: (-float(scores[index]), index))


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """The k largest of `scores` [n] as a bool tensor; equal scores go to the lower index."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[ranking(scores)[:k]] = True
    return mask


class ReferenceFSAM(ReferenceAdamW):
    """SAM (arXiv 2010.01412), ASAM (2102.11600) and Fisher-SAM (2210.05497) over the reference AdamW, and:

    - GSAM (2203.08065): `alpha`.
    - ESAM (2110.03141): `selections` (step, index of the entry) is a bool tensor, or None for an entry perturbed as
      without ESAM; eps of what is selected is divided by `beta`. Or `tensors` (step): indices of the entries that are
      perturbed; the gradients of the others count for nothing in the ascent but a choice of the mask.
    - LookSAM (2203.02714): `reuse`, in the steps that `is_sharp` (step) leaves to AdamW. Norms and products are over
      the entries that have a gradient at the step (at a sharp one: in its second pass).
    - `rho_of` (step, entry) is the radius.

    Steps count from 0. `smallest_gap` is the smallest relative distance between the last selected score and the first
    rejected one so far: a comparison in lower precision says something only while rounding noise is below it.
    """

    def __init__(
        self,
        params: Iterable,
        *,
        mask: ReferenceMask | None = None,
        alpha: float = 0.0,
        beta: float = 1.0,
        selections: Callable[[int, int], Tensor | None] = lambda step, index: None,
        tensors: Callable[[int], set[int]] | None = None,
        is_sharp: Callable[[int], bool] = lambda step: True,
        rho_of: Callable[[int, Entry], float] = lambda step, entry: float(entry.group["rho"]),
        reuse: float = 0.0,
        **kwargs,
    ):
        super().__init__(params, **kwargs)
        self.mask = mask
        self.alpha, self.beta, self.reuse = alpha, beta, reuse
        self.selections, self.tensors = selections, tensors
        self.is_sharp, self.rho_of = is_sharp, rho_of
        self.steps = 0
        self.perturbations = 0
        self.smallest_gap = math.inf

    def step(self, gradient_of: Callable[[list[Tensor]], Sequence[Tensor | None]]) -> None:
        """One update; `gradient_of` maps the list of weights to the list of gradients."""
        first = gradient_of(self.weights)
        if self.is_sharp(self.steps):
            ascent = self.ascent(first)
            second = gradient_of([weight + eps for weight, eps in zip(self.weights, ascent, strict=True)])
            if self.reuse:
                self._keep_orthogonal(first, second)
            super().step(self._narrow_gap(first, second) if self.alpha else second)
        else:
            super().step(self._add_orthogonal(first) if self.reuse else first)
        self.steps += 1

    def _narrow_gap(self, first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """GSAM: g2 - alpha * (the part of g1 that is orthogonal to g2)."""
        g1, g2 = self.filled(first), self.filled(second)
        c = share(g1, g2)
        if c is None:
            return second
        descent = [b - self.alpha * (a - c * b) for a, b in zip(g1, g2, strict=True)]
        return [None if g is None else d for g, d in zip(second, descent, strict=True)]

    def _keep_orthogonal(self, first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> None:
        """LookSAM: g_v, the part of g2 that is orthogonal to g1."""
        g1 = self.filled([None if b is None else a for a, b in zip(first, second, strict=True)])
        g2 = self.filled(second)
        c = share(g2, g1) or 0.0
        for entry, a, b in zip(self.entries, g1, g2, strict=True):
            entry.orthogonal = b - c * a

    def _add_orthogonal(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """LookSAM between sharp steps: g + reuse * |g| / |g_v| * g_v."""
        orthogonal = self.filled([entry.orthogonal for entry in self.entries])
        norm = global_norm(v for v, g in zip(orthogonal, gradients, strict=True) if g is not None)
        scale = self.reuse * global_norm(self.filled(gradients)) / norm if norm else math.nan
        if not math.isfinite(scale):
            return gradients
        return [None if g is None else double(g) + scale * v for g, v in zip(gradients, orthogonal, strict=True)]

    def ascent(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """The perturbation of every parameter; zero where there is no gradient, or where any of them is not finite."""
        gradients = self.filled(gradients)
        if self.mask is not None:
            self._refresh_masks(list(zip(self.entries, gradients, strict=True)))
        if self.tensors is not None:
            drawn = self.tensors(self.steps)
            gradients = [g if index in drawn else torch.zeros_like(g) for index, g in enumerate(gradients)]
        pairs = list(zip(self.entries, gradients, strict=True))
        masked_norm = self.mask is not None and self.mask.norm == "masked"
        terms = [entry.weight.abs() * g if entry.group["adaptive"] else g for entry, g in pairs]
        if masked_norm:
            terms = [term * entry.mask for term, entry in zip(terms, self.entries, strict=True)]
        norm = global_norm(terms)
        if not math.isfinite(norm):
            return [torch.zeros_like(g) for g in gradients]
        return [self._ascent(index, entry, g) / (norm + 1e-12) for index, (entry, g) in enumerate(pairs)]

    def _ascent(self, index: int, entry: Entry, g: Tensor) -> Tensor:
        direction = entry.weight**2 * g if entry.group["adaptive"] else g
        uphill = -1.0 if entry.group["maximize"] else 1.0
        eps = uphill * self.rho_of(self.steps, entry) * direction * entry.mask
        selection = self.selections(self.steps, index)
        return eps if selection is None else eps / self.beta * selection

    def _refresh_masks(self, pairs: list[tuple[Entry, Tensor]]) -> None:
        for entry, g in pairs:
            entry.squares = [*entry.squares, g * g][-self.mask.samples :]
        if self.perturbations % self.mask.interval == 0:
            self._select()
        self.perturbations += 1

    def _select(self) -> None:
        chosen = [entry for entry in self.entries if not self.mask.is_excluded(entry)]
        sizes = [self.mask.unit_sizes(entry.weight) for entry in chosen]
        squares = [torch.stack(entry.squares).mean(0).flatten() for entry in chosen]
        units = [unit for square, size in zip(squares, sizes, strict=True) for unit in square.split(size)]
        scores = torch.stack([unit.mean() for unit in units])
        left = int(self.mask.keep_ratio * sum(unit.numel() for unit in units))
        order = ranking(scores)
        kept = 0
        while kept < len(order) and units[order[kept]].numel() <= left:
            left -= units[order[kept]].numel()
            kept += 1
        if 0 < kept < len(order):
            last, rejected = scores[order[kept - 1]], scores[order[kept]]
            self.smallest_gap = min(self.smallest_gap, float((last - rejected) / last))
        for entry in self.entries:
            entry.mask = torch.full_like(entry.mask, self.mask.excluded == "always")
        flags = top_k_mask(scores, kept).split([len(size) for size in sizes])
        for entry, size, flag in zip(chosen, sizes, flags, strict=True):
            entry.mask = flag.repeat_interleave(torch.tensor(size, dtype=torch.int64)).view_as(entry.weight)


class ReferenceMomentumSAM(ReferenceAdamW):
    """Momentum-SAM (arXiv 2401.12033) over the reference AdamW: the gradient is taken against the momentum."""

    @property
    def perturbed(self) -> list[Tensor]:
        """w - rho * m / (|m| + 1e-12), the norm over all parameters."""
        norm = global_norm(entry.exp_avg for entry in self.entries) + 1e-12
        return [entry.weight - float(entry.group["rho"]) * entry.exp_avg / norm for entry in self.entries]

    def step(self, gradient_of: Callable[[list[Tensor]], Sequence[Tensor | None]]) -> None:
        """One update; `gradient_of` maps the list of weights to the list of gradients."""
        super().step(gradient_of(self.perturbed))


def small_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.ModuleDict:
    """568 weights in six tensors; the values are multiples of 1/64 in [-1, 1], hence exact in every dtype."""
    model = nn.ModuleDict({"dense": nn.Linear(24, 16), "norm": nn.LayerNorm(16), "head": nn.Linear(16, 8)})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-64, 65, parameter.shape, generator=generator) / 64)
    return model.to(dtype)


@dataclass(frozen=True)
class Problem:
    """A loss with another linear term at every step: sum(c_t * w) + curvature * sum(sin w).

    |c_t| is a multiple of 1/64 in [0.75, 1.25] with a random sign, exact in every dtype, and |curvature| <= 0.25 keeps
    every gradient within [0.5, 1.5] in magnitude: Adam's quotient is well conditioned and rounding errors have a bound.
    With `sparse`, the parameters 1, 2 and 4 have no part in the loss at some steps (4 first has one at the third).
    """

    curvature: float = 0.25
    sparse: bool = False
    seed: int = 0

    def present(self, step: int, index: int) -> bool:
        if not self.sparse:
            return True
        return {1: step % 3 != 1, 2: step % 4 == 0, 4: step % 5 >= 2}.get(index, True)

    def linear_term(self, step: int, index: int, like: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1009 + step) * 1009 + index)
        magnitude = torch.randint(48, 81, like.shape, generator=generator) / 64
        sign = torch.randint(0, 2, like.shape, generator=generator) * 2 - 1
        return (magnitude * sign).to(like.dtype)

    def loss(self, weights: Iterable[Tensor], step: int) -> Tensor:
        total = 0.0
        for index, weight in enumerate(weights):
            if self.present(step, index):
                total = total + (self.linear_term(step, index, weight) * weight).sum()
                if self.curvature:
                    total = total + self.curvature * weight.sin().sum()
        return total

    def gradients(self, weights: Iterable[Tensor], step: int) -> list[Tensor | None]:
        leaves = [weight.detach().clone().requires_grad_() for weight in weights]
        return list(torch.autograd.grad(self.loss(leaves, step), leaves, allow_unused=True))


def rounding_bound(steps: int, lr: float, weight: Tensor, curvature: float = 0.25) -> float:
    """How far `steps` AdamW steps on a `Problem`, in the dtype of `weight`, may be from exact arithmetic, at the worst.

    With |g| in [0.5, 1.5], u = eps / 2 and |m| / sqrt(v) <= 3, at step t:
      gradient: 4 roundings of terms <= 1.5, over sqrt(v) >= 0.5                                 ->  12 u
      exp_avg: 3 roundings of at most 1.5 a step, forgotten at rate 1 - beta1 >= 0.1, over 0.5    ->  90 u
      exp_avg_sq: 3 roundings a step, never forgotten here; the square root halves, the factor 3  ->  4.5 t u
      quotient, bias corrections, lr: 10 roundings of at most 3                                   ->  30 u
    so lr * (132 t + 2.25 t^2) u in all, plus two roundings of the weight at each step (decay, update). A gradient that
    depends on the weight feeds an error back by at most lr * curvature / 0.5 * (1 + 3) a step.
    """
    u = torch.finfo(weight.dtype).eps / 2
    magnitude = 1 + float(weight.detach().abs().max()) if weight.numel() else 1.0
    local = lr * (132 * steps + 2.25 * steps**2) * u + 2 * steps * magnitude * u
    return local * math.exp(8 * curvature * lr * steps)


def combination_bound(steps: int, lr: float, weight: Tensor, factor: float, n: int, curvature: float = 0.25) -> float:
    """What comes on top of `rounding_bound` where a multiple of a second gradient is added: GSAM's, LookSAM's factor.

    With Adam's eps = 1 and |g + x v| <= 3 (3 over a denominator of at least 1 is 1.5 over 0.5, so that `rounding_bound`
    holds), and gradients a, b of n weights in all with |a|, |b| in [0.5, 1.5], as a `Problem` has them. A sum of n
    products is off by n u times the sum of their magnitudes, which is at most norm(a) norm(b):
      c = <a, b> / norm(b)^2, |c| <= 1/3: off by (3 + 3) n u
      v = a - c b, |v| <= 2: off by 1.5 * 6 n u = 9 n u
      x = factor * norm(a) / norm(v) <= 3 factor, norm(v) >= sqrt(n) / 2: relatively off by n u + n u + 2 * 9 n u
      x v: off by 3 * 2 * 20 n u + 3 * 9 n u <= 150 n u, times the factor
    and an error of the gradient counts (1 + 3) times in Adam's quotient.
    """
    u = torch.finfo(weight.dtype).eps / 2
    return 4 * lr * steps * 150 * n * u * factor * math.exp(8 * curvature * lr * steps)


def assert_weights_close(
    actual: Iterable[Tensor], expected: Iterable[Tensor], steps: int, lr: float, *, curvature=0.25, extra=0.0
) -> None:
    """Weights after `steps` steps equal the reference's to the rounding errors of their dtype (twice: two programs)."""
    for index, (weight, exact) in enumerate(zip(actual, expected, strict=True)):
        bound = 2 * rounding_bound(steps, lr, weight, curvature) + extra
        difference = (weight.detach().double() - exact.detach().double()).abs()
        assert weight.isfinite().all(), f"parameter {index} is not finite"
        worst = float(difference.max()) if difference.numel() else 0.0
        assert worst <= bound, f"parameter {index} is off by {worst:.3g}, rounding explains {bound:.3g}"


def assert_masks_are_well_separated(reference: ReferenceFSAM, dtype: torch.dtype) -> None:
    """Below this gap rounding could choose another mask, and a comparison would say nothing.

    A score is a square, of relative error 2 * (4 u + the weights' error over |g| >= 0.5); 64 eps is ten times that.
    """
    assert reference.mask is None or reference.smallest_gap > 64 * torch.finfo(dtype).eps
