"""The way of selected weights and gradients into compact buffers and back on a CPU, in C++.

PyTorch has no operator over tensors that lie anywhere, and in a call for each of them few memory accesses are under way
at a time.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .cpp import library

# Elements a thread takes at a time.
_BLOCK = 2048

_SOURCE = r"""
#include <cstdint>

// Elements ahead that are fetched from memory while the present one is moved.
constexpr int64_t AHEAD = 128;

template <typename T, typename Index, bool SCATTER>
void move(const int64_t* addresses, const int64_t* jobs, int64_t n, const Index* index, T* compact, int threads) {
  #pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t k = 0; k < n; k++) {
    T* own = reinterpret_cast<T*>(addresses[jobs[3 * k]]);
    int64_t stop = jobs[3 * k + 2];
    for (int64_t j = jobs[3 * k + 1]; j < stop; j++) {
      if (j + AHEAD < stop) __builtin_prefetch(own + index[j + AHEAD], SCATTER);
      if (SCATTER) own[index[j]] = compact[j];
      else compact[j] = own[index[j]];
    }
  }
}

#define EXPORT(NAME, T, Index, SCATTER)                                                                     \
  extern "C" void NAME(int64_t addresses, int64_t jobs, int64_t n, int64_t index, int64_t compact, int threads) { \
    move<T, Index, SCATTER>(reinterpret_cast<const int64_t*>(addresses), reinterpret_cast<const int64_t*>(jobs), n, \
                            reinterpret_cast<const Index*>(index), reinterpret_cast<T*>(compact), threads); \
  }
#define EXPORTS(BYTES)                                              \
  EXPORT(gather_##BYTES##_4, int##BYTES##_t, int32_t, false)        \
  EXPORT(gather_##BYTES##_8, int##BYTES##_t, int64_t, false)        \
  EXPORT(scatter_##BYTES##_4, int##BYTES##_t, int32_t, true)        \
  EXPORT(scatter_##BYTES##_8, int##BYTES##_t, int64_t, true)
EXPORTS(16)
EXPORTS(32)
EXPORTS(64)
"""


@functools.lru_cache(maxsize=64)
def jobs_of(offsets: tuple[int, ...], counts: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """Parts of at most `block` elements, int64 [n, 3]: a tensor's number, the first element and the last + 1."""
    rows = [
        (i, first, min(first + block, offset + count))
        for i, (offset, count) in enumerate(zip(offsets, counts, strict=True))
        for first in range(offset, offset + count, block)
    ]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3).to(device)


def _move(kind: str, tensors: Sequence[Tensor], index: Tensor, compact: Tensor, offsets, counts) -> None:
    move = getattr(library(_SOURCE), f"{kind}_{8 * compact.element_size()}_{index.element_size()}")
    jobs = jobs_of(tuple(offsets), tuple(counts), _BLOCK, compact.device)
    addresses = (ctypes.c_int64 * len(tensors))(*[tensor.data_ptr() for tensor in tensors])
    pointers = (ctypes.addressof(addresses), jobs.data_ptr(), len(jobs), index.data_ptr(), compact.data_ptr())
    move(*map(ctypes.c_int64, pointers), torch.get_num_threads())


def gather_(
    out: Tensor, sources: Sequence[Tensor], index: Tensor, offsets: Sequence[int], counts: Sequence[int]
) -> None:
    """The same as `reference.gather_`."""
    _move("gather", sources, index, out, offsets, counts)


def scatter_(
    targets: Sequence[Tensor], index: Tensor, source: Tensor, offsets: Sequence[int], counts: Sequence[int]
) -> None:
    """The same as `reference.scatter_`."""
    _move("scatter", targets, index, source, offsets, counts)
