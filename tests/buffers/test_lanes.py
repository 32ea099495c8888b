"""Lanes: their layout, what `state` shows of them, and that they go when their optimizer goes."""

import gc
import io
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fsam_triton import FSAM, AdamWL2SP, FisherMask, MomentumSAM
from fsam_triton.buffers.lanes import Lanes
from fsam_triton.buffers.members import Member
from fsam_triton.buffers.sharing import sharing
from fsam_triton.kernels import spec
from tests.kernels.cases import FLOATS, ordinary

pytestmark = pytest.mark.usefixtures("one_thread")

every_dtype = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
SHAPES = [(3, 5), (), (1,), (0,), (7, 0, 2), (130,), (2, 3, 4, 5), (spec.CHUNK + 3,)]


def parameters(dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[Parameter]:
    return [
        Parameter(ordinary(torch.Size(shape).numel(), dtype, seed).view(shape)) for seed, shape in enumerate(shapes)
    ]


def lanes_of(params: list[Parameter]) -> Lanes:
    return Lanes([Member(p, {"params": params}, i, i) for i, p in enumerate(params)])


def occupied(lanes: Lanes) -> Tensor:
    """Which elements of a lane belong to a parameter."""
    taken = torch.zeros(lanes.plan.size, dtype=torch.bool)
    for i in range(len(lanes)):
        assert not lanes.plan.part(taken, i).any(), "two parameters overlap"
        lanes.plan.part(taken, i).fill_(True)
    return taken


# -- layout ------------------------------------------------------------------------------------------------------------


def test_every_parameter_has_a_part_of_its_own_that_begins_on_a_word_of_a_mask():
    lanes = lanes_of(parameters())
    assert occupied(lanes).sum() == sum(p.numel() for p in lanes.params)
    for i, (offset, p) in enumerate(zip(lanes.plan.offsets, lanes.params, strict=True)):
        assert offset % spec.ALIGN == 0
        assert lanes.plan.lengths[i] == p.numel()
    assert lanes.plan.size % spec.ALIGN == 0


@every_dtype
def test_lane_is_made_of_zeros_when_it_is_asked_for(dtype):
    lanes = lanes_of(parameters())
    assert lanes.lanes == {}
    lane = lanes.lane("exp_avg", dtype)
    assert (lane.dtype, len(lane)) == (dtype, lanes.plan.size)
    assert not lane.any()
    assert lanes.lane("exp_avg", dtype) is lane


def test_parts_have_the_shapes_and_strides_of_their_parameters():
    params = [
        Parameter(torch.randn(6, 4).t()),
        Parameter(torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last)),
    ]
    lanes = lanes_of(params)
    lanes.lane("exp_avg", torch.float32)
    for p, view in zip(params, lanes.views("exp_avg"), strict=True):
        assert (view.shape, view.stride()) == (p.shape, p.stride())
        assert view.data_ptr() >= lanes.lanes["exp_avg"].data_ptr()


