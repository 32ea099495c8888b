"""The way of selected weights and gradients into compact buffers and back, one launch for all tensors."""

import functools
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from .blocks import LANES, WARPS
from .jobs import jobs_of
from .segments import Uploaded

# One element a thread: there are no neighbours that one access could take together.
BLOCK = LANES


@triton.jit(do_not_specialize=["anchor_ptr"])
def sparse_kernel(anchor_ptr, places_ptr, jobs_ptr, index_ptr, compact_ptr, SCATTER: tl.constexpr, BLOCK: tl.constexpr):
    """compact[j] <- tensor_i[index[j]], or the other way if SCATTER, for the elements j of a job, all of one tensor i.

    Args:
        anchor_ptr: the first tensor, of the type of `compact`; the others may lie anywhere.
        places_ptr: int64 [tensors], elements from there to each of them.
        jobs_ptr: int64 [programs, 3]: a tensor, the first element and the last + 1; at most BLOCK elements.
        index_ptr: int32 or int64 [n], positions in the tensors; in each of them no two alike.
        compact_ptr: any float type [n].

    Bytes per element: index 4, compact 4 (fp32), and one sector of the tensor, which SCATTER reads and writes.
    """
    job = jobs_ptr + tl.program_id(0).to(tl.int64) * 3
    tensor_ptr = anchor_ptr + tl.load(places_ptr + tl.load(job))
    j = tl.load(job + 1) + tl.arange(0, BLOCK)
    inside = j < tl.load(job + 2)
    place = tensor_ptr + tl.load(index_ptr + j, mask=inside, other=0).to(tl.int64)
    if SCATTER:
        tl.store(place, tl.load(compact_ptr + j, mask=inside), mask=inside)
    else:
        tl.store(compact_ptr + j, tl.load(place, mask=inside), mask=inside)


@functools.lru_cache(maxsize=64)
def _tables(device: torch.device, offsets: tuple[int, ...], counts: tuple[int, ...], scatter: bool) -> list[Uploaded]:
    """Places and jobs of calls with these arguments, on the device."""
    return [Uploaded(), Uploaded()]


def _launch(tensors, index, compact, offsets, counts, scatter: bool) -> None:
    offsets, counts, device = tuple(offsets), tuple(counts), compact.device
    jobs = jobs_of(offsets, counts, BLOCK)
    if not len(jobs):
        return
    addresses = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
    places = (addresses - addresses[0]) // compact.element_size()
    places, sent_jobs = (
        uploaded.table(table, device)
        for uploaded, table in zip(_tables(device, offsets, counts, scatter), (places, jobs), strict=True)
    )
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    sparse_kernel[(len(jobs),)](tensors[0], places, sent_jobs, index, compact, SCATTER=scatter, BLOCK=BLOCK, **options)


def gather_(
    out: torch.Tensor,
    sources: Sequence[torch.Tensor],
    index: torch.Tensor,
    offsets: Sequence[int],
    counts: Sequence[int],
) -> None:
    """Launch `sparse_kernel`; arguments as `reference.gather_`."""
    _launch(sources, index, out, offsets, counts, scatter=False)


def scatter_(
    targets: Sequence[torch.Tensor],
    index: torch.Tensor,
    source: torch.Tensor,
    offsets: Sequence[int],
    counts: Sequence[int],
) -> None:
    """Launch `sparse_kernel`; arguments as `reference.scatter_`."""
    _launch(targets, index, source, offsets, counts, scatter=True)
