"""Schedule(last="decay"): the range is the learning rate's decay, whatever scheduler makes it."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from fsam_triton import FSAM, SAM, ArgumentError, MomentumSAM, Schedule
from tests.training import assert_same_bits, round_trip

pytestmark = pytest.mark.usefixtures("one_thread")
DECAY = Schedule(last="decay")


def around(params, **kwargs) -> SAM:
    return SAM(torch.optim.SGD(params, lr=0.1), **{name: v for name, v in kwargs.items() if name != "lr"})


def warmup_stable_decay(optimizer) -> lr_scheduler.LRScheduler:
    """Three steps up, three steps at the top, four down."""
    return lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 3, 1.0, (10 - step) / 5))


SCHEDULERS = {
    "warm-up, stable, decay": (warmup_stable_decay, [6, 7, 8, 9]),
    "constant": (lambda optimizer: lr_scheduler.ConstantLR(optimizer, factor=1.0), []),
    "linear": (lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=10), list(range(1, 10))),
    "one cycle": (lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10, pct_start=0.3), list(range(3, 10))),
    "restarts": (lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4), [1, 2, 3, 5, 6, 7, 9]),
    "steps": (lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [5, 8]), list(range(5, 10))),
    # Which multiplies the last learning rate by numbers that are 1 but for rounding.
    "polynomial of power 0": (lambda o: lr_scheduler.PolynomialLR(o, total_iters=20, power=0.0), []),
}


def train(model: nn.Module, optimizer, scheduler, steps: int) -> list[int]:
    """Which steps perturbed."""
    sharp = []
    for step in range(steps):
        calls = []

        def closure(calls=calls):
            calls.append(optimizer.perturbed)
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4)).square().sum()
            loss.backward()
            return loss

        if isinstance(optimizer, MomentumSAM):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4)).square().sum()
            calls.append(optimizer.perturbed)
            loss.backward()
            optimizer.step()
        else:
            optimizer.step(closure)
        scheduler.step()
        sharp += [step] if any(calls) else []
    return sharp


@pytest.mark.parametrize(("scheduler", "expected"), SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.parametrize("make", [FSAM, around, MomentumSAM])
def test_steps_of_the_decay_are_sharp(make, scheduler, expected):
    model = nn.Linear(4, 2)
    optimizer = make(model.parameters(), lr=0.1, schedule=DECAY)
    # MomentumSAM has no momentum to go along in its first step.
    assert train(model, optimizer, scheduler(optimizer), 10) == expected


def test_every_counts_from_the_beginning_of_the_decay():
    model = nn.Linear(4, 2)
    optimizer = FSAM(model.parameters(), lr=0.1, schedule=Schedule(last="decay", every=2))
    assert train(model, optimizer, warmup_stable_decay(optimizer), 10) == [6, 8]


def test_warm_up_of_rho_counts_from_the_beginning_of_the_decay():
    model = nn.Linear(4, 2)
    optimizer = FSAM(model.parameters(), lr=0.1, rho=0.5, schedule=Schedule(last="decay", rho_warmup=2))
    scheduler, lengths = warmup_stable_decay(optimizer), []
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        if optimizer.is_sharp:
            optimizer.perturb()
            moved = [p.detach() - optimizer.clean_weight(p) for p in model.parameters()]
            lengths.append(math.sqrt(sum(float(m.square().sum()) for m in moved)))
            model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    assert lengths == pytest.approx([0.0, 0.25, 0.5, 0.5], rel=1e-5, abs=1e-9)


def test_learning_rate_in_a_tensor_counts_too():
    model = nn.Linear(4, 2)
    optimizer = FSAM(model.parameters(), lr=torch.tensor(0.1), schedule=DECAY)
    assert train(model, optimizer, warmup_stable_decay(optimizer), 10) == [6, 7, 8, 9]


@pytest.mark.parametrize("make", [FSAM, around])
@pytest.mark.parametrize("at", [2, 5, 8])
def test_resumed_training_knows_where_the_learning_rate_stands(make, at):
    model = nn.Linear(4, 2)
    optimizer = make(model.parameters(), lr=0.1, schedule=Schedule(last="decay", every=2))
    scheduler = warmup_stable_decay(optimizer)
    train(model, optimizer, scheduler, at)
    twin = copy.deepcopy(model)
    other = make(twin.parameters(), lr=0.1, schedule=Schedule(last="decay", every=2))
    resumed = warmup_stable_decay(other)
    other.load_state_dict(round_trip(optimizer.state_dict()))
    resumed.load_state_dict(scheduler.state_dict())
    assert train(twin, other, resumed, 10 - at) == train(model, optimizer, scheduler, 10 - at)
    assert_same_bits(model, twin)


def test_group_that_is_added_in_the_decay_is_in_it():
    model, more = nn.Linear(4, 2), nn.Linear(4, 2)
    optimizer = FSAM(model.parameters(), lr=0.1, rho=0.5, schedule=Schedule(last="decay", rho_warmup=2))
    train(model, optimizer, warmup_stable_decay(optimizer), 8)
    optimizer.add_param_group({"params": list(more.parameters())})
    assert optimizer.param_groups[1]["decay_first"] == 6


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [({"last": "tail"}, "last"), ({"last": "decay", "rho_follows": "cosine", "total_steps": 10}, "rho_follows")],
)
def test_wrong_argument_is_named(kwargs, name):
    with pytest.raises(ArgumentError) as caught:
        Schedule(**kwargs)
    assert caught.value.name == name
