"""The ascent of SAM in one pass: w -> w + eps(w), with the backup written and the mask applied."""

import torch
import triton
import triton.language as tl

from . import spec
from .blocks import BLOCK, FIRST_BLOCK, GRAD, OFFSET, WEIGHT, locate, mask_bits, pointer, shape
from .codecs import displace, load_codes
from .directions import Along
from .rounding import high_half, narrow, random_bits, round_to, signed_low_half, widen
from .segments import Segments
from .steering import steered

_COLUMNS = tl.constexpr(len(spec.PERTURB))
_SCALE, _CHANCE = (tl.constexpr(spec.PERTURB.index(name)) for name in ("scale", "chance"))


@triton.jit
def _block(
    first,
    segment,
    start,
    left,
    place,
    weight_place,
    grad_place,
    weight_ptr,
    grad_ptr,
    backup_ptr,
    mask_ptr,
    scale_ptr,
    lane_ptr,
    along_ptr,
    unscale_ptr,
    coef_ptr,
    key_ptr,
    ALONG: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    RANDOM: tl.constexpr,
    WHOLE: tl.constexpr,
    SIZE: tl.constexpr,
):
    """SIZE elements of a block, from `first` on; the places are those of the block."""
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    compute: tl.constexpr = coef_ptr.dtype.element_ty
    offs = first + tl.arange(0, SIZE)
    inside = None if WHOLE else offs < left
    weight_ptr = pointer(weight_ptr, weight_place, WHOLE)

    clean = tl.load(weight_ptr + offs, mask=inside)
    grad_ptr = pointer(grad_ptr, grad_place, WHOLE)
    if scale_ptr is not None and lane_ptr is None:
        g = load_codes(grad_ptr, scale_ptr, place, offs, inside).to(compute)
    else:
        g = widen(tl.load(grad_ptr + offs, mask=inside), compute)
    scale = tl.load(coef_ptr + _SCALE)
    if lane_ptr is not None:
        g, before, average = steered(
            g, segment, place, offs, inside, lane_ptr, scale_ptr, along_ptr, unscale_ptr, ALONG, WHOLE
        )
        if ALONG == "less_average":
            average = tl.where(tl.abs(average) < tl.where(scale != 0, float("inf"), 0.0), average, before)
    backup_ptr = pointer(backup_ptr, place, WHOLE)
    w = widen(clean, compute)
    eps = scale * g
    if ADAPTIVE:
        eps *= w * w
    # Zero times an overflowed gradient is NaN.
    moved = tl.abs(eps) < float("inf")
    if mask_ptr is not None:
        moved = moved & mask_bits(mask_ptr, place, offs, inside)
    half = None
    if STOCHASTIC or RANDOM:
        bits = random_bits(start, offs, tl.load(key_ptr))
        half = high_half(bits)
    if RANDOM:
        # Both times 2**32, as integers: the noise is odd and the bound even, at most 2**31.
        bound = tl.minimum(tl.load(coef_ptr + _CHANCE) * 2.0**32, 2.0**31 - 128)
        moved = moved & (signed_low_half(bits) < bound.to(tl.int32))
    w += tl.where(moved, eps, 0.0)
    new = round_to(w, half, dtype, STOCHASTIC)
    if backup_ptr.dtype.element_ty == tl.int8:
        new, backup = displace(clean, new)
    else:
        backup = clean
    if ALONG == "less_average":
        # Here, where it takes few registers: on B200 six more would leave too few loads under way.
        lane_ptr = pointer(lane_ptr, place, WHOLE)
        tl.store(lane_ptr + offs, narrow(average, lane_ptr.dtype.element_ty), mask=inside)
    tl.store(backup_ptr + offs, backup, mask=inside)
    tl.store(weight_ptr + offs, new, mask=inside)


