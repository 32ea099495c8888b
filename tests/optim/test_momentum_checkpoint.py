"""MomentumSAM saved, loaded, resumed and copied: to the bit, at any moment of a step at which that is possible."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, AdamWL2SP, ArgumentError, MomentumSAM, Schedule
from tests.fp64_optimizers import ReferenceMomentumSAM
from tests.optim.momentum import (
    PRECISIONS,
    Objective,
    assert_equals_reference,
    backward,
    clean_weights,
    every_precision,
    follow,
    pair,
    perturbed_weights,
    same,
    train,
)
from tests.problem import Problem, assert_weights_close, small_model
from tests.training import round_trip, several_groups, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def one_group(model: nn.Module) -> list:
    return list(model.named_parameters())


def assert_same_state_dicts(state: dict, other: dict) -> None:
    assert state["state"].keys() == other["state"].keys()
    for key, entry in state["state"].items():
        assert entry.keys() == other["state"][key].keys()
        assert all(torch.equal(value, other["state"][key][name]) for name, value in entry.items())
    assert state["param_groups"] == other["param_groups"]


@every_precision
def test_optimizer_state_dict_is_the_same_while_perturbed(dtype, kwargs):
    model, optimizer = pair(dtype, l2_sp=0.1, **kwargs)
    train(model, optimizer, 3, problem=Problem(sparse=True))
    before = copy.deepcopy(optimizer.state_dict())
    for change in (lambda: Objective(model)(3), optimizer.eval, optimizer.train):
        change()
        assert_same_state_dicts(before, optimizer.state_dict())


# -- resuming ----------------------------------------------------------------------------------------------------------

RESUMED = {
    "groups": (torch.float32, {}, several_groups),
    "clipped": (torch.float32, {"max_grad_norm": 5.0}, one_group),
    "l2_sp_flat": (torch.float32, {"l2_sp": 0.1, "flatten": True}, one_group),
    "cosine": (torch.float32, {"schedule": Schedule(rho_follows="cosine", total_steps=20)}, one_group),
    "lion": (torch.float32, {"rule": "lion", "weight_decay": 0.1}, one_group),
    "sgd": (torch.float32, {"rule": "sgd", "momentum": 0.9, "ema_decay": 0.9}, one_group),
    "bf16": (torch.bfloat16, {"seed": 3, "max_grad_norm": 5.0}, several_groups),
    "bf16_master": (torch.bfloat16, {"master_weights": True, "amsgrad": True}, several_groups),
    "fp16": (torch.float16, {}, one_group),
}


def do_nothing(model, optimizer) -> None:
    pass


def forward(model, optimizer) -> None:
    Objective(model, Problem(sparse=True))(9)


def switch_to_eval(model, optimizer) -> None:
    optimizer.eval()


@pytest.mark.parametrize("before_saving", [do_nothing, forward, switch_to_eval])
@pytest.mark.parametrize(("dtype", "kwargs", "grouping"), RESUMED.values(), ids=RESUMED.keys())
def test_resumed_training_equals_uninterrupted_training_to_the_bit(dtype, kwargs, grouping, before_saving):
    def fresh(seed):
        model = small_model(dtype, seed)
        return model, MomentumSAM(grouping(model), **{"lr": 0.01, "rho": 0.5, **kwargs})

    problem, (model, optimizer) = Problem(sparse=True), fresh(0)
    train(model, optimizer, 9, problem=problem)
    before_saving(model, optimizer)
    saved = round_trip({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    optimizer.train()
    optimizer.restore()
    perturbed = perturbed_weights(model, optimizer)
    train(model, optimizer, 9, problem=problem, start=9)

    other, resumed = fresh(1)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert same(other.parameters(), saved["model"].values())
    assert same(perturbed_weights(other, resumed), perturbed)
    train(other, resumed, 9, problem=problem, start=9)
    assert same(other.parameters(), model.parameters())
    assert_same_state_dicts(resumed.state_dict(), optimizer.state_dict())


def test_perturbation_does_not_depend_on_what_resuming_forgets():
    """Clipping hides from the host which updates were counted."""

    def fresh():
        weights = [nn.Parameter(torch.zeros(1024, dtype=torch.float64)) for _ in range(2)]
        return weights, MomentumSAM(weights, max_grad_norm=100.0)

    def take_a_step(weights, optimizer, present):
        optimizer.perturb()
        seen = [weight.detach().clone() for weight in weights]
        for weight, now in zip(weights, present, strict=True):
            generator = torch.Generator().manual_seed(sum(present))
            weight.grad = torch.randn(1024, generator=generator, dtype=torch.float64) if now else None
        optimizer.step()
        return seen

    (weights, optimizer), (others, resumed) = fresh(), fresh()
    for present in ((True, False), (False, True)):
        take_a_step(weights, optimizer, present)
    for weight, other in zip(weights, others, strict=True):
        other.data.copy_(weight)
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(5):
        seen = take_a_step(weights, optimizer, (True, True))
        assert same(seen, take_a_step(others, resumed, (True, True)))


@pytest.mark.parametrize("while_perturbed", [False, True])
def test_training_that_has_begun_goes_back_to_its_checkpoint(while_perturbed):
    problem, (model, optimizer) = Problem(sparse=True), pair()
    train(model, optimizer, 4, problem=problem)
    saved = round_trip({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    runs = []
    for _ in range(2):
        train(model, optimizer, 4, problem=problem, start=4)
        runs.append(weights_of(model))
        if while_perturbed:
            Objective(model)(0)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        assert not optimizer.perturbed
        assert same(model.parameters(), saved["model"].values())
    assert same(*runs)


def test_state_dict_loaded_into_the_optimizer_it_is_of_changes_nothing():
    """accelerate's prepare does that."""
    (model, optimizer), (twin, straight) = pair(), pair()
    for step in range(6):
        optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer, 1, start=step)
    train(twin, straight, 6)
    assert same(model.parameters(), twin.parameters())


