"""State dicts: what of one must hold before an optimizer takes it over, and one for other optimizers."""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..buffers.entries import SHOWN, State
from ..buffers.ledger import Ledger
from ..errors import check
from ..kernels import spec
from .rules import Rule
from .state_formats import are_coded

# Entries that torch.optim's load_state_dict makes floats of.
_INTEGERS = ("mask", "index", "remainder")


def checked_groups(state_dict: Mapping[str, Any], groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with what a state dict says of them.

    Raises:
        ArgumentError: it is no state dict, or of other groups.
    """
    lacking = sorted({"state", "param_groups"} - state_dict.keys())
    check(not lacking, "state_dict", sorted(state_dict, key=str), f"must have {lacking}")
    saved = copy.deepcopy(state_dict["param_groups"])
    lacking = [i for i, group in enumerate(saved) if "params" not in group]
    check(not lacking, "state_dict", f"groups {lacking} without 'params'", "every group must have them")
    theirs, ours = ([len(group["params"]) for group in each] for each in (saved, groups))
    check(theirs == ours, "state_dict", f"groups of {theirs} parameters", f"must have groups of {ours}")
    # How a state is kept is not what it is.
    kept = ("params", "state_format")
    return [{**old, **new, **{name: old[name] for name in kept}} for old, new in zip(groups, saved, strict=True)]


def checked_state(
    state_dict: Mapping[str, Any],
    groups: list[dict[str, Any]],
    ledger: Ledger,
    rule: Rule,
    unused: Container[str],
) -> State:
    """The entries of a state dict by parameter; codes of 8 bits as floats for lanes that are not to have codes.

    Args:
        state_dict: the state dict.
        groups: the parameter groups of the optimizer that is to have the state.
        ledger: its lanes.
        rule: its rule.
        unused: the names of what it does not use.

    Raises:
        ArgumentError: an entry is of another rule, or does not fit its parameter.
    """
    numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in groups)
    out: State = {}
    for number, p in zip(numbers, params, strict=True):
        entry = state_dict["state"].get(number)
        if entry is None:
            continue
        if (place := ledger.place(p)) is None:
            if ledger.waits(p):
                out[p] = {name: _copied(value, p) for name, value in entry.items()}
            continue
        lanes, i = place
        label = f"state of parameter {lanes.members[i]}"
        required = rule.required(lanes.groups[0])
        _check_names(label, entry, required)
        for name, value in entry.items():
            # torch.optim.SGD has written None where there is no momentum.
            if name not in required and value is None:
                continue
            _check_value(f"{label}, {name!r}", name, value, is_coded=f"{name}_scale" in entry)
            if name != "step":
                lanes.check_entry(i, name, value)
        # A state of some weights is one of all weights where these are all that there are.
        out[p] = {"step": 1.0 if entry else 0.0, **{name: value for name, value in entry.items() if value is not None}}
        if not are_coded(lanes):
            out[p] = lanes.float_entry(i, out[p])
        if "index" not in lanes.lanes:
            out[p].pop("index", None)
    return {p: {name: value for name, value in entry.items() if name not in unused} for p, entry in out.items()}


def with_floats(state_dict: dict[str, Any], groups: list[dict[str, Any]], ledger: Ledger) -> dict[str, Any]:
    """An optimizer's state dict, changed: with floats instead of codes of 8 bits; groups, ledger: the optimizer's."""
    numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in groups)
    state = state_dict["state"]
    for number, p in zip(numbers, params, strict=True):
        if (place := ledger.place(p)) is not None and number in state:
            lanes, i = place
            state[number] = lanes.float_entry(i, state[number])
    return state_dict


def _copied(value: Any, p: Parameter) -> Any:
    return value.detach().to(p.device, copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)


def _check_names(label: str, entry: Any, required: tuple[str, ...]) -> None:
    is_mapping = isinstance(entry, Mapping)
    shown = sorted(entry, key=str) if is_mapping else type(entry).__name__
    fits = is_mapping and (not entry or "mask" in entry or set(required) <= entry.keys())
    check(fits, label, shown, f"must have {', '.join(map(repr, required))}")
    unknown = sorted(entry.keys() - {"step", *SHOWN}, key=str)
    check(not unknown, label, unknown, f"may have 'step', {', '.join(map(repr, SHOWN))}")


def _check_value(label: str, name: str, value: Any, is_coded: bool) -> None:
    if name == "step":
        fits = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
        check(fits and float(value) >= 0, label, value, "must be a number >= 0")
        return
    fits = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    # Codes of 8 bits have their scales beside them.
    codes = torch.int8 if spec.CODED.get(name) else torch.uint8
    is_code = is_coded and fits and value.dtype == codes
    fits = fits and (value.is_floating_point() or is_code or (name in _INTEGERS and not value.is_complex()))
    kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
    check(fits, label, kind, "must be a dense tensor of floats")
