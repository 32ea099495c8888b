"""The coefficients of the passes in plain PyTorch: a few numbers for each segment, from numbers on the device alone.

No pass waits for the host, and no value recompiles a kernel: hyper-parameters, counts of updates and norms are tensors.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from . import spec
from .spec import WEYL

_WORD = 0xFFFFFFFF


def key_at(key: Tensor, offset: int | Tensor) -> Tensor:
    """The key, int64 in [0, 2**32), with which element 0 gets the numbers that element `offset` gets with `key`."""
    return (key.to(torch.int64) + offset * WEYL) & _WORD


def keys(step: Tensor, salt: Tensor, offset: Tensor) -> Tensor:
    """Keys of the random numbers: another for every step and salt, with the counter starting at `offset`.

    Args:
        step: float [n], updates so far.
        salt: int64 [n], made of seed, parameter and pass.
        offset: int64 [n], how many elements of the parameter come before those at hand.

    Returns:
        int32 [n].
    """
    key = (step.to(torch.int64) * spec.STEP + salt) & _WORD
    for factor in spec.MIXES:
        key = ((key ^ (key >> 15)) * factor) & _WORD
    key = key_at(key ^ (key >> 16), offset)
    # The same 32 bits, signed.
    return (key - ((key >> 31) << 32)).to(torch.int32)


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


def clip_factor(norm_sq: Tensor, inv_scale: Tensor | float, max_norm: float | Tensor) -> tuple[Tensor, Tensor]:
    """What to multiply gradients with to make their norm at most max_norm (as `clip_grad_norm_`); whether to skip."""
    norm = norm_sq.sqrt() * inv_scale
    return (max_norm / (norm + 1e-6)).clamp(max=1.0), ~torch.isfinite(norm)


def decomposition(dots: Tensor, alpha: float | Tensor, ratio: Tensor | float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
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


def reuse(dots: Tensor, alpha: float | Tensor) -> tuple[Tensor, Tensor]:
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


def balanced(rate: Tensor, lr: Tensor, balance: Tensor, squares: Tensor, pairs: Tensor) -> Tensor:
    """The rate of decay with which a weight decays at `rate`, and then grows or decays at `balance` within its pair.

    ``1 - lr * result = (1 - lr * rate) * (1 + lr * balance * s)``, with the sign s of the difference of the two squared
    norms, which is 0 where that is not finite: algorithms 2 and 3 of arXiv 2410.14802, by which norms are measured.

    Args:
        rate, lr, balance: fp64 [n].
        squares: fp64 [m], squared norms, NaN where there is none.
        pairs: int64 [n, 2], where in `squares` one's own is and where that of the other one of the pair.
    """
    more = squares[pairs[:, 0]] - squares[pairs[:, 1]]
    return rate - balance * torch.where(more.isfinite(), more.sign(), 0.0) * (1 - lr * rate)


def _adamw(n: SimpleNamespace, step: Tensor) -> dict[str, Tensor]:
    return {
        "decay": n.lr * n.rate,
        "new1": 1 - n.beta1,
        "beta2": n.beta2,
        "new2": 1 - n.beta2,
        "step_size": n.lr / (1 - n.beta1**step),
        "inv_sqrt_bias2": 1 / (1 - n.beta2**step).sqrt(),
        "eps": n.eps,
    }


def _sgd(n: SimpleNamespace, step: Tensor) -> dict[str, Tensor]:
    # The first gradient is the first momentum, undampened.
    first = step <= 1
    return {
        "decay": n.rate,
        "momentum": torch.where(first, 0.0, n.momentum),
        "new": torch.where(first, torch.ones_like(n.new), n.new),
        "of_grad": n.of_grad,
        "of_buffer": n.of_buffer,
        "lr": n.lr,
    }


def _lion(n: SimpleNamespace, step: Tensor) -> dict[str, Tensor]:
    return {"decay": n.lr * n.rate, "beta1": n.beta1, "new1": 1 - n.beta1, "new2": 1 - n.beta2, "lr": n.lr}


_RULES = {"adamw": _adamw, "sgd": _sgd, "lion": _lion}


def _rows(columns: tuple[str, ...], numbers: Tensor, members: Tensor) -> SimpleNamespace:
    rows = numbers[members[:, spec.MEMBER.index("group")]]
    return SimpleNamespace(**dict(zip(columns, rows.unbind(1), strict=True)))


def _double(scale: Tensor | None, one: Tensor) -> Tensor:
    return one if scale is None else scale.reshape(()).to(torch.float64)


def _keys(members: Tensor, steps: Tensor, purpose: int) -> Tensor:
    _, salt, start = members.unbind(1)
    return keys(steps, salt + purpose, start)


def climb_coefficients(
    numbers: Tensor,
    members: Tensor,
    steps: Tensor,
    purpose: int,
    norm_sq: Tensor,
    scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What `perturb_` is given, so that the norm of eps is rho; zero where the gradients' norm is not finite.

    Args:
        numbers: fp64 [groups, len(spec.CLIMB)].
        members: int64 [segments, len(spec.MEMBER)].
        steps: fp32 [segments], how often each segment was updated.
        purpose: any integer in [0, 2**32): with others random numbers are others.
        norm_sq: fp64 scalar, of the gradients as they are.
        scale: fp32 [1], what they were multiplied with (a GradScaler's); None for 1.
        dtype: the compute type.

    Returns:
        Coefficients, [segments, len(spec.PERTURB)] of that type, and keys, int32 [segments].
    """
    n = _rows(spec.CLIMB, numbers, members)
    scale = None if scale is None else scale.reshape(())
    coef = torch.stack([radius(n.rho, norm_sq, scale), n.chance], 1)
    return coef.to(dtype), _keys(members, steps, purpose)


