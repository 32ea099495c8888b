"""The few numbers a pass needs, computed on the device: no pass waits for the host, no value recompiles a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels.reference import key_at

_WORD = 0xFFFFFFFF


class HyperParameters:
    """Rows of hyper-parameters on one device, sent again only when a value has changed."""

    def __init__(self) -> None:
        self._sent: tuple = ()
        self._rows = torch.empty(0)

    def rows(self, values: Sequence[Sequence[float | Tensor]], device: torch.device) -> Tensor:
        """`values` as fp64 [rows, columns]. A tensor among them (a learning rate) is copied without a host sync."""
        plain = tuple(tuple(None if isinstance(v, Tensor) else float(v) for v in row) for row in values)
        if plain != self._sent:
            numbers = [[0.0 if v is None else v for v in row] for row in plain]
            host = torch.tensor(numbers, dtype=torch.float64, pin_memory=device.type == "cuda")
            self._sent, self._rows = plain, host.to(device, non_blocking=True)
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if isinstance(value, Tensor):
                    self._rows[i, j].copy_(value.detach().squeeze(), non_blocking=True)
        return self._rows


def keys(step: Tensor, salt: Tensor, offset: Tensor) -> Tensor:
    """Keys of the random numbers: another for every step and salt, with the counter starting at `offset`.

    Args:
        step: float [n], updates so far.
        salt: int64 [n], made of seed, bucket and pass.
        offset: int64 [n], first element of the launch in its bucket.

    Returns:
        fp64 [n] of integers in [0, 2**32).
    """
    key = (step.to(torch.int64) * 0x85EBCA6B + salt) & _WORD
    for factor in (0x7FEB352D, 0x846CA68B):
        key = ((key ^ (key >> 15)) * factor) & _WORD
    return key_at(key ^ (key >> 16), offset).to(torch.float64)


def radius(rho: Tensor | float, norm_sq: Tensor, scale: Tensor | None = None) -> Tensor:
    """What to multiply a vector with so that its norm is rho, or 0 where the norm is not finite.

    Args:
        rho: the wanted norm.
        norm_sq: squared norm of the vector.
        scale: what the vector is multiplied with already (a GradScaler's). Powers of two cancel exactly.
    """
    norm = norm_sq.sqrt()
    if scale is None:
        return torch.where(norm < float("inf"), rho / (norm + 1e-12), 0.0)
    inverse = 1.0 / scale.to(torch.float64)
    norm = norm * inverse
    return torch.where(norm < float("inf"), rho / (norm + 1e-12) * inverse, 0.0)


def next_moment_sq(dots: Tensor, beta1: Tensor | float, factor: Tensor | float) -> Tensor:
    """Squared norm of beta1 * m + (1 - beta1) * factor * g, from the fp64 [3] <m, g>, norm(m)^2 and norm(g)^2."""
    dot, moment_sq, sq = dots.unbind()
    new = (1 - beta1) * factor
    out = beta1**2 * moment_sq + 2 * beta1 * new * dot + new**2 * sq
    # Where the two cancel, the sum is rounding noise, and so is the new moment: it must not be stretched to rho.
    return torch.maximum(out, 2.0**-20 * (beta1**2 * moment_sq + new**2 * sq))


def representable(beta: float) -> float:
    """The probability with which `perturb_` moves a coordinate if asked for beta: a multiple of 2**-15, > 0."""
    return max(round(beta * 2**15), 1) * 2.0**-15


def ascent(rho: Tensor, norm_sq: Tensor, key: Tensor, beta: float | None = None, scale: Tensor | None = None) -> Tensor:
    """Coefficients of `perturb_`, [n, 2] or, with the probability beta, [n, 3]: radius over norm, keys, beta - 1/2."""
    columns = [radius(rho, norm_sq, scale), key]
    if beta is not None:
        columns.append(torch.full_like(key, beta - 0.5))
    return torch.stack(columns, 1)


def clip_factor(norm_sq: Tensor, inv_scale: Tensor | float, max_norm: float) -> tuple[Tensor, Tensor]:
    """What to multiply gradients with to make their norm at most max_norm (as `clip_grad_norm_`); whether to skip."""
    norm = norm_sq.sqrt() * inv_scale
    return (max_norm / (norm + 1e-6)).clamp(max=1.0), ~torch.isfinite(norm)


def decomposition(dots: Tensor, alpha: float, ratio: Tensor | float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """GSAM's direction, g2 - alpha * (g1 - (<g1, g2> / norm(g2)^2) * g2), as multiples of the two gradients.

    arXiv 2203.08065, algorithm 1. Where g1 is not finite, or g2 is zero, the direction is g2.

    Args:
        dots: fp64 [3]: <g1, g2>, norm(g1)^2, norm(g2)^2.
        alpha: the paper's.
        ratio: what to multiply g1 with so that it has the scale of g2 (a GradScaler's).

    Returns:
        fp64 scalars: what to multiply g2 with, what to multiply g1 with, the squared norm of the sum.
    """
    dot, first_sq, second_sq = dots.unbind()
    dot, first_sq = ratio * dot, ratio**2 * first_sq
    usable = torch.isfinite(dot) & torch.isfinite(first_sq) & (second_sq > 0)
    of_second = torch.where(usable, 1 + alpha * dot / second_sq, 1.0)
    # Not two numbers: torch.where would make fp32 of them.
    of_first = torch.where(usable, -alpha * ratio, torch.zeros_like(dot))
    # <g1, v> = norm(v)^2 for the part v of g1 that is orthogonal to g2: no cancellation between large terms.
    vertical_sq = (first_sq - dot * dot / second_sq).clamp(min=0)
    return of_second, of_first, torch.where(usable, second_sq + alpha**2 * vertical_sq, second_sq)


def orthogonal_part(dots: Tensor) -> Tensor:
    """<g1, g2> / norm(g1)^2: times g1, to subtract from g2 for LookSAM's orthogonal component (arXiv 2203.02714)."""
    dot, first_sq, _ = dots.unbind()
    return torch.where(torch.isfinite(dot) & (first_sq > 0), dot / first_sq, 0.0)


def reuse(dots: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """LookSAM's direction between two sharpness-aware steps, g + alpha * norm(g) / norm(g_v) * g_v.

    Args:
        dots: fp64 [3]: <g_v, g>, norm(g_v)^2, norm(g)^2.
        alpha: the paper's (arXiv 2203.02714, equation 6).

    Returns:
        fp64 scalars: what to multiply g_v with (0 if it is zero or not finite), the squared norm of the sum.
    """
    dot, kept_sq, sq = dots.unbind()
    usable = torch.isfinite(kept_sq) & (kept_sq > 0) & torch.isfinite(sq)
    factor = torch.where(usable, alpha * (sq / kept_sq).sqrt(), 0.0)
    return factor, torch.where(usable, sq + 2 * factor * dot + factor**2 * kept_sq, sq)


def descent(
    hyper: Tensor,
    step: Tensor,
    factor: Tensor | float,
    key: Tensor,
    other: Tensor | float | None = None,
    ema_decay: float | None = None,
) -> Tensor:
    """Coefficients of `adamw_l2sp_`, [n, 9], with a second gradient [n, 12], with an average of the weights [n, 13].

    arXiv 1711.05101, algorithm 2.

    Args:
        hyper: fp64 [n, 6]: lr, beta1, beta2, eps, decay rate (weight_decay or l2_sp), 1 or -1 to maximize.
        step: [n], updates including this one.
        factor: unscaling times clipping; NaN skips the update.
        key: fp64 [n].
        other: what to multiply the second gradient with.
        ema_decay: what to multiply the average of the weights with.
    """
    lr, _, beta2, eps, rate, sign = hyper.unbind(1)
    betas = hyper[:, 1:3]
    new1, new2 = torch.rsub(betas, 1).unbind(1)
    bias1, bias2 = torch.rsub(betas ** step.to(torch.float64)[:, None], 1).unbind(1)
    columns = [sign * factor, lr * rate, new1, beta2, new2, lr / bias1, bias2.rsqrt(), eps, key]
    if other is not None or ema_decay is not None:
        unused = torch.zeros_like(lr)
        columns += [unused if other is None else sign * other, unused, unused]
    if ema_decay is not None:
        # NaN where the update is skipped.
        columns.append(torch.full_like(lr, 1 - ema_decay) + 0.0 * factor)
    return torch.stack(columns, 1)
