"""State dicts of other optimizers, and damaged ones, are refused by name; nothing is changed then."""

import copy
import math

import pytest
import torch
from torch import nn

from fsam_triton import FSAM, AdamWL2SP, ArgumentError, MomentumSAM
from tests.problem import small_model
from tests.training import assert_same_bits, assert_unchanged, closure_of, train, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(kind=AdamWL2SP, steps: int = 3, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = small_model(seed=seed)
    optimizer = kind(model.named_parameters(), lr=0.01)
    train(model, optimizer, steps)
    return model, optimizer


def assert_trains_on_as_if_nothing_had_happened(kind, model, optimizer) -> None:
    twin, expected = trained(kind)
    for each, own in ((model, optimizer), (twin, expected)):
        train(each, own, 3, start=3)
    assert_same_bits(model, twin)


def state_of_sgd() -> dict:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 2)
    return optimizer.state_dict()


def state_of_adafactor() -> dict:
    model = small_model()
    optimizer = torch.optim.Adafactor(model.parameters())
    train(model, optimizer, 2)
    return optimizer.state_dict()


def damaged(**changes) -> dict:
    """Our own state with changes in the first parameter's entry; a value of None takes the key away."""
    state = copy.deepcopy(trained()[1].state_dict())
    entry = state["state"][0]
    entry.update(changes)
    for name in [name for name, value in changes.items() if value is None]:
        del entry[name]
    return state


def without(key: str) -> dict:
    return {name: value for name, value in damaged().items() if name != key}


def with_group(**changes) -> dict:
    state = damaged()
    state["param_groups"][0].update(changes)
    return state


FOREIGN = {
    "sgd": (state_of_sgd, r"dense\.weight.*momentum_buffer"),
    "adafactor": (state_of_adafactor, r"eps: \(None, 0\.001\)"),
    "lion": (lambda: damaged(step=None, exp_avg_sq=None), r"dense\.weight.*'exp_avg'\]"),
    "nadam": (lambda: damaged(mu_product=torch.ones(())), "mu_product"),
    "other_layout": (lambda: damaged(exp_avg_sq=None, exp_avg_sq_blocks=torch.ones(3)), "exp_avg_sq_blocks"),
    "integers": (lambda: damaged(exp_avg=torch.ones(16, 24, dtype=torch.int64)), r"exp_avg.*torch\.int64"),
    "complex": (lambda: damaged(exp_avg=torch.ones(16, 24, dtype=torch.complex64)), r"exp_avg.*torch\.complex64"),
    "sparse": (lambda: damaged(exp_avg=torch.ones(16, 24).to_sparse()), "exp_avg.*dense"),
    "not_a_tensor": (lambda: damaged(exp_avg=[0.0] * 384), "exp_avg.*list"),
    "step_of_text": (lambda: damaged(step="three"), "step.*three"),
    "negative_step": (lambda: damaged(step=torch.tensor(-1.0)), "step.*-1"),
    "complex_mask": (lambda: damaged(mask=torch.ones(12, dtype=torch.complex64)), r"mask.*torch\.complex64"),
    "selected_weights": (lambda: damaged(index=torch.zeros(3, dtype=torch.int32), exp_avg=torch.ones(3)), r"\(3,\)"),
    "no_state": (lambda: without("state"), "must have.*state"),
    "no_groups": (lambda: without("param_groups"), "must have.*param_groups"),
    "betas_of_text": (lambda: with_group(betas="0.9"), "betas.*0.9"),
    "infinite_lr": (lambda: with_group(lr=math.inf), "learning rate.*inf"),
}


@pytest.mark.parametrize(("make", "message"), FOREIGN.values(), ids=FOREIGN.keys())
def test_state_that_is_not_ours_is_refused_and_changes_nothing(make, message):
    model, optimizer = trained()
    with pytest.raises(ArgumentError, match=message):
        optimizer.load_state_dict(make())
    assert_trains_on_as_if_nothing_had_happened(AdamWL2SP, model, optimizer)


@pytest.mark.parametrize("kind", [FSAM, MomentumSAM])
def test_foreign_state_is_refused_while_the_weights_are_perturbed_and_leaves_them_so(kind):
    model, optimizer = trained(kind)
    if kind is FSAM:
        closure_of(model, optimizer, 3)()
    optimizer.perturb()
    before = weights_of(model)
    with pytest.raises(ValueError, match="momentum_buffer"):
        optimizer.load_state_dict(state_of_sgd())
    assert optimizer.perturbed
    assert_unchanged(model, before)
    optimizer.restore()
    assert_same_bits(model, _clean(kind))


def _clean(kind) -> nn.Module:
    model, optimizer = trained(kind)
    optimizer.restore()
    return model


def test_group_without_its_parameters_in_a_state_is_refused():
    state = damaged()
    del state["param_groups"][0]["params"]
    with pytest.raises(ValueError, match="params"):
        trained()[1].load_state_dict(state)


def test_count_of_steps_as_a_plain_number_is_accepted():
    model, optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] = int(entry["step"])
    optimizer.load_state_dict(state)
    assert_trains_on_as_if_nothing_had_happened(AdamWL2SP, model, optimizer)
