"""The way of selected weights and gradients into compact buffers and back, one launch for all tensors."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .blocks import WARPS
from .jobs import jobs_of

# One element a thread: there are no neighbours that one access could take together.
BLOCK = 256


@triton.jit
def sparse_kernel(addresses_ptr, jobs_ptr, index_ptr, compact_ptr, SCATTER: tl.constexpr, BLOCK: tl.constexpr):
    """compact[j] <- tensor_i[index[j]], or the other way if SCATTER, for the elements j of a job, all of one tensor i.

    Args:
        addresses_ptr: int64 [tensors], where each begins; their type is that of `compact`.
        jobs_ptr: int64 [programs, 3]: a tensor, the first element and the last + 1; at most BLOCK elements.
        index_ptr: int32 or int64 [n], positions in the tensors; in each of them no two alike.
        compact_ptr: any float type [n].

    Bytes per element: index 4, compact 4 (fp32), and one sector of the tensor, which SCATTER reads and writes.
    """
    job = jobs_ptr + tl.program_id(0) * 3
    tensor = tl.load(addresses_ptr + tl.load(job)).to(tl.pointer_type(compact_ptr.dtype.element_ty))
    j = tl.load(job + 1) + tl.arange(0, BLOCK)
    inside = j < tl.load(job + 2)
    place = tensor + tl.load(index_ptr + j, mask=inside, other=0).to(tl.int64)
    if SCATTER:
        tl.store(place, tl.load(compact_ptr + j, mask=inside), mask=inside)
    else:
        tl.store(compact_ptr + j, tl.load(place, mask=inside), mask=inside)


def _launch(tensors, index, compact, offsets, counts, scatter: bool) -> None:
    jobs = jobs_of(tuple(offsets), tuple(counts), BLOCK, compact.device)
    if not len(jobs):
        return
    addresses = torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)
    if compact.is_cuda:
        addresses = addresses.pin_memory().to(compact.device, non_blocking=True)
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    sparse_kernel[(len(jobs),)](addresses, jobs, index, compact, SCATTER=scatter, BLOCK=BLOCK, **options)


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
