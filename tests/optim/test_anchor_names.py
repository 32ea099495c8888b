"""Anchors by name: a parameter that has none decays to zero, so no anchor may go unnoticed for the sake of its name."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import AdamWL2SP, ArgumentError


def encoder() -> nn.ModuleDict:
    torch.manual_seed(0)
    block = nn.ModuleDict({"dense": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})
    return nn.ModuleDict({"encoder": block, "classifier": nn.Linear(4, 2)})


def anchors(rename=lambda name: name, skip: str = "classifier") -> dict[str, Tensor]:
    """A state dict of the pre-trained model, buffers included, without the part that is new."""
    state = copy.deepcopy(encoder().state_dict())
    return {rename(name): value for name, value in state.items() if skip not in name}


def optimizer(given: dict[str, Tensor], model: nn.Module | None = None, **arguments) -> AdamWL2SP:
    named = (model or encoder()).named_parameters()
    return AdamWL2SP(named, lr=0.1, **{"l2_sp": 0.5, "weight_decay": 0.0, **arguments}, anchors=given)


def pulled(own: AdamWL2SP) -> set[str]:
    """The parameters that are pulled to their anchors."""
    group = own.param_groups[0]
    for p in group["params"]:
        p.grad = torch.zeros_like(p)
    own.step()
    return {name for name, p in zip(group["param_names"], group["params"], strict=True) if "anchor" in own.state[p]}


ALL = {"encoder.dense.weight", "encoder.dense.bias", "encoder.norm.weight", "encoder.norm.bias"}


def test_parameters_that_are_not_named_are_novel():
    assert pulled(optimizer(anchors())) == ALL


def test_names_of_buffers_frozen_parameters_and_other_heads_are_no_mistake():
    model = encoder()
    model["encoder"]["norm"].requires_grad_(False)
    given = {**anchors(), "lm_head.weight": torch.zeros(9, 4), "encoder.pooler.weight": torch.zeros(4, 4)}
    assert pulled(optimizer(given, model)) >= {"encoder.dense.weight", "encoder.dense.bias"}


def test_anchors_without_a_name_that_fits_are_refused():
    with pytest.raises(ArgumentError, match=r"Invalid anchors: .*named \['classifier.bias', ") as error:
        optimizer({"roberta.dense.kernel": torch.zeros(4, 4)})
    assert error.value.name == "anchors"


def only(part: str, rename):
    return lambda name: rename(name) if part in name else name


PREFIXES = {
    "ddp": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled_inside": lambda name: name.replace("encoder.", "encoder._orig_mod."),
    "checkpointed_inside": lambda name: name.replace("dense.", "dense._checkpoint_wrapped_module."),
    "longer": lambda name: f"bert.{name}",
    "shorter": lambda name: name.removeprefix("encoder."),
}


@pytest.mark.parametrize("part", ["", "dense", "dense.weight"], ids=["all", "some", "one"])
@pytest.mark.parametrize("rename", PREFIXES.values(), ids=PREFIXES)
def test_anchors_that_are_parameters_by_another_name_are_refused(rename, part):
    """Also if only some are: the others would decay to zero."""
    given = anchors(only(part, rename))
    assert given.keys() != anchors().keys()
    with pytest.raises(ArgumentError, match=r"Invalid anchors: .*named"):
        optimizer(given)


@pytest.mark.parametrize("rename", PREFIXES.values(), ids=PREFIXES)
def test_parameters_of_a_wrapped_model_are_not_those_of_the_anchors(rename):
    named = [(rename(name), p) for name, p in encoder().named_parameters()]
    with pytest.raises(ArgumentError, match=r"Invalid anchors: .*named"):
        AdamWL2SP(named, l2_sp=0.5, anchors=anchors())


def test_error_names_both():
    with pytest.raises(ArgumentError) as error:
        optimizer(anchors(only("dense.bias", lambda name: f"module.{name}")))
    assert (error.value.name, error.value.value) == ("anchors", "module.encoder.dense.bias")
    assert error.value.allowed == "the parameter is named 'encoder.dense.bias'"


def test_last_parts_alone_and_other_shapes_make_no_pair():
    """Any layer has a "bias", and a head for other labels has the name of this one's."""
    model = nn.Linear(4, 2)
    given = {"weight": torch.zeros(2, 4), "old.head.bias": torch.zeros(2)}
    assert pulled(optimizer(given, model)) == {"weight"}
    given = {**anchors(), "bert.classifier.weight": torch.zeros(7, 4), "bert.classifier.bias": torch.zeros(7)}
    assert pulled(optimizer(given)) == ALL


def test_names_do_not_matter_where_no_group_is_pulled_and_where_parameters_are_frozen():
    optimizer(anchors(lambda name: f"module.{name}"), l2_sp=0.0)
    model = encoder()
    model["encoder"]["norm"].requires_grad_(False)
    optimizer(anchors(only("norm", lambda name: f"module.{name}")), model)
