"""State formats: in which types an optimizer keeps the state of its rule and the rest of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..buffers.lanes import Lanes
from ..buffers.layout import can_be_coded
from ..errors import check
from ..kernels import spec
from ..kernels.reference import compute_dtype

_REMAINDER = {torch.bfloat16: torch.int16, torch.float16: torch.int32}


def check_state_format(state_format: Any) -> None:
    """Raise an ArgumentError unless it is one."""
    allowed = (None, "fp32", "bf16", "8bit")
    check(state_format in allowed, "state_format", state_format, f"must be one of {allowed}")


def check_master_weights(master_weights: Any) -> None:
    """Raise an ArgumentError unless it is False or one of the formats of master weights."""
    known = master_weights in (False, True, "24bit", "32bit")
    check(known, "master_weights", master_weights, 'must be False, True, "24bit" or "32bit"')


def format_of(group: Mapping[str, Any], i: int) -> str | None:
    """The state format of a group's parameter."""
    wanted = group["state_format"]
    return None if wanted == "8bit" and not can_be_coded(group["params"][i].shape) else wanted


def are_coded(lanes: Lanes) -> bool:
    """Whether the rule's state of these lanes is kept in codes of 8 bits."""
    return format_of(lanes.groups[0], lanes.members[0].position) == "8bit"


def allocate(lanes: Lanes, names: Sequence[str], master_weights: bool | str) -> None:
    """Make the lanes of a rule's state, of these names, and of what master weights have besides the weights."""
    if are_coded(lanes):
        for name in names:
            lanes.lane(name, torch.int8 if spec.CODED[name] else torch.uint8)
            lanes.lane(f"{name}_scale", torch.bfloat16)
    else:
        for name in names:
            lanes.lane(name, _type_of_state(lanes, master_weights))
    if master_weights and lanes.dtype in _REMAINDER:
        lanes.lane("remainder", torch.int8 if master_weights == "24bit" else _REMAINDER[lanes.dtype])


def _type_of_state(lanes: Lanes, master_weights: bool | str) -> torch.dtype:
    """The type of the state of lanes, unless it is kept in codes."""
    state_format = lanes.groups[0]["state_format"]
    if state_format == "bf16":
        return torch.bfloat16
    # fp16 cannot hold squares of gradients: its moments are fp32.
    narrow = lanes.dtype == torch.bfloat16 and not master_weights and state_format != "fp32"
    return torch.bfloat16 if narrow else compute_dtype(lanes.dtype)
