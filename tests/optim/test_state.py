"""`state[p]` is the truth: entries and tensors replaced, exchanged, deleted, moved or edited in place are followed."""

from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, AdamWL2SP, ArgumentError
from fsam_triton.optim.optimizer import FusedOptimizer
from tests.optim.by_hand import assert_same, every_kind, every_state, halves, parameters_of, square_model, take_step
from tests.problem import small_model
from tests.training import assert_same_bits, train

pytestmark = pytest.mark.usefixtures("one_thread")


def entries(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    return list(optimizer.state.values())


# -- what somebody does to it ------------------------------------------------------------------------------------------


def new_dict(optimizer):
    optimizer.state = defaultdict(dict)


def cleared(optimizer):
    optimizer.state.clear()


def entry_deleted(optimizer):
    for p in list(optimizer.state)[:2]:
        del optimizer.state[p]


def entry_emptied(optimizer):
    for entry in entries(optimizer)[1:]:
        entry.clear()


def entry_replaced(optimizer):
    for p, entry in list(optimizer.state.items())[2:]:
        optimizer.state[p] = {name: value / 2 for name, value in entry.items()}


def entry_copied(optimizer):
    kept = {p: {name: value.clone() for name, value in entry.items()} for p, entry in optimizer.state.items()}
    optimizer.state.clear()
    optimizer.state.update(kept)


def zeroed_in_place(optimizer):
    for entry in entries(optimizer)[::2]:
        for value in entry.values():
            value.zero_()


def edited_in_place(optimizer):
    for entry in entries(optimizer):
        entry["exp_avg"].mul_(0.5)
        entry["exp_avg_sq"][..., 0] *= 4
        entry["step"] += 10


def tensor_replaced(optimizer):
    for entry in entries(optimizer):
        entry["exp_avg"] = entry["exp_avg"] / 2


def step_replaced(optimizer):
    for entry in entries(optimizer):
        entry["step"] = torch.tensor(7.0)


def memory_replaced(optimizer):
    for entry in entries(optimizer):
        entry["exp_avg"].data = entry["exp_avg"] / 2


def set_to_other_memory(optimizer):
    for entry in entries(optimizer):
        entry["exp_avg_sq"].set_(entry["exp_avg_sq"] * 4)


def moved_into_shared_memory_and_edited(optimizer):
    for entry in entries(optimizer):
        entry["exp_avg"].share_memory_().mul_(0.5)


def entries_exchanged(optimizer):
    one, other = list(optimizer.state)[:2]
    optimizer.state[one], optimizer.state[other] = optimizer.state[other], optimizer.state[one]


def tensors_exchanged(optimizer):
    one, other = entries(optimizer)[:2]
    one["exp_avg"], other["exp_avg"] = other["exp_avg"], one["exp_avg"]


def memory_exchanged(optimizer):
    one, other = entries(optimizer)[:2]
    one["exp_avg"].data, other["exp_avg"].data = other["exp_avg"].data.clone(), one["exp_avg"].data.clone()


def transposed(optimizer):
    entry = entries(optimizer)[0]
    entry["exp_avg"] = entry["exp_avg"].t()


def keys_of_others(optimizer):
    for i, entry in enumerate(entries(optimizer)):
        entry["rank"], entry["sizes"] = i, torch.ones(2)
    optimizer.state["of all"] = {"count": 3}


CHANGES = [
    new_dict,
    cleared,
    entry_deleted,
    entry_emptied,
    entry_replaced,
    entry_copied,
    zeroed_in_place,
    edited_in_place,
    tensor_replaced,
    step_replaced,
    memory_replaced,
    set_to_other_memory,
    moved_into_shared_memory_and_edited,
    entries_exchanged,
    tensors_exchanged,
    memory_exchanged,
    transposed,
    keys_of_others,
]
every_change = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


def of_one_shape() -> nn.Module:
    weight = square_model()[0].weight.detach()
    return parameters_of(*(weight * factor for factor in (1, -1, 0.5)))


@every_kind
@every_change
@pytest.mark.parametrize("when", [2, (1, 2, 3)], ids=["once", "at_every_step"])
def test_changed_state_is_followed(kind, change, when):
    def program(make):
        model = of_one_shape()
        # A second moment that was made smaller than the square of the first leaves a quotient above 1.
        optimizer = make(model.parameters(), eps=0.1)
        for step in range(5):
            if step in (when if isinstance(when, tuple) else (when,)):
                change(optimizer)
            take_step(model, optimizer, step)
        return [*model.parameters(), *(optimizer.state[p]["exp_avg"] for p in model.parameters())]

    # Quotients of at most 1.5 / 0.1 instead of 3, from gradients whose errors count 1 / 0.1 instead of 1 / 0.5.
    assert_same(kind, program, 5 * 5)


@every_kind
@every_change
def test_state_changed_between_the_passes_is_followed(kind, change):
    def program(make):
        model = of_one_shape()
        optimizer = make(model.parameters(), eps=0.1)
        for step in range(2):
            take_step(model, optimizer, step)
        passes = halves(optimizer)
        for half in passes:
            optimizer.zero_grad()
            if half is passes[-1]:
                change(optimizer)
            model_loss = sum((p * p.sin()).sum() for p in model.parameters())
            model_loss.backward()
            half()
        return model.parameters()

    # Gradients up to 2 here, and see above.
    assert_same(kind, program, 3 * 7)


@every_kind
def test_state_given_before_the_first_step_is_where_training_begins(kind):
    def program(make):
        model = square_model()
        optimizer = make(model.parameters())
        for p in model.parameters():
            moments = {"exp_avg": torch.full_like(p, 0.5), "exp_avg_sq": torch.full_like(p, 0.75)}
            optimizer.state[p] = {"step": torch.tensor(3.0), **moments}
        for step in range(2):
            take_step(model, optimizer, step)
        return model.parameters()

    # As if five steps were done.
    assert_same(kind, program, 5)


@every_state
def test_parameter_has_no_state_before_its_first_update(kind):
    model = square_model()
    optimizer = kind.ours(model.parameters(), lr=0.01)
    for half in halves(optimizer):
        assert not optimizer.state
        model[0](torch.ones(1, 8, dtype=torch.float64)).sum().backward()
        half()
    assert set(optimizer.state) == set(model[0].parameters())


@every_state
def test_state_shows_the_moments_as_they_are_at_any_time(kind):
    model = square_model()
    optimizer = kind.ours(model.parameters(), lr=0.01)
    take_step(model, optimizer, 0)
    shown = {p: dict(entry) for p, entry in optimizer.state.items()}
    before = {p: {name: value.clone() for name, value in entry.items()} for p, entry in shown.items()}
    take_step(model, optimizer, 1)
    for p, entry in optimizer.state.items():
        for name, value in entry.items():
            assert value is shown[p][name]
            assert not torch.equal(value, before[p][name])


@every_state
def test_state_of_another_shape_is_refused_by_name(kind):
    model = square_model()
    optimizer = kind.ours(model.named_parameters(), lr=0.01)
    take_step(model, optimizer, 0)
    optimizer.state[model[0].weight]["exp_avg"] = torch.zeros(3, 8, dtype=torch.float64)
    with pytest.raises(ArgumentError) as error:
        take_step(model, optimizer, 1)
    assert error.value.name == "state 'exp_avg' of parameter '0.weight'"
    assert error.value.value == (3, 8)


# -- what else we keep there -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM])
def test_remainder_taken_out_leaves_the_rounded_weights_as_masters(kind):
    model = small_model(torch.bfloat16)
    optimizer = kind(model.parameters(), lr=0.01, master_weights=True)
    train(model, optimizer, 3)
    for entry in entries(optimizer):
        del entry["remainder"]
    optimizer.zero_grad()
    optimizer.step()
    for p in model.parameters():
        assert torch.equal(optimizer.master_weight(p), p.float())


@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM])
def test_average_taken_out_begins_anew_at_the_weights(kind):
    model, twin = small_model(), small_model()
    optimizer = kind(model.parameters(), lr=0.01, ema_decay=0.9)
    train(model, optimizer, 3)
    for entry in entries(optimizer):
        del entry["ema"]
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 1, start=3)
    twin.load_state_dict(model.state_dict())
    for p, start in zip(model.parameters(), before, strict=True):
        expected = start + (1 - 0.9) * (p.detach() - start)
        torch.testing.assert_close(optimizer.state[p]["ema"], expected, rtol=4 * torch.finfo(p.dtype).eps, atol=0)