def descend_coefficients(
    rule: str,
    combined: str,
    numbers: Tensor,
    members: Tensor,
    steps: Tensor,
    active: Tensor | None,
    purpose: int,
    measured: Tensor | None,
    scale: Tensor | None,
    other_scale: Tensor | None,
    overflow: Tensor | None,
    squares: Tensor | None,
    pairs: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What `descend_` is given: unscaling, clipping, a second gradient, and the rule's own; it counts the update.

    An update is skipped, and not counted, where the gradients have overflowed: where `overflow` says so or, if they are
    to be clipped, their norm is not finite.

    Args:
        rule: a name in `spec.NUMBERS`.
        combined: what the second gradients are for, one of `spec.COMBINED`.
        numbers: fp64 [groups, len(spec.NUMBERS[rule])].
        members: int64 [segments, len(spec.MEMBER)].
        steps: fp32 [segments], how often each segment was updated; written.
        active: bool [segments], which are updated; None for all.
        purpose: any integer in [0, 2**32): with others random numbers are others.
        measured: of the gradients as they are, fp64: the squared norm, if they are to be clipped; with a second
            gradient what `gap` gives; else None.
        scale: fp32 [1], what the gradients were multiplied with (a GradScaler's); None for 1.
        other_scale: the same for second gradients that are "decomposed".
        overflow: fp32 [1], not 0 to skip the update; or None.
        squares, pairs: as those of `balanced`; or None, where no segments are paired.
        dtype: the compute type.

    Returns:
        Coefficients, [segments, len(spec.DESCEND[rule])] of that type, and keys, int32 [segments].
    """
    n = _rows(spec.NUMBERS[rule], numbers, members)
    alpha, max_norm = (numbers[0, spec.NUMBERS[rule].index(name)] for name in ("alpha", "max_norm"))
    one = numbers.new_ones(())
    inverse = 1.0 / _double(scale, one)
    own, other, norm_sq = one, torch.zeros_like(one), measured
    if measured is None:
        assert combined == "alone"
    elif combined == "decomposed":
        ratio = one if other_scale is None else _double(scale, one) / _double(other_scale, one)
        own, other, norm_sq = decomposition(measured, alpha, ratio)
    elif combined == "kept":
        other, norm_sq = orthogonal_part(measured), measured[2]
    elif combined == "reused":
        other, norm_sq = reuse(measured, alpha)
    factor, skip = inverse, torch.zeros_like(one, dtype=torch.bool)
    if norm_sq is not None:
        clip, too_large = clip_factor(norm_sq, inverse, max_norm)
        clips = max_norm < float("inf")
        factor, skip = torch.where(clips, inverse * clip, inverse), clips & too_large
    if overflow is not None:
        skip = skip | (overflow.reshape(()) != 0)
    now = ~skip if active is None else active & ~skip
    steps += now
    if squares is not None and pairs is not None:
        n.rate = balanced(n.rate, n.lr, n.balance, squares, pairs)
    columns = _RULES[rule](n, steps.to(torch.float64))
    columns["factor"] = n.sign * torch.where(skip, float("nan"), own * factor)
    # The stored component is a gradient of the objective, whatever its sign in the update.
    columns["other"] = other + 0 * n.lr if combined == "kept" else n.sign * (other * factor)
    # NaN where the update is skipped.
    columns["rate"] = n.average + 0.0 * columns["factor"]
    coef = torch.stack([columns[name] for name in spec.DESCEND[rule]], 1)
    return coef.to(dtype), _keys(members, steps, purpose)
