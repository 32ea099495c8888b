"""Lanes of the selected weights of parameters: training a small part of the weights in compact buffers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import ArgumentError, check
from ..kernels.segments import Plan
from .lanes import Gradients, Lanes, Member, Moved


class SparseLanes(Lanes):
    """Lanes of the selected weights alone, so every pass works in a time that depends on how many there are.

    Weights and gradients are gathered from the parameters before each pass, and scattered into them after it.

    Args:
        members: parameters of one device and type, each with a selected weight.
        indices: for each parameter the selected weights' positions, integers, in row-major order, ascending.
    """

    def __init__(self, members: Sequence[Member], indices: Sequence[Tensor]) -> None:
        self._lengths = list(map(len, indices))
        super().__init__(members)
        dtype = torch.int32 if max(p.numel() for p in self.params) < 1 << 31 else torch.int64
        self.lane("index", dtype)
        for view, positions in zip(self.views("index"), indices, strict=True):
            view.copy_(positions)
        # The positions in memory, where strides are not row-major.
        self._places = self.lanes["index"]
        if any(map(is_permuted, self.full_shapes, self.full_strides)):
            self._places = self._places.clone()
            for i, (shape, strides) in enumerate(zip(self.full_shapes, self.full_strides, strict=True)):
                part = self.plan.part(self._places, i)
                part.copy_(in_memory(part, shape, strides))
        # What a pass works on, from `weights` to `written`.
        self._compact = torch.empty(0)

    def _lay_out(self) -> None:
        super()._lay_out()
        self.shapes: list[torch.Size] = [torch.Size([length]) for length in self._lengths]
        self.strides: list[tuple[int, ...]] = [(1,)] * len(self._lengths)
        self.plan: Plan = type(self.plan)(self._lengths, self.device)

    # -- the user's memory ---------------------------------------------------------------------------------------------

    def _stage(self, i: int, tensor: Tensor) -> None:
        strides = f"strides {tensor.stride()}"
        raise ArgumentError(f"parameter {self.members[i]}", strides, "must be dense in memory with trainable")

    def weights(self) -> list[Tensor]:
        self._compact = self._gathered(self.params, range(len(self)))
        return self._split(self._compact)

    def written(self, active: Sequence[bool]) -> None:
        self._write(self._compact, [i for i, now in enumerate(active) if now])
        self._compact = torch.empty(0)

    def _usable(self, grads: Gradients) -> Gradients:
        if not self.fits(thoroughly=True):
            raise Moved
        there = {i: grad for i, grad in enumerate(grads) if grad is not None}
        for i, grad in there.items():
            self.check_layout(i, grad)
        compact = self._split(self._gathered(list(there.values()), list(there)))
        return [None if grad is None else compact[i] for i, grad in enumerate(grads)]

    def like_lane(self, i: int, tensor: Tensor) -> Tensor:
        return flat_in_memory(self._laid_out(i, tensor)).index_select(0, self.plan.part(self._places, i))

    def like_parameter(self, i: int, part: Tensor) -> Tensor:
        # What is not trained is the same, clean or perturbed, rounded or master.
        out = torch.empty_strided(self.full_shapes[i], self.full_strides[i], dtype=part.dtype, device=self.device)
        out.copy_(self.params[i].detach())
        flat_in_memory(out).index_copy_(0, self.plan.part(self._places, i).long(), part)
        return out

    def trained(self, i: int) -> Tensor:
        out = torch.empty_strided(self.full_shapes[i], self.full_strides[i], dtype=torch.bool, device=self.device)
        flat_in_memory(out.fill_(False)).index_fill_(0, self.plan.part(self._places, i).long(), True)
        return out

    def _write(self, flat: Tensor, which: Sequence[int]) -> None:
        if not which:
            return
        targets = [self._laid_out(i, self.params[i]) for i in which]
        ops.scatter_(targets, self._places, flat.to(self.dtype), *self._extents(which))
        for i, target in zip(which, targets, strict=True):
            if target.data_ptr() != self.params[i].data_ptr():
                self.params[i].detach().copy_(target)
        self._tell([self.params[i] for i in which])

    def restore(self, which: Sequence[int]) -> None:
        """Put the clean weights back into these parameters, which are perturbed."""
        if self.counts_steps:
            flat = torch.zeros(self.plan.size, dtype=self.dtype, device=self.device)
            for i in which:
                self.plan.part(flat, i).copy_(self.backup(i))
            self._write(flat, which)
        else:
            super().restore(which)

    def _gathered(self, sources: Sequence[Tensor], which: Sequence[int]) -> Tensor:
        """Of tensors like parameters the selected elements, in the layout of a lane with zeros elsewhere."""
        out = torch.zeros(self.plan.size, dtype=self.dtype, device=self.device)
        if which:
            sources = [self._laid_out(i, source) for i, source in zip(which, sources, strict=True)]
            ops.gather_(out, sources, self._places, *self._extents(which))
        return out

    def _extents(self, which: Sequence[int]) -> tuple[list[int], list[int]]:
        return [self.plan.offsets[i] for i in which], [self.plan.lengths[i] for i in which]

    def _split(self, flat: Tensor) -> list[Tensor]:
        return [self.plan.part(flat, i) for i in range(len(self))]

    def _laid_out(self, i: int, tensor: Tensor) -> Tensor:
        """A tensor like parameter i as positions count in it: itself, or a copy if its strides, type or device differ.

        A parameter's own do only when it was moved while it is perturbed, and is to be restored.
        """
        here = self.full_shapes[i], self.full_strides[i], self.dtype, self.device
        tensor = tensor.detach()
        if (tensor.shape, tensor.stride(), tensor.dtype, tensor.device) == here and not tensor.is_neg():
            return tensor
        return torch.empty_strided(*here[:2], dtype=self.dtype, device=self.device).copy_(tensor)

    # -- state ---------------------------------------------------------------------------------------------------------

    def check_entry(self, i: int, name: str, value: Tensor) -> None:
        super().check_entry(i, name, value)
        if name == "index":
            own = self.views("index")[i]
            label = f"state {name!r} of parameter {self.members[i]}"
            check(torch.equal(value.to(own), own), label, "of other weights", "must be of those of trainable")

    def set(self, i: int, name: str, value: Any, like_parameter: bool = True) -> None:
        if name == "index":
            self.check_entry(i, name, value)
        else:
            super().set(i, name, value, like_parameter)


def flat_in_memory(tensor: Tensor) -> Tensor:
    """The memory of a tensor that is dense in memory as a flat tensor."""
    return tensor.as_strided((tensor.numel(),), (1,))


def is_permuted(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether the elements of a tensor that is dense in memory are not there in row-major order."""
    return not torch.empty_strided(shape, strides, device="meta").is_contiguous()


def in_memory(positions: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """Positions of row-major elements of a tensor as positions in its memory."""
    if not is_permuted(shape, strides):
        return positions
    coordinates = torch.unravel_index(positions.to(torch.int64), shape)
    return functools.reduce(torch.add, (c * stride for c, stride in zip(coordinates, strides, strict=True)))
