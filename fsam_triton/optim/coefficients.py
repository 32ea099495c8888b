"""The few numbers a pass needs, computed on the device: no pass waits for the host, no value recompiles a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..buffers.lanes import Lanes
from ..kernels.reference import compute_dtype as compute_dtype
from ..kernels.reference import key_at
from ..kernels.spec import WEYL

_WORD = 0xFFFFFFFF


def keys(step: Tensor, salt: Tensor, offset: Tensor) -> Tensor:
    """Keys of the random numbers: another for every step and salt, with the counter starting at `offset`.

    Args:
        step: float [n], updates so far.
        salt: int64 [n], made of seed, parameter and pass.
        offset: int64 [n], how many elements of the parameter come before those at hand.

    Returns:
        int32 [n].
    """
    key = (step.to(torch.int64) * 0x85EBCA6B + salt) & _WORD
    for factor in (0x7FEB352D, 0x846CA68B):
        key = ((key ^ (key >> 15)) * factor) & _WORD
    key = key_at(key ^ (key >> 16), offset)
    # The same 32 bits, signed.
    return (key - ((key >> 31) << 32)).to(torch.int32)


def keys_of(lanes: Lanes, seed: int, purpose: int) -> Tensor:
    """Keys of a pass over parameters, int32 [parameters]: the same whatever lanes and shards they are in."""
    salt = lanes.constant("salt", lambda: [member.number * 0xC2B2AE35 & _WORD for member in lanes.members])
    return keys(lanes.steps, salt + (seed * WEYL + purpose & _WORD), lanes.constant("start", lanes.starts))


def no_keys(lanes: Lanes) -> Tensor:
    """Keys of a pass that draws no random numbers, int32 [parameters]."""
    return lanes.constant("no keys", lambda: [0] * len(lanes)).to(torch.int32)


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


def representable(beta: float) -> float:
    """The probability with which `perturb_` moves a coordinate if asked for beta: a multiple of 2**-15, > 0."""
    return max(round(beta * 2**15), 1) * 2.0**-15


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
