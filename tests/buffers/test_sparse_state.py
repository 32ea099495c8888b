"""The state of sparse training: how little it takes, that it is saved, and that masks may change on the way."""

import copy

import pytest
import torch
from torch import nn

from fsam_triton import FSAM, AdamWL2SP, FisherMask, FishMask, MomentumSAM
from tests.buffers.sparse_training import KINDS, mask_of_the_head, masked, train, train_dense
from tests.problem import Problem, small_model
from tests.training import assert_same_bits, round_trip, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def permuted_model() -> nn.Module:
    """A convolution whose channels come last, and a transposed matrix."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[2].weight.set_(torch.randn(4, 2).t())
    return model


# -- memory ------------------------------------------------------------------------------------------------------------


def test_parameters_keep_their_memory_and_their_strides():
    model = permuted_model()
    mask = masked(model)
    pointers = [(p.data_ptr(), p.stride()) for p in model.parameters()]
    other = copy.deepcopy(model)
    assert [p.stride() for p in other.parameters()] == [stride for _, stride in pointers]
    train(model, AdamWL2SP(model.named_parameters(), lr=0.01, trainable=mask), 3)
    train_dense(other, AdamWL2SP(other.named_parameters(), lr=0.01), mask, 3)
    assert [(p.data_ptr(), p.stride()) for p in model.parameters()] == pointers
    assert_same_bits(model, other)


GRADIENTS = {
    "row_major": lambda gradient, p: gradient.contiguous(),
    "expanded": lambda gradient, p: gradient[..., :1].expand_as(p),
    "lazily_negated": lambda gradient, p: torch._neg_view(-gradient),
}


@pytest.mark.parametrize("make", GRADIENTS.values(), ids=GRADIENTS)
def test_gradients_however_they_are_stored_are_those_of_the_same_elements(make):
    model, other = permuted_model(), permuted_model()
    mask = masked(model)
    for m in (model, other):
        optimizer = AdamWL2SP(m.named_parameters(), lr=0.01, trainable=mask)
        for i, p in enumerate(m.parameters()):
            gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            p.grad = make(torch.empty_like(p).copy_(gradient), p)
            if m is other:
                p.grad = torch.empty_like(p).copy_(p.grad)
        optimizer.step()
    assert_same_bits(model, other)


def test_state_takes_memory_for_the_mask_alone():
    model = nn.Linear(1000, 1000)
    mask = FishMask.random(model, 0.005)
    optimizer = AdamWL2SP(model.named_parameters(), trainable=mask)
    train(model, optimizer, 2)
    for name, p in model.named_parameters():
        entry = optimizer.state[p]
        assert list(entry) == ["step", "exp_avg", "exp_avg_sq", "index"]
        n = len(mask.indices(name))
        assert [value.untyped_storage().nbytes() for value in list(entry.values())[1:]] == [4 * n] * 3


def test_parameter_without_a_selected_weight_has_no_state_but_its_gradient_is_cleared():
    model = small_model()
    mask = FishMask.bias_only(model)
    optimizer = AdamWL2SP(model.named_parameters(), lr=0.01, trainable=mask)
    train(model, optimizer, 1)
    assert set(optimizer.state) == {p for name, p in model.named_parameters() if len(mask.indices(name))}
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("master_weights", [False, True])
def test_weights_loaded_into_the_model_are_trained_on(master_weights):
    model = small_model(torch.bfloat16 if master_weights else torch.float32)
    optimizer = AdamWL2SP(model.named_parameters(), lr=0.01, trainable=masked(model), master_weights=master_weights)
    train(model, optimizer, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(3.0)
    train(model, optimizer, 1)
    # A step of Adam's is at most a few times the learning rate.
    assert all(((p - 3.0).abs() < 0.2).all() for p in model.parameters())


def reordered(model: nn.Module) -> None:
    """Give all parameters other memory and, where they can have others, other strides."""
    for p in model.parameters():
        p.data = p.data.clone() if p.dim() < 2 else p.data.transpose(0, 1).clone().transpose(0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_move_are_followed_with_their_state(kind):
    model, other = small_model(), small_model()
    first, second = (kind(m.named_parameters(), lr=0.01, trainable=masked(m), l2_sp=0.1) for m in (model, other))
    train(model, first, 3)
    train(other, second, 3)
    reordered(model)
    train(model, first, 3, start=3)
    train(other, second, 3, start=3)
    assert_same_bits(model, other)


# -- other masks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_set_trainable_continues_as_a_new_optimizer_would(kind):
    model, other = small_model(), small_model()
    first, second = masked(model), FishMask.bias_only(model)
    optimizer = kind(model.named_parameters(), lr=0.01, l2_sp=0.1)
    for i, mask in enumerate((None, first, second, None)):
        optimizer.set_trainable(mask)
        fresh = kind(other.named_parameters(), lr=0.01, l2_sp=0.1, trainable=mask)
        before = weights_of(model)
        train(model, optimizer, 3, start=3 * i)
        train(other, fresh, 3, start=3 * i)
        assert_same_bits(model, other)
        if mask is not None:
            for (name, p), old in zip(other.named_parameters(), before, strict=True):
                assert torch.equal(p[~mask.bits(name)], old[~mask.bits(name)])


def test_set_trainable_keeps_groups_for_schedulers():
    model = small_model()
    optimizer = FSAM(model.named_parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, 1)
    scheduler.step()
    optimizer.set_trainable(FishMask.bias_only(model))
    train(model, optimizer, 1)
    assert optimizer.param_groups[0]["lr"] == 0.005
    assert optimizer.param_groups[0]["updates"] == 2
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.0025


def test_set_trainable_with_a_mask_that_does_not_fit_changes_nothing():
    model, other = small_model(), small_model()
    optimizer, same = (AdamWL2SP(m.named_parameters(), lr=0.01) for m in (model, other))
    train(model, optimizer, 2)
    train(other, same, 2)
    with pytest.raises(ValueError, match="Invalid trainable"):
        optimizer.set_trainable(FishMask.bias_only(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="Invalid mask"):
        FSAM(small_model().named_parameters(), mask=FisherMask(0.5)).set_trainable(masked(model))
    train(model, optimizer, 2, start=2)
    train(other, same, 2, start=2)
    assert_same_bits(model, other)


def test_set_trainable_clears_the_gradients_of_what_was_not_trained():
    model = small_model()
    optimizer = AdamWL2SP(model.named_parameters(), trainable=mask_of_the_head(model))
    Problem().loss(model.parameters(), 0).backward()
    optimizer.set_trainable(None)
    assert all(p.grad is None for p in model.parameters())


# -- state dicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"master_weights": True, "ema_decay": 0.9, "l2_sp": 0.1}], ids=["", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_training_equals_an_uninterrupted_one_to_the_bit(kind, arguments):
    model = small_model(torch.bfloat16 if arguments else torch.float32)
    mask = masked(model)
    optimizer = kind(model.named_parameters(), lr=0.01, trainable=mask, **arguments)
    train(model, optimizer, 5)
    other = small_model(torch.bfloat16 if arguments else torch.float32)
    other.load_state_dict(round_trip(model.state_dict()))
    resumed = kind(other.named_parameters(), lr=0.01, trainable=mask, **arguments)
    resumed.load_state_dict(round_trip(optimizer.state_dict()))
    train(model, optimizer, 5, start=5)
    train(other, resumed, 5, start=5)
    assert_same_bits(model, other)
    if arguments:
        with optimizer.ema_weights(), resumed.ema_weights():
            assert_same_bits(model, other)


def test_state_has_the_positions_of_the_mask_whatever_the_strides():
    model = permuted_model()
    mask = masked(model)
    optimizer = AdamWL2SP(model.named_parameters(), trainable=mask)
    train(model, optimizer, 1)
    assert all(len(mask.indices(name)) for name in ("0.weight", "2.weight"))
    for name, p in model.named_parameters():
        if len(mask.indices(name)):
            assert torch.equal(optimizer.state[p]["index"], mask.indices(name))
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    plain.load_state_dict(model.state_dict())
    assert [p.stride() for p in plain.parameters()] != [p.stride() for p in model.parameters()]
    other = AdamWL2SP(plain.named_parameters(), trainable=mask)
    other.load_state_dict(round_trip(optimizer.state_dict()))
    train(model, optimizer, 2, start=1)
    train(plain, other, 2, start=1)
    assert_same_bits(model, plain)


def of_three_weights(model: nn.Module, first: int) -> FishMask:
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return FishMask({"head.weight": torch.arange(first, first + 3)}, shapes)


@pytest.mark.parametrize("other", [lambda m: of_three_weights(m, 1), mask_of_the_head], ids=["as_many", "more"])
def test_state_of_another_mask_is_refused_and_nothing_changes(other):
    model = small_model()
    optimizer = AdamWL2SP(model.named_parameters(), lr=0.01, trainable=of_three_weights(model, 0))
    train(model, optimizer, 2)
    saved = round_trip(optimizer.state_dict())
    fresh = AdamWL2SP(model.named_parameters(), lr=0.02, trainable=other(model))
    train(model, fresh, 1)
    before = round_trip(fresh.state_dict())
    with pytest.raises(ValueError, match=r"Invalid state '\w+' of parameter 'head.weight'"):
        fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["lr"] == 0.02
    for number, entry in fresh.state_dict()["state"].items():
        assert all(torch.equal(value, before["state"][number][name]) for name, value in entry.items())


def test_state_of_parameters_that_are_trained_whole_goes_into_a_dense_optimizer():
    model, other = small_model(), small_model()
    mask = FishMask.bias_only(model)
    optimizer = AdamWL2SP(model.named_parameters(), lr=0.01, trainable=mask)
    train(model, optimizer, 2)
    other.load_state_dict(model.state_dict())
    dense = AdamWL2SP(other.named_parameters(), lr=0.01)
    dense.load_state_dict(round_trip(optimizer.state_dict()))
    assert all("index" not in entry for entry in dense.state.values())
    for name, p in model.named_parameters():
        q = dict(other.named_parameters())[name]
        assert (p in optimizer.state) == (q in dense.state)
        if p in optimizer.state:
            assert torch.equal(optimizer.state[p]["exp_avg"], dense.state[q]["exp_avg"])


def test_copy_of_an_optimizer_trains_the_copied_parameters():
    model = small_model()
    optimizer = AdamWL2SP(model.named_parameters(), lr=0.01, trainable=masked(model))
    train(model, optimizer, 2)
    other, copied = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2, start=2)
    train(other, copied, 2, start=2)
    assert_same_bits(model, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_weights_can_be_read_and_written(kind, dtype):
    model = small_model(dtype)
    mask = masked(model)
    optimizer = kind(model.named_parameters(), lr=0.01, trainable=mask, master_weights=True)
    train(model, optimizer, 2)
    weights, before = optimizer.trained_weights(), weights_of(model)
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert sum(map(torch.numel, weights)) == mask.count
    optimizer.set_trained_weights([weight + 1 for weight in weights])
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        assert torch.equal(p[~mask.bits(name)], old[~mask.bits(name)])
    # Sums in fp32 are what the masters are, to the bit.
    assert all(torch.equal(new, old + 1) for new, old in zip(optimizer.trained_weights(), weights, strict=True))
    optimizer.set_trained_weights(weights)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_momentum_sam_shows_clean_weights_between_steps():
    model = small_model()
    optimizer = MomentumSAM(model.named_parameters(), lr=0.01, rho=0.5, trainable=masked(model))
    train(model, optimizer, 2)
    assert not optimizer.perturbed
    before = weights_of(model)
    optimizer.perturb()
    assert optimizer.perturbed
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    optimizer.eval()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
