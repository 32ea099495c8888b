"""GSAM: the direction made of both gradients inside the update pass, and how the first one is kept."""

import functools
import weakref

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, AdamWL2SP, FisherMask, Schedule
from tests.fp64_optimizers import ReferenceFSAM, ReferenceMask, assert_masks_are_well_separated
from tests.problem import Problem, assert_weights_close, combination_bound, small_model
from tests.training import (
    assert_same_bits,
    assert_unchanged,
    closure_of,
    gradients_apart,
    largest_allocation,
    passes_of,
    several_groups,
    train,
    train_apart,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = [torch.float32, torch.float64]
N = sum(parameter.numel() for parameter in small_model().parameters())
ALPHA = 0.4
# Adam's eps = 1, because differences of gradients can be zero; see `combination_bound`.
KWARGS = {"lr": 0.01, "eps": 1.0, "rho": 0.5, "alpha": ALPHA}


def assert_close(model: nn.Module, reference: ReferenceFSAM, steps: int) -> None:
    extra = combination_bound(steps, 0.01, next(model.parameters()), ALPHA, N)
    assert_weights_close(model.parameters(), reference.weights, steps, 0.01, extra=extra)


CASES = {
    "gsam": ({}, {}),
    "adaptive": ({"adaptive": True}, {"adaptive": True}),
    "l2_sp": ({"l2_sp": 0.1}, {"l2_sp": 0.1}),
    "maximize": ({"maximize": True}, {"maximize": True}),
    "clipped": ({"max_grad_norm": 3.0}, {"max_grad_norm": 3.0}),
    "fisher_gsam": ({"mask": FisherMask(0.3, interval=5)}, {"mask": ReferenceMask(0.3, interval=5)}),
    "every_second_step": ({"schedule": Schedule(every=2)}, {"is_sharp": lambda step: step % 2 == 0}),
}


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("grouping", [list, several_groups], ids=["one_group", "several_groups"])
@pytest.mark.parametrize(("ours", "theirs"), CASES.values(), ids=CASES.keys())
def test_fifty_steps_equal_the_reference(ours, theirs, grouping, dtype):
    model, problem = small_model(dtype), Problem(seed=1)
    params = several_groups(model) if grouping is several_groups else list(model.parameters())
    reference, optimizer = ReferenceFSAM(params, **KWARGS, **theirs), FSAM(params, **KWARGS, **ours)
    for step in range(50):
        reference.step(gradients_apart(problem, step))
    train_apart(model, optimizer, 50, problem=problem)
    assert_masks_are_well_separated(reference, dtype)
    assert_close(model, reference, 50)


@pytest.mark.parametrize("grouping", [lambda model: list(model.parameters()), several_groups], ids=["one", "several"])
@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 3.0}, {"flatten": True}], ids=str)
def test_gradients_missing_in_either_pass_count_as_zeros_and_only_what_has_a_second_one_is_updated(kwargs, grouping):
    model, problem = small_model(torch.float64), Problem(sparse=True)
    clips = {name: value for name, value in kwargs.items() if name == "max_grad_norm"}
    reference = ReferenceFSAM(grouping(model), **KWARGS, **clips)
    optimizer = FSAM(grouping(model), **KWARGS, **kwargs)
    for step in range(12):
        reference.step(gradients_apart(problem, step))
    train_apart(model, optimizer, 12, problem=problem)
    assert_close(model, reference, 12)


@pytest.mark.parametrize("flatten", [True, False])
def test_parameters_of_different_types_share_the_factors(flatten):
    model = small_model(torch.float64)
    model["dense"].float()
    parameters, problem = list(model.parameters()), Problem()
    reference, optimizer = ReferenceFSAM(parameters, **KWARGS), FSAM(parameters, flatten=flatten, **KWARGS)
    for step in range(12):
        reference.step(gradients_apart(problem, step))
    train_apart(model, optimizer, 12, problem=problem)
    # Rounding of some to fp32 shows in all.
    extra = combination_bound(12, 0.01, model["dense"].weight, ALPHA, N)
    assert_weights_close([p.float() for p in parameters], reference.weights, 12, 0.01, extra=extra)


