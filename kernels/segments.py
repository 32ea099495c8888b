"""Segments: the tensors that one launch works on, wherever they are, and where each of them begins in the lanes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import compress, repeat
from operator import is_
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from . import spec

_COLUMN = {name: i for i, name in enumerate(spec.TABLE)}
# Of tensors that are there.
_address_of: Callable[[Any], int] = Tensor.data_ptr
Column = Literal["weight", "grad", "clean", "other"]


class Plan:
    """The layout of segments of given lengths in lanes, and which program of a launch works on which of them.

    Args:
        lengths: elements of each segment.
        device: of the lanes.

    Attributes:
        offsets: the beginning of each segment, a multiple of `spec.ALIGN`.
        size: elements of a lane; gaps between segments hold zeros.
        blocks, chunks: their numbers, over all segments.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths: list[int] = list(lengths)
        self.device = device
        length = np.asarray(self.lengths, np.int64)
        padded = -(-length // spec.ALIGN) * spec.ALIGN
        self._blocks_of, self._chunks_of = -(-length // spec.BLOCK), -(-length // spec.CHUNK)
        self.template: np.ndarray = np.zeros((len(length), len(spec.TABLE)), np.int64)
        for name, counts in (("offset", padded), ("block", self._blocks_of), ("chunk", self._chunks_of)):
            self.template[:, _COLUMN[name]] = counts.cumsum() - counts
        self.template[:, _COLUMN["length"]] = length
        self.offsets: list[int] = self.template[:, _COLUMN["offset"]].tolist()
        self.size: int = int(padded.sum())
        self.blocks: int = int(self._blocks_of.sum())
        self.chunks: int = int(self._chunks_of.sum())
        self._maps: dict[str, Tensor] = {}
        self._ends: Tensor | None = None
        self._alone: dict[int, Plan] = {}

    def segment_of(self, what: str) -> Tensor:
        """The segment of each of the "blocks" or "chunks", int32 on the device; computed on first use."""
        if what not in self._maps:
            counts = self._blocks_of if what == "blocks" else self._chunks_of
            host = torch.from_numpy(np.repeat(np.arange(len(counts), dtype=np.int32), counts))
            self._maps[what] = upload(host, self.device)
        return self._maps[what]

    def sums(self, partial: Tensor) -> Tensor:
        """The sums over each segment of numbers per chunk [chunks], in a fixed order, [segments]."""
        if self._ends is None:
            ends = np.concatenate([[0], self._chunks_of.cumsum()])
            self._ends = upload(torch.from_numpy(ends), self.device)
        # It would wait for the device to check what the host has made.
        return torch.segment_reduce(partial, "sum", offsets=self._ends, unsafe=True)

    def only(self, i: int) -> Plan:
        """The same lanes with programs for segment i alone, for launches in which no other segment takes part."""
        if i not in self._alone:
            plan = Plan([n if j == i else 0 for j, n in enumerate(self.lengths)], self.device)
            plan.template[:, _COLUMN["offset"]] = self.template[:, _COLUMN["offset"]]
            plan.offsets, plan.size = self.offsets, self.size
            self._alone[i] = plan
        return self._alone[i]

    def part(self, lane: Tensor, i: int) -> Tensor:
        """Segment i's elements of a lane, flat."""
        return lane[self.offsets[i] : self.offsets[i] + self.lengths[i]]

    def words(self, mask: Tensor, i: int) -> Tensor:
        """Segment i's words of a mask, int32 [size / 32]: bit j % 32 of word j // 32 belongs to element j."""
        start = self.offsets[i] // 32
        return mask[start : start - (-self.lengths[i] // 32)]


class Segments:
    """The segments of one launch, all on one device. Tensors are dense, and read and written in memory order.

    Args:
        plan: the plan of the lanes.
        weight: the weights; None for a segment that takes no part.
        grad: the gradients, or tensors in their place, in any one float type; a segment with None takes no part either.
        clean: the tensors from which an update reads the clean weights (default: `weight`).
        other: second gradients, in the type of the first.
        uploaded: the last table of the same plan, which is used again if it is the same.
        known: the addresses of whole lists of tensors given above, by the lists' ids.
    """

    def __init__(
        self,
        plan: Plan,
        weight: Sequence[Tensor | None],
        grad: Sequence[Tensor | None],
        *,
        clean: Sequence[Tensor | None] | None = None,
        other: Sequence[Tensor | None] | None = None,
        uploaded: Uploaded | None = None,
        known: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        self.plan = plan
        self._known = known or {}
        self.weight = weight
        self.clean: Sequence[Tensor | None] = weight if clean is None else clean
        self.tensors: dict[Column, Sequence[Tensor | None] | None] = {
            "weight": weight,
            "grad": grad,
            "clean": self.clean,
            "other": other,
        }
        self._uploaded = Uploaded() if uploaded is None else uploaded
        self.all_active: bool = not any(map(is_, (*weight, *grad), repeat(None)))
        self.active: list[bool] = [True] * len(grad)
        if not self.all_active:
            self.active = [w is not None and g is not None for w, g in zip(weight, grad, strict=True)]
        self._first = next((i for i, active in enumerate(self.active) if active), None)
        self._addresses: np.ndarray | None = None
        self._relative: Tensor | None = None

    def __bool__(self) -> bool:
        """Whether any segment takes part."""
        return self._first is not None

    def dtype(self, column: Literal["weight", "grad", "clean"] = "weight") -> torch.dtype:
        """The type of a column's tensors."""
        return self.anchor(column).dtype

    @overload
    def flat(self, column: Literal["weight", "grad", "clean"], i: int) -> Tensor: ...
    @overload
    def flat(self, column: Literal["other"], i: int) -> Tensor | None: ...
    def flat(self, column: Column, i: int) -> Tensor | None:
        """An active segment i's tensor of a column, flat in memory order: a view of the same memory."""
        tensors = self.tensors[column]
        if tensors is None:
            return None
        tensor = tensors[i]
        assert tensor is not None
        return tensor.detach().as_strided((tensor.numel(),), (1,))

    @overload
    def anchor(self, column: Literal["weight", "grad", "clean"]) -> Tensor: ...
    @overload
    def anchor(self, column: Column) -> Tensor | None: ...
    def anchor(self, column: Column) -> Tensor | None:
        """The tensor from which `relative` tables count a column, if any segment takes part."""
        tensors = self.tensors[column]
        return None if tensors is None or self._first is None else tensors[self._first]

    def addresses(self) -> np.ndarray:
        """The table with addresses, int64 [segments, len(spec.TABLE)]; the same at each call, not to be written."""
        if self._addresses is None:
            self._addresses = self._table()
        return self._addresses

    def _table(self) -> np.ndarray:
        table = self.plan.template.copy()
        which: slice | np.ndarray = slice(None)
        if not self.all_active:
            which = np.array(self.active)
            table[~which, _COLUMN["length"]] = 0
        done: dict[int, np.ndarray] = {}
        for name, tensors in self.tensors.items():
            if tensors is None:
                continue
            if self.all_active and id(tensors) in self._known:
                done[id(tensors)] = self._known[id(tensors)]
            elif id(tensors) not in done:
                there = tensors if self.all_active else compress(tensors, self.active)
                done[id(tensors)] = np.fromiter(map(_address_of, there), np.int64)
            table[which, _COLUMN[name]] = done[id(tensors)]
        table[which, _COLUMN["aligned"]] = np.bitwise_or.reduce(list(done.values())) & 15 == 0
        return table

    def relative(self) -> Tensor:
        """The table on the device, tensors as elements from their column's anchor."""
        if self._relative is None:
            table = self._table()
            for name in self.tensors:
                if (anchor := self.anchor(name)) is not None:
                    column = table[:, _COLUMN[name]]
                    column -= anchor.data_ptr()
                    column //= anchor.element_size()
            self._relative = self._uploaded.table(table, self.plan.device)
        return self._relative


# How often tensors may have moved in one captured CUDA graph: a step or two, whose gradients come and go.
_TABLES_IN_A_CAPTURE = 4


class Uploaded:
    """A table that is sent to the device again only when it has changed."""

    def __init__(self) -> None:
        self._host: np.ndarray | None = None
        self._device: Tensor | None = None
        # Pinned memory for a capture, during which none may be asked for.
        self._spare: list[Tensor] = []

    def table(self, table: np.ndarray, device: torch.device) -> Tensor:
        """The table on the device."""
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self._host is None or not np.array_equal(table, self._host):
            host = torch.from_numpy(table)
            if capturing and self._spare and self._spare[-1].shape == host.shape:
                host = self._spare.pop().copy_(host)
            elif device.type == "cuda" and not capturing:
                missing = _TABLES_IN_A_CAPTURE - len(self._spare)
                self._spare += [torch.empty_like(host).pin_memory() for _ in range(missing)]
            self._host, self._device = table, upload(host, device)
        assert self._device is not None
        if capturing:
            _captured.append(self._device)
        return self._device


# What captured CUDA graphs read when they are replayed.
_captured: list[Tensor] = []


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device, from pinned memory, without waiting."""
    if device.type != "cuda":
        return host.to(device)
    pinned = host if host.is_pinned() else host.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(pinned)
    # Otherwise the allocator of pinned memory knows when the copy is done.
    return pinned.to(device, non_blocking=True)
