"""Numbers from which the coefficients of passes are made; that is done on the device, see `kernels.formulas`."""

from __future__ import annotations

from ..kernels.spec import WEYL


def purpose(seed: int, number: int) -> int:
    """What makes the random numbers of a pass others than those of passes of other seeds and numbers, 32 bits."""
    return seed * WEYL + number & 0xFFFFFFFF


def representable(beta: float) -> float:
    """The probability with which `perturb_` moves a coordinate if asked for beta: a multiple of 2**-15, > 0."""
    return max(round(beta * 2**15), 1) * 2.0**-15
