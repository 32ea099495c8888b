"""The descent in one pass: restore, unscale, clip, combine gradients, update by a rule, round, average."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import spec
from .blocks import BLOCK, CLEAN, FIRST_BLOCK, GRAD, OFFSET, OTHER, WEIGHT, locate, pointer, shape
from .codecs import combine, load_codes, noise_of, replace, split, store_codes
from .rounding import high_half, low_half, narrow, random_bits, round_to, widen
from .rules import adamw, lion, sgd
from .segments import Segments

# The first columns are those of every rule.
_FACTOR, _OTHER, _RATE = (tl.constexpr(spec.DESCEND["adamw"].index(name)) for name in ("factor", "other", "rate"))
_COLUMNS = {rule: len(columns) for rule, columns in spec.DESCEND.items()}


@triton.jit
def _read(ptr, offs, inside, compute: tl.constexpr):
    return widen(tl.load(ptr + offs, mask=inside), compute)


@triton.jit
def _block(
    first,
    start,
    left,
    place,
    weight_place,
    clean_place,
    grad_place,
    other_place,
    weight_ptr,
    clean_ptr,
    grad_ptr,
    other_ptr,
    steps_ptr,
    remainder_ptr,
    anchor_ptr,
    ema_ptr,
    orthogonal_ptr,
    coef_ptr,
    key_ptr,
    state_ptrs,
    scale_ptrs,
    RULE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WHOLE: tl.constexpr,
    SIZE: tl.constexpr,
):
    """SIZE elements of a block, from `first` on; the places are those of the block."""
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    compute: tl.constexpr = coef_ptr.dtype.element_ty
    offs = first + tl.arange(0, SIZE)
    inside = None if WHOLE else offs < left

    clean = tl.load(pointer(clean_ptr, clean_place, WHOLE) + offs, mask=inside)
    if steps_ptr is not None:
        clean = replace(clean, tl.load(pointer(steps_ptr, place, WHOLE) + offs, mask=inside))
    if remainder_ptr is None:
        old_w = widen(clean, compute)
    else:
        old_w = combine(clean, tl.load(pointer(remainder_ptr, place, WHOLE) + offs, mask=inside))
    g = _read(pointer(grad_ptr, grad_place, WHOLE), offs, inside, compute)
    other = None
    if other_ptr is not None:
        other = _read(pointer(other_ptr, other_place, WHOLE), offs, inside, compute)
    anchor = None
    if anchor_ptr is not None:
        anchor = _read(pointer(anchor_ptr, place, WHOLE), offs, inside, compute)
    old_state = ()
    for i in tl.static_range(len(state_ptrs)):
        state_ptr = pointer(state_ptrs[i], place, WHOLE)
        if scale_ptrs is not None:
            old_state += (load_codes(state_ptr, scale_ptrs[i], place, offs, inside),)
        else:
            old_state += (_read(state_ptr, offs, inside, compute),)

    if other is not None:
        other *= tl.load(coef_ptr + _OTHER)
    if orthogonal_ptr is not None:
        tl.store(pointer(orthogonal_ptr, place, WHOLE) + offs, narrow(g - other, dtype), mask=inside)
    g *= tl.load(coef_ptr + _FACTOR)
    if other is not None and orthogonal_ptr is None:
        g += tl.where(tl.abs(other) < float("inf"), other, 0.0)

    if RULE == "adamw":
        w, state, update = adamw(coef_ptr, old_w, g, anchor, old_state)
    elif RULE == "sgd":
        w, state, update = sgd(coef_ptr, old_w, g, anchor, old_state)
    else:
        w, state, update = lion(coef_ptr, old_w, g, anchor, old_state)

    w = tl.where(update, w, old_w)
    w_half = None
    v_half = None
    if STOCHASTIC:
        bits = random_bits(start, offs, tl.load(key_ptr))
        w_half = high_half(bits)
        v_half = low_half(bits)
    if remainder_ptr is not None:
        random = (bits >> 24).to(tl.int32) if STOCHASTIC else 0x80
        stored, remainder = split(w, dtype, remainder_ptr.dtype.element_ty, random)
        tl.store(pointer(remainder_ptr, place, WHOLE) + offs, remainder, mask=inside)
    else:
        stored = round_to(w, w_half, dtype, STOCHASTIC)
        w = widen(stored, compute)
    tl.store(pointer(weight_ptr, weight_place, WHOLE) + offs, stored, mask=inside)
    for i in tl.static_range(len(state_ptrs)):
        new = tl.where(update, state[i], old_state[i])
        state_ptr = pointer(state_ptrs[i], place, WHOLE)
        if scale_ptrs is not None:
            # The third lane is a maximum, which would creep upwards.
            noise = noise_of(bits, i) if STOCHASTIC and i < 2 else 0x4000
            store_codes(state_ptr, scale_ptrs[i], place, offs, left, new, noise, WHOLE, SIZE)
        else:
            # Second moments, which grow by less than a 16-bit step at a time.
            new = round_to(new, v_half, state_ptrs[i].dtype.element_ty, STOCHASTIC and RULE == "adamw" and i > 0)
            tl.store(state_ptr + offs, new, mask=inside)
    if ema_ptr is not None:
        ema_ptr = pointer(ema_ptr, place, WHOLE)
        average = tl.load(ema_ptr + offs, mask=inside)
        change = tl.load(coef_ptr + _RATE) * (w - average)
        average = tl.where(tl.abs(change) < float("inf"), average + change, average)
        tl.store(ema_ptr + offs, average, mask=inside)


@triton.jit(do_not_specialize=["weight_ptr", "clean_ptr", "grad_ptr", "other_ptr"])
def descend_kernel(
    table_ptr,
    segments_ptr,
    weight_ptr,
    clean_ptr,
    grad_ptr,
    other_ptr,
    steps_ptr,
    remainder_ptr,
    anchor_ptr,
    ema_ptr,
    orthogonal_ptr,
    coef_ptr,
    key_ptr,
    state_ptrs,
    scale_ptrs,
    RULE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """One step of an optimizer's rule from the clean weights; see `reference.descend_` and `rules`.

    g <- factor g + other other_grad       (GSAM, arXiv 2203.08065; LookSAM, 2203.02714; the last term if there is one)
    w, state <- rule(w, g, state)
    ema <- ema + rate (w - ema)            (of the new clean weights as they are stored; where that change is finite)

    A program works on one block of one segment. A coordinate whose new state is not finite keeps its clean weight and
    its state.

    Args:
        table_ptr: where the segments are, int64 [segments, len(spec.TABLE)].
        segments_ptr: the segment of each program, int32 [blocks].
        weight_ptr, clean_ptr: from where the table counts weights, which are written, and clean weights,
            fp32/bf16/fp16/fp64.
        grad_ptr, other_ptr: the same for gradients and second gradients, of any float type; the latter or None.
        steps_ptr: int8 [size], how far 16-bit weights have been moved from the clean ones; or None.
        remainder_ptr: of master weights, int16 or int8 (bf16) or int32 (fp16) [size]; written; or None.
        anchor_ptr: the weights' type [size]; or None.
        ema_ptr: the compute type [size]; written; or None.
        orthogonal_ptr: the weights' type [size]: gets grad - other other_grad (LookSAM's component), and the other
            gradients are not added; or None.
        coef_ptr: [segments, COLUMNS], in the compute type: fp64 for fp64 weights, else fp32.
        key_ptr: of the random numbers, int32 [segments]; read if STOCHASTIC.
        state_ptrs: the rule's lanes, any float type, or int8 and uint8 codes [size]; written.
        scale_ptrs: of codes, bf16 [size / 32]; written; or None for floats.

    Bytes per element of AdamW: fp32 28 (read w, g, m, v; write w, m, v); bf16 14; bf16 with fp32 moments and a
    remainder 26; bf16 with 8-bit moments, 24-bit master weights and 8-bit steps 13.25. Others and anchors add a read,
    averages 8 bytes, orthogonal components a write.
    """
    segment, row, start, left, whole = locate(table_ptr, segments_ptr, FIRST_BLOCK, BLOCK)
    places = (
        tl.load(row + OFFSET) + start,
        tl.load(row + WEIGHT) + start,
        tl.load(row + CLEAN) + start,
        tl.load(row + GRAD) + start,
        tl.load(row + OTHER) + start,
    )
    tensors = (weight_ptr, clean_ptr, grad_ptr, other_ptr)
    lanes = (steps_ptr, remainder_ptr, anchor_ptr, ema_ptr, orthogonal_ptr)
    numbers = (coef_ptr + segment * COLUMNS, key_ptr + segment)
    states = (state_ptrs, scale_ptrs)
    if whole:
        _block(0, start, left, *places, *tensors, *lanes, *numbers, *states, RULE, STOCHASTIC, True, BLOCK)
    else:
        first = 0
        while first < left:
            _block(first, start, left, *places, *tensors, *lanes, *numbers, *states, RULE, STOCHASTIC, False, LANES)
            first += LANES


def descend_(
    segments: Segments,
    state: Sequence[torch.Tensor],
    remainder: torch.Tensor | None,
    anchor: torch.Tensor | None,
    ema: torch.Tensor | None,
    orthogonal: torch.Tensor | None,
    coef: torch.Tensor,
    key: torch.Tensor,
    rule: str,
    stochastic: bool,
    scales: Sequence[torch.Tensor] = (),
    steps: torch.Tensor | None = None,
) -> None:
    """Launch `descend_kernel`; arguments as `reference.descend_`."""
    plan = segments.plan
    if not segments or not plan.blocks:
        return
    weight = segments.anchor("weight")
    tensors = [segments.anchor(name) for name in ("clean", "grad", "other")]
    lanes = [steps, remainder, anchor, ema, orthogonal]
    narrow_state = any(lane.element_size() < 4 for lane in state)
    rounds = narrow_state or (weight.element_size() == 2 and (remainder is None or remainder.element_size() == 1))
    descend_kernel[(plan.blocks,)](
        segments.relative(),
        plan.segment_of("blocks"),
        weight,
        *tensors,
        *lanes,
        coef,
        key,
        tuple(state),
        tuple(scales) or None,
        RULE=rule,
        COLUMNS=_COLUMNS[rule],
        STOCHASTIC=stochastic and rounds,
        BLOCK=BLOCK,
        enable_fp_fusion=False,
        **shape(weight, *tensors, *lanes, *state),
    )