def test_mask_words_of_a_parameter_are_the_words_of_its_elements():
    lanes = lanes_of(parameters())
    words = lanes.lane("mask", torch.int32).copy_(torch.arange(lanes.plan.size // 32))
    for i, p in enumerate(lanes.params):
        first = lanes.plan.offsets[i] // 32
        assert lanes.plan.words(words, i).tolist() == list(range(first, first + (p.numel() + 31) // 32))


VARIANTS = {
    "sam": {},
    "asam": {"adaptive": True},
    "master": {"master_weights": True},
    "amsgrad_l2_sp": {"amsgrad": True, "l2_sp": 0.1},
    "average": {"ema_decay": 0.9},
    "mask": {"mask": FisherMask(0.5)},
}


@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gaps_of_all_lanes_stay_zero_over_steps(dtype, kwargs):
    params = parameters(dtype)
    optimizer = FSAM(params, lr=0.1, rho=0.5, weight_decay=0.1, **kwargs)
    for _ in range(3):
        for finish in (optimizer.perturb, optimizer.step):
            sum(p.float().square().sum() for p in params).backward()
            finish()
    # Another one for the anchors.
    for lanes in optimizer.ledger:
        gaps = ~occupied(lanes)
        for name, lane in lanes.lanes.items():
            if name != "mask":
                assert not lane[gaps].any(), name


# -- what the state shows ----------------------------------------------------------------------------------------------


def saved_size(value) -> int:
    file = io.BytesIO()
    torch.save(value, file)
    return file.tell()


@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_state_has_storages_of_its_own_extent(kwargs):
    params = parameters(torch.bfloat16)
    optimizer = FSAM(params, lr=0.1, **kwargs)
    for finish in (optimizer.perturb, optimizer.step):
        sum(p.float().square().sum() for p in params).backward()
        finish()
    for entry in optimizer.state_dict()["state"].values():
        for name, value in entry.items():
            assert name == "step" or value.untyped_storage().nbytes() == value.nbytes, name


def test_saving_one_parameters_state_saves_its_own_elements_alone():
    small, large = Parameter(torch.ones(10)), Parameter(torch.ones(100_000))
    optimizer = AdamWL2SP([small, large])
    (small.sum() + large.sum()).backward()
    optimizer.step()
    # The names of storages and the alignment of the file take some bytes.
    assert saved_size(optimizer.state[small]) < 8192


@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM, MomentumSAM])
def test_parameters_without_gradients_take_no_memory(kind):
    model = nn.Linear(64, 64)
    optimizer = kind(model.parameters())
    optimizer.step()
    assert not any(lanes.lanes for lanes in optimizer.ledger)


# -- lifetimes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flatten", [False, True])
def test_dead_optimizer_leaves_no_lanes_behind(flatten):
    params = parameters()
    optimizer = FSAM(params, flatten=flatten)
    for finish in (optimizer.perturb, optimizer.step):
        sum(p.square().sum() for p in params).backward()
        finish()
    (lanes,) = optimizer.ledger
    buffers = [weakref.ref(lane) for lane in lanes.lanes.values()]
    owners = [weakref.ref(optimizer), weakref.ref(lanes)]
    del optimizer, lanes, finish
    gc.collect()
    assert [owner() for owner in owners + buffers] == [None] * len(owners + buffers)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM, MomentumSAM])
def test_model_of_a_dead_optimizer_trains_on(kind, flatten):
    params = parameters()
    optimizer = kind(params, flatten=flatten)
    sum(p.sum() for p in params).backward()
    optimizer.step()
    del optimizer
    gc.collect()
    for p in params:
        p.grad = None
    sum((p * (i + 1)).sum() for i, p in enumerate(params)).backward()
    assert all(torch.equal(p.grad, torch.full_like(p, i + 1)) for i, p in enumerate(params))
    torch.optim.AdamW(params).step()


@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM, MomentumSAM])
def test_parameters_have_no_hooks_of_ours(kind):
    (p,) = parameters(shapes=[(3,)])
    calls = []
    p.register_post_accumulate_grad_hook(calls.append)
    optimizer = kind([p])
    p.sum().backward()
    optimizer.step()
    assert len(p._post_accumulate_grad_hooks) == 1
    assert not p._backward_hooks
    del optimizer
    gc.collect()
    p.sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM, MomentumSAM])
def test_model_is_freed_with_its_optimizer(kind):
    model = nn.Linear(3, 4)
    weight, optimizer = weakref.ref(model.weight), kind(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    del model, optimizer
    gc.collect()
    assert weight() is None


# -- shared memory -----------------------------------------------------------------------------------------------------


def test_tensors_apart_share_nothing():
    memory = torch.zeros(100)
    assert sharing([memory[:10], memory[10:30], memory[50:], torch.zeros(3), memory[30:50]]) == []


def test_tensor_that_an_earlier_one_reaches_into_is_named_with_the_first_such_one():
    memory = torch.zeros(100)
    tensors = [memory[20:30], memory[5:8], memory[0:60], memory[50:70], memory[65:66], memory[25:26]]
    assert sharing(tensors) == [(2, 0), (3, 2), (4, 3), (5, 0)]


def test_gaps_between_elements_count_as_memory_of_a_tensor():
    memory = torch.zeros(8, 16)
    assert sharing([memory[:, ::2], memory[:, 1::2]]) == [(1, 0)]
    assert sharing([memory[:4, :3], memory[4:, :3]]) == []


def test_tensors_without_elements_share_nothing():
    memory = torch.zeros(8)
    assert sharing([memory, memory[3:3], torch.zeros(0), torch.zeros(0)]) == []
    assert sharing([]) == []
