"""When MomentumSAM's parameters are perturbed and when they are clean; train(), eval(), restore(); its arguments."""

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import AdamWL2SP, ArgumentError, MomentumSAM, Schedule
from tests.optim.momentum import (
    Objective,
    backward,
    clean_weights,
    every_precision,
    pair,
    perturbed_weights,
    same,
    train,
)
from tests.problem import Problem, small_model
from tests.training import assert_unchanged, largest_allocation, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


# -- perturbed from the forward pass to the step -----------------------------------------------------------------------


@every_precision
def test_forward_pass_perturbs_and_restore_brings_back_every_bit(dtype, kwargs):
    model, optimizer = pair(dtype, rho=4.0, **kwargs)
    # Parameters with other numbers of updates.
    train(model, optimizer, 4, problem=Problem(sparse=True))
    clean = weights_of(model)
    assert not optimizer.perturbed
    seen = []
    for _ in range(2):
        Objective(model)(4)
        assert optimizer.perturbed
        assert same(model.state_dict().values(), clean)
        seen.append(weights_of(model))
        optimizer.restore()
        assert not optimizer.perturbed
        assert_unchanged(model, clean)
        optimizer.restore()
        assert_unchanged(model, clean)
    assert not same(seen[0], clean)
    assert same(*seen)


def test_forward_passes_before_the_step_see_the_same_perturbed_weights():
    model, optimizer = pair()
    train(model, optimizer, 2)
    Objective(model)(2)
    perturbed = weights_of(model)
    Objective(model)(3)
    optimizer.perturb()
    assert_unchanged(model, perturbed)


def test_first_step_is_not_perturbed():
    model, optimizer = pair()
    backward(model, optimizer, 0)
    assert not optimizer.perturbed
    assert_unchanged(model, list(small_model().parameters()))
    optimizer.step()
    backward(model, optimizer, 1)
    assert optimizer.perturbed


@every_precision
def test_parameters_are_clean_after_each_step(dtype, kwargs):
    model, optimizer = pair(dtype, rho=4.0, **kwargs)
    for step in range(4):
        backward(model, optimizer, step)
        optimizer.step()
        assert not optimizer.perturbed
        assert same(model.parameters(), model.state_dict().values())
        assert all(optimizer.clean_weight(p) is None for p in model.parameters())


def test_perturbed_parameter_without_a_gradient_is_clean_after_the_step():
    model, optimizer = pair(rho=4.0)
    train(model, optimizer, 2)
    before = model["head"].weight.detach().clone()
    backward(model, optimizer, 2)
    assert not torch.equal(model["head"].weight, before)
    model["head"].weight.grad = None
    optimizer.step()
    assert torch.equal(model["head"].weight, before)


def test_perturb_by_hand_is_what_a_forward_pass_does():
    (model, optimizer), (twin, other) = pair(), pair()
    train(model, optimizer, 4)
    for step in range(4):
        other.zero_grad()
        other.perturb()
        Problem().loss(twin.parameters(), step).backward()
        other.step()
    assert same(model.parameters(), twin.parameters())


def test_step_that_raises_leaves_clean_weights(monkeypatch):
    model, optimizer = pair()
    train(model, optimizer, 2)
    clean = weights_of(model)
    backward(model, optimizer, 2)

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(optimizer, "_update", fail)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert_unchanged(model, clean)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_closure_that_raises_leaves_clean_weights(error):
    model, optimizer = pair()
    train(model, optimizer, 2)
    clean = weights_of(model)

    def closure():
        backward(model, optimizer, 2)
        raise error

    with pytest.raises(error):
        optimizer.step(closure)
    assert_unchanged(model, clean)
    assert not optimizer.perturbed


def test_closure_is_called_once_with_gradients_enabled_and_its_loss_returned():
    model, optimizer = pair()
    train(model, optimizer, 1)
    losses, seen = [], []

    def closure():
        losses.append(backward(model, optimizer, 1))
        seen.append(optimizer.perturbed)
        return losses[-1]

    with torch.no_grad():
        assert optimizer.step(closure) is losses[0]
    assert seen == [True]


def test_step_hooks_are_called_once_a_step():
    AdamWL2SP(small_model().parameters())
    (model, optimizer), calls = pair(), []
    optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *args: calls.append("post"))
    train(model, optimizer, 2)
    assert calls == ["pre", "post"] * 2


