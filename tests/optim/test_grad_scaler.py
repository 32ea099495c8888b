"""torch.amp.GradScaler without an overflow: both passes scaled, `perturb(scaler)` between them."""

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from fsam_triton import FSAM, FishMask, Schedule
from tests.optim.scaling import VARIANTS, every_precision, every_variant, pair, plain_step, scaled_step
from tests.problem import Problem, assert_weights_close, small_model
from tests.training import assert_same_bits, closure_of, several_groups, train

pytestmark = pytest.mark.usefixtures("one_thread")


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 3.0)


# -- no overflow -------------------------------------------------------------------------------------------------------


@every_variant
def test_steps_under_a_growing_scale_equal_unscaled_ones_to_the_bit(kwargs):
    (model, optimizer), (twin, straight) = pair(**kwargs), pair(**kwargs)
    scaler = GradScaler("cpu", init_scale=256.0, growth_interval=2)
    for step in range(8):
        scaled_step(model, optimizer, scaler, step)
        plain_step(twin, straight, step)
    assert scaler.get_scale() == 256.0 * 2**4
    assert_same_bits(model, twin)


@every_precision
@pytest.mark.parametrize("variant", ["sam", "gsam", "fisher"])
def test_steps_in_every_precision_equal_unscaled_ones_to_the_bit(variant, dtype, kwargs):
    """Gradients are at least 0.5 and at most 1.5, and so their multiples by 256 are normal numbers of fp16."""
    kwargs = {**kwargs, **VARIANTS[variant]}
    (model, optimizer), (twin, straight) = pair(dtype, **kwargs), pair(dtype, **kwargs)
    scaler = GradScaler("cpu", init_scale=256.0)
    for step in range(5):
        scaled_step(model, optimizer, scaler, step)
        plain_step(twin, straight, step)
    assert_same_bits(model, twin)


def test_groups_with_radii_of_their_own_equal_unscaled_ones_to_the_bit():
    model, twin = small_model(), small_model()
    optimizer, straight = FSAM(several_groups(model)), FSAM(several_groups(twin))
    scaler = GradScaler("cpu", init_scale=1024.0)
    for step in range(5):
        scaled_step(model, optimizer, scaler, step)
        plain_step(twin, straight, step)
    assert_same_bits(model, twin)


def test_steps_of_selected_weights_equal_unscaled_ones_to_the_bit():
    scores = {name: p.detach().abs() for name, p in small_model().named_parameters()}
    trainable = FishMask.from_scores(scores, keep_ratio=0.3)
    (model, optimizer), (twin, straight) = pair(trainable=trainable), pair(trainable=trainable)
    scaler = GradScaler("cpu", init_scale=256.0, growth_interval=2)
    for step in range(5):
        scaled_step(model, optimizer, scaler, step)
        plain_step(twin, straight, step)
    assert_same_bits(model, twin)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**40])
def test_perturbation_is_that_of_the_unscaled_gradients_however_small_they_are(scale):
    """Gradients of norm 1e-12 or so, which counts beside the 1e-12 in eps = rho * g / (norm(g) + 1e-12)."""
    (model, optimizer), (twin, straight) = pair(torch.float64), pair(torch.float64)
    scaler = GradScaler("cpu", init_scale=scale)
    scaler.scale(2.0**-44 * Problem().loss(model.parameters(), 0)).backward()
    optimizer.perturb(scaler)
    (2.0**-44 * Problem().loss(twin.parameters(), 0)).backward()
    straight.perturb()
    assert_same_bits(model, twin)
    moved = torch.cat([(p - w).flatten() for p, w in zip(model.parameters(), small_model().parameters(), strict=True)])
    assert 0.1 < float(moved.detach().norm()) / 0.5 < 0.9


@every_variant
def test_users_clipping_of_unscaled_gradients_equals_that_without_a_scaler_to_the_bit(kwargs):
    (model, optimizer), (twin, straight) = pair(**kwargs), pair(**kwargs)
    scaler = GradScaler("cpu", init_scale=256.0, growth_interval=2)
    for step in range(6):
        scaled_step(model, optimizer, scaler, step, unscale=True, second=clip)
        plain_step(twin, straight, step, second=clip)
    assert_same_bits(model, twin)


def test_switched_off_scaler_is_none():
    (model, optimizer), (twin, straight) = pair(alpha=0.4), pair(alpha=0.4)
    scaler = GradScaler("cpu", enabled=False)
    scaled_step(model, optimizer, scaler, 0, unscale=True)
    Problem().loss(twin.parameters(), 0).backward()
    straight.perturb()
    Problem().loss(twin.parameters(), 1).backward()
    straight.step()
    assert_same_bits(model, twin)


# -- the scaler's own protocol -----------------------------------------------------------------------------------------


def test_gradients_unscaled_before_the_perturbation_are_refused():
    """The scaler would take the second gradients for unscaled ones too."""
    model, optimizer = pair()
    scaler = GradScaler("cpu")
    scaler.scale(Problem().loss(model.parameters(), 0)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) before perturb"):
        optimizer.perturb(scaler)


def test_closure_given_to_the_scaler_is_refused_with_what_to_do():
    model, optimizer = pair()
    scaler = GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match=r"perturb\(scaler\)"):
        scaler.step(optimizer, closure_of(model, optimizer, 0))
    assert_same_bits(model, small_model())


@pytest.mark.filterwarnings("error")
def test_fifth_step_of_a_scaler_without_any_perturbation_warns():
    model, optimizer = pair()
    scaler = GradScaler("cpu")

    def plain() -> None:
        optimizer.zero_grad()
        scaler.scale(Problem().loss(model.parameters(), 0)).backward()
        scaler.step(optimizer)
        scaler.update()

    for _ in range(4):
        plain()
    with pytest.warns(UserWarning, match=r"perturb\(\)"):
        plain()
    plain()


def test_perturbation_that_is_not_told_of_the_scaler_gives_the_numbers_of_unscaled_training():
    """But for the 1e-12 in eps = rho * g / (norm(g) + 1e-12)."""
    (model, optimizer), (twin, straight) = pair(), pair()
    scaler = GradScaler("cpu", init_scale=1024.0)
    for step in range(5):
        optimizer.zero_grad()
        for finish in (optimizer.perturb, lambda: scaler.step(optimizer)):
            scaler.scale(Problem().loss(model.parameters(), step)).backward()
            finish()
        scaler.update()
    train(twin, straight, 5)
    assert_weights_close(model.parameters(), twin.parameters(), 5, 0.01)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("schedule", [None, Schedule(every=2)], ids=["own", "scheduled"])
def test_plain_steps_between_perturbed_ones_do_not_warn(schedule):
    model, optimizer = pair(schedule=schedule)
    scaler = GradScaler("cpu", init_scale=256.0)
    scaled_step(model, optimizer, scaler, 0)
    scaler.scale(Problem().loss(model.parameters(), 1)).backward()
    scaler.step(optimizer)


def test_second_pass_without_gradients_restores_the_weights():
    model, optimizer = pair()
    scaler = GradScaler("cpu")
    scaler.scale(Problem().loss(model.parameters(), 0)).backward()
    optimizer.perturb(scaler)
    scaler.step(optimizer)
    assert_same_bits(model, small_model())