def test_gradients_that_differ_by_the_perturbation_alone_give_nearly_the_same_as_sam():
    model, twin = small_model(torch.float64), small_model(torch.float64)
    train(model, FSAM(model.parameters(), **KWARGS), 5)
    train(twin, FSAM(twin.parameters(), **{**KWARGS, "alpha": 0.0}), 5)
    # The part of g1 that is orthogonal to g2 is at most curvature * eps = 0.25 * 0.5 * 3 / sqrt(568) = 0.016 a weight.
    difference = (model["dense"].weight - twin["dense"].weight).abs().max()
    assert 0 < difference < 5 * 0.01 * 4 * ALPHA * 0.016


# -- the fused update against the explicit one -------------------------------------------------------------------------


def two_gradients(model: nn.Module, step: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(step)
    first = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in model.parameters()]
    second = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in model.parameters()]
    # A part in common, so that there is something to project on.
    return first, [b + 0.5 * a for a, b in zip(first, second, strict=True)]


def decomposed(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """GSAM's direction, computed in fp64."""
    a, b = (torch.cat([g.double().flatten() for g in gradients]) for gradients in (first, second))
    direction = b - ALPHA * (a - (a @ b) / (b @ b) * b)
    parts = direction.split([g.numel() for g in first])
    return [part.view_as(g).to(g.dtype) for part, g in zip(parts, first, strict=True)]


def random_model(dtype: torch.dtype) -> nn.ModuleDict:
    model = small_model(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            # Away from zero, where an ulp is as small as you like.
            values = torch.rand(p.shape, generator=generator, dtype=torch.float64) + 0.5
            p.copy_(values * (torch.randint(0, 2, p.shape, generator=generator) * 2 - 1))
    return model


BASES = {"torch": torch.optim.AdamW, "ours": functools.partial(AdamWL2SP, l2_sp=0.1)}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 4 * 2.0**-23)])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
def test_fused_update_equals_the_materialised_direction_given_to_adamw(base, steps, dtype, tolerance):
    model, twin = random_model(dtype), random_model(dtype)
    optimizer = FSAM(model.parameters(), alpha=ALPHA, l2_sp=getattr(base, "keywords", {}).get("l2_sp", 0.0))
    explicit = base(twin.parameters(), lr=1e-3)
    for step in range(steps):
        first, second = two_gradients(model, step)
        for gradients, finish in ((first, optimizer.perturb), (second, optimizer.step)):
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.grad = g.clone()
            finish()
        for p, g in zip(twin.parameters(), decomposed(first, second), strict=True):
            p.grad = g
        explicit.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=0)


# -- how the first gradient is kept ------------------------------------------------------------------------------------


def test_first_gradient_is_kept_as_it_is_until_the_step_and_then_let_go():
    weight = nn.Parameter(torch.randn(64, 64))
    optimizer = FSAM([weight], **KWARGS)
    for _ in range(2):
        (weight * weight).sum().backward()
        first, where = weakref.ref(weight.grad), weight.grad.data_ptr()
        optimizer.perturb()
        assert weight.grad is None
        assert first().data_ptr() == where
        (weight * weight).sum().backward()
        optimizer.step()
        assert first() is None


def test_second_gradient_in_the_memory_of_the_first_is_refused_and_the_weights_are_restored():
    """A tensor that is written again and assigned again: nothing is left of the first gradient."""
    weight = nn.Parameter(torch.ones(8, 4))
    optimizer, gradient = FSAM([weight], **KWARGS), torch.ones(8, 4)
    weight.grad = gradient
    optimizer.perturb()
    weight.grad = gradient.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"number 0 .* gradient of its own"):
        optimizer.step()
    assert torch.equal(weight, torch.ones(8, 4))


def test_without_alpha_the_first_gradient_is_let_go_by_the_perturbation():
    weight = nn.Parameter(torch.randn(64, 64))
    optimizer = FSAM([weight])
    (weight * weight).sum().backward()
    first = weakref.ref(weight.grad)
    optimizer.perturb()
    assert first() is None


