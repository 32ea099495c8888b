"""LookSAM: the component that is kept from a sharpness-aware step, and what the steps between make of it."""

import copy

import pytest
import torch
from torch import nn

from fsam_triton import FSAM, AdamWL2SP, FisherMask, Schedule
from tests.fp64_optimizers import ReferenceFSAM, ReferenceMask, assert_masks_are_well_separated
from tests.problem import Problem, assert_weights_close, combination_bound, small_model
from tests.training import (
    assert_same_bits,
    assert_unchanged,
    closure_of,
    gradients_apart,
    several_groups,
    train,
    train_apart,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = [torch.float32, torch.float64]
N = sum(parameter.numel() for parameter in small_model().parameters())
EVERY, REUSE = 4, 0.5
# Adam's eps = 1, because sums of gradients can be zero; see `combination_bound`.
SHARED = {"lr": 0.01, "eps": 1.0, "rho": 0.5}
LOOKSAM = {**SHARED, "schedule": Schedule(every=EVERY, reuse=REUSE)}


def reference_of(params, **kwargs) -> ReferenceFSAM:
    return ReferenceFSAM(params, **SHARED, reuse=REUSE, is_sharp=lambda step: step % EVERY == 0, **kwargs)


def assert_close(model: nn.Module, reference: ReferenceFSAM, steps: int) -> None:
    extra = combination_bound(steps, 0.01, next(model.parameters()), REUSE, N)
    assert_weights_close(model.parameters(), reference.weights, steps, 0.01, extra=extra)


CASES = {
    "looksam": ({}, {}),
    "adaptive": ({"adaptive": True}, {"adaptive": True}),
    "l2_sp": ({"l2_sp": 0.1}, {"l2_sp": 0.1}),
    "maximize": ({"maximize": True}, {"maximize": True}),
    "clipped": ({"max_grad_norm": 3.0}, {"max_grad_norm": 3.0}),
    "masked": ({"mask": FisherMask(0.3, interval=5)}, {"mask": ReferenceMask(0.3, interval=5)}),
}


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("grouping", [lambda m: list(m.parameters()), several_groups], ids=["one", "several"])
@pytest.mark.parametrize(("ours", "theirs"), CASES.values(), ids=CASES.keys())
def test_fifty_steps_equal_the_reference(ours, theirs, grouping, dtype):
    model, problem = small_model(dtype), Problem(seed=1)
    params = grouping(model)
    reference, optimizer = reference_of(params, **theirs), FSAM(params, **LOOKSAM, **ours)
    for step in range(50):
        reference.step(gradients_apart(problem, step))
    train_apart(model, optimizer, 50, problem=problem)
    assert_masks_are_well_separated(reference, dtype)
    assert_close(model, reference, 50)


@pytest.mark.parametrize("grouping", [lambda m: list(m.parameters()), several_groups], ids=["one", "several"])
@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 3.0}, {"flatten": True}], ids=str)
def test_gradients_may_be_missing_in_any_pass(kwargs, grouping):
    model, problem = small_model(torch.float64), Problem(sparse=True)
    clips = {name: value for name, value in kwargs.items() if name == "max_grad_norm"}
    reference = reference_of(grouping(model), **clips)
    optimizer = FSAM(grouping(model), **LOOKSAM, **kwargs)
    for step in range(24):
        reference.step(gradients_apart(problem, step))
    train_apart(model, optimizer, 24, problem=problem)
    assert_close(model, reference, 24)


@pytest.mark.parametrize("flatten", [True, False])
def test_parameters_of_different_types_share_the_factors(flatten):
    model = small_model(torch.float64)
    model["dense"].float()
    parameters, problem = list(model.parameters()), Problem()
    reference, optimizer = reference_of(parameters), FSAM(parameters, flatten=flatten, **LOOKSAM)
    for step in range(12):
        reference.step(gradients_apart(problem, step))
    train_apart(model, optimizer, 12, problem=problem)
    # Rounding of some to fp32 shows in all.
    extra = combination_bound(12, 0.01, model["dense"].weight, REUSE, N)
    assert_weights_close([p.float() for p in parameters], reference.weights, 12, 0.01, extra=extra)


def test_component_of_a_tensor_that_has_no_gradient_any_more_counts_for_nothing():
    """It has one in the second pass of the first step, and never again."""
    model, problem, last = small_model(torch.float64), Problem(), 4
    reference = reference_of(model.parameters())
    optimizer = FSAM(model.parameters(), **LOOKSAM)

    def without_last(gradients: list, kept: bool) -> list:
        return [g if kept or index != last else None for index, g in enumerate(gradients)]

    for step in range(3 * EVERY):
        passes = iter([(2 * step, False), (2 * step + 1, step == 0)])

        def gradient_of(weights, passes=passes):
            number, kept = next(passes)
            return without_last(problem.gradients(weights, number), kept)

        reference.step(gradient_of)
        for number, finish in enumerate(
            (optimizer.perturb, optimizer.step) if step % EVERY == 0 else (optimizer.step,)
        ):
            gradients = problem.gradients(model.parameters(), 2 * step + number)
            for p, g in zip(model.parameters(), without_last(gradients, step == 0 and number == 1), strict=True):
                p.grad = g
            finish()
    assert_close(model, reference, 3 * EVERY)


def plain(model: nn.Module, **kwargs) -> AdamWL2SP:
    return AdamWL2SP(model.parameters(), lr=0.01, eps=1.0, **kwargs)