@pytest.mark.parametrize("take", [lambda o: o.state.clear(), lambda o: [e.pop("anchor") for e in o.state.values()]])
def test_anchors_outlive_the_state(take):
    model = small_model()
    optimizer = AdamWL2SP(model.parameters(), lr=0.01, l2_sp=0.1)
    train(model, optimizer, 3)
    take(optimizer)
    train(model, optimizer, 1, start=3)
    for p, initial in zip(model.parameters(), small_model().parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["anchor"], initial)


def test_anchor_replaced_in_the_state_is_the_anchor():
    models = [small_model(), small_model()]
    anchors = {name: p.detach() * 2 for name, p in small_model().named_parameters()}
    given = AdamWL2SP(models[0].named_parameters(), lr=0.01, l2_sp=0.5, anchors=anchors)
    replaced = AdamWL2SP(models[1].named_parameters(), lr=0.01, l2_sp=0.5)
    for model, optimizer in zip(models, (given, replaced), strict=True):
        model.zero_grad()
        for p in model.parameters():
            optimizer.state[p] = {"anchor": p.detach() * 2}
        train(model, optimizer, 2)
    assert_same_bits(*models)


@pytest.mark.parametrize(("rule", "name"), [("sgd", "momentum_buffer"), ("lion", "exp_avg")])
def test_state_of_other_rules_is_followed_too(rule, name):
    model, twin = small_model(), small_model()
    options = {"momentum": 0.9} if rule == "sgd" else {}
    for each, reset in ((model, True), (twin, False)):
        optimizer = FusedOptimizer(each.parameters(), rule, 0.01, **options)
        train(each, optimizer, 2)
        if reset:
            for entry in entries(optimizer):
                entry[name] = torch.zeros_like(entry[name])
                entry["step"] = torch.zeros(())
        else:
            optimizer = FusedOptimizer(each.parameters(), rule, 0.01, **options)
        train(each, optimizer, 2, start=2)
    assert_same_bits(model, twin)
