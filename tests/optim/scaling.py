"""Steps under a torch.amp.GradScaler, and the same ones without.

Scales are powers of two, so scaled gradients have the digits of the unscaled ones, and results can be compared to the
bit.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from fsam_triton import FSAM, FisherMask, Schedule
from tests.problem import Problem, small_model
from tests.training import passes_of

VARIANTS = {
    "sam": {},
    "adaptive": {"adaptive": True},
    "fisher": {"mask": FisherMask(0.3)},
    "fisher_interval": {"mask": FisherMask(0.3, interval=2)},
    "fisher_samples": {"mask": FisherMask(0.3, interval=4, samples=3, excluded="never"), "mask_norm": "masked"},
    "gsam": {"alpha": 0.4},
    "fisher_gsam": {"alpha": 0.4, "mask": FisherMask(0.3, interval=3), "max_grad_norm": 3.0},
    "esam": {"beta": 0.5},
    "esam_tensors": {"beta": 0.5, "beta_per": "tensor"},
    "looksam": {"schedule": Schedule(every=2, reuse=0.7)},
    "warm_up": {"schedule": Schedule(rho_warmup=4), "l2_sp": 0.1},
    "clipped": {"max_grad_norm": 3.0},
    "flat": {"flatten": True, "alpha": 0.4},
}
every_variant = pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())

PRECISIONS = {
    "fp64": (torch.float64, {}),
    "fp32": (torch.float32, {}),
    "fp16": (torch.float16, {}),
    "fp16_master": (torch.float16, {"master_weights": True}),
}
every_precision = pytest.mark.parametrize(("dtype", "kwargs"), PRECISIONS.values(), ids=PRECISIONS.keys())

# How either pass can overflow: a coordinate becomes this.
NON_FINITE = [float("inf"), float("nan")]


def pair(dtype=torch.float32, **kwargs) -> tuple[nn.ModuleDict, FSAM]:
    model = small_model(dtype)
    return model, FSAM(model.named_parameters(), **{"lr": 0.01, "rho": 0.5, **kwargs})


def nothing(model: nn.Module) -> None:
    pass


def scaled_step(
    model: nn.Module,
    optimizer: FSAM,
    scaler: GradScaler,
    step: int,
    *,
    first: Callable[[nn.Module], None] = nothing,
    second: Callable[[nn.Module], None] = nothing,
    unscale: bool = False,
) -> None:
    """A step with passes as in `train_apart`; `first` and `second` may change the gradients of the two passes."""
    optimizer.zero_grad()
    at, again = passes_of(step)
    scaler.scale(Problem().loss(model.parameters(), at)).backward()
    first(model)
    if optimizer.is_sharp:
        optimizer.perturb(scaler)
        scaler.scale(Problem().loss(model.parameters(), again)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    second(model)
    scaler.step(optimizer)
    scaler.update()


def plain_step(model: nn.Module, optimizer: FSAM, step: int, second: Callable[[nn.Module], None] = nothing) -> None:
    """The same without a scaler."""
    scaled_step(model, optimizer, GradScaler("cpu", enabled=False), step, second=second)


def spoil_with(value: float) -> Callable[[nn.Module], None]:
    def spoil(model: nn.Module) -> None:
        model["dense"].weight.grad[3, 5] = value

    return spoil


def moments_of(optimizer) -> list[Tensor]:
    """Copies of everything in the state but masks: moments, counts, anchors, master weights."""
    state = optimizer.state_dict()["state"]
    return [v.clone() for entry in state.values() for name, v in entry.items() if name != "mask"]


def assert_same_moments(optimizer, expected: list[Tensor]) -> None:
    for actual, wanted in zip(moments_of(optimizer), expected, strict=True):
        assert torch.equal(actual, wanted)


def assert_finite(model: nn.Module, optimizer) -> None:
    assert all(value.isfinite().all() for value in [*model.parameters(), *moments_of(optimizer)])


def cast_loss(model: nn.Module, step: int) -> Tensor:
    """A `Problem` whose gradients go through fp16 on their way, as under autocast: above 65504 they overflow."""
    return Problem().loss([p.half().float() for p in model.parameters()], step)


def cast_step(model: nn.Module, optimizer: FSAM, scaler: GradScaler, step: int) -> None:
    """Both passes with the same loss."""
    optimizer.zero_grad()
    scaler.scale(cast_loss(model, step)).backward()
    optimizer.perturb(scaler)
    scaler.scale(cast_loss(model, step)).backward()
    scaler.step(optimizer)
    scaler.update()
