"""FSAM's state: resuming, copies, interchange with torch.optim.AdamW."""

import copy
import pickle

import pytest
import torch

from fsam_triton import FSAM, AdamWL2SP, FisherMask, Schedule
from tests.fp64_optimizers import ReferenceFSAM
from tests.optim.variants import MASKED, VARIANTS, Variant, every_precision
from tests.problem import Problem, assert_weights_close, small_model
from tests.training import assert_same_bits, closure_of, round_trip, train

pytestmark = pytest.mark.usefixtures("one_thread")


RESUMED = {
    "sam": (torch.float32, VARIANTS[0], {}),
    "mask_interval_3": (torch.float32, Variant("", {}, lambda: FisherMask(0.2, interval=3)), {}),
    "two_samples": (torch.float32, Variant("", {}, lambda: FisherMask(0.2, interval=3, samples=2)), {}),
    "stochastic_rounding": (torch.bfloat16, Variant("", {}, lambda: FisherMask(0.2, interval=3)), {"seed": 5}),
    "master": (torch.bfloat16, Variant("", {}, lambda: FisherMask(0.2, interval=3)), {"master_weights": True}),
    "mask_of_tensors": (
        torch.float32,
        Variant("", {}, lambda: FisherMask(0.75, interval=3, unit="tensor", exclude=["norm"]), "masked"),
        {},
    ),
    "random_mask": (torch.float32, Variant("", {}, lambda: FisherMask(0.2, interval=3, scores="random")), {}),
    "gsam": (torch.float32, Variant("", {"alpha": 0.4}), {}),
    "gsam_in_16_bits": (torch.bfloat16, Variant("", {"alpha": 0.4}), {"seed": 5}),
    "esam_of_weights": (torch.float32, Variant("", {"beta": 0.5}), {}),
    "esam_of_weights_in_16_bits": (torch.bfloat16, Variant("", {"beta": 0.5}), {"master_weights": True}),
    "esam_of_tensors": (torch.float32, Variant("", {"beta": 0.5, "beta_per": "tensor"}), {}),
    "fisher_esam": (
        torch.float32,
        Variant("", {"beta": 0.5, "beta_per": "tensor"}, lambda: FisherMask(0.2, interval=3, samples=2)),
        {},
    ),
    "looksam": (torch.float32, Variant("", {"schedule": Schedule(every=4, reuse=0.5)}), {"max_grad_norm": 5.0}),
    "looksam_in_16_bits": (torch.bfloat16, Variant("", {"schedule": Schedule(every=4, reuse=0.5)}), {"seed": 5}),
    "flat_looksam": (torch.float32, Variant("", {"schedule": Schedule(every=4, reuse=0.5)}), {"flatten": True}),
}
every_resumed = pytest.mark.parametrize(("dtype", "variant", "kwargs"), RESUMED.values(), ids=RESUMED.keys())


@every_resumed
def test_resumed_training_equals_uninterrupted_training_to_the_bit(dtype, variant, kwargs):
    def fresh(seed):
        model = small_model(dtype, seed)
        return model, variant.optimizer(model.named_parameters(), lr=0.01, rho=0.5, l2_sp=0.1, **kwargs)

    problem, (model, optimizer) = Problem(sparse=True), fresh(0)
    # Eleven steps end in the middle of an interval of three, between the two samples of a Fisher estimate.
    train(model, optimizer, 11, problem=problem)
    saved = round_trip({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, 10, problem=problem, start=11)

    other, resumed = fresh(1)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, 10, problem=problem, start=11)
    assert_same_bits(other, model)


def pickled(pair):
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"mask": FisherMask(0.2, interval=3)},
        {"mask": FisherMask(0.75, interval=4, unit="tensor", exclude=["norm"]), "mask_norm": "masked"},
        {"alpha": 0.4},
        {"beta": 0.5, "mask": FisherMask(0.2, interval=3, samples=2)},
        {"beta": 0.5, "beta_per": "tensor"},
        {"schedule": Schedule(every=4, reuse=0.5)},
    ],
    ids=["masked", "masked_tensors", "gsam", "fisher_esam", "esam", "looksam"],
)
def test_copy_of_model_and_optimizer_continues_identically(kwargs, duplicate):
    model = small_model()
    optimizer = FSAM(model.named_parameters(), lr=0.01, rho=0.5, **kwargs)
    train(model, optimizer, 5)
    twin, twin_optimizer = duplicate((model, optimizer))
    train(twin, twin_optimizer, 5, start=5)
    assert not torch.equal(twin["dense"].weight, model["dense"].weight)
    train(model, optimizer, 5, start=5)
    assert_same_bits(twin, model)


