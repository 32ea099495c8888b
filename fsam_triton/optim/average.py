"""Average: the moving average of an optimizer's weights, in the lane "ema", and how it is shown for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..buffers.lanes import Lanes
from ..buffers.ledger import Ledger
from ..kernels.reference import compute_dtype


class Average:
    """Whether the parameters of an optimizer hold the average of their weights at this moment."""

    def __init__(self) -> None:
        self.is_shown = False

    def refuse(self, action: str) -> None:
        """Raise a RuntimeError if the parameters hold the average; action: what is then impossible."""
        if self.is_shown:
            raise RuntimeError(f"{action} inside ema_weights(): the parameters hold the average, leave the block first")

    @contextlib.contextmanager
    def shown(self, ledger: Ledger) -> Iterator[None]:
        """Inside the block, the parameters hold the average; at its end, always the weights."""
        with torch.no_grad():
            before = [(lanes, *_exchanged(lanes)) for lanes in ledger if "ema" in lanes.lanes]
        self.is_shown = True
        try:
            yield
        finally:
            self.is_shown = False
            with torch.no_grad():
                # Where parameters share memory, a later one's copy has the average of an earlier one.
                for lanes, weights, which in reversed(before):
                    lanes.write_flat(weights, which)


def allocate(lanes: Lanes, fill: bool) -> None:
    """Make the lane of the average; fill: with the weights, where it is new."""
    is_new = "ema" not in lanes.lanes
    lanes.lane("ema", compute_dtype(lanes.dtype))
    if is_new and fill:
        for i in range(len(lanes)):
            lanes.views("ema")[i].copy_(lanes.exact(i))


def _exchanged(lanes: Lanes) -> tuple[Tensor, list[int]]:
    """Put the average into the parameters that have been updated.

    Returns:
        A copy of their weights, in the layout of a lane, and their numbers.
    """
    lanes.fits(thoroughly=True)
    which = lanes.entries.updated()
    before = torch.zeros(lanes.plan.size, dtype=lanes.dtype, device=lanes.device)
    for i in which:
        lanes.plan.shaped(before, i).copy_(lanes.clean(i))
    lanes.write("ema", which)
    return before, which
