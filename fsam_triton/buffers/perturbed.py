"""Perturbed parameters: how a pass has left them, and their way back, whatever somebody does to them meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.formats import replace

if TYPE_CHECKING:
    from .lanes import Lanes


class Perturbed:
    """How a pass has left perturbed parameters; their clean weights, or the steps from there, are in the lane "backup".

    What somebody writes into a parameter meanwhile (by loading a checkpoint, say) is taken for clean weights.

    Args:
        lanes: of the parameters.
        active: which are perturbed.
    """

    def __init__(self, lanes: Lanes, active: Sequence[bool]) -> None:
        self.lanes = lanes
        self.active: list[bool] = list(active)
        self.seal()

    def seal(self) -> None:
        """Take the parameters as they are now for perturbed."""
        memory = self.lanes.memory()
        self._addresses, self._strides = self.lanes.where
        # They keep the perturbed weights, to compare with, should `p.data` be replaced.
        self._storages = list(map(Tensor.untyped_storage, memory))
        self._offsets = list(map(Tensor.storage_offset, memory))
        self._versions = self.lanes.versions()

    def which(self) -> list[int]:
        """The parameters that are perturbed."""
        return [i for i, active in enumerate(self.active) if active]

    def address(self, i: int) -> int:
        """Where parameter i was perturbed."""
        return self._addresses[i]

    def is_clean(self, i: int) -> bool:
        """Whether somebody has written clean weights into parameter i."""
        return not self.active[i] or self.lanes.versions()[i] != self._versions[i]

    def rewind(self, versions: Sequence[int]) -> None:
        """Have autograd take the perturbed weights for those of these versions, whose bits they have again."""
        self.lanes.rewind(versions)
        self._versions = self.lanes.versions()

    def settle(self) -> None:
        """Make the backup of what somebody has written meanwhile."""
        lanes, memory = self.lanes, self.lanes.memory()
        if lanes.versions() == self._versions and list(map(Tensor.data_ptr, memory)) == self._addresses:
            return
        if lanes.counts_steps:
            self._expand()
        versions = lanes.versions()
        for i in self.which():
            now, backup = memory[i], lanes.views("backup")[i]
            moved = now.data_ptr() != self._addresses[i] or now.dtype != lanes.dtype
            if now.shape != lanes.full_shapes[i]:
                raise RuntimeError(f"parameter {lanes.members[i]} was given another shape while it was perturbed")
            if versions[i] != self._versions[i]:
                backup.copy_(lanes.like_lane(i, now))
            elif moved and now.dtype == lanes.dtype and now.device == lanes.device:
                # In other memory, as by `p.data = ...`: what differs from the perturbed weights is theirs.
                left = lanes.like_lane(i, self._left(i, now))
                theirs = lanes.like_lane(i, now)
                backup.copy_(torch.where(theirs == left, backup, theirs))
        self._versions = versions

    def _expand(self) -> None:
        """Make clean weights of the steps: what is written meanwhile is not counted from the perturbed ones."""
        lanes, memory = self.lanes, self.lanes.memory()
        steps = lanes.views("backup")
        lanes.drop("backup")
        lanes.lane("backup", lanes.dtype)
        for i in self.which():
            left = memory[i].detach()
            if left.data_ptr() != self._addresses[i] or left.dtype != lanes.dtype:
                left = self._left(i, left)
            lanes.views("backup")[i].copy_(replace(lanes.like_lane(i, left), steps[i]))

    def _left(self, i: int, now: Tensor) -> Tensor:
        out = torch.empty(0, dtype=self.lanes.dtype, device=self.lanes.device)
        return out.set_(self._storages[i], self._offsets[i], now.shape, self._strides[i])

    def release(self, i: int) -> None:
        """Parameter i has been updated, and is perturbed no more."""
        self.active[i] = False
        self._versions[i] = self.lanes.versions()[i]

    def put_back(self) -> None:
        """Put back the clean weights, to the bit, after `settle`."""
        self.lanes.restore(self.which())
        self.lanes.perturbed = None