def test_copying_a_perturbed_optimizer_is_refused():
    model = small_model()
    optimizer = FSAM(model.parameters())
    Problem().loss(model.parameters(), 0).backward()
    optimizer.perturb()
    with pytest.raises(RuntimeError, match="perturbed"):
        copy.deepcopy((model, optimizer))


def test_loading_forgets_the_fisher_samples_of_its_own_past():
    """The saved optimizer has begun no new mean; the one that loads is in the middle of one."""
    model, other, problem = small_model(), small_model(seed=1), Problem()
    mask = FisherMask(0.2, interval=3, samples=2)
    first, second = (FSAM(m.named_parameters(), lr=0.01, rho=0.5, mask=mask) for m in (model, other))
    train(model, first, 1, problem=problem)
    train(other, second, 3, problem=Problem(seed=9))
    other.load_state_dict(model.state_dict())
    second.load_state_dict(first.state_dict())
    train(model, first, 6, problem=problem, start=1)
    train(other, second, 6, problem=problem, start=1)
    assert_same_bits(other, model)


@every_precision
def test_model_and_state_that_are_loaded_while_perturbed_are_not_undone(dtype, kwargs):
    """A loop of one's own that failed in its second pass, and goes back to a checkpoint."""
    model, twin = small_model(dtype), small_model(dtype)
    optimizer, expected = (MASKED.optimizer(m.named_parameters(), lr=0.01, **kwargs) for m in (model, twin))
    train(model, optimizer, 2)
    train(twin, expected, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 2, start=2)
    closure_of(model, optimizer, 4)()
    optimizer.perturb()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert not optimizer.perturbed
    train(model, optimizer, 3, start=2)
    train(twin, expected, 3, start=2)
    assert_same_bits(model, twin)


@pytest.mark.parametrize(
    "kwargs",
    [{"alpha": 0.4}, {"beta": 0.5}, {"beta": 0.5, "beta_per": "tensor"}, {"mask": FisherMask(0.2, interval=3)}],
)
def test_torch_adamw_continues_from_the_checkpoint_of_any_variant_and_the_other_way_round(kwargs):
    model, twin, back = small_model(), small_model(seed=1), small_model(seed=2)
    optimizer = FSAM(model.named_parameters(), lr=0.01, **kwargs)
    train(model, optimizer, 3)
    adamw = torch.optim.AdamW(twin.parameters())
    twin.load_state_dict(model.state_dict())
    adamw.load_state_dict(optimizer.state_dict())
    train(twin, adamw, 3, start=3)
    again = FSAM(back.named_parameters(), lr=0.01, **kwargs)
    back.load_state_dict(twin.state_dict())
    again.load_state_dict(adamw.state_dict())
    train(back, again, 3, start=6)
    assert again.state[back["dense"].weight]["step"] == 9
    assert all(p.isfinite().all() for p in back.parameters())


def test_torch_adamw_continues_from_its_checkpoint():
    model, fresh, twin = small_model(), small_model(seed=1), small_model()
    optimizer = MASKED.optimizer(model.named_parameters(), lr=0.01)
    train(model, optimizer, 5)
    continued = torch.optim.AdamW(fresh.parameters())
    fresh.load_state_dict(model.state_dict())
    continued.load_state_dict(optimizer.state_dict())
    expected = AdamWL2SP(twin.parameters())
    twin.load_state_dict(model.state_dict())
    expected.load_state_dict(optimizer.state_dict())
    train(fresh, continued, 5, start=5)
    train(twin, expected, 5, start=5)
    assert_weights_close(fresh.parameters(), twin.parameters(), 10, 0.01)


def test_checkpoint_of_torch_adamw_continues_under_fsam():
    model, fresh = small_model(torch.float64), small_model(torch.float64, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 5)
    reference = ReferenceFSAM(model.parameters(), lr=0.01, rho=0.5)
    for entry, parameter in zip(reference.entries, model.parameters(), strict=True):
        state = optimizer.state[parameter]
        entry.step, entry.exp_avg, entry.exp_avg_sq = 5, state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    continued = FSAM(fresh.parameters(), rho=0.5)
    fresh.load_state_dict(model.state_dict())
    continued.load_state_dict(optimizer.state_dict())
    assert continued.param_groups[0]["rho"] == 0.5
    train(fresh, continued, 5, start=5)
    for step in range(5, 10):
        reference.step(lambda weights, step=step: Problem().gradients(weights, step))
    assert_weights_close(fresh.parameters(), reference.weights, 10, 0.01)
