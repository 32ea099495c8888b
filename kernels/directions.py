"""Directions of a perturbation that are made of the gradient and an average, in plain PyTorch: the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from . import spec


@dataclass(frozen=True)
class Along:
    """What a perturbation goes along instead of the gradient.

    Args:
        kind: "less_average" or "over_root", see `direction`.
        lane: the average, in any float type [size], or codes of a second moment; "less_average" writes it.
        coef: [segments, len(spec.DIRECTION)], fp64 for fp64 weights, else fp32.
        scale: bf16 [size / 32], of a lane of codes; else None.
        grad_scale: fp32 [1], what the gradients were multiplied with (a GradScaler's), which the direction is not; None
            for 1.
    """

    kind: str
    lane: Tensor
    coef: Tensor
    scale: Tensor | None = None
    grad_scale: Tensor | None = None


def direction(
    kind: str, grad: Tensor, average: Tensor, coef: Tensor, grad_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The direction of a perturbation, and the average that it is made with.

    - "less_average": ``a <- a + rate (g - a)``, ``d = g - factor a``: what a batch's gradient has that others' do not
      (FriendlySAM, arXiv 2403.12350, algorithm 1).
    - "over_root": ``a <- a + rate (g^2 - a)``, ``d = g / (sqrt(a) + factor)``, where 0 / 0 is 0: Adam's preconditioner.

    Where the average is not finite, d is NaN: it would be zero over an infinite root.

    Args:
        kind: one of `spec.ALONG`, not "gradient".
        grad, average: [n] in the compute type.
        coef: [len(spec.DIRECTION)] in the compute type.
        grad_scale: see `Along`.
    """
    c = SimpleNamespace(**dict(zip(spec.DIRECTION, coef, strict=True)))
    if grad_scale is not None:
        grad = grad * (1.0 / grad_scale.to(grad.dtype).reshape(()))
    if kind == "less_average":
        average = average + c.rate * (grad - average)
        return grad - c.factor * average, average
    average = average + c.rate * (grad * grad - average)
    root = average.sqrt() + c.factor
    d = torch.where(root > 0, grad / root, 0.0)
    return torch.where(average < float("inf"), d, float("nan")), average
