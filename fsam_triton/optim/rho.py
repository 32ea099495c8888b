"""The radius rho over time: a `Schedule` and the count of steps, which stand in the parameter groups."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import check
from .schedule import Schedule

# A step asks for the schedule several times; to make one takes longer than everything that is asked of it.
_made_of = functools.lru_cache(typed=True)(Schedule)


def group_defaults(rho: float, schedule: Schedule | None) -> dict[str, Any]:
    """What a parameter group has of them, so that state dicts do."""
    check(schedule is None or isinstance(schedule, Schedule), "schedule", schedule, "must be a Schedule or None")
    return {"rho": rho, "schedule": (schedule or Schedule()).as_dict(), "updates": 0}


def check_group(group: Mapping[str, Any]) -> None:
    """Raise an ArgumentError if a group's rho is out of its range or contradicts the schedule."""
    rho, schedule = group["rho"], _made_of(**group["schedule"])
    check(0 <= rho < float("inf"), "rho", rho, "must be >= 0 and finite")
    # A group can be left out with a rho of 0.
    check(rho == 0 or schedule.rho_min <= rho, "rho_min", schedule.rho_min, f"must be at most rho={rho}")


def join(group: dict[str, Any], first: Mapping[str, Any]) -> None:
    """Have a new group count as the first one does, and keep the learning rate at which its rho is full."""
    group["updates"] = first["updates"]
    if "decay_first" in first:
        group.setdefault("decay_first", first["decay_first"])
    if group["schedule"]["rho_follows"] == "lr":
        lr = group["lr"]
        group.setdefault("lr_max", lr.clone() if isinstance(lr, Tensor) else lr)


def schedule_of(groups: list[dict[str, Any]]) -> Schedule:
    """When steps are sharpness-aware; a loaded state dict can have changed it."""
    return _made_of(**groups[0]["schedule"])


def is_sharp(groups: list[dict[str, Any]]) -> bool:
    """Whether the schedule wants the coming step to be sharpness-aware; the first group's learning rate counts."""
    group, schedule = groups[0], schedule_of(groups)
    if schedule.by_decay and not _decays(group):
        return False
    return schedule.is_sharp(group["updates"], _first_of(group, schedule))


def _decays(group: Mapping[str, Any]) -> bool:
    # A learning rate that a scheduler makes of the last one need not be the same to the bit.
    return float(group["lr"]) < group.get("lr_peak", 0.0) * (1 - 1e-6)


def _first_of(group: Mapping[str, Any], schedule: Schedule) -> int | None:
    """The first step of the decay, if that is the schedule's range."""
    return group.get("decay_first", group["updates"]) if schedule.by_decay else None


def rho_of(group: Mapping[str, Any], schedule: Schedule) -> float | Tensor:
    """A group's radius at this step."""
    # torch's OneCycleLR starts below the learning rate that it leads to, and writes that into the group.
    lr_max, peak = group.get("lr_max", 0.0), group.get("max_lr", 0.0)
    if not isinstance(lr_max, Tensor):
        lr_max = max(lr_max, peak)
    elif peak:
        lr_max = lr_max.clamp(min=peak)
    return schedule.rho(group["updates"], group["rho"], group["lr"], lr_max, _first_of(group, schedule))


def count(groups: list[dict[str, Any]]) -> None:
    """Count a step, and note where its learning rate stands in its rise and decay if the schedule goes by that."""
    by_decay = schedule_of(groups).by_decay
    for group in groups:
        if by_decay and _decays(group):
            group.setdefault("decay_first", group["updates"])
        elif by_decay:
            group["lr_peak"] = max(float(group["lr"]), group.get("lr_peak", 0.0))
        group["updates"] += 1
