"""Memory that several have: two parameters, views of one buffer, other tensors, NumPy, other processes."""

import copy

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from fsam_triton import FSAM, AdamWL2SP, FishMask, MomentumSAM
from tests.optim.by_hand import assert_same, every_kind, parameters_of, square_model, take_step

pytestmark = pytest.mark.usefixtures("one_thread")


def base() -> Tensor:
    return (torch.arange(144, dtype=torch.float64).view(12, 12) * 37 % 129 - 64) / 64


VIEWS = {
    "the_same": lambda memory: (memory, memory),
    "the_same_three_times": lambda memory: (memory, memory, memory),
    "rows_that_overlap": lambda memory: (memory[:8], memory[4:]),
    "blocks_that_overlap": lambda memory: (memory[:6, :6], memory[3:9, 3:9], memory[6:, 6:]),
    "one_within_the_other": lambda memory: (memory, memory[5, 2:9]),
    "transposed": lambda memory: (memory, memory.t()),
    "block_and_its_transpose": lambda memory: (memory[:6, :6], memory[:6, :6].t()),
    "every_second_column_and_a_block": lambda memory: (memory[:6, ::2], memory[3:9, :6]),
    "rows_apart": lambda memory: (memory[:6], memory[6:]),
    "columns_apart": lambda memory: (memory[:, :5], memory[:, 5:]),
    "columns_by_turns": lambda memory: (memory[:, ::2], memory[:, 1::2]),
    "flat_and_square": lambda memory: (memory.view(-1), memory),
}
every_views = pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS.keys())


def in_one_group(model: nn.Module) -> list[dict]:
    return [{"params": list(model.parameters())}]


def in_groups_of_their_own(model: nn.Module) -> list[dict]:
    """Which differ in more than numbers."""
    return [{"params": [p], "amsgrad": i % 2 == 1, "lr": 0.01 / (1 + i)} for i, p in enumerate(model.parameters())]


@every_kind
@every_views
@pytest.mark.parametrize("groups", [in_one_group, in_groups_of_their_own], ids=lambda groups: groups.__name__)
def test_parameters_in_the_same_memory_are_updated_one_after_another(kind, views, groups):
    def program(make):
        memory = base()
        model = parameters_of(*views(memory), torch.ones(3, 5, dtype=torch.float64))
        optimizer = make(groups(model))
        for step in range(4):
            take_step(model, optimizer, step)
        assert_still_shared(model, memory)
        return [memory, *model.parameters()]

    # Three updates of the same weight in a step.
    assert_same(kind, program, 3 * 4)


def assert_still_shared(model: nn.Module, memory: Tensor) -> None:
    low, high = memory.data_ptr(), memory.data_ptr() + memory.nbytes
    assert all(low <= p.data_ptr() < high for p in list(model.parameters())[:-1])


@every_kind
@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("groups", [in_one_group, in_groups_of_their_own], ids=lambda groups: groups.__name__)
def test_one_of_them_may_have_no_gradient(kind, missing, groups):
    def program(make):
        model = parameters_of(*[base()] * 2)
        optimizer = make(groups(model))

        def forget():
            if hasattr(optimizer, "perturb") and not forget.perturbed:
                forget.perturbed = True
                return
            model[missing].grad = None

        for step in range(4):
            forget.perturbed = False
            take_step(model, optimizer, step, forget)
        return model.parameters()

    assert_same(kind, program, 2 * 4)


@every_kind
def test_parameters_that_come_to_share_memory_and_part_again_are_followed(kind):
    def program(make):
        model = parameters_of(base(), base() / 2)
        optimizer = make(model.parameters())
        for step in range(6):
            if step == 2:
                model[1].data = model[0].data
            if step == 4:
                model[1].data = model[1].data.clone()
            take_step(model, optimizer, step)
        return model.parameters()

    assert_same(kind, program, 2 * 6)


@every_kind
def test_tied_module_weights_stay_tied(kind):
    def program(make):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel(), dtype=torch.float64).view_as(p))
        model[1].weight = model[0].weight
        optimizer = make(model.parameters())
        for step in range(3):
            take_step(model, optimizer, step)
        assert model[1].weight is model[0].weight
        return model.parameters()

    assert_same(kind, program, 3)


