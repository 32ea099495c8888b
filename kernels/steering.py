"""The directions that are made of the gradient and an average; see `directions` for what they mean."""

import triton
import triton.language as tl

from . import spec
from .blocks import pointer
from .codecs import load_codes
from .rounding import quotient, widen

_COLUMNS = tl.constexpr(len(spec.DIRECTION))
_RATE, _FACTOR = (tl.constexpr(spec.DIRECTION.index(name)) for name in ("rate", "factor"))


@triton.jit
def steered(
    g,
    segment,
    place,
    offs,
    inside,
    lane_ptr,
    scale_ptr,
    along_ptr,
    unscale_ptr,
    ALONG: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The direction of elements place + offs of a lane, and the average before and with this gradient.

    Args:
        g: gradients in the compute type.
        segment: whose row of coefficients counts.
        lane_ptr, scale_ptr: to the lane of averages, and its scales if these are codes.
        along_ptr: to the coefficients, [segments, len(spec.DIRECTION)].
        unscale_ptr: fp32, what the gradients were multiplied with; or None.
        ALONG: one of `spec.ALONG`.
    """
    compute: tl.constexpr = g.dtype
    other = None if inside is None else 0.0
    lane_ptr = pointer(lane_ptr, place, WHOLE)
    if scale_ptr is not None:
        before = load_codes(lane_ptr, scale_ptr, place, offs, inside).to(compute)
    else:
        before = widen(tl.load(lane_ptr + offs, mask=inside, other=other), compute)
    if unscale_ptr is not None:
        g *= 1.0 / tl.load(unscale_ptr).to(compute)
    row = along_ptr + segment * _COLUMNS
    rate, factor = tl.load(row + _RATE), tl.load(row + _FACTOR)
    if ALONG == "less_average":
        average = before + rate * (g - before)
        d = g - factor * average
    else:
        average = before + rate * (g * g - before)
        root = tl.sqrt(average) + factor
        d = tl.where(average < float("inf"), quotient(g, root), float("nan"))
    return d, before, average