def test_nothing_of_the_parameters_size_is_allocated_after_the_second_step():
    weight = nn.Parameter(torch.randn(512, 512))
    optimizer = FSAM([weight], **KWARGS)
    for step in range(4):
        for finish in (optimizer.perturb, optimizer.step):
            optimizer.zero_grad()
            (weight * weight).sum().backward()
            if step < 2:
                finish()
            else:
                assert largest_allocation(finish) < weight.nbytes // 8


def test_gradients_that_are_parts_of_one_buffer_which_the_second_pass_writes_again_give_the_same_bits():
    """As DistributedDataParallel(gradient_as_bucket_view=True) has them."""
    models = [small_model(), small_model()]
    for model, in_one_buffer in zip(models, (False, True), strict=True):
        optimizer = FSAM(model.parameters(), **KWARGS)
        parameters = list(model.parameters())
        parts = torch.empty(N).split([p.numel() for p in parameters])
        for step in range(4):
            for number, finish in zip(passes_of(step), (optimizer.perturb, optimizer.step), strict=True):
                for p, g, part in zip(parameters, Problem().gradients(parameters, number), parts, strict=True):
                    p.grad = part.view_as(p).copy_(g) if in_one_buffer else g
                finish()
    assert_same_bits(*models)


def test_gradient_that_is_the_whole_of_such_a_buffer_gives_the_same_bits():
    weights, target = [nn.Parameter(torch.ones(8, 4)) for _ in range(2)], torch.randn(8, 4)
    for weight, in_a_buffer in zip(weights, (False, True), strict=True):
        optimizer, buffer = FSAM([weight], **KWARGS), torch.empty(32)
        for _ in range(3):
            for finish in (optimizer.perturb, optimizer.step):
                (g,) = torch.autograd.grad(((weight - target) ** 4).sum(), weight)
                weight.grad = buffer.view(8, 4).copy_(g) if in_a_buffer else g
                finish()
    assert torch.equal(*weights)


def test_frozen_parameters_are_left_alone():
    model = small_model()
    model["dense"].requires_grad_(False)
    optimizer = FSAM(model.parameters(), **KWARGS)
    train(model, optimizer, 2)
    for p, before in zip(model["dense"].parameters(), small_model()["dense"].parameters(), strict=True):
        assert p not in optimizer.state
        assert torch.equal(p, before)


# -- what may come between the passes ----------------------------------------------------------------------------------


def plain(model: nn.Module) -> AdamWL2SP:
    return AdamWL2SP(model.parameters(), lr=0.01, eps=1.0)


def test_step_after_restore_is_adamw_l2sp_to_the_bit():
    model, twin = small_model(), small_model()
    optimizer, expected = FSAM(model.parameters(), **KWARGS), plain(twin)
    for step in range(4):
        closure_of(model, optimizer, step)()
        optimizer.perturb()
        optimizer.restore()
        closure_of(model, optimizer, step)()
        optimizer.step()
    train(twin, expected, 4)
    assert_same_bits(model, twin)


def test_last_of_two_ascents_counts():
    models = [small_model(), small_model()]
    for model, first_tries in zip(models, ([], [7, 8]), strict=True):
        optimizer = FSAM(model.parameters(), **KWARGS)
        train_apart(model, optimizer, 2)
        for other in first_tries:
            closure_of(model, optimizer, other)()
            optimizer.perturb()
            optimizer.restore()
        train_apart(model, optimizer, 2, start=2)
    assert_same_bits(*models)


def spoil(model: nn.Module, value: float) -> None:
    model["dense"].weight.grad[3, 5] = value


NON_FINITE = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("value", NON_FINITE)
def test_first_gradient_that_is_not_finite_leaves_adamw_l2sp_to_the_bit(value):
    model, twin = small_model(), small_model()
    optimizer, expected = FSAM(model.parameters(), **KWARGS), plain(twin)
    for step in range(3):
        closure_of(model, optimizer, step)()
        spoil(model, value)
        optimizer.perturb()
        closure_of(model, optimizer, step)()
        optimizer.step()
    train(twin, expected, 3)
    assert_same_bits(model, twin)


