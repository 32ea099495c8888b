"""Lanes: what an optimizer keeps for parameters of one device and type, in flat buffers of one layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from operator import is_
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import check
from ..kernels import spec
from ..kernels.formats import combine, replace, split
from ..kernels.segments import Segments, Uploaded, upload
from .entries import SHOWN, Entries, State, is_float
from .guards import alike
from .layout import SCALES, Layout, apart, dense_strides, shape_of_scales
from .members import Member
from .numbers import Numbers, about_members

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .perturbed import Perturbed

# The gradients of all parameters of some lanes, None where there is none.
Gradients = Sequence[Tensor | None]
# Elements that are put back at a time.
_PART = 1 << 22


class Lanes:
    """The flat buffers of some parameters, which stay where they are: weights and gradients are read and written there.

    A lane is a buffer with a part for each parameter, in the layout of `plan`; gaps hold zeros. `state[p]` of the
    optimizer shows the parts, and is the truth: `entries` takes over what a user has put in their place.

    Args:
        members: parameters that agree in device, type and whatever else a launch cannot tell apart.

    Attributes:
        members, params: the parameters.
        plan: where each one's part is.
        shapes, strides: of the parts.
        full_shapes, full_strides: of the tensors whose memory the parameters are.
        entries: what the optimizer's `state` shows.
        lanes: buffers by name [size]; of "mask", int32 words [size / 32].
        steps: fp32 [parameters], how often each was updated.
        perturbed: while some of the parameters are perturbed, how they were left; else None.
        where: addresses and strides of the weights when they were last looked at.
        moves: how often they were others than before.
        shard_groups: the process groups over which the weights are cut into shards, if any.
        shards, shard_index: how many shards there are, and which of them the weights are.
    """

    shard_groups: tuple[ProcessGroup, ...] = ()
    shards: int = 1
    shard_index: int = 0

    def __init__(self, members: Sequence[Member]) -> None:
        self.members: list[Member] = list(members)
        self.params: list[Parameter] = [member.p for member in self.members]
        self._lay_out()
        self.lanes: dict[str, Tensor] = {}
        self.steps: Tensor = torch.zeros(len(self.params), dtype=torch.float32, device=self.device)
        self.perturbed: Perturbed | None = None
        self._uploaded: dict[str, Uploaded] = {}
        # Weights that are not dense in memory are worked on in a copy.
        self._staged: dict[int, Tensor] = {}
        self.where: tuple[list[int], list[tuple[int, ...]]] = [], []
        self.moves: int = 0
        self._memory_alike: Callable[..., bool] | None = None
        # Addresses of lists of tensors that are passed on as they are, by the lists' ids.
        self._known: dict[int, np.ndarray] = {}
        self._flags: tuple[list[bool], Tensor] | None = None
        self._grads_alike: Callable[..., bool] | None = None
        self._views: dict[str, list[Tensor]] = {}
        self.groups: list[dict[str, Any]] = list({id(member.group): member.group for member in self.members}.values())
        self._numbers: dict[str, Numbers] = {}
        self._about_members: Tensor | None = None
        # Whose part of "anchor" has been set.
        self._anchored = [False] * len(self.params)
        self.entries: Entries = Entries(self)

    def _lay_out(self) -> None:
        memory = self.memory()
        self.device: torch.device = memory[0].device
        self.dtype: torch.dtype = memory[0].dtype
        self.full_shapes: list[torch.Size] = [tensor.shape for tensor in memory]
        self.full_strides: list[tuple[int, ...]] = [dense_strides(tensor) for tensor in memory]
        self.plan: Layout = self._layout()
        self.shapes: list[torch.Size] = self.plan.shapes
        self.strides: list[tuple[int, ...]] = self.plan.strides

    def _layout(self) -> Layout:
        return Layout(self.full_shapes, self.full_strides, self.device)

    def __len__(self) -> int:
        return len(self.params)

    # -- the user's memory ---------------------------------------------------------------------------------------------

    def memory(self) -> Sequence[Tensor]:
        """The tensors whose memory the parameters are."""
        return self.params

    def versions(self) -> list[int]:
        """How often each parameter was written into, as autograd counts."""
        return [p._version for p in self.params]

    def rewind(self, versions: Sequence[int]) -> None:
        """Have autograd take the weights for those of these versions."""
        # torch's stubs lack this module.
        autograd = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
        autograd._unsafe_set_version_counter(tuple(self.params), tuple(versions))

    def fits(self, thoroughly: bool = False) -> bool:
        """Whether every parameter still has the device, type, shape and strides that the lanes were made for.

        Those that have not moved are looked at only thoroughly.
        """
        memory = self.memory()
        addresses = list(map(Tensor.data_ptr, memory))
        moved = addresses != self.where[0]
        if not (moved or thoroughly) and self._memory_alike is not None and self._memory_alike(*memory):
            return True
        self._staged = {}
        for i, tensor in enumerate(memory):
            if (tensor.device, tensor.dtype, tensor.shape) != (self.device, self.dtype, self.full_shapes[i]):
                return False
            if tensor.numel() and tensor.stride() != self.full_strides[i]:
                if dense_strides(tensor) != self.full_strides[i]:
                    return False
                self._stage(i, tensor)
        strides = list(map(Tensor.stride, memory))
        self.moves += moved or strides != self.where[1]
        self.where, self._memory_alike = (addresses, strides), alike(memory)
        self._known[id(self.params)] = np.array(addresses, np.int64)
        return True

    def _stage(self, i: int, tensor: Tensor) -> None:
        self._staged[i] = torch.empty_strided(tensor.shape, self.strides[i], dtype=self.dtype, device=self.device)

    def weights(self) -> Sequence[Tensor]:
        """Where a pass reads and writes the weights; `written` is to follow."""
        memory = self.memory()
        if self._staged:
            memory = [self._staged.get(i, tensor) for i, tensor in enumerate(memory)]
            self.stage()
        return memory

    def stage(self) -> None:
        """Have the copies that are worked on as the weights are now, where another pass may have written these."""
        for i, staged in self._staged.items():
            staged.copy_(self.params[i].detach())

    def gradients(self) -> Gradients:
        """Each parameter's gradient as it is at this moment, None where there is none; copied only if it must be.

        Raises:
            RuntimeError: sparse gradient.
        """
        grads = self._grads()
        return grads if self.are_usable(grads) else self._usable(grads)

    def are_usable(self, grads: Gradients) -> TypeGuard[Sequence[Tensor]]:
        """Whether these are gradients of all parameters that passes can read as they are, as far as is known."""
        return self._grads_alike is not None and not any(map(is_, grads, repeat(None))) and self._grads_alike(*grads)

    def _grads(self) -> list[Tensor | None]:
        return [p.grad for p in self.params]

    def _usable(self, grads: Gradients) -> Gradients:
        if not self.fits(thoroughly=True):
            raise Moved
        out = [None if grad is None else self._like_weights(i, grad) for i, grad in enumerate(grads)]
        unchanged = [grad for new, grad in zip(out, grads, strict=True) if grad is not None and new is grad]
        if len(unchanged) == len(grads):
            self._grads_alike = alike(unchanged)
        return out

    def gradient(self, i: int) -> Tensor:
        """Parameter i's gradient, which is there; see `gradients`."""
        grad = self._grads()[i]
        assert grad is not None
        return self._like_weights(i, grad)

    def check_layout(self, i: int, grad: Tensor) -> None:
        """Raise a RuntimeError if a gradient is sparse."""
        if grad.layout != torch.strided:
            raise RuntimeError(f"sparse gradient of parameter {self.members[i]}: only dense gradients are supported")

    def _like_weights(self, i: int, grad: Tensor) -> Tensor:
        self.check_layout(i, grad)
        here = self.shapes[i], self.strides[i], self.dtype, self.device
        if (grad.shape, grad.stride(), grad.dtype, grad.device) == here and not grad.is_neg():
            return grad
        return torch.empty_strided(*here[:2], dtype=self.dtype, device=self.device).copy_(grad.detach())

    def written(self, active: Sequence[bool]) -> None:
        """Tell everybody that a pass has written the active parameters where `weights` said."""
        for i, staged in self._staged.items():
            if active[i]:
                self.params[i].detach().copy_(staged)
        self._tell([p for p, now in zip(self.params, active, strict=True) if now] if not all(active) else self.params)

    def _tell(self, params: Sequence[Parameter]) -> None:
        torch.autograd.graph.increment_version(params)
        if torch.is_autocast_cache_enabled():
            # Autocast would use the 16-bit copies that it has made of the weights before.
            torch.clear_autocast_cache()

    def segments(
        self,
        grads: Gradients,
        *,
        weight: Sequence[Tensor | None] | None = None,
        clean: Sequence[Tensor] | None = None,
        other: Gradients | None = None,
        half: str,
        only: int | None = None,
    ) -> Segments:
        """The launch of passes over the parameters that have one of `grads`, or over one of them `only`.

        Its table is sent to the device again only if it is not that of the last passes of the same `half` of a step.
        """
        weight = self.weights() if weight is None else weight
        uploaded = self._uploaded.setdefault(half, Uploaded())
        plan = self.plan if only is None else self.plan.only(only)
        return Segments(plan, weight, grads, clean=clean, other=other, uploaded=uploaded, known=self._known)

    def flags(self, active: Sequence[bool]) -> Tensor:
        """Whether each parameter is active, bool on the device."""
        if self._flags is None or self._flags[0] != active:
            self._flags = list(active), upload(torch.tensor(active), self.device)
        return self._flags[1]

    def like_parameter(self, i: int, part: Tensor) -> Tensor:
        """A tensor like a part of a lane as one like parameter i."""
        return part

    def trained(self, i: int) -> Tensor:
        """Which weights of parameter i are trained, bool in its shape."""
        return self.like_parameter(i, torch.ones(self.shapes[i], dtype=torch.bool, device=self.device))

    def clean_parameter(self, i: int) -> Tensor:
        """The clean weights of parameter i, which is perturbed, as a tensor like it."""
        p = self.params[i]
        clean = self.like_parameter(i, apart(self.backup(i)))
        return clean.to(device=p.device, dtype=p.dtype)

    def like_lane(self, i: int, tensor: Tensor) -> Tensor:
        """Of a tensor like parameter i what corresponds to its part of a lane, in the part's shape."""
        return tensor.detach()

    def write(self, name: str, which: Sequence[int]) -> None:
        """Copy a lane's parts into these parameters."""
        self.write_flat(self.lanes[name], which)

    def write_flat(self, flat: Tensor, which: Sequence[int]) -> None:
        """Copy parts of a buffer in the layout of a lane into these parameters."""
        if not which:
            return
        memory = self.memory()
        with torch.no_grad():
            weights, parts = [memory[i].detach() for i in which], [self.plan.shaped(flat, i) for i in which]
            # torch has it without saying so.
            torch._foreach_copy_(weights, parts)  # pyright: ignore[reportPrivateImportUsage]
        self._tell([self.params[i] for i in which])

    def clean(self, i: int) -> Tensor:
        """Parameter i's clean weights in the shape of its parts: itself, or its backup."""
        if self.perturbed is not None and self.perturbed.active[i]:
            self.perturbed.settle()
            return self.backup(i)
        return self.like_lane(i, self.memory()[i])

    @property
    def counts_steps(self) -> bool:
        """Whether the lane "backup" holds how far perturbed weights are from the clean ones, not these themselves."""
        return "backup" in self.lanes and self.lanes["backup"].dtype == torch.int8

    def backup(self, i: int) -> Tensor:
        """The clean weights of parameter i, which is perturbed, in the shape of its parts."""
        view = self.views("backup")[i]
        return replace(self.like_lane(i, self.memory()[i]), view) if self.counts_steps else view

    def restore(self, which: Sequence[int]) -> None:
        """Put the clean weights back into these parameters, which are perturbed."""
        if not self.counts_steps:
            self.write("backup", which)
            return
        memory = self.memory()
        with torch.no_grad():
            for i in which:
                weight = memory[i].detach()
                if weight.stride() != self.strides[i]:
                    weight.copy_(self.backup(i))
                    continue
                # In parts, for there may be no memory for more.
                flat = weight.as_strided((weight.numel(),), (1,))
                own = self.plan.part(self.lanes["backup"], i)
                for part, steps in zip(flat.split(_PART), own.split(_PART), strict=True):
                    part.copy_(replace(part, steps))
        self._tell([self.params[i] for i in which])

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
            self.lanes[name] = torch.zeros(self.plan.size_of(name), dtype=dtype, device=self.device)
            self.entries.add(name)
        return self.lanes[name]

    def drop(self, name: str) -> None:
        """Let go of a buffer."""
        if self.lanes.pop(name, None) is not None:
            self._known.pop(id(self._views.pop(name, None)), None)
            self.entries.remove(name)

    def numbers(self, name: str, rows: Sequence[Sequence[float | Tensor]]) -> Tensor:
        """Rows of hyper-parameters, one for each of `groups`, as fp64 [groups, columns] on the device."""
        if name not in self._numbers:
            self._numbers[name] = Numbers(self.device)
        return self._numbers[name].rows(rows)

    def about_members(self) -> Tensor:
        """What of the parameters never changes, int64 [parameters, len(spec.MEMBER)] on the device."""
        if self._about_members is None:
            self._about_members = about_members(self.members, self.groups, self.starts(), self.device)
        return self._about_members

    def starts(self) -> list[int]:
        """For each parameter how many of its weights other shards have before this one."""
        return [0] * len(self)

    def views(self, name: str) -> list[Tensor]:
        """Each parameter's part of a lane, in its own shape and strides; of scales, see `shape_of_scales`."""
        if name not in self._views:
            part = self.plan.scales if name in SCALES else self.plan.shaped
            views = self._views[name] = [part(self.lanes[name], i) for i in range(len(self))]
            self._known[id(views)] = np.array(list(map(Tensor.data_ptr, views)), np.int64)
        return self._views[name]

    def float_entry(self, i: int, entry: Mapping[str, Any]) -> dict[str, Any]:
        """An entry of a state for parameter i, with floats instead of codes of 8 bits."""
        out = {name: value for name, value in entry.items() if name not in SCALES}
        for scale, name in SCALES.items():
            if scale in entry and isinstance(entry.get(name), Tensor) and not is_float(entry[name]):
                out[name] = self.like_parameter(i, self._decoded(i, entry[name], entry[scale]))
        return out

    def _decoded(self, i: int, codes: Tensor, scale: Tensor) -> Tensor:
        return self.plan.decoded(codes, scale, i)

    def is_coded(self, name: str) -> bool:
        """Whether a lane is kept in codes of 8 bits."""
        return f"{name}_scale" in self.lanes

    def chosen(self, i: int) -> Tensor:
        """Parameter i's mask, bool in its shape."""
        return self.plan.bits(self.lanes["mask"], i)

    # -- state ---------------------------------------------------------------------------------------------------------

    def address(self, shown: Tensor) -> int:
        """Where a tensor is in memory that `shown` has made."""
        return shown.data_ptr()

    def addresses(self, shown: Sequence[Tensor]) -> list[int]:
        """`address` of many."""
        return list(map(Tensor.data_ptr, shown))

    def show(self, state: State) -> None:
        """Show the state of all parameters: a mask is chosen also of those that were never updated."""
        self.entries.begin([True] * len(self), state)
        self.entries.follow(state)

    def reset(self, i: int, name: str) -> None:
        """Make parameter i's part of a lane what it is in the beginning, or its count of steps 0."""
        kind = SHOWN.get(name, "zeros")
        if name == "step":
            self.steps[i].zero_()
        elif kind == "zeros":
            self.views(name)[i].zero_()
        elif kind == "weights":
            self.set(i, name, self.exact(i), like_parameter=False)
        elif kind == "first" and not self._anchored[i]:
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
        if self.is_coded(name) and value.is_floating_point():
            codes, scale = self.plan.encoded(value, i, spec.CODED[name])
            self.plan.part(self.lanes[name], i).copy_(codes)
            self.plan.words(self.lanes[f"{name}_scale"], i).copy_(scale)
            return
        target = self.plan.words(self.lanes[name], i) if name == "mask" else self.views(name)[i]
        label = f"state {name!r} of parameter {self.members[i]}"
        check(value.shape == target.shape, label, tuple(value.shape), f"must have shape {tuple(target.shape)}")
        target.copy_(value)
        if name == "anchor":
            self._anchored[i] = True

    def has_anchor(self, i: int) -> bool:
        """Whether parameter i's part of "anchor" has been set."""
        return self._anchored[i]

    def check_entry(self, i: int, name: str, value: Tensor) -> None:
        """Raise an ArgumentError if a value cannot become parameter i's part of a lane."""
        shapes = self._shapes_of(i, name)
        label = f"state {name!r} of parameter {self.members[i]}"
        check(value.shape in shapes, label, tuple(value.shape), f"must have shape {tuple(shapes[0])}")

    def _shapes_of(self, i: int, name: str) -> list[torch.Size]:
        if name in SCALES:
            return [shape_of_scales(self.full_shapes[i])]
        if name == "mask":
            return [torch.Size([-(-self.shapes[i].numel() // 32)]), self.shapes[i]]
        return [self.shapes[i]]

    def shown(self, name: str, i: int) -> Tensor:
        """Parameter i's part of a lane as `state` shows it."""
        return apart(self.plan.words(self.lanes[name], i) if name == "mask" else self.views(name)[i])

    def taken(self, i: int, name: str, value: Tensor) -> Tensor:
        """A value that `shown`, or somebody else, has made as the lane has it."""
        if name == "mask" and value.dtype == torch.bool:
            return self.plan.packed(value, i)
        if name == "remainder":
            # Shards show 16 bits as floats.
            value = value.view(torch.int16) if value.is_floating_point() else value
            own = self.lanes[name].dtype
            if (own, value.dtype) == (torch.int8, torch.int16):
                return (value.to(torch.int32) + 128 >> 8).clamp(max=127).to(own)
            return value.to(own) << 8 if (own, value.dtype) == (torch.int16, torch.int8) else value
        return value


class Moved(Exception):
    """A parameter is no longer what its lanes were made for."""
