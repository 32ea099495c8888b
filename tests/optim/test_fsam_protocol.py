"""FSAM's two protocols: a closure, or perturb and step; what is refused, restored, and warned of."""

import copy
import warnings

import pytest
import torch
from torch import nn

from fsam_triton import FSAM, Schedule, ops
from tests.optim.variants import MASKED, VARIANTS, every_precision, pair
from tests.problem import Problem, small_model
from tests.training import assert_same_bits, assert_unchanged, closure_of, several_groups, train, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def train_by_hand(model: nn.Module, optimizer, steps: int, *, problem=Problem(), start=0) -> None:
    for step in range(start, start + steps):
        problem.loss(model.parameters(), step).backward()
        optimizer.perturb()
        problem.loss(model.parameters(), step).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_by_familiar_names(model, optimizer, steps: int, *, problem=Problem(), start=0) -> None:
    for step in range(start, start + steps):
        problem.loss(model.parameters(), step).backward()
        optimizer.first_step(zero_grad=True)
        problem.loss(model.parameters(), step).backward()
        optimizer.second_step(zero_grad=True)


def train_with_model_zero_grad(model, optimizer, steps: int, *, problem=Problem(), start=0) -> None:
    for step in range(start, start + steps):
        for finish in (optimizer.perturb, optimizer.step):
            problem.loss(model.parameters(), step).backward()
            finish()
            model.zero_grad()


@pytest.mark.parametrize("other", [train_by_hand, train_by_familiar_names, train_with_model_zero_grad])
@pytest.mark.parametrize("variant", [VARIANTS[0], MASKED], ids=lambda variant: variant.name)
def test_protocols_give_the_same_bits(variant, other):
    models = [small_model(), small_model()]
    for model, way in zip(models, (train, other), strict=True):
        way(model, variant.optimizer(several_groups(model)), 10, problem=Problem(sparse=True))
    assert_same_bits(*models)


def test_step_calls_the_closure_twice_and_returns_the_loss_at_the_unperturbed_weights():
    model = small_model()
    optimizer, losses = FSAM(model.parameters(), rho=1.0), []
    expected = Problem().loss(model.parameters(), 0).detach()
    closure = closure_of(model, optimizer, 0)
    loss = optimizer.step(lambda: losses.append(closure()) or losses[-1])
    assert len(losses) == 2
    assert torch.equal(loss, expected)
    assert losses[1] > losses[0]


def test_closure_runs_with_gradients_enabled_under_no_grad():
    models = [small_model(), small_model()]
    train(models[0], FSAM(models[0].parameters()), 1)
    with torch.no_grad():
        train(models[1], FSAM(models[1].parameters()), 1)
    assert_same_bits(*models)


def test_step_with_a_closure_after_perturb_calls_it_once():
    models = [small_model(), small_model()]
    train(models[0], FSAM(models[0].parameters()), 1)
    optimizer, calls = FSAM(models[1].parameters()), []
    closure = closure_of(models[1], optimizer, 0)
    closure()
    optimizer.perturb()
    optimizer.step(lambda: calls.append(closure()))
    assert len(calls) == 1
    assert_same_bits(*models)


@pytest.mark.parametrize("sharp", [True, False], ids=["sharp", "plain"])
def test_closure_that_computes_no_gradients_is_refused_and_changes_nothing(sharp):
    model = small_model()
    optimizer = FSAM(model.parameters(), schedule=None if sharp else Schedule(every=2))
    train(model, optimizer, 1)
    before, state = weights_of(model), copy.deepcopy(optimizer.state_dict()["state"])

    def closure():
        optimizer.zero_grad()
        return Problem().loss(model.parameters(), 1)

    with pytest.raises(RuntimeError, match="no gradients"):
        optimizer.step(closure)
    assert_unchanged(model, before)
    for number, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[number][name]) for name, value in entry.items())


def test_closure_without_gradients_at_the_perturbed_weights_is_refused_and_changes_nothing():
    model = small_model()
    optimizer = FSAM(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = Problem().loss(model.parameters(), 0)
        if not optimizer.perturbed:
            loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="no gradients"):
        optimizer.step(closure)
    assert not optimizer.perturbed
    assert_same_bits(model, small_model())


