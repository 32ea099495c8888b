"""How the selected elements of many tensors are cut into jobs, each of one program or thread."""

import functools

import numpy as np


@functools.lru_cache(maxsize=64)
def jobs_of(offsets: tuple[int, ...], counts: tuple[int, ...], block: int) -> np.ndarray:
    """Parts of at most `block` elements, int64 [n, 3]: a tensor's number, the first element and the last + 1."""
    rows = [
        (i, first, min(first + block, offset + count))
        for i, (offset, count) in enumerate(zip(offsets, counts, strict=True))
        for first in range(offset, offset + count, block)
    ]
    return np.array(rows, np.int64).reshape(-1, 3)
