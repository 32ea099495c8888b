"""Compact buffers for training a small part of the weights: `SparseBucket`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from . import ops
from .buffers import Bucket


class SparseBucket(Bucket):
    """A bucket of the selected weights alone; the parameters stay where they are.

    `weight` and `grad` are copies of the selected weights and of their gradients, without gaps, so every pass works on
    them as on any other bucket, in a time that depends on how many there are. Gradients are gathered when a step
    begins, weights are scattered into the parameters after each pass that writes them.

    Args:
        params: parameters of one group, device and dtype, each with a selected weight.
        group: their parameter group.
        indices: for each parameter the selected weights' positions, int64, in its own order of elements (row-major),
            ascending.
    """

    flat = False

    def __init__(self, params: Sequence[Parameter], group: dict, indices: Sequence[Tensor]) -> None:
        self._lay_out(params, group, True, [index.shape for index in indices], [(1,)] * len(indices), align=1)
        self._counts = [len(index) for index in indices]
        # Positions in memory, whatever the strides.
        dtype = torch.int32 if max(p.numel() for p in params) < 1 << 31 else torch.int64
        self._index = self.lane("index", dtype)
        for i, (p, positions) in enumerate(zip(self.params, indices, strict=True)):
            self.view(self._index, i).copy_(in_memory(positions, p))
        self.weight = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        self._shown: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        # Gradients that `drop_grads` has zeroed, with their version then.
        self._zeroed: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._pointers = [p.data_ptr() for p in self.params]
        ops.gather_(self.weight, self.params, self._index, self.offsets, self._counts)
        self.remember_versions()

    def read(self, source: Tensor, i: int, target: Tensor) -> None:
        """Copy the selected elements of a tensor like parameter i to its part of a flat buffer."""
        index = self.view(self._index, i)
        # The operator moves bits; the target may be of another type, as masters are.
        values = torch.empty_like(index, dtype=self.dtype)
        ops.gather_(values, [self._like(source, i)], index, [0], [self._counts[i]])
        self.view(target, i).copy_(values)

    def _like(self, source: Tensor, i: int) -> Tensor:
        """A tensor like parameter i in its strides and dtype, as its selected positions count."""
        p = self.params[i]
        if source.stride() == p.stride() and source.dtype == p.dtype:
            return source
        return torch.empty_like(p).copy_(source)

    def collect(self) -> tuple[bool, ...]:
        self._check_parameters()
        grads = [None if self._is_zeroed(i) else p.grad for i, p in enumerate(self.params)]
        active = [i for i, grad in enumerate(grads) if grad is not None]
        if active:
            sources = [self._like(grads[i], i) for i in active]
            offsets, counts = ([of[i] for i in active] for of in (self.offsets, self._counts))
            ops.gather_(self.grad, sources, self._index, offsets, counts)
            # Their version counters do not tell what the operator has written.
            self.grads.forget()
        if self._grads is not None:
            for i, grad in enumerate(grads):
                if grad is None:
                    self.grads.zero(i)
        self.adopt_changed_weights()
        return tuple(grad is not None for grad in grads)

    def written(self) -> None:
        ops.scatter_(self.params, self._index, self.weight, self.offsets, self._counts)
        self._shown.clear()
        super().written()

    def drop_grads(self, keep_views: bool) -> None:
        for i, p in enumerate(self.params):
            if not keep_views:
                p.grad = None
            elif p.grad is not None:
                with torch.no_grad():
                    p.grad.zero_()
                self._zeroed[i] = (weakref.ref(p.grad), p.grad._version)

    def _is_zeroed(self, i: int) -> bool:
        """Whether parameter i's gradient was zeroed and nothing written since."""
        zeroed, version = self._zeroed.get(i, (lambda: None, 0))
        grad = zeroed()
        return grad is not None and grad is self.params[i].grad and grad._version == version

    def clean_view(self, i: int) -> Tensor | None:
        if not self.perturbed:
            return None
        # The same tensor each time, as long as somebody has it: a tied parameter is to be saved once.
        if (out := self._shown.get(i)) is None:
            out = self._shown[i] = self.params[i].detach().clone(memory_format=torch.preserve_format)
            clean = self.clean().to(self.dtype)
            ops.scatter_([out], self._index, clean, [self.offsets[i]], [self._counts[i]])
        return out


def in_memory(positions: Tensor, p: Tensor) -> Tensor:
    """Positions of row-major elements of `p`, int64, as positions in its memory."""
    if p.is_contiguous():
        return positions
    coordinates = torch.unravel_index(positions.to(torch.int64), p.shape)
    return sum(c * stride for c, stride in zip(coordinates, p.stride(), strict=True))