@pytest.mark.parametrize("value", NON_FINITE)
def test_second_gradient_that_is_not_finite_keeps_that_weight_and_updates_the_others(value):
    model = small_model()
    optimizer = FSAM(model.parameters(), **KWARGS)
    train(model, optimizer, 1)
    before = weights_of(model)
    closure_of(model, optimizer, 1)()
    optimizer.perturb()
    closure_of(model, optimizer, 1)()
    spoil(model, value)
    optimizer.step()
    assert model["dense"].weight[3, 5] == before[0][3, 5]
    assert (model["dense"].weight != before[0]).sum() == before[0].numel() - 1
    assert all(p.isfinite().all() for p in model.parameters())


def test_second_gradient_of_zero_moves_nothing_but_by_decay():
    model, twin = small_model(), small_model()
    optimizer, expected = FSAM(model.parameters(), **KWARGS), plain(twin)
    closure_of(model, optimizer, 0)()
    optimizer.perturb()
    for trained, final in ((model, optimizer), (twin, expected)):
        for p in trained.parameters():
            p.grad = torch.zeros_like(p)
        final.step()
    assert_same_bits(model, twin)


def scaled_step(model: nn.Module, optimizer: FSAM, scaler, step: int, overflow: bool = False) -> None:
    """`train_apart`'s step under a GradScaler."""
    for problem_step, finish in zip(passes_of(step), (optimizer.perturb, lambda: scaler.step(optimizer)), strict=True):
        optimizer.zero_grad()
        scaler.scale(Problem().loss(model.parameters(), problem_step)).backward()
        if overflow and optimizer.perturbed:
            spoil(model, float("inf"))
        finish()
    scaler.update()


@pytest.mark.parametrize("max_grad_norm", [None, 3.0])
def test_grad_scaler_gives_the_numbers_of_unscaled_training(max_grad_norm):
    model = small_model()
    reference = ReferenceFSAM(model.parameters(), **KWARGS, max_grad_norm=max_grad_norm)
    optimizer = FSAM(model.parameters(), **KWARGS, max_grad_norm=max_grad_norm)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(5):
        scaled_step(model, optimizer, scaler, step)
        reference.step(gradients_apart(Problem(), step))
    assert_close(model, reference, 5)


def test_overflow_in_the_second_pass_under_grad_scaler_restores_the_weights_to_the_bit():
    model = small_model()
    optimizer, scaler = FSAM(model.parameters(), **KWARGS), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled_step(model, optimizer, scaler, 0)
    before = weights_of(model)
    scaled_step(model, optimizer, scaler, 1, overflow=True)
    assert not optimizer.perturbed
    assert scaler.get_scale() == 512.0
    assert_unchanged(model, before)


def test_gradients_of_which_a_scaler_has_unscaled_only_one_are_refused():
    model = small_model()
    optimizer, scaler = FSAM(model.parameters(), **KWARGS), torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = weights_of(model)
    for finish in (optimizer.perturb, lambda: scaler.unscale_(optimizer)):
        scaler.scale(Problem().loss(model.parameters(), 0)).backward()
        finish()
    with pytest.raises(RuntimeError, match=r"unscale_.*perturb\(scaler\)"):
        scaler.step(optimizer)
    assert_unchanged(model, before)


# -- 16 bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_follow_an_fp32_run_with_the_same_gradients(dtype):
    """Linear losses: their gradients, exact in 16 bits, do not depend on the weights and their rounding."""
    problem, model, twin = Problem(curvature=0.0), small_model(dtype), small_model()
    optimizer = FSAM(model.parameters(), master_weights=True, **KWARGS)
    reference = ReferenceFSAM(twin.parameters(), **KWARGS)
    for step in range(10):
        reference.step(gradients_apart(problem, step))
    train_apart(model, optimizer, 10, problem=problem)
    masters = [optimizer.master_weight(p) for p in model.parameters()]
    extra = combination_bound(10, 0.01, masters[0], ALPHA, N)
    assert_weights_close(masters, reference.weights, 10, 0.01, extra=extra)
