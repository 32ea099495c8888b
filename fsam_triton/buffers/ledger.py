"""Ledger: which parameter of an optimizer is in which lanes; it follows the parameter groups and the state."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .lanes import Lanes, Member, Moved
from .sharded import ShardedLanes, is_sharded, local, shard_dims
from .sparse import SparseLanes


class Ledger:
    """The lanes of all parameters that an optimizer may write.

    Parameters share lanes, and each pass one launch, if they agree in device, type, shards and `structure`: whatever
    their groups. The ledger is made again, from `state`, when parameters or groups are no longer those it was made of.

    Args:
        structure: of a group's parameter at a position, or (None) of the whole group, which lanes and options of
            launches it needs.
        trained: the positions of the weights that are trained, as `SparseLanes` wants them; None for all weights.
        prepare: called with new lanes and the entries of `state` that their parameters have, to make what these need.
    """

    def __init__(
        self,
        structure: Callable[[Mapping[str, Any], int | None], Hashable],
        trained: Callable[[Mapping[str, Any], int], Tensor | None],
        prepare: Callable[[Lanes, list[Mapping[str, Any]]], None],
    ) -> None:
        self._structure, self._trained, self._prepare = structure, trained, prepare
        self.forget()

    def forget(self) -> None:
        """Have all lanes made again."""
        self._all: list[Lanes] = []
        self._places: dict[Parameter, tuple[Lanes, int]] = {}
        self._params: list[Parameter] | None = None
        self._structures: list[Hashable] = []
        self._idle: list[Parameter] = []

    def __iter__(self) -> Iterator[Lanes]:
        return iter(self._all)

    def __bool__(self) -> bool:
        return bool(self._all)

    @property
    def home(self) -> torch.device:
        """The device of sums over all lanes."""
        return self._all[0].device if self._all else torch.device("cpu")

    def place(self, p: Tensor) -> tuple[Lanes, int] | None:
        """The lanes that have a parameter, and its number there."""
        return self._places.get(p)

    def refresh(self, groups: list[dict[str, Any]], state: dict[Parameter, dict[str, Any]]) -> None:
        """Follow the groups and the state. It asks nothing of a device."""
        params = [p for group in groups for p in group["params"]]
        same = self._params is not None and len(params) == len(self._params) and all(map(is_, params, self._params))
        if not (same and self._structures_of(groups) == self._structures and self._fits()):
            self._arrange(groups, state)
        for lanes in self._all:
            lanes.follow(state)

    def _fits(self) -> bool:
        # A parameter that was frozen, and has a gradient now.
        if any(p.grad is not None for p in self._idle):
            return False
        return all(lanes.fits() for lanes in self._all)

    def _structures_of(self, groups: list[dict[str, Any]]) -> list[Hashable]:
        """What of the groups the lanes depend on; that of single parameters does not change."""
        return [(id(group), self._structure(group, None)) for group in groups]

    def _arrange(self, groups: list[dict[str, Any]], state: dict[Parameter, dict[str, Any]]) -> None:
        before = self._places
        if any(lanes.perturbed is not None for lanes in self._all):
            self.restore()
        members: dict[Hashable, list[tuple[Member, Tensor | None]]] = {}
        idle, number = [], -1
        for group in groups:
            for position, p in enumerate(group["params"]):
                number += 1
                if not p.requires_grad and p.grad is None:
                    idle.append(p)
                    continue
                indices = self._trained(group, position)
                if indices is not None and not len(indices):
                    continue
                shards = (p.device_mesh, shard_dims(p)) if is_sharded(p) else None
                key = (p.device, local(p).dtype, shards, indices is not None, self._structure(group, position))
                members.setdefault(key, []).append((Member(p, group, position, number), indices))
        self.forget()
        for (_, _, shards, is_sparse, _), own in members.items():
            parameters = [member for member, _ in own]
            if is_sparse:
                lanes = SparseLanes(parameters, [indices for _, indices in own])
            else:
                lanes = (Lanes if shards is None else ShardedLanes)(parameters)
            self._all.append(lanes)
        for lanes in self._all:
            self._places |= {p: (lanes, i) for i, p in enumerate(lanes.params)}
            self._carry_anchors(lanes, before)
            self._prepare(lanes, [entry for p in lanes.params if (entry := state.get(p))])
            lanes.fits()
        self._idle = idle
        self._params = [p for group in groups for p in group["params"]]
        self._structures = self._structures_of(groups)

    @staticmethod
    def _carry_anchors(lanes: Lanes, before: Mapping[Parameter, tuple[Lanes, int]]) -> None:
        """Anchors outlive a state that was thrown away."""
        for i, p in enumerate(lanes.params):
            old, j = before.get(p, (None, 0))
            if old is not None and "anchor" in old.lanes and old.has_anchor(j) and type(old) is type(lanes):
                if old.shapes[j] == lanes.shapes[i]:
                    lanes.lane("anchor", lanes.dtype)
                    lanes.set(i, "anchor", old.views("anchor")[j], like_parameter=False)

    def collect(self, groups: list[dict], state: dict) -> list[tuple[Lanes, list[Tensor | None]]]:
        """The lanes in which a parameter has a gradient, with these."""
        self.refresh(groups, state)
        try:
            found = [(lanes, lanes.gradients()) for lanes in self._all]
        except Moved:
            self._arrange(groups, state)
            for lanes in self._all:
                lanes.follow(state)
            found = [(lanes, lanes.gradients()) for lanes in self._all]
        return [(lanes, grads) for lanes, grads in found if any(grad is not None for grad in grads)]

    # -- perturbations -------------------------------------------------------------------------------------------------

    @property
    def perturbed(self) -> bool:
        """Whether any parameter holds perturbed weights at this moment."""
        return any(lanes.perturbed is not None for lanes in self._all)

    def clean_weight(self, p: Tensor) -> Tensor | None:
        """The clean weights of a parameter that is perturbed, as a tensor like it; None of any other tensor."""
        lanes, i = self._places.get(p, (None, 0))
        # What somebody has written meanwhile (by loading weights) is clean as it is.
        if lanes is None or lanes.perturbed is None or lanes.perturbed.is_clean(i):
            return None
        return lanes.clean_parameter(i)

    def restore(self) -> None:
        """Put back the clean weights, to the bit, where parameters are perturbed."""
        for lanes in reversed(self._all):
            if lanes.perturbed is not None:
                lanes.perturbed.restore()
