"""torch.amp.GradScaler and overflows, in either pass."""

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from fsam_triton import FSAM, AdamWL2SP, FisherMask, MomentumSAM
from tests.optim.scaling import (
    NON_FINITE,
    VARIANTS,
    assert_finite,
    assert_same_moments,
    cast_step,
    every_precision,
    every_variant,
    moments_of,
    pair,
    plain_step,
    scaled_step,
    spoil_with,
)
from tests.problem import Problem, small_model
from tests.training import assert_same_bits, assert_unchanged, closure_of, passes_of, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


# -- overflow in the first pass ----------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("value", NON_FINITE)
def test_overflow_in_the_first_pass_perturbs_nothing(kwargs, value):
    model, optimizer = pair(**kwargs)
    scaler = GradScaler("cpu")
    scaler.scale(Problem().loss(model.parameters(), 0)).backward()
    spoil_with(value)(model)
    optimizer.perturb(scaler)
    assert_same_bits(model, small_model())


@every_precision
def test_overflow_in_the_first_pass_perturbs_nothing_in_any_precision(dtype, kwargs):
    model, optimizer = pair(dtype, adaptive=True, **kwargs)
    scaler = GradScaler("cpu", init_scale=16.0)
    scaler.scale(Problem().loss(model.parameters(), 0)).backward()
    spoil_with(float("inf"))(model)
    optimizer.perturb(scaler)
    assert_same_bits(model, small_model(dtype))


@pytest.mark.parametrize("variant", ["sam", "adaptive", "fisher", "gsam", "esam", "clipped"])
@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled"])
def test_second_gradient_that_is_finite_after_an_overflow_in_the_first_makes_a_step_of_adamw(variant, value, unscale):
    kwargs = VARIANTS[variant]
    model, optimizer = pair(**kwargs)
    twin = small_model()
    plain = AdamWL2SP(twin.parameters(), lr=0.01, max_grad_norm=kwargs.get("max_grad_norm"))
    scaler = GradScaler("cpu", init_scale=256.0)
    scaled_step(model, optimizer, scaler, 0, first=spoil_with(value), unscale=unscale)
    _, second = passes_of(0)
    plain.step(closure_of(twin, plain, second))
    assert_same_bits(model, twin)
    assert scaler.get_scale() == 256.0


@every_variant
def test_scale_that_overflows_in_both_passes_skips_the_step_and_is_halved(kwargs):
    kwargs = {name: value for name, value in kwargs.items() if name != "schedule"}
    model, optimizer = pair(**kwargs)
    scaler = GradScaler("cpu", init_scale=256.0)
    cast_step(model, optimizer, scaler, 0)
    before, moments = weights_of(model), moments_of(optimizer)
    scaler.update(2.0**20)
    cast_step(model, optimizer, scaler, 1)
    assert_unchanged(model, before)
    assert scaler.get_scale() == 2.0**19
    assert_same_moments(optimizer, moments)
    assert_finite(model, optimizer)


# -- overflow in the second pass ---------------------------------------------------------------------------------------


@every_precision
@pytest.mark.parametrize("variant", ["sam", "adaptive", "gsam", "clipped", "flat"])
@pytest.mark.parametrize("value", NON_FINITE)
def test_overflow_in_the_second_pass_restores_weights_and_leaves_moments_to_the_bit(variant, value, dtype, kwargs):
    model, optimizer = pair(dtype, **kwargs, **VARIANTS[variant])
    scaler = GradScaler("cpu", init_scale=256.0)
    scaled_step(model, optimizer, scaler, 0)
    before, moments = weights_of(model), moments_of(optimizer)
    scaled_step(model, optimizer, scaler, 1, second=spoil_with(value))
    assert not optimizer.perturbed
    assert scaler.get_scale() == 128.0
    assert_unchanged(model, before)
    assert_same_moments(optimizer, moments)


def test_overflow_in_the_second_pass_is_seen_by_unscale_too():
    model, optimizer = pair(alpha=0.4)
    scaler = GradScaler("cpu", init_scale=256.0)
    scaled_step(model, optimizer, scaler, 0)
    before, moments = weights_of(model), moments_of(optimizer)
    optimizer.zero_grad()
    scaler.scale(Problem().loss(model.parameters(), 0)).backward()
    optimizer.perturb(scaler)
    scaler.scale(Problem().loss(model.parameters(), 1)).backward()
    spoil_with(float("inf"))(model)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 128.0
    assert_unchanged(model, before)
    assert_same_moments(optimizer, moments)


