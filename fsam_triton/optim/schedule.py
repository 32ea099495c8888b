"""Schedule: which steps are sharpness-aware, and with which rho."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TypeGuard

from torch import Tensor

from ..errors import check


@dataclass(frozen=True)
class Schedule:
    """Which steps are sharpness-aware, and with which rho; the others are plain updates with one backward pass.

    Steps count from 0. A step is in range from `first` on; all arguments can be combined.

    Args:
        every: one step in this many is sharpness-aware, beginning with the first in range; >= 1 (default: 1).
        reuse: in the steps between, add the part of the last sharpness-aware gradient that is orthogonal to the plain
            gradient, scaled to `reuse` times the norm of the current gradient (alpha of LookSAM, arXiv 2203.02714); >=
            0, needs every > 1 (default: 0.0, nothing is added or stored).
        last: the range is this last fraction of total_steps, rounded, at least one step; in (0, 1], needs total_steps
            if < 1. Sharpness-awareness pays late in training (arXiv 2410.10373). Or ``"decay"``: the range is the steps
            whose learning rate is lower than the highest before them, as set by a scheduler: after a warm-up and a
            stable phase, this is a tail that covers the whole decay (arXiv 2609.17575). A learning rate in a tensor on
            a GPU is then read from there at each step (default: 1.0).
        total_steps: number of steps of the whole training, >= 1. Later steps are like those at the end (default: None,
            unknown).
        rho_warmup: number of steps, counted from the first one in range, over which rho rises linearly from 0; >= 0, at
            most the steps in range (default: 0).
        rho_follows: ``"lr"``: rho falls and rises in proportion to the learning rate, from rho_min where that is 0 to
            rho where it is lr_max or more (GSAM, arXiv 2203.08065, algorithm 1). It has the learning rate's warm-up, so
            it excludes rho_warmup. ``"cosine"``: after rho_warmup, rho falls to rho_min at total_steps along half a
            cosine; needs total_steps, and excludes ``last="decay"``. None: rho is constant after rho_warmup (default:
            None).
        rho_min: lowest rho after the warm-up, >= 0, needs rho_follows; a group whose rho is 0 stays at 0 (default:
            0.0).
        lr_max: learning rate at which rho is full, > 0, only with ``rho_follows="lr"`` (default: None, each group's
            learning rate when the optimizer was created, or the peak of a OneCycleLR).

    Raises:
        ValueError: an argument is out of its range, lacks another that it needs, or contradicts another.

    Example:
        >>> from fsam_triton import Schedule
        >>> schedule = Schedule(every=2, last=0.5, total_steps=8, rho_warmup=2)
        >>> [step for step in range(8) if schedule.is_sharp(step)]
        [4, 6]
        >>> [schedule.rho(step, 0.1, lr=1e-3, lr_max=1e-3) for step in range(4, 8)]
        [0.0, 0.05, 0.1, 0.1]
    """

    every: int = 1
    reuse: float = 0.0
    last: float | str = 1.0
    total_steps: int | None = None
    rho_warmup: int = 0
    rho_follows: str | None = None
    rho_min: float = 0.0
    lr_max: float | None = None

    def __post_init__(self) -> None:
        total = self.total_steps
        check(_is_int(self.every) and self.every >= 1, "every", self.every, "must be an int >= 1")
        check(total is None or (_is_int(total) and total >= 1), "total_steps", total, "must be an int >= 1 or None")
        check(_is_number(self.reuse) and self.reuse >= 0, "reuse", self.reuse, "must be a finite number >= 0")
        check(self.reuse == 0 or self.every > 1, "reuse", self.reuse, "must be 0 unless every > 1")
        last = self.last
        known = self.by_decay or (_is_number(last) and 0 < last <= 1)
        check(known, "last", self.last, 'must be in (0, 1], or "decay"')
        known = self.by_decay or self.last == 1 or total is not None
        check(known, "last", self.last, 'must be 1 or "decay" unless total_steps is given')
        self._check_rho()

    def _check_rho(self) -> None:
        follows, lr_max = self.rho_follows, self.lr_max
        known = follows is None or follows in ("lr", "cosine")
        check(known, "rho_follows", follows, 'must be "lr", "cosine" or None')
        lacking = follows == "cosine" and (self.total_steps is None or self.by_decay)
        check(not lacking, "rho_follows", follows, 'must not be "cosine" without total_steps, or with last="decay"')
        warmup = self.rho_warmup
        check(_is_int(warmup) and warmup >= 0, "rho_warmup", warmup, "must be an int >= 0")
        if self.total_steps is not None and not self.by_decay:
            steps = self.total_steps - self.first
            check(warmup <= steps, "rho_warmup", warmup, f"must be at most {steps}, the steps in range")
        conflict = follows == "lr" and warmup > 0
        check(not conflict, "rho_warmup", warmup, 'must be 0 with rho_follows="lr": the learning rate has its own')
        lowest = self.rho_min
        check(_is_number(lowest) and lowest >= 0, "rho_min", lowest, "must be a finite number >= 0")
        check(lowest == 0 or follows is not None, "rho_min", lowest, "must be 0 unless rho_follows is given")
        check(lr_max is None or (_is_number(lr_max) and lr_max > 0), "lr_max", lr_max, "must be > 0 and finite or None")
        check(lr_max is None or follows == "lr", "lr_max", lr_max, 'must be None unless rho_follows="lr"')

    @property
    def by_decay(self) -> bool:
        """Whether the range is the decay of the learning rate."""
        return self.last == "decay"

    @property
    def first(self) -> int:
        """The first step in range; 0 if the learning rate decides the range."""
        if self.total_steps is None or isinstance(self.last, str):
            return 0
        return min(self.total_steps - round(self.last * self.total_steps), self.total_steps - 1)

    def is_sharp(self, step: int, first: int | None = None) -> bool:
        """Whether a step is sharpness-aware.

        Args:
            step: counted from 0.
            first: the first step of the decay, with ``last="decay"`` (default: None, `first`).
        """
        since = step - (self.first if first is None else first)
        return since >= 0 and since % self.every == 0

    def rho(
        self, step: int, rho: float, lr: float | Tensor, lr_max: float | Tensor, first: int | None = None
    ) -> float | Tensor:
        """The radius at a step.

        Args:
            step: counted from 0.
            rho: the group's rho, its highest value.
            lr: the group's learning rate at that step, a float or a tensor of one element.
            lr_max: the group's learning rate when the optimizer was created, > 0; the schedule's own lr_max takes
                precedence.
            first: as for `is_sharp`.

        Returns:
            A float; or a tensor on the device of `lr`, if rho follows a learning rate in a tensor (nothing waits for
            the device).

        Raises:
            ValueError: rho follows the learning rate and lr_max is 0.
        """
        since = max(step - (self.first if first is None else first), 0)
        if since < self.rho_warmup:
            return rho * since / self.rho_warmup
        if self.rho_follows is None:
            return rho
        lowest = min(self.rho_min, rho)
        return lowest + (rho - lowest) * self._height(since, lr, lr_max)

    def _height(self, since: int, lr: float | Tensor, lr_max: float | Tensor) -> float | Tensor:
        """The position of rho between its lowest value (0) and its highest (1), after the warm-up."""
        if self.rho_follows == "lr":
            full = lr_max if self.lr_max is None else self.lr_max
            check(isinstance(full, Tensor) or full > 0, "lr_max", full, "must be > 0: give Schedule(lr_max=...)")
            height = lr / full
            # A learning rate that rises above lr_max does not take rho above its highest.
            return height.clamp(max=1.0) if isinstance(height, Tensor) else min(height, 1.0)
        assert self.total_steps is not None
        steps = self.total_steps - self.first
        if since >= steps:
            return 0.0
        return (math.cos(math.pi * (since - self.rho_warmup) / (steps - self.rho_warmup)) + 1) / 2

    def as_dict(self) -> dict[str, int | float | str | None]:
        """The arguments as plain Python values, for a state dict; ``Schedule(**schedule.as_dict())`` is equal."""
        # A NumPy float is a float to all the checks, but not to torch.load(weights_only=True).
        return {k: float(v) if isinstance(v, float) else v for k, v in asdict(self).items()}


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
