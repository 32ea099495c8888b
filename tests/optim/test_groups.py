"""`param_groups` is the truth: groups and parameters replaced, added, taken out, hyper-parameters changed."""

import pytest
import torch
from torch import nn

from fsam_triton import FSAM, AdamWL2SP, ArgumentError, FisherMask
from tests.optim.by_hand import assert_same, every_kind, every_state, square_model, take_step

pytestmark = pytest.mark.usefixtures("one_thread")


def two_groups(model: nn.Module) -> list[dict]:
    params = list(model.parameters())
    return [{"params": params[:3], "lr": 0.01}, {"params": params[3:], "lr": 0.002, "weight_decay": 0.3}]


# -- groups ------------------------------------------------------------------------------------------------------------


def replaced_dict(optimizer):
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.005}


def replaced_list(optimizer):
    optimizer.param_groups = [dict(group) for group in reversed(optimizer.param_groups)]


def appended_group(optimizer):
    first = optimizer.param_groups[0]
    optimizer.param_groups.append({**first, "params": [first["params"].pop()], "lr": 0.003})


def removed_group(optimizer):
    del optimizer.param_groups[1]


def exchanged_parameters(optimizer):
    one, other = optimizer.param_groups
    one["params"], other["params"] = other["params"], one["params"]


def reversed_parameters(optimizer):
    optimizer.param_groups[0]["params"].reverse()


def tuple_of_parameters(optimizer):
    optimizer.param_groups[0]["params"] = tuple(optimizer.param_groups[0]["params"])


def removed_parameter(optimizer):
    del optimizer.param_groups[0]["params"][1]


def moved_parameter(optimizer):
    one, other = optimizer.param_groups
    one["params"].append(other["params"].pop(0))


GROUP_CHANGES = [
    replaced_dict,
    replaced_list,
    appended_group,
    removed_group,
    exchanged_parameters,
    reversed_parameters,
    tuple_of_parameters,
    removed_parameter,
    moved_parameter,
]


@every_kind
@pytest.mark.parametrize("change", GROUP_CHANGES, ids=lambda change: change.__name__)
def test_changed_groups_are_followed(kind, change):
    def program(make):
        model = square_model()
        optimizer = make(two_groups(model))
        for step in range(6):
            if step == 2:
                change(optimizer)
                model.zero_grad()
            take_step(model, optimizer, step)
        return model.parameters()

    assert_same(kind, program, 6)


@every_kind
def test_group_dicts_that_are_new_at_every_step_are_followed(kind):
    """As some schedulers leave them."""

    def program(make):
        model = square_model()
        optimizer = make(two_groups(model))
        for step in range(4):
            optimizer.param_groups = [{**group, "lr": group["lr"] / (1 + step)} for group in optimizer.param_groups]
            take_step(model, optimizer, step)
        return model.parameters()

    assert_same(kind, program, 4)


@every_kind
def test_parameter_put_into_a_group_trains_from_then_on(kind):
    def program(make):
        model = square_model()
        optimizer = make(model[0].parameters())
        for step in range(4):
            if step == 2:
                model.zero_grad()
                optimizer.param_groups[0]["params"].extend(model[2].parameters())
            take_step(model, optimizer, step)
        return model.parameters()

    assert_same(kind, program, 4)


@every_kind
def test_new_parameter_in_the_place_of_an_old_one_trains_with_the_state_it_is_given(kind):
    """A layer that is pruned in training: fewer rows, and their moments."""

    def program(make):
        model = square_model()
        optimizer = make([{"params": [p]} for p in model.parameters()])
        rows = torch.tensor([0, 2, 3, 5, 7])
        for step in range(4):
            if step == 2:
                for i, name in enumerate(("weight", "bias")):
                    old = optimizer.param_groups[i]["params"][0]
                    new = nn.Parameter(old.detach()[rows])
                    state = dict(optimizer.state.pop(old))
                    state |= {key: state[key][rows] for key in ("exp_avg", "exp_avg_sq")}
                    setattr(model[0], name, new)
                    optimizer.param_groups[i]["params"][0] = new
                    optimizer.state[new] = state
            take_step(model, optimizer, step)
        return model.parameters()

    assert_same(kind, program, 4)


@every_kind
def test_new_parameter_without_state_begins_anew(kind):
    def program(make):
        model = square_model()
        optimizer = make(model.parameters())
        for step in range(4):
            if step == 2:
                model[0].weight = nn.Parameter(model[0].weight.detach() / 2)
                optimizer.param_groups[0]["params"][0] = model[0].weight
            take_step(model, optimizer, step)
        assert float(optimizer.state[model[0].weight]["step"]) == 2
        return model.parameters()

    assert_same(kind, program, 4)


@every_kind
def test_optimizers_of_the_same_parameters_take_turns(kind):
    def program(make):
        model = square_model()
        optimizers = [make(model.parameters()) for _ in range(2)]
        for step in range(6):
            take_step(model, optimizers[step % 2], step)
        return model.parameters()

    assert_same(kind, program, 6)


# -- hyper-parameters --------------------------------------------------------------------------------------------------


@every_kind
def test_hyper_parameters_of_a_group_change_at_every_step(kind):
    def program(make):
        model = square_model()
        optimizer = make(two_groups(model))
        for step in range(6):
            changes = {"betas": (0.9 - step / 100, 0.999 - step / 1000), "eps": 10.0 ** (-2 - step)}
            optimizer.param_groups[step % 2].update(**changes, weight_decay=0.1 * step, lr=0.002 * step)
            take_step(model, optimizer, step)
        return model.parameters()

    assert_same(kind, program, 6)