@pytest.mark.parametrize("options", [{"rho": 0.5}, {"rho": 0.5, "adaptive": True}, {"rho": 0.5, "max_grad_norm": 1.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_views
def test_clean_weights_come_back_to_the_bit(views, dtype, options):
    memory = base().to(dtype)
    model = parameters_of(*views(memory))
    optimizer = FSAM(in_groups_of_their_own(model), **options)
    for _ in range(2):
        before = memory.clone()
        sum((p.float() * p.float().sin()).sum() for p in model.parameters()).backward()
        optimizer.perturb()
        assert not torch.equal(memory, before)
        optimizer.restore()
        assert torch.equal(memory, before)


@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM, MomentumSAM])
@every_views
def test_weights_come_back_to_the_bit_after_the_average_was_shown(kind, views):
    memory = base()
    model = parameters_of(*views(memory))
    optimizer = kind(in_groups_of_their_own(model), ema_decay=0.5)
    for _ in range(2):
        sum((p * p.sin()).sum() for p in model.parameters()).backward()
        optimizer.step()
    before = memory.clone()
    with optimizer.ema_weights():
        assert not torch.equal(memory, before)
    assert torch.equal(memory, before)


def test_parameters_that_share_memory_are_refused_where_a_part_of_them_is_trained():
    """What one scatters the other has not gathered."""
    memory = base()
    model = nn.Module()
    model.one, model.other = nn.Parameter(memory), nn.Parameter(memory[3:])
    mask = FishMask.random(model, 0.5, 0)
    optimizer = AdamWL2SP(model.named_parameters(), lr=0.01, trainable=mask)
    before = memory.clone()
    (model.one.sum() + model.other.sum()).backward()
    with pytest.raises(RuntimeError, match="'one' and 'other' share memory"):
        optimizer.step()
    assert torch.equal(memory, before)


# -- with others -------------------------------------------------------------------------------------------------------


@every_kind
def test_other_tensors_in_the_memory_of_a_parameter_see_its_updates(kind):
    model = square_model()
    others = {name: p.detach() for name, p in model.named_parameters()}
    optimizer = kind.ours(model.parameters(), lr=0.01)
    for step in range(2):
        take_step(model, optimizer, step)
    for name, p in model.named_parameters():
        assert others[name].data_ptr() == p.data_ptr()


@every_kind
@pytest.mark.parametrize("of_numpy", [True, False], ids=["memory_of_numpy", "memory_of_torch"])
def test_arrays_in_the_memory_of_a_parameter_see_its_updates(kind, of_numpy):
    array = np.ones((8, 8)) if of_numpy else None
    model = parameters_of(torch.from_numpy(array) if of_numpy else torch.ones(8, 8, dtype=torch.float64))
    array = array if of_numpy else model[0].detach().numpy()
    optimizer = kind.ours(model.parameters(), lr=0.01)
    take_step(model, optimizer, 0)
    assert np.array_equal(array, model[0].detach().numpy())
    assert not np.array_equal(array, np.ones((8, 8)))


@every_kind
def test_frozen_parameter_in_the_memory_of_a_trained_one_stays_there(kind):
    model = square_model()
    frozen = nn.Parameter(model[0].weight.detach(), requires_grad=False)
    optimizer = kind.ours([frozen, *model.parameters()], lr=0.01)
    take_step(model, optimizer, 0)
    assert frozen.data_ptr() == model[0].weight.data_ptr()


def train_shared(model: nn.Module, kind, flatten: bool) -> None:
    torch.set_num_threads(1)
    optimizer = kind(model.parameters(), lr=0.01, flatten=flatten)
    for step in range(2):
        take_step(model, optimizer, step)


@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM])
@pytest.mark.parametrize("flatten", [False, True])
def test_process_that_is_given_a_shared_model_trains_it_for_all(kind, flatten):
    model, expected = square_model(), square_model()
    model.share_memory()
    process = mp.get_context("fork").Process(target=train_shared, args=(model, kind, flatten))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    train_shared(expected, kind, flatten)
    assert all(map(torch.equal, model.parameters(), expected.parameters()))


@every_kind
def test_copy_of_the_model_has_memory_of_its_own(kind):
    model = square_model()
    optimizer = kind.ours(model.parameters(), lr=0.01)
    twin = copy.deepcopy(model)
    before = [p.detach().clone() for p in twin.parameters()]
    take_step(model, optimizer, 0)
    assert all(map(torch.equal, twin.parameters(), before))
