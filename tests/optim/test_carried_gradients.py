"""Gradients that are carried across the ascent: the update descends with them, no perturbation climbs by them."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, SAM, Schedule
from tests.training import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")


def around(params, **kwargs) -> SAM:
    return SAM(torch.optim.SGD(params, lr=0.1), **kwargs)


every_optimizer = pytest.mark.parametrize("make", [FSAM, around])


def retain(model: nn.Module) -> Tensor:
    return model(torch.ones(1, 4)).square().sum()


def forget(model: nn.Module) -> Tensor:
    return model(torch.tensor([[1.0, -2.0, 0.5, 3.0]])).sin().sum()


def step(model: nn.Module, optimizer) -> None:
    optimizer.zero_grad()
    retain(model).backward()
    optimizer.carry_gradients()
    forget(model).backward()
    if optimizer.is_sharp:
        optimizer.perturb()
        forget(model).backward()
    optimizer.step()


def step_by_hand(model: nn.Module, optimizer) -> None:
    params = list(model.parameters())
    plain = torch.autograd.grad(retain(model), params)
    optimizer.zero_grad()
    forget(model).backward()
    optimizer.perturb()
    forget(model).backward()
    for p, grad in zip(params, plain, strict=True):
        # In the order of addition of a backward pass.
        p.grad = grad + p.grad
    optimizer.step()


@every_optimizer
def test_update_descends_with_both_terms_and_climbs_by_one(make):
    model = nn.Linear(4, 3)
    twin = copy.deepcopy(model)
    optimizer, other = make(model.parameters(), rho=0.5), make(twin.parameters(), rho=0.5)
    for _ in range(4):
        step(model, optimizer)
        step_by_hand(twin, other)
    assert_same_bits(model, twin)


@every_optimizer
def test_plain_steps_descend_with_the_sum(make):
    model = nn.Linear(4, 3)
    twin = copy.deepcopy(model)
    schedule = Schedule(last=0.5, total_steps=4)
    optimizer, other = make(model.parameters(), schedule=schedule), make(twin.parameters(), rho=0.0)
    for _ in range(2):
        step(model, optimizer)
        other.zero_grad()
        (retain(twin) + forget(twin)).backward()
        other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_second_term_of_gsam_is_the_first_gradient_alone():
    """What is carried is a part of the second gradient, not of the first one."""
    model = nn.Linear(4, 3)
    twin = copy.deepcopy(model)
    optimizer, other = (FSAM(m.parameters(), rho=0.5, alpha=0.4) for m in (model, twin))
    for _ in range(3):
        step(model, optimizer)
        step_by_hand(twin, other)
    assert_same_bits(model, twin)


def test_parameters_of_one_term_alone_are_updated():
    model = nn.ModuleDict({"shared": nn.Linear(4, 3), "head": nn.Linear(3, 1)})
    head = copy.deepcopy(model["head"])
    optimizer = FSAM(model.parameters(), rho=0.5)
    model["head"](model["shared"](torch.ones(1, 4))).sum().backward()
    optimizer.carry_gradients()
    forget(model["shared"]).backward()
    optimizer.perturb()
    assert torch.equal(model["head"].weight, head.weight)
    forget(model["shared"]).backward()
    optimizer.step()
    assert not torch.equal(model["head"].weight, head.weight)


@every_optimizer
def test_zero_grad_lets_go_of_what_is_carried(make):
    model = nn.Linear(4, 3)
    optimizer = make(model.parameters(), rho=0.5)
    retain(model).backward()
    optimizer.carry_gradients()
    optimizer.zero_grad()
    forget(model).backward()
    optimizer.perturb()
    assert all(p.grad is None for p in model.parameters())


def test_carrying_without_an_ascent_is_an_error_that_changes_nothing():
    model = nn.Linear(4, 3)
    twin = copy.deepcopy(model)
    optimizer = FSAM(model.parameters())
    retain(model).backward()
    optimizer.carry_gradients()
    forget(model).backward()
    with pytest.raises(RuntimeError, match="without perturb"):
        optimizer.step()
    assert_same_bits(model, twin)


def test_carrying_twice_or_between_the_passes_is_refused():
    model = nn.Linear(4, 3)
    optimizer = FSAM(model.parameters())
    retain(model).backward()
    optimizer.carry_gradients()
    forget(model).backward()
    with pytest.raises(RuntimeError, match="once per step"):
        optimizer.carry_gradients()
    optimizer.perturb()
    with pytest.raises(RuntimeError, match="before perturb"):
        optimizer.carry_gradients()
    optimizer.restore()


def test_grad_scaler_sees_an_overflow_of_what_is_carried():
    model = nn.Linear(4, 3)
    twin = copy.deepcopy(model)
    optimizer = FSAM(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(retain(model)).backward()
    model.weight.grad[0, 0] = float("inf")
    optimizer.carry_gradients()
    scaler.scale(forget(model)).backward()
    optimizer.perturb(scaler)
    scaler.scale(forget(model)).backward()
    scaler.step(optimizer)
    assert_same_bits(model, twin)
