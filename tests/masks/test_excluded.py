"""FisherMask: what it chooses from, and what becomes of the rest; its arguments; what it tells of itself."""

import copy
import pickle
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from fsam_triton import FSAM, FisherMask
from tests.masks.choosing import SHAPES, distinct, expected_mask, flat, parameters_like, perturb, selected
from tests.problem import Problem, small_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("excluded", ["always", "never"])
def test_excluded_tensors_are_perturbed_always_or_never(excluded):
    model = small_model()
    optimizer = FSAM(model.named_parameters(), mask=FisherMask(0.25, excluded=excluded))
    Problem().loss(model.parameters(), 0).backward()
    optimizer.perturb()
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name:
            assert (optimizer.mask_of(parameter) == (excluded == "always")).all()
    chosen = [optimizer.mask_of(model[name].weight).sum() for name in ("dense", "head")]
    assert sum(chosen) == 512 // 4


@pytest.mark.parametrize("excluded", ["always", "never"])
def test_coordinates_outside_the_mask_do_not_move_and_those_inside_do(excluded):
    model, before = small_model(), small_model()
    optimizer = FSAM(model.named_parameters(), rho=1.0, mask=FisherMask(0.25, excluded=excluded))
    Problem().loss(model.parameters(), 0).backward()
    optimizer.perturb()
    for parameter, weight in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter != weight, optimizer.mask_of(parameter))


NAMES = {
    "encoder.layer.0.attention.self.query.weight": False,
    "classifier.weight": False,
    "lm_head.weight": False,
    "encoder.layer.0.attention.self.query.bias": True,
    "encoder.layer.0.output.LayerNorm.weight": True,
    "model.layers.0.input_layernorm.weight": True,
    "blocks.3.norm1.weight": True,
    "bert.embeddings.word_embeddings.weight": True,
    "model.embed_tokens.weight": True,
}


@pytest.mark.parametrize(("name", "excluded"), NAMES.items(), ids=NAMES.keys())
def test_biases_embeddings_and_norms_are_excluded_by_their_names(name, excluded):
    named = [(name, nn.Parameter(torch.ones(8, 16))), ("other.weight", nn.Parameter(torch.ones(8, 16)))]
    optimizer = FSAM(named, mask=FisherMask(0.5, excluded="never"))
    perturb(optimizer, [parameter for _, parameter in named], [torch.ones(8, 16), torch.full((8, 16), 0.5)])
    assert optimizer.mask_of(named[0][1]).all() == (not excluded)
    assert optimizer.mask_of(named[1][1]).sum() == (64 if excluded else 0)


def test_without_names_tensors_of_at_most_one_dimension_are_excluded():
    gradients = [*distinct((24, 16)), torch.ones(16), torch.ones(())]
    weight, bias, scalar = selected(gradients, FisherMask(0.25))
    assert weight.sum() == 96
    assert bias.all()
    assert scalar.all()


def test_norm_layers_in_a_sequential_are_excluded_though_their_names_do_not_tell():
    block = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4))
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ModuleDict({"downsample": block}))
    optimizer = FSAM(model.named_parameters(), mask=FisherMask(1.0, excluded="never"))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.perturb()
    chosen = {name for name, density in optimizer.mask_density().items() if density}
    assert chosen == {"0.weight", "2.downsample.0.weight"}


def test_exclude_takes_ones_own_names():
    model = small_model()
    optimizer = FSAM(model.named_parameters(), mask=FisherMask(0.5, exclude=("head",), excluded="never"))
    Problem().loss(model.parameters(), 0).backward()
    optimizer.perturb()
    assert not optimizer.mask_of(model["head"].weight).any()
    rest = [parameter for name, parameter in model.named_parameters() if "head" not in name]
    assert sum(optimizer.mask_of(parameter).sum() for parameter in rest) == sum(p.numel() for p in rest) // 2


def test_empty_exclude_selects_from_every_tensor():
    model = small_model()
    optimizer = FSAM(model.named_parameters(), mask=FisherMask(0.5, exclude=()))
    Problem().loss(model.parameters(), 0).backward()
    optimizer.perturb()
    assert sum(optimizer.mask_of(parameter).sum() for parameter in model.parameters()) == 568 // 2


