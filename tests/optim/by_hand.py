"""Pairs of optimizers that must do the same to the same model: PyTorch's AdamW, or SAM by hand over it, and ours."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, SAM, AdamWL2SP
from tests.problem import Problem, assert_weights_close

LR = 0.01


class SAMByHand(torch.optim.AdamW):
    """SAM as the paper has it (arXiv 2010.01412), with a copy of every parameter."""

    rho = 0.05
    clean: list[tuple[nn.Parameter, Tensor]] | None = None

    @torch.no_grad()
    def perturb(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        norm = sum(p.grad.double().square().sum() for p in params if p.grad is not None).sqrt()
        self.clean = [(p, p.detach().clone()) for p in params]
        for p in params:
            if p.grad is not None:
                p.add_((self.rho / (norm + 1e-12) * p.grad).to(p.dtype))
            p.grad = None

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for p, clean in self.clean or ():
            p.copy_(clean)
        self.clean = None
        super().step(closure)


@dataclass(frozen=True)
class Kind:
    """An optimizer of ours and the one whose numbers it must have; both take parameters and AdamW's options."""

    name: str
    theirs: Callable[..., torch.optim.Optimizer]
    ours: Callable[..., torch.optim.Optimizer]


def flat(kind: Callable[..., torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    return lambda params, **options: kind(params, flatten=True, **options)


KINDS = [
    Kind("adamw", torch.optim.AdamW, AdamWL2SP),
    Kind("adamw_flat", torch.optim.AdamW, flat(AdamWL2SP)),
    Kind("sam", SAMByHand, FSAM),
    Kind("sam_flat", SAMByHand, flat(FSAM)),
    Kind("sam_around_adamw", SAMByHand, lambda params, **options: SAM(torch.optim.AdamW(params, **options))),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
# Those whose state is ours.
every_state = pytest.mark.parametrize("kind", KINDS[:4], ids=lambda kind: kind.name)


def square_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A square matrix, vectors and another matrix; the values are multiples of 1/64 in [-1, 1]."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-64, 65, p.shape, generator=generator) / 64)
    return model.to(dtype)


def parameters_of(*tensors: Tensor) -> nn.ParameterList:
    """A model of parameters in the memory of these tensors."""
    return nn.ParameterList([nn.Parameter(tensor) for tensor in tensors])


def halves(optimizer: torch.optim.Optimizer) -> list[Callable[[], None]]:
    """What follows each backward pass of a step."""
    return [optimizer.perturb, optimizer.step] if hasattr(optimizer, "perturb") else [optimizer.step]


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    change: Callable[[], None] | None = None,
    *,
    set_to_none: bool = True,
    problem: Problem = Problem(),
) -> None:
    """A step with all its passes; `change` is called after each backward pass."""
    for half in halves(optimizer):
        optimizer.zero_grad(set_to_none)
        problem.loss(model.parameters(), step).backward()
        if change is not None:
            change()
        half()


def assert_states_close(optimizer, other, steps: int) -> None:
    """exp_avg forgets 3 roundings of at most 1.5 at rate 0.1; exp_avg_sq <= 2.25 keeps 3 a step; the gradient has 4."""
    for group, other_group in zip(optimizer.param_groups, other.param_groups, strict=True):
        for parameter, twin in zip(group["params"], other_group["params"], strict=True):
            state, expected = optimizer.state[parameter], other.state[twin]
            eps = torch.finfo(parameter.dtype).eps
            assert float(state["step"]) == float(expected["step"])
            torch.testing.assert_close(state["exp_avg"], expected["exp_avg"], rtol=0, atol=60 * eps)
            bound = 2.25 * (3 * steps + 8) * eps
            torch.testing.assert_close(state["exp_avg_sq"], expected["exp_avg_sq"], rtol=0, atol=bound)


Make = Callable[..., torch.optim.Optimizer]
Program = Callable[[Make], Iterable[Tensor]]


def assert_same(kind: Kind, program: Program, steps: int, lr: float = LR) -> None:
    """A program gives the same weights with both optimizers, after so many steps.

    Args:
        program: called with what makes an optimizer of parameters and options; gives the weights.
    """
    ours, theirs = (
        list(program(lambda params, make=make, **options: make(params, **{"lr": lr, **options})))
        for make in (kind.ours, kind.theirs)
    )
    assert_weights_close(ours, theirs, steps, lr)
