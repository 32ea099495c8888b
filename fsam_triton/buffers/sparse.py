"""Lanes of the selected weights of parameters: training a small part of the weights in compact buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from .lanes import Lanes, Member, Moved


class SparseLanes(Lanes):
    """Lanes of the selected weights alone, so every pass works in a time that depends on how many there are.

    Weights and gradients are gathered from the parameters before each pass and scattered into them after it.

    Args:
        members: parameters of one device and type, each with a selected weight.
        indices: for each parameter the selected weights' positions, int64, in row-major order, ascending.
    """

    def __init__(self, members: Sequence[Member], indices: Sequence[Tensor]) -> None:
        self._indices = list(indices)
        super().__init__(members)
        # Positions in memory, whatever the strides.
        dtype = torch.int32 if max(p.numel() for p in self.params) < 1 << 31 else torch.int64
        self.lane("index", dtype)
        for view, positions, p in zip(self.views("index"), self._indices, self.params, strict=True):
            view.copy_(in_memory(positions, p))
        del self._indices
        self._compact: Tensor | None = None

    def _lay_out(self) -> None:
        super()._lay_out()
        self.shapes = [index.shape for index in self._indices]
        self.strides = [(1,)] * len(self._indices)
        self.plan = type(self.plan)(map(len, self._indices), self.device)

    def _stage(self, i: int, tensor: Tensor) -> None:
        raise RuntimeError(f"parameter {self.members[i]} has strides {tensor.stride()}: with trainable it must be dense")

    def weights(self) -> list[Tensor]:
        self._compact = self._gathered(self.params, range(len(self)))
        return self._split(self._compact)

    def _usable(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        which = [i for i, grad in enumerate(grads) if grad is not None]
        if not self.fits_now():
            raise Moved
        sources = [self._dense(i, grads[i]) for i in which]
        compact = self._split(self._gathered(sources, which))
        return [compact[i] if grad is not None else None for i, grad in enumerate(grads)]

    def _dense(self, i: int, grad: Tensor) -> Tensor:
        if grad.layout != torch.strided:
            raise RuntimeError(f"sparse gradient of parameter {self.members[i]}: only dense gradients are supported")
        p = self.params[i]
        if grad.stride() == p.stride() and grad.dtype == p.dtype:
            return grad
        return torch.empty_like(p).copy_(grad)

    def _gathered(self, sources: Sequence[Tensor], which: Sequence[int]) -> Tensor:
        out = torch.zeros(self.plan.size, dtype=self.dtype, device=self.device)
        if len(which):
            offsets, counts = ([of[i] for i in which] for of in (self.plan.offsets, self.plan.lengths))
            ops.gather_(out, sources, self.lanes["index"], offsets, counts)
        return out

    def _split(self, flat: Tensor) -> list[Tensor]:
        return [self.plan.part(flat, i) for i in range(len(self))]

    def _scatter(self, flat: Tensor, which: Sequence[int]) -> None:
        if which:
            offsets, counts = ([of[i] for i in which] for of in (self.plan.offsets, self.plan.lengths))
            ops.scatter_([self.params[i].detach() for i in which], self.lanes["index"], flat, offsets, counts)
            self._tell([self.params[i] for i in which])

    def written(self, active: Sequence[bool]) -> None:
        self._scatter(self._compact, [i for i, now in enumerate(active) if now])
        self._compact = None

    def write(self, name: str, which: Sequence[int]) -> None:
        self._scatter(self.lanes[name].to(self.dtype), which)

    def like_lane(self, i: int, tensor: Tensor) -> Tensor:
        """The selected elements of a tensor like parameter i."""
        p = self.params[i]
        if tensor.stride() != p.stride() or tensor.dtype != p.dtype:
            tensor = torch.empty_like(p).copy_(tensor)
        out = torch.empty(self.plan.lengths[i], dtype=self.dtype, device=self.device)
        ops.gather_(out, [tensor.detach()], self.views("index")[i], [0], [len(out)])
        return out

    def clean_parameter(self, i: int) -> Tensor:
        out = self.params[i].detach().clone(memory_format=torch.preserve_format)
        index = self.views("index")[i]
        ops.scatter_([out], index, self.clean(i), [0], [len(index)])
        return out


def in_memory(positions: Tensor, p: Tensor) -> Tensor:
    """Positions of row-major elements of `p`, int64, as positions in its memory."""
    if p.is_contiguous():
        return positions
    coordinates = torch.unravel_index(positions.to(torch.int64), p.shape)
    return sum(c * stride for c, stride in zip(coordinates, p.stride(), strict=True))

