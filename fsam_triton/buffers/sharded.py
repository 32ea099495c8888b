"""Parameters sharded by FSDP2: lanes of the local shards, and sums over all shards."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from ..errors import check
from ..kernels import spec
from ..kernels.reference import unpack_mask
from .entries import State
from .lanes import Lanes
from .layout import SCALES, shape_of_scales
from .members import Member

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Shard
    from typing_extensions import TypeIs

    class Gatherer(FSDPModule, Module):
        """A module that `fully_shard` was called with."""


def is_sharded(tensor: Tensor) -> TypeIs[DTensor]:
    """Whether it is a DTensor."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, the same memory; any other tensor as it is."""
    # Not to_local(), which makes a new view of a parameter's each time.
    return tensor._local_tensor if is_sharded(tensor) else tensor


def shard_dims(p: DTensor) -> tuple[int, ...]:
    """The dimensions of its mesh over which a DTensor is cut into shards, by whatever placement."""
    return tuple(i for i, placement in enumerate(p.placements) if not placement.is_replicate())


def shard_groups(p: DTensor) -> tuple[ProcessGroup, ...]:
    """The process groups over which a DTensor is cut into shards, in the order of its mesh's dimensions."""
    return tuple(p.device_mesh.get_group(dim) for dim in shard_dims(p))


def check_placements(label: str, p: DTensor) -> None:
    """Refuse a parameter of which ranks have summands instead of shards."""
    is_partial = any(placement.is_partial() for placement in p.placements)
    check(not is_partial, f"placements of {label}", p.placements, "must be replicated or sharded")


def check_shards_of_codes(label: str, p: DTensor) -> None:
    """Refuse a parameter whose shards do not have whole groups of elements that share a scale."""
    for i in shard_dims(p):
        dim = getattr(p.placements[i], "dim", None)
        whole = dim == 0 or (dim == 1 and p.dim() == 2 and p.shape[1] % (spec.GROUP * p.device_mesh.size(i)) == 0)
        allowed = f'must be Shard(0), or of whole groups of {spec.GROUP} columns, with state_format="8bit"'
        check(whole, f"placements of {label}", p.placements, allowed)


class ShardedLanes(Lanes):
    """Lanes of the local shards of DTensors, which stay where FSDP2 reads them, and so do gradients.

    The parameters agree in their shard groups; their meshes may have other dimensions, over which they are replicated.

    Parts have the local shards' shapes, which may be empty; what others see of them are DTensors like the parameters.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        # The parameters, by the type that they have here.
        self.placed: list[DTensor] = cast("list[DTensor]", [member.p for member in members])
        for member, p in zip(members, self.placed, strict=True):
            check_placements(f"parameter {member}", p)
        super().__init__(members)
        first = self.placed[0]
        mesh, dims = first.device_mesh, shard_dims(first)
        self.shard_groups: tuple[ProcessGroup, ...] = shard_groups(first)
        self.shards: int = math.prod(mesh.size(dim) for dim in dims)
        self.shard_index: int = 0
        for dim in dims:
            self.shard_index = self.shard_index * mesh.size(dim) + mesh.get_local_rank(dim)
        owners = owners_of(self.params)
        self._owners = [weakref.ref(owner) for owner in dict.fromkeys(owners.values())]

    def starts(self) -> list[int]:
        """For each parameter how many of its weights, in the order of memory, the shards before this one have."""
        if len(self.shard_groups) == 1:
            return list(map(_start, self.placed))
        # Cut over two dimensions of the mesh, shards are given numbers that no other shard has.
        return [self.shard_index * p.numel() for p in self.params]

    def memory(self) -> Sequence[Tensor]:
        # As `local`, which would ask each one what it is.
        return [p._local_tensor for p in self.placed]

    def versions(self) -> list[int]:
        # In-place operations count on the DTensor or on its shard, according to which of them they were called on.
        return [p._version + shard._version for p, shard in zip(self.params, self.memory(), strict=True)]

    def rewind(self, versions: Sequence[int]) -> None:
        """Autograd has saved what FSDP2 gathers, which it gathers again."""

    def _grads(self) -> list[Tensor | None]:
        return [None if (grad := p.grad) is None else self._as_placed(i, grad) for i, p in enumerate(self.params)]

    def _tell(self, params: Sequence[Parameter]) -> None:
        super()._tell(params)
        # A forward pass that no backward pass followed (an evaluation) leaves the gathered weights of before.
        for owner in self._owners:
            if (module := owner()) is not None:
                module.reshard()

    def like_lane(self, i: int, tensor: Tensor) -> Tensor:
        if not is_sharded(tensor) and tensor.shape == self.shapes[i]:
            return tensor.detach()
        return self._shard_of(i, tensor)

    def _shapes_of(self, i: int, name: str) -> list[torch.Size]:
        p = self.params[i]
        if name in SCALES:
            return [shape_of_scales(p.shape)]
        return [p.shape, torch.Size([-(-p.numel() // 32)])] if name == "mask" else [p.shape]

    def address(self, shown: Tensor) -> int:
        return local(shown).data_ptr()

    def addresses(self, shown: Sequence[Tensor]) -> list[int]:
        # To ask that of DTensors takes longer than a step: what replaces one is followed, but not what moves it.
        return []

    def show(self, state: State) -> None:
        super().show(state)
        if "mask" in self.lanes:
            # What `state` shows of it are copies.
            for i, shown in enumerate(self.entries.published("mask")):
                local(shown).copy_(super().chosen(i))

    def shown(self, name: str, i: int) -> Tensor:
        if name == "mask":
            return self.chosen(i)
        part = super().shown(name, i)
        if name in SCALES:
            return self.like_parameter(i, part, shape_of_scales(self.params[i].shape))
        # Collectives, and so checkpoints that gather, know no int16: the same bits as a type that they know.
        return self.like_parameter(i, part.view(torch.bfloat16) if part.dtype == torch.int16 else part)

    def chosen(self, i: int) -> Tensor:
        return self.like_parameter(i, super().chosen(i))

    def _decoded(self, i: int, codes: Tensor, scale: Tensor) -> Tensor:
        return super()._decoded(i, self._shard_of(i, codes), self._shard_of(i, scale))

    def taken(self, i: int, name: str, value: Tensor) -> Tensor:
        if name == "mask" and value.dtype != torch.bool:
            p = self.params[i]
            value = unpack_mask(value, torch.empty(p.numel(), device="meta")).view(p.shape)
        return super().taken(i, name, self._shard_of(i, value))

    def like_parameter(self, i: int, part: Tensor, shape: torch.Size | None = None) -> DTensor:
        """A shard as a part of a DTensor placed like parameter i, of its shape or, of two dimensions, of another."""
        from torch.distributed.tensor import DTensor

        p = self.placed[i]
        shape, stride = (p.shape, p.stride()) if shape is None else (shape, (shape[1], 1))
        return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)

    def _as_placed(self, i: int, source: Tensor) -> Tensor:
        """This rank's part of a DTensor like parameter i, or another tensor; tensor parallelism leaves partial ones."""
        p = self.placed[i]
        if is_sharded(source) and source.placements != p.placements:
            source = cast("DTensor", source.detach()).redistribute(p.device_mesh, p.placements)
        return local(source)

    def _shard_of(self, i: int, source: Tensor) -> Tensor:
        """This rank's part of a tensor like parameter i, which need not be sharded."""
        from torch.distributed.tensor import distribute_tensor

        if is_sharded(source):
            return self._as_placed(i, source)
        p = self.placed[i]
        source = source.detach().to(p.device)
        return local(distribute_tensor(source, p.device_mesh, p.placements, src_data_rank=None))


