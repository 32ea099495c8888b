"""The exact k largest magnitudes as a bit-packed mask, by radix select on the bit pattern: no sort, no index tensor."""

import torch
import triton
import triton.language as tl

from .blocks import BLOCK, WARPS

RADIX_BITS = 8
CHUNK_BLOCKS = 16


@triton.jit
def magnitude_key(x, WIDE: tl.constexpr):
    """Integers in the order of |x|: the bit pattern as fp32 (31 bits) or fp64 (63 bits if WIDE); a NaN is smallest."""
    if WIDE:
        key = x.to(tl.float64).to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        key = tl.where(key > 0x7FF0000000000000, 0, key)
    else:
        key = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        key = tl.where(key > 0x7F800000, 0, key)
    return key


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
    CHUNK_BLOCKS: tl.constexpr,
):
    """hist[d] += number of keys that agree with prefix above the digit and have digit d at SHIFT.

    Args:
        values_ptr: floats of any type, length n; read once.
        prefix_ptr: int64 scalar, the digits found so far.
        hist_ptr: int64 [2**BITS]; added to with integer atomics, so the order does not matter.
        n: number of elements.
    """
    start = tl.program_id(0).to(tl.int64) * (BLOCK * CHUNK_BLOCKS)
    offs = tl.arange(0, BLOCK)
    prefix = tl.load(prefix_ptr) >> (SHIFT + BITS)
    hist = tl.zeros([1 << BITS], tl.int32)
    for _ in range(CHUNK_BLOCKS):
        inside = start + offs < n
        key = magnitude_key(tl.load(values_ptr + start + offs, mask=inside, other=0.0), WIDE)
        same = inside & ((key >> (SHIFT + BITS)).to(tl.int64) == prefix)
        digit = (key >> SHIFT).to(tl.int32) & ((1 << BITS) - 1)
        hist += tl.histogram(digit, 1 << BITS, mask=same)
        start += BLOCK
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
    CHUNK_BLOCKS: tl.constexpr,
):
    """ties[c] = number of keys equal to the threshold in chunk c.

    Args:
        values_ptr: floats of any type, length n.
        threshold_ptr: int64 scalar, the key of the k-th largest.
        ties_ptr: int64, one per chunk; written.
        n: number of elements.
    """
    start = tl.program_id(0).to(tl.int64) * (BLOCK * CHUNK_BLOCKS)
    offs = tl.arange(0, BLOCK)
    threshold = tl.load(threshold_ptr)
    count = tl.zeros([BLOCK], tl.int32)
    for _ in range(CHUNK_BLOCKS):
        inside = start + offs < n
        key = magnitude_key(tl.load(values_ptr + start + offs, mask=inside, other=0.0), WIDE)
        count += (inside & (key.to(tl.int64) == threshold)).to(tl.int32)
        start += BLOCK
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
    CHUNK_BLOCKS: tl.constexpr,
):
    """Bit i of the mask = key_i > threshold, or key_i == threshold and fewer than quota[c] ties before it in chunk c.

    Args:
        values_ptr: floats of any type, length n.
        threshold_ptr: int64 scalar, the key of the k-th largest.
        quota_ptr: int64, one per chunk: how many of its ties are taken, the ones of lowest index first.
        mask_ptr: int32 words, length ceil(n / 32); written, bits past n as zero.
        n: number of elements.
    """
    chunk = tl.program_id(0)
    start = chunk.to(tl.int64) * (BLOCK * CHUNK_BLOCKS)
    offs = tl.arange(0, BLOCK)
    words = tl.arange(0, BLOCK // 32)
    threshold = tl.load(threshold_ptr)
    quota = tl.load(quota_ptr + chunk)
    for _ in range(CHUNK_BLOCKS):
        inside = start + offs < n
        key = magnitude_key(tl.load(values_ptr + start + offs, mask=inside, other=0.0), WIDE).to(tl.int64)
        tie = (inside & (key == threshold)).to(tl.int32)
        taken = (tie != 0) & (tl.cumsum(tie, 0).to(tl.int64) <= quota)
        bit = (taken | (inside & (key > threshold))).to(tl.int32) << (offs % 32)
        word = tl.sum(tl.reshape(bit, [BLOCK // 32, 32]), 1)
        tl.store(mask_ptr + start // 32 + words, word, mask=start + words * 32 < n)
        quota -= tl.sum(tie, 0)
        start += BLOCK


def digit_histogram(values: torch.Tensor, prefix: torch.Tensor, shift: int, bits: int, wide: bool) -> torch.Tensor:
    """Launch `digit_histogram_kernel`; arguments as `reference.digit_histogram`."""
    hist = torch.zeros(1 << bits, dtype=torch.int64, device=values.device)
    n = values.numel()
    if n:
        digit_histogram_kernel[(triton.cdiv(n, BLOCK * CHUNK_BLOCKS),)](
            values,
            prefix,
            hist,
            n,
            SHIFT=shift,
            BITS=bits,
            WIDE=wide,
            BLOCK=BLOCK,
            CHUNK_BLOCKS=CHUNK_BLOCKS,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return hist


def write_mask_(
    mask: torch.Tensor, values: torch.Tensor, threshold: torch.Tensor, quota: torch.Tensor, wide: bool
) -> torch.Tensor:
    """Launch the two tie kernels; arguments and result as `reference.write_mask_`."""
    n = values.numel()
    chunks = triton.cdiv(n, BLOCK * CHUNK_BLOCKS)
    ties = torch.zeros(chunks, dtype=torch.int64, device=values.device)
    shape = {"WIDE": wide, "BLOCK": BLOCK, "CHUNK_BLOCKS": CHUNK_BLOCKS, "num_warps": WARPS, "enable_fp_fusion": False}
    if chunks:
        count_ties_kernel[(chunks,)](values, threshold, ties, n, **shape)
        left = (quota - (ties.cumsum(0) - ties)).clamp_(min=0)
        write_mask_kernel[(chunks,)](values, threshold, left, mask, n, **shape)
    return (quota - ties.sum()).clamp_(min=0)
