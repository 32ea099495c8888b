"""Lanes: what an optimizer keeps for parameters of one device and type, in flat buffers of one layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from operator import is_
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from .. import ops
from ..errors import check
from ..kernels.reference import combine, pack_mask, split, unpack_mask
from ..kernels.segments import Plan, Segments, Uploaded, upload
from .guards import alike

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The lanes that `state` shows, in its order, and what a parameter's part is where its entry does not say: zeros, the
# weights, the weights of its first update, or what it was.
SHOWN = {
    "exp_avg": "zeros",
    "exp_avg_sq": "zeros",
    "max_exp_avg_sq": "zeros",
    "momentum_buffer": "zeros",
    "remainder": "zeros",
    "anchor": "first",
    "ema": "weights",
    "fisher": "zeros",
    "mask": "kept",
    "orthogonal": "zeros",
    "index": "kept",
}


@dataclass(frozen=True, eq=False)
class Member:
    """A parameter and what its optimizer calls it.

    Args:
        p: the parameter.
        group: its parameter group.
        position: in that group.
        number: its position over all groups, which makes its random numbers.
    """

    p: Parameter
    group: dict[str, Any]
    position: int
    number: int

    @property
    def name(self) -> str | None:
        """Its name, if the optimizer was given names."""
        names = self.group.get("param_names")
        return names[self.position] if names else None

    def __str__(self) -> str:
        return repr(self.name) if self.name else f"number {self.position} of its group (shape {tuple(self.p.shape)})"


class Numbers:
    """Rows of hyper-parameters on a device, sent again only when a value has changed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sent: tuple = ()
        self._rows = torch.empty(0)

    def rows(self, values: Sequence[Sequence[float | Tensor]]) -> Tensor:
        """`values` as fp64 [rows, columns]. A tensor among them (a learning rate) is copied without a host sync."""
        plain = tuple(tuple(None if isinstance(v, Tensor) else float(v) for v in row) for row in values)
        if plain != self._sent:
            host = torch.tensor([[0.0 if v is None else v for v in row] for row in plain], dtype=torch.float64)
            self._sent, self._rows = plain, upload(host, self._device)
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if isinstance(value, Tensor):
                    self._rows[i, j].copy_(value.detach().squeeze(), non_blocking=True)
        return self._rows