def _start(p: DTensor) -> int:
    (dim,) = shard_dims(p)
    # As torch.chunk cuts it: all shards but the last ones have the first one's length.
    length, shards = p.shape[cast("Shard", p.placements[dim]).dim], p.device_mesh.size(dim)
    before = min(length, -(-length // shards) * p.device_mesh.get_local_rank(dim))
    return before * (p.numel() // max(length, 1))


def owners_of(params: Iterable[Tensor]) -> dict[Tensor, Gatherer]:
    """The FSDP2 module that gathers each of these DTensors: the innermost one that has it.

    An optimizer is given parameters, not modules; the garbage collector knows the modules too.
    """
    params = set(params)
    if not params:
        return {}
    from torch.distributed.fsdp import FSDPModule

    modules: list[Gatherer] = [m for m in gc.get_objects() if issubclass(type(m), FSDPModule)]
    found = _owners_among(modules, params)
    if len(found) < len(params):
        # A module that has gathered its parameters has others in their place.
        for module in modules:
            module.reshard()
        found = _owners_among(modules, params)
    return found


def _owners_among(modules: Sequence[Gatherer], params: set[Tensor]) -> dict[Tensor, Gatherer]:
    own = {m: list(m.parameters()) for m in modules}
    outermost_first = sorted(modules, key=lambda m: -len(own[m]))
    return {p: m for m in outermost_first for p in own[m] if p in params}


class OtherParts:
    """The processes that have other parts of the model, as the stages of a pipeline do.

    Args:
        group: whose sums are over all parts; None: this process has the whole model, or shards of all of it.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group

    def sum(self, total: Tensor) -> Tensor:
        """The sum of what every part has, fp64."""
        total = total.double()
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        return total

    def __deepcopy__(self, memo: dict[int, Any]) -> OtherParts:
        # A process group is this process's own, and cannot be copied.
        return self


def sum_over_shards(parts: Iterable[tuple[Lanes | None, Tensor]], home: torch.device) -> Tensor:
    """Sum of tensors over lanes and, where their weights are shards of several, over these; the same on all ranks.

    The tensors may be written.
    """
    sums: dict[tuple[ProcessGroup, ...], Tensor] = {}

    def add(groups: tuple[ProcessGroup, ...], part: Tensor) -> None:
        sums[groups] = sums[groups] + part if groups in sums else part

    for lanes, part in parts:
        add(lanes.shard_groups if lanes is not None else (), part.to(home, non_blocking=True))
    # What is summed over one dimension of a mesh goes along with what is summed over the other alone.
    while groups := max(sums, key=len, default=()):
        total = sums.pop(groups)
        dist.all_reduce(total, group=groups[-1])
        add(groups[:-1], total)
    return sums[()] if sums else torch.zeros((), dtype=torch.int64, device=home)


def of_all_shards(lanes: Lanes, counts: Tensor) -> Tensor:
    """The counts, int64 [n], of all shards in order, [shards, n]; of lanes that are whole, [1, n]."""
    if not lanes.shard_groups:
        return counts[None]
    out = counts.new_zeros(lanes.shards, len(counts))
    out[lanes.shard_index] = counts
    for group in lanes.shard_groups:
        dist.all_reduce(out, group=group)
    return out
