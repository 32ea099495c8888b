"""The descent in one pass: restore, unscale, clip, combine gradients, L2-SP, AdamW, next perturbation, EMA."""

import torch
import triton
import triton.language as tl

from .blocks import BLOCK, WARPS
from .rounding import high_half, low_half, random_bits, round_to


@triton.jit
def adamw_l2sp_kernel(
    weight_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    max_exp_avg_sq_ptr,
    backup_ptr,
    master_ptr,
    anchor_ptr,
    other_grad_ptr,
    ema_ptr,
    coef_ptr,
    n,
    AMSGRAD: tl.constexpr,
    BACKUP: tl.constexpr,
    MASTER: tl.constexpr,
    ANCHOR: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
    OTHER: tl.constexpr,
    KEEP_ORTHOGONAL: tl.constexpr,
    PERTURB: tl.constexpr,
    EMA: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """AdamW (arXiv 1711.05101, alg. 2) from the clean weights, decaying to zero or to an anchor (L2-SP, 1802.01483).

    g <- factor * g + other * other_grad  (GSAM, arXiv 2203.08065; LookSAM, 2203.02714; the last term if OTHER)
    m <- m + (1 - beta1) (g - m);  v <- beta2 v + (1 - beta2) g^2
    w <- w - decay (w - anchor) - step_size * m / (sqrt(v) * inv_sqrt_bias2 + eps)

    A coordinate whose scaled gradient or its square is not finite is only restored; a factor of NaN skips the whole
    update. If PERTURB the clean weights go to the backup or the master, and the weights get w + scale * m, the
    perturbation of the next step (Momentum-SAM, arXiv 2401.12033). If EMA also

    ema <- ema + rate (w - ema), with the new clean weights as they are stored, where that is a finite change

    The square root and the division are the device's fast ones (1 and 2 ulp in fp32).

    Args:
        weight_ptr: weights, fp16/bf16/fp32/fp64, length n; written, and read unless BACKUP or MASTER.
        grad_ptr: gradient, same type and length; zeroed if ZERO_GRAD.
        exp_avg_ptr, exp_avg_sq_ptr, max_exp_avg_sq_ptr: moments, any one float type, length n; the last one if AMSGRAD.
        backup_ptr: clean weights, the weights' type, if BACKUP; written if PERTURB.
        master_ptr: fp32 clean weights, read and written, if MASTER.
        anchor_ptr: anchors, the weights' type, if ANCHOR.
        other_grad_ptr: a second gradient, the weights' type, if OTHER; if KEEP_ORTHOGONAL it is not added to the first,
            but grad - other * other_grad is written over it (LookSAM's orthogonal component, to be used again).
        ema_ptr: average of the clean weights, fp32 (fp64 for fp64 weights), length n, if EMA.
        coef_ptr: fp64 [9]: factor, decay, 1 - beta1, beta2, 1 - beta2, step_size, inv_sqrt_bias2, eps, key; if OTHER or
            PERTURB [12]: other, scale of the next perturbation, its key; if EMA [13]: rate, NaN to leave the average.
        n: number of elements; a multiple of BLOCK if EVEN.

    Bytes per element: fp32 28; bf16 with fp32 moments and master 28; bf16 throughout 14; more with AMSGRAD, ANCHOR or
    OTHER; PERTURB adds a write of the weights' type where there is no master, EMA 8 bytes.
    """
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    state_dtype: tl.constexpr = exp_avg_ptr.dtype.element_ty
    compute: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    inside = None if EVEN else start + offs < n
    factor = tl.load(coef_ptr).to(compute)
    decay = tl.load(coef_ptr + 1).to(compute)
    one_minus_beta1 = tl.load(coef_ptr + 2).to(compute)
    beta2 = tl.load(coef_ptr + 3).to(compute)
    one_minus_beta2 = tl.load(coef_ptr + 4).to(compute)
    step_size = tl.load(coef_ptr + 5).to(compute)
    inv_sqrt_bias2 = tl.load(coef_ptr + 6).to(compute)
    eps = tl.load(coef_ptr + 7).to(compute)

    if MASTER:
        old_w = tl.load(master_ptr + start + offs, mask=inside)
    elif BACKUP:
        old_w = tl.load(backup_ptr + start + offs, mask=inside).to(compute)
    else:
        old_w = tl.load(weight_ptr + start + offs, mask=inside).to(compute)
    g = tl.load(grad_ptr + start + offs, mask=inside).to(compute)
    if OTHER:
        other = tl.load(coef_ptr + 9).to(compute) * tl.load(other_grad_ptr + start + offs, mask=inside).to(compute)
        if KEEP_ORTHOGONAL:
            tl.store(other_grad_ptr + start + offs, round_to(g - other, None, dtype, False), mask=inside)
            g *= factor
        else:
            g *= factor
            g = tl.where(tl.abs(other) < float("inf"), g + other, g)
    else:
        g *= factor
    old_m = tl.load(exp_avg_ptr + start + offs, mask=inside).to(compute)
    old_v = tl.load(exp_avg_sq_ptr + start + offs, mask=inside).to(compute)

    m = old_m + one_minus_beta1 * (g - old_m)
    v = beta2 * old_v + one_minus_beta2 * (g * g)
    update = v < float("inf")
    if ANCHOR:
        w = old_w - decay * (old_w - tl.load(anchor_ptr + start + offs, mask=inside).to(compute))
    else:
        w = old_w * (1.0 - decay)
    if AMSGRAD:
        old_max_v = tl.load(max_exp_avg_sq_ptr + start + offs, mask=inside).to(compute)
        top = tl.maximum(old_max_v, v)
    else:
        top = v
    denom = tl.sqrt(top) * inv_sqrt_bias2 + eps
    w -= step_size * tl.where(denom > 0, m / denom, 0.0)

    w = tl.where(update, w, old_w)
    m = tl.where(update, m, old_m)
    v = tl.where(update, v, old_v)
    if STOCHASTIC:
        bits = random_bits(start + offs, tl.load(coef_ptr + 8).to(tl.int64).to(tl.uint32))
        w_rand = high_half(bits)
        v_rand = low_half(bits)
    else:
        w_rand = None
        v_rand = None
    if MASTER:
        tl.store(master_ptr + start + offs, w, mask=inside)
        new_w = w
    else:
        new_w = round_to(w, w_rand, dtype, STOCHASTIC)
    if EMA:
        average = tl.load(ema_ptr + start + offs, mask=inside)
        change = tl.load(coef_ptr + 12).to(compute) * (new_w.to(compute) - average)
        average = tl.where(tl.abs(change) < float("inf"), average + change, average)
        tl.store(ema_ptr + start + offs, average, mask=inside)
    if PERTURB:
        if BACKUP:
            tl.store(backup_ptr + start + offs, new_w, mask=inside)
        # The stored moment, not the exact one: so the perturbation can be made again from it.
        shift = tl.load(coef_ptr + 10).to(compute) * round_to(m, None, state_dtype, False).to(compute)
        shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
        if STOCHASTIC:
            shift_rand = high_half(random_bits(start + offs, tl.load(coef_ptr + 11).to(tl.int64).to(tl.uint32)))
        else:
            shift_rand = None
        new_w = round_to(new_w.to(compute) + shift, shift_rand, dtype, STOCHASTIC)
    elif MASTER:
        new_w = round_to(w, None, dtype, False)
    tl.store(weight_ptr + start + offs, new_w, mask=inside)
    tl.store(exp_avg_ptr + start + offs, round_to(m, None, state_dtype, False), mask=inside)
    tl.store(exp_avg_sq_ptr + start + offs, round_to(v, v_rand, state_dtype, STOCHASTIC), mask=inside)
    if AMSGRAD:
        top = round_to(tl.where(update, top, old_max_v), v_rand, state_dtype, STOCHASTIC)
        tl.store(max_exp_avg_sq_ptr + start + offs, top, mask=inside)
    if ZERO_GRAD:
        tl.store(grad_ptr + start + offs, tl.zeros([BLOCK], dtype), mask=inside)


def adamw_l2sp_(
    weight: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    max_exp_avg_sq: torch.Tensor | None,
    backup: torch.Tensor | None,
    master: torch.Tensor | None,
    anchor: torch.Tensor | None,
    coef: torch.Tensor,
    stochastic: bool,
    zero_grad: bool,
    other_grad: torch.Tensor | None = None,
    keep_orthogonal: bool = False,
    perturb: bool = False,
    ema: torch.Tensor | None = None,
) -> None:
    """Launch `adamw_l2sp_kernel`; arguments as `reference.adamw_l2sp_`."""
    n = weight.numel()
    if not n:
        return
    adamw_l2sp_kernel[(triton.cdiv(n, BLOCK),)](
        weight,
        grad,
        exp_avg,
        exp_avg_sq,
        max_exp_avg_sq,
        backup,
        master,
        anchor,
        other_grad,
        ema,
        coef,
        n,
        AMSGRAD=max_exp_avg_sq is not None,
        BACKUP=backup is not None,
        MASTER=master is not None,
        ANCHOR=anchor is not None,
        STOCHASTIC=stochastic and master is None and weight.element_size() == 2,
        ZERO_GRAD=zero_grad,
        OTHER=other_grad is not None,
        KEEP_ORTHOGONAL=keep_orthogonal,
        PERTURB=perturb,
        EMA=ema is not None,
        EVEN=n % BLOCK == 0,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
