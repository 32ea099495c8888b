"""Training of a FishMask's weights alone: the numbers of dense training with masked gradients, and nothing else."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, AdamWL2SP, FisherMask, MomentumSAM
from fsam_triton.fish import FishMask
from tests.reference import Problem, ReferenceFSAM, ReferenceMomentumSAM, assert_weights_close, small_model
from tests.training import assert_same_bits, assert_unchanged, closure_of, round_trip, train, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

KEEP = 0.3


def masked(model: nn.Module, seed: int = 0) -> FishMask:
    return FishMask.random(model, KEEP, seed=seed)


def train_dense(model: nn.Module, optimizer, mask: FishMask, steps: int, problem=Problem()) -> None:
    """Dense training with masked gradients; what decays outside the mask is put back."""
    before = weights_of(model)
    for step in range(steps):
        closure_of(model, optimizer, step, problem)()
        for name, p in model.named_parameters():
            p.grad *= mask.bits(name)
        optimizer.step()
        with torch.no_grad():
            for (name, p), old in zip(model.named_parameters(), before, strict=True):
                p.copy_(torch.where(mask.bits(name), p, old))


@pytest.mark.parametrize(
    "arguments", [{}, {"amsgrad": True}, {"l2_sp": 0.1}, {"maximize": True}, {"weight_decay": 0.5}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_dense_training_with_masked_gradients_to_the_bit(dtype, arguments):
    model = small_model(dtype)
    mask, other = masked(model), copy.deepcopy(model)
    train(model, AdamWL2SP(model.named_parameters(), lr=0.01, trainable=mask, **arguments), 50)
    train_dense(other, AdamWL2SP(other.named_parameters(), lr=0.01, **arguments), mask, 50)
    assert_same_bits(model, other)


def masked_gradients(problem: Problem, step: int, bits: list[Tensor]):
    return lambda weights: [g * b for g, b in zip(problem.gradients(weights, step), bits, strict=True)]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"adaptive": True}, {"alpha": 0.4}, {"max_grad_norm": 0.5}],
    ids=["sam", "asam", "gsam", "clipped"],
)
def test_sam_on_the_mask_equals_the_reference_with_masked_gradients(arguments):
    model, problem = small_model(torch.float64), Problem()
    mask = masked(model)
    bits = [mask.bits(name) for name, _ in model.named_parameters()]
    before = weights_of(model)
    reference = ReferenceFSAM(model.named_parameters(), lr=0.01, rho=0.5, weight_decay=0.0, **arguments)
    optimizer = FSAM(model.named_parameters(), lr=0.01, rho=0.5, weight_decay=0.0, trainable=mask, **arguments)
    train(model, optimizer, 50)
    for step in range(50):
        reference.step(masked_gradients(problem, step, bits))
    assert_weights_close(model.parameters(), reference.weights, 50, 0.01)
    for p, old, own in zip(model.parameters(), before, bits, strict=True):
        assert torch.equal(p[~own], old[~own])


def test_momentum_sam_on_the_mask_equals_the_reference_with_masked_gradients():
    model, problem = small_model(torch.float64), Problem()
    mask = masked(model)
    bits = [mask.bits(name) for name, _ in model.named_parameters()]
    reference = ReferenceMomentumSAM(model.named_parameters(), lr=0.01, rho=0.5, weight_decay=0.0)
    optimizer = MomentumSAM(model.named_parameters(), lr=0.01, rho=0.5, weight_decay=0.0, trainable=mask)
    train(model, optimizer, 50)
    for step in range(50):
        reference.step(masked_gradients(problem, step, bits))
    shown = model.state_dict()
    optimizer.eval()
    assert_weights_close(model.parameters(), reference.weights, 50, 0.01)
    for name, p in model.named_parameters():
        assert torch.equal(shown[name], p)


@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM, MomentumSAM])
def test_weights_outside_the_mask_never_change(kind, master_weights):
    model = small_model(torch.bfloat16)
    mask, before = masked(model), weights_of(model)
    train(model, kind(model.named_parameters(), lr=0.1, trainable=mask, master_weights=master_weights), 5)
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        bits = mask.bits(name)
        assert torch.equal(p[~bits], old[~bits])
        assert (p[bits] != old[bits]).any() or not bits.any()


def test_parameters_keep_their_memory_and_their_strides():
    model = nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[2].weight.set_(torch.randn(4, 2).t())
    mask = masked(model)
    pointers = [(p.data_ptr(), p.stride()) for p in model.parameters()]
    other = copy.deepcopy(model)
    assert [p.stride() for p in other.parameters()] == [stride for _, stride in pointers]
    train(model, AdamWL2SP(model.named_parameters(), lr=0.01, trainable=mask), 3)
    train_dense(other, AdamWL2SP(other.named_parameters(), lr=0.01), mask, 3)
    assert [(p.data_ptr(), p.stride()) for p in model.parameters()] == pointers
    assert_same_bits(model, other)


def test_state_takes_memory_for_the_mask_alone():
    model = nn.Linear(1000, 1000)
    mask = FishMask.random(model, 0.005)
    optimizer = AdamWL2SP(model.named_parameters(), trainable=mask)
    train(model, optimizer, 2)
    # Weights, gradients, two moments and positions of 4 bytes, in chunks of 16,384 elements.
    (bucket,) = optimizer._buckets
    assert set(bucket.lanes) == {"index", "exp_avg", "exp_avg_sq"}
    assert [lane.nbytes for lane in (bucket.weight, bucket.grad, *bucket.lanes.values())] == [4 * 16384] * 5


@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM, MomentumSAM])
def test_set_trainable_goes_on_as_a_new_optimizer_would(kind):
    model, other = small_model(), small_model()
    first, second = masked(model), FishMask.bias_only(model)
    optimizer = kind(model.named_parameters(), lr=0.01)
    for i, mask in enumerate((None, first, second, None)):
        optimizer.set_trainable(mask)
        fresh = kind(other.named_parameters(), lr=0.01, trainable=mask)
        before = weights_of(model)
        train(model, optimizer, 3, start=3 * i)
        train(other, fresh, 3, start=3 * i)
        if kind is MomentumSAM:
            optimizer.eval(), fresh.eval()
        assert_same_bits(model, other)
        if kind is MomentumSAM:
            optimizer.train()
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
    with pytest.raises(ValueError, match=r"Invalid trainable.*shape"):
        optimizer.set_trainable(FishMask.bias_only(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="Invalid mask"):
        FSAM(small_model().named_parameters(), mask=FisherMask(0.5)).set_trainable(masked(model))
    train(model, optimizer, 2, start=2)
    train(other, same, 2, start=2)
    assert_same_bits(model, other)


def test_parameter_without_a_selected_weight_has_no_state_but_its_gradient_is_cleared():
    model = small_model()
    mask = FishMask.bias_only(model)
    optimizer = AdamWL2SP(model.named_parameters(), lr=0.01, trainable=mask)
    train(model, optimizer, 1)
    assert set(optimizer.state) == {p for name, p in model.named_parameters() if len(mask.indices(name))}
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM, MomentumSAM])
def test_resumed_training_equals_an_uninterrupted_one_to_the_bit(kind):
    model = small_model()
    mask = masked(model)
    optimizer = kind(model.named_parameters(), lr=0.01, trainable=mask)
    train(model, optimizer, 5)
    other = small_model()
    other.load_state_dict(round_trip(model.state_dict()))
    resumed = kind(other.named_parameters(), lr=0.01, trainable=mask)
    resumed.load_state_dict(round_trip(optimizer.state_dict()))
    train(model, optimizer, 5, start=5)
    train(other, resumed, 5, start=5)
    assert_same_bits(model, other)


def test_state_of_another_mask_is_refused_and_nothing_changes():
    model = small_model()
    optimizer = AdamWL2SP(model.named_parameters(), lr=0.01, trainable=masked(model))
    train(model, optimizer, 2)
    saved = round_trip(optimizer.state_dict())
    other = small_model()
    fresh = AdamWL2SP(other.named_parameters(), lr=0.01, trainable=masked(model, seed=1))
    with pytest.raises(ValueError, match=r"'index'|has shape"):
        fresh.load_state_dict(saved)
    assert not fresh.state_dict()["state"]


@pytest.mark.parametrize("master_weights", [False, True])
def test_weights_loaded_into_the_model_are_trained_on(master_weights):
    dtype = torch.bfloat16 if master_weights else torch.float32
    model = small_model(dtype)
    mask = masked(model)
    optimizer = AdamWL2SP(model.named_parameters(), lr=0.01, trainable=mask, master_weights=master_weights)
    train(model, optimizer, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(3.0)
    train(model, optimizer, 1)
    # A step of Adam's is at most a few times the learning rate.
    assert all(((p - 3.0).abs() < 0.2).all() for p in model.parameters())


def test_weights_loaded_while_perturbed_are_the_clean_ones_of_the_masters_too():
    model = small_model(torch.bfloat16)
    mask = masked(model)
    optimizer = MomentumSAM(model.named_parameters(), lr=0.01, trainable=mask, master_weights=True)
    train(model, optimizer, 2)
    loaded = [torch.randn_like(p) for p in model.parameters()]
    with torch.no_grad():
        for p, value in zip(model.parameters(), loaded, strict=True):
            p.copy_(value)
    optimizer.eval()
    assert_unchanged(model, loaded)


def test_copy_of_an_optimizer_trains_the_copied_parameters():
    model = small_model()
    optimizer = AdamWL2SP(model.named_parameters(), lr=0.01, trainable=masked(model))
    train(model, optimizer, 2)
    other, copied = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2, start=2)
    train(other, copied, 2, start=2)
    assert_same_bits(model, other)


def test_restore_after_a_perturbation_is_to_the_bit():
    model = small_model()
    optimizer = FSAM(model.named_parameters(), rho=0.5, trainable=masked(model))
    before = weights_of(model)
    closure_of(model, optimizer, 0)()
    optimizer.perturb()
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    optimizer.restore()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_bad_arguments_are_refused_by_name():
    model, mask = small_model(), masked(small_model())
    with pytest.raises(ValueError, match=r"trainable.*named_parameters"):
        AdamWL2SP(model.parameters(), trainable=mask)
    with pytest.raises(ValueError, match="Invalid trainable"):
        AdamWL2SP(model.named_parameters(), trainable=0.5)
    with pytest.raises(ValueError, match=r"Invalid trainable.*shape"):
        AdamWL2SP(nn.Linear(3, 3).named_parameters(), trainable=mask)
    with pytest.raises(ValueError, match="static_grads"):
        AdamWL2SP(model.named_parameters(), trainable=mask, static_grads=True)
    with pytest.raises(ValueError, match="Invalid mask"):
        FSAM(model.named_parameters(), trainable=mask, mask=FisherMask(0.5))


def mask_of_the_head(model: nn.Module) -> FishMask:
    return FishMask({"head.weight": torch.arange(5)}, {name: p.shape for name, p in model.named_parameters()})


@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM, MomentumSAM])
def test_zeroed_gradient_to_which_nothing_was_added_updates_nothing(kind):
    model = small_model()
    optimizer = kind(model.named_parameters(), lr=0.01, trainable=mask_of_the_head(model))
    train(model, optimizer, 2)
    optimizer.restore()
    before, gradient = weights_of(model), model["head"].weight.grad
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    optimizer.restore()
    assert model["head"].weight.grad is gradient
    assert optimizer.state[model["head"].weight]["step"] == 2
    assert all(torch.equal(p, weight) for p, weight in zip(model.parameters(), before, strict=True))


def test_set_trainable_clears_the_gradients_of_what_was_not_trained():
    model = small_model()
    optimizer = AdamWL2SP(model.named_parameters(), trainable=mask_of_the_head(model))
    Problem().loss(model.parameters(), 0).backward()
    optimizer.set_trainable(None)
    assert all(p.grad is None for p in model.parameters())


def test_parameter_with_gaps_between_its_elements_is_refused():
    weight = nn.Parameter(torch.ones(3, 4)[:, ::2])
    mask = FishMask({"weight": torch.arange(2)}, {"weight": weight.shape})
    with pytest.raises(ValueError, match=r"'weight'.*strides \(4, 2\).*dense"):
        AdamWL2SP([("weight", weight)], trainable=mask)
