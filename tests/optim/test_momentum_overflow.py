"""MomentumSAM with gradients that are not finite, or missing, and under a GradScaler."""

import copy

import pytest
import torch
from torch import Tensor

from tests.optim.momentum import PRECISIONS, Objective, backward, pair, perturbed_weights, same, train
from tests.problem import small_model
from tests.training import weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

NON_FINITE = [float("nan"), float("inf"), -float("inf")]


def states_of(optimizer) -> list[Tensor]:
    return [v.clone() for e in copy.deepcopy(optimizer.state_dict()["state"]).values() for v in e.values()]


def step_with_scaler(model, optimizer, scaler, step: int, overflow: bool = False, unscaled: bool = False) -> None:
    optimizer.zero_grad()
    scaler.scale(Objective(model)(step)).backward()
    if overflow:
        model["dense"].weight.grad[3, 5] = float("inf")
    if unscaled:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("rule", [{}, {"rule": "sgd", "momentum": 0.9}, {"rule": "lion"}], ids=["adamw", "sgd", "lion"])
def test_grad_scaler_gives_the_numbers_of_unscaled_training(rule, unscaled):
    """The scale is a power of two, so scaled gradients have the same digits."""
    (model, optimizer), (twin, straight) = pair(**rule), pair(**rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(5):
        step_with_scaler(model, optimizer, scaler, step, unscaled=unscaled)
        train(twin, straight, 1, start=step)
        assert same(model.parameters(), twin.parameters())
    assert same(perturbed_weights(model, optimizer), perturbed_weights(twin, straight))


OVERFLOWS = {
    f"{name}_{'unscaled' if unscaled else 'scaled'}": (*PRECISIONS[name], unscaled)
    for name in ("fp32", "bf16", "fp16", "bf16_master")
    for unscaled in (False, True)
    # Which GradScaler refuses.
    if not (unscaled and name == "fp16")
}


@pytest.mark.parametrize(("dtype", "kwargs", "unscaled"), OVERFLOWS.values(), ids=OVERFLOWS.keys())
def test_overflow_under_grad_scaler_leaves_clean_weights_and_moments_to_the_bit(dtype, kwargs, unscaled):
    model, optimizer = pair(dtype, **kwargs)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(2):
        step_with_scaler(model, optimizer, scaler, step)
    clean, states = weights_of(model), states_of(optimizer)
    step_with_scaler(model, optimizer, scaler, 2, overflow=True, unscaled=unscaled)
    assert scaler.get_scale() == 512.0
    assert not optimizer.perturbed
    assert same(model.parameters(), clean)
    assert same(states_of(optimizer), states)
    step_with_scaler(model, optimizer, scaler, 3)
    assert not same(model.parameters(), clean)
    assert all(p.isfinite().all() for p in [*model.parameters(), *perturbed_weights(model, optimizer)])


def test_step_after_an_overflow_is_perturbed_along_the_moment_of_before():
    model, optimizer = pair()
    scaler = torch.amp.GradScaler("cpu")
    for step in range(2):
        step_with_scaler(model, optimizer, scaler, step)
    shown = perturbed_weights(model, optimizer)
    step_with_scaler(model, optimizer, scaler, 2, overflow=True)
    assert same(perturbed_weights(model, optimizer), shown)


def test_overflow_in_the_first_step_leaves_the_weights_as_they_were():
    model, optimizer = pair()
    scaler = torch.amp.GradScaler("cpu")
    step_with_scaler(model, optimizer, scaler, 0, overflow=True)
    assert same(model.parameters(), small_model().parameters())
    assert same(perturbed_weights(model, optimizer), small_model().parameters())
    step_with_scaler(model, optimizer, scaler, 1)
    assert not same(model.parameters(), small_model().parameters())


@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coordinate_with_a_non_finite_gradient_keeps_its_clean_weight_and_moments(dtype, value):
    model, optimizer = pair(dtype)
    train(model, optimizer, 2)
    weight = model["dense"].weight

    def coordinate():
        state = optimizer.state[weight]
        return [t[3, 5].item() for t in (weight, state["exp_avg"], state["exp_avg_sq"])]

    frozen, others = coordinate(), weights_of(model)
    backward(model, optimizer, 2)
    weight.grad[3, 5] = value
    optimizer.step()
    assert coordinate() == frozen
    assert not torch.equal(weight, others[0])
    train(model, optimizer, 2, start=3)
    assert coordinate() != frozen
    shown = perturbed_weights(model, optimizer)
    assert all(p.isfinite().all() for p in [*model.parameters(), *shown])
    assert not same(model.parameters(), shown)


@pytest.mark.parametrize("value", NON_FINITE)
def test_step_skipped_by_clipping_leaves_clean_weights_and_moments_to_the_bit(value):
    model, optimizer = pair(max_grad_norm=1.0)
    train(model, optimizer, 2)
    clean, states = weights_of(model), states_of(optimizer)
    backward(model, optimizer, 2)
    model["dense"].weight.grad[3, 5] = value
    optimizer.step()
    assert same(model.parameters(), clean)
    assert same(states_of(optimizer), states)


@pytest.mark.parametrize("value", NON_FINITE)
def test_moment_that_is_not_finite_perturbs_nothing(value):
    """Somebody has written it, or loaded it from a run that diverged."""
    model, optimizer = pair()
    train(model, optimizer, 2)
    clean = weights_of(model)
    optimizer.state[model["head"].bias]["exp_avg"][0] = value
    assert same(perturbed_weights(model, optimizer), clean)


def test_step_without_any_gradient_keeps_clean_weights_and_moments():
    model, optimizer = pair()
    optimizer.step()
    train(model, optimizer, 2)
    clean, states = weights_of(model), states_of(optimizer)
    Objective(model)(2)
    optimizer.zero_grad()
    optimizer.step()
    assert not optimizer.perturbed
    assert same(model.parameters(), clean)
    assert same(states_of(optimizer), states)
