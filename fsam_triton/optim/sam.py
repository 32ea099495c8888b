"""SAM: sharpness-aware steps around any torch.optim.Optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..buffers.entries import State
from ..buffers.lanes import Lanes
from ..buffers.ledger import Ledger
from ..buffers.sharded import OtherParts
from ..errors import check
from ..masks.perturbed import FisherMask
from . import rho as radii
from .ascent import Ascent
from .clean import CleanView
from .schedule import Schedule
from .two_pass import TwoPass

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Scaled(Protocol):
    """An optimizer that unscales gradients itself, and what a GradScaler tells it for a step."""

    found_inf: Tensor
    grad_scale: Tensor | None

    def step(self) -> object: ...


class SAM(TwoPass):
    r"""Sharpness-aware minimization around any optimizer: torch's Muon, an 8-bit or schedule-free Adam, or your own.

    The norm, the perturbation with its backup, and the mask use the fused passes of `FSAM`; then the weights are
    restored, to the bit, and the base optimizer takes its step with the gradients of the perturbed point. The two share
    parameter groups and state: `param_groups` and `state` are the base's, with `rho` and `adaptive` in every group.

    Args:
        base: the optimizer that takes the steps, already created.
        rho: radius of the perturbation, >= 0 (group; default: 0.05).
        adaptive: ASAM's scaling (group; default: False).
        mask, mask_norm, beta, beta_per, gamma, sigma, lmbda, ascent_fraction, schedule: as for `FSAM`; the schedule
            must not have ``reuse``.
        stochastic_rounding: round perturbed 16-bit weights stochastically (default: True).
        seed: seed of random draws and roundings (default: 0).
        norm_group: as for `FusedOptimizer`.

    Raises:
        ArgumentError: an argument is out of its range.

    Example:
        >>> import torch
        >>> from fsam_triton import SAM
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = SAM(torch.optim.Adagrad(model.parameters(), lr=1e-2), rho=0.05)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(1, 4)).square().sum()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """

    # So that `step` is called after an overflow too: it must restore.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.05,
        *,
        adaptive: bool = False,
        mask: FisherMask | None = None,
        mask_norm: str = "all",
        beta: float = 1.0,
        beta_per: str = "element",
        gamma: float = 1.0,
        sigma: float = 0.0,
        lmbda: float = 0.9,
        ascent_fraction: float = 1.0,
        schedule: Schedule | None = None,
        stochastic_rounding: bool = True,
        seed: int = 0,
        norm_group: ProcessGroup | None = None,
    ) -> None:
        check(isinstance(base, Optimizer), "base", type(base).__name__, "must be a torch.optim.Optimizer")
        check(not hasattr(base, "perturb"), "base", type(base).__name__, "must not be sharpness-aware itself")
        check(schedule is None or schedule.reuse == 0, "schedule.reuse", schedule and schedule.reuse, "must be 0")
        self.base = base
        self._set_parts(gamma, ascent_fraction)
        others = OtherParts(norm_group)
        self.ascent: Ascent = Ascent(
            mask, mask_norm, beta, beta_per, seed, stochastic_rounding, others, sigma=sigma, lmbda=lmbda
        )
        self._of_group = {**radii.group_defaults(rho, schedule), "adaptive": adaptive, "ascents": 0}
        self.defaults: dict[str, Any] = {**base.defaults, **self._of_group}
        self._begin()
        # What Optimizer's constructor does besides making groups and state.
        super().__setstate__({})
        for group in self.param_groups:
            self._join(group)
        self.ascent.check_count(self.param_groups)

    def _begin(self) -> None:
        self.clean_view: CleanView = CleanView()
        self.clean_view.find(p for group in self.param_groups for p in group["params"])
        self.ledger: Ledger = Ledger(self._structure, lambda group, i: None, self._prepare)
        # What the ledger shows: masks, and averages of gradients.
        self._kept: State = {}
        self._carried = {}

    def _join(self, group: dict[str, Any]) -> None:
        for name, value in self._of_group.items():
            group.setdefault(name, value)
        group["ascents"] = self.param_groups[0]["ascents"]
        radii.join(group, self.param_groups[0])
        radii.check_group(group)
        self.ascent.check_parameters(group)

    @staticmethod
    def _structure(group: Mapping[str, Any], i: int | None) -> bool:
        return group["adaptive"]

    def _prepare(self, lanes: Lanes, entries: list[Mapping[str, Any]]) -> None:
        # The base counts the updates; here they only make the random numbers of each step others.
        lanes.steps.fill_(self.param_groups[0]["updates"])
        self.ascent.make_lanes(lanes)

    # -- groups and state are the base's -------------------------------------------------------------------------------

    # In Optimizer these are attributes.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's parameter groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.base.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base's state."""
        return self.base.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.base.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base."""
        self.base.add_param_group(param_group)
        self._join(self.param_groups[-1])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the base does, and those that `carry_gradients` has set aside."""
        self._carried.clear()
        self.base.zero_grad(set_to_none)

    def __getattr__(self, name: str) -> Any:
        # What else the base has, such as schedule-free's train() and eval().
        if name.startswith("_") or name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)

    @property
    def _shown(self) -> State:
        return self._kept

    def _descend_all(self) -> None:
        self.ledger.restore()
        for lanes in self.ledger:
            lanes.steps += 1
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if getattr(self.base, "_step_supports_amp_scaling", False) and found_inf is not None:
            base = cast("_Scaled", self.base)
            base.found_inf, base.grad_scale = found_inf, scale
            try:
                base.step()
            finally:
                del base.found_inf, base.grad_scale
            return
        if isinstance(found_inf, Tensor) and found_inf.item():
            return
        if scale is not None:
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            for grad in grads:
                grad.mul_(1.0 / scale.to(grad.device, grad.dtype))
        self.base.step()

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, and under ``"ascent"`` masks and averages of gradients, by parameter numbers."""
        out = self.base.state_dict()
        self._show_kept()
        if self._kept:
            numbers = [n for group in out["param_groups"] for n in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            pairs = zip(numbers, params, strict=True)
            out["ascent"] = {n: self._kept[p] for n, p in pairs if p in self._kept}
        return out

    def _show_kept(self) -> None:
        if self.ascent.reads_state:
            for lanes in self.ledger:
                lanes.show(self._kept)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict from `state_dict`, or a state dict of the base alone."""
        self.restore()
        kept = state_dict.get("ascent", {})
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "ascent"})
        params = [p for group in self.param_groups for p in group["params"]]
        for group in self.param_groups:
            self._join(group)
        self._kept.clear()
        self._kept.update((p, dict(kept[n])) for n, p in zip(numbers, params, strict=True) if n in kept)
        self.ledger.forget()
        self.ledger.refresh(self.param_groups, self._kept)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_copies_while_perturbed()
        self._show_kept()
        kept = ("base", "gamma", "ascent_fraction", "ascent", "_of_group", "defaults")
        return {name: vars(self)[name] for name in kept} | {"kept": dict(self._kept)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = state.pop("kept", {})
        super().__setstate__(state)
        self._begin()
        self._kept.update(own)