def test_ones_own_exclude_needs_names():
    with pytest.raises(ValueError, match="named_parameters"):
        FSAM([nn.Parameter(torch.zeros(8, 16))], mask=FisherMask(0.5, exclude=("head",)))


def test_mask_of_a_tensor_that_is_not_its_own_is_refused():
    optimizer = FSAM([nn.Parameter(torch.zeros(8, 16))], mask=FisherMask(0.5))
    with pytest.raises(ValueError, match="parameter of this optimizer"):
        optimizer.mask_of(torch.zeros(8, 16))


def test_without_a_mask_everything_is_perturbed():
    parameter = nn.Parameter(torch.zeros(8, 16))
    assert FSAM([parameter]).mask_of(parameter).all()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("keep_ratio", 0.0),
        ("keep_ratio", -0.1),
        ("keep_ratio", 1.5),
        ("keep_ratio", float("nan")),
        ("interval", 0),
        ("samples", 0),
        ("excluded", "sometimes"),
        ("unit", "column"),
        ("unit", True),
        ("unit", 1),
        ("unit", 64),
        ("unit", 32.0),
        ("unit", None),
        ("scores", "magnitude"),
    ],
)
def test_bad_argument_is_refused_by_name_and_value(argument, value):
    with pytest.raises(ValueError, match=argument) as error:
        FisherMask(**{"keep_ratio": 0.5, argument: value})
    assert str(value) in str(error.value)


def test_keep_ratio_that_selects_nothing_is_refused():
    with pytest.raises(ValueError, match=r"keep_ratio.*0\.001"):
        FSAM([nn.Parameter(torch.zeros(8, 16))], mask=FisherMask(0.001))


def test_mask_without_anything_to_select_from_is_refused():
    with pytest.raises(ValueError, match=r"keep_ratio|exclude"):
        FSAM([("bias", nn.Parameter(torch.zeros(8)))], mask=FisherMask(0.5))


@pytest.mark.parametrize(("keep_ratio", "n"), [(1e-9, 49), (1e-9, 10**6), (1e-9, 1)])
def test_keep_ratio_that_the_error_names_is_accepted(keep_ratio, n):
    with pytest.raises(ValueError, match="keep_ratio") as error:
        FisherMask(keep_ratio).count([torch.Size((n,))])
    least = float(re.search(r"must be >= (.*)", str(error.value))[1])
    assert FisherMask(least).count([torch.Size((n,))]) == 1


# -- how many ----------------------------------------------------------------------------------------------------------

UNITS = ("element", "tensor", "row", 32, 128)
SIZES = {"element": 1, "tensor": 96, "row": 48, 32: 32, 128: 96}


@pytest.mark.parametrize("unit", UNITS)
def test_count_wants_room_for_the_largest_unit(unit):
    shapes = [torch.Size(shape) for shape in ((4, 4, 3), (2, 48), (), (0, 99), (99, 0), (55,))]
    n = 48 + 96 + 1 + 55
    enough = SIZES[unit] / n
    assert FisherMask(enough, unit=unit).count(shapes) == int(enough * n) == SIZES[unit]
    with pytest.raises(ValueError, match=r"keep_ratio.*must be >= ") as error:
        FisherMask(enough * 0.99, unit=unit).count(shapes)
    assert str(enough * 0.99) in str(error.value)


@pytest.mark.parametrize("shapes", [[], [torch.Size((0, 4))]])
def test_count_refuses_nothing_to_select_from(shapes):
    with pytest.raises(ValueError, match="keep_ratio"):
        FisherMask(1.0).count(shapes)


# -- what was chosen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("excluded", ["always", "never"])
def test_mask_density_is_the_fraction_that_is_perturbed(excluded):
    model = small_model()
    optimizer = FSAM(model.named_parameters(), mask=FisherMask(0.3, excluded=excluded))
    excluded_ones = {"dense.bias", "norm.weight", "norm.bias", "head.bias"}
    before = optimizer.mask_density()
    assert before == {n: float(n in excluded_ones and excluded == "always") for n, _ in model.named_parameters()}
    Problem().loss(model.parameters(), 0).backward()
    optimizer.perturb()
    density = optimizer.mask_density()
    assert list(density) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert density[name] == optimizer.mask_of(parameter).sum().item() / parameter.numel()
    assert 0 < density["dense.weight"] < 1


