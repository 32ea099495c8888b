"""Descent: the second half of a step: what an update makes of the gradients, and its launches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import ops
from ..buffers.lanes import Gradients, Lanes
from ..kernels.segments import Segments
from .rules import Rule


@dataclass
class Direction:
    """How an update combines the gradients before the rule uses them.

    Attributes:
        combined: what the second gradients are for, one of `kernels.spec.COMBINED`.
        alpha: how much they count.
        measured: the squared norm of the gradients, if it matters, or all that `gap` returns for both; on the home
            device.
        other_scale: the factor with which a GradScaler has multiplied the second gradients.
        squares: for balanced LoRA adapters, the squared norms by which they are balanced.
    """

    combined: str = "alone"
    alpha: float = 0.0
    measured: Tensor | None = None
    other_scale: Tensor | None = None
    squares: Tensor | None = None


@dataclass
class Half:
    """Half a step of some lanes.

    Attributes:
        lanes: the lanes.
        segments: the segments of the launch of each of its passes.
        steps: how far weights are from the clean weights, if that is known instead of the clean weights.
        squares: the squared norm of each gradient, if it has been measured.
    """

    lanes: Lanes
    segments: Segments
    steps: Tensor | None = None
    squares: Tensor | None = None

    def norm_sq(self) -> Tensor:
        """The squared norm of all gradients."""
        return ops.norm_sq(self.segments, False, None) if self.squares is None else self.squares.sum()

    @property
    def active(self) -> list[bool]:
        """Which parameters take part."""
        return self.segments.active


def prepared(lanes: Lanes, grads: Gradients, other: Gradients | None, only: int | None) -> Half:
    """The launches of an update; parameters that take no part are restored.

    Args:
        lanes: the lanes, with all that the update needs.
        grads: the gradients.
        other: the second gradients of `Direction`, if there are any.
        only: the parameter that is updated, if it is one alone; the others then stay perturbed.
    """
    clean = steps = None
    if lanes.perturbed is not None and only is None:
        lanes.restore([i for i in lanes.perturbed.which() if grads[i] is None])
    weights = lanes.weights()
    if lanes.perturbed is not None and lanes.counts_steps:
        steps = lanes.lanes["backup"]
    elif lanes.perturbed is not None:
        backup, moved = lanes.views("backup"), lanes.perturbed.active
        clean = backup
        if not all(moved):
            clean = [backup[i] if moved[i] else weight for i, weight in enumerate(weights)]
    half = "descent" if only is None else f"descent of {only}"
    segments = lanes.segments(grads, weight=weights, clean=clean, other=other, half=half, only=only)
    return Half(lanes, segments, steps)


def descend(half: Half, rule: Rule, coef: Tensor, key: Tensor, stochastic: bool, keep: bool) -> None:
    """Update the parameters that take part by a rule; see `kernels.reference.descend_`.

    Args:
        half: the launches.
        rule: the rule.
        coef, key: of each parameter.
        stochastic: round 16-bit numbers stochastically.
        keep: write the component of LookSAM's gradients that is to be reused.
    """
    lanes = half.lanes
    lane = lanes.lanes.get
    names = rule.lanes(lanes.groups[0])
    ops.descend_(
        half.segments,
        [lanes.lanes[name] for name in names],
        lane("remainder"),
        lane("anchor"),
        lane("ema"),
        lanes.lane("orthogonal", lanes.dtype) if keep else None,
        coef,
        key,
        rule.name,
        stochastic,
        [lanes.lanes[f"{name}_scale"] for name in names if lanes.is_coded(name)],
        half.steps,
    )
    lanes.written(half.active)
