"""The coefficients of the passes, in one small launch for each half of a step; sources are in `formulas`."""

import torch
import triton
import triton.language as tl

from . import spec
from .rules import adamw_row, lion_row, sgd_row

# Segments of a program.
ROWS = 128
_MEMBERS = tl.constexpr(len(spec.MEMBER))
_GROUP, _SALT, _START = (tl.constexpr(spec.MEMBER.index(name)) for name in ("group", "salt", "start"))
_WEYL, _STEP = tl.constexpr(spec.WEYL), tl.constexpr(spec.STEP)
_MIX0, _MIX1 = (tl.constexpr(factor) for factor in spec.MIXES)
_CLIMB, _PERTURB = tl.constexpr(len(spec.CLIMB)), tl.constexpr(len(spec.PERTURB))
_RHO, _CHANCE = (tl.constexpr(spec.CLIMB.index(name)) for name in ("rho", "chance"))
_SCALE, _OF_CHANCE = (tl.constexpr(spec.PERTURB.index(name)) for name in ("scale", "chance"))
# The first columns are those of every rule.
_SIGN, _ALPHA, _MAX_NORM, _AVERAGE = (
    tl.constexpr(spec.NUMBERS["adamw"].index(name)) for name in ("sign", "alpha", "max_norm", "average")
)
_LR, _RATE, _BALANCE = (tl.constexpr(spec.NUMBERS["adamw"].index(name)) for name in ("lr", "rate", "balance"))
_FACTOR, _OTHER, _OF_AVERAGE = (tl.constexpr(spec.DESCEND["adamw"].index(name)) for name in ("factor", "other", "rate"))


@triton.jit
def _keys(step, row, inside, purpose):
    """See `formulas.keys`."""
    salt = tl.load(row + _SALT, mask=inside, other=0).to(tl.uint32)
    start = tl.load(row + _START, mask=inside, other=0).to(tl.uint32)
    key = step.to(tl.int32).to(tl.uint32) * tl.full([], _STEP, tl.uint32) + salt + purpose.to(tl.uint32)
    key = (key ^ (key >> 15)) * tl.full([], _MIX0, tl.uint32)
    key = (key ^ (key >> 15)) * tl.full([], _MIX1, tl.uint32)
    return ((key ^ (key >> 16)) + start * tl.full([], _WEYL, tl.uint32)).to(tl.int32, bitcast=True)


@triton.jit
def _scalar(ptr):
    """The number that a pointer is to, fp64; 1 if there is none."""
    if ptr is None:
        return tl.full([], 1.0, tl.float64)
    else:
        return tl.load(ptr).to(tl.float64)


@triton.jit(do_not_specialize=["count", "purpose"])
def climb_coefficients_kernel(
    numbers_ptr,
    members_ptr,
    steps_ptr,
    norm_sq_ptr,
    scale_ptr,
    coef_ptr,
    key_ptr,
    count,
    purpose,
    ROWS: tl.constexpr,
):
    """coef[s] = rho / (norm + 1e-12) of segment s's group, and its key; 0 where the norm is not finite.

    Args:
        numbers_ptr: fp64 [groups, len(spec.CLIMB)].
        members_ptr: int64 [count, len(spec.MEMBER)].
        steps_ptr: fp32 [count], updates so far.
        norm_sq_ptr: fp64 scalar, squared norm of the gradients.
        scale_ptr: fp32 scalar, what they were multiplied with; or None.
        coef_ptr: [count, len(spec.PERTURB)], fp32 or fp64; written.
        key_ptr: int32 [count]; written.
        count: of segments.
        purpose: 32 bits, as int32.
    """
    segment = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = segment < count
    row = members_ptr + segment * _MEMBERS
    numbers = numbers_ptr + tl.load(row + _GROUP, mask=inside, other=0) * _CLIMB
    inverse = 1.0 / _scalar(scale_ptr)
    norm = tl.sqrt(tl.load(norm_sq_ptr)) * inverse
    scale = tl.load(numbers + _RHO, mask=inside) / (norm + 1e-12) * inverse
    coef = coef_ptr + segment * _PERTURB
    tl.store(coef + _SCALE, tl.where(norm < float("inf"), scale, 0.0), mask=inside)
    tl.store(coef + _OF_CHANCE, tl.load(numbers + _CHANCE, mask=inside), mask=inside)
    tl.store(
        key_ptr + segment, _keys(tl.load(steps_ptr + segment, mask=inside, other=0), row, inside, purpose), mask=inside
    )