# -- modes -------------------------------------------------------------------------------------------------------------

SWITCHED = {
    "fp32": (torch.float32, {}),
    "fp32_clipped": (torch.float32, {"max_grad_norm": 5.0}),
    "bf16": (torch.bfloat16, {}),
    "bf16_to_nearest": (torch.bfloat16, {"stochastic_rounding": False}),
    "bf16_flat": (torch.bfloat16, {"flatten": True}),
    "bf16_master": (torch.bfloat16, {"master_weights": True}),
}


@pytest.mark.parametrize(("dtype", "kwargs"), SWITCHED.values(), ids=SWITCHED.keys())
def test_eval_and_train_at_every_step_change_no_bit_of_the_run(dtype, kwargs):
    problem = Problem(sparse=True)
    models, optimizers = zip(*(pair(dtype, **kwargs) for _ in range(2)), strict=True)
    train(models[0], optimizers[0], 12, problem=problem)
    for step in range(12):
        optimizers[1].train()
        train(models[1], optimizers[1], 1, problem=problem, start=step)
        optimizers[1].eval()
    assert same(models[0].parameters(), models[1].parameters())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_accumulated_before_eval_and_train_are_kept(dtype):
    problem = Problem(curvature=0.0, sparse=True)
    (model, optimizer), (twin, straight) = pair(dtype), pair(dtype)
    train(twin, straight, 6, problem=problem)
    for step in range(6):
        for fraction in (0.25, 0.75):
            (fraction * Objective(model, problem)(step)).backward()
            optimizer.eval()
            optimizer.train()
        optimizer.step()
        optimizer.zero_grad()
    assert same(model.parameters(), twin.parameters())


def test_eval_keeps_clean_weights_in_all_forward_passes_until_train():
    model, optimizer = pair()
    train(model, optimizer, 2)
    clean = weights_of(model)
    Objective(model)(2)
    optimizer.eval()
    assert_unchanged(model, clean)
    optimizer.eval()
    Objective(model)(2)
    assert_unchanged(model, clean)
    optimizer.train()
    assert_unchanged(model, clean)
    Objective(model)(2)
    assert optimizer.perturbed


def test_eval_before_the_first_step_changes_nothing():
    (model, optimizer), (twin, straight) = pair(), pair()
    optimizer.eval()
    optimizer.train()
    train(model, optimizer, 3)
    train(twin, straight, 3)
    assert same(model.parameters(), twin.parameters())


def test_step_and_perturb_in_eval_mode_are_refused_and_the_closure_is_not_called():
    model, optimizer = pair()
    train(model, optimizer, 2)
    optimizer.eval()
    clean = weights_of(model)
    with pytest.raises(RuntimeError, match=r"train\(\)"):
        optimizer.step(lambda: pytest.fail("the closure was called"))
    with pytest.raises(RuntimeError, match=r"train\(\)"):
        optimizer.perturb()
    assert_unchanged(model, clean)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_restore_brings_the_clean_weights_into_a_model_that_was_cast_while_perturbed(dtype):
    model, optimizer = pair()
    train(model, optimizer, 2)
    clean = [weight.to(dtype) for weight in clean_weights(model)]
    Objective(model)(2)
    model.to(dtype)
    assert same(model.state_dict().values(), clean)
    optimizer.restore()
    assert same(model.parameters(), clean)


# -- models that are not modules ---------------------------------------------------------------------------------------


def take_steps_without_modules(steps: int, **kwargs) -> MomentumSAM:
    weight = nn.Parameter(torch.ones(4))
    optimizer = MomentumSAM([weight], lr=0.01, **kwargs)
    for _ in range(steps):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    return optimizer


def test_five_steps_at_clean_weights_warn_once():
    # The first one has no momentum to perturb along, and does not count.
    with pytest.warns(UserWarning, match=r"5 steps at clean weights.*perturb\(\)") as caught:
        take_steps_without_modules(20)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "kwargs", [{"rho": 0.0}, {"schedule": Schedule(last=0.1, total_steps=100)}], ids=["rho", "late"]
)
def test_steps_that_are_to_be_clean_do_not_warn(kwargs):
    take_steps_without_modules(20, **kwargs)