# -- weights of somebody else ------------------------------------------------------------------------------------------


def donated(dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in small_model(dtype, seed=5).state_dict().items()}


@every_precision
def test_weights_loaded_while_perturbed_become_the_clean_ones(dtype, kwargs):
    model, optimizer = pair(dtype, **kwargs)
    train(model, optimizer, 3)
    Objective(model)(3)
    # Fills whatever is kept for a second look.
    clean_weights(model)
    donor = donated(dtype)
    model.load_state_dict(donor)
    assert same(model.state_dict().values(), donor.values())
    optimizer.restore()
    assert same(model.parameters(), donor.values())


@every_precision
def test_step_after_weights_were_loaded_while_perturbed_starts_from_them(dtype, kwargs):
    """It equals AdamWL2SP's from the loaded weights, with the same moments and gradients."""
    model, optimizer = pair(dtype, **kwargs)
    train(model, optimizer, 3)
    twin = small_model(dtype)
    plain = AdamWL2SP(twin.named_parameters(), lr=0.01, **kwargs)
    plain.load_state_dict(optimizer.state_dict())
    backward(model, optimizer, 3)
    for m in (model, twin):
        m.load_state_dict(donated(dtype))
    for p, own in zip(twin.parameters(), model.parameters(), strict=True):
        p.grad = own.grad.clone()
    for o in (optimizer, plain):
        o.step()
    assert same(model.parameters(), twin.parameters())