def test_closure_whose_gradients_are_there_already_is_refused_as_one_that_computes_none():
    """Backward by hand and a closure that forgets it: the loss has no gradients of its own."""
    model = small_model()
    optimizer = FSAM(model.parameters())
    Problem().loss(model.parameters(), 0).backward()
    with pytest.raises(RuntimeError, match="no gradients"):
        optimizer.step(lambda: Problem().loss(model.parameters(), 0))
    assert_same_bits(model, small_model())


@pytest.mark.parametrize("kwargs", [{}, {"alpha": 0.4}], ids=["sam", "gsam"])
def test_gradients_of_before_do_not_count_if_the_closure_clears_them(kwargs):
    """`loss.backward(); optimizer.step(closure)`, as some loops have it: a pass too many, the same numbers."""
    models = [small_model(), small_model()]
    for model, early in zip(models, (False, True), strict=True):
        optimizer = FSAM(model.parameters(), lr=0.01, rho=0.5, **kwargs)
        for step in range(3):
            if early:
                Problem().loss(model.parameters(), step + 7).backward()
            optimizer.step(closure_of(model, optimizer, step))
    assert_same_bits(*models)


def test_closure_that_does_not_clear_adds_to_the_gradients_that_are_there():
    """Accumulation: of the gradients of before and of the closure, the first pass perturbs by the sum."""
    models, gradients = [small_model(), small_model()], []
    for model, early in zip(models, (True, False), strict=True):
        optimizer = FSAM(model.parameters(), lr=0.01, rho=0.5)
        micro_batches = [0, 1]
        if early:
            Problem().loss(model.parameters(), micro_batches.pop(0)).backward()

        def closure(model=model, steps=micro_batches, optimizer=optimizer):
            first = [] if optimizer.perturbed else steps
            losses = [Problem().loss(model.parameters(), step) for step in (first or [2])]
            for loss in losses:
                loss.backward()
            if not optimizer.perturbed:
                gradients.append([p.grad.clone() for p in model.parameters()])
            return sum(losses)

        optimizer.step(closure)
    assert all(map(torch.equal, *gradients))
    assert_same_bits(*models)


def test_perturb_without_gradients_is_refused():
    with pytest.raises(RuntimeError, match="gradient"):
        FSAM(small_model().parameters()).perturb()


def test_perturb_while_perturbed_is_refused_and_restore_still_works():
    model = small_model()
    optimizer = FSAM(model.parameters())
    for finish in (optimizer.perturb, lambda: None):
        Problem().loss(model.parameters(), 0).backward()
        finish()
    with pytest.raises(RuntimeError, match="twice"):
        optimizer.perturb()
    optimizer.restore()
    assert_same_bits(model, small_model())


def test_perturb_clears_the_gradients_it_consumed():
    model = small_model()
    optimizer = FSAM(model.parameters())
    Problem().loss(model.parameters(), 0).backward()
    optimizer.perturb()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_restore_twice_is_restore_once_and_keeps_what_was_trained_since():
    model = small_model()
    optimizer = FSAM(model.parameters(), lr=0.01)
    Problem().loss(model.parameters(), 0).backward()
    optimizer.perturb()
    optimizer.restore()
    closure_of(model, optimizer, 0)()
    optimizer.step()
    trained = weights_of(model)
    optimizer.restore()
    optimizer.restore()
    assert_unchanged(model, trained)


def test_restore_keeps_gradients_that_arrived_since_perturb():
    model, optimizer, twin, plain = pair(torch.float32, VARIANTS[0])
    Problem().loss(model.parameters(), 0).backward()
    optimizer.perturb()
    optimizer.restore()
    Problem().loss(model.parameters(), 0).backward()
    optimizer.restore()
    optimizer.step()
    train(twin, plain, 1)
    assert_same_bits(model, twin)


class SecondPassFails(Exception):
    """Raised by the closure of the next test."""


