"""Training of a FishMask's weights alone: the numbers of dense training with masked gradients, and nothing else."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, AdamWL2SP, FisherMask, FishMask, MomentumSAM, Schedule
from tests.buffers.sparse_training import KINDS, mask_of_the_head, masked, train, train_dense
from tests.fp64_optimizers import ReferenceFSAM, ReferenceMomentumSAM
from tests.problem import Problem, assert_weights_close, small_model
from tests.training import assert_same_bits, closure_of, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

# -- the numbers -------------------------------------------------------------------------------------------------------

UPDATES = {
    "adamw": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "weight_decay": {"weight_decay": 0.5},
    "initial_anchors": {"l2_sp": 0.1},
    "given_anchors": {"l2_sp": 0.1, "anchors": dict(small_model(seed=1).named_parameters())},
    "sgd": {"rule": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "lion": {"rule": "lion", "lr": 1e-3},
}


@pytest.mark.parametrize("sparse", [False, True], ids=["all_gradients", "missing_gradients"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("arguments", UPDATES.values(), ids=UPDATES)
def test_equals_dense_training_with_masked_gradients_to_the_bit(arguments, dtype, sparse):
    model, problem = small_model(dtype), Problem(sparse=sparse)
    mask, other = masked(model), copy.deepcopy(model)
    # A step whose rho is zero is a plain one of its rule.
    options = {"lr": 0.01, "rho": 0.0, **arguments}
    train(model, FSAM(model.named_parameters(), trainable=mask, **options), 50, problem=problem)
    train_dense(other, FSAM(other.named_parameters(), **options), mask, 50, problem)
    assert_same_bits(model, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_equal_those_of_dense_training_to_the_bit(dtype):
    model = small_model(dtype)
    mask, other = masked(model), copy.deepcopy(model)
    before = weights_of(model)
    optimizer = AdamWL2SP(model.named_parameters(), lr=0.01, master_weights=True, trainable=mask)
    dense = AdamWL2SP(other.named_parameters(), lr=0.01, master_weights=True)
    train(model, optimizer, 20)
    train_dense(other, dense, mask, 20)
    assert_same_bits(model, other)
    for (name, p), q, old in zip(model.named_parameters(), other.parameters(), before, strict=True):
        if len(mask.indices(name)):
            master, bits = optimizer.master_weight(p), mask.bits(name)
            assert master.dtype == torch.float32
            assert torch.equal(master.to(dtype), p)
            assert torch.equal(master[bits], dense.master_weight(q)[bits])
            assert torch.equal(master[~bits], old[~bits].float())


def test_parameters_of_several_types_and_groups_are_trained_together():
    model = nn.ModuleDict(
        {"narrow": nn.Linear(6, 5).bfloat16(), "wide": nn.Linear(5, 4).double(), "head": nn.Linear(4, 3)}
    )
    mask, before = FishMask.random(model, 0.4), weights_of(model)
    named = list(model.named_parameters())
    groups = [{"params": named[:3], "lr": 0.1}, {"params": named[3:], "lr": 0.0}]
    train(model, AdamWL2SP(groups, trainable=mask), 3)
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        assert torch.equal(p != old, mask.bits(name) & (name in dict(named[:3])))


def masked_gradients(problem: Problem, step: int, bits: list[Tensor]):
    return lambda weights: [g * b for g, b in zip(problem.gradients(weights, step), bits, strict=True)]


SHARP = {
    "sam": {},
    "asam": {"adaptive": True},
    "gsam": {"alpha": 0.4},
    "clipped": {"max_grad_norm": 0.5},
    "looksam": {"reuse": 0.3, "is_sharp": lambda step: step % 3 == 0},
}


@pytest.mark.parametrize("arguments", SHARP.values(), ids=SHARP)
def test_sam_on_the_mask_equals_the_reference_with_masked_gradients(arguments):
    model, problem = small_model(torch.float64), Problem()
    mask = masked(model)
    bits = [mask.bits(name) for name, _ in model.named_parameters()]
    before = weights_of(model)
    reference = ReferenceFSAM(model.named_parameters(), lr=0.01, rho=0.5, weight_decay=0.0, **arguments)
    own = {name: value for name, value in arguments.items() if name not in ("reuse", "is_sharp")}
    if "reuse" in arguments:
        own["schedule"] = Schedule(every=3, reuse=arguments["reuse"])
    optimizer = FSAM(model.named_parameters(), lr=0.01, rho=0.5, weight_decay=0.0, trainable=mask, **own)
    train(model, optimizer, 50)
    for step in range(50):
        reference.step(masked_gradients(problem, step, bits))
    assert_weights_close(model.parameters(), reference.weights, 50, 0.01)
    for p, old, chosen in zip(model.parameters(), before, bits, strict=True):
        assert torch.equal(p[~chosen], old[~chosen])


def test_momentum_sam_on_the_mask_equals_the_reference_with_masked_gradients():
    model, problem = small_model(torch.float64), Problem()
    mask = masked(model)
    bits = [mask.bits(name) for name, _ in model.named_parameters()]
    reference = ReferenceMomentumSAM(model.named_parameters(), lr=0.01, rho=0.5, weight_decay=0.0)
    optimizer = MomentumSAM(model.named_parameters(), lr=0.01, rho=0.5, weight_decay=0.0, trainable=mask)
    train(model, optimizer, 50)
    for step in range(50):
        reference.step(masked_gradients(problem, step, bits))
    assert_weights_close(model.parameters(), reference.weights, 50, 0.01)


@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_outside_the_mask_never_change(kind, master_weights):
    model = small_model(torch.bfloat16)
    mask, before = masked(model), weights_of(model)
    train(model, kind(model.named_parameters(), lr=0.1, trainable=mask, master_weights=master_weights), 5)
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        bits = mask.bits(name)
        assert torch.equal(p[~bits], old[~bits])
        assert (p[bits] != old[bits]).any() or not bits.any()


@pytest.mark.parametrize("kind", KINDS)
def test_zero_gradient_takes_part_and_a_missing_one_does_not(kind):
    """As in torch.optim: moments decay, and so do weights."""
    model = small_model()
    optimizer = kind(model.named_parameters(), lr=0.01, trainable=mask_of_the_head(model))
    weight = model["head"].weight
    train(model, optimizer, 2)
    before, moment = weight.detach().clone(), optimizer.state[weight]["exp_avg"].clone()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(weight, before)
    assert optimizer.state[weight]["step"] == 2
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 3
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], 0.9 * moment, rtol=1e-6, atol=0.0)
    assert torch.equal(weight != before, optimizer.trainable.bits("head.weight"))


# -- the passes of SAM -------------------------------------------------------------------------------------------------


def perturbed_model(**arguments) -> tuple[nn.ModuleDict, FSAM, FishMask, list[Tensor]]:
    """A model between two passes, and its clean weights."""
    model = small_model(arguments.pop("dtype", torch.float32))
    mask, before = masked(model), weights_of(model)
    optimizer = FSAM(model.named_parameters(), rho=5.0, trainable=mask, **arguments)
    closure_of(model, optimizer, 0)()
    optimizer.perturb()
    return model, optimizer, mask, before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perturbation_moves_selected_weights_and_restore_puts_them_back_to_the_bit(dtype):
    model, optimizer, mask, before = perturbed_model(dtype=dtype)
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        assert torch.equal(p != old, mask.bits(name))
        assert torch.equal(optimizer.mask_of(p), mask.bits(name))
    optimizer.restore()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_clean_weights_are_shown_while_perturbed():
    model, optimizer, mask, before = perturbed_model()
    for (name, p), old, shown in zip(model.named_parameters(), before, model.state_dict().values(), strict=True):
        assert torch.equal(shown, old)
        if len(mask.indices(name)):
            assert torch.equal(optimizer.clean_weight(p), old)
            assert torch.equal(optimizer.master_weight(p), old)


def test_perturbation_clears_all_gradients():
    model, optimizer, _, _ = perturbed_model()
    assert all(p.grad is None for p in model.parameters())
    small_mask = mask_of_the_head(model)
    optimizer.set_trainable(small_mask)
    closure_of(model, optimizer, 1)()
    optimizer.perturb()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("way", ["restored", "another mask"])
def test_step_after_a_perturbation_that_was_taken_back_is_a_plain_one(way):
    """GSAM has kept a gradient at the mask of then."""
    model, optimizer, mask, before = perturbed_model(alpha=0.5, lr=0.01)
    if way == "restored":
        optimizer.restore()
    else:
        mask = masked(model, seed=1)
        optimizer.set_trainable(mask)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    other = small_model()
    plain = AdamWL2SP(other.named_parameters(), lr=0.01, trainable=mask)
    for m, own in ((model, optimizer), (other, plain)):
        closure_of(m, own, 1)()
        own.step()
    assert_same_bits(model, other)


MOVES = {
    "other_memory": lambda p: p.detach().clone(),
    "transposed": lambda p: p.detach().t().contiguous().t() if p.dim() == 2 else p.detach().clone(),
    "other_type": lambda p: p.detach().double(),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_parameters_that_move_while_perturbed_are_restored_where_they_are(move):
    model, optimizer, _, before = perturbed_model()
    for p in model.parameters():
        p.data = move(p)
    optimizer.restore()
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old.to(p.dtype))


@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize("kind", [FSAM, MomentumSAM])
def test_weights_loaded_while_perturbed_are_the_clean_ones(kind, master_weights):
    model = small_model(torch.bfloat16)
    optimizer = kind(model.named_parameters(), lr=0.01, trainable=masked(model), master_weights=master_weights)
    train(model, optimizer, 2)
    closure_of(model, optimizer, 2)()
    optimizer.perturb()
    loaded = [torch.randn_like(p) for p in model.parameters()]
    with torch.no_grad():
        for p, value in zip(model.parameters(), loaded, strict=True):
            p.copy_(value)
    optimizer.restore()
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), loaded, strict=True))


def test_average_of_the_weights_is_shown_and_taken_back():
    model = small_model()
    mask, other = masked(model), copy.deepcopy(model)
    optimizer = AdamWL2SP(model.named_parameters(), lr=0.01, trainable=mask, ema_decay=0.8)
    dense = AdamWL2SP(other.named_parameters(), lr=0.01, ema_decay=0.8)
    train(model, optimizer, 5)
    train_dense(other, dense, mask, 5)
    before = weights_of(model)
    with optimizer.ema_weights(), dense.ema_weights():
        for (name, p), q, old in zip(model.named_parameters(), other.parameters(), before, strict=True):
            bits = mask.bits(name)
            assert torch.equal(p[bits], q[bits])
            assert torch.equal(p[~bits], old[~bits])
            assert (p != old)[bits].any() or not bits.any()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused_by_name():
    model, mask = small_model(), masked(small_model())
    for make, name in (
        (lambda: AdamWL2SP(model.parameters(), trainable=mask), "trainable"),
        (lambda: AdamWL2SP(model.named_parameters(), trainable=0.5), "trainable"),
        (lambda: AdamWL2SP(nn.Linear(3, 3).named_parameters(), trainable=mask), "trainable"),
        (lambda: FSAM(model.named_parameters(), trainable=mask, mask=FisherMask(0.5)), "mask"),
    ):
        with pytest.raises(ValueError, match="Invalid") as error:
            make()
        assert error.value.name == name


def test_parameter_with_gaps_between_its_elements_is_refused():
    weight = nn.Parameter(torch.ones(3, 4)[:, ::2])
    mask = FishMask({"weight": torch.arange(2)}, {"weight": weight.shape})
    with pytest.raises(ValueError, match=r"'weight'.*strides \(4, 2\).*dense"):
        AdamWL2SP([("weight", weight)], trainable=mask)


@pytest.mark.parametrize("steps", [0, 1])
def test_parameter_that_gets_gaps_between_its_elements_later_is_refused(steps):
    model = nn.Linear(4, 3)
    optimizer = AdamWL2SP(model.named_parameters(), trainable=FishMask.random(model, 0.5))
    train(model, optimizer, steps)
    model.weight.data = torch.ones(3, 8)[:, ::2]
    model(torch.ones(4)).sum().backward()
    with pytest.raises(ValueError, match=r"'weight'.*strides \(8, 2\).*dense"):
        optimizer.step()


def test_two_parameters_in_the_same_memory_are_refused():
    """Each would write over what the other one has written."""
    model = nn.ModuleDict({"one": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    model["other"].weight.data = model["one"].weight.data
    optimizer = AdamWL2SP(model.named_parameters(), trainable=FishMask.random(model, 0.5))
    train_step = closure_of(model, optimizer, 0)
    with pytest.raises(RuntimeError, match=r"'one\.weight' and 'other\.weight' share memory"):
        optimizer.step(train_step)


def test_sparse_gradient_is_refused():
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = AdamWL2SP(model.named_parameters(), trainable=FishMask.random(model, 0.5))
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradient of parameter 'weight'"):
        optimizer.step()
