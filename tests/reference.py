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


def global_norm(tensors: Iterable[Tensor | None]) -> float:
    return math.sqrt(sum(float((t * t).sum()) for t in tensors if t is not None))


@dataclass(frozen=True)
class ReferenceMask:
    """What Fisher-SAM perturbs: the `keep_ratio` largest squared gradients of all tensors that are not excluded."""

    keep_ratio: float
    interval: int = 1
    samples: int = 1
    excluded: str = "always"
    norm: str = "all"
    is_excluded: Callable[[Entry], bool] = lambda entry: entry.weight.dim() <= 1


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """The k largest of `scores` [n] as a bool tensor; equal scores go to the lower index."""
    order = sorted(range(scores.numel()), key=lambda index: (-float(scores[index]), index))
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[order[:k]] = True
    return mask


class ReferenceFSAM(ReferenceAdamW):
    """SAM (arXiv 2010.01412), ASAM (2102.11600) and Fisher-SAM (2210.05497) over the reference AdamW.

    `smallest_gap` is the smallest relative distance between the last selected score and the first rejected one so far:
    a comparison in lower precision says something only while rounding noise is below it.
    """

    def __init__(self, params: Iterable, *, mask: ReferenceMask | None = None, **kwargs):
        super().__init__(params, **kwargs)
        self.mask = mask
        self.perturbations = 0
        self.smallest_gap = math.inf

    def step(self, gradient_of: Callable[[list[Tensor]], Sequence[Tensor | None]]) -> None:
        """One update; `gradient_of` maps the list of weights to the list of gradients."""
        ascent = self.ascent(gradient_of(self.weights))
        super().step(gradient_of([weight + eps for weight, eps in zip(self.weights, ascent, strict=True)]))

    def ascent(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """The perturbation of every parameter; zero where there is no gradient, or where any of them is not finite."""
        pairs = zip(self.entries, gradients, strict=True)
        pairs = [(entry, torch.zeros_like(entry.weight) if g is None else double(g)) for entry, g in pairs]
        if self.mask is not None:
            self._refresh_masks(pairs)
        masked_norm = self.mask is not None and self.mask.norm == "masked"
        terms = [entry.weight.abs() * g if entry.group["adaptive"] else g for entry, g in pairs]
        if masked_norm:
            terms = [term * entry.mask for term, entry in zip(terms, self.entries, strict=True)]
        norm = global_norm(terms)
        if not math.isfinite(norm):
            return [torch.zeros_like(g) for _, g in pairs]
        return [self._ascent(entry, g) / (norm + 1e-12) for entry, g in pairs]

    @staticmethod
    def _ascent(entry: Entry, g: Tensor) -> Tensor:
        direction = entry.weight**2 * g if entry.group["adaptive"] else g
        return float(entry.group["rho"]) * direction * entry.mask

    def _refresh_masks(self, pairs: list[tuple[Entry, Tensor]]) -> None:
        for entry, g in pairs:
            entry.squares = [*entry.squares, g * g][-self.mask.samples :]
        if self.perturbations % self.mask.interval == 0:
            self._select()
        self.perturbations += 1

    def _select(self) -> None:
        chosen = [entry for entry in self.entries if not self.mask.is_excluded(entry)]
        scores = torch.cat([torch.stack(entry.squares).mean(0).flatten() for entry in chosen])
        k = int(self.mask.keep_ratio * scores.numel())
        ranked = scores.sort(descending=True).values
        if k < ranked.numel():
            self.smallest_gap = min(self.smallest_gap, float((ranked[k - 1] - ranked[k]) / ranked[k - 1]))
        for entry in self.entries:
            entry.mask = torch.full_like(entry.mask, self.mask.excluded == "always")
        parts = top_k_mask(scores, k).split([entry.weight.numel() for entry in chosen])
        for entry, part in zip(chosen, parts, strict=True):
            entry.mask = part.view_as(entry.weight)


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
