"""Arguments that are not allowed are refused by name and value, of optimizers and of groups."""

import math

import pytest
import torch
from torch import nn

from fsam_triton import FSAM, AdamWL2SP, ArgumentError, MomentumSAM
from tests.problem import small_model
from tests.training import assert_same_bits, train

pytestmark = pytest.mark.usefixtures("one_thread")

every_kind = pytest.mark.parametrize("kind", [AdamWL2SP, FSAM, MomentumSAM])

# The argument, a value, and what the error calls it.
OF_GROUPS = [
    ("lr", -1.0, "learning rate"),
    ("lr", math.inf, "learning rate"),
    ("lr", math.nan, "learning rate"),
    ("lr", "1e-3", "learning rate"),
    ("lr", torch.tensor([0.1, 0.2]), "learning rate"),
    ("betas", "0.9", "betas"),
    ("betas", 0.9, "betas"),
    ("betas", (0.9,), "betas"),
    ("betas", (1.0, 0.999), "beta parameter at index 0"),
    ("betas", ("0.9", 0.999), "beta parameter at index 0"),
    ("betas", (0.9, -0.5), "beta parameter at index 1"),
    ("betas", (0.9, math.nan), "beta parameter at index 1"),
    ("eps", -1e-8, "eps"),
    ("eps", math.inf, "eps"),
    ("weight_decay", -0.1, "weight_decay"),
    ("weight_decay", math.nan, "weight_decay"),
    ("l2_sp", -0.1, "l2_sp"),
    ("l2_sp", "0.1", "l2_sp"),
]
OF_OPTIMIZERS = [
    ("max_grad_norm", 0.0, "max_grad_norm"),
    ("max_grad_norm", -1.0, "max_grad_norm"),
    ("ema_decay", 1.0, "ema_decay"),
    ("anchors", "final", "anchors"),
    ("trainable", 0.1, "trainable"),
    ("differentiable", True, "differentiable"),
]


def weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(4, 4))


@every_kind
@pytest.mark.parametrize(("argument", "value", "name"), OF_GROUPS + OF_OPTIMIZERS, ids=str)
def test_bad_argument_is_refused_by_name_and_value(kind, argument, value, name):
    with pytest.raises(ArgumentError) as error:
        kind([weight()], **{argument: value})
    assert error.value.name == name
    # Of betas the one that is wrong.
    assert error.value.value is value or error.value.value in value


@every_kind
@pytest.mark.parametrize(("argument", "value", "name"), OF_GROUPS, ids=str)
def test_bad_argument_of_a_group_is_refused_by_name(kind, argument, value, name):
    with pytest.raises(ArgumentError) as error:
        kind([{"params": [weight()], argument: value}])
    assert error.value.name == name


@every_kind
def test_argument_that_nobody_knows_is_refused(kind):
    with pytest.raises(TypeError, match="learning_rate"):
        kind([weight()], learning_rate=0.1)


def test_betas_may_be_a_list():
    models = [small_model(), small_model()]
    for model, betas in zip(models, ([0.8, 0.95], (0.8, 0.95)), strict=True):
        train(model, AdamWL2SP(model.parameters(), betas=betas), 3)
    assert_same_bits(*models)


@pytest.mark.parametrize("ignored", [{"foreach": True}, {"fused": False}, {"capturable": True}], ids=str)
def test_arguments_of_torchs_optimizers_that_change_no_numbers_are_taken(ignored):
    models = [small_model(), small_model()]
    for model, arguments in zip(models, ({}, ignored), strict=True):
        train(model, AdamWL2SP(model.parameters(), **arguments), 2)
    assert_same_bits(*models)


# -- anchors -----------------------------------------------------------------------------------------------------------


@every_kind
def test_anchors_of_another_shape_are_refused_by_parameter_name(kind):
    with pytest.raises(ArgumentError) as error:
        kind([("dense.weight", weight())], l2_sp=0.1, anchors={"dense.weight": torch.zeros(4, 5)})
    assert error.value.name == "anchors['dense.weight']"
    assert error.value.value == (4, 5)


@every_kind
def test_mapping_of_anchors_needs_names(kind):
    with pytest.raises(ArgumentError, match="named_parameters") as error:
        kind([weight()], l2_sp=0.1, anchors={"dense.weight": torch.zeros(4, 4)})
    assert error.value.name == "anchors"


@every_kind
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
@pytest.mark.parametrize("where", ["anchors", "parameters"])
def test_anchors_whose_names_fit_no_parameter_are_refused(kind, prefix, where):
    """Those of a wrapped model have other names."""
    model = small_model()
    named = dict(model.named_parameters())
    wrapped = {prefix + name: p for name, p in named.items()}
    anchors, params = (wrapped, named) if where == "anchors" else (named, wrapped)
    with pytest.raises(ArgumentError) as error:
        kind(params.items(), l2_sp=0.1, anchors=anchors)
    assert error.value.name == "anchors"


@every_kind
def test_anchors_may_name_a_part_of_the_parameters_and_others_too(kind):
    model = small_model()
    anchors = {"dense.weight": torch.zeros(16, 24), "pooler.weight": torch.zeros(3)}
    optimizer = kind(model.named_parameters(), l2_sp=0.1, anchors=anchors)
    train(model, optimizer, 1)
    assert [name for name, p in model.named_parameters() if "anchor" in optimizer.state[p]] == ["dense.weight"]


@every_kind
def test_anchors_are_not_looked_at_without_l2_sp(kind):
    model = small_model()
    optimizer = kind(model.named_parameters(), anchors={"module.dense.weight": torch.zeros(3)})
    train(model, optimizer, 1)
    assert not any("anchor" in entry for entry in optimizer.state.values())
