"""How the selected elements of many tensors are cut into jobs, each of one program or thread."""

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=64)
def jobs_of(offsets: tuple[int, ...], counts: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """Parts of at most `block` elements, int64 [n, 3]: a tensor's number, the first element and the last + 1."""
    rows = [
        (i, first, min(first + block, offset + count))
        for i, (offset, count) in enumerate(zip(offsets, counts, strict=True))
        for first in range(offset, offset + count, block)
    ]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3).to(device)
