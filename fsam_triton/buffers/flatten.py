"""Moving parameters into one buffer, for who wants a single collective or copy of all of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import Parameter

from ..kernels.segments import Plan


@torch.no_grad()
def flatten(params: Iterable[Parameter]) -> None:
    """Make parameters views of one buffer for each device and type, in their own shapes and strides.

    Each has a storage of its own extent: a plain view would make `torch.save` write the whole buffer, and safetensors
    refuse tensors that share memory. Passes do not know of it; a parameter that is moved away later is followed. One
    that shares its memory, with another process or with other tensors, stays where it is.
    """
    kinds: dict[tuple, list[Parameter]] = {}
    for p in params:
        if not _is_shared(p):
            kinds.setdefault((p.device, p.dtype), []).append(p)
    for (device, dtype), own in kinds.items():
        plan = Plan([p.numel() for p in own], device)
        buffer = torch.zeros(plan.size, dtype=dtype, device=device).untyped_storage()
        for p, offset in zip(own, plan.offsets, strict=True):
            storage = buffer[offset * dtype.itemsize : (offset + p.numel()) * dtype.itemsize]
            strides = torch.empty_like(p, device="meta").stride()
            view = torch.empty(0, dtype=dtype, device=device).set_(storage, 0, p.shape, strides)
            p.data = view.copy_(p)


def _is_shared(p: Parameter) -> bool:
    """Whether its memory is a part of somebody else's, or another process or tensor has it too."""
    storage = p.untyped_storage()
    if storage.nbytes() != p.numel() * p.element_size() or (p.device.type == "cpu" and p.is_shared()):
        return True
    # One of NumPy's memory or of a file cannot be resized.
    if not storage.resizable():
        return True
    # The parameter's and `storage`.
    return torch._C._storage_Use_Count(storage._cdata) > 2