def test_direction_of_a_group_may_turn():
    model, twin = square_model(), square_model()
    for trained, kind in ((model, AdamWL2SP), (twin, torch.optim.AdamW)):
        optimizer = kind(two_groups(trained), eps=0.1)
        for step in range(6):
            optimizer.param_groups[1]["maximize"] = step % 3 == 2
            take_step(trained, optimizer, step)
    for p, expected in zip(model.parameters(), twin.parameters(), strict=True):
        # Moments that cancel are as well known as those that do not; over eps = 0.1 they count at most fivefold.
        torch.testing.assert_close(p, expected, rtol=0, atol=6 * 5 * 0.01 * 150 * torch.finfo(p.dtype).eps)


@every_kind
def test_learning_rate_may_become_a_tensor_and_a_number_again(kind):
    def program(make):
        model = square_model()
        optimizer = make(two_groups(model))
        group = optimizer.param_groups[0]
        for step in range(6):
            if step == 1:
                group["lr"] = torch.tensor(0.008, dtype=torch.float64)
            if step in (2, 3):
                group["lr"].mul_(0.5)
            if step == 4:
                group["lr"] = 0.001
            if step == 5:
                group["lr"] = torch.tensor([0.004], dtype=torch.float64)
            take_step(model, optimizer, step)
        return model.parameters()

    assert_same(kind, program, 6)


@every_state
def test_amsgrad_of_a_group_can_be_switched_off_and_on(kind):
    def program(make):
        model = square_model()
        optimizer = make([{**group, "amsgrad": i == 0} for i, group in enumerate(two_groups(model))])
        for step in range(6):
            if step in (2, 4):
                optimizer.param_groups[0]["amsgrad"] = step == 4
            take_step(model, optimizer, step)
        return model.parameters()

    assert_same(kind, program, 6)


@every_state
def test_amsgrad_switched_on_late_begins_with_the_moments_that_there_are(kind):
    """PyTorch's raises a KeyError."""
    models = [square_model(), square_model()]
    for model, late in zip(models, (False, True), strict=True):
        optimizer = kind.ours(model.parameters(), lr=0.01)
        for step in range(4):
            if step == 2 and late:
                optimizer.param_groups[0]["amsgrad"] = True
            # Moments that only grow are their own maximum.
            take_step(model, optimizer, step)
        if late:
            state = optimizer.state[model[0].weight]
            assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])
    for p, expected in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, expected)


@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM])
def test_l2_sp_of_a_group_can_be_switched_off_and_on_with_the_same_anchors(kind):
    model = square_model()
    optimizer = kind(model.named_parameters(), lr=0.01, l2_sp=0.1)
    initial = {p: p.detach().clone() for p in model.parameters()}
    for step in range(6):
        if step in (2, 4):
            optimizer.param_groups[0]["l2_sp"] = 0.1 if step == 4 else 0.0
        take_step(model, optimizer, step)
    for p, weight in initial.items():
        assert torch.equal(optimizer.state[p]["anchor"], weight)


@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM])
def test_l2_sp_that_is_off_decays_to_zero(kind):
    model, twin = square_model(), square_model()
    optimizers = [kind(each.parameters(), lr=0.01, weight_decay=0.3) for each in (model, twin)]
    optimizers[0].param_groups[0]["l2_sp"] = 0.1
    optimizers[0].param_groups[0]["l2_sp"] = 0.0
    for step in range(3):
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            take_step(each, optimizer, step)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM])
def test_l2_sp_switched_on_after_updates_without_anchors_is_refused(kind):
    model = square_model()
    optimizer = kind(model.parameters(), lr=0.01)
    take_step(model, optimizer, 0)
    optimizer.param_groups[0]["l2_sp"] = 0.1
    with pytest.raises(ArgumentError) as error:
        take_step(model, optimizer, 1)
    assert error.value.name == "l2_sp"


# -- names -------------------------------------------------------------------------------------------------------------


def test_parameter_appended_without_a_name_is_chosen_from_by_a_mask():
    model = square_model()
    optimizer = FSAM(list(model[0].named_parameters()), lr=0.01, mask=FisherMask(0.5))
    take_step(model, optimizer, 0)
    optimizer.param_groups[0]["params"].append(model[2].weight)
    take_step(model, optimizer, 1)
    assert set(optimizer.mask_density()) == {"weight", "bias", "2"}
    assert 0 < optimizer.mask_density()["2"] < 1


def test_parameter_appended_without_a_name_has_no_anchor():
    model = square_model()
    named = [(name, p) for name, p in model.named_parameters() if name.startswith("0.")]
    anchors = {name: p.detach() + 1 for name, p in named}
    optimizer = AdamWL2SP(named, lr=0.01, l2_sp=0.1, anchors=anchors)
    take_step(model, optimizer, 0)
    optimizer.param_groups[0]["params"].append(model[2].weight)
    take_step(model, optimizer, 1)
    assert "anchor" in optimizer.state[model[0].weight]
    assert "anchor" not in optimizer.state[model[2].weight]


def test_parameters_taken_out_while_their_names_stay_are_refused_where_names_count():
    model = square_model()
    anchors = {name: p.detach() + 1 for name, p in model.named_parameters()}
    optimizer = AdamWL2SP(model.named_parameters(), lr=0.01, l2_sp=0.1, anchors=anchors)
    take_step(model, optimizer, 0)
    del optimizer.param_groups[0]["params"][0]
    with pytest.raises(ArgumentError) as error:
        take_step(model, optimizer, 1)
    assert error.value.name == "param_names"
    del optimizer.param_groups[0]["param_names"][0]
    take_step(model, optimizer, 1)
    for name, p in list(model.named_parameters())[1:]:
        assert torch.equal(optimizer.state[p]["anchor"], anchors[name])
