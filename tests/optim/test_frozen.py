"""Frozen parameters of any type, groups without trained parameters, freezing and unfreezing in training."""

import copy

import pytest
import torch
from torch import nn

from fsam_triton import FSAM, SAM, AdamWL2SP, FisherMask, MomentumSAM
from fsam_triton.optim.optimizer import FusedOptimizer
from tests.optim.by_hand import assert_same, every_kind, every_state, halves, square_model, take_step
from tests.problem import Problem

pytestmark = pytest.mark.usefixtures("one_thread")


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


FROZEN = {
    "int8": lambda: torch.arange(12, dtype=torch.int8).view(3, 4),
    "uint8": lambda: torch.arange(12, dtype=torch.uint8),
    "bool": lambda: torch.ones(5, dtype=torch.bool),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "float": lambda: torch.ones(3, 5),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "meta": lambda: torch.ones(3, device="meta"),
    "empty": lambda: torch.ones(0, 3),
}


@every_kind
@pytest.mark.parametrize("make_tensor", FROZEN.values(), ids=FROZEN.keys())
def test_frozen_parameters_of_any_type_are_left_alone(kind, make_tensor):
    def program(make):
        model = square_model()
        base = frozen(make_tensor())
        address = None if base.is_sparse else base.data_ptr()
        optimizer = make([base, *model.parameters()])
        for step in range(3):
            take_step(model, optimizer, step)
        optimizer.load_state_dict(optimizer.state_dict())
        take_step(model, optimizer, 3)
        assert base not in optimizer.state
        if not base.is_meta:
            assert torch.equal(base.to_dense().to(torch.complex64), make_tensor().to_dense().to(torch.complex64))
        assert base.is_sparse or base.data_ptr() == address
        return model.parameters()

    assert_same(kind, program, 4)


GROUPS = {
    "empty": lambda model: [{"params": []}],
    "frozen": lambda model: [{"params": [frozen(torch.ones(3)), frozen(torch.ones(3, dtype=torch.int8))]}],
    "both": lambda model: [{"params": []}, {"params": [frozen(torch.ones(3))]}],
}


@every_kind
@pytest.mark.parametrize("others", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_groups_without_trained_parameters_take_no_part(kind, others, first):
    def program(make):
        model = square_model()
        trained = [{"params": list(model.parameters())}]
        optimizer = make(others(model) + trained if first else trained + others(model))
        for step in range(3):
            take_step(model, optimizer, step)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        take_step(model, optimizer, 3)
        return model.parameters()

    assert_same(kind, program, 4)


OPTIMIZERS = {
    "adamw": AdamWL2SP,
    "sgd": lambda groups: FusedOptimizer(groups, "sgd", 0.1),
    "lion": lambda groups: FusedOptimizer(groups, "lion", 0.1),
    "fsam": FSAM,
    "momentum_sam": MomentumSAM,
    "sam": lambda groups: SAM(torch.optim.SGD(groups, lr=0.1)),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
def test_optimizer_of_nothing_that_is_trained_does_nothing(make, groups):
    optimizer = make(groups(None))
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer = copy.deepcopy(optimizer)
    optimizer.step()
    if hasattr(optimizer, "restore"):
        assert not optimizer.perturbed
        optimizer.restore()
    assert optimizer.state_dict()["state"] == {}


def test_mask_without_anything_to_choose_from_is_refused():
    with pytest.raises(ValueError, match="keep_ratio"):
        FSAM([("weight", frozen(torch.ones(3, 4)))], mask=FisherMask(0.5))


# -- over time ---------------------------------------------------------------------------------------------------------


@every_kind
def test_parameters_frozen_and_unfrozen_in_training_keep_their_state(kind):
    def program(make):
        model = square_model()
        model[2].requires_grad_(False)
        optimizer = make(model.parameters())
        for step in range(8):
            if step in (2, 6):
                model[2].requires_grad_(True)
            if step in (3, 4):
                model[0].requires_grad_(step == 4)
            if step == 5:
                model[2].requires_grad_(False)
            take_step(model, optimizer, step)
        return model.parameters()

    assert_same(kind, program, 8)


@every_kind
def test_parameter_frozen_with_a_gradient_is_updated_as_under_torch(kind):
    def program(make):
        model = square_model()
        optimizer = make(model.parameters())
        take_step(model, optimizer, 0)
        model[0].weight.requires_grad_(False)
        assert model[0].weight.grad is not None
        passes = halves(optimizer)
        for half in passes:
            for p in model.parameters():
                p.grad = torch.ones_like(p) if p is model[0].weight else None
            half()
        return model.parameters()

    assert_same(kind, program, 2)


@every_state
def test_state_of_a_parameter_that_is_frozen_when_it_is_loaded_is_kept(kind):
    """Training in phases, resumed in one in which a layer is frozen."""
    model = square_model()
    optimizer = kind.ours(model.parameters(), lr=0.01)
    for step in range(3):
        take_step(model, optimizer, step)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    resumed = square_model()
    resumed.load_state_dict(saved[0])
    resumed[0].requires_grad_(False)
    fresh = kind.ours(resumed.parameters(), lr=0.01)
    fresh.load_state_dict(saved[1])
    for each, own in ((model, optimizer), (resumed, fresh)):
        own.zero_grad()
        each[0].requires_grad_(False)
        take_step(each, own, 3)
        each[0].requires_grad_(True)
        take_step(each, own, 4)
    assert float(fresh.state[resumed[0].weight]["step"]) == 4
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


@every_state
def test_parameter_that_never_has_a_gradient_has_no_state_and_does_not_decay(kind):
    model = square_model()
    optimizer = kind.ours(model.parameters(), lr=0.01, weight_decay=0.5)
    before = model[2].weight.detach().clone()
    for step in range(2):
        for half in halves(optimizer):
            optimizer.zero_grad()
            Problem().loss(model[0].parameters(), step).backward()
            half()
    assert torch.equal(model[2].weight, before)
    assert model[2].weight not in optimizer.state
