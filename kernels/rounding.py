"""Conversions between storage types and the compute type, and random numbers, the same in the interpreter."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from . import spec

_WEYL = tl.constexpr(spec.WEYL)
_MIX = tl.constexpr(spec.MIX)
_LARGE = tl.constexpr(spec.LARGE)
# The smallest normal fp32 number.
_TINY = tl.constexpr(2.0**-126)
# The interpreter truncates fp32 to bf16, and takes a subnormal bf16 number for another fp32 one.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def random_bits(start, offs, key):
    """32 random bits for each element of a block.

    x = (start + offs) * WEYL + key;  x ^= x >> 15;  x *= MIX  (mod 2**32)

    Args:
        start: scalar, the block's first element in its segment.
        offs: int32 tensor, elements from there.
        key: scalar int32, another for every step, pass and segment.

    Returns:
        uint32 tensor; `high_half` and `low_half` of it are two independent 16-bit numbers.
    """
    weyl = tl.full([], _WEYL, tl.uint32)
    x = offs.to(tl.uint32) * weyl + (start.to(tl.uint32) * weyl + key.to(tl.uint32))
    x ^= x >> 15
    return x * tl.full([], _MIX, tl.uint32)


@triton.jit
def high_half(bits):
    """Upper 16 of 32 random bits, uint32 in [0, 65536)."""
    return bits >> 16


@triton.jit
def low_half(bits):
    """16 bits that do not depend on `high_half(bits)`, uint32 in [0, 65536)."""
    return (bits ^ (bits >> 16)) & 0xFFFF


@triton.jit
def signed(half):
    """16 random bits as int32 in [-32768, 32768)."""
    return (half << 16).to(tl.int32, bitcast=True) >> 16


@triton.jit
def signed_low_half(bits):
    """`signed(low_half(bits))` times 2**16, int32."""
    return ((bits << 16) ^ (bits & 0xFFFF0000)).to(tl.int32, bitcast=True)


@triton.jit
def quotient(x, y):
    """x / y for y >= 0, and 0 where y is 0 or NaN.

    In machine code an fp32 one has an error of 2 ulp, and is 0 where y is subnormal or more than 2**126: what the exact
    division needs to scale these takes five instructions.
    """
    if _INTERPRETED or x.dtype == tl.float64:
        return tl.where(y > 0, x / y, 0.0)
    else:
        return tl.where(y >= _TINY, libdevice.fast_dividef(x, y), 0.0)


@triton.jit
def widen(x, compute: tl.constexpr):
    """`x` of a storage type in the compute type, exactly."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(compute)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """`x` (fp32 or fp64) rounded to the nearest number of a type, ties to even."""
    if dtype == tl.float64:
        return x.to(tl.float64)
    x = x.to(tl.float32)
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + ((bits >> 16) & 1) + 0x7FFF
        # A NaN whose payload lies in the lower half must not turn into an infinity.
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits | 0x400000, rounded)
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def stochastic_round(x, half, dtype: tl.constexpr):
    """fp32 `x` rounded to one of its two neighbours in `dtype`, bf16 or fp16, so that the mean over `half` is `x`.

    As `reference.stochastic_round` with the random number `signed(half)`: bf16 by cutting off the lower half of the sum
    of bits and random ones, fp16 as round_to_nearest_even(x + (U - 1/2) step). A value that `dtype` can hold stays as
    it is, and a finite one stays finite; from 2**100 on it is rounded to nearest.

    Args:
        x: fp32 tensor.
        half: uint32 tensor, uniform in [0, 65536).
    """
    if dtype == tl.bfloat16:
        y = ((x.to(tl.uint32, bitcast=True) + half) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        # fp16 has 10 bits after the leading one; subnormals have the step of the smallest normal number. The noise is
        # an odd multiple of 2**-13 steps, its 13 bits are the upper ones of an integer.
        binade = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        unit = tl.maximum(binade * 2.0**-42, 2.0**-56)
        noise = (((half << 16) & 0xFFF80000) | 0x80000).to(tl.int32, bitcast=True).to(tl.float32)
        # Adding and subtracting 1.5 * 2**23 steps rounds to a multiple of the step. All products are exact.
        y = tl.fma(unit, noise, x)
        y = tl.fma(unit, -1.5 * 2.0**55, tl.fma(unit, 1.5 * 2.0**55, y))
        y = tl.clamp(y, -65504.0, 65504.0)
    return narrow(tl.where(tl.abs(x) < _LARGE, y, x), dtype)


@triton.jit
def round_to(x, half, dtype: tl.constexpr, STOCHASTIC: tl.constexpr):
    """`x` (fp32 or fp64) in `dtype`: to nearest, or, if STOCHASTIC and of 16 bits, with `stochastic_round`."""
    if STOCHASTIC and dtype.primitive_bitwidth == 16:
        return stochastic_round(x, half, dtype)
    else:
        return narrow(x, dtype)
