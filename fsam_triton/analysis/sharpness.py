"""How much the loss rises within a ball around the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import check
from .mean_loss import Loss, Vector, measuring, moved, norm, random_like, scaled


def m_sharpness(model: nn.Module, loss: Loss, batches: Iterable[Any], rho: float = 0.05) -> float:
    """The mean over batches of how much a batch's loss rises when SAM steps along the batch's own gradient.

    With m the loader's batch size, this is m-sharpness (arXiv 2010.01412, section 4.1; arXiv 2206.06232), with the
    maximum over the ball approximated to first order, as in SAM:

        mean over batches of  L_b(w + rho * g_b / norm(g_b)) - L_b(w),   g_b the gradient of L_b at w

    A batch whose gradient is zero contributes zero. During the measurement the model is in eval mode, without dropout.
    Its weights, gradients, flags, buffers and modes are left unchanged, and so are random states.

    Args:
        model: its parameters with `requires_grad` count. 16-bit weights are evaluated in fp32, from their current
            values.
        loss: ``loss(model, batch)`` returns the mean loss of a batch, a scalar tensor.
        batches: a DataLoader or list, read once and kept in memory. Batches are weighted by their number of samples:
            the rows of their first tensor. If one has no tensor, all are weighted equally.
        rho: radius, > 0, as for the optimizers (default: 0.05).

    Returns:
        The mean rise; negative where the loss curves down.

    Raises:
        ValueError: an argument is out of its range, there are no batches, or `loss` returns no scalar.
        FloatingPointError: a loss is not finite.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(2.0)
        >>> halved_square = lambda model, x: 0.5 * model(x).square().mean()
        >>> round(m_sharpness(model, halved_square, [torch.ones(4, 1)], rho=0.1), 6)  # (2.1^2 - 2^2) / 2
        0.205
    """
    _check_rho(rho)
    with measuring(model, loss, batches) as mean:
        total = 0.0
        for i, share in enumerate(mean.shares):
            value, gradient = mean.gradient_of(i, mean.weights)
            if length := norm(gradient):
                total += share * (mean.value_of(i, moved(mean.weights, gradient, rho / length)) - value)
        return total


def worst_case_sharpness(
    model: nn.Module, loss: Loss, batches: Iterable[Any], rho: float = 0.05, steps: int = 20
) -> float:
    """The largest rise of the loss within a ball: max of L(w + eps) - L(w) over norm(eps) <= rho, L over all batches.

    This is the inner maximum of SAM's objective (arXiv 2010.01412, eq. 1), found by projected ascent along normalised
    gradients. The first step is SAM's; a step that does not raise the loss is taken back and halved. The result is
    therefore a lower bound of the maximum: at least the value at SAM's step, and never negative. If the gradient is
    zero, the ascent begins in a random direction. The model and random states are left alone, as by `m_sharpness`.

    Args:
        model, loss, batches, rho: as for `m_sharpness`.
        steps: number of ascent steps, each a forward and a backward pass over all batches, >= 1 (default: 20).

    Returns:
        The rise that was reached.

    Raises:
        ValueError, FloatingPointError: as for `m_sharpness`.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(2.0)
        >>> halved_square = lambda model, x: 0.5 * model(x).square().mean()
        >>> round(worst_case_sharpness(model, halved_square, [torch.ones(4, 1)], rho=0.1), 6)
        0.205
    """
    _check_rho(rho)
    check(isinstance(steps, int) and steps >= 1, "steps", steps, "must be an int >= 1")
    with measuring(model, loss, batches) as mean:
        start, gradient = mean.gradient(mean.weights)
        best, eps = start, scaled(mean.weights, 0.0)
        # No step need be longer than the ball is wide.
        length = 2 * rho
        for _ in range(steps):
            if not norm(gradient):
                gradient = random_like(gradient, torch.Generator().manual_seed(0))
            trial = _into_ball(moved(eps, gradient, length / norm(gradient)), rho)
            value, its_gradient = mean.gradient(moved(mean.weights, trial, 1.0))
            if value > best:
                best, eps, gradient = value, trial, its_gradient
                length = min(2 * length, 2 * rho)
            else:
                length /= 2
        return best - start


def _into_ball(eps: Vector, rho: float) -> Vector:
    length = norm(eps)
    return scaled(eps, rho / length) if length > rho else eps


def _check_rho(rho: float) -> None:
    check(0 < rho < math.inf, "rho", rho, "must be > 0 and finite")
