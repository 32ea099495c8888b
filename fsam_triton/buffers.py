"""Where the numbers live: parameters, gradients and optimizer state as views of flat buffers."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .kernels.reference import CHUNK, pack_mask, unpack_mask

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Every parameter starts on a 128-byte boundary (vector loads, TMA and cuBLAS want it) and on a word of a mask.
_ALIGN_BYTES = 128
_ALIGN_ELEMENTS = 32


class Bucket:
    """The flat buffers of parameters that share a parameter group, device and dtype.

    Buffers have one layout: parameter i takes `numel` elements from `offsets[i]`, in its own strides; gaps and tail
    hold zeros. A view of one parameter's part is a tensor with a storage of its own extent, so that saving it does not
    save the whole buffer.

    Attributes:
        params: the parameters.
        weight: their values, flat [size].
        lanes: buffers by name: exp_avg, exp_avg_sq, max_exp_avg_sq, master, anchor, ema, fisher, orthogonal [size],
            mask [size / 32].
        steps: fp32 [len(params)], how often each was updated.
        known: whether each parameter was ever updated.
        backup: clean weights while the parameters are perturbed, [size], or None before it is needed.
        perturbed: whether `weight` holds perturbed values.
        selectable: whether a `FisherMask` chooses among these weights.
        shard_group: the processes that have the other shards of these weights, or None.
        shards, shard_index: how many shards there are, and which one this is.
        shard_start: how many of the parameter's weights the shards before this one have.
    """

    # Whether the parameters are views of `weight`.
    flat = True
    shard_group: ProcessGroup | None = None
    shards, shard_index, shard_start = 1, 0, 0

    def __init__(
        self, params: Sequence[Parameter], group: dict, *, flatten: bool = True, selectable: bool = True
    ) -> None:
        strides = [torch.empty_like(p, device="meta").stride() for p in params]
        align = max(_ALIGN_BYTES // params[0].element_size(), _ALIGN_ELEMENTS)
        self._lay_out(params, group, selectable, [p.shape for p in params], strides, align)
        if flatten:
            self.weight = torch.zeros(self.size, dtype=self.dtype, device=self.device)
            self._move_parameters()
        else:
            self.size = self.params[0].numel()
            self.weight = flat_alias(self.params[0])
        self._pointers = [p.data_ptr() for p in self.params]
        self.remember_versions()
        self._collect_in_backward()

    def _lay_out(
        self,
        params: Sequence[Parameter],
        group: dict,
        selectable: bool,
        shapes: list[torch.Size],
        strides: list[tuple],
        align: int,
    ) -> None:
        """Everything but the weights: parameter i takes a tensor of `shapes[i]` and `strides[i]` in the buffers."""
        self.params = list(params)
        self.group = group
        self.selectable = selectable
        first = self.params[0]
        self.device, self.dtype = first.device, first.dtype
        self.shapes, self.strides = shapes, strides
        self.offsets, end = [], 0
        for shape in shapes:
            self.offsets.append(end)
            end += -(-shape.numel() // align) * align
        self.size = max(-(-end // CHUNK), 1) * CHUNK
        self.lanes: dict[str, Tensor] = {}
        self.steps = torch.zeros(len(self.params), device=self.device)
        self.known = [False] * len(self.params)
        self.backup: Tensor | None = None
        self.perturbed = False
        # Master weights rounded for `clean_view`, until the next pass writes them.
        self._rounded: Tensor | None = None
        # The gradients of the pass at hand, and those of the pass before it where they are still needed.
        self._grads: Gradients | None = None
        self._ascent_grads: Gradients | None = None
        # Parameters with the same entry have been updated equally often; see `advance`.
        self._lockstep: list[tuple[int, int]] = [(0, 0)] * len(self.params)
        # What `runs` has given since `_lockstep` changed.
        self._runs: dict[tuple[bool, ...], list[tuple[int, int, int, bool]]] = {}
        self._tags = 0

    def _move_parameters(self) -> None:
        with torch.no_grad():
            for i, p in enumerate(self.params):
                view = self.view(self.weight, i)
                view.copy_(p)
                p.data = view

    def _collect_in_backward(self) -> None:
        bucket = weakref.ref(self)
        handles = []
        for i, p in enumerate(self.params):
            if p.requires_grad and p.is_leaf:

                def collect(p: Tensor, i: int = i) -> None:
                    # A gradient with a graph (create_graph=True) is left to the user until the step.
                    if (own := bucket()) is not None and not (p.grad.is_sparse or p.grad.requires_grad):
                        own._collect_one(i, p)

                handles.append(p.register_post_accumulate_grad_hook(collect))
        weakref.finalize(self, lambda: [handle.remove() for handle in handles])

    def view(self, flat: Tensor, i: int) -> Tensor:
        """Parameter i's part of a flat buffer, in the parameter's shape and strides."""
        size = flat.element_size()
        start = (flat.storage_offset() + self.offsets[i]) * size
        storage = flat.untyped_storage()[start : start + self.shapes[i].numel() * size]
        with torch.no_grad():
            return torch.empty(0, dtype=flat.dtype, device=flat.device).set_(
                storage, 0, self.shapes[i], self.strides[i]
            )

    def mask_words(self, i: int) -> Tensor:
        """Parameter i's words of the mask, int32 [ceil(numel / 32)]."""
        start = self.offsets[i] // 32
        return self.lanes["mask"][start : start + (self.shapes[i].numel() + 31) // 32]

    def lane(self, name: str, dtype: torch.dtype) -> Tensor:
        """The buffer of that name, made of zeros when first asked for."""
        if name not in self.lanes:
            size = (self.size + 31) // 32 if name == "mask" else self.size
            self.lanes[name] = torch.zeros(size, dtype=dtype, device=self.device)
        return self.lanes[name]

    def lane_view(self, name: str, i: int) -> Tensor:
        """Parameter i's part of the buffer of that name."""
        return self.mask_words(i) if name == "mask" else self.view(self.lanes[name], i)

    def shown(self, name: str, i: int) -> Tensor:
        """`lane_view` as `state` shows it."""
        return self.lane_view(name, i)

    def taken(self, i: int, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Parameter i's entry in a loaded state as `lane_view` has it: masks, which shards show as bool, in words."""
        out = dict(entry)
        if "mask" in entry and entry["mask"].dtype == torch.bool:
            flat = torch.zeros(self.shapes[i].numel(), dtype=torch.bool, device=entry["mask"].device)
            flat.as_strided(self.shapes[i], self.strides[i]).copy_(entry["mask"])
            out["mask"] = pack_mask(flat)
        return out

    def chosen(self, i: int) -> Tensor:
        """Parameter i's mask, bool in its shape and strides."""
        flat = unpack_mask(self.mask_words(i), torch.empty(self.shapes[i].numel(), device="meta"))
        return flat.as_strided(self.shapes[i], self.strides[i]).clone()

    def memory(self) -> list[Tensor]:
        """The tensors whose memory the parameters are."""
        return self.params

    def versions(self) -> list[int]:
        """Each parameter's count of writes."""
        return [p._version for p in self.params]

    @property
    def grads(self) -> Gradients:
        """The gradients of the pass at hand, made when the first one arrives."""
        if self._grads is None:
            self._grads = Gradients(self)
        return self._grads

    @property
    def grad(self) -> Tensor:
        """Flat gradient [size]."""
        return self.grads.flat

    @property
    def ascent_grad(self) -> Tensor:
        """Flat gradient [size] that `keep_ascent_grad` has put aside, or what a pass has left in its place."""
        if self._ascent_grads is None:
            self._ascent_grads = Gradients(self)
        return self._ascent_grads.flat

    def keep_ascent_grad(self, static: bool) -> None:
        """Put the flat gradient aside as `ascent_grad`: by exchanging two buffers, or copied if `grad` must stay."""
        self.lanes.pop("orthogonal", None)
        if static:
            self.ascent_grad.copy_(self.grad)
            self.grad.zero_()
            self.mark_grads_zeroed()
            return
        kept, free = self.grads, self._ascent_grads or Gradients(self)
        free.forget()
        self._grads, self._ascent_grads = free, kept

    def drop_ascent_grads(self, kept: Sequence[bool] | None = None) -> None:
        """Zero `ascent_grad`, but for those parameters whose entry in `kept` is true."""
        if self._ascent_grads is None:
            return
        if kept is None:
            self.lanes.pop("orthogonal", None)
            self.ascent_grad.zero_()
        for i, is_kept in enumerate(kept or ()):
            if not is_kept:
                self.view(self.ascent_grad, i).zero_()

    def orthogonal(self) -> Tensor:
        """`ascent_grad` as a lane, which is saved: there a pass has left, or will leave, LookSAM's component."""
        self.lanes["orthogonal"] = self.ascent_grad
        return self.ascent_grad

    def _collect_one(self, i: int, p: Tensor) -> None:
        view = self.grads.views[i]
        if p.grad is not view:
            with torch.no_grad():
                view.copy_(p.grad)
            p.grad = view

    def collect(self) -> tuple[bool, ...]:
        """Bring all gradients into the flat buffer.

        Returns:
            For each parameter whether it has a gradient. One that received none since its view was zeroed has none.

        Raises:
            RuntimeError: sparse gradient, or a parameter that no longer is the view of its buffer.
        """
        self._check_parameters()
        grads = [p.grad for p in self.params]
        if self._grads is not None and all(map(operator.is_, grads, self._grads.views)):
            self.adopt_changed_weights()
            return self._grads.written()
        active = []
        for i, (p, grad) in enumerate(zip(self.params, grads, strict=True)):
            if grad is not None and grad.is_sparse:
                raise RuntimeError(f"sparse gradient of parameter {self.name(i)}: only dense gradients are supported")
            if p.grad is not None:
                self._collect_one(i, p)
            elif self._grads is None:
                active.append(False)
                continue
            if p.grad is None:
                self.grads.zero(i)
            active.append(not self.grads.is_zero(i))
        self.adopt_changed_weights()
        return tuple(active)

    def _check_parameters(self) -> None:
        # All at once: a call a parameter would take as long as a whole pass of a sparse step. A cast moves, too.
        if [p.data_ptr() for p in self.memory()] != self._pointers:
            i, p = next((i, p) for i, p in enumerate(self.params) if not self.is_in_place(i))
            raise RuntimeError(
                f"parameter {self.name(i)} was moved or replaced after the optimizer was made "
                f"(now {tuple(p.shape)}, {p.dtype}, {p.device}): move or cast the model first, then make the "
                "optimizer, and use only one optimizer for a parameter"
            )

    def adopt_changed_weights(self) -> None:
        """Follow a parameter that somebody else wrote into since our last pass (by loading weights).

        A master does so where the two differ, and keeps its extra bits elsewhere.
        """
        master = self.lanes.get("master")
        if self.perturbed or not self._has_copies() or self.versions() == self._versions:
            return
        for i, p in enumerate(self.params):
            if self.was_written(i):
                self.read(p, i, self.weight)
                if master is not None:
                    view, now = self.view(master, i), self.view(self.weight, i)
                    view.copy_(torch.where(view.to(self.dtype) == now, view, now.to(view.dtype)))
        self.remember_versions()

    def _has_copies(self) -> bool:
        """Whether, unperturbed, what somebody writes into a parameter is not all there is to it."""
        return "master" in self.lanes or not self.flat

    def adopt_clean_weights(self) -> None:
        """While perturbed, take a parameter that somebody else wrote into (by loading weights) for a clean one."""
        if not self.perturbed:
            return
        for i, p in enumerate(self.params):
            if self.was_written(i):
                self.read(p, i, self.clean())
        self._rounded = None
        self.remember_versions()

    def read(self, source: Tensor, i: int, target: Tensor) -> None:
        """Copy from a tensor like parameter i to its part of a flat buffer."""
        if source is not self.params[i] or target is not self.weight:
            with torch.no_grad():
                self.view(target, i).copy_(source)

    def was_written(self, i: int) -> bool:
        """Whether somebody else has written into parameter i since our last pass (by loading weights)."""
        return self.params[i]._version != self._versions[i]

    def is_in_place(self, i: int) -> bool:
        """Whether parameter i is where it was when the bucket was made."""
        return self.memory()[i].data_ptr() == self._pointers[i] and self.params[i].dtype == self.dtype

    def remember_versions(self) -> None:
        """Take the parameters' present values as the ones this optimizer wrote."""
        self._versions = self.versions()

    def written(self) -> None:
        """Tell autograd that a pass has written the parameters in place."""
        torch.autograd.graph.increment_version(self.params)
        if torch.is_autocast_cache_enabled():
            # Autocast would go on with the 16-bit copies that it made of the weights before.
            torch.clear_autocast_cache()
        if self.perturbed or self._has_copies():
            self.remember_versions()
        self._rounded = None

    def drop_grads(self, keep_views: bool) -> None:
        """Clear the gradients: as None or, if keep_views, as zeros in the same tensors."""
        if not keep_views:
            for p in self.params:
                p.grad = None
            return
        for i, p in enumerate(self.params):
            if p.grad is not None:
                self._collect_one(i, p)
                self.grads.zero(i)

    def mark_grads_zeroed(self) -> None:
        """A kernel has stored zeros over the whole gradient buffer."""
        self.grads.mark_zero()

    def clean(self) -> Tensor:
        """The unperturbed weights: the parameters, their backup, or the master weights (to be rounded)."""
        if not self.perturbed:
            return self.weight
        return self.lanes.get("master", self.backup)

    def clean_view(self, i: int) -> Tensor | None:
        """Parameter i's clean weights while it is perturbed, in its own type; None when it is not."""
        if not self.perturbed:
            return None
        clean = self.clean()
        if clean.dtype != self.dtype:
            if self._rounded is None:
                self._rounded = clean.to(self.dtype)
            clean = self._rounded
        return self.view(clean, i)

    def restore(self) -> None:
        """Undo a perturbation, to the bit."""
        if self.perturbed:
            with torch.no_grad():
                self.weight.copy_(self.clean())
            self.perturbed = False
            self.written()

    def replace(self, weight: Tensor) -> Tensor:
        """Write other weights, [size], into the parameters, which are not perturbed.

        Returns:
            A copy of those they had.
        """
        self._check_parameters()
        before = self.weight.clone()
        with torch.no_grad():
            self.weight.copy_(weight)
        self.written()
        return before

    def advance(self, active: tuple[bool, ...], may_skip: bool) -> None:
        """Note that the active parameters are being updated, unless (may_skip) the device decides to skip the update.

        Which of them had how many updates is on the device; which had equally many is known here, without asking it.
        """
        # Where all are, those with equally many still have equally many.
        if all(active):
            return
        self._runs.clear()
        if may_skip and any(active):
            fresh: dict[tuple[int, int], tuple[int, int]] = {}
            for i, now in enumerate(active):
                if now:
                    if self._lockstep[i] not in fresh:
                        self._tags += 1
                        fresh[self._lockstep[i]] = (self._tags, 0)
                    self._lockstep[i] = fresh[self._lockstep[i]]
        else:
            for i, now in enumerate(active):
                if now:
                    tag, count = self._lockstep[i]
                    self._lockstep[i] = (tag, count + 1)

    def resync(self) -> None:
        """Read the step counts, after they were loaded."""
        self._lockstep = [(0, int(step)) for step in self.steps.tolist()]
        self._runs.clear()

    def runs(self, active: tuple[bool, ...]) -> list[tuple[int, int, int, bool]]:
        """Longest stretches of parameters that can share a launch: (start, stop, a parameter in it, whether active)."""
        if active not in self._runs:
            self._runs[active] = self._find_runs(active)
        return self._runs[active]

    def _find_runs(self, active: tuple[bool, ...]) -> list[tuple[int, int, int, bool]]:
        runs: list[list] = []
        last = None
        for i, shape in enumerate(self.shapes):
            if shape.numel() == 0:
                continue
            key = self._lockstep[i] if active[i] else None
            if not runs or key != last:
                runs.append([self.offsets[i], self.size, i, active[i]])
                if len(runs) > 1:
                    runs[-2][1] = self.offsets[i]
            last = key
        if runs:
            runs[0][0] = 0
        return [tuple(run) for run in runs]

    def stretches(self, active: tuple[bool, ...]) -> list[tuple[int, int]]:
        """Start and stop of the longest stretches of parameters that are all active, however often updated before."""
        if all(active):
            return [(0, self.size)]
        stops = [*self.offsets[1:], self.size]
        out: list[tuple[int, int]] = []
        for start, stop, now in zip(self.offsets, stops, active, strict=True):
            if now:
                joined = out and out[-1][1] == start
                out.append((out.pop()[0] if joined else start, stop))
        return out

    def name(self, i: int) -> str:
        """Parameter i's name if the optimizer was given names, else its position in its group."""
        position = next(j for j, p in enumerate(self.group["params"]) if p is self.params[i])
        names = self.group.get("param_names")
        return repr(names[position]) if names else f"number {position} of its group (shape {tuple(self.shapes[i])})"


class Gradients:
    """A flat gradient, each parameter's view of it, and which views are zero because nothing was written since."""

    def __init__(self, bucket: Bucket, flat: Tensor | None = None) -> None:
        self.flat = torch.zeros(bucket.size, dtype=bucket.dtype, device=bucket.device) if flat is None else flat
        self.views = [bucket.view(self.flat, i) for i in range(len(bucket.params))]
        self.mark_zero()
        if flat is not None:
            self.forget()

    def mark_zero(self) -> None:
        """All of it is zero now."""
        # A view's version number when it was zero; None where nobody knows what it holds.
        self.versions: list[int | None] = [view._version for view in self.views]

    def forget(self) -> None:
        """Nobody knows what it holds."""
        self.versions = [None] * len(self.views)

    def is_zero(self, i: int) -> bool:
        """Whether nothing was written into parameter i's view since it was zeroed."""
        return self.views[i]._version == self.versions[i]

    def written(self) -> tuple[bool, ...]:
        """For each parameter the opposite of `is_zero`."""
        return tuple(map(operator.ne, [view._version for view in self.views], self.versions))

    def zero(self, i: int) -> None:
        """Zero parameter i's view, if it is not."""
        if not self.is_zero(i):
            with torch.no_grad():
                self.views[i].zero_()
            self.versions[i] = self.views[i]._version


def flat_alias(p: Parameter) -> Tensor:
    """The parameter's own memory as a flat tensor."""
    if p.numel() and p.stride() != torch.empty_like(p, device="meta").stride():
        raise ValueError(
            f"flatten=False needs a dense parameter; got shape {tuple(p.shape)} with strides {p.stride()}: "
            "pass flatten=True or a contiguous parameter"
        )
    return p.detach().as_strided((p.numel(),), (1,))