@triton.jit
def _direction(COMBINED: tl.constexpr, measured_ptr, alpha, scale_ptr, other_scale_ptr):
    """What the gradients and the second ones are multiplied with, and the squared norm of that; see `formulas`."""
    one = tl.full([], 1.0, tl.float64)
    own, other, norm_sq = one, one * 0.0, one
    if COMBINED == "alone":
        if measured_ptr is not None:
            norm_sq = tl.load(measured_ptr)
    else:
        dot, first_sq, second_sq = tl.load(measured_ptr), tl.load(measured_ptr + 1), tl.load(measured_ptr + 2)
        norm_sq = second_sq
        if COMBINED == "decomposed":
            ratio = one
            if other_scale_ptr is not None:
                ratio = _scalar(scale_ptr) / _scalar(other_scale_ptr)
            dot, first_sq = ratio * dot, ratio * ratio * first_sq
            usable = (tl.abs(dot) < float("inf")) & (tl.abs(first_sq) < float("inf")) & (second_sq > 0)
            vertical_sq = first_sq - dot * dot / second_sq
            vertical_sq = tl.where(vertical_sq < 0, 0.0, vertical_sq)
            own = tl.where(usable, 1 + alpha * dot / second_sq, one)
            other = tl.where(usable, -alpha * ratio, other)
            norm_sq = tl.where(usable, second_sq + alpha * alpha * vertical_sq, second_sq)
        elif COMBINED == "kept":
            other = tl.where((tl.abs(dot) < float("inf")) & (first_sq > 0), dot / first_sq, other)
        else:
            usable = (tl.abs(first_sq) < float("inf")) & (first_sq > 0) & (tl.abs(second_sq) < float("inf"))
            other = tl.where(usable, alpha * tl.sqrt(second_sq / first_sq), other)
            norm_sq = tl.where(usable, second_sq + 2 * other * dot + other * other * first_sq, second_sq)
    return own, other, norm_sq


@triton.jit
def _balanced(numbers, segment, inside, squares_ptr, pairs_ptr):
    """The rate of decay of each segment; see `formulas.balanced`."""
    rate = tl.load(numbers + _RATE, mask=inside)
    if pairs_ptr is None:
        return rate
    else:
        own = tl.load(pairs_ptr + 2 * segment, mask=inside, other=0)
        other = tl.load(pairs_ptr + 2 * segment + 1, mask=inside, other=0)
        more = tl.load(squares_ptr + own, mask=inside) - tl.load(squares_ptr + other, mask=inside)
        sign = tl.where(more > 0, 1.0, tl.where(more < 0, -1.0, 0.0))
        sign = tl.where(tl.abs(more) < float("inf"), sign, 0.0)
        factor = 1 - tl.load(numbers + _LR, mask=inside) * rate
        return rate - tl.load(numbers + _BALANCE, mask=inside) * sign * factor


