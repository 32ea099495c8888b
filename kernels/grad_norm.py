"""Sum of squares of a flat gradient, plain or scaled by the weights, over all coordinates or over a mask."""

import torch
import triton
import triton.language as tl

from .blocks import BLOCK, WARPS, mask_bits

CHUNK_BLOCKS = 16


@triton.jit
def grad_norm_kernel(
    grad_ptr,
    weight_ptr,
    mask_ptr,
    partial_ptr,
    n,
    ADAPTIVE: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK_BLOCKS: tl.constexpr,
):
    """partial[c] = sum over chunk c of (s_i g_i)^2 with s = |w| (ASAM, arXiv 2102.11600 eq. 7) or 1.

    A chunk is CHUNK_BLOCKS blocks whatever the device, and its sum is one tree: the result does not depend on how many
    processors there are. An inf or NaN anywhere makes the sum inf or NaN, which is the finite check.

    Args:
        grad_ptr: gradient, fp16/bf16/fp32/fp64, length n.
        weight_ptr: weights, same type and length; read if ADAPTIVE.
        mask_ptr: int32 words of 32 mask bits, length ceil(n / 32); read if MASKED.
        partial_ptr: fp64, one per chunk; written.
        n: number of elements; a multiple of BLOCK * CHUNK_BLOCKS if EVEN.

    Bytes per element: the gradient's, plus the weight's if ADAPTIVE, plus 1/8 if MASKED.
    """
    compute: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    start = tl.program_id(0).to(tl.int64) * (BLOCK * CHUNK_BLOCKS)
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], compute)
    for _ in range(CHUNK_BLOCKS):
        inside = None if EVEN else start + offs < n
        other = None if EVEN else 0.0
        x = tl.load(grad_ptr + start + offs, mask=inside, other=other).to(compute)
        if ADAPTIVE:
            x *= tl.load(weight_ptr + start + offs, mask=inside, other=other).to(compute)
        if MASKED:
            # Zero times an inf or NaN is NaN: what is not finite shows, masked or not.
            x = tl.where(mask_bits(mask_ptr, start, offs, inside), x, x * 0.0)
        acc += x * x
        start += BLOCK
    tl.store(partial_ptr + tl.program_id(0), tl.sum(acc, 0).to(tl.float64))


def grad_norm_sq(grad: torch.Tensor, weight: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
    """Launch `grad_norm_kernel` and add up its partial sums in fp64; arguments as `reference.grad_norm_sq`."""
    n = grad.numel()
    chunks = triton.cdiv(n, BLOCK * CHUNK_BLOCKS)
    partial = torch.empty(chunks, dtype=torch.float64, device=grad.device)
    if chunks:
        grad_norm_kernel[(chunks,)](
            grad,
            weight,
            mask,
            partial,
            n,
            ADAPTIVE=weight is not None,
            MASKED=mask is not None,
            EVEN=n % (BLOCK * CHUNK_BLOCKS) == 0,
            BLOCK=BLOCK,
            CHUNK_BLOCKS=CHUNK_BLOCKS,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return partial.sum()
