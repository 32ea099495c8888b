"""Rules: arguments and coefficients of what an optimizer makes of a gradient. Their arithmetic is in `kernels/`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import check
from ..kernels import spec


def is_finite(value: object) -> bool:
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
        """The rule's own numbers of a group."""
        raise NotImplementedError

    def columns(self, lr: Tensor, rate: Tensor, hyper: Tensor, step: Tensor) -> dict[str, Tensor]:
        """The rule's columns of `kernels.spec.DESCEND`, fp64 [n] each, and "decay".

        Args:
            lr, rate: learning rate and decay rate, fp64 [n].
            hyper: what `hyper` gives, fp64 [n, numbers].
            step: updates including this one, fp64 [n].
        """
        raise NotImplementedError


def _check_betas(betas: Any) -> None:
    check(isinstance(betas, tuple | list) and len(betas) == 2, "betas", betas, "must be two numbers")
    for i, beta in enumerate(betas):
        fits = isinstance(beta, Tensor) or (is_finite(beta) and 0 <= beta < 1)
        check(fits, f"beta parameter at index {i}", beta, "must be in [0, 1)")


class AdamW(Rule):
    """AdamW (arXiv 1711.05101): betas, eps, amsgrad as torch.optim.AdamW has them."""

    name = "adamw"
    defaults: ClassVar = {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}
    weight_decay = 1e-2

    @staticmethod
    def check(group: Mapping[str, Any]) -> None:
        _check_betas(group["betas"])
        check(is_finite(group["eps"]) and group["eps"] >= 0, "eps", group["eps"], "must be a finite number >= 0")

    def lanes(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return spec.STATE[self.name][: 3 if group["amsgrad"] else 2]

    def hyper(self, group: Mapping[str, Any]) -> tuple[float | Tensor, ...]:
        return (*group["betas"], group["eps"])

    def columns(self, lr: Tensor, rate: Tensor, hyper: Tensor, step: Tensor) -> dict[str, Tensor]:
        betas = hyper[:, :2]
        new1, new2 = torch.rsub(betas, 1).unbind(1)
        bias1, bias2 = torch.rsub(betas ** step[:, None], 1).unbind(1)
        return {
            "decay": lr * rate,
            "new1": new1,
            "beta2": betas[:, 1],
            "new2": new2,
            "step_size": lr / bias1,
            "inv_sqrt_bias2": bias2.rsqrt(),
            "eps": hyper[:, 2],
        }


class SGD(Rule):
    """SGD: momentum, dampening, nesterov as torch.optim.SGD has them; decay is a part of the gradient, as there."""

    name = "sgd"
    defaults: ClassVar = {"momentum": 0.0, "dampening": 0.0, "nesterov": False}
    weight_decay = 0.0

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

    def columns(self, lr: Tensor, rate: Tensor, hyper: Tensor, step: Tensor) -> dict[str, Tensor]:
        momentum, new, of_grad, of_buffer = hyper.unbind(1)
        # The first gradient is the first momentum, undampened.
        first = step <= 1
        return {
            "decay": rate,
            "momentum": torch.where(first, 0.0, momentum),
            "new": torch.where(first, torch.ones_like(new), new),
            "of_grad": of_grad,
            "of_buffer": of_buffer,
            "lr": lr,
        }


class Lion(Rule):
    """Lion (arXiv 2302.06675): betas (0.9, 0.99); decoupled decay."""

    name = "lion"
    defaults: ClassVar = {"betas": (0.9, 0.99)}
    weight_decay = 0.0

    @staticmethod
    def check(group: Mapping[str, Any]) -> None:
        _check_betas(group["betas"])

    def required(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        # Nothing depends on the count of steps, and other implementations keep none.
        return self.lanes(group)

    def hyper(self, group: Mapping[str, Any]) -> tuple[float | Tensor, ...]:
        return tuple(group["betas"])

    def columns(self, lr: Tensor, rate: Tensor, hyper: Tensor, step: Tensor) -> dict[str, Tensor]:
        new1, new2 = torch.rsub(hyper, 1).unbind(1)
        return {"decay": lr * rate, "beta1": hyper[:, 0], "new1": new1, "new2": new2, "lr": lr}


RULES = {rule.name: rule for rule in (AdamW(), SGD(), Lion())}
