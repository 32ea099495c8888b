"""Copies of optimizers: copy.copy, copy.deepcopy, pickle, torch.save; with the model and alone."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from fsam_triton import FSAM, SAM, AdamWL2SP, FisherMask, FishMask, MomentumSAM, Schedule
from fsam_triton.optim.optimizer import FusedOptimizer
from tests.optim.by_hand import assert_same, every_kind, square_model, take_step
from tests.optim.momentum import Objective
from tests.problem import small_model
from tests.training import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


duplicates = pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "save"])


@every_kind
@duplicates
def test_copy_of_model_and_optimizer_trains_as_a_copy_of_torchs_would(kind, duplicate):
    def program(make):
        model = square_model()
        optimizer = make(model.parameters())
        for step in range(3):
            take_step(model, optimizer, step)
        model, optimizer = duplicate((model, optimizer))
        for step in range(3, 6):
            take_step(model, optimizer, step)
        return model.parameters()

    assert_same(kind, program, 6)


@every_kind
def test_shallow_copy_shares_groups_and_state(kind):
    def program(make):
        model = square_model()
        optimizer = make(model.parameters())
        for step in range(2):
            take_step(model, optimizer, step)
        other = copy.copy(optimizer)
        other.param_groups[0]["lr"] = 0.003
        for step in range(2, 8):
            take_step(model, (optimizer, other)[step % 2], step)
        assert other.state is optimizer.state
        return model.parameters()

    assert_same(kind, program, 8)


VARIANTS = {
    "l2_sp": (AdamWL2SP, torch.float32, {"l2_sp": 0.1}),
    "rounded": (AdamWL2SP, torch.bfloat16, {"seed": 3}),
    "master": (AdamWL2SP, torch.bfloat16, {"master_weights": True, "ema_decay": 0.9}),
    "sgd": (lambda named, **options: FusedOptimizer(named, "sgd", **options), torch.float32, {"momentum": 0.9}),
    "lion": (lambda named, **options: FusedOptimizer(named, "lion", **options), torch.bfloat16, {}),
    "clipped": (AdamWL2SP, torch.float32, {"max_grad_norm": 1.0, "amsgrad": True}),
    "flat": (FSAM, torch.float32, {"flatten": True}),
    "fisher_sam": (FSAM, torch.float32, {"mask": FisherMask(0.3, interval=4, samples=2)}),
    "gsam": (FSAM, torch.float32, {"alpha": 0.3}),
    "esam": (FSAM, torch.bfloat16, {"beta": 0.5}),
    "looksam": (FSAM, torch.float32, {"schedule": Schedule(every=3, reuse=0.5)}),
    "sam_around": (lambda named, lr: SAM(torch.optim.Adagrad(named, lr=lr)), torch.float32, {}),
    "sam_around_masked": (
        lambda named, lr: SAM(torch.optim.SGD(named, lr=lr), mask=FisherMask(0.3, interval=4)),
        torch.float32,
        {},
    ),
    "momentum_sam": (MomentumSAM, torch.bfloat16, {}),
}


def train(model: nn.Module, optimizer, steps: int, start: int = 0) -> None:
    objective = Objective(model)
    for step in range(start, start + steps):

        def closure(step=step):
            optimizer.zero_grad()
            loss = objective(step)
            loss.backward()
            return loss

        optimizer.step(closure)


@duplicates
@pytest.mark.parametrize(("make", "dtype", "options"), VARIANTS.values(), ids=VARIANTS.keys())
def test_copy_of_model_and_optimizer_continues_identically_and_apart(make, dtype, options, duplicate):
    model = small_model(dtype)
    optimizer = make(model.named_parameters(), lr=0.01, **options)
    train(model, optimizer, 3)
    twin, twin_optimizer = duplicate((model, optimizer))
    assert_same_bits(twin, model)
    train(twin, twin_optimizer, 3, start=3)
    assert not torch.equal(twin["dense"].weight, model["dense"].weight)
    train(model, optimizer, 3, start=3)
    assert_same_bits(twin, model)


@duplicates
def test_copy_trains_the_same_part_of_the_weights(duplicate):
    model = small_model()
    optimizer = AdamWL2SP(model.named_parameters(), lr=0.01, trainable=FishMask.random(model, 0.1, 0))
    train(model, optimizer, 2)
    twin, twin_optimizer = duplicate((model, optimizer))
    for each, own in ((model, optimizer), (twin, twin_optimizer)):
        train(each, own, 2, start=2)
    assert_same_bits(twin, model)


@duplicates
@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM, MomentumSAM])
def test_copy_of_an_optimizer_that_has_not_begun_begins(kind, duplicate):
    model = small_model()
    twin, optimizer = duplicate((model, kind(model.parameters(), lr=0.01)))
    train(twin, optimizer, 2)
    expected = small_model()
    train(expected, kind(expected.parameters(), lr=0.01), 2)
    assert_same_bits(twin, expected)


@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM, MomentumSAM])
def test_copy_of_the_optimizer_alone_has_parameters_of_its_own(kind):
    model = small_model()
    optimizer = kind(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    other = copy.deepcopy(optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    other.step()
    assert all(map(torch.equal, model.parameters(), before))
    assert not any(map(torch.equal, other.param_groups[0]["params"], before))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled], ids=["copy", "deepcopy", "pickle"])
@pytest.mark.parametrize("make", [FSAM, lambda params: SAM(torch.optim.SGD(params, lr=0.1))], ids=["fsam", "sam"])
def test_copying_a_perturbed_optimizer_is_refused_with_what_to_do(make, duplicate):
    model = small_model()
    optimizer = make(model.parameters())
    Objective(model)(0).backward()
    optimizer.perturb()
    with pytest.raises(RuntimeError, match="perturbed: call restore"):
        duplicate(optimizer)
    optimizer.restore()
    duplicate(optimizer)


@duplicates
def test_scheduler_of_a_copy_steers_the_copy(duplicate):
    model = small_model()
    optimizer = FSAM(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _decay)
    train(model, optimizer, 1)
    scheduler.step()
    _, other, others = duplicate((model, optimizer, scheduler))
    others.step()
    assert other.param_groups[0]["lr"] == 0.01 * _decay(2)
    assert optimizer.param_groups[0]["lr"] == 0.01 * _decay(1)


def _decay(step: int) -> float:
    return 1 / (1 + step)
