"""Ledger: which parameter of an optimizer is in which lanes; it follows the parameter groups and the state."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from operator import is_
from types import MethodType
from typing import Any, ParamSpec, TypeVar
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import check
from .entries import State
from .lanes import Gradients, Lanes, Moved
from .members import Member
from .perturbed import Perturbed
from .sharded import ShardedLanes, is_sharded, local, shard_groups
from .sharing import sharing
from .sparse import SparseLanes

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
# Lanes in which a parameter has a gradient, with the gradients.
Found = list[tuple[Lanes, Gradients]]


class Ledger:
    """The lanes of all parameters that an optimizer may write.

    Parameters share lanes, and each pass one launch, if they agree in device, type, shards and `structure`: whatever
    their groups. One whose memory an earlier one has too is in lanes of its own: passes over it come one after another.
    The ledger is made again, from `state`, when parameters or groups are no longer those it was made of.

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
        self._structure, self._trained, self._prepare = _weakly(structure), _weakly(trained), _weakly(prepare)
        self.forget()

    def forget(self) -> None:
        """Have all lanes made again."""
        self._all: list[Lanes] = []
        self._places: dict[Tensor, tuple[Lanes, int]] = {}
        self._params: list[Parameter] | None = None
        self._structures: list[Hashable] = []
        self._idle: list[Parameter] = []
        # The numbers of parameters whose memory an earlier one has too, and how often any had moved when that was seen.
        self._sharing: list[int] = []
        self._moves = 0
        # The keys and values of `state` when it was last followed.
        self._followed: tuple[list[Tensor], list[dict[str, Any]]] = [], []
        # How often the lanes were made.
        self.generation: int = getattr(self, "generation", 0) + 1

    def renew(self) -> None:
        """Have all lanes made again of another state; anchors stay."""
        self._params = None

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

    def waits(self, p: Tensor) -> bool:
        """Whether a parameter would have lanes, were it not frozen at present."""
        return any(p is idle for idle in self._idle)

    def refresh(self, groups: list[dict[str, Any]], state: State, with_state: bool = True) -> None:
        """Follow the groups and (`with_state`) the state. It asks nothing of a device."""
        params = [p for group in groups for p in group["params"]]
        same = self._params is not None and len(params) == len(self._params) and all(map(is_, params, self._params))
        if not (same and self._structures_of(groups) == self._structures and self._fits()):
            self._arrange(groups, state)
        if with_state and not self._has_followed(state):
            # A parameter of another shape may be where it was before.
            if not all(lanes.fits(thoroughly=True) for lanes in self._all):
                self._arrange(groups, state)
            self._follow(state)

    def _has_followed(self, state: State) -> bool:
        # Not by looking up every parameter, which would hash them all.
        keys, entries = self._followed
        same = len(state) == len(keys) and all(map(is_, state, keys)) and all(map(is_, state.values(), entries))
        return same and all(lanes.entries.is_followed() for lanes in self._all)

    def _follow(self, state: State) -> None:
        own = {address for lanes in self._all for address in lanes.entries.published_at()}
        for lanes in self._all:
            lanes.entries.separate(state, own)
        for lanes in self._all:
            lanes.entries.follow(state)
        self._followed = list(state), list(state.values())

    def _fits(self) -> bool:
        if not all(map(_is_idle, self._idle)):
            return False
        if not all(lanes.fits() for lanes in self._all):
            return False
        if (moves := sum(lanes.moves for lanes in self._all)) != self._moves:
            self._moves = moves
            pairs = (pair for lanes in self._all for pair in zip(lanes.members, lanes.memory(), strict=True))
            members, memory = zip(*sorted(pairs, key=lambda pair: pair[0].number), strict=True)
            return [members[i].number for i, _ in sharing(memory)] == self._sharing
        return True

    @property
    def shares(self) -> bool:
        """Whether parameters share memory: a pass over some lanes may write the weights of others."""
        return bool(self._sharing)

    def _structures_of(self, groups: list[dict[str, Any]]) -> list[Hashable]:
        """What of the groups the lanes depend on; that of single parameters does not change."""
        return [(id(group), len(group["params"]), self._structure(group, None)) for group in groups]

    def _arrange(self, groups: list[dict[str, Any]], state: State) -> None:
        before = self._places
        # Since `renew`, what there was is of another state.
        chosen = {} if self._params is None else {p: place for p, place in before.items() if not state.get(p)}
        if any(lanes.perturbed is not None for lanes in self._all):
            self.restore()
        trained: list[tuple[Member, Tensor | None, tuple[Hashable, ...]]] = []
        idle: list[Parameter] = []
        number = -1
        for group in groups:
            for position, p in enumerate(group["params"]):
                number += 1
                if _is_idle(p):
                    idle.append(p)
                    continue
                indices = self._trained(group, position)
                if indices is not None and not len(indices):
                    continue
                member = Member(p, group, position, number)
                shards = shard_groups(p) if is_sharded(p) else None
                key = (p.device, local(p).dtype, shards, indices is not None, self._structure(group, position))
                trained.append((member, indices, key))
        seen: set[int] = set()
        for member, _, _ in trained:
            # It would have two states.
            check(id(member.p) not in seen, f"parameter {member}", "twice", "must be in the groups once")
            seen.add(id(member.p))
        self.forget()
        pairs = sharing([local(member.p) for member, _, _ in trained])
        for numbers in pairs:
            if any(trained[i][1] is not None for i in numbers):
                one, other = sorted(str(trained[i][0]) for i in numbers)
                raise RuntimeError(f"parameters {one} and {other} share memory: with trainable each must have its own")
        alone = {i for i, _ in pairs}
        members: dict[Hashable, list[tuple[Member, Tensor | None]]] = {}
        for i, (member, indices, key) in enumerate(trained):
            members.setdefault((*key, i if i in alone else None), []).append((member, indices))
        for own in members.values():
            parameters = [member for member, _ in own]
            selected = [indices for _, indices in own if indices is not None]
            if selected:
                self._all.append(SparseLanes(parameters, selected))
            else:
                self._all.append((ShardedLanes if is_sharded(parameters[0].p) else Lanes)(parameters))
        for lanes in self._all:
            self._places |= {p: (lanes, i) for i, p in enumerate(lanes.params)}
            self._carry_anchors(lanes, before)
            self._prepare(lanes, [entry for p in lanes.params if (entry := state.get(p))])
            self._carry_masks(lanes, chosen)
            lanes.fits()
        self._idle = idle
        self._sharing = [trained[i][0].number for i, _ in pairs]
        self._moves = sum(lanes.moves for lanes in self._all)
        self._params = [p for group in groups for p in group["params"]]
        self._structures = self._structures_of(groups)

    @staticmethod
    def _carry_anchors(lanes: Lanes, before: Mapping[Tensor, tuple[Lanes, int]]) -> None:
        """Anchors outlive a state that was thrown away."""
        for i, p in enumerate(lanes.params):
            old, j = before.get(p, (None, 0))
            if old is None or "anchor" not in old.lanes or not old.has_anchor(j):
                continue
            if type(old) is type(lanes) and old.shapes[j] == lanes.shapes[i]:
                lanes.lane("anchor", lanes.dtype)
                lanes.set(i, "anchor", old.views("anchor")[j], like_parameter=False)

    @staticmethod
    def _carry_masks(lanes: Lanes, before: Mapping[Tensor, tuple[Lanes, int]]) -> None:
        """What an ascent keeps, it keeps also of parameters that no state has been made for yet."""
        for i, p in enumerate(lanes.params):
            old, j = before.get(p, (None, 0))
            if old is None or type(old) is not type(lanes) or old.shapes[j] != lanes.shapes[i]:
                continue
            if "mask" in old.lanes and "mask" in lanes.lanes:
                lanes.plan.words(lanes.lanes["mask"], i).copy_(old.plan.words(old.lanes["mask"], j))
            for name in ("fisher", "ascent_avg"):
                if name in old.lanes:
                    lanes.lane(name, old.lanes[name].dtype)
                    lanes.views(name)[i].copy_(old.views(name)[j])

    def collect(self, groups: list[dict[str, Any]], state: State, with_state: bool = True) -> Found:
        """The lanes in which a parameter has a gradient, with these; see `refresh`."""
        self.refresh(groups, state, with_state)
        try:
            found = [(lanes, lanes.gradients()) for lanes in self._all]
        except Moved:
            self._arrange(groups, state)
            self._follow(state)
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
        if lanes is None or lanes.perturbed is None:
            return None
        if local(p).data_ptr() != lanes.perturbed.address(i):
            lanes.perturbed.settle()
        # What somebody has written meanwhile (by loading weights) is clean as it is.
        return None if lanes.perturbed.is_clean(i) else lanes.clean_parameter(i)

    def _perturbed(self) -> list[Perturbed]:
        return [lanes.perturbed for lanes in self._all if lanes.perturbed is not None]

    def seal(self) -> None:
        """Have all lanes know how passes have left their parameters, when none is to follow.

        A pass over some lanes may count as writing parameters of others: views of one tensor share autograd's count.
        """
        if len(perturbed := self._perturbed()) > 1:
            for own in perturbed:
                own.seal()

    def settle(self) -> None:
        """Make the backups of what somebody has written into perturbed parameters, before a pass writes any of them."""
        for own in self._perturbed():
            own.settle()

    def restore(self) -> None:
        """Put back the clean weights, to the bit, where parameters are perturbed."""
        self.settle()
        # Where parameters share memory, a later one's backup has the perturbation of an earlier one.
        for own in reversed(self._perturbed()):
            own.put_back()


def _is_idle(p: Parameter) -> bool:
    """Whether a parameter is frozen, or put away for a while, and has no gradient."""
    return p.grad is None and not (p.requires_grad and p.numel())


def _weakly(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A method as a function that does not keep its object alive: an optimizer that is dropped restores the weights."""
    if not isinstance(function, MethodType):
        return function
    method = WeakMethod(function)

    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        alive = method()
        assert alive is not None
        return alive(*args, **kwargs)

    return call
