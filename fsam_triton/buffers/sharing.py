"""Which tensors share memory."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor


def sharing(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """The tensors whose memory an earlier one reaches into, with the first such one: pairs of numbers, ascending."""
    start = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))
    stop = start + np.fromiter(map(_extent, tensors), np.int64, len(tensors))
    order = np.lexsort((stop, start))
    order = order[stop[order] > start[order]]
    reached = np.maximum.accumulate(stop[order])
    meets = np.zeros(len(order), bool)
    meets[1:] = start[order[1:]] < reached[:-1]
    if not meets.any():
        return []
    meets[:-1] |= meets[1:]
    some, out = np.sort(order[meets]), []
    for i in some:
        earlier = some[some < i]
        if len(shared := earlier[(start[earlier] < stop[i]) & (start[i] < stop[earlier])]):
            out.append((int(i), int(shared[0])))
    return out


def _extent(tensor: Tensor) -> int:
    """How many bytes lie from a tensor's first element to its last."""
    if tensor.is_contiguous() or not tensor.numel():
        return tensor.numel() * tensor.element_size()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