def test_steps_before_the_first_sharp_one_are_adamw_l2sp_to_the_bit():
    model, twin = small_model(), small_model()
    schedule = Schedule(every=2, reuse=REUSE, last=0.25, total_steps=12)
    optimizer, expected = FSAM(model.parameters(), **{**LOOKSAM, "schedule": schedule}), plain(twin)
    for trained, own in ((model, optimizer), (twin, expected)):
        train(trained, own, 9)
    assert_same_bits(model, twin)
    assert "orthogonal" not in optimizer.state_dict()["state"][0]
    train(model, optimizer, 1, start=9)
    assert "orthogonal" in optimizer.state_dict()["state"][0]


def test_sharp_steps_are_those_of_sam_to_the_bit():
    model, twin = small_model(), small_model()
    train(model, FSAM(model.parameters(), **LOOKSAM), 1)
    train(twin, FSAM(twin.parameters(), **SHARED), 1)
    assert_same_bits(model, twin)


def test_kept_component_is_the_orthogonal_part_of_the_second_gradient():
    model = small_model(torch.float64)
    optimizer, reference = FSAM(model.parameters(), **LOOKSAM), reference_of(model.parameters())
    train_apart(model, optimizer, 1)
    reference.step(gradients_apart(Problem(), 0))
    state = optimizer.state_dict()["state"]
    u = torch.finfo(torch.float64).eps / 2
    for index, entry in enumerate(reference.entries):
        # g - c g': 9 n u as in `combination_bound`, and the second gradient's own four roundings.
        torch.testing.assert_close(state[index]["orthogonal"], entry.orthogonal, rtol=0, atol=(9 * N + 8) * u)


def test_only_reuse_keeps_a_component():
    model = small_model()
    optimizer = FSAM(model.parameters(), **{**LOOKSAM, "schedule": Schedule(every=EVERY)})
    train(model, optimizer, 5)
    assert all("orthogonal" not in optimizer.state[p] for p in model.parameters())


def test_frozen_parameters_are_left_alone():
    model = small_model()
    model["dense"].requires_grad_(False)
    optimizer = FSAM(model.parameters(), **LOOKSAM)
    train(model, optimizer, 5)
    for p, before in zip(model["dense"].parameters(), small_model()["dense"].parameters(), strict=True):
        assert p not in optimizer.state
        assert torch.equal(p, before)


@pytest.mark.parametrize("grouping", [lambda m: list(m.parameters()), several_groups], ids=["one", "several"])
def test_abandoned_ascent_leaves_the_component_of_the_last_sharp_step(grouping):
    models = [small_model(), small_model()]
    for model, abandons in zip(models, (True, False), strict=True):
        optimizer = FSAM(grouping(model), **LOOKSAM)
        train(model, optimizer, 2)
        if abandons:
            # A problem with gradients for some tensors only: the others take no part in this ascent.
            closure_of(model, optimizer, 1, Problem(sparse=True))()
            optimizer.perturb()
            optimizer.restore()
        train(model, optimizer, 4, start=2)
    assert_same_bits(*models)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spoiled", [0, 1], ids=["first", "second"])
def test_steps_after_a_gradient_that_is_not_finite_are_adamw_l2sp_to_the_bit(spoiled, value):
    model, twin = small_model(), small_model()
    optimizer = FSAM(model.parameters(), **LOOKSAM)
    for number, finish in enumerate((optimizer.perturb, optimizer.step)):
        closure_of(model, optimizer, 0)()
        if number == spoiled:
            model["dense"].weight.grad[3, 5] = value
        finish()
    assert all(p.isfinite().all() for p in model.parameters())
    twin.load_state_dict(model.state_dict())
    expected = plain(twin)
    expected.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for trained, own in ((model, optimizer), (twin, expected)):
        train(trained, own, 3, start=1)
    assert_same_bits(model, twin)


@pytest.mark.parametrize("max_grad_norm", [None, 3.0])
def test_grad_scaler_whose_scale_changes_gives_the_numbers_of_unscaled_training(max_grad_norm):
    model, problem = small_model(), Problem()
    reference = reference_of(model.parameters(), max_grad_norm=max_grad_norm)
    optimizer = FSAM(model.parameters(), max_grad_norm=max_grad_norm, **LOOKSAM)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    for step in range(8):
        optimizer.zero_grad()
        scaler.scale(problem.loss(model.parameters(), 2 * step)).backward()
        if optimizer.is_sharp:
            optimizer.perturb()
            scaler.scale(problem.loss(model.parameters(), 2 * step + 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        reference.step(gradients_apart(problem, step))
    assert scaler.get_scale() == 256.0 * 2**4
    assert_close(model, reference, 8)


def test_loading_forgets_the_component_of_its_own_past():
    model, other = small_model(), small_model(seed=1)
    first, second = (
        FSAM(m.parameters(), **{**LOOKSAM, "schedule": Schedule(every=3, reuse=1.0)}) for m in (model, other)
    )
    saved = copy.deepcopy((model.state_dict(), first.state_dict()))
    train(other, second, 2)
    other.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    assert all("orthogonal" not in second.state[p] for p in other.parameters())
    train(model, first, 5)
    train(other, second, 5)
    assert_same_bits(model, other)


def test_loading_its_own_state_changes_nothing():
    model, twin = small_model(), small_model()
    optimizer, other = FSAM(model.parameters(), **LOOKSAM), FSAM(twin.parameters(), **LOOKSAM)
    train(model, optimizer, 2)
    train(twin, other, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 4, start=2)
    train(twin, other, 4, start=2)
    assert_same_bits(model, twin)


def test_failed_second_pass_leaves_the_weights_as_they_were():
    model = small_model()
    optimizer = FSAM(model.parameters(), **LOOKSAM)
    train(model, optimizer, 4)
    before, closures = weights_of(model), iter([closure_of(model, optimizer, 4)])
    with pytest.raises(StopIteration):
        optimizer.step(lambda: next(closures)())
    assert_unchanged(model, before)
    assert optimizer.is_sharp