@triton.jit(do_not_specialize=["count", "purpose"])
def descend_coefficients_kernel(
    numbers_ptr,
    members_ptr,
    steps_ptr,
    active_ptr,
    measured_ptr,
    scale_ptr,
    other_scale_ptr,
    overflow_ptr,
    squares_ptr,
    pairs_ptr,
    coef_ptr,
    key_ptr,
    count,
    purpose,
    RULE: tl.constexpr,
    COMBINED: tl.constexpr,
    NUMBERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A row of coefficients and a key for each segment, whose update is counted; see `formulas.descend_coefficients`.

    Args:
        numbers_ptr: fp64 [groups, NUMBERS].
        members_ptr: int64 [count, len(spec.MEMBER)].
        steps_ptr: fp32 [count], updates so far; written.
        active_ptr: bool [count], which are updated; or None.
        measured_ptr: fp64, squared norm of the gradients, or [3], what `gap` gives; or None.
        scale_ptr, other_scale_ptr: fp32 scalars, what gradients and second ones were multiplied with; or None.
        overflow_ptr: fp32 scalar, not 0 to skip the update; or None.
        squares_ptr: fp64, squared norms; or None.
        pairs_ptr: int64 [count, 2], where in these a segment's own is, and that of the other one of its pair; or None.
        coef_ptr: [count, COLUMNS], fp32 or fp64; written.
        key_ptr: int32 [count]; written.
        count: of segments.
        purpose: 32 bits, as int32.
    """
    segment = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = segment < count
    row = members_ptr + segment * _MEMBERS
    numbers = numbers_ptr + tl.load(row + _GROUP, mask=inside, other=0) * NUMBERS

    own, other, norm_sq = _direction(COMBINED, measured_ptr, tl.load(numbers_ptr + _ALPHA), scale_ptr, other_scale_ptr)
    factor = 1.0 / _scalar(scale_ptr)
    sound = tl.full([], 1, tl.int1)
    if overflow_ptr is not None:
        sound = sound & (tl.load(overflow_ptr) == 0)
    if measured_ptr is not None:
        max_norm = tl.load(numbers_ptr + _MAX_NORM)
        clips = max_norm < float("inf")
        norm = tl.sqrt(norm_sq) * factor
        clip = max_norm / (norm + 1e-6)
        factor = tl.where(clips, factor * tl.where(clip > 1, 1.0, clip), factor)
        sound = sound & ((max_norm == float("inf")) | (norm < float("inf")))

    step = tl.load(steps_ptr + segment, mask=inside, other=0)
    now = inside & sound
    if active_ptr is not None:
        now = now & (tl.load(active_ptr + segment, mask=inside, other=0) != 0)
    step += now.to(tl.float32)
    tl.store(steps_ptr + segment, step, mask=inside)
    tl.store(key_ptr + segment, _keys(step, row, inside, purpose), mask=inside)

    sign = tl.load(numbers + _SIGN, mask=inside)
    of_grad = sign * tl.where(sound, own * factor, float("nan"))
    # What is kept is a gradient of the objective, whatever its sign in the update.
    of_other = sign * 0.0 + other if COMBINED == "kept" else sign * (other * factor)
    coef = coef_ptr + segment * COLUMNS
    tl.store(coef + _FACTOR, of_grad, mask=inside)
    tl.store(coef + _OTHER, of_other, mask=inside)
    # NaN where the update is skipped.
    tl.store(coef + _OF_AVERAGE, tl.load(numbers + _AVERAGE, mask=inside) + 0.0 * of_grad, mask=inside)
    rate = _balanced(numbers, segment, inside, squares_ptr, pairs_ptr)
    if RULE == "adamw":
        adamw_row(coef, numbers, rate, step, inside)
    elif RULE == "sgd":
        sgd_row(coef, numbers, rate, step, inside)
    else:
        lion_row(coef, numbers, rate, step, inside)


def signed(word: int) -> int:
    """The same 32 bits as a number of which Triton always makes an int32."""
    return word - ((word >> 31) << 32)


def _made(members: torch.Tensor, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    coef = torch.empty(len(members), columns, dtype=dtype, device=members.device)
    return coef, torch.empty(len(members), dtype=torch.int32, device=members.device)


def climb_coefficients(
    numbers: torch.Tensor,
    members: torch.Tensor,
    steps: torch.Tensor,
    purpose: int,
    norm_sq: torch.Tensor,
    scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `climb_coefficients_kernel`; arguments and result as `reference.climb_coefficients`."""
    coef, key = _made(members, len(spec.PERTURB), dtype)
    given = (numbers, members, steps, norm_sq, scale, coef, key, len(members), signed(purpose))
    climb_coefficients_kernel[(triton.cdiv(len(members), ROWS),)](*given, ROWS=ROWS, enable_fp_fusion=False)
    return coef, key


def descend_coefficients(
    rule: str,
    combined: str,
    numbers: torch.Tensor,
    members: torch.Tensor,
    steps: torch.Tensor,
    active: torch.Tensor | None,
    purpose: int,
    measured: torch.Tensor | None,
    scale: torch.Tensor | None,
    other_scale: torch.Tensor | None,
    overflow: torch.Tensor | None,
    squares: torch.Tensor | None,
    pairs: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `descend_coefficients_kernel`; arguments and result as `reference.descend_coefficients`."""
    columns = len(spec.DESCEND[rule])
    coef, key = _made(members, columns, dtype)
    given = (numbers, members, steps, active, measured, scale, other_scale, overflow, squares, pairs)
    descend_coefficients_kernel[(triton.cdiv(len(members), ROWS),)](
        *given,
        coef,
        key,
        len(members),
        signed(purpose),
        RULE=rule,
        COMBINED=combined,
        NUMBERS=len(spec.NUMBERS[rule]),
        COLUMNS=columns,
        ROWS=ROWS,
        enable_fp_fusion=False,
    )
    return coef, key
