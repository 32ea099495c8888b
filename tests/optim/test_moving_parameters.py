"""Parameters that move, and of any layout: they are read and written where they are at the moment of the step."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fsam_triton import FSAM, AdamWL2SP, ArgumentError
from tests.optim.by_hand import assert_same, every_kind, halves, parameters_of, square_model, take_step
from tests.problem import Problem, assert_weights_close, combination_bound

pytestmark = pytest.mark.usefixtures("one_thread")


# -- moves -------------------------------------------------------------------------------------------------------------


def data_replaced(model):
    for p in model.parameters():
        p.data = p.data.clone()


def transposed_in_place(model):
    """The same address, other strides."""
    model[0].weight.data = model[0].weight.data.t()


def transposed_in_memory(model):
    """The same values, other strides."""
    model[0].weight.data = model[0].weight.data.t().contiguous().t()


def with_gaps(model):
    wide = torch.zeros(8, 16, dtype=torch.float64)
    wide[:, ::2] = model[0].weight.data
    model[0].weight.data = wide[:, ::2]


def rows_of_a_wider_matrix(model):
    wide = torch.zeros(8, 13, dtype=torch.float64)
    wide[:, :8] = model[0].weight.data
    model[0].weight.data = wide[:, :8]


def at_odd_places(model):
    for p in model.parameters():
        place = torch.zeros(p.numel() + 3, dtype=torch.float64)[3:].view_as(p)
        p.data = place.copy_(p.data)


def into_one_buffer(model):
    """As cuDNN does with the weights of an RNN, and ZeRO with those of a bucket."""
    params = list(model.parameters())
    buffer, start = torch.cat([p.detach().flatten() for p in params]), 0
    for p in params:
        p.data = buffer[start : start + p.numel()].view_as(p)
        start += p.numel()


def into_shared_memory(model):
    model.share_memory()


def by_vector(model):
    vector_to_parameters(0.9 * parameters_to_vector(model.parameters()).detach(), model.parameters())


def storage_replaced(model):
    for p in model.parameters():
        with torch.no_grad():
            p.set_(p.detach().clone())


def put_away_and_back(model):
    kept = [p.data for p in model.parameters()]
    for p in model.parameters():
        p.data = torch.empty(0, dtype=torch.float64)
    for p, data in zip(model.parameters(), kept, strict=True):
        p.data = data.clone()


MOVES = [
    data_replaced,
    transposed_in_place,
    transposed_in_memory,
    with_gaps,
    rows_of_a_wider_matrix,
    at_odd_places,
    into_one_buffer,
    into_shared_memory,
    by_vector,
    storage_replaced,
    put_away_and_back,
]
every_move = pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)


@every_kind
@every_move
@pytest.mark.parametrize("set_to_none", [True, False], ids=["gradients_freed", "gradients_zeroed"])
def test_parameters_moved_between_steps_are_followed(kind, move, set_to_none):
    def program(make):
        model = square_model()
        optimizer = make(model.parameters())
        for step in range(6):
            if step in (1, 3, 4):
                move(model)
            take_step(model, optimizer, step, set_to_none=set_to_none)
        return model.parameters()

    assert_same(kind, program, 6)


# Between the passes `p.set_()` counts as writing, which makes what is written the clean weights.
MOVES_OF_PLACE = [move for move in MOVES if move not in (transposed_in_place, by_vector, storage_replaced)]


@every_kind
@pytest.mark.parametrize("move", MOVES_OF_PLACE, ids=lambda move: move.__name__)
def test_parameters_moved_between_the_passes_are_followed(kind, move):
    def program(make):
        model = square_model()
        optimizer = make(model.parameters())
        for step in range(3):
            passes = halves(optimizer)
            for half in passes:
                if half is passes[-1]:
                    move(model)
                optimizer.zero_grad()
                Problem().loss(model.parameters(), step).backward()
                half()
        return model.parameters()

    assert_same(kind, program, 3)


@pytest.mark.parametrize("move", MOVES_OF_PLACE, ids=lambda move: move.__name__)
def test_gradients_of_before_a_move_are_combined_with_those_after_it(move):
    """GSAM keeps the first ones, whose strides may be others."""
    results = []
    for moved in (False, True):
        model = square_model()
        optimizer = FSAM(model.parameters(), lr=0.01, alpha=0.4, eps=1.0)
        for step in range(3):
            Problem(seed=1).loss(model.parameters(), step).backward()
            optimizer.perturb()
            if moved:
                move(model)
            Problem(seed=2).loss(model.parameters(), step).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.parameters())
    n = sum(p.numel() for p in square_model().parameters())
    extra = combination_bound(3, 0.01, torch.ones(1, dtype=torch.float64), 0.4, n)
    assert_weights_close(*results, 3, 0.01, extra=extra)


@every_kind
@pytest.mark.parametrize("names", [("exp_avg", "exp_avg_sq")])
def test_parameters_cut_where_they_are_train_with_moments_that_are_cut(kind, names):
    """A layer is pruned by `p.data = p.data[:4]`: the same address, the same strides."""

    def program(make):
        model = square_model()
        optimizer = make(model.parameters())
        for step in range(4):
            if step == 2:
                optimizer.zero_grad()
                for p in model[0].parameters():
                    p.data = p.data[:4]
                    for name in names:
                        optimizer.state[p][name] = optimizer.state[p][name][:4]
            take_step(model, optimizer, step)
        return model.parameters()

    assert_same(kind, program, 4)


@every_kind
def test_parameters_resized_before_the_first_step_train(kind):
    """Embeddings of new tokens."""

    def program(make):
        model = square_model()
        optimizer = make(model.parameters())
        model[2].weight.data = torch.cat([model[2].weight.data, torch.zeros(2, 8, dtype=torch.float64)])
        for step in range(3):
            take_step(model, optimizer, step)
        return model.parameters()

    assert_same(kind, program, 3)


@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM])
def test_parameter_of_another_shape_than_its_state_is_refused_by_name(kind):
    model = square_model()
    optimizer = kind(model.named_parameters(), lr=0.01)
    take_step(model, optimizer, 0)
    optimizer.zero_grad()
    model[0].bias.data = torch.zeros(9, dtype=torch.float64)
    with pytest.raises(ArgumentError, match=r"parameter '0\.bias'") as error:
        take_step(model, optimizer, 1)
    assert error.value.value == (8,)


@every_kind
def test_parameters_without_memory_for_a_while_are_left_out(kind):
    """Offloaded layers that a step does not train."""

    def program(make):
        model = square_model()
        optimizer = make(model.parameters())
        for step in range(5):
            kept = model[0].weight.data
            if step in (2, 3):
                model[0].weight.requires_grad_(False)
                model[0].weight.grad, model[0].weight.data = None, torch.empty(0, dtype=torch.float64)
            take_step(model[1:] if step in (2, 3) else model, optimizer, step)
            model[0].weight.data = kept
            model[0].weight.requires_grad_(True)
        return model.parameters()

    assert_same(kind, program, 5)


# -- types -------------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("swap", [False, True], ids=["by_data", "swapped"])
def test_model_converted_after_the_optimizer_was_made_trains_in_its_new_type(kind, swap):
    def program(make):
        model = square_model(torch.float32)
        optimizer = make(model.parameters())
        torch.__future__.set_swap_module_params_on_conversion(swap)
        try:
            model.double()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        for step in range(4):
            take_step(model, optimizer, step)
        return model.parameters()

    assert_same(kind, program, 4)


@every_kind
def test_model_converted_in_training_goes_on_with_its_moments_in_the_new_type(kind):
    def program(make):
        model = square_model(torch.float32)
        optimizer = make(model.parameters())
        take_step(model, optimizer, 0)
        model.double()
        for p, entry in optimizer.state.items():
            entry |= {name: entry[name].to(p.dtype) for name in ("exp_avg", "exp_avg_sq")}
        for step in range(1, 4):
            take_step(model, optimizer, step)
        return [p.float() for p in model.parameters()]

    assert_same(kind, program, 4)


@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM])
def test_moments_follow_a_model_that_is_converted_by_themselves(kind):
    """PyTorch's raises an error in its next step."""
    model = square_model(torch.float32)
    optimizer = kind(model.parameters(), lr=0.01)
    take_step(model, optimizer, 0)
    before = {p: entry["exp_avg"].clone() for p, entry in optimizer.state.items()}
    model.double()
    optimizer.step()
    for p, entry in optimizer.state.items():
        assert p.dtype == entry["exp_avg"].dtype == torch.float64
        assert float(entry["step"]) == 2
        # The gradient, which was converted with the model, once more: m = 0.1 g, then 0.19 g.
        torch.testing.assert_close(entry["exp_avg"], before[p].double() * 1.9, rtol=1e-6, atol=0)


