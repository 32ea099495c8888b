"""What a training program must do to weights and state, in fp64, and how far rounding may be from it."""

import dataclasses
import math

import torch
from torch import Tensor

from fsam_triton import FisherMask, Schedule
from tests.fp64_optimizers import DEFAULTS, ReferenceAdamW, ReferenceFSAM, ReferenceMask, double, global_norm, share
from tests.optim.programs import Program


class Oracle(ReferenceFSAM):
    """The reference optimizers, driven by hand with the gradients that the library gets.

    Attributes:
        eps: the perturbation at hand, or None.
        eps_error: how far the library's may be from it, on top of `bound`; infinite where it cannot be compared: with
            equal scores a mask is a matter of order, and ESAM draws.
        updates: steps so far.
    """

    def __init__(self, program: Program, named: list[tuple[str, Tensor]], trained: dict[str, Tensor] | None) -> None:
        options = program.options
        mask = options.get("mask")
        anchors = "initial"
        if program.anchored is not None:
            anchors = {name: p for i, (name, p) in enumerate(named) if i in program.anchored}
        super().__init__(
            program.groups_of(named),
            mask=None if mask is None else self._mask_of(mask, options.get("mask_norm", "all")),
            alpha=options.get("alpha", 0.0),
            anchors=anchors,
            max_grad_norm=options.get("max_grad_norm"),
        )
        self.kind, self.anchors, self.trained = program.kind, anchors, trained
        self.schedule = options.get("schedule", Schedule())
        self.rho_of = lambda step, entry: self._rho(entry.group)
        self.draws = "beta" in options
        self.draws_tensors = self.draws and options.get("beta_per") == "tensor"
        self.rounds = program.dtype == torch.bfloat16
        self.groups = list({id(entry.group): entry.group for entry in self.entries}.values())
        self.frozen: set[str] = set()
        # The entries that were updated, if only by a step that was skipped.
        self.begun: set[str] = set()
        self.eps: list[Tensor] | None = None
        self.first: list[Tensor | None] = []
        self.eps_error = 0.0
        self.updates = 0
        self.unit = torch.finfo(torch.float32 if program.dtype == torch.bfloat16 else program.dtype).eps / 2
        self.ambiguous = mask is not None and mask.unit != "element"
        self._largest_lr = self._largest = 0.0
        self._stretch = 1.0

    @staticmethod
    def _mask_of(mask: FisherMask, norm: str) -> ReferenceMask:
        return ReferenceMask(
            mask.keep_ratio,
            mask.interval,
            mask.samples,
            mask.excluded,
            norm,
            is_excluded=lambda entry: entry.name.endswith("bias"),
        )

    def add_group(self, named: list[tuple[str, Tensor]], options: dict) -> None:
        group = {**DEFAULTS, **options}
        for name, p in named:
            entry = self._entry(name, double(p), self.anchors, group)
            if self.mask is not None:
                entry.mask.fill_(self.mask.is_excluded(entry) and self.mask.excluded == "always")
                entry.squares = [torch.zeros_like(entry.weight) for _ in self.entries[0].squares]
            self.entries.append(entry)
            if self.eps is not None:
                self.eps.append(torch.zeros_like(entry.weight))
                self.first.append(None)
        self.groups.append(group)

    def set_trainable(self, weights: dict[str, Tensor], trained: dict[str, Tensor] | None) -> None:
        """Start anew from the present weights."""
        self.trained, self.eps = trained, None
        self.begun.clear()
        for i, entry in enumerate(self.entries):
            self.entries[i] = self._entry(entry.name, double(weights[entry.name]), self.anchors, entry.group)

    def edit(self, name: str, values: Tensor) -> None:
        """Somebody has written these weights, which are clean."""
        for i, entry in enumerate(self.entries):
            if entry.name == name:
                entry.weight = double(values)
                if self.eps is not None:
                    self.eps[i] = torch.zeros_like(entry.weight)

    def unperturb(self) -> None:
        """Somebody has written all clean weights."""
        if self.eps is not None:
            self.eps = [torch.zeros_like(eps) for eps in self.eps]

    def gradients_of(self, gradients: dict[str, Tensor | None]) -> list[Tensor | None]:
        """Those of the trained weights, in fp64, in the order of the entries."""
        out = []
        for entry in self.entries:
            g = gradients[entry.name]
            if g is not None and self.trained is not None:
                trained = self.trained[entry.name]
                g = torch.where(trained, g, 0.0) if trained.any() else None
            out.append(None if g is None else double(g))
        return out

    @property
    def comes_sharp(self) -> bool:
        return self.kind != "AdamWL2SP" and self.schedule.is_sharp(self.updates)

    def _rho(self, group: dict) -> float:
        return self.schedule.rho(self.updates, group["rho"], 0.0, 0.0)

    # -- two passes ----------------------------------------------------------------------------------------------------

    def climb(self, gradients: list[Tensor | None]) -> None:
        """FSAM's perturbation."""
        self.first = gradients
        self.eps = self.ascent(gradients)
        n, u = self._count(), self.unit
        filled = self.filled(gradients)
        is_adaptive = any(entry.group["adaptive"] for entry in self.entries)
        terms = [e.weight.abs() * g if e.group["adaptive"] else g for e, g in zip(self.entries, filled, strict=True)]
        if self.mask is not None and self.mask.norm == "masked":
            terms = [term * entry.mask for term, entry in zip(terms, self.entries, strict=True)]
        norm, rho = global_norm(terms), max(self._rho(entry.group) for entry in self.entries)
        self.eps_error = rho * (2 * n + 20) * u
        if norm > 0:
            # A scaled gradient has another 1e-12 added to its norm.
            self.eps_error += 1e-12 * rho / norm
        if is_adaptive and math.isfinite(norm):
            # eps = rho w^2 g / N of weights that are off themselves.
            steep = self._weight() * global_norm(filled) / norm if norm > 1e-3 else math.inf
            self.eps_error += math.inf if self.rounds else rho * self.bound() * (2 + steep)
        if self.draws or self.ambiguous:
            self.eps_error = math.inf

    def _select(self) -> None:
        before = [entry.squares for entry in self.entries]
        for entry in self.entries:
            # A NaN is the smallest score.
            entry.squares = [torch.stack(entry.squares).mean(0).nan_to_num(0.0, posinf=math.inf)]
        mask, excluded = self.mask, self.mask.is_excluded
        self.mask = dataclasses.replace(mask, is_excluded=lambda entry: excluded(entry) or entry.name in self.frozen)
        super()._select()
        self.mask = mask
        chosen = [entry for entry in self.entries if not excluded(entry)]
        for entry in chosen:
            if entry.name in self.frozen:
                entry.mask.fill_(False)
        scores = torch.cat([entry.squares[0].flatten() for entry in chosen])
        kept = torch.cat([entry.mask.flatten() for entry in chosen])
        lowest = scores[kept].min()
        self.ambiguous |= bool((~kept).any() and scores[~kept].max() >= lowest)
        for entry, squares in zip(self.entries, before, strict=True):
            entry.squares = squares

    # -- the update ----------------------------------------------------------------------------------------------------

    def descend(self, gradients: list[Tensor | None], skip: bool = False) -> None:
        """AdamW from the clean weights, unless the step is skipped."""
        norm = global_norm(gradients)
        self._begin(gradients)
        if self.alpha and self.eps is not None:
            first = [None if b is None else a for a, b in zip(self.first, gradients, strict=True)]
            self._stretch = max(self._stretch, self._lengths(first, gradients))
            gradients = self._narrow_gap(first, gradients)
        skip = skip or (self.max_grad_norm is not None and not math.isfinite(norm))
        self._largest = max(self._largest, _largest(gradients))
        self._largest_lr = max(self._largest_lr, *(float(group["lr"]) for group in self.groups))
        before = self.weights
        if not skip:
            ReferenceAdamW.step(self, gradients)
        if self.trained is not None:
            for entry, weight in zip(self.entries, before, strict=True):
                entry.weight = torch.where(self.trained[entry.name], entry.weight, weight)
        self.eps = None
        self.updates += 1

    def _begin(self, gradients: list[Tensor | None]) -> None:
        """Anchors are the weights before the first update."""
        for entry, gradient in zip(self.entries, gradients, strict=True):
            if gradient is not None and entry.name not in self.begun:
                self.begun.add(entry.name)
                if self.anchors == "initial":
                    entry.anchor = entry.weight.clone()

    def _lengths(self, first: list[Tensor | None], second: list[Tensor | None]) -> float:
        """At most the sum of the magnitudes of the terms of GSAM's direction, (1 + alpha c) g2 and alpha g1."""
        g1, g2 = self.filled(first), self.filled(second)
        if share(g1, g2) is None:
            return 1.0
        return _largest(g2) * (1 + self.alpha * global_norm(g1) / global_norm(g2)) + self.alpha * _largest(g1)

    @property
    def leans(self) -> bool:
        """Whether a forward pass perturbs MomentumSAM's parameters."""
        return self.comes_sharp and any(g["rho"] > 0 for g in self.groups) and not self.begun <= self.frozen

    def lean(self) -> None:
        """MomentumSAM's perturbation: along the moments of what is trained."""
        moments = [e.exp_avg * (e.name not in self.frozen) for e in self.entries]
        norm = global_norm(moments)
        pairs = zip(self.entries, moments, strict=True)
        self.eps = [-self._rho(entry.group) * moment / (norm + 1e-12) for entry, moment in pairs]
        n, u = self._count(), self.unit
        # What is left where moment and gradient cancel has a norm that is known so much worse.
        condition = n * self._largest**2 / norm**2 if norm else 0.0
        error = (2 * n + 20) * u * condition + self._slack() * self._largest * (1 + math.sqrt(n)) / max(norm, 1e-30)
        rho = max(self._rho(group) for group in self.groups)
        self.eps_error = rho * error if condition < 2.0**16 else math.inf

    # -- rounding ------------------------------------------------------------------------------------------------------

    def _count(self) -> int:
        return sum(entry.weight.numel() for entry in self.entries)

    def _weight(self) -> float:
        return 1.0 + _largest(self.weights)

    def _slack(self) -> float:
        """Rounding errors of a first moment, and half of those of a second one, for gradients up to 1: see `bound`."""
        return self.unit * (7 * self.updates + 3 * self._count() + 40) * self._stretch

    def moment_bounds(self) -> tuple[float, float]:
        """How far first and second moments may be from exact arithmetic."""
        return self._slack() * self._largest, 2 * self._slack() * max(self._largest, self._largest**2)

    def bound(self) -> float:
        """How far weights may be from exact arithmetic after T updates with the same n gradients |g| <= G.

        With u = eps / 2, twice because the reference may be as far off:
          factor of the gradient (unscaling, a norm of n terms): 2 n + 10 roundings, counted in m and in v
          exp_avg: at most 5 roundings of (1 - beta1^t) G a step                                      -> 5 T u
          exp_avg_sq: 3 roundings a step, of which the square root takes half                         -> 1.5 T u
          bias corrections, quotient, lr                                                              -> 20 u
        relative to G; and G / sqrt(v_hat) <= Q = sqrt(T beta2^(1 - T)), because v >= beta2^(T - 1) (1 - beta2) G^2 and
        1 - beta2^T <= T (1 - beta2). A combination of two gradients has errors relative to its terms, not to itself:
        these count over a denominator of at least eps = 1. Each update rounds the weight three times.
        """
        steps, beta2 = self.updates, min(float(group["betas"][1]) for group in self.groups)
        if steps == 0:
            return 0.0
        quotient = math.sqrt(steps * beta2 ** (1 - steps))
        errors = self._largest_lr * ((1 + quotient) * self._slack() + 3 * self.unit * quotient)
        return 2 * steps * (errors + 3 * self.unit * self._weight())


def _largest(tensors: list[Tensor | None]) -> float:
    """The largest finite magnitude."""
    finite = (t[t.isfinite()].abs() for t in tensors if t is not None)
    return max((float(values.max()) for values in finite if values.numel()), default=0.0)
