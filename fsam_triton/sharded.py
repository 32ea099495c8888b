"""Parameters sharded by FSDP2: `ShardedBucket` works on the local shard in place; sums go over all shards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from .buffers import Bucket, Gradients, flat_alias
from .errors import check
from .kernels.reference import unpack_mask

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, the same memory; any other tensor as it is."""
    with torch.no_grad():
        return tensor.to_local() if is_sharded(tensor) else tensor


def check_placements(label: str, p: DTensor) -> None:
    """Refuse what is not whole, or sharded by one dimension of its mesh, on each rank."""
    from torch.distributed.tensor import Replicate, Shard

    fits = all(type(placement) in (Shard, Replicate) for placement in p.placements)
    fits = fits and sum(placement.is_shard() for placement in p.placements) <= 1
    check(fits, f"placements of parameter {label}", p.placements, "must be Replicate, or Shard in one mesh dimension")


class ShardedBucket(Bucket):
    """The local shard of one parameter, a DTensor; it stays where FSDP2 reads it, and so do gradients.

    Buffers have the local shard's shape, which may be empty; what others see of them are DTensors like the parameter.

    Args:
        p: the parameter.
        group: its parameter group.
        selectable: whether a `FisherMask` chooses among its weights.
        owner: the FSDP2 module that gathers the parameter, if there is one.
    """

    def __init__(self, p: DTensor, group: dict, *, selectable: bool, owner: Module | None) -> None:
        shard = local(p)
        self._lay_out([p], group, selectable, [shard.shape], [shard.stride()], align=1)
        self.size = shard.numel()
        self.weight = flat_alias(shard)
        self._owner = (lambda: None) if owner is None else weakref.ref(owner)
        mesh, dims = p.device_mesh, [dim for dim, placement in enumerate(p.placements) if placement.is_shard()]
        if dims:
            self.shard_group, self.shards = mesh.get_group(dims[0]), mesh.size(dims[0])
            self.shard_index = mesh.get_local_rank(dims[0])
            # As torch.chunk cuts it: all shards but the last ones have the first one's length.
            length = p.shape[p.placements[dims[0]].dim]
            before = min(length, -(-length // self.shards) * self.shard_index)
            self.shard_start = before * (p.numel() // max(length, 1))
        self._pointers = [tensor.data_ptr() for tensor in self.memory()]
        self.remember_versions()

    def memory(self) -> list[Tensor]:
        return [local(p) for p in self.params]

    def versions(self) -> list[int]:
        # In-place operations count on the DTensor or on its shard, according to which of them they were called on.
        return [p._version + local(p)._version for p in self.params]

    def was_written(self, i: int) -> bool:
        return self.versions() != self._versions

    def collect(self) -> tuple[bool, ...]:
        self._check_parameters()
        grad = self.params[0].grad
        if grad is not None:
            # FSDP2 has made it for us: no copy.
            self._grads = Gradients(self, flat_alias(local(grad)))
        elif self._grads is not None:
            self._grads.zero(0)
        self.adopt_changed_weights()
        return (grad is not None,)

    def drop_grads(self, keep_views: bool) -> None:
        self.params[0].grad = self._grads = None

    def written(self) -> None:
        super().written()
        # A forward pass that no backward pass followed (an evaluation) leaves the gathered weights of before.
        if (owner := self._owner()) is not None:
            owner.reshard()

    def runs(self, active: tuple[bool, ...]) -> list[tuple[int, int, int, bool]]:
        # An empty shard too, so that all shards have the same state.
        return [(0, self.size, 0, active[0])]

    def read(self, source: Tensor, i: int, target: Tensor) -> None:
        if source is not self.params[i] or target is not self.weight:
            super().read(self._shard_of(source), i, target)

    def clean_view(self, i: int) -> Tensor | None:
        clean = super().clean_view(i)
        return None if clean is None else self._like_parameter(clean)

    def shown(self, name: str, i: int) -> Tensor:
        return self.chosen(i) if name == "mask" else self._like_parameter(self.lane_view(name, i))

    def chosen(self, i: int) -> Tensor:
        return self._like_parameter(super().chosen(i))

    def taken(self, i: int, entry: Mapping[str, Any]) -> dict[str, Any]:
        out = dict(entry)
        for name, value in entry.items():
            if name == "mask" and value.dtype != torch.bool:
                p = self.params[i]
                value = unpack_mask(value, torch.empty(p.numel(), device="meta")).view(p.shape)
            if name != "step":
                out[name] = self._shard_of(value)
        return super().taken(i, out)

    def _like_parameter(self, shard: Tensor) -> DTensor:
        from torch.distributed.tensor import DTensor

        p = self.params[0]
        return DTensor.from_local(shard, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())

    def _shard_of(self, source: Tensor) -> Tensor:
        """This rank's part of a tensor like the parameter, which need not be sharded."""
        from torch.distributed.tensor import distribute_tensor

        if is_sharded(source):
            return local(source)
        p = self.params[0]
        source = source.detach().to(p.device)
        return local(distribute_tensor(source, p.device_mesh, p.placements, src_data_rank=None))


def owners_of(params: Iterable[Parameter]) -> dict[Parameter, Module]:
    """The FSDP2 module that gathers each parameter: the innermost one that has it.

    An optimizer is given parameters, not modules; the garbage collector knows the modules too.
    """
    params = set(params)
    if not params:
        return {}
    from torch.distributed.fsdp import FSDPModule

    modules = [m for m in gc.get_objects() if issubclass(type(m), FSDPModule)]
    own = {m: list(m.parameters()) for m in modules}
    outermost_first = sorted(modules, key=lambda m: -len(own[m]))
    return {p: m for m in outermost_first for p in own[m] if p in params}


def sum_over_shards(parts: Iterable[tuple[Bucket, Tensor]], home: torch.device) -> Tensor:
    """Sum of tensors over buckets and, where a bucket is one shard of several, over these; the same on all ranks."""
    sums: dict[Any, Tensor] = {}
    for bucket, part in parts:
        group, part = bucket.shard_group, part.to(home, non_blocking=True)
        sums[group] = sums[group] + part if group in sums else part.clone()
    for group, total in sums.items():
        if group is not None:
            dist.all_reduce(total, group=group)
    return sum(sums.values(), torch.zeros((), dtype=torch.int64, device=home))


def of_all_shards(buckets: Sequence[Bucket], counts: Sequence[Tensor]) -> list[Tensor]:
    """For each bucket the counts, int64 [n], of all its shards in order, [shards, n]; one exchange for all buckets."""
    out = []
    for bucket, count in zip(buckets, counts, strict=True):
        out.append(count.new_zeros(bucket.shards, len(count)))
        out[-1][bucket.shard_index] = count
    # In the same order on all ranks.
    for group in dict.fromkeys(bucket.shard_group for bucket in buckets if bucket.shard_group is not None):
        here = [i for i, bucket in enumerate(buckets) if bucket.shard_group is group]
        flat = torch.cat([out[i].view(-1) for i in here])
        dist.all_reduce(flat, group=group)
        for i, part in zip(here, flat.split([out[i].numel() for i in here]), strict=True):
            out[i] = part.view(out[i].shape)
    return out
