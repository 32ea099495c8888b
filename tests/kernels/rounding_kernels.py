"""Kernels around the rounding helpers, so that a test can call them."""

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fsam_triton.kernels import rounding  # noqa: E402

BLOCK = 1 << 15


@triton.jit
def round_kernel(x_ptr, rand_ptr, out_ptr, n, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    x = tl.load(x_ptr + offs, mask=inside)
    half = tl.load(rand_ptr + offs, mask=inside).to(tl.uint32) & 0xFFFF if STOCHASTIC else None
    tl.store(out_ptr + offs, rounding.round_to(x, half, out_ptr.dtype.element_ty, STOCHASTIC), mask=inside)


@triton.jit
def random_kernel(key_ptr, high_ptr, low_ptr, moved_ptr, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    inside = start + offs < n
    bits = rounding.random_bits(start, offs, tl.load(key_ptr))
    tl.store(high_ptr + start + offs, rounding.signed(rounding.high_half(bits)), mask=inside)
    tl.store(low_ptr + start + offs, rounding.signed(rounding.low_half(bits)), mask=inside)
    tl.store(moved_ptr + start + offs, rounding.signed_low_half(bits), mask=inside)


def round_to(x: Tensor, rand: Tensor | None, dtype: torch.dtype) -> Tensor:
    """fp32 `x` in `dtype`, rounded stochastically with the int32 numbers `rand`, or to nearest without."""
    out = torch.empty_like(x, dtype=dtype)
    round_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, rand, out, x.numel(), STOCHASTIC=rand is not None, BLOCK=BLOCK)
    return out


def random_halves(n: int, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """High and low halves of the random bits of n elements, and the low ones times 2**16, int32."""
    out = [torch.empty(n, dtype=torch.int32) for _ in range(3)]
    random_kernel[(triton.cdiv(n, BLOCK),)](key, *out, n, BLOCK=BLOCK)
    return tuple(out)
