"""The sum of squares of a perturbation's direction in one pass, scaled by the weights or not, over all or a mask."""

import torch
import triton
import triton.language as tl

from . import spec
from .blocks import BLOCK, FIRST_CHUNK, GRAD, OFFSET, WARPS, WEIGHT, locate, mask_bits, pointer
from .codecs import load_codes
from .directions import Along
from .rounding import widen
from .segments import Segments
from .steering import steered


@triton.jit
def _squares(
    first,
    segment,
    left,
    place,
    grad_place,
    weight_place,
    grad_ptr,
    weight_ptr,
    mask_ptr,
    scale_ptr,
    lane_ptr,
    along_ptr,
    unscale_ptr,
    compute: tl.constexpr,
    ALONG: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.arange(0, BLOCK)
    inside = None if WHOLE else first + offs < left
    other = None if WHOLE else 0.0
    grad_ptr = pointer(grad_ptr, grad_place + first, WHOLE)
    if scale_ptr is not None and lane_ptr is None:
        x = load_codes(grad_ptr, scale_ptr, place + first, offs, inside)
    else:
        x = widen(tl.load(grad_ptr + offs, mask=inside, other=other), compute)
    if lane_ptr is not None:
        x, _, _ = steered(
            x, segment, place + first, offs, inside, lane_ptr, scale_ptr, along_ptr, unscale_ptr, ALONG, WHOLE
        )
    if weight_ptr is not None:
        weight_ptr = pointer(weight_ptr, weight_place + first, WHOLE)
        x *= widen(tl.load(weight_ptr + offs, mask=inside, other=other), compute)
    if mask_ptr is not None:
        # Zero times an inf or NaN is NaN: what is not finite shows, masked or not.
        x = tl.where(mask_bits(mask_ptr, place + first, offs, inside), x, x * 0.0)
    return x * x


@triton.jit(do_not_specialize=["grad_ptr", "weight_ptr"])
def norm_kernel(
    table_ptr,
    segments_ptr,
    grad_ptr,
    weight_ptr,
    mask_ptr,
    scale_ptr,
    lane_ptr,
    along_ptr,
    unscale_ptr,
    partial_ptr,
    ALONG: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """partial[c] = sum over chunk c of (s d)^2 with s = abs(w) (ASAM, arXiv 2102.11600 eq. 7) or 1.

    d is the gradient, or what `steering.steered` makes of it and a lane. A chunk belongs to one segment, and its sum is
    one tree: the result depends neither on how many processors there are nor on other segments. An inf or NaN anywhere
    makes the sum inf or NaN, which is the finite check.

    Args:
        table_ptr: where the segments are, int64 [segments, len(spec.TABLE)].
        segments_ptr: the segment of each program, int32 [chunks].
        grad_ptr: from where the table counts gradients, fp32/bf16/fp16/fp64, or codes.
        weight_ptr: the same for weights, of any float type; or None for s = 1.
        mask_ptr: int32 words of 32 mask bits [size / 32], the sum is over these coordinates; or None.
        scale_ptr: bf16 [size / 32], of gradients, or of the lane, if these are codes; or None.
        lane_ptr, along_ptr, unscale_ptr, ALONG: as `perturb_kernel`.
        partial_ptr: fp64 [chunks]; written.

    Bytes per element: the gradient's, plus the weight's if there are weights, the lane's, and 1/8 with a mask.
    """
    compute: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    segment, row, start, left, whole = locate(table_ptr, segments_ptr, FIRST_CHUNK, CHUNK)
    places = (tl.load(row + OFFSET) + start, tl.load(row + GRAD) + start, tl.load(row + WEIGHT) + start)
    pointers = (grad_ptr, weight_ptr, mask_ptr, scale_ptr, lane_ptr, along_ptr, unscale_ptr)
    total = tl.zeros([BLOCK], compute)
    if whole:
        for first in range(0, CHUNK, BLOCK):
            total += _squares(first, segment, left, *places, *pointers, compute, ALONG, True, BLOCK)
    else:
        first = 0
        while first < left:
            total += _squares(first, segment, left, *places, *pointers, compute, ALONG, False, BLOCK)
            first += BLOCK
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, 0).to(tl.float64))


def norm_sq(
    segments: Segments,
    adaptive: bool,
    mask: torch.Tensor | None,
    scale: torch.Tensor | None = None,
    along: Along | None = None,
) -> torch.Tensor:
    """Launch `norm_kernel` and add up its partial sums in fp64; arguments and result as `reference.norm_sq`."""
    return _partial(segments, adaptive, mask, scale, along).sum()


def norms_sq(segments: Segments) -> torch.Tensor:
    """Launch `norm_kernel` and add up its partial sums by segment; argument and result as `reference.norms_sq`."""
    return segments.plan.sums(_partial(segments))


def _partial(
    segments: Segments,
    adaptive: bool = False,
    mask: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    along: Along | None = None,
) -> torch.Tensor:
    """The sum of each chunk, fp64 [chunks]."""
    plan = segments.plan
    if not segments or not plan.chunks:
        return torch.zeros(plan.chunks, dtype=torch.float64, device=plan.device)
    partial = torch.empty(plan.chunks, dtype=torch.float64, device=plan.device)
    norm_kernel[(plan.chunks,)](
        segments.relative(),
        plan.segment_of("chunks"),
        segments.anchor("grad"),
        segments.anchor("weight") if adaptive else None,
        mask,
        scale if along is None else along.scale,
        *((None, None, None) if along is None else (along.lane, along.coef, along.grad_scale)),
        partial,
        ALONG="gradient" if along is None else along.kind,
        BLOCK=BLOCK,
        CHUNK=spec.CHUNK,
        num_warps=WARPS,
        # The order of a sum is the device's own anyway.
        enable_fp_fusion=True,
    )
    return partial