def test_one_parameter_overwritten_while_perturbed_leaves_the_others_as_they_are():
    model, optimizer = pair()
    train(model, optimizer, 3)
    expected = {name: value.clone() for name, value in model.state_dict().items()} | {"norm.weight": torch.ones(16)}
    Objective(model)(3)
    with torch.no_grad():
        model["norm"].weight.fill_(1.0)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    optimizer.restore()
    assert all(torch.equal(value, expected[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("trained", [False, True])
def test_checkpoint_of_torch_adamw_continues_under_momentum_sam(trained):
    """From the first step on it is perturbed, along the moment of the checkpoint."""
    donor, model = small_model(torch.float64), small_model(torch.float64, seed=1)
    adamw, optimizer = torch.optim.AdamW(donor.parameters(), lr=0.01), MomentumSAM(model.parameters(), rho=0.5)
    train(donor, adamw, 5)
    if trained:
        train(model, optimizer, 3)
    reference = ReferenceMomentumSAM(donor.parameters(), lr=0.01, rho=0.5)
    for entry, parameter in zip(reference.entries, donor.parameters(), strict=True):
        state = adamw.state[parameter]
        entry.step, entry.exp_avg, entry.exp_avg_sq = 5, state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    model.load_state_dict(donor.state_dict())
    optimizer.load_state_dict(adamw.state_dict())
    norm = follow(reference, Problem(), 5, start=5)
    train(model, optimizer, 5, start=5)
    assert_equals_reference(model, optimizer, reference, norm, 10, 0.01)


def test_torch_adamw_continues_from_its_checkpoint():
    model, optimizer = pair()
    train(model, optimizer, 3)
    models = [small_model(seed=1) for _ in range(2)]
    for fresh, factory in zip(models, (torch.optim.AdamW, AdamWL2SP), strict=True):
        fresh.load_state_dict(model.state_dict())
        continued = factory(fresh.parameters())
        # torch.optim.AdamW takes the tensors themselves.
        continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(fresh, continued, 3, start=3)
    assert_weights_close(models[0].parameters(), models[1].parameters(), 6, 0.01)


def test_state_dict_that_does_not_fit_is_refused_and_changes_nothing():
    (model, optimizer), (twin, straight) = pair(), pair()
    for m, o in ((model, optimizer), (twin, straight)):
        train(m, o, 3)
    saved = copy.deepcopy(straight.state_dict())
    saved["state"][0]["exp_avg"] = torch.zeros(3)
    Objective(model)(3)
    with pytest.raises(ArgumentError) as error:
        optimizer.load_state_dict(saved)
    assert "exp_avg" in error.value.name
    assert optimizer.perturbed
    for m, o in ((model, optimizer), (twin, straight)):
        train(m, o, 3, start=3)
    assert same(model.parameters(), twin.parameters())


def test_checkpoint_of_a_schedule_that_leaves_out_steps_is_refused():
    model, twin = small_model(), small_model()
    other = FSAM(twin.parameters(), schedule=Schedule(every=3))
    with pytest.raises(ArgumentError) as error:
        MomentumSAM(model.parameters()).load_state_dict(other.state_dict())
    assert error.value.name == "schedule.every"


@pytest.mark.parametrize("while_perturbed", [False, True])
def test_group_added_after_some_steps_is_perturbed_and_updated(while_perturbed):
    model, problem = small_model(torch.float64), Problem()
    parameters = list(model.parameters())
    added = {"params": parameters[4:], "lr": 0.002, "rho": 1.0}
    optimizer = MomentumSAM(parameters[:4], lr=0.01, rho=0.5)
    reference = ReferenceMomentumSAM([{"params": parameters[:4], "lr": 0.01, "rho": 0.5}])
    norms = [follow(reference, problem, 3)]

    def take_a_step(parameters, step):
        optimizer.zero_grad()
        optimizer.perturb()
        problem.loss(parameters, step).backward()
        optimizer.step()

    for step in range(3):
        take_a_step(parameters[:4], step)
    if while_perturbed:
        optimizer.perturb()
    optimizer.add_param_group(dict(added))
    reference.entries += ReferenceMomentumSAM([added]).entries
    for step in range(3, 6):
        norms.append(follow(reference, problem, 1, start=step))
        take_a_step(parameters, step)
    assert_equals_reference(model, optimizer, reference, min(norms), 6, 0.01)


# -- copies ------------------------------------------------------------------------------------------------------------


def pickled(pair):
    return pickle.loads(pickle.dumps(pair))


every_duplicate = pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])


@pytest.mark.parametrize("order", [1, -1], ids=["model_first", "optimizer_first"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@every_duplicate
@pytest.mark.parametrize(
    ("dtype", "kwargs"), [PRECISIONS[name] for name in ("fp32", "bf16", "bf16_master")], ids=["fp32", "bf16", "master"]
)
def test_copy_of_model_and_optimizer_continues_identically_and_apart(duplicate, dtype, kwargs, mode, order):
    model, optimizer = pair(dtype, **kwargs)
    train(model, optimizer, 3)
    getattr(optimizer, mode)()
    twin, twin_optimizer = duplicate((model, optimizer)[::order])[::order]
    assert same(twin.parameters(), model.parameters())
    if mode == "eval":
        with pytest.raises(RuntimeError, match="eval mode"):
            twin_optimizer.step()
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        o.train()
        train(m, o, 3, start=3)
    assert same(twin.parameters(), model.parameters())
    clean = clean_weights(model)
    Objective(twin)(6)
    assert twin_optimizer.perturbed
    assert not optimizer.perturbed
    assert same(clean, model.parameters())
    assert same(clean, clean_weights(twin))


@every_duplicate
@pytest.mark.parametrize("what", ["model", "optimizer"])
def test_copying_while_perturbed_is_refused_with_what_to_do(duplicate, what):
    model, optimizer = pair()
    train(model, optimizer, 1)
    Objective(model)(1)
    assert optimizer.perturbed
    with pytest.raises(RuntimeError, match=r"perturbed.*restore\(\)"):
        duplicate(model if what == "model" else optimizer)
    optimizer.restore()
    duplicate((model, optimizer))
