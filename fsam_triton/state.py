"""What an optimizer over flat buffers saves, loads, copies and restores."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from .buffers import Bucket
from .errors import check
from .kernels.reference import compute_dtype

# Names of the buffers that a parameter's entry in `state` shows, if there are any.
_STATE_LANES = (
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "master",
    "anchor",
    "ema",
    "fisher",
    "mask",
    "orthogonal",
    "index",
)


class FlatState(Optimizer):
    """The part of AdamWL2SP that deals with state: state dicts in torch.optim.AdamW's form, copies, clean weights.

    `AdamWL2SP` provides `_buckets`, `_places` (where each parameter is: its bucket and its number there),
    `_start_anew` (which fills them), `_allocate` and `_check_group`.
    """

    _buckets: list[Bucket]
    _places: dict[Tensor, tuple[Bucket, int]]
    # Attributes that a copy takes over as they are.
    _ARGUMENTS: tuple[str, ...] = ()
    # The decay of the average of the weights, None if there is none; whether the parameters hold it at this moment.
    ema_decay: float | None = None
    _shows_ema = False

    def _publish(self, bucket: Bucket) -> None:
        """Show the buffers of parameters that have been updated as torch.optim.AdamW's state."""
        for i, p in enumerate(bucket.params):
            # A mask can have chosen weights of a parameter that was never updated.
            if bucket.known[i] or "mask" in bucket.lanes:
                self.state[p] = self._entry(bucket, i)

    def _entry(self, bucket: Bucket, i: int) -> dict[str, Tensor]:
        lanes = {name: bucket.shown(name, i) for name in _STATE_LANES if name in bucket.lanes}
        return {"step": bucket.steps[i], **lanes}

    def state_dict(self) -> dict[str, Any]:
        """The state in torch.optim.AdamW's form: per parameter `step`, `exp_avg`, `exp_avg_sq` (`max_exp_avg_sq`).

        `master`, `anchor`, `ema`, and FSAM's `mask` and `fisher`, are there too where they are in use. Tensors are
        views of the live buffers, as with torch.optim; a perturbation shows in none of them.
        """
        for bucket in self._buckets:
            bucket.adopt_changed_weights()
            self._publish(bucket)
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer of this kind or of torch.optim.AdamW; values are copied into the buffers.

        Load the model's own weights first. An average of the weights that the state does not have starts from them.

        Raises:
            ValueError: it is another optimizer's, or groups or shapes do not fit; nothing has been changed then.
            RuntimeError: inside `ema_weights`.
        """
        self._refuse_inside_ema("load_state_dict()")
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        lacking = {"state", "param_groups"} - state_dict.keys()
        check(not lacking, "state_dict", sorted(state_dict, key=str), f"must have {sorted(lacking)}")
        lacking = [i for i, group in enumerate(state_dict["param_groups"]) if "params" not in group]
        check(not lacking, "state_dict", f"groups {lacking} without 'params'", "every group must have them")
        saved, groups = copy.deepcopy(state_dict["param_groups"]), self.param_groups
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in groups]:
            raise ValueError(
                f"loaded state dict has parameter groups of {[len(g['params']) for g in saved]} parameters, "
                f"this optimizer has groups of {[len(g['params']) for g in groups]}"
            )
        flat = itertools.chain.from_iterable
        by_id = dict(zip(flat(g["params"] for g in saved), flat(g["params"] for g in groups), strict=True))
        entries = {by_id[k]: entry for k, entry in state_dict["state"].items() if k in by_id}
        for p, (bucket, i) in self._places.items():
            if p in entries:
                _check_entry(bucket.name(i), entries[p])
                entries[p] = bucket.taken(i, entries[p])
        merged = [{**old, **new, "params": old["params"]} for old, new in zip(groups, saved, strict=True)]
        for group in merged:
            self._check_group(group)
        self._check_entries(entries)
        self.restore()
        for group, new in zip(groups, merged, strict=True):
            group.update(new)
        self._load_entries(entries)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    @property
    def perturbed(self) -> bool:
        """Whether the parameters hold perturbed weights at this moment."""
        return any(bucket.perturbed for bucket in self._buckets)

    def clean_weight(self, p: Tensor) -> Tensor | None:
        """The clean weights of a parameter that is perturbed at this moment, as a tensor like it.

        Args:
            p: any tensor.

        Returns:
            A view of the copy that `restore` would put back (of an fp32 master weight: a rounded copy of it), or None
            if p is not perturbed, or not a parameter of this optimizer.
        """
        bucket, i = self._places.get(p, (None, 0))
        return None if bucket is None else bucket.clean_view(i)

    def restore(self) -> None:
        """Put back the clean weights, to the bit, if the parameters are perturbed."""
        for bucket in self._buckets:
            bucket.restore()

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside the block the parameters hold the average of the weights; at its end, in any case, the clean weights.

        To evaluate, and to save the average with the model. The average is rounded to the parameters' type; a parameter
        that was never updated keeps its weights. Takes the memory of one copy of the weights. Inside, nothing can be
        stepped, perturbed, loaded or copied.

        Raises:
            RuntimeError: no ``ema_decay`` was given, FSAM's weights are perturbed, or the block is inside another one.
        """
        if self.ema_decay is None:
            raise RuntimeError("ema_weights() needs an optimizer with ema_decay")
        self._refuse_inside_ema("ema_weights()")
        if self.perturbed:
            raise RuntimeError("ema_weights() of perturbed weights: call step() or restore() first")
        averaged = [bucket for bucket in self._buckets if "ema" in bucket.lanes]
        for bucket in averaged:
            bucket.adopt_changed_weights()
        before = [bucket.replace(bucket.lanes["ema"]) for bucket in averaged]
        self._shows_ema = True
        try:
            yield
        finally:
            self._shows_ema = False
            for bucket, weight in zip(averaged, before, strict=True):
                bucket.replace(weight)

    def _refuse_inside_ema(self, action: str) -> None:
        if self._shows_ema:
            raise RuntimeError(f"{action} inside ema_weights(): the parameters hold the average, leave the block first")

    def _check_entries(self, entries: Mapping[Parameter, Mapping[str, Any]]) -> None:
        for bucket in self._buckets:
            for i, p in enumerate(bucket.params):
                for name, value in entries.get(p, {}).items():
                    if name in _STATE_LANES and name != "mask" and value.shape != bucket.shapes[i]:
                        raise ValueError(
                            f"state {name!r} of parameter {bucket.name(i)} has shape {tuple(value.shape)}, "
                            f"must be {tuple(bucket.shapes[i])}"
                        )
                    if name == "index" and "index" not in bucket.lanes:
                        raise ValueError(f"state 'index' of parameter {bucket.name(i)} is of training with trainable")
                    if name == "index" and not torch.equal(value.to(bucket.device), bucket.lane_view("index", i)):
                        raise ValueError(
                            f"state 'index' of parameter {bucket.name(i)} is of other weights than trainable"
                        )
                    if name == "mask" and value.numel() != (bucket.shapes[i].numel() + 31) // 32:
                        raise ValueError(
                            f"state 'mask' of parameter {bucket.name(i)} has {value.numel()} words, "
                            f"must be {(bucket.shapes[i].numel() + 31) // 32}"
                        )

    def _load_entries(self, entries: Mapping[Parameter, Mapping[str, Any]]) -> None:
        self.state = defaultdict(dict)
        for bucket in self._buckets:
            # Weights that were loaded into the model before win over masters that are not in the loaded state.
            bucket.adopt_changed_weights()
            bucket.lanes.pop("fisher", None)
            bucket.lanes.pop("ema", None)
        updated = {p for p, entry in entries.items() if "exp_avg" in entry}
        self._allocate([(bucket, ()) for bucket in self._buckets if not updated.isdisjoint(bucket.params)])
        for bucket in self._buckets:
            steps = []
            for i, p in enumerate(bucket.params):
                entry = entries.get(p, {})
                steps.append(float(entry.get("step", 0)))
                for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                    if name in bucket.lanes:
                        bucket.lane_view(name, i).copy_(entry.get(name, torch.zeros(())))
                for name in ("master", "anchor"):
                    if name in entry and name in bucket.lanes:
                        bucket.lane_view(name, i).copy_(entry[name])
                if "ema" in bucket.lanes:
                    present = bucket.view(bucket.lanes.get("master", bucket.weight), i)
                    bucket.lane_view("ema", i).copy_(entry.get("ema", present))
                for name, dtype in (("fisher", compute_dtype(bucket.dtype)), ("mask", torch.int32)):
                    if name in entry:
                        bucket.lane(name, dtype)
                        bucket.lane_view(name, i).copy_(entry[name])
                bucket.known[i] = p in updated and steps[i] > 0
            bucket.steps.copy_(torch.tensor(steps))
            bucket.resync()
            bucket.remember_versions()
            self._publish(bucket)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_inside_ema("copying or pickling the optimizer")
        if any(bucket.perturbed for bucket in self._buckets):
            raise RuntimeError(
                "the weights are perturbed: call restore() or step() before copying or pickling the optimizer"
            )
        entries = {p: self._entry(bucket, i) for bucket in self._buckets for i, p in enumerate(bucket.params)}
        known = {p: bucket.known[i] for bucket in self._buckets for i, p in enumerate(bucket.params)}
        arguments = {k: v for k, v in self.__dict__.items() if k in self._ARGUMENTS}
        return {**super().__getstate__(), "state": {}, "arguments": arguments, "entries": entries, "known": known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called by copy and pickle alone: the copied parameters lie in memory of their own and are moved into new
        # buffers.
        state = dict(state)
        entries, known = state.pop("entries"), state.pop("known")
        self.__dict__.update(state.pop("arguments"))
        state["state"] = defaultdict(dict)
        super().__setstate__(state)
        self._start_anew()
        self._load_entries(entries)
        for bucket in self._buckets:
            bucket.known = [known[p] for p in bucket.params]
            for p, is_known in zip(bucket.params, bucket.known, strict=True):
                if not is_known:
                    self.state.pop(p, None)


def _check_entry(label: str, entry: Mapping[str, Any]) -> None:
    """Refuse a parameter's entry that neither torch.optim.AdamW nor an optimizer of ours has made."""
    name = f"state of parameter {label}"
    fits = isinstance(entry, Mapping) and (not entry or "mask" in entry or {"step", *_STATE_LANES[:2]} <= entry.keys())
    shown = sorted(entry, key=str) if isinstance(entry, Mapping) else type(entry).__name__
    check(fits, name, shown, "must have 'step', 'exp_avg' and 'exp_avg_sq', as torch.optim.AdamW's has")
    unknown = sorted(entry.keys() - {"step", *_STATE_LANES}, key=str)
    check(not unknown, name, unknown, f"may have 'step', {', '.join(map(repr, _STATE_LANES))}")
    for key, value in entry.items():
        if key == "step":
            fits = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
            fits = fits and float(value) >= 0
            check(fits, f"{name}, 'step'", value, "must be a number >= 0")
            continue
        # torch.optim.AdamW makes floats of masks and indices when it loads them.
        fits = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
        fits = fits and (value.is_floating_point() or (key in ("mask", "index") and not value.is_complex()))
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        check(fits, f"{name}, {key!r}", kind, "must be a dense tensor of floats")
