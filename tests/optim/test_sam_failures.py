"""SAM around any optimizer when a pass fails or a gradient overflows under a GradScaler."""

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from fsam_triton import SAM
from tests.optim.bases import BASES, every_base, matrices_of
from tests.problem import Problem, small_model
from tests.training import assert_same_bits, assert_unchanged, closure_of, train, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


class PassFails(Exception):
    """Raised by closures."""


@every_base
def test_exception_between_the_passes_leaves_weights_and_state_as_they_were(base):
    model, twin = matrices_of(), matrices_of()
    optimizer, expected = SAM(base(model.parameters())), SAM(base(twin.parameters()))
    train(model, optimizer, 2)
    train(twin, expected, 2)
    before, calls, closure = weights_of(model), [], closure_of(model, optimizer, 2)

    def failing() -> Tensor:
        calls.append(None)
        if len(calls) == 2:
            raise PassFails
        return closure()

    with pytest.raises(PassFails):
        optimizer.step(failing)
    assert not optimizer.perturbed
    assert_unchanged(model, before)
    train(model, optimizer, 2, start=2)
    train(twin, expected, 2, start=2)
    assert_same_bits(model, twin)


def test_base_that_fails_leaves_the_weights_as_they_were():
    class Failing(torch.optim.SGD):
        def step(self, closure=None) -> None:
            raise PassFails

    model = small_model()
    optimizer = SAM(Failing(model.parameters(), lr=0.1))
    with pytest.raises(PassFails):
        train(model, optimizer, 1)
    assert not optimizer.perturbed
    assert_same_bits(model, small_model())


def test_closure_that_computes_no_gradients_is_refused():
    model = small_model()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="no gradients"):
        optimizer.step(lambda: Problem().loss(model.parameters(), 0))
    assert_same_bits(model, small_model())


SCALED = {name: BASES[name] for name in ("adamw", "fused adamw", "sgd", "adagrad")}
every_scaled = pytest.mark.parametrize("base", SCALED.values(), ids=SCALED.keys())


def scaled_step(model: nn.Module, optimizer: SAM, scaler: GradScaler, step: int, spoil=(), unscale=False) -> None:
    for number, finish in enumerate((lambda: optimizer.perturb(scaler), lambda: scaler.step(optimizer))):
        optimizer.zero_grad()
        scaler.scale(Problem().loss(model.parameters(), step)).backward()
        if number in spoil:
            next(model.parameters()).grad[0, 0] = float("inf")
        if unscale and number == 1:
            scaler.unscale_(optimizer)
        finish()
    scaler.update()


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled"])
@every_scaled
def test_steps_under_a_growing_scale_equal_unscaled_ones_to_the_bit(base, unscale):
    model, twin = matrices_of(), matrices_of()
    optimizer, straight = SAM(base(model.parameters()), rho=0.5), SAM(base(twin.parameters()), rho=0.5)
    scaler = GradScaler("cpu", init_scale=256.0, growth_interval=2)
    for step in range(6):
        scaled_step(model, optimizer, scaler, step, unscale=unscale)
    train(twin, straight, 6)
    assert scaler.get_scale() == 256.0 * 2**3
    assert_same_bits(model, twin)


@every_scaled
def test_overflow_in_the_first_pass_makes_a_step_of_the_base(base):
    model, twin = matrices_of(), matrices_of()
    optimizer, plain = SAM(base(model.parameters()), rho=0.5), base(twin.parameters())
    scaler = GradScaler("cpu", init_scale=256.0)
    scaled_step(model, optimizer, scaler, 0, spoil={0})
    train(twin, plain, 1)
    assert_same_bits(model, twin)


@every_scaled
def test_overflow_in_the_second_pass_skips_the_step_and_restores_the_weights_to_the_bit(base):
    model, twin = matrices_of(), matrices_of()
    optimizer, straight = SAM(base(model.parameters()), rho=0.5), SAM(base(twin.parameters()), rho=0.5)
    scaler = GradScaler("cpu", init_scale=256.0)
    scaled_step(model, optimizer, scaler, 0)
    before = weights_of(model)
    scaled_step(model, optimizer, scaler, 1, spoil={1})
    assert not optimizer.perturbed
    assert scaler.get_scale() == 128.0
    assert_unchanged(model, before)
    # Nothing is left of it in the base's state.
    scaled_step(model, optimizer, scaler, 2)
    train(twin, straight, 1)
    train(twin, straight, 1, start=2)
    assert_same_bits(model, twin)