@pytest.mark.filterwarnings("error")
def test_five_steps_do_not_warn_if_some_are_perturbed():
    model, optimizer = pair()
    for step in range(20):
        optimizer.zero_grad()
        if step % 4 == 0:
            optimizer.perturb()
        Problem().loss(model.parameters(), step).backward()
        optimizer.step()


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value", "name"),
    [
        ("rho", -1.0, "rho"),
        ("rho", float("nan"), "rho"),
        ("schedule", "cosine", "schedule"),
        ("schedule", Schedule(every=2), "schedule.every"),
        ("schedule", Schedule(every=2, reuse=0.5), "schedule.every"),
        ("schedule", Schedule(rho_follows="lr", rho_min=1.0), "rho_min"),
        ("rule", "adagrad", "rule"),
        ("rule", "sgd", "momentum"),
        ("lr", -1.0, "learning rate"),
        ("l2_sp", -1.0, "l2_sp"),
        ("max_grad_norm", 0.0, "max_grad_norm"),
    ],
)
def test_bad_argument_is_refused_by_name(argument, value, name):
    with pytest.raises(ArgumentError) as error:
        MomentumSAM(small_model().parameters(), **{argument: value})
    assert error.value.name == name


def test_bad_rho_of_a_group_is_refused():
    with pytest.raises(ArgumentError) as error:
        MomentumSAM([{"params": small_model().parameters(), "rho": -1.0}])
    assert (error.value.name, error.value.value) == ("rho", -1.0)


def test_optimizer_that_was_refused_watches_no_forward_passes():
    hooks = nn.modules.module._global_forward_pre_hooks
    before = len(hooks)
    with pytest.raises(ArgumentError):
        MomentumSAM(small_model().parameters(), rho=-1.0)
    assert len(hooks) == before


# -- memory ------------------------------------------------------------------------------------------------------------

MEMORY = {
    "fp32": (torch.float32, {"l2_sp": 0.1}),
    "clipped": (torch.float32, {"max_grad_norm": 1.0}),
    "bf16": (torch.bfloat16, {}),
    "bf16_master": (torch.bfloat16, {"master_weights": True}),
}


def stepper(dtype: torch.dtype, kwargs: dict) -> tuple[Tensor, MomentumSAM]:
    weight = nn.Parameter(torch.randn(2**18).to(dtype))
    optimizer = MomentumSAM([weight], **kwargs)
    weight.grad = torch.randn_like(weight)
    for _ in range(2):
        optimizer.perturb()
        optimizer.step()
    return weight, optimizer


@pytest.mark.parametrize(("dtype", "kwargs"), MEMORY.values(), ids=MEMORY.keys())
def test_perturbation_step_and_restore_allocate_nothing_of_the_parameters_size(dtype, kwargs):
    weight, optimizer = stepper(dtype, kwargs)
    for action in (optimizer.perturb, optimizer.step, optimizer.perturb, optimizer.restore):
        assert largest_allocation(action) < weight.numel() // 8


@pytest.mark.parametrize(
    ("dtype", "kwargs", "sizes"),
    [
        (torch.float32, {}, [4, 4, 4]),
        (torch.bfloat16, {}, [2, 2, 2]),
        # The remainder of the masters is 16 bits wide.
        (torch.bfloat16, {"master_weights": True}, [2, 2, 4, 4]),
    ],
    ids=["fp32", "bf16", "bf16_master"],
)
def test_two_moments_and_one_copy_of_the_weights_are_kept(dtype, kwargs, sizes):
    weight, optimizer = stepper(dtype, kwargs)
    (lanes,) = optimizer.ledger
    assert sorted(lane.element_size() for lane in lanes.lanes.values()) == sizes
    assert all(lane.numel() == weight.numel() for lane in lanes.lanes.values())


def test_perturbed_weights_are_as_far_from_the_clean_ones_as_rho_says():
    model, optimizer = pair(rho=0.25)
    train(model, optimizer, 3)
    shown = perturbed_weights(model, optimizer)
    moved = torch.cat([(a - b).flatten() for a, b in zip(shown, weights_of(model), strict=True)])
    assert float(moved.norm()) == pytest.approx(0.25, rel=1e-4)
