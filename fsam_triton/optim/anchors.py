"""Anchors: the tensors towards which L2-SP pulls parameters, and which parameters have one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..buffers.entries import State
from ..buffers.lanes import Lanes
from ..buffers.members import name_of
from ..errors import ArgumentError, check

# What torch.compile, DDP, activation checkpointing and FSDP put into the names of parameters.
_WRAPPERS = {"_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


class Anchors:
    """The anchors of an optimizer, which parameters of groups with ``l2_sp > 0`` have.

    Args:
        given: "initial", the weights before the first update, or tensors by the names of parameters.

    Raises:
        ArgumentError: given is something else.
    """

    def __init__(self, given: str | Mapping[str, Tensor]) -> None:
        known = isinstance(given, Mapping) or given == "initial"
        check(known, "anchors", given, 'must be "initial" or a mapping')
        self.given = given

    def check(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Refuse anchors that fit no parameter's name, or were meant for one that would otherwise decay to zero."""
        pulling = [group for group in groups if group["l2_sp"] > 0]
        if isinstance(self.given, str) or not self.given or not pulling:
            return
        names = {name for group in groups for name in group.get("param_names", ())}
        known = not names.isdisjoint(self.given)
        check(known, "anchors", sorted(self.given)[:3], f"parameters are named {sorted(names)[:3]}")
        pulled = [pair for group in pulling for pair in zip(group.get("param_names", ()), group["params"], strict=True)]
        novel = {name: p for name, p in pulled if p.requires_grad and name not in self.given}
        unused = {name: anchor for name, anchor in self.given.items() if name not in names}
        if (pair := misnamed(unused, novel)) is not None:
            raise ArgumentError("anchors", pair[0], f"the parameter is named {pair[1]!r}")

    def given_for(self, group: Mapping[str, Any], i: int) -> Tensor | None:
        """The anchor given for a parameter; None with "initial", and for one that is novel."""
        if isinstance(self.given, str):
            return None
        check("param_names" in group, "anchors", "a mapping", "needs parameter names: pass model.named_parameters()")
        name, shape = name_of(group, i), tuple(group["params"][i].shape)
        anchor = None if name is None else self.given.get(name)
        if anchor is not None:
            check(anchor.shape == shape, f"anchors[{name!r}]", tuple(anchor.shape), f"must have shape {shape}")
        return anchor

    def has(self, group: Mapping[str, Any], i: int | None) -> bool:
        """Whether a group's parameter has an anchor; of None, whether any of the group's may have one."""
        if i is None or isinstance(self.given, str):
            return group["l2_sp"] > 0
        return group["l2_sp"] > 0 and self.given_for(group, i) is not None

    def prepare(self, lanes: Lanes, state: State) -> None:
        """Make the lane of anchors, if the lanes' parameters have any, and fill in those that were given.

        Raises:
            ArgumentError: a parameter was updated before without an anchor being kept.
        """
        if not self.has(lanes.groups[0], lanes.members[0].position):
            return
        lanes.lane("anchor", lanes.dtype)
        for i, member in enumerate(lanes.members):
            if lanes.has_anchor(i):
                continue
            if (anchor := self.given_for(member.group, member.position)) is not None:
                lanes.set(i, "anchor", lanes.like_lane(i, anchor.to(lanes.device)), like_parameter=False)
                continue
            entry = state.get(member.p)
            if entry and "anchor" not in entry and float(entry.get("step", 0)) > 0:
                raise ArgumentError("l2_sp", member.group["l2_sp"], "was 0 at the first step, so no anchors were kept")

    def keep(self, groups: Sequence[Mapping[str, Any]], state: State) -> None:
        """Have anchors that a loaded state does not have be those that there are, or else the present weights."""
        for group in groups:
            for i, p in enumerate(group["params"]):
                if (entry := state.get(p)) and self.has(group, i):
                    entry.setdefault("anchor", None)


def misnamed(unused: Mapping[str, Tensor], novel: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The names of an anchor and of the parameter without one that it must have been meant for; None if there are none.

    A state dict names much that is no parameter of an optimizer: buffers, frozen weights, the head of another task.
    Such a name is a mistake only if a parameter that has no anchor has its shape, and its name except for wrappers or
    for a prefix.

    Args:
        unused: anchors that are no parameter's, by name.
        novel: parameters without an anchor, by name.
    """
    ends = {(end, anchor.shape): name for name, anchor in unused.items() for end in _ends(name)}
    whole = {(_ends(name)[0], anchor.shape): name for name, anchor in unused.items()}
    for name, p in novel.items():
        own = _ends(name)
        for found in (ends.get((own[0], p.shape)), *(whole.get((end, p.shape)) for end in own)):
            if found is not None:
                return found, name
    return None


def _ends(name: str) -> list[str]:
    """The name without wrappers, and its ends of at least two parts: "weight" alone could be any layer's."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return [".".join(parts[i:]) for i in range(max(len(parts) - 1, 1))]
