"""The formats of fewer bits: moments and backups in 8 bits, master weights in 24; see `formats` for what they mean."""

import triton
import triton.language as tl

from . import spec
from .rounding import narrow, quotient, widen

_GROUP = tl.constexpr(spec.GROUP)
_SHIFT = tl.constexpr(spec.GROUP.bit_length() - 1)
_SMALLEST = tl.constexpr(spec.SMALLEST)
_SIGNED, _UNSIGNED = tl.constexpr(float(spec.SIGNED_LEVELS)), tl.constexpr(float(spec.UNSIGNED_LEVELS))


@triton.jit
def load_codes(codes_ptr, scale_ptr, place, offs, inside):
    """The moments, fp32, of a lane's codes place + offs; see `formats.decode`. place is a multiple of the group."""
    codes = tl.load(codes_ptr + offs, mask=inside, other=None if inside is None else 0)
    scale_ptr += place >> _SHIFT
    scale = tl.load(scale_ptr + (offs >> _SHIFT), mask=inside, other=None if inside is None else 0.0)
    root, unit = codes.to(tl.float32), widen(scale, tl.float32)
    square = root * tl.abs(root)
    if codes.dtype == tl.int8:
        return square * (unit * (1.0 / _SIGNED))
    else:
        return square * square * (unit * (1.0 / _UNSIGNED))


@triton.jit
def store_codes(codes_ptr, scale_ptr, place, offs, left, x, noise, WHOLE: tl.constexpr, SIZE: tl.constexpr):
    """Store moments as codes and scales; see `formats.encode`.

    Args:
        codes_ptr: to the block's first code, int8 for first moments, uint8 for second ones.
        scale_ptr: to the lane's first scale.
        place: of the block in the lane.
        offs: SIZE elements of the block.
        left: how many the block has.
        x: fp32 [SIZE], finite.
        noise: what rounds the codes, int32: 1/2 or random, in 2**-15.
        WHOLE: whether all elements are there.
    """
    groups: tl.constexpr = SIZE // _GROUP
    inside = None if WHOLE else offs < left
    size = tl.abs(x)
    if not WHOLE:
        size = tl.where(inside, size, 0.0)
    largest = tl.max(tl.reshape(size, [groups, _GROUP]), 1, keep_dims=True)
    bits = (largest.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000
    scale = tl.minimum(bits, 0x7F7F0000).to(tl.float32, bitcast=True)
    scale = tl.where(scale >= _SMALLEST, scale, 0.0)
    is_signed: tl.constexpr = codes_ptr.dtype.element_ty == tl.int8
    inverse = quotient(tl.full(scale.shape, _SIGNED if is_signed else _UNSIGNED, tl.float32), scale)
    inverse = tl.reshape(tl.broadcast_to(inverse, [groups, _GROUP]), [SIZE])
    level = tl.sqrt(size * inverse)
    if is_signed:
        sign = x.to(tl.int32, bitcast=True) & -0x80000000
        level = (level.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True) + 384.0
        # 128 stands for 0.
        noise -= 128 << 15
    else:
        level = tl.maximum(tl.sqrt(level), 1.0) + 256.0
    code = (level.to(tl.int32, bitcast=True) + noise) >> 15
    tl.store(codes_ptr + offs, code.to(codes_ptr.dtype.element_ty), mask=inside)
    # By the lane that has the first of a group: to any other it would go through shared memory. Triton leaves elements
    # where they are if it believes that a lane's could be stored together, which the mask rules out.
    scale = (scale.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    scale = tl.reshape(tl.broadcast_to(scale, [groups, _GROUP]), [SIZE])
    scale_ptr = tl.max_contiguous(tl.multiple_of(scale_ptr + (place >> _SHIFT) + (offs >> _SHIFT), 16), 8)
    is_first = offs & (_GROUP - 1) == 0
    tl.store(scale_ptr, scale, mask=is_first if WHOLE else is_first & inside)


@triton.jit
def noise_of(bits, i: tl.constexpr):
    """How codes of lane i are rounded: by one of 32 random bits' bytes, of which the highest is for the weight."""
    return ((bits >> (9 - 8 * i) & 0x7F80) | 0x40).to(tl.int32)


@triton.jit
def mirrored(order):
    """16-bit floats, taken for whole numbers and as int32, in the order of the numbers; and the inverse."""
    return tl.where(order < 0, -0x8001 - order, order)


@triton.jit
def displace(weight, target):
    """Weights moved to `target` by at most 127 steps, and the steps, int8; see `formats.displace`."""
    before = mirrored(weight.to(tl.int16, bitcast=True).to(tl.int32))
    moved = mirrored(target.to(tl.int16, bitcast=True).to(tl.int32)) - before
    moved = tl.minimum(tl.maximum(moved, -127), 127)
    return mirrored(before + moved).to(tl.int16).to(weight.dtype, bitcast=True), moved.to(tl.int8)


@triton.jit
def replace(weight, steps):
    """The inverse of `displace`."""
    # In the upper half of 32 bits, where master weights are put together.
    order = (weight.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.int32, bitcast=True)
    order = tl.where(order < 0, 0x7FFF0000 - order, order)
    order -= steps.to(tl.int32) << 16
    order ^= (order >> 31) & 0x7FFF0000
    return (order >> 16).to(tl.int16).to(weight.dtype, bitcast=True)


@triton.jit
def combine(weight, remainder):
    """The fp32 master weights of which 16-bit ones are the rounding; see `formats.combine`."""
    wide = widen(weight, tl.float32)
    lost = remainder.to(tl.int32)
    if remainder.dtype == tl.int8:
        lost = lost << 8
    master = (wide.to(tl.int32, bitcast=True) + lost).to(tl.float32, bitcast=True)
    if weight.dtype == tl.float16:
        return tl.where(narrow(master, tl.float16) == weight, master, wide)
    return tl.where(master == master, master, wide)


@triton.jit
def split(master, dtype: tl.constexpr, remainder_dtype: tl.constexpr, random):
    """fp32 master weights as their rounding to nearest, and what it lost; see `formats.split`.

    random: int32 in [0, 256), or 0x80 to round 24-bit master weights to nearest.
    """
    bits = master.to(tl.int32, bitcast=True)
    if remainder_dtype == tl.int8:
        kept = bits + random
        weight = (tl.where(master == master, kept + 0x8000, bits) >> 16).to(tl.int16).to(dtype, bitcast=True)
        return weight, (kept >> 8).to(tl.int8)
    else:
        weight = narrow(master, dtype)
        lost = bits - widen(weight, tl.float32).to(tl.int32, bitcast=True)
        if remainder_dtype == tl.int16:
            lost = tl.minimum(lost, 32767)
        return weight, lost.to(remainder_dtype)