class Lanes:
    """The flat buffers of some parameters, which stay where they are: weights and gradients are read and written there.

    A lane is a buffer with a part for each parameter, in the layout of `plan`; gaps hold zeros. `state[p]` of the
    optimizer shows the parts, and is the truth: `follow` takes over what a user has put in their place.

    Args:
        members: parameters that agree in device, type and whatever else a launch cannot tell apart.

    Attributes:
        members, params: the parameters.
        plan: where each one's part begins.
        lanes: buffers by name [size]; of "mask", int32 words [size / 32].
        steps: fp32 [parameters], how often each was updated.
        perturbed: while some of the parameters are perturbed, how they were left; else None.
        shard_groups: the process groups over which the weights are cut into shards, if any.
    """

    shard_groups: tuple[ProcessGroup, ...] = ()

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self.params = [member.p for member in self.members]
        self._lay_out()
        self.lanes: dict[str, Tensor] = {}
        self.steps = torch.zeros(len(self.params), dtype=torch.float32, device=self.device)
        self.perturbed: Perturbed | None = None
        self.uploaded = Uploaded()
        # Weights that are not dense in memory are worked on in a copy.
        self._staged: dict[int, Tensor] = {}
        self._addresses: list[int] = []
        # Whether two parameters share memory: one launch may not write both.
        self.overlapping = False
        self._flags: tuple[list[bool], Tensor] | None = None
        self._grads_alike = None
        self._views: dict[str, list[Tensor]] = {}
        # What `state` shows of each parameter: its entry, and what we have put there; and the latter in one list.
        self._entries: list[dict[str, Any] | None] = [None] * len(self.params)
        self._published: list[dict[str, Tensor]] = [{} for _ in self.params]
        self._all_published: list[Tensor] | None = None
        self.groups = list({id(member.group): member.group for member in self.members}.values())
        self._numbers: dict[str, Numbers] = {}
        self._constants: dict[str, Tensor] = {}
        # Whose part of "anchor" has been set.
        self._anchored = [False] * len(self.params)

    def _lay_out(self) -> None:
        memory = self.memory()
        self.device, self.dtype = memory[0].device, memory[0].dtype
        self.shapes = self.full_shapes = [tensor.shape for tensor in memory]
        self.strides = self.full_strides = [dense_strides(tensor) for tensor in memory]
        self.plan = Plan([shape.numel() for shape in self.shapes], self.device)

    def __len__(self) -> int:
        return len(self.params)

    # -- the user's memory ---------------------------------------------------------------------------------------------

    def memory(self) -> list[Tensor]:
        """The tensors whose memory the parameters are."""
        return self.params

    def versions(self) -> list[int]:
        """How often each parameter was written into, as autograd counts."""
        return [p._version for p in self.params]

    def fits(self) -> bool:
        """Whether every parameter still has the device, type, shape and strides that the lanes were made for."""
        memory = self.memory()
        addresses = list(map(Tensor.data_ptr, memory))
        if addresses == self._addresses:
            return True
        self._staged = {}
        for i, tensor in enumerate(memory):
            if (tensor.device, tensor.dtype, tensor.shape) != (self.device, self.dtype, self.full_shapes[i]):
                return False
            if tensor.numel() and tensor.stride() != self.full_strides[i]:
                if dense_strides(tensor) != self.full_strides[i]:
                    return False
                self._stage(i, tensor)
        self._addresses, self.overlapping = addresses, _overlap(memory)
        return True

    def _stage(self, i: int, tensor: Tensor) -> None:
        self._staged[i] = torch.empty_strided(tensor.shape, self.strides[i], dtype=self.dtype, device=self.device)

    def weights(self) -> list[Tensor]:
        """Where a pass reads and writes the weights; `written` is to follow."""
        memory = self.memory()
        if self._staged:
            memory = [self._staged[i].copy_(t) if i in self._staged else t for i, t in enumerate(memory)]
        return memory

    def gradients(self) -> list[Tensor | None]:
        """Each parameter's gradient as it is at this moment, None where there is none; copied only if it must be.

        Raises:
            RuntimeError: sparse gradient.
        """
        grads = self._grads()
        if self._grads_alike is not None and not any(map(is_, grads, repeat(None))) and self._grads_alike(*grads):
            return grads
        return self._usable(grads)

    def _grads(self) -> list[Tensor | None]:
        return [p.grad for p in self.params]

    def _usable(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        if not self.fits_now():
            raise Moved
        out = [None if grad is None else self._like_weights(i, grad) for i, grad in enumerate(grads)]
        if all(new is grad and grad is not None for new, grad in zip(out, grads, strict=True)):
            self._grads_alike = alike(grads)
        return out

    def fits_now(self) -> bool:
        """`fits`, also where a parameter has changed but its address has not."""
        self._addresses = []
        return self.fits()

    def _like_weights(self, i: int, grad: Tensor) -> Tensor:
        if grad.layout != torch.strided:
            raise RuntimeError(f"sparse gradient of parameter {self.members[i]}: only dense gradients are supported")
        if grad.dtype == self.dtype and grad.stride() == self.strides[i] or not grad.numel():
            return grad
        out = torch.empty_strided(self.shapes[i], self.strides[i], dtype=self.dtype, device=self.device)
        return out.copy_(grad.detach())

    def written(self, active: Sequence[bool]) -> None:
        """Tell everybody that a pass has written the active parameters where `weights` said."""
        for i, staged in self._staged.items():
            if active[i]:
                self.params[i].detach().copy_(staged)
        self._tell([p for p, now in zip(self.params, active, strict=True) if now] if not all(active) else self.params)

    def _tell(self, params: list[Parameter]) -> None:
        torch.autograd.graph.increment_version(params)
        if torch.is_autocast_cache_enabled():
            # Autocast would use the 16-bit copies that it has made of the weights before.
            torch.clear_autocast_cache()

    def rounds(
        self,
        grads: Sequence[Tensor | None],
        *,
        weight: Sequence[Tensor] | None = None,
        clean: Sequence[Tensor] | None = None,
        other: Sequence[Tensor | None] | None = None,
    ) -> Iterator[Segments]:
        """The launches of a pass over the parameters that have one of `grads`: one, if no two share memory."""
        weight = self.weights() if weight is None else weight
        more = {"clean": clean, "other": other, "uploaded": self.uploaded}
        if not self.overlapping:
            yield Segments(self.plan, weight, grads, **more)
            return
        left = [i for i, grad in enumerate(grads) if grad is not None]
        while left:
            now: list[int] = []
            for i in left:
                if not _overlap([weight[j] for j in (*now, i)]):
                    now.append(i)
            left = [i for i in left if i not in now]
            yield Segments(self.plan, weight, [g if i in now else None for i, g in enumerate(grads)], **more)

    def norm_sq(self, grads: Sequence[Tensor | None], adaptive: bool = False, mask: Tensor | None = None) -> Tensor:
        """Sum of squares of `grads`; see `kernels.reference.norm_sq`."""
        # Unless it is adaptive, nothing of the weights is read.
        weight = self.weights() if adaptive else grads
        return ops.norm_sq(Segments(self.plan, weight, grads, uploaded=self.uploaded), adaptive, mask)

    def gap(self, grads: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> Tensor:
        """Dot products of second gradients and `grads`; see `kernels.reference.gap`."""
        return ops.gap(Segments(self.plan, grads, grads, other=other, uploaded=self.uploaded))

    def flags(self, active: Sequence[bool]) -> Tensor:
        """Whether each parameter is active, bool on the device."""
        if self._flags is None or self._flags[0] != active:
            self._flags = list(active), upload(torch.tensor(active), self.device)
        return self._flags[1]

    def exchange(self, name: str) -> list[tuple[int, Tensor]]:
        """Put a lane's parts into the parameters that have been updated.

        Returns:
            Their numbers and copies of their weights, for `put_back`.
        """
        self.fits_now()
        which = [i for i, entry in enumerate(self._entries) if entry is not None]
        before = [(i, self.params[i].detach().clone()) for i in which]
        self.write(name, which)
        return before

    def put_back(self, weights: Sequence[tuple[int, Tensor]]) -> None:
        """The inverse of `exchange`."""
        for i, weight in weights:
            self.params[i].detach().copy_(weight)
        self._tell([self.params[i] for i, _ in weights])

    def like_parameter(self, i: int, part: Tensor) -> Tensor:
        """A tensor like a part of a lane as one like parameter i."""
        return part

    def clean_parameter(self, i: int) -> Tensor:
        """The clean weights of parameter i, which is perturbed, as a tensor like it."""
        p = self.params[i]
        return self.like_parameter(i, self.views("backup")[i]).to(device=p.device, dtype=p.dtype)

    def like_lane(self, i: int, tensor: Tensor) -> Tensor:
        """Of a tensor like parameter i what corresponds to its part of a lane, in the part's shape."""
        return tensor.detach()

    def write(self, name: str, which: Sequence[int]) -> None:
        """Copy a lane's parts into these parameters."""
        memory, views = self.memory(), self.views(name)
        if which:
            with torch.no_grad():
                torch._foreach_copy_([memory[i].detach() for i in which], [views[i] for i in which])
            self._tell([self.params[i] for i in which])

    def clean(self, i: int) -> Tensor:
        """Parameter i's clean weights in the shape of its parts: itself, or its backup."""
        if self.perturbed is not None and self.perturbed.active[i]:
            return self.views("backup")[i]
        return self.like_lane(i, self.memory()[i])

    def exact(self, i: int) -> Tensor:
        """A copy of parameter i's clean weights in the shape of its parts: in fp32 if it has master weights."""
        clean = self.clean(i)
        if "remainder" not in self.lanes:
            return clean.clone()
        return combine(clean, self.views("remainder")[i])

    def set_exact(self, values: Sequence[Tensor]) -> None:
        """The inverse of `exact`, for all parameters."""
        weights = self.weights()
        for i, (weight, value) in enumerate(zip(weights, values, strict=True)):
            if "remainder" in self.lanes:
                split(value, weight.detach(), self.views("remainder")[i])
            else:
                weight.detach().copy_(value)
        self.written([True] * len(self))

    # -- lanes ---------------------------------------------------------------------------------------------------------

    def lane(self, name: str, dtype: torch.dtype) -> Tensor:
        """The buffer of that name, made of zeros when first asked for."""
        if name not in self.lanes:
            size = self.plan.size // 32 if name == "mask" else self.plan.size
            self.lanes[name] = torch.zeros(size, dtype=dtype, device=self.device)
            self._all_published = None
        return self.lanes[name]

    def drop(self, name: str) -> None:
        """Let go of a buffer."""
        if self.lanes.pop(name, None) is not None:
            self._views.pop(name, None)
            for entry, published in zip(self._entries, self._published, strict=True):
                if published.pop(name, None) is not None and entry is not None:
                    entry.pop(name, None)
            self._all_published = None

    def per_parameter(self, name: str, rows: Sequence[Sequence[float | Tensor]]) -> Tensor:
        """Rows of numbers, one for each of `groups`, as fp64 [parameters, columns]."""
        if name not in self._numbers:
            self._numbers[name] = Numbers(self.device)
        sent = self._numbers[name].rows(rows)
        if len(self.groups) == 1:
            return sent.expand(len(self), -1)
        order = {id(group): i for i, group in enumerate(self.groups)}
        return sent[self.constant("group", lambda: [order[id(member.group)] for member in self.members])]

    def constant(self, name: str, values: Callable[[], Sequence[int]]) -> Tensor:
        """Integers of the parameters that never change, int64 [parameters] on the device."""
        if name not in self._constants:
            self._constants[name] = upload(torch.tensor(values(), dtype=torch.int64), self.device)
        return self._constants[name]

    def starts(self) -> list[int]:
        """For each parameter how many of its weights other shards have before this one."""
        return [0] * len(self)

    def views(self, name: str) -> list[Tensor]:
        """Each parameter's part of a lane, in its own shape and strides."""
        if name not in self._views:
            parts = (self.plan.part(self.lanes[name], i) for i in range(len(self)))
            each = zip(parts, self.shapes, self.strides, strict=True)
            self._views[name] = [part.as_strided(shape, strides) for part, shape, strides in each]
        return self._views[name]

    def chosen(self, i: int) -> Tensor:
        """Parameter i's mask, bool in its shape."""
        flat = unpack_mask(self.plan.words(self.lanes["mask"], i), torch.empty(self.shapes[i].numel(), device="meta"))
        return flat.as_strided(self.shapes[i], self.strides[i]).clone()

    # -- state ---------------------------------------------------------------------------------------------------------

    def follow(self, state: Mapping[Parameter, dict[str, Any]]) -> None:
        """Take over what a user has put into the parameters' entries of an optimizer's state, or taken out of them."""
        entries = list(map(state.get, self.params))
        if self._all_published is not None and all(map(is_, entries, self._entries)):
            now = list(chain.from_iterable(map(dict.values, filter(None, entries))))
            if len(now) == len(self._all_published) and all(map(is_, now, self._all_published)):
                return
        names = len(self._names())
        for i, (entry, published) in enumerate(zip(entries, self._published, strict=True)):
            same = entry is not None and entry is self._entries[i] and len(entry) == len(published) == names
            if not (same and all(map(is_, entry.values(), published.values()))):
                self._adopt(i, entry)
        self._all_published = list(chain.from_iterable(entry.values() for entry in self._entries if entry))

    def _names(self) -> list[str]:
        return ["step", *(name for name in SHOWN if name in self.lanes)]

    def _adopt(self, i: int, entry: dict[str, Any] | None) -> None:
        before = self._published[i]
        for name in self._names():
            value = None if entry is None else entry.get(name)
            if value is None:
                # Taken out by somebody; or never there, and zeros do not stand for that.
                if name in before or (entry and not before and SHOWN.get(name) != "zeros"):
                    self.reset(i, name)
            elif value is not before.get(name):
                self.set(i, name, value)
        self._entries[i], self._published[i] = None, {}
        if entry:
            self._publish(i, entry)

    def reset(self, i: int, name: str) -> None:
        """Make parameter i's part of a lane what it is in the beginning, or its count of steps 0."""
        kind = SHOWN.get(name, "zeros")
        if name == "step":
            self.steps[i].zero_()
        elif kind == "zeros":
            self.views(name)[i].zero_()
        elif kind == "weights" or (kind == "first" and not self._anchored[i]):
            self.set(i, name, self.clean(i), like_parameter=False)

    def set(self, i: int, name: str, value: Any, like_parameter: bool = True) -> None:
        """Copy a value into parameter i's part of a lane, or its count of steps.

        Raises:
            ArgumentError: it has another shape.
        """
        if name == "step":
            self.steps[i].copy_(torch.as_tensor(value).reshape(()), non_blocking=True)
            return
        value = self.taken(i, name, value) if like_parameter else value
        target = self.plan.words(self.lanes[name], i) if name == "mask" else self.views(name)[i]
        label = f"state {name!r} of parameter {self.members[i]}"
        check(value.shape == target.shape, label, tuple(value.shape), f"must have shape {tuple(target.shape)}")
        if name == "index":
            same = torch.equal(value.to(target), target)
            check(same, label, "of other weights", "must be of the weights that are trainable")
        target.copy_(value)
        if name == "anchor":
            self._anchored[i] = True

    def has_anchor(self, i: int) -> bool:
        """Whether parameter i's part of "anchor" has been set."""
        return self._anchored[i]

    def begin(self, active: Sequence[bool], state: dict[Parameter, dict[str, Any]]) -> None:
        """Show the state of parameters that are updated for the first time."""
        for i, now in enumerate(active):
            if now and self._entries[i] is None:
                for name in self._names()[1:]:
                    if SHOWN[name] != "zeros":
                        self.reset(i, name)
                self._publish(i, state.setdefault(self.params[i], {}))
                self._all_published = None

    def show(self, state: dict[Parameter, dict[str, Any]]) -> None:
        """Show the state of all parameters: a mask is chosen also of those that were never updated."""
        self.begin([True] * len(self), state)
        self.follow(state)

    def check_shape(self, i: int, name: str, value: Tensor) -> None:
        """Raise an ArgumentError if a value does not fit parameter i's part of a lane."""
        shapes = self._shapes_of(i, name)
        label = f"state {name!r} of parameter {self.members[i]}"
        check(value.shape in shapes, label, tuple(value.shape), f"must have shape {tuple(shapes[0])}")

    def _shapes_of(self, i: int, name: str) -> list[torch.Size]:
        if name == "mask":
            return [torch.Size([-(-self.shapes[i].numel() // 32)]), self.shapes[i]]
        return [self.shapes[i]]

    def _publish(self, i: int, entry: dict[str, Any]) -> None:
        own = {name: self.steps[i] if name == "step" else self.shown(name, i) for name in self._names()}
        entry.update(own)
        self._entries[i], self._published[i] = entry, own

    def shown(self, name: str, i: int) -> Tensor:
        """Parameter i's part of a lane as `state` shows it: with a storage of its own extent.

        A view would make `torch.save` write the whole lane, and safetensors refuse tensors that share memory.
        """
        part = self.plan.words(self.lanes[name], i) if name == "mask" else self.views(name)[i]
        start, size = part.storage_offset() * part.element_size(), part.numel() * part.element_size()
        storage = part.untyped_storage()[start : start + size]
        with torch.no_grad():
            out = torch.empty(0, dtype=part.dtype, device=part.device)
            return out.set_(storage, 0, part.shape, part.stride())

    def taken(self, i: int, name: str, value: Tensor) -> Tensor:
        """A value that `shown`, or somebody else, has made as the lane has it."""
        if name == "mask" and value.dtype == torch.bool:
            flat = torch.zeros(self.shapes[i].numel(), dtype=torch.bool, device=value.device)
            flat.as_strided(self.shapes[i], self.strides[i]).copy_(value)
            return pack_mask(flat)
        return value


class Moved(Exception):
    """A parameter is no longer what its lanes were made for."""


class Perturbed:
    """How a pass has left perturbed parameters; their clean weights are in the lane "backup".

    What somebody writes into a parameter meanwhile (by loading a checkpoint, say) is taken for clean weights.

    Args:
        lanes: of the parameters.
        active: which are perturbed.
    """

    def __init__(self, lanes: Lanes, active: Sequence[bool]) -> None:
        self.lanes, self.active = lanes, list(active)
        self.overlapping = lanes.overlapping
        memory = lanes.memory()
        self._addresses = list(map(Tensor.data_ptr, memory))
        # They keep the perturbed weights, to compare with, should `p.data` be replaced.
        self._storages = list(map(Tensor.untyped_storage, memory))
        self._versions = lanes.versions()

    def which(self) -> list[int]:
        """The parameters that are perturbed."""
        return [i for i, active in enumerate(self.active) if active]

    def is_clean(self, i: int) -> bool:
        """Whether somebody has written clean weights into parameter i."""
        return not self.active[i] or self.lanes.versions()[i] != self._versions[i]

    def settle(self) -> None:
        """Make the backup of what somebody has written meanwhile."""
        lanes, memory = self.lanes, self.lanes.memory()
        if lanes.versions() == self._versions and list(map(Tensor.data_ptr, memory)) == self._addresses:
            return
        versions = lanes.versions()
        for i in self.which():
            now, backup = memory[i], lanes.views("backup")[i]
            moved = now.data_ptr() != self._addresses[i] or now.dtype != lanes.dtype
            if now.shape != lanes.full_shapes[i]:
                raise RuntimeError(f"parameter {lanes.members[i]} was given another shape while it was perturbed")
            if versions[i] != self._versions[i]:
                backup.copy_(lanes.like_lane(i, now))
            elif moved and now.dtype == lanes.dtype and now.device == lanes.device:
                # In other memory, as by `p.data = ...`: what differs from the perturbed weights is theirs.
                left = lanes.like_lane(i, self._left(i, now))
                theirs = lanes.like_lane(i, now)
                backup.copy_(torch.where(theirs == left, backup, theirs))
        self._versions = versions

    def _left(self, i: int, now: Tensor) -> Tensor:
        start = (self._addresses[i] - self._storages[i].data_ptr()) // now.element_size()
        out = torch.empty(0, dtype=self.lanes.dtype, device=self.lanes.device)
        return out.set_(self._storages[i], start, now.shape, self.lanes.full_strides[i])

    def restore(self) -> None:
        """Put back the clean weights, to the bit."""
        self.settle()
        if self.overlapping:
            # The last one's backup has the first one's perturbation.
            for i in reversed(self.which()):
                self.lanes.write("backup", [i])
        else:
            self.lanes.write("backup", self.which())
        self.lanes.perturbed = None


def _overlap(tensors: Sequence[Tensor]) -> bool:
    """Whether any two share memory."""
    starts = np.array(list(map(Tensor.data_ptr, tensors)), np.int64)
    sizes = np.array([tensor.numel() * tensor.element_size() for tensor in tensors], np.int64)
    order = starts[sizes > 0].argsort()
    starts, ends = starts[sizes > 0][order], (starts + sizes)[sizes > 0][order]
    return bool((starts[1:] < ends[:-1]).any())


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    return torch.empty_like(tensor, device="meta").stride()