# -- layouts -----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda: torch.randn(6, 4),
    "transposed": lambda: torch.randn(6, 4).t(),
    "permuted": lambda: torch.randn(2, 3, 4).permute(2, 0, 1),
    "channels_last": lambda: torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
    "channels_last_of_one": lambda: torch.randn(4, 3, 1, 1).to(memory_format=torch.channels_last),
    "columns": lambda: torch.randn(6, 10)[:, 2:5],
    "every_second_column": lambda: torch.randn(24, 32)[:, ::2],
    "every_second_element": lambda: torch.randn(33)[::2],
    "no_elements": lambda: torch.randn(0, 3),
    "no_dimensions": lambda: torch.randn(()),
    "one_element": lambda: torch.randn(1, 1, 1),
    "odd_length": lambda: torch.randn(1027),
    "odd_place": lambda: torch.randn(1030)[3:],
}


def laid_out(tensor: Tensor) -> Tensor:
    """A copy with the same strides; clone() alone would make a dense one of a tensor with gaps."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = torch.zeros(max(span, 1), dtype=torch.float64)
    return memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


@every_kind
@pytest.mark.parametrize("make_tensor", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_parameter_of_any_layout_trains_and_keeps_its_shape_and_strides(kind, make_tensor):
    tensor, other = make_tensor(), torch.randn(24, 16)

    def program(make):
        model = parameters_of(laid_out(tensor), laid_out(other))
        optimizer = make(model.parameters())
        for step in range(4):
            take_step(model, optimizer, step)
        assert model[0].shape == tensor.shape
        assert model[0].stride() == tensor.stride()
        return model.parameters()

    assert_same(kind, program, 4)


@every_kind
def test_memory_between_the_elements_of_a_parameter_is_left_alone(kind):
    around = torch.full((8, 16), 7.0, dtype=torch.float64)
    model = parameters_of(around[:, 3:11])
    optimizer = kind.ours(model.parameters(), lr=0.01)
    for step in range(2):
        take_step(model, optimizer, step)
    assert (around[:, :3] == 7).all()
    assert (around[:, 11:] == 7).all()
    assert (around[:, 3:11] != 7).all()


@every_kind
def test_model_changes_its_memory_format_in_training(kind):
    def program(make):
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 1)).double()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel(), dtype=torch.float64).view_as(p))
        optimizer = make(model.parameters())
        for step in range(6):
            if step in (2, 4):
                model.to(memory_format=torch.channels_last if step == 2 else torch.contiguous_format)
            take_step(model, optimizer, step, set_to_none=step != 4)
        return model.parameters()

    assert_same(kind, program, 6)


@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM])
def test_parameter_whose_elements_share_memory_is_refused_as_torch_refuses_it(kind):
    model = parameters_of(torch.ones(6, 1).expand(6, 4))
    optimizer = kind(model.parameters(), lr=0.01)
    with pytest.raises(RuntimeError, match="single memory location"):
        take_step(model, optimizer, 0)


@every_kind
def test_leaf_tensors_that_are_no_parameters_train(kind):
    def program(make):
        tensors = [p.detach().clone().requires_grad_() for p in square_model().parameters()]
        optimizer = make(tensors)
        for step in range(3):
            for half in halves(optimizer):
                optimizer.zero_grad()
                Problem().loss(tensors, step).backward()
                half()
        return tensors

    assert_same(kind, program, 3)


@every_kind
def test_step_may_be_taken_in_inference_mode_or_under_autocast(kind):
    def program(make):
        model = square_model()
        optimizer = make(model.parameters())
        for step in range(4):
            for half in halves(optimizer):
                optimizer.zero_grad()
                Problem().loss(model.parameters(), step).backward()
                with torch.inference_mode() if step % 2 else torch.autocast("cpu", torch.bfloat16):
                    half()
        return model.parameters()

    assert_same(kind, program, 4)
