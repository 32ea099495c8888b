"""The three dot products of two gradients in one pass: for GSAM, LookSAM and the norm of the next momentum."""

import torch
import triton
import triton.language as tl

from . import spec
from .blocks import BLOCK, FIRST_CHUNK, GRAD, OTHER, WARPS, locate, pointer
from .rounding import widen
from .segments import Segments


@triton.jit
def _read(ptr, place, first, left, compute: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    inside = None if WHOLE else first + offs < left
    other = None if WHOLE else 0.0
    return widen(tl.load(pointer(ptr, place + first, WHOLE) + offs, mask=inside, other=other), compute)


@triton.jit(do_not_specialize=["first_ptr", "second_ptr"])
def gap_kernel(
    table_ptr,
    segments_ptr,
    first_ptr,
    second_ptr,
    partial_ptr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """partial[c] = <a, b>, <a, a>, <b, b> over chunk c: what GSAM's decomposition needs (arXiv 2203.08065, eq. 8).

    Chunks are those of `norm_kernel`. An inf or NaN in a tensor makes its sums inf or NaN.

    Args:
        table_ptr: where the segments are, int64 [segments, len(spec.TABLE)].
        segments_ptr: the segment of each program, int32 [chunks].
        first_ptr: from where the table counts other gradients, a, fp32/bf16/fp16/fp64.
        second_ptr: the same for gradients, b, of the same type.
        partial_ptr: fp64 [chunks, 3]; written.

    Bytes per element: those of both tensors.
    """
    compute: tl.constexpr = tl.float64 if first_ptr.dtype.element_ty == tl.float64 else tl.float32
    _, row, start, left, whole = locate(table_ptr, segments_ptr, FIRST_CHUNK, CHUNK)
    first_place, second_place = tl.load(row + OTHER) + start, tl.load(row + GRAD) + start
    dot = tl.zeros([BLOCK], compute)
    first_sq = tl.zeros([BLOCK], compute)
    second_sq = tl.zeros([BLOCK], compute)
    if whole:
        for done in range(0, CHUNK, BLOCK):
            a = _read(first_ptr, first_place, done, left, compute, True, BLOCK)
            b = _read(second_ptr, second_place, done, left, compute, True, BLOCK)
            dot += a * b
            first_sq += a * a
            second_sq += b * b
    else:
        done = 0
        while done < left:
            a = _read(first_ptr, first_place, done, left, compute, False, BLOCK)
            b = _read(second_ptr, second_place, done, left, compute, False, BLOCK)
            dot += a * b
            first_sq += a * a
            second_sq += b * b
            done += BLOCK
    partial_ptr += tl.program_id(0).to(tl.int64) * 3
    tl.store(partial_ptr, tl.sum(dot, 0).to(tl.float64))
    tl.store(partial_ptr + 1, tl.sum(first_sq, 0).to(tl.float64))
    tl.store(partial_ptr + 2, tl.sum(second_sq, 0).to(tl.float64))


def gap(segments: Segments) -> torch.Tensor:
    """Launch `gap_kernel` and add up its partial sums in fp64; argument and result as `reference.gap`."""
    plan = segments.plan
    partial = torch.empty(plan.chunks if segments else 0, 3, dtype=torch.float64, device=plan.device)
    if len(partial):
        gap_kernel[(plan.chunks,)](
            segments.relative(),
            plan.segment_of("chunks"),
            segments.anchor("other"),
            segments.anchor("grad"),
            partial,
            BLOCK=BLOCK,
            CHUNK=spec.CHUNK,
            num_warps=WARPS,
            # The order of a sum is the device's own anyway.
            enable_fp_fusion=True,
        )
    return partial.sum(0)
