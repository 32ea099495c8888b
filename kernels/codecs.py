"""The formats of fewer bits: moments and backups in 8 bits, master weights in 24; see `formats` for what they mean."""

import triton
import triton.language as tl

from . import spec
from .rounding import narrow, quotient, widen

_GROUP = tl.constexpr(spec.GROUP)
_TINY = tl.constexpr(spec.TINY)
_LARGE = tl.constexpr(spec.LARGE)


@triton.jit
def load_codes(codes_ptr, scale_ptr, place, offs, inside):
    """The moments, fp32, of a lane's codes place + offs; see `formats.decode`. place is a multiple of the group."""
    codes = tl.load(codes_ptr + offs, mask=inside, other=None if inside is None else 0)
    scale = tl.load(scale_ptr + place // _GROUP + offs // _GROUP, mask=inside, other=None if inside is None else 0.0)
    scale = widen(scale, tl.float32)
    if codes.dtype == tl.int8:
        root = codes.to(tl.float32) * (1 / 127)
        return root * tl.abs(root) * scale
    else:
        root = codes.to(tl.float32) * (1 / 255)
        square = root * root
        return square * square * scale


@triton.jit
def store_codes(codes_ptr, scale_ptr, place, offs, inside, x, noise, SIZE: tl.constexpr):
    """Store moments as codes and scales; see `formats.encode`.

    Args:
        codes_ptr: to the block's first code, int8 for first moments, uint8 for second ones.
        scale_ptr: to the lane's first scale.
        place, offs, inside: as for `load_codes`; offs are SIZE elements in groups.
        x: fp32 [SIZE], finite.
        noise: `rounding` of the codes, int32: 1/2 or random, in 2**-15.
    """
    size = tl.abs(x)
    if inside is not None:
        size = tl.where(inside, size, 0.0)
    groups = tl.reshape(size, [SIZE // _GROUP, _GROUP])
    largest = tl.max(groups, 1, keep_dims=True)
    bits = (largest.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000
    scale = tl.minimum(bits, 0x7F7F0000).to(tl.float32, bitcast=True)
    scale = tl.where(scale >= _TINY, scale, 0.0)
    inverse = quotient(tl.full(scale.shape, 1.0, tl.float32), scale)
    scale = tl.reshape(tl.broadcast_to(scale, [SIZE // _GROUP, _GROUP]), [SIZE])
    inverse = tl.reshape(tl.broadcast_to(inverse, [SIZE // _GROUP, _GROUP]), [SIZE])
    root = tl.sqrt(size * inverse)
    if codes_ptr.dtype.element_ty == tl.int8:
        level = root * 127.0
        level = tl.where(x < 0, -level, level) + 384.0
        code = (level.to(tl.int32, bitcast=True) + noise) >> 15
        # The highest bit, which stands for 128, and those above it fall off.
        code ^= 0x80
    else:
        level = tl.sqrt(root) * 255.0 + 256.0
        code = ((level.to(tl.int32, bitcast=True) + noise) >> 15) & 0xFF
        code = tl.maximum(code, (x > 0).to(tl.int32))
    tl.store(codes_ptr + offs, code.to(codes_ptr.dtype.element_ty), mask=inside)
    first = offs % _GROUP == 0
    if inside is not None:
        first = first & inside
    tl.store(scale_ptr + place // _GROUP + offs // _GROUP, narrow(scale, tl.bfloat16), mask=first)


@triton.jit
def noise_of(bits, i: tl.constexpr):
    """How codes of lane i are rounded: by byte i of 16 random bits, in the middle of its range."""
    return ((bits >> (8 * i) & 0xFF) << 7 | 0x40).to(tl.int32)


@triton.jit
def ordered(weight):
    """16-bit floats as int32 in the order of the numbers."""
    bits = weight.to(tl.int16, bitcast=True).to(tl.int32)
    return bits ^ ((bits >> 15) & 0x7FFF)


@triton.jit
def unordered(order, dtype: tl.constexpr):
    """The inverse of `ordered`."""
    return (order ^ ((order >> 15) & 0x7FFF)).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def displace(weight, target):
    """Weights moved to `target` by at most 127 steps, and the steps, int8; see `formats.displace`."""
    before = ordered(weight)
    moved = tl.minimum(tl.maximum(ordered(target) - before, -127), 127)
    return unordered(before + moved, weight.dtype), moved.to(tl.int8)


@triton.jit
def replace(weight, steps):
    """The inverse of `displace`."""
    return unordered(ordered(weight) - steps.to(tl.int32), weight.dtype)


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
        kept = (bits + tl.where(tl.abs(master) < _LARGE, random, 0x80)) & -0x100
        high = (kept + 0x8000) & -0x10000
        is_number = master == master
        weight = (tl.where(is_number, high, bits) >> 16).to(tl.int16).to(dtype, bitcast=True)
        return weight, tl.where(is_number, (kept - high) >> 8, 0).to(tl.int8)
    else:
        weight = narrow(master, dtype)
        lost = bits - widen(weight, tl.float32).to(tl.int32, bitcast=True)
        if remainder_dtype == tl.int16:
            lost = tl.minimum(lost, 32767)
        return weight, lost.to(remainder_dtype)