@every_precision
def test_exception_in_the_second_pass_propagates_and_leaves_weights_and_moments_as_they_were(dtype, kwargs):
    model = small_model(dtype)
    optimizer = MASKED.optimizer(model.named_parameters(), **kwargs)
    train(model, optimizer, 2)
    before, states = weights_of(model), copy.deepcopy(optimizer.state_dict()["state"])
    closure, calls = closure_of(model, optimizer, 2), []

    def failing():
        calls.append(None)
        if len(calls) == 2:
            raise SecondPassFails
        return closure()

    with pytest.raises(SecondPassFails):
        optimizer.step(failing)
    assert not optimizer.perturbed
    assert_unchanged(model, before)
    for key, state in optimizer.state_dict()["state"].items():
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(state[name], states[key][name])


def test_training_after_a_failed_second_pass_equals_training_without_it():
    model, twin = small_model(), small_model()
    optimizer, expected = FSAM(model.parameters()), FSAM(twin.parameters())
    losses = iter([closure_of(model, optimizer, 0)])
    with pytest.raises(StopIteration):
        optimizer.step(lambda: next(losses)())
    train(model, optimizer, 5)
    train(twin, expected, 5)
    assert_same_bits(model, twin)


def test_perturbed_weights_perturbs_inside_and_restores_after():
    model = small_model()
    optimizer = FSAM(model.parameters(), rho=1.0)
    Problem().loss(model.parameters(), 0).backward()
    with optimizer.perturbed_weights():
        assert optimizer.perturbed
        assert not torch.equal(model["dense"].weight, small_model()["dense"].weight)
    assert not optimizer.perturbed
    assert_same_bits(model, small_model())


def test_perturbed_weights_restores_when_its_body_raises():
    model = small_model()
    optimizer = FSAM(model.parameters(), rho=1.0)
    Problem().loss(model.parameters(), 0).backward()
    with pytest.raises(SecondPassFails), optimizer.perturbed_weights():
        raise SecondPassFails
    assert not optimizer.perturbed
    assert_same_bits(model, small_model())


def test_perturb_that_fails_half_way_puts_the_clean_weights_back(monkeypatch):
    """In the second of two launches, which parameters of two types need."""
    model, twin = (small_model() for _ in range(2))
    for each in (model, twin):
        each["head"].double()
    optimizer = FSAM(model.parameters())
    closure_of(model, optimizer, 0)()
    whole, calls = ops.perturb_, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        whole(*args)

    monkeypatch.setattr(ops, "perturb_", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.perturb()
    assert not optimizer.perturbed
    assert_same_bits(model, twin)


# -- five steps without a perturbation ---------------------------------------------------------------------------------


def plain_steps(optimizer, model: nn.Module, steps: int, *, perturb_at=()) -> list[str]:
    """Backward and step, as a loop for AdamW has them; the texts of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            closure_of(model, optimizer, step)()
            if step in perturb_at:
                optimizer.perturb()
                closure_of(model, optimizer, step)()
            optimizer.step()
    return [str(warning.message) for warning in caught]


def test_fifth_step_that_was_not_perturbed_warns_once():
    model = small_model()
    optimizer = FSAM(model.parameters())
    assert not plain_steps(optimizer, model, 4)
    (text,) = plain_steps(optimizer, model, 10)
    assert "FSAM" in text
    assert "perturb()" in text


@pytest.mark.parametrize(
    "kwargs",
    [{"rho": 0.0}, {"schedule": Schedule(last=0.5, total_steps=20)}, {"schedule": Schedule(every=100)}],
    ids=["rho_zero", "not_yet_sharp", "rarely_sharp"],
)
def test_plain_steps_that_are_wanted_do_not_warn(kwargs):
    model = small_model()
    assert not plain_steps(FSAM(model.parameters(), **kwargs), model, 10)


def test_steps_after_a_perturbed_one_do_not_warn():
    """Somebody who perturbs at some steps knows what the others are."""
    model = small_model()
    assert not plain_steps(FSAM(model.parameters()), model, 12, perturb_at={0})
    model = small_model()
    assert not plain_steps(FSAM(model.parameters()), model, 12, perturb_at={3})


def test_steps_with_a_closure_do_not_warn():
    model = small_model()
    optimizer = FSAM(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 8)
