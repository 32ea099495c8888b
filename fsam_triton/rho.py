"""AdamWL2SP with a radius rho and a schedule: what the sharpness-aware optimizers have in common."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from .adamw_l2sp import AdamWL2SP
from .buffers import Bucket
from .clean_state import show_clean
from .errors import check
from .schedule import Schedule

# A step asks for the schedule several times; to make one takes longer than everything that is asked of it.
_made_of = functools.lru_cache(typed=True)(Schedule)


class ScheduledRho(AdamWL2SP):
    """AdamWL2SP with rho per group and a `Schedule`; the base of `FSAM` and `MomentumSAM`, of no use by itself.

    The schedule and the number of steps taken stand in the parameter groups, so that state dicts have them.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        rho: float,
        schedule: Schedule | None,
        _group_defaults: Mapping[str, Any] | None = None,
        **adamwl2sp: Any,
    ) -> None:
        check(schedule is None or isinstance(schedule, Schedule), "schedule", schedule, "must be a Schedule or None")
        # Parameters whose modules do not know yet that they are to show clean weights.
        self._unseen: list[Parameter] = []
        defaults = {"rho": rho, "schedule": (schedule or Schedule()).as_dict(), "updates": 0, **(_group_defaults or {})}
        super().__init__(params, lr, _group_defaults=defaults, **adamwl2sp)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["updates"] = self.param_groups[0]["updates"]
        if group["schedule"]["rho_follows"] == "lr":
            lr = group["lr"]
            group.setdefault("lr_max", lr.clone() if isinstance(lr, Tensor) else lr)
        self._unseen += group["params"]

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        rho, schedule = group["rho"], _made_of(**group["schedule"])
        check(0 <= rho < float("inf"), "rho", rho, "must be >= 0 and finite")
        # A group can be left out with a rho of 0.
        check(rho == 0 or schedule.rho_min <= rho, "rho_min", schedule.rho_min, f"must be at most rho={rho}")

    @property
    def schedule(self) -> Schedule:
        """When steps are sharpness-aware; from the parameter groups, where a loaded state dict can have changed it."""
        return _made_of(**self.param_groups[0]["schedule"])

    def _rho(self, group: Mapping[str, Any]) -> float | Tensor:
        """A group's radius at this step."""
        return self.schedule.rho(group["updates"], group["rho"], group["lr"], group.get("lr_max", 0.0))

    def clean_weight(self, p: Tensor) -> Tensor | None:
        bucket, i = self._places.get(p, (None, 0))
        # What somebody else has written (by loading weights) or put in its place is clean as it is.
        if bucket is None or not bucket.perturbed or bucket.was_written(i):
            return None
        if self._was_moved(bucket, p):
            return super().clean_weight(p).to(p)
        return super().clean_weight(p) if bucket.is_in_place(i) else None

    @staticmethod
    def _was_moved(bucket: Bucket, p: Tensor) -> bool:
        """Whether p was moved to another device or cast, as the model's `to` does."""
        return (p.device, p.dtype) != (bucket.device, bucket.dtype)

    def _show_clean(self) -> None:
        if self._unseen:
            show_clean(self, self._unseen)
            self._unseen = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._unseen = list(self._places)

    def _update(self) -> None:
        super()._update()
        for group in self.param_groups:
            group["updates"] += 1
