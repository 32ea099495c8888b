"""The formats of fewer bits in plain PyTorch: master weights, moments in 8 bits, and backups in 8 bits.

The oracle of `codecs` (Triton) and cpu/codecs.h, and what optimizers use outside of passes. Random bits are int32 in
[0, 256), one for each element; None rounds to nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import spec


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


# -- master weights ----------------------------------------------------------------------------------------------------


def combine(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 master weights of which `weight` is the rounding: their bits are those of the weights plus `remainder`.

    Whatever somebody else has written into the weights is the master then, to within the old remainder. One that does
    not fit counts as zero: below a zero there is no number, and in fp16 the remainder of a subnormal number is large.

    Args:
        weight: bf16 or fp16.
        remainder: int16 or int8 for bf16, int32 for fp16; one of 8 bits counts in steps of 256.
    """
    wide = weight.float()
    lost = remainder.to(torch.int32) << 8 if remainder.dtype == torch.int8 else remainder.to(torch.int32)
    master = (_bits(wide) + lost).view(torch.float32)
    fits = ~master.isnan() if weight.dtype == torch.bfloat16 else master.half() == weight
    return torch.where(fits, master, wide)


def split(master: Tensor, weight: Tensor, remainder: Tensor, random: Tensor | None = None) -> None:
    """Write fp32 master weights as their rounding to nearest and what that lost; see `combine`.

    32 bits are kept exactly, except that half a step of bf16 upwards (1 of 65,536 remainders) is kept as one fp32 step
    less. Of 24 bits (an int8 remainder) the last is rounded, away from zero with a probability of what is cut off if
    there are `random` bits; halves of a step of bf16 are rounded away from zero then, so that every remainder has its
    place. That of a NaN has no meaning.
    """
    if remainder.dtype != torch.int8:
        weight.copy_(master)
        lost = _bits(master) - _bits(weight.float())
        remainder.copy_(lost.clamp(max=32767) if remainder.dtype == torch.int16 else lost)
        return
    kept = _bits(master) + (0x80 if random is None else random)
    high = (kept + 0x8000) & -0x10000
    weight.copy_(torch.where(master.isnan(), master, high.view(torch.float32)))
    # The byte after those of the weight, which has been rounded up if the byte's sign is set.
    remainder.copy_((kept << 16 >> 24).to(torch.int8))


# -- moments -----------------------------------------------------------------------------------------------------------


def encode(x: Tensor, signed: bool, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Moments as codes of 8 bits with a scale for each `spec.GROUP` elements.

    A scale is the largest magnitude of its group, rounded up to bf16. Of what is left, in [0, 1], the code counts the
    square root in 127ths, with the sign (first moments), or the fourth root in 255ths, at least one of them (second
    moments: an update is divided by the root of one, which must not be taken for zero). Roots give small elements of a
    group a share of the codes: on the moments of a real model the update is closer to that of fp32 moments than with
    other published codes of 8 bits (docs/memory.md).

    Rounding at random keeps moments from standing still where an update is less than a step. It is right on the average
    of the roots: a second moment with code k is then too large by about 1 / k**2 of itself in each update. With beta2 =
    0.999 it therefore dies out down to k = 32, 1/4000 of its group's largest, and not below.

    Args:
        x: fp32 [n], finite; not negative unless signed.
        signed: of first moments.
        random: whether to round up with a probability of what is cut off.

    Returns:
        int8 or uint8 [n], and bf16 [ceil(n / spec.GROUP)], which is 0 for groups below `spec.SMALLEST`.
    """
    groups = torch.nn.functional.pad(x, (0, -len(x) % spec.GROUP)).view(-1, spec.GROUP)
    size = groups.abs()
    largest = (_bits(size.amax(1)) + 0xFFFF) & -0x10000
    scale = largest.clamp(max=0x7F7F0000).view(torch.float32)
    scale = torch.where(scale >= spec.SMALLEST, scale, 0.0)
    levels = float(spec.SIGNED_LEVELS if signed else spec.UNSIGNED_LEVELS)
    # A number divided by a tensor is multiplied with its reciprocal.
    inverse = torch.where(scale > 0, torch.full_like(scale, levels) / scale, 0.0)
    root = (size * inverse[:, None]).sqrt()
    level = torch.where(groups < 0, -root, root) + 384.0 if signed else root.sqrt().clamp(min=1.0) + 256.0
    # Between 256 and 512 a number has 8 bits before the point that count, and 15 after it.
    noise = 0x4000 if random is None else (random << 7) | 0x40
    code = (_bits(level.view(-1)[: len(x)]) + noise >> 15) & 0xFF
    codes = (code - 128).to(torch.int8) if signed else code.to(torch.uint8)
    return codes, scale.bfloat16()


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The moments, fp32 [n], of codes [n] and scales; see `encode`. int8 codes are of first moments."""
    is_signed, root = codes.dtype == torch.int8, codes.float()
    unit = scale.float() * (1.0 / (spec.SIGNED_LEVELS if is_signed else spec.UNSIGNED_LEVELS))
    square = root * root.abs()
    power = square if is_signed else square * square
    return power * unit.repeat_interleave(spec.GROUP)[: len(codes)]


# -- backups -----------------------------------------------------------------------------------------------------------


def ordered(weight: Tensor) -> Tensor:
    """16-bit floats as int32 in the order of the numbers: neighbours differ by 1; one to one."""
    bits = weight.view(torch.int16).to(torch.int32)
    return bits ^ ((bits >> 15) & 0x7FFF)


def unordered(order: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `ordered`; of other integers, that of their lower 16 bits."""
    order = order.to(torch.int16)
    return (order ^ ((order >> 15) & 0x7FFF)).view(dtype)


def displace(weight: Tensor, target: Tensor, steps: Tensor) -> None:
    """Move 16-bit weights to `target`, by at most 127 steps of their type, which are counted in `steps`.

    Args:
        weight: bf16 or fp16; written.
        target: of the weights' type.
        steps: int8; written.
    """
    before = ordered(weight)
    moved = (ordered(target) - before).clamp(-127, 127)
    steps.copy_(moved)
    weight.copy_(unordered(before + moved, weight.dtype))


def replace(weight: Tensor, steps: Tensor) -> Tensor:
    """The weights from which `displace` has moved `weight`, to the bit."""
    return unordered(ordered(weight) - steps.to(torch.int32), weight.dtype)