def test_mask_density_counts_positions_over_all_groups_without_names():
    gradients = [*distinct((5, 7), (33, 3)), torch.ones(6), distinct((4, 40))[0].bfloat16(), torch.ones(0, 3)]
    parameters = parameters_like(gradients)
    frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)
    groups = [{"params": parameters[:2]}, {"params": parameters[2:]}, {"params": [frozen]}]
    optimizer = FSAM(groups, mask=FisherMask(0.4))
    perturb(optimizer, parameters, gradients)
    ones = [optimizer.mask_of(parameter).sum().item() for parameter in parameters]
    sizes = [35, 99, 6, 160]
    assert optimizer.mask_density() == {
        **{str(i): one / size for i, (one, size) in enumerate(zip(ones[:4], sizes, strict=True))},
        "4": 0.0,
        "5": 0.0,
    }
    assert sum(ones) == int(0.4 * (35 + 99 + 160)) + 6
    assert not optimizer.mask_of(frozen).any()


def test_mask_density_where_nothing_is_left_out_is_one():
    gradients = distinct(*SHAPES)
    parameters = parameters_like(gradients)
    optimizer = FSAM(parameters, mask=FisherMask(1.0))
    perturb(optimizer, parameters, gradients)
    assert optimizer.mask_density() == {"0": 1.0, "1": 1.0, "2": 1.0}


def test_mask_density_of_an_optimizer_without_a_mask_is_refused():
    with pytest.raises(RuntimeError, match="FisherMask"):
        FSAM([nn.Parameter(torch.zeros(8, 16))]).mask_density()


# -- a mask is a value -------------------------------------------------------------------------------------------------


def test_one_mask_object_serves_two_optimizers():
    mask, gradients = FisherMask(0.3, interval=2), [distinct(*SHAPES, seed=seed) for seed in (0, 1)]
    pairs = [(parameters_like(gradients[0]), None) for _ in range(2)]
    optimizers = [FSAM(parameters, mask=mask) for parameters, _ in pairs]
    for (parameters, _), optimizer, given in zip(pairs, optimizers, gradients, strict=True):
        perturb(optimizer, parameters, given)
    for (parameters, _), optimizer, given in zip(pairs, optimizers, gradients, strict=True):
        assert torch.equal(flat([optimizer.mask_of(p) for p in parameters]), expected_mask(given, 0.3))


def test_optimizers_leave_a_mask_as_it_is():
    mask = FisherMask(0.5, interval=2, exclude=["head"])
    text, number = repr(mask), hash(mask)
    model = small_model()
    optimizer = FSAM(model.named_parameters(), mask=mask)
    Problem().loss(model.parameters(), 0).backward()
    optimizer.perturb()
    assert optimizer.mask is mask
    assert vars(mask).keys() == vars(FisherMask(0.5)).keys()
    assert (repr(mask), hash(mask)) == (text, number)
    with pytest.raises(AttributeError):
        mask.interval = 3


def test_masks_are_equal_if_their_arguments_are():
    assert FisherMask(0.5, exclude=["a", "b"]) == FisherMask(0.5, exclude=("a", "b"))
    assert FisherMask(0.5) != FisherMask(0.5, exclude=())
    assert FisherMask(0.5) != FisherMask(0.5, scores="random")
    assert len({FisherMask(0.5), FisherMask(0.5), FisherMask(0.25)}) == 2


def test_names_that_are_excluded_do_not_follow_the_callers_list():
    names = ["head"]
    mask = FisherMask(0.5, exclude=names)
    names.clear()
    assert not mask.selects_from("head.weight", torch.zeros(8, 16))


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, replace, lambda mask: pickle.loads(pickle.dumps(mask))],
    ids=["copy", "deepcopy", "replace", "pickle"],
)
def test_copy_of_a_mask_that_is_in_use_is_equal_to_it(copied):
    mask = FisherMask(0.5, interval=4, unit=32, scores="random", exclude=["x"])
    model = small_model()
    optimizer = FSAM(model.named_parameters(), mask=mask)
    Problem().loss(model.parameters(), 0).backward()
    optimizer.perturb()
    assert copied(mask) == mask
    assert hash(copied(mask)) == hash(mask)
