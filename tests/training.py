"""Training on a `Problem`, and what tests of optimizers ask of it afterwards."""

import io
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from fsam_triton.kernels import build
from tests.problem import Problem


def closure_of(model: nn.Module, optimizer, step: int, problem=Problem()) -> Callable[[], Tensor]:
    def closure():
        optimizer.zero_grad()
        loss = problem.loss(model.parameters(), step)
        loss.backward()
        return loss

    return closure


def train(model: nn.Module, optimizer, steps: int, *, problem=Problem(), start=0) -> None:
    for step in range(start, start + steps):
        optimizer.step(closure_of(model, optimizer, step, problem))


def passes_of(step: int) -> tuple[int, int]:
    """The steps of a problem that `train_apart` takes the two gradients of a step from."""
    return 2 * step, 2 * step + 1


def train_apart(model: nn.Module, optimizer, steps: int, *, problem=Problem(), start=0) -> None:
    """By hand, the two passes with linear terms of their own: their gradients are as good as orthogonal."""
    for step in range(start, start + steps):
        first, second = passes_of(step)
        closure_of(model, optimizer, first, problem)()
        if optimizer.is_sharp:
            optimizer.perturb()
            problem.loss(model.parameters(), second).backward()
        optimizer.step()


def gradients_apart(problem: Problem, step: int) -> Callable[[list[Tensor]], list[Tensor | None]]:
    """What a reference's step takes for the same: the first call gives the first gradients."""
    passes: Iterator[int] = iter(passes_of(step))
    return lambda weights: problem.gradients(weights, next(passes))


def several_groups(model: nn.Module) -> list[dict]:
    named = list(model.named_parameters())
    return [
        {"params": named[:2], "lr": 0.01, "rho": 0.2},
        {"params": named[2:4], "lr": 0.002, "weight_decay": 0.3},
        {"params": named[4:], "lr": 0.005, "rho": 1.0, "betas": (0.8, 0.95)},
    ]


def weights_of(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_same_bits(model: nn.Module, other: nn.Module) -> None:
    for (name, actual), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(actual, expected), name


def assert_unchanged(model: nn.Module, weights: list[Tensor]) -> None:
    for (name, actual), expected in zip(model.named_parameters(), weights, strict=True):
        assert torch.equal(actual, expected), name


def round_trip(value):
    """What torch.save and a safe torch.load make of a value."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def largest_allocation(action: Callable[[], None]) -> int:
    """The largest number of bytes that `action` asks the CPU allocator for at once.

    Without a compiler the test is skipped: passes are then PyTorch's operations, whose intermediate results are as
    large as the parameters.
    """
    if not build.available():
        pytest.skip("no C++ compiler")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    events = profile.profiler.kineto_results.events()
    return max((event.nbytes() for event in events if event.name() == "[memory]"), default=0)
