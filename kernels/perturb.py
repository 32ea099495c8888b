"""The ascent of SAM in one pass: w -> w + eps(w), with the backup written and the mask applied."""

import torch
import triton
import triton.language as tl

from .blocks import BLOCK, WARPS, mask_bits
from .rounding import high_half, low_half, random_bits, round_to, uniform


@triton.jit
def perturb_kernel(
    weight_ptr,
    grad_ptr,
    backup_ptr,
    mask_ptr,
    coef_ptr,
    n,
    ADAPTIVE: tl.constexpr,
    MASKED: tl.constexpr,
    BACKUP: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
    RANDOM: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """w <- round(w + scale * s * g), s = w^2 (ASAM, arXiv 2102.11600 eq. 9) or 1 (SAM, arXiv 2010.01412 eq. 2).

    A scale of zero leaves the weights as they are, whatever the gradient holds. If RANDOM each coordinate moves with a
    probability of its own draw only (ESAM's stochastic weight perturbation, arXiv 2110.03141, section 3.1).

    Args:
        weight_ptr: weights, fp16/bf16/fp32/fp64, length n; written.
        grad_ptr: gradient, same type and length; zeroed if ZERO_GRAD.
        backup_ptr: same type and length; written if BACKUP (not needed where there are master weights).
        mask_ptr: int32 words of 32 mask bits; if MASKED, only these coordinates move.
        coef_ptr: fp64 [2]: scale = rho / norm, key of the random numbers; if RANDOM [3]: the probability minus 1/2, a
            multiple of 2**-15.
        n: number of elements; a multiple of BLOCK if EVEN.

    Bytes per element: fp32 16 (read w, g; write w, backup); bf16 8; bf16 with a master, which is its backup, 6.
    """
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    compute: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    inside = None if EVEN else start + offs < n
    weight_ptr += start
    grad_ptr += start

    w = tl.load(weight_ptr + offs, mask=inside)
    if BACKUP:
        tl.store(backup_ptr + start + offs, w, mask=inside)
    scale = tl.load(coef_ptr).to(compute)
    g = tl.load(grad_ptr + offs, mask=inside).to(compute)
    w = w.to(compute)
    eps = scale * g
    if ADAPTIVE:
        eps *= w * w
    # Zero times an overflowed gradient is NaN.
    moved = tl.abs(eps) < float("inf")
    if MASKED:
        moved = moved & mask_bits(mask_ptr, start, offs, inside)
    if STOCHASTIC or RANDOM:
        bits = random_bits(start + offs, tl.load(coef_ptr + 1).to(tl.int64).to(tl.uint32))
    if RANDOM:
        moved = moved & (uniform(low_half(bits)) < tl.load(coef_ptr + 2).to(tl.float32))
    w += tl.where(moved, eps, 0.0)
    rand = high_half(bits) if STOCHASTIC else None
    tl.store(weight_ptr + offs, round_to(w, rand, dtype, STOCHASTIC), mask=inside)
    if ZERO_GRAD:
        tl.store(grad_ptr + offs, tl.zeros([BLOCK], dtype), mask=inside)


def perturb_(
    weight: torch.Tensor,
    grad: torch.Tensor,
    backup: torch.Tensor | None,
    mask: torch.Tensor | None,
    coef: torch.Tensor,
    adaptive: bool,
    stochastic: bool,
    zero_grad: bool,
    random: bool = False,
) -> None:
    """Launch `perturb_kernel`; arguments as `reference.perturb_`."""
    n = weight.numel()
    if not n:
        return
    perturb_kernel[(triton.cdiv(n, BLOCK),)](
        weight,
        grad,
        backup,
        mask,
        coef,
        n,
        ADAPTIVE=adaptive,
        MASKED=mask is not None,
        BACKUP=backup is not None,
        STOCHASTIC=stochastic and weight.element_size() == 2,
        ZERO_GRAD=zero_grad,
        RANDOM=random,
        EVEN=n % BLOCK == 0,
        BLOCK=BLOCK,
        # Eight 16-bit elements a thread: accesses of 16 bytes here too, because all arrays are of one type.
        num_warps=WARPS // 2 if weight.element_size() == 2 else WARPS,
        enable_fp_fusion=False,
    )
