"""Entries: what an optimizer's `state` shows of lanes, and how lanes follow what a user does there."""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable, Sequence
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..kernels import spec
from .layout import SCALES

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from .lanes import Lanes

# The state of an optimizer: for each parameter an entry, with values by name.
State = dict[Tensor, dict[str, Any]]
# The lanes that `state` shows, in its order, and what a parameter's part is where its entry does not say: zeros, the
# weights, the weights of its first update, or what it was.
SHOWN = {
    "exp_avg": "zeros",
    "exp_avg_sq": "zeros",
    "max_exp_avg_sq": "zeros",
    "momentum_buffer": "zeros",
    **{f"{name}_scale": "zeros" for name in spec.CODED},
    "remainder": "zeros",
    "anchor": "first",
    "ema": "weights",
    "fisher": "zeros",
    "ascent_avg": "zeros",
    "mask": "kept",
    "orthogonal": "zeros",
    "index": "kept",
}


class Entries:
    """The entries of some lanes' parameters in `state`, and the tensors that were put there.

    A parameter has an entry from its first update on.

    Args:
        lanes: the lanes, which own this object.
    """

    def __init__(self, lanes: Lanes) -> None:
        # Lanes that an optimizer drops are freed at once.
        self._owner = weakref.ref(lanes)
        # Of each parameter: its entry, what we have put there, and where that is in memory.
        self._entries: list[dict[str, Any] | None] = [None] * len(lanes)
        self._published: list[dict[str, Tensor]] = [{} for _ in range(len(lanes))]
        self._published_at: list[list[int]] = [[] for _ in range(len(lanes))]
        # Everything in the entries, and what we have put there and its addresses, when they were last followed.
        self._all_published: list[Any] | None = None
        self._own: tuple[list[Tensor], list[int]] = [], []

    @property
    def _lanes(self) -> Lanes:
        lanes = self._owner()
        assert lanes is not None
        return lanes

    def _names(self) -> list[str]:
        lanes = self._lanes.lanes
        return ["step", *(name for name in SHOWN if name in lanes)]

    def updated(self) -> list[int]:
        """The parameters that have an entry."""
        return [i for i, entry in enumerate(self._entries) if entry is not None]

    def published(self, name: str) -> list[Tensor]:
        """What the entries show of a lane, where every parameter has one."""
        return [published[name] for published in self._published]

    # -- what the user does --------------------------------------------------------------------------------------------

    def follow(self, state: State) -> None:
        """Take over what a user has put into the parameters' entries of an optimizer's state, or taken out of them."""
        lanes, names = self._lanes, len(self._names())
        for i, (p, published) in enumerate(zip(lanes.params, self._published, strict=True)):
            entry = state.get(p)
            same = (
                entry is not None
                and entry is self._entries[i]
                and len(entry) == len(published) == names
                and all(map(is_, entry.values(), published.values()))
            )
            if not (same and list(map(lanes.address, published.values())) == self._published_at[i]):
                self._adopt(i, entry)
        self._all_published = list(chain.from_iterable(entry.values() for entry in self._entries if entry))
        own = list(chain.from_iterable(map(dict.values, self._published)))
        self._own = own, lanes.addresses(own)

    def is_followed(self) -> bool:
        """Whether the entries that `follow` saw, and none others, hold what we have put there, and where we have."""
        if self._all_published is None:
            return False
        now = list(chain.from_iterable(map(dict.values, filter(None, self._entries))))
        same = len(now) == len(self._all_published) and all(map(is_, now, self._all_published))
        return same and self._lanes.addresses(self._own[0]) == self._own[1]

    def published_at(self) -> Iterable[int]:
        """Where the tensors are that we have put into the entries."""
        return filter(None, chain.from_iterable(self._published_at))

    def separate(self, state: State, own: Container[int]) -> None:
        """Copy what lies at `own` addresses but not in its place: to be taken over, it must not be written before."""
        lanes = self._lanes
        for p, published, places in zip(lanes.params, self._published, self._published_at, strict=True):
            there = dict(zip(published, places, strict=True))
            for name, value in (state.get(p) or {}).items():
                if not isinstance(value, Tensor) or (address := lanes.address(value)) not in own:
                    continue
                if value is not published.get(name) or address != there[name]:
                    state[p][name] = value.clone()

    def _adopt(self, i: int, entry: dict[str, Any] | None) -> None:
        lanes, before = self._lanes, self._published[i]
        there = dict(zip(before, self._published_at[i], strict=True))
        for name in self._names():
            value = None if entry is None else entry.get(name)
            if name in SCALES and is_float((entry or {}).get(SCALES[name])):
                # Somebody has put them in the place of codes, which have had their scales made for them.
                continue
            if value is None:
                # Taken out by somebody; or never there, and zeros do not stand for that.
                if name in before or (entry and not before and SHOWN.get(name) != "zeros"):
                    lanes.reset(i, name)
            elif value is not before.get(name) or lanes.address(value) != there[name]:
                lanes.set(i, name, value)
        self._entries[i], self._published[i], self._published_at[i] = None, {}, []
        if entry:
            self._publish(i, entry)

    # -- what we do ----------------------------------------------------------------------------------------------------

    def begin(self, active: Sequence[bool], state: State) -> None:
        """Show the state of parameters that are updated for the first time."""
        for i, now in enumerate(active):
            if now and self._entries[i] is None:
                for name in self._names()[1:]:
                    if SHOWN[name] != "zeros":
                        self._lanes.reset(i, name)
                self._publish(i, state.setdefault(self._lanes.params[i], {}))
                self._all_published = None

    def add(self, name: str) -> None:
        """Show a lane that has been made."""
        lanes = self._lanes
        for i, entry in enumerate(self._entries if name in SHOWN else ()):
            if entry is not None and name not in entry:
                entry[name] = self._published[i][name] = lanes.shown(name, i)
                self._published_at[i].append(lanes.address(entry[name]))
        self._all_published = None

    def remove(self, name: str) -> None:
        """Show a lane no more."""
        for i, (entry, published) in enumerate(zip(self._entries, self._published, strict=True)):
            if published.pop(name, None) is not None and entry is not None:
                entry.pop(name, None)
                self._published_at[i] = list(map(self._lanes.address, published.values()))
        self._all_published = None

    def _publish(self, i: int, entry: dict[str, Any]) -> None:
        lanes = self._lanes
        own = {name: lanes.steps[i] if name == "step" else lanes.shown(name, i) for name in self._names()}
        entry.update(own)
        self._entries[i], self._published[i] = entry, own
        self._published_at[i] = list(map(lanes.address, own.values()))


def is_float(value: object) -> TypeIs[Tensor]:
    """Whether it is a tensor of floats."""
    return isinstance(value, Tensor) and value.is_floating_point()