@triton.jit(do_not_specialize=["weight_ptr", "grad_ptr"])
def perturb_kernel(
    table_ptr,
    segments_ptr,
    weight_ptr,
    grad_ptr,
    backup_ptr,
    mask_ptr,
    scale_ptr,
    lane_ptr,
    along_ptr,
    unscale_ptr,
    coef_ptr,
    key_ptr,
    ALONG: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    RANDOM: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """backup <- w, w <- round(w + scale s d), s = w^2 (ASAM, arXiv 2102.11600 eq. 9) or 1 (SAM, 2010.01412 eq. 2).

    d is the gradient, or what `steering.steered` makes of it and a lane. A program works on one block of one segment.
    Where eps is not finite the weight stays. If RANDOM each coordinate moves with a probability, by a draw of its own
    (ESAM's stochastic weight perturbation, arXiv 2110.03141, section 3.1).

    Args:
        table_ptr: where the segments are, int64 [segments, len(spec.TABLE)].
        segments_ptr: the segment of each program, int32 [blocks].
        weight_ptr: from where the table counts weights, fp32/bf16/fp16/fp64; written.
        grad_ptr: the same for gradients, of any float type, or codes.
        backup_ptr: the weights' type [size], or int8 for 16-bit weights, which then move by at most 127 steps of their
            type; written.
        mask_ptr: int32 words of 32 mask bits [size / 32], only these coordinates move; or None.
        scale_ptr: bf16 [size / 32], of gradients, or of the lane, if these are codes; or None.
        lane_ptr: averages [size], of any float type, or codes; written if ALONG is "less_average"; or None.
        along_ptr: [segments, len(spec.DIRECTION)], as coef_ptr; or None.
        unscale_ptr: fp32, what gradients were multiplied with and d is not; or None.
        coef_ptr: [segments, len(spec.PERTURB)], in the compute type: fp64 for fp64 weights, else fp32.
        key_ptr: of the random numbers, int32 [segments]; read if STOCHASTIC or RANDOM.
        ALONG: one of `spec.ALONG`.

    Bytes per element: fp32 16 (read w, g; write w, backup), bf16 8, with an int8 backup 7; 1/8 with a mask; those of
    the lane, twice if it is written.
    """
    segment, row, start, left, whole = locate(table_ptr, segments_ptr, FIRST_BLOCK, BLOCK)
    places = (tl.load(row + OFFSET) + start, tl.load(row + WEIGHT) + start, tl.load(row + GRAD) + start)
    pointers = (weight_ptr, grad_ptr, backup_ptr, mask_ptr, scale_ptr, lane_ptr, along_ptr, unscale_ptr)
    own = (coef_ptr + segment * _COLUMNS, key_ptr + segment)
    if whole:
        _block(0, segment, start, left, *places, *pointers, *own, ALONG, ADAPTIVE, STOCHASTIC, RANDOM, True, BLOCK)
    else:
        first = 0
        while first < left:
            _block(
                first, segment, start, left, *places, *pointers, *own, ALONG, ADAPTIVE, STOCHASTIC, RANDOM, False, LANES
            )
            first += LANES


def perturb_(
    segments: Segments,
    backup: torch.Tensor,
    mask: torch.Tensor | None,
    coef: torch.Tensor,
    key: torch.Tensor,
    adaptive: bool,
    stochastic: bool,
    random: bool,
    scale: torch.Tensor | None = None,
    along: Along | None = None,
) -> None:
    """Launch `perturb_kernel`; arguments as `reference.perturb_`."""
    plan = segments.plan
    if not segments or not plan.blocks:
        return
    weight, grad = segments.anchor("weight"), segments.anchor("grad")
    steering = (None, None, None) if along is None else (along.lane, along.coef, along.grad_scale)
    perturb_kernel[(plan.blocks,)](
        segments.relative(),
        plan.segment_of("blocks"),
        weight,
        grad,
        backup,
        mask,
        scale if along is None else along.scale,
        *steering,
        coef,
        key,
        ALONG="gradient" if along is None else along.kind,
        ADAPTIVE=adaptive,
        STOCHASTIC=stochastic and weight.element_size() == 2,
        RANDOM=random,
        BLOCK=BLOCK,
        enable_fp_fusion=False,
        **shape(weight, grad, backup, steering[0]),
    )
