"""Independent fp64 optimizers, one parameter at a time, and the small problem on which they are compared."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

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


def assert_masks_are_well_separated(reference: ReferenceFSAM, dtype: torch.dtype) -> None:
    """Below this gap rounding could choose another mask, and a comparison would say nothing.

    A score is a square, of relative error 2 * (4 u + the weights' error over |g| >= 0.5); 64 eps is ten times that.
    """
    assert reference.mask is None or reference.smallest_gap > 64 * torch.finfo(dtype).eps
