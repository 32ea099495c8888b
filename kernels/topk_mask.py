"""The exact k largest magnitudes as a bit-packed mask, by radix select on the bit pattern: no sort, no index tensor."""

import torch
import triton
import triton.language as tl

from . import spec
from .blocks import BLOCK, WARPS
from .rounding import widen


@triton.jit
def magnitude_key(x, WIDE: tl.constexpr):
    """Integers in the order of |x|: the bit pattern as fp32 (31 bits) or fp64 (63 bits if WIDE); a NaN is smallest."""
    if WIDE:
        key = widen(x, tl.float64).to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        key = tl.where(key > 0x7FF0000000000000, 0, key)
    else:
        key = widen(x, tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        key = tl.where(key > 0x7F800000, 0, key)
    return key


@triton.jit
def _chunk(values_ptr, n, CHUNK: tl.constexpr):
    """Where this program's chunk begins, and how many elements it has."""
    start = tl.program_id(0).to(tl.int64) * CHUNK
    return values_ptr + start, tl.minimum(n - start, CHUNK).to(tl.int32)


@triton.jit
def _next(values_ptr, first, left, BLOCK: tl.constexpr):
    """A block to be used in the next round, so that its loads are under way during this one."""
    offs = first + tl.arange(0, BLOCK)
    return tl.load(values_ptr + offs, mask=offs < left, other=0.0)


@triton.jit
def digit_histogram_kernel(
    values_ptr,
    prefix_ptr,
    hist_ptr,
    n,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """hist[d] += number of keys that agree with prefix above the digit and have digit d at SHIFT.

    Args:
        values_ptr: floats of any type, length n; read once.
        prefix_ptr: int64 scalar, the digits found so far.
        hist_ptr: int64 [2**BITS]; added to with integer atomics, so the order does not matter.
        n: number of elements.
    """
    values_ptr, left = _chunk(values_ptr, n, CHUNK)
    offs = tl.arange(0, BLOCK)
    prefix = tl.load(prefix_ptr).to(tl.int64 if WIDE else tl.int32) >> (SHIFT + BITS)
    hist = tl.zeros([1 << BITS], tl.int32)
    ahead = _next(values_ptr, 0, left, BLOCK)
    for done in range(0, CHUNK, BLOCK):
        values, inside = ahead, done + offs < left
        ahead = _next(values_ptr, done + BLOCK, left, BLOCK)
        key = magnitude_key(values, WIDE)
        same = inside & (key >> (SHIFT + BITS) == prefix)
        digit = (key >> SHIFT).to(tl.int32) & ((1 << BITS) - 1)
        hist += tl.histogram(digit, 1 << BITS, mask=same)
    bins = tl.arange(0, 1 << BITS)
    tl.atomic_add(hist_ptr + bins, hist.to(tl.int64), mask=hist > 0)


@triton.jit
def count_ties_kernel(
    values_ptr,
    threshold_ptr,
    ties_ptr,
    n,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """ties[c] = number of keys equal to the threshold in chunk c.

    Args:
        values_ptr: floats of any type, length n.
        threshold_ptr: int64 scalar, the key of the k-th largest.
        ties_ptr: int64, one per chunk; written.
        n: number of elements.
    """
    values_ptr, left = _chunk(values_ptr, n, CHUNK)
    offs = tl.arange(0, BLOCK)
    threshold = tl.load(threshold_ptr).to(tl.int64 if WIDE else tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    for done in range(0, CHUNK, BLOCK):
        inside = done + offs < left
        key = magnitude_key(tl.load(values_ptr + done + offs, mask=inside, other=0.0), WIDE)
        count += (inside & (key == threshold)).to(tl.int32)
    tl.store(ties_ptr + tl.program_id(0), tl.sum(count, 0).to(tl.int64))


@triton.jit
def write_mask_kernel(
    values_ptr,
    threshold_ptr,
    quota_ptr,
    mask_ptr,
    n,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Bit i of the mask = key_i > threshold, or key_i == threshold and fewer than quota[c] ties before it in chunk c.

    Args:
        values_ptr: floats of any type, length n.
        threshold_ptr: int64 scalar, the key of the k-th largest.
        quota_ptr: int64, one per chunk: how many of its ties are taken, the ones of lowest index first.
        mask_ptr: int32 words, length ceil(n / 32); written, bits past n as zero.
        n: number of elements.
    """
    values_ptr, left = _chunk(values_ptr, n, CHUNK)
    mask_ptr += tl.program_id(0).to(tl.int64) * (CHUNK // 32)
    offs = tl.arange(0, BLOCK)
    words = tl.arange(0, BLOCK // 32)
    threshold = tl.load(threshold_ptr).to(tl.int64 if WIDE else tl.int32)
    quota = tl.minimum(tl.load(quota_ptr + tl.program_id(0)), CHUNK).to(tl.int32)
    ahead = _next(values_ptr, 0, left, BLOCK)
    for done in range(0, CHUNK, BLOCK):
        values, inside = ahead, done + offs < left
        ahead = _next(values_ptr, done + BLOCK, left, BLOCK)
        key = magnitude_key(values, WIDE)
        tie = (inside & (key == threshold)).to(tl.int32)
        taken = (tie != 0) & (tl.cumsum(tie, 0) <= quota)
        bit = (taken | (inside & (key > threshold))).to(tl.int32) << (offs % 32)
        word = tl.sum(tl.reshape(bit, [BLOCK // 32, 32]), 1)
        tl.store(mask_ptr + done // 32 + words, word, mask=done + words * 32 < left)
        quota -= tl.sum(tie, 0)


def digit_histogram(values: torch.Tensor, prefix: torch.Tensor, shift: int, bits: int, wide: bool) -> torch.Tensor:
    """Launch `digit_histogram_kernel`; arguments as `reference.digit_histogram`."""
    hist = torch.zeros(1 << bits, dtype=torch.int64, device=values.device)
    n = values.numel()
    if n:
        digit_histogram_kernel[(triton.cdiv(n, spec.CHUNK),)](
            values,
            prefix,
            hist,
            n,
            SHIFT=shift,
            BITS=bits,
            WIDE=wide,
            BLOCK=BLOCK,
            CHUNK=spec.CHUNK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return hist


def write_mask_(
    mask: torch.Tensor, values: torch.Tensor, threshold: torch.Tensor, quota: torch.Tensor, wide: bool
) -> torch.Tensor:
    """Launch the two tie kernels; arguments and result as `reference.write_mask_`."""
    n = values.numel()
    chunks = triton.cdiv(n, spec.CHUNK)
    ties = torch.zeros(chunks, dtype=torch.int64, device=values.device)
    shape = {"WIDE": wide, "BLOCK": BLOCK, "CHUNK": spec.CHUNK, "num_warps": WARPS, "enable_fp_fusion": False}
    if chunks:
        count_ties_kernel[(chunks,)](values, threshold, ties, n, **shape)
        left = (quota - (ties.cumsum(0) - ties)).clamp_(min=0)
        write_mask_kernel[(chunks,)](values, threshold, left, mask, n, **shape)
    return (quota - ties.sum()).clamp_(min=0)
