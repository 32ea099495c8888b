"""flatten=True: parameters in one buffer, with the numbers of those in place, and without taking memory from others."""

import io

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import Parameter

from fsam_triton import FSAM, AdamWL2SP, FisherMask, FishMask, MomentumSAM, Schedule
from fsam_triton.kernels import spec
from fsam_triton.optim.optimizer import FusedOptimizer
from tests.kernels.cases import FLOATS, assert_same_bits, ordinary
from tests.optim.momentum import Objective
from tests.problem import small_model

pytestmark = pytest.mark.usefixtures("one_thread")

every_dtype = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
SHAPES = [(3, 5), (), (1,), (0,), (7, 0, 2), (130,), (2, 3, 4, 5)]


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [
        Parameter(ordinary(torch.Size(shape).numel(), dtype, seed).view(shape)) for seed, shape in enumerate(SHAPES)
    ]


# -- where they are ----------------------------------------------------------------------------------------------------


@every_dtype
def test_parameters_are_in_one_buffer_as_aligned_as_lanes(dtype):
    params = parameters(dtype)
    AdamWL2SP(params, flatten=True)
    expected = params[0].data_ptr()
    for p in params:
        if p.numel():
            assert p.data_ptr() == expected
        expected += -(-p.numel() // spec.ALIGN) * spec.ALIGN * dtype.itemsize


@every_dtype
def test_parameters_keep_their_values(dtype):
    params = parameters(dtype)
    before = [p.detach().clone() for p in params]
    AdamWL2SP(params, flatten=True)
    for p, value in zip(params, before, strict=True):
        assert p.shape == value.shape
        assert_same_bits(p.detach().reshape(-1), value.reshape(-1))


def test_parameters_stay_where_they_are_by_default():
    params = parameters()
    before = [p.data_ptr() for p in params]
    AdamWL2SP(params)
    assert [p.data_ptr() for p in params] == before


def test_each_type_has_a_buffer_of_its_own_and_so_has_each_group():
    params = [*parameters(torch.float32), *parameters(torch.bfloat16)]
    AdamWL2SP([{"params": params}, {"params": parameters()}], flatten=True)
    narrow, wide = params[len(SHAPES) :], params[: len(SHAPES)]
    assert narrow[-1].data_ptr() - narrow[0].data_ptr() == (wide[-1].data_ptr() - wide[0].data_ptr()) // 2


def test_group_decides_whether_its_parameters_are_moved():
    moved, left = parameters(), parameters()
    before = [p.data_ptr() for p in left]
    AdamWL2SP([{"params": moved, "flatten": True}, {"params": left}])
    assert moved[6].data_ptr() > moved[5].data_ptr() > moved[0].data_ptr()
    assert [p.data_ptr() for p in left] == before


LAYOUTS = {
    "channels_last": lambda: torch.randn(4, 6, 5, 3).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(6, 4).t(),
    "permuted": lambda: torch.randn(3, 4, 5).permute(2, 0, 1),
    "0_dim": lambda: torch.randn(()),
    "0_elements": lambda: torch.randn(3, 0, 2),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_shape_strides_and_values_are_kept_and_so_are_gradients(make):
    value = make()
    p = Parameter(value.clone())
    AdamWL2SP([Parameter(torch.ones(5)), p], flatten=True)
    assert (p.shape, p.stride()) == (value.shape, value.stride())
    assert torch.equal(p, value)
    p.square().sum().backward()
    assert (p.grad.shape, p.grad.stride()) == (p.shape, p.stride())
    assert torch.equal(p.grad, 2 * p)


# -- files -------------------------------------------------------------------------------------------------------------


@every_dtype
def test_storage_of_a_parameter_is_its_own_extent(dtype):
    params = parameters(dtype)
    AdamWL2SP(params, flatten=True)
    for p in params:
        assert p.untyped_storage().nbytes() == p.numel() * dtype.itemsize
        assert p.storage_offset() == 0


def saved_size(value) -> int:
    file = io.BytesIO()
    torch.save(value, file)
    return file.tell()


def test_saving_one_parameter_saves_its_own_elements_alone():
    small, large = Parameter(torch.ones(10)), Parameter(torch.ones(100_000))
    before = saved_size(small.detach())
    AdamWL2SP([small, large], flatten=True)
    # The name of a storage and the alignment of the file may differ by some bytes.
    assert saved_size(small.detach()) <= before + 256


def test_saved_parameter_loads_with_its_values_and_strides():
    p = Parameter(torch.randn(4, 6).t())
    AdamWL2SP([Parameter(torch.ones(5)), p], flatten=True)
    file = io.BytesIO()
    torch.save(p, file)
    file.seek(0)
    loaded = torch.load(file)
    assert torch.equal(loaded, p)
    assert loaded.stride() == p.stride()


def test_safetensors_sees_no_shared_memory():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    AdamWL2SP(model.parameters(), flatten=True)
    loaded = safetensors.torch.load(safetensors.torch.save(model.state_dict()))
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


# -- memory of others --------------------------------------------------------------------------------------------------


def tied_in_two_groups():
    p = Parameter(torch.randn(8))
    return p, [[p], [Parameter(p.detach())]]


def with_an_alias():
    p = Parameter(torch.randn(8))
    with_an_alias.kept = p.detach()
    return p, [[p, Parameter(torch.ones(3))]]


def in_a_state_dict():
    model = nn.Linear(4, 2)
    in_a_state_dict.kept = model.state_dict()
    return model.weight, [list(model.parameters())]


def of_numpy():
    p = Parameter(torch.from_numpy(np.ones(8)))
    return p, [[p, Parameter(torch.ones(3))]]


def in_shared_memory():
    p = Parameter(torch.randn(8).share_memory_())
    return p, [[p, Parameter(torch.ones(3))]]


def view_of_a_buffer():
    p = Parameter(torch.randn(20)[4:12])
    return p, [[p, Parameter(torch.ones(3))]]


def frozen():
    p = Parameter(torch.randn(8), requires_grad=False)
    return p, [[p, Parameter(torch.ones(3))]]


@pytest.mark.parametrize(
    "make",
    [tied_in_two_groups, with_an_alias, in_a_state_dict, of_numpy, in_shared_memory, view_of_a_buffer, frozen],
    ids=lambda make: make.__name__,
)
def test_parameter_whose_memory_others_have_stays_where_it_is(make):
    p, groups = make()
    address = p.data_ptr()
    optimizer = AdamWL2SP([{"params": group} for group in groups], lr=0.1, flatten=True)
    assert p.data_ptr() == address
    for group in groups:
        for other in group:
            other.grad = torch.ones_like(other)
    optimizer.step()
    assert p.data_ptr() == address


def test_parameter_that_is_moved_away_is_followed():
    model, twin = small_model(), small_model()
    for each, flatten in ((model, True), (twin, False)):
        optimizer = AdamWL2SP(each.parameters(), lr=0.1, flatten=flatten)
        for step in range(3):
            if step == 1:
                each["dense"].weight.data = each["dense"].weight.data.clone()
            Objective(each)(step).backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, expected)


# -- the same numbers --------------------------------------------------------------------------------------------------

FLAT_AND_IN_PLACE = {
    "adamw": (AdamWL2SP, {}),
    "amsgrad": (AdamWL2SP, {"amsgrad": True, "l2_sp": 0.1, "max_grad_norm": 1.0}),
    "average": (AdamWL2SP, {"ema_decay": 0.9}),
    "sgd": (FusedOptimizer, {"rule": "sgd", "momentum": 0.9}),
    "lion": (FusedOptimizer, {"rule": "lion"}),
    "sam": (FSAM, {}),
    "asam": (FSAM, {"adaptive": True}),
    "esam": (FSAM, {"beta": 0.5}),
    "gsam": (FSAM, {"alpha": 0.3}),
    "looksam": (FSAM, {"schedule": Schedule(every=2, reuse=0.5)}),
    "fisher_sam": (FSAM, {"mask": FisherMask(0.3, interval=2, samples=2)}),
    "momentum_sam": (MomentumSAM, {}),
}


def groups_of(model: nn.Module) -> list[dict]:
    named = list(model.named_parameters())
    return [{"params": named[:3], "lr": 0.01}, {"params": named[3:], "lr": 0.02, "weight_decay": 0.1}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "options"), FLAT_AND_IN_PLACE.values(), ids=FLAT_AND_IN_PLACE.keys())
def test_flat_and_in_place_give_the_same_bits(kind, options, dtype):
    results = []
    for flatten in (True, False):
        model = small_model(dtype)
        rule = () if "rule" not in options else (options["rule"],)
        more = {name: value for name, value in options.items() if name != "rule"}
        optimizer = kind(groups_of(model), *rule, lr=0.01, flatten=flatten, **more)
        objective = Objective(model)
        for step in range(4):

            def closure(step=step, optimizer=optimizer, objective=objective):
                optimizer.zero_grad()
                loss = objective(step)
                loss.backward()
                return loss

            optimizer.step(closure)
        entries = optimizer.state_dict()["state"].values()
        results.append([*model.parameters(), *(value for entry in entries for value in entry.values())])
    for flat, in_place in zip(*results, strict=True):
        assert torch.equal(flat, in_place)


def test_part_of_the_weights_is_trained_where_they_are():
    """There is nothing to flatten: lanes have the selected weights alone."""
    model = small_model()
    before = [p.data_ptr() for p in model.parameters()]
    AdamWL2SP(model.named_parameters(), trainable=FishMask.random(model, 0.1, 0), flatten=True)
    assert [p.data_ptr() for p in model.parameters()] == before
