"""What tests of MomentumSAM share: a model that is called, and the comparison with the fp64 reference."""

import math
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import MomentumSAM
from tests.fp64_optimizers import ReferenceMomentumSAM, global_norm
from tests.problem import Problem, assert_weights_close, rounding_bound, small_model

PRECISIONS = {
    "fp64": (torch.float64, {}),
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "fp16": (torch.float16, {}),
    "bf16_master": (torch.bfloat16, {"master_weights": True}),
}
every_precision = pytest.mark.parametrize(("dtype", "kwargs"), PRECISIONS.values(), ids=PRECISIONS.keys())


class Objective(nn.Module):
    """A model whose output is the loss of a `Problem` at a step."""

    def __init__(self, model: nn.Module, problem: Problem = Problem()):
        super().__init__()
        self.model, self.problem = model, problem

    def forward(self, step: int) -> Tensor:
        return self.problem.loss(self.model.parameters(), step)


def pair(dtype=torch.float32, **kwargs) -> tuple[nn.Module, MomentumSAM]:
    model = small_model(dtype)
    return model, MomentumSAM(model.named_parameters(), **{"lr": 0.01, "rho": 0.5, **kwargs})


def backward(model: nn.Module, optimizer, step: int, problem: Problem = Problem()) -> Tensor:
    """The gradients of a step, taken at the perturbed weights."""
    optimizer.zero_grad()
    loss = Objective(model, problem)(step)
    loss.backward()
    return loss


def train(model: nn.Module, optimizer, steps: int, *, problem: Problem = Problem(), start: int = 0) -> None:
    for step in range(start, start + steps):
        backward(model, optimizer, step, problem)
        optimizer.step()


def clean_weights(model: nn.Module) -> list[Tensor]:
    return [weight.clone() for weight in model.state_dict().values()]


def perturbed_weights(model: nn.Module, optimizer: MomentumSAM) -> list[Tensor]:
    """What the next forward pass will see."""
    optimizer.perturb()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.restore()
    return weights


def same(tensors: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def follow(
    reference: ReferenceMomentumSAM,
    problem: Problem,
    steps: int,
    *,
    start: int = 0,
    rho_of: Callable[[int], float] | None = None,
) -> float:
    """Train the reference; the smallest norm that its moment had. `rho_of` (step) is the radius of all groups."""
    smallest = math.inf
    for step in range(start, start + steps):
        for entry in reference.entries if rho_of else ():
            entry.group["rho"] = rho_of(step)
        reference.step(lambda weights, step=step: problem.gradients(weights, step))
        smallest = min(smallest, global_norm(entry.exp_avg for entry in reference.entries))
    return smallest


def eps_bound(reference: ReferenceMomentumSAM, norm: float, dtype: torch.dtype) -> float:
    """How far eps = -rho * m / norm may be from exact arithmetic, with a moment of at least this norm.

    With |g| and |m| at most 1.5, n weights and u = eps / 2:
      norm^2: three sums of n terms of together at most 1.5^2 n, each rounded at most n times   ->  2.25 n^2 u
      m: 51 u, as in `rounding_bound`; eps: three more roundings (scale, product, stored moment)
    """
    u = torch.finfo(dtype).eps / 2
    n = sum(entry.weight.numel() for entry in reference.entries)
    of_norm = 2.25 * n * n * u / (2 * norm**2)
    rho = max(float(entry.group["rho"]) for entry in reference.entries)
    return rho / norm * (51 * u + 1.5 * (of_norm + 3 * u))


def assert_equals_reference(
    model: nn.Module,
    optimizer: MomentumSAM,
    reference: ReferenceMomentumSAM,
    norm: float,
    steps: int,
    lr: float,
    *,
    curvature: float = 0.25,
) -> None:
    """Clean and perturbed weights. An error of eps changes gradients as one of weights does; see `rounding_bound`."""
    parameters = list(model.parameters())
    of_eps = eps_bound(reference, norm, parameters[0].dtype)
    extra = 2 * of_eps * lr * steps * 8 * curvature * math.exp(8 * curvature * lr * steps)
    assert_weights_close(parameters, reference.weights, steps, lr, curvature=curvature, extra=extra)
    for weight, exact in zip(perturbed_weights(model, optimizer), reference.perturbed, strict=True):
        bound = 2 * rounding_bound(steps, lr, weight, curvature) + extra + 2 * of_eps
        assert float((weight.double() - exact).abs().max()) <= bound
