"""Layout of lanes: where each parameter's part is, and how shapes and strides go with the order in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import spec
from ..kernels.formats import decode, encode
from ..kernels.reference import pack_mask, unpack_mask
from ..kernels.segments import Plan

# The lanes with one element for each `spec.GROUP` of the weights, beside "mask".
SCALES = {f"{name}_scale": name for name in spec.CODED}


class Layout(Plan):
    """A plan of lanes that knows the shapes of their parts.

    Args:
        shapes, strides: of each parameter's part, dense in memory.
        device: of the lanes.
    """

    def __init__(self, shapes: Sequence[torch.Size], strides: Sequence[tuple[int, ...]], device: torch.device) -> None:
        super().__init__([shape.numel() for shape in shapes], device)
        self.shapes: list[torch.Size] = list(shapes)
        self.strides: list[tuple[int, ...]] = list(strides)

    def size_of(self, name: str) -> int:
        """The elements of a lane of this name."""
        return self.size // spec.GROUP if name == "mask" or name in SCALES else self.size

    def shaped(self, lane: Tensor, i: int) -> Tensor:
        """Parameter i's part of a lane, in its own shape and strides."""
        return self._strided(self.part(lane, i), i)

    def scales(self, lane: Tensor, i: int) -> Tensor:
        """Parameter i's part of a lane of scales; see `shape_of_scales`."""
        return self.words(lane, i).view(shape_of_scales(self.shapes[i]))

    def bits(self, mask: Tensor, i: int) -> Tensor:
        """Parameter i's part of a mask, bool in its shape."""
        flat = unpack_mask(self.words(mask, i), torch.empty(self.lengths[i], device="meta"))
        return self._strided(flat, i).clone()

    def packed(self, bits: Tensor, i: int) -> Tensor:
        """The inverse of `bits`: words of a mask."""
        return pack_mask(self._flat(bits, i))

    def encoded(self, values: Tensor, i: int, signed: bool) -> tuple[Tensor, Tensor]:
        """Values in parameter i's shape as codes of 8 bits and their scales, both flat in the order of memory."""
        flat = torch.empty(self.lengths[i], dtype=torch.float32, device=self.device)
        self._strided(flat, i).copy_(values)
        return encode(flat, signed)

    def decoded(self, codes: Tensor, scale: Tensor, i: int) -> Tensor:
        """The values of codes in parameter i's shape, whose scales are in `shape_of_scales`."""
        return self._strided(decode(self._flat(codes, i), scale.flatten()), i)

    def _strided(self, flat: Tensor, i: int) -> Tensor:
        return flat.as_strided(self.shapes[i], self.strides[i])

    def _flat(self, values: Tensor, i: int) -> Tensor:
        flat = torch.empty(self.lengths[i], dtype=values.dtype, device=values.device)
        self._strided(flat, i).copy_(values)
        return flat


def shape_of_scales(shape: Sequence[int]) -> torch.Size:
    """What the scales of a parameter's codes look like: a row for each of its rows, in the order of memory.

    Where rows are whole groups, shards of a parameter have whole groups, too.
    """
    return torch.Size([shape[0], math.prod(shape[1:]) // spec.GROUP])


def can_be_coded(shape: Sequence[int]) -> bool:
    """Whether a parameter of this shape can have codes of 8 bits: whatever its shards, rows must be whole groups."""
    return len(shape) > 1 and math.prod(shape[1:]) % spec.GROUP == 0


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a tensor like this one that is dense in memory."""
    return torch.empty_like(tensor, device="meta").stride()


def apart(part: Tensor) -> Tensor:
    """A part of a lane with a storage of its own extent in the same memory.

    A view would make `torch.save` write the whole lane, and safetensors refuse tensors that share memory.
    """
    start, size = part.storage_offset() * part.element_size(), part.numel() * part.element_size()
    storage = part.untyped_storage()[start : start + size]
    with torch.no_grad():
        return torch.empty(0, dtype=part.dtype, device=part.device).set_(storage, 0, part.shape, part.stride())
