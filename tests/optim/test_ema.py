"""The average of the weights: against fp64 and torch's own, what is left out, `ema_weights`, what is saved."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fsam_triton import FSAM, AdamWL2SP, FishMask, MomentumSAM
from fsam_triton.optim.optimizer import FusedOptimizer
from tests.fp64_optimizers import ReferenceAdamW, ReferenceFSAM, ReferenceMomentumSAM
from tests.optim.momentum import Objective
from tests.problem import Problem, assert_weights_close, small_model
from tests.training import assert_same_bits, assert_unchanged, closure_of, round_trip, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

LR, DECAY = 0.01, 0.9
OPTIMIZERS = [AdamWL2SP, FSAM, MomentumSAM]
PRECISIONS = {
    "fp64": (torch.float64, {}),
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "bf16_to_nearest": (torch.bfloat16, {"stochastic_rounding": False}),
    "fp16": (torch.float16, {}),
    "bf16_master": (torch.bfloat16, {"master_weights": True}),
}
every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS)
every_precision = pytest.mark.parametrize(("dtype", "kwargs"), PRECISIONS.values(), ids=PRECISIONS.keys())


def train(model: nn.Module, optimizer, steps: int, *, problem=Problem(), start=0) -> None:
    """With a model that is called, as MomentumSAM needs it."""
    objective = Objective(model, problem)
    for step in range(start, start + steps):

        def closure(step=step):
            optimizer.zero_grad()
            loss = objective(step)
            loss.backward()
            return loss

        optimizer.step(closure)


def pair(kind: type[FusedOptimizer], dtype=torch.float32, **kwargs) -> tuple[nn.Module, FusedOptimizer]:
    model = small_model(dtype)
    return model, kind(model.named_parameters(), **{"lr": LR, "ema_decay": DECAY, **kwargs})


def averages(model: nn.Module, optimizer: FusedOptimizer) -> list[Tensor]:
    return [optimizer.state[p]["ema"].clone() for p in model.parameters()]


def stored_weights(model: nn.Module, optimizer: FusedOptimizer) -> list[Tensor]:
    """The clean weights as the optimizer keeps them: masters where there are any."""
    return [optimizer.master_weight(p) for p in model.parameters()]


def followed(ema: Tensor, weight: Tensor) -> Tensor:
    return ema + torch.tensor(1 - DECAY, dtype=torch.float64).to(ema.dtype) * (weight.to(ema.dtype) - ema)


def rounding_of_averages(steps: int, dtype: torch.dtype) -> float:
    """Three roundings a step, of numbers that are at most 2 in magnitude."""
    return steps * 3 * torch.finfo(dtype).eps / 2 * 2


def update_with(optimizer: FusedOptimizer, model: nn.Module, gradients: list[Tensor | None]) -> None:
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = gradient
    optimizer.step()


# -- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("kind", "reference_kind"),
    [(AdamWL2SP, ReferenceAdamW), (FSAM, ReferenceFSAM), (MomentumSAM, ReferenceMomentumSAM)],
    ids=lambda kind: kind.__name__,
)
def test_average_equals_the_fp64_reference_over_50_steps(kind, reference_kind, dtype):
    model, optimizer = pair(kind, dtype)
    problem, reference = Problem(curvature=0.0), reference_kind(model.parameters(), lr=LR)
    expected = [weight.clone() for weight in reference.weights]
    for step in range(50):
        if kind is AdamWL2SP:
            reference.step(problem.gradients(reference.weights, step))
        else:
            reference.step(lambda weights, step=step: problem.gradients(weights, step))
        expected = [DECAY * ema + (1 - DECAY) * w for ema, w in zip(expected, reference.weights, strict=True)]
    train(model, optimizer, 50, problem=problem)
    # An average of weights, each of which is at most that far off.
    extra = rounding_of_averages(50, dtype)
    assert_weights_close(averages(model, optimizer), expected, 50, LR, curvature=0.0, extra=extra)


@every_optimizer
def test_average_equals_that_of_torch(kind):
    model, optimizer = pair(kind)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    # Its first update takes the weights as they are; ours begins with those from before the first step.
    theirs.update_parameters(model)
    for step in range(50):
        train(model, optimizer, 1, start=step)
        clean = copy.deepcopy(model)
        clean.load_state_dict(model.state_dict())
        theirs.update_parameters(clean)
    for actual, expected in zip(averages(model, optimizer), theirs.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=2 * rounding_of_averages(50, torch.float32))


@every_optimizer
@every_precision
def test_average_follows_the_weights_as_they_are_stored_to_the_bit(kind, dtype, kwargs):
    model, optimizer = pair(kind, dtype, **kwargs)
    expected = [p.detach().to(torch.promote_types(dtype, torch.float32), copy=True) for p in model.parameters()]
    for step in range(5):
        train(model, optimizer, 1, start=step)
        weights = stored_weights(model, optimizer)
        expected = [followed(ema, weight) for ema, weight in zip(expected, weights, strict=True)]
        for actual, ema in zip(averages(model, optimizer), expected, strict=True):
            assert actual.dtype == ema.dtype
            assert torch.equal(actual, ema)


@every_optimizer
def test_averaging_leaves_the_training_as_it_is(kind):
    (model, optimizer), (plain, other) = pair(kind, torch.bfloat16), pair(kind, torch.bfloat16, ema_decay=None)
    train(model, optimizer, 5)
    train(plain, other, 5)
    assert_same_bits(model, plain)
    assert all("ema" not in entry for entry in other.state.values())


# -- what is left out --------------------------------------------------------------------------------------------------


@every_optimizer
def test_skipped_step_leaves_the_average(kind):
    model, optimizer = pair(kind, max_grad_norm=1.0)
    train(model, optimizer, 3)
    before = averages(model, optimizer)
    update_with(optimizer, model, [torch.full_like(p, float("inf")) for p in model.parameters()])
    assert all(map(torch.equal, averages(model, optimizer), before))


@every_optimizer
def test_coordinate_with_a_non_finite_gradient_is_averaged_with_its_old_weight(kind):
    model, optimizer = pair(kind)
    train(model, optimizer, 3)
    before, weights = averages(model, optimizer)[0], stored_weights(model, optimizer)[0]
    gradients = [torch.ones_like(p) for p in model.parameters()]
    gradients[0][0] = float("nan")
    update_with(optimizer, model, gradients)
    assert torch.equal(averages(model, optimizer)[0][0], followed(before[0], weights[0]))
    assert not torch.equal(averages(model, optimizer)[0][1], followed(before[1], weights[1]))


@every_optimizer
def test_average_of_a_parameter_without_a_gradient_stays(kind):
    model, optimizer = pair(kind)
    train(model, optimizer, 3)
    before = averages(model, optimizer)
    optimizer.zero_grad()
    update_with(optimizer, model, [None, *(torch.ones_like(p) for p in list(model.parameters())[1:])])
    after = averages(model, optimizer)
    assert torch.equal(after[0], before[0])
    assert not any(map(torch.equal, after[1:], before[1:]))


def test_average_begins_at_the_weights_that_were_loaded_before_the_first_step():
    model, optimizer = pair(AdamWL2SP)
    loaded = small_model(seed=1)
    model.load_state_dict(loaded.state_dict())
    train(model, optimizer, 1)
    expected = map(followed, weights_of(loaded), weights_of(model))
    assert all(map(torch.equal, averages(model, optimizer), expected))


# -- ema_weights -------------------------------------------------------------------------------------------------------


@every_optimizer
@every_precision
def test_parameters_hold_the_average_inside_and_what_they_held_afterwards(kind, dtype, kwargs):
    model, optimizer = pair(kind, dtype, **kwargs)
    train(model, optimizer, 5)
    before, masters = weights_of(model), stored_weights(model, optimizer)
    average = [ema.to(dtype) for ema in averages(model, optimizer)]
    with optimizer.ema_weights():
        assert_unchanged(model, average)
        assert all(map(torch.equal, model.state_dict().values(), average))
        assert not any(map(torch.equal, before, average))
    assert_unchanged(model, before)
    assert all(map(torch.equal, stored_weights(model, optimizer), masters))


@every_optimizer
def test_weights_are_put_back_after_an_exception(kind):
    model, optimizer = pair(kind)
    train(model, optimizer, 2)
    before = weights_of(model)
    with pytest.raises(KeyError), optimizer.ema_weights():
        raise KeyError
    assert_unchanged(model, before)


@every_optimizer
@every_precision
def test_training_goes_on_as_if_nobody_had_looked(kind, dtype, kwargs):
    (model, optimizer), (other, undisturbed) = (pair(kind, dtype, **kwargs) for _ in range(2))
    for step in range(4):
        with optimizer.ema_weights():
            optimizer.state_dict()
        train(model, optimizer, 1, start=step)
        train(other, undisturbed, 1, start=step)
    assert_same_bits(model, other)
    assert all(map(torch.equal, averages(model, optimizer), averages(other, undisturbed)))


ACTIONS = {
    "step": lambda model, optimizer: optimizer.step(),
    "step_with_a_closure": lambda model, optimizer: optimizer.step(closure_of(model, optimizer, 0)),
    "load": lambda model, optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "copy": lambda model, optimizer: copy.deepcopy(optimizer),
    "set_trainable": lambda model, optimizer: optimizer.set_trainable(FishMask.bias_only(model)),
    "again": lambda model, optimizer: optimizer.ema_weights().__enter__(),
}


@every_optimizer
@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS.keys())
def test_what_would_take_the_average_for_the_weights_is_refused(kind, action):
    model, optimizer = pair(kind)
    train(model, optimizer, 2)
    before = weights_of(model)
    with optimizer.ema_weights(), pytest.raises(RuntimeError, match="inside ema_weights"):
        action(model, optimizer)
    assert_unchanged(model, before)
    train(model, optimizer, 1)


def test_perturbing_the_average_is_refused():
    model, optimizer = pair(FSAM)
    train(model, optimizer, 2)
    closure_of(model, optimizer, 2)()
    with optimizer.ema_weights(), pytest.raises(RuntimeError, match="inside ema_weights"):
        optimizer.perturb()
    optimizer.perturb()
    with pytest.raises(RuntimeError, match="perturbed weights: call step"), optimizer.ema_weights():
        pass
    assert optimizer.perturbed


def test_forward_passes_inside_see_the_average_in_training_mode_too():
    model, optimizer = pair(MomentumSAM)
    train(model, optimizer, 2)
    average = averages(model, optimizer)
    with optimizer.ema_weights():
        Objective(model)(2)
        assert_unchanged(model, average)
        assert not optimizer.perturbed
    Objective(model)(2)
    assert optimizer.perturbed


def test_mode_of_momentum_sam_may_change_inside():
    model, optimizer = pair(MomentumSAM)
    train(model, optimizer, 2)
    clean = weights_of(model)
    with optimizer.ema_weights():
        # As Trainer does before it evaluates.
        optimizer.eval()
    Objective(model)(2)
    assert_unchanged(model, clean)
    with optimizer.ema_weights():
        optimizer.train()
    Objective(model)(2)
    assert optimizer.perturbed


def test_without_a_decay_there_is_nothing_to_show():
    _, optimizer = pair(AdamWL2SP, ema_decay=None)
    with pytest.raises(RuntimeError, match="needs an optimizer with ema_decay"), optimizer.ema_weights():
        pass


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"Invalid ema_decay: .*; must be in \[0, 1\) or None"):
        pair(AdamWL2SP, ema_decay=decay)


# -- what is saved -----------------------------------------------------------------------------------------------------


@every_optimizer
@every_precision
def test_resumed_training_has_the_same_averages_to_the_bit(kind, dtype, kwargs):
    (model, optimizer), (resumed, fresh) = (pair(kind, dtype, **kwargs) for _ in range(2))
    train(model, optimizer, 3)
    train(resumed, fresh, 1)
    saved = round_trip((model.state_dict(), optimizer.state_dict()))
    resumed.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    for of in ((model, optimizer), (resumed, fresh)):
        train(*of, 3, start=3)
    assert_same_bits(model, resumed)
    assert all(map(torch.equal, averages(model, optimizer), averages(resumed, fresh)))


@every_optimizer
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda of: pickle.loads(pickle.dumps(of))], ids=["copy", "pickle"])
def test_copy_goes_on_with_the_same_averages(kind, copied):
    model, optimizer = pair(kind, torch.bfloat16)
    train(model, optimizer, 3)
    if kind is MomentumSAM:
        optimizer.eval()
    other, its = copied((model, optimizer))
    if kind is MomentumSAM:
        optimizer.train()
        its.train()
    for of in ((model, optimizer), (other, its)):
        train(*of, 2, start=3)
    assert all(map(torch.equal, averages(model, optimizer), averages(other, its)))


@pytest.mark.parametrize("kwargs", [{}, {"master_weights": True}], ids=["plain", "master"])
def test_state_without_averages_starts_them_from_the_loaded_weights(kwargs):
    model, optimizer = pair(AdamWL2SP, torch.bfloat16, ema_decay=None, **kwargs)
    train(model, optimizer, 3)
    resumed, averaging = pair(AdamWL2SP, torch.bfloat16, **kwargs)
    train(resumed, averaging, 1)
    resumed.load_state_dict(model.state_dict())
    averaging.load_state_dict(optimizer.state_dict())
    expected = [weight.float() for weight in stored_weights(model, optimizer)]
    assert all(map(torch.equal, averages(resumed, averaging), expected))


def test_averages_of_a_state_are_ignored_without_a_decay():
    (model, optimizer), (_, other) = pair(AdamWL2SP), pair(AdamWL2SP, ema_decay=None)
    train(model, optimizer, 2)
    other.load_state_dict(optimizer.state_dict())
    assert all("ema" not in entry for entry in other.state.values())


# -- a part of the weights ---------------------------------------------------------------------------------------------


@every_optimizer
def test_of_trained_weights_alone_there_are_averages(kind):
    model = small_model()
    start, mask = weights_of(model), FishMask.random(model, 0.1, 0)
    optimizer = kind(model.named_parameters(), lr=LR, ema_decay=DECAY, trainable=mask)
    expected = None
    for step in range(3):
        train(model, optimizer, 1, start=step)
        weights = [w.flatten()[mask.indices(name)] for name, w in model.state_dict().items()]
        if expected is None:
            expected = [w.flatten()[mask.indices(n)] for n, w in zip(model.state_dict(), start, strict=True)]
        expected = [followed(ema, w) for ema, w in zip(expected, weights, strict=True)]
    before = weights_of(model)
    with optimizer.ema_weights():
        for (name, p), ema, first in zip(model.named_parameters(), expected, start, strict=True):
            shown = first.flatten().index_copy(0, mask.indices(name).long(), ema).view_as(p)
            assert torch.equal(p, shown), name
    assert_unchanged(model, before)


def test_average_starts_anew_with_other_trained_weights():
    model = small_model()
    optimizer = AdamWL2SP(model.named_parameters(), lr=LR, ema_decay=DECAY, trainable=FishMask.random(model, 0.1, 0))
    train(model, optimizer, 3)
    optimizer.set_trainable(None)
    before = weights_of(model)
    train(model, optimizer, 1, start=3)
    assert all(map(torch.equal, averages(model, optimizer), map(followed, before, weights_of(model))))