def test_looksams_component_of_an_overflow_is_not_used():
    model, optimizer = pair(**VARIANTS["looksam"])
    twin = small_model()
    plain = AdamWL2SP(twin.parameters(), lr=0.01)
    scaler = GradScaler("cpu", init_scale=256.0)
    scaled_step(model, optimizer, scaler, 0, second=spoil_with(float("inf")))
    scaled_step(model, optimizer, scaler, 1)
    first, _ = passes_of(1)
    plain.step(closure_of(twin, plain, first))
    assert_same_bits(model, twin)


# -- masks -------------------------------------------------------------------------------------------------------------


def masks_of(model: nn.Module, optimizer: FSAM) -> list[Tensor]:
    return [optimizer.mask_of(p) for p in model.parameters()]


def assert_same_masks(first, second) -> None:
    for actual, expected in zip(masks_of(*first), masks_of(*second), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("samples", [1, 2])
def test_mask_that_is_due_in_a_pass_that_overflows_is_chosen_in_the_next_one(samples):
    mask = FisherMask(0.3, interval=10, samples=samples)
    (model, optimizer), (twin, straight) = pair(mask=mask), pair(mask=mask)
    scaler = GradScaler("cpu", init_scale=256.0)
    spoil = spoil_with(float("nan"))
    scaled_step(model, optimizer, scaler, 0, first=spoil, second=spoil)
    assert not optimizer.mask_of(model["dense"].weight).any()
    for step in range(3):
        scaled_step(model, optimizer, scaler, step)
        plain_step(twin, straight, step)
        assert_same_masks((model, optimizer), (twin, straight))
    assert_same_bits(model, twin)


def test_squares_of_an_overflow_do_not_count_for_the_mask():
    mask = FisherMask(0.3, interval=4, samples=3)
    (model, optimizer), (twin, straight) = pair(mask=mask, lr=0.0), pair(mask=mask, lr=0.0)
    scaler = GradScaler("cpu", init_scale=256.0)
    spoil = spoil_with(float("inf"))
    for step in range(5):
        overflows = step == 2
        scaled_step(model, optimizer, scaler, step, **({"first": spoil, "second": spoil} if overflows else {}))
        if overflows:
            # An ascent with gradients of zero: its squares add nothing either.
            straight.zero_grad()
            (0.0 * Problem().loss(twin.parameters(), 0)).backward()
            straight.perturb()
            straight.restore()
        else:
            plain_step(twin, straight, step)
    assert_same_masks((model, optimizer), (twin, straight))


# -- a scale that starts far too high ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"alpha": 0.4}, {"max_grad_norm": 3.0}], ids=["sam", "gsam", "clipped"])
def test_training_whose_scale_starts_absurdly_high_settles_and_then_equals_unscaled_training_to_the_bit(kwargs):
    """Thirty steps from 2**40: with a factor of 1/4, gradients below 2 are finite in fp16 after 13 of them."""
    (model, optimizer), (twin, straight) = pair(**kwargs), pair(**kwargs)
    scaler = GradScaler("cpu", init_scale=2.0**40, backoff_factor=0.25)
    skipped = 0
    for step in range(30):
        scale = scaler.get_scale()
        cast_step(model, optimizer, scaler, step)
        if scaler.get_scale() < scale:
            skipped += 1
            assert step < 13
        else:
            cast_step(twin, straight, GradScaler("cpu", enabled=False), step)
    assert skipped >= 12
    assert_finite(model, optimizer)
    assert_same_bits(model, twin)


@pytest.mark.parametrize("kwargs", [{}, {"alpha": 0.4}, {"adaptive": True}], ids=["sam", "gsam", "adaptive"])
def test_scaled_gradients_whose_squares_overflow_fp32_make_a_step_of_adamw(kwargs):
    (model, optimizer), twin = pair(**kwargs), small_model()
    plain = AdamWL2SP(twin.parameters(), lr=0.01)
    scaler = GradScaler("cpu", init_scale=2.0**80)
    scaled_step(model, optimizer, scaler, 0)
    _, second = passes_of(0)
    plain.step(closure_of(twin, plain, second))
    assert_same_bits(model, twin)


@pytest.mark.parametrize("momentum", [False, True], ids=["fsam", "momentum_sam"])
def test_fp16_autocast_from_an_absurd_scale_settles_and_the_loss_decreases(momentum):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    inputs = torch.randn(32, 8)
    labels = (inputs[:, 0] > 0).long()
    optimizer = (MomentumSAM if momentum else FSAM)(model.parameters(), lr=0.02, rho=0.05)
    scaler = GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-4)

    def loss_of() -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return nn.functional.cross_entropy(model(inputs), labels)

    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(loss_of())
        scaler.scale(losses[-1]).backward()
        if not momentum:
            optimizer.perturb(scaler)
            scaler.scale(loss_of()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() < 2.0**40
    assert_finite(model, optimizer)
    assert losses[-1] < losses[0] / 2
