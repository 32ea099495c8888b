"""Rules: the arguments of what an optimizer makes of a gradient. Their arithmetic is in `kernels/`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, ClassVar, TypeGuard

from torch import Tensor

from ..errors import check
from ..kernels import spec


def is_finite(value: object) -> TypeGuard[float]:
    """Whether it is a real number, neither infinite nor NaN."""
    return isinstance(value, Real) and math.isfinite(value)


class Rule:
    """A rule by its name in `kernels.spec`.

    Attributes:
        name: in `kernels.spec.DESCEND` and `STATE`.
        defaults: the rule's own arguments, all per group.
        weight_decay: its default.
    """

    name: str
    defaults: ClassVar[Mapping[str, Any]]
    weight_decay: float

    @staticmethod
    def check(group: Mapping[str, Any]) -> None:
        """Raise an ArgumentError if one of the rule's own arguments is out of its range."""
        raise NotImplementedError

    def lanes(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of the state that a group's parameters need."""
        return spec.STATE[self.name]

    def required(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """What a parameter's state must have to be taken for one of this rule."""
        return ("step", *spec.STATE[self.name][:2])

    def hyper(self, group: Mapping[str, Any]) -> tuple[float | Tensor, ...]:
        """The rule's own columns of `kernels.spec.NUMBERS`, of a group."""
        raise NotImplementedError


def _check_betas(betas: Any) -> None:
    check(isinstance(betas, tuple | list) and len(betas) == 2, "betas", betas, "must be two numbers")
    for i, beta in enumerate(betas):
        fits = isinstance(beta, Tensor) or (is_finite(beta) and 0 <= beta < 1)
        check(fits, f"beta parameter at index {i}", beta, "must be in [0, 1)")


class AdamW(Rule):
    """AdamW (arXiv 1711.05101): betas, eps, amsgrad as torch.optim.AdamW has them."""

    name = "adamw"
    defaults: ClassVar[Mapping[str, Any]] = {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}
    weight_decay: float = 1e-2

    @staticmethod
    def check(group: Mapping[str, Any]) -> None:
        _check_betas(group["betas"])
        check(is_finite(group["eps"]) and group["eps"] >= 0, "eps", group["eps"], "must be a finite number >= 0")

    def lanes(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return spec.STATE[self.name][: 3 if group["amsgrad"] else 2]

    def hyper(self, group: Mapping[str, Any]) -> tuple[float | Tensor, ...]:
        return (*group["betas"], group["eps"])


class SGD(Rule):
    """SGD: momentum, dampening, nesterov as torch.optim.SGD has them; decay is a part of the gradient, as there."""

    name = "sgd"
    defaults: ClassVar[Mapping[str, Any]] = {"momentum": 0.0, "dampening": 0.0, "nesterov": False}
    weight_decay: float = 0.0

    @staticmethod
    def check(group: Mapping[str, Any]) -> None:
        momentum, dampening = group["momentum"], group["dampening"]
        check(is_finite(momentum) and momentum >= 0, "momentum", momentum, "must be a finite number >= 0")
        check(is_finite(dampening), "dampening", dampening, "must be a finite number")
        fits = not group["nesterov"] or (momentum > 0 and dampening == 0)
        check(fits, "nesterov", group["nesterov"], "needs momentum > 0 and dampening = 0")

    def lanes(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return spec.STATE[self.name] if group["momentum"] > 0 else ()

    def required(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        # torch.optim.SGD counts no steps.
        return self.lanes(group)

    def hyper(self, group: Mapping[str, Any]) -> tuple[float | Tensor, ...]:
        momentum, nesterov = group["momentum"], group["nesterov"]
        return momentum, 1.0 - group["dampening"], float(nesterov), momentum if nesterov else 1.0


class Lion(Rule):
    """Lion (arXiv 2302.06675): betas (0.9, 0.99); decoupled decay."""

    name = "lion"
    defaults: ClassVar[Mapping[str, Any]] = {"betas": (0.9, 0.99)}
    weight_decay: float = 0.0

    @staticmethod
    def check(group: Mapping[str, Any]) -> None:
        _check_betas(group["betas"])

    def required(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        # Nothing depends on the count of steps, and other implementations keep none.
        return self.lanes(group)

    def hyper(self, group: Mapping[str, Any]) -> tuple[float | Tensor, ...]:
        return tuple(group["betas"])


RULES: dict[str, Rule] = {rule.name: rule for rule in (AdamW(), SGD(), Lion())}
