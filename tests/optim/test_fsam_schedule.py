"""FSAM under a Schedule: the numbers, the counting of steps, what is saved of it and what a copy goes on with."""

import copy

import pytest
import torch
from torch import nn

from fsam_triton import FSAM, AdamWL2SP, ArgumentError, Schedule
from tests.fp64_optimizers import ReferenceFSAM, global_norm
from tests.problem import Problem, assert_weights_close, small_model
from tests.training import (
    assert_same_bits,
    closure_of,
    gradients_apart,
    round_trip,
    several_groups,
    train,
    train_apart,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = [torch.float32, torch.float64]
RHO, TOTAL = 0.5, 40


def warmed_up(step: int, entry) -> float:
    return float(entry.group["rho"]) * min(step / 10, 1.0)


def on_a_cosine(step: int, entry) -> float:
    rho, turn = float(entry.group["rho"]), torch.tensor(min(step / TOTAL, 1.0) * torch.pi, dtype=torch.float64)
    return 0.1 + (rho - 0.1) * (float(turn.cos()) + 1) / 2


CASES = {
    "every_third": (Schedule(every=3), {"is_sharp": lambda step: step % 3 == 0}),
    "last_half": (Schedule(last=0.5, total_steps=TOTAL), {"is_sharp": lambda step: step >= TOTAL // 2}),
    "every_second_of_the_last_quarter": (
        Schedule(every=2, last=0.25, total_steps=TOTAL),
        {"is_sharp": lambda step: step >= 30 and step % 2 == 0},
    ),
    "warmup": (Schedule(rho_warmup=10), {"rho_of": warmed_up}),
    "cosine": (Schedule(rho_follows="cosine", rho_min=0.1, total_steps=TOTAL), {"rho_of": on_a_cosine}),
}


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("grouping", [lambda m: list(m.parameters()), several_groups], ids=["one", "several"])
@pytest.mark.parametrize(("schedule", "theirs"), CASES.values(), ids=CASES.keys())
def test_fifty_steps_equal_the_reference(schedule, theirs, grouping, dtype):
    model, problem = small_model(dtype), Problem(sparse=True)
    params = grouping(model)
    reference = ReferenceFSAM(params, lr=0.01, rho=RHO, **theirs)
    optimizer = FSAM(params, lr=0.01, rho=RHO, schedule=schedule)
    for step in range(50):
        reference.step(gradients_apart(problem, step))
    train_apart(model, optimizer, 50, problem=problem)
    assert_weights_close(model.parameters(), reference.weights, 50, 0.01)


def tensor_of(lr: float) -> torch.Tensor:
    return torch.tensor(lr, dtype=torch.float64)


@pytest.mark.parametrize("kind", [float, tensor_of], ids=["float", "tensor"])
@pytest.mark.parametrize("dtype", WIDE)
def test_rho_that_follows_a_lambda_lr_equals_the_reference(dtype, kind):
    """From rho_min where the learning rate is 0 to rho where it is what the optimizer was made with."""
    model, problem, factors = small_model(dtype), Problem(), [min(t / 5, 1.0) * (1 - t / 40) for t in range(31)]
    groups = [{**group, "lr": kind(group["lr"])} for group in several_groups(model)]
    schedule = Schedule(rho_follows="lr", rho_min=0.01)
    optimizer = FSAM(groups, rho=RHO, schedule=schedule)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors.__getitem__)
    reference = ReferenceFSAM(
        several_groups(model), rho=RHO, rho_of=lambda step, e: 0.01 + (float(e.group["rho"]) - 0.01) * factors[step]
    )
    for step in range(30):
        lrs = [float(group["lr"]) for group in optimizer.param_groups for _ in group["params"]]
        for entry, lr in zip(reference.entries, lrs, strict=True):
            entry.group = {**entry.group, "lr": lr}
        reference.step(lambda weights, step=step: problem.gradients(weights, step))
        optimizer.step(closure_of(model, optimizer, step, problem))
        scheduler.step()
    assert_weights_close(model.parameters(), reference.weights, 30, 0.01)


@pytest.mark.parametrize("way", ["closure", "by hand"])
def test_steps_that_are_not_sharp_are_adamw_l2sp_to_the_bit_with_one_pass_each(way):
    model, twin, calls = small_model(), small_model(), []
    optimizer = FSAM(model.parameters(), lr=0.01, rho=RHO, schedule=Schedule(last=0.25, total_steps=8))
    for step in range(6):
        assert not optimizer.is_sharp
        closure = closure_of(model, optimizer, step)
        if way == "closure":
            optimizer.step(lambda closure=closure, step=step: calls.append(step) or closure())
        else:
            calls.append(step)
            closure()
            optimizer.step()
    assert optimizer.is_sharp
    assert calls == list(range(6))
    train(twin, AdamWL2SP(twin.parameters(), lr=0.01), 6)
    assert_same_bits(model, twin)


def test_perturb_climbs_at_a_step_that_is_not_sharp_with_the_rho_of_that_step():
    model = small_model(torch.float64)
    optimizer = FSAM(model.parameters(), rho=RHO, schedule=Schedule(every=2, rho_warmup=4))
    train(model, optimizer, 1)
    assert not optimizer.is_sharp
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    closure_of(model, optimizer, 1)()
    optimizer.perturb()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    # One step of a warm-up of four; a norm of 568 terms that are themselves rounded to an ulp of a weight.
    torch.testing.assert_close(float((after - before).norm()), RHO / 4, rtol=0, atol=600 * 2.0**-52)


def test_skipped_steps_count_as_learning_rate_schedulers_count_them():
    model = small_model()
    optimizer = FSAM(model.parameters(), rho=RHO, schedule=Schedule(every=2), max_grad_norm=1.0)
    closure_of(model, optimizer, 0)()
    optimizer.perturb()
    closure_of(model, optimizer, 0)()
    model["dense"].weight.grad[0, 0] = float("inf")
    optimizer.step()
    assert optimizer.param_groups[0]["updates"] == 1
    assert not optimizer.is_sharp


def test_failed_step_is_not_counted():
    model = small_model()
    optimizer = FSAM(model.parameters(), schedule=Schedule(every=2))
    closures = iter([closure_of(model, optimizer, 0)])
    with pytest.raises(StopIteration):
        optimizer.step(lambda: next(closures)())
    assert optimizer.param_groups[0]["updates"] == 0
    assert optimizer.is_sharp


def test_group_added_later_joins_at_the_present_step():
    model = small_model(torch.float64)
    parameters = list(model.parameters())
    schedule = Schedule(every=2, rho_warmup=6)
    optimizer = FSAM(parameters[:4], lr=0.01, rho=RHO, schedule=schedule)
    shared = {"rho": RHO, "is_sharp": lambda step: step % 2 == 0}
    reference = ReferenceFSAM(parameters[:4], lr=0.01, **shared, rho_of=lambda step, e: RHO * min(step / 6, 1.0))

    def closure(params, step):
        optimizer.zero_grad()
        loss = Problem().loss(params, step)
        loss.backward()
        return loss

    for step in range(8):
        if step == 3:
            optimizer.add_param_group({"params": parameters[4:], "lr": 0.002})
            reference.entries += ReferenceFSAM([{"params": parameters[4:], "lr": 0.002}]).entries
        params = parameters[: 4 if step < 3 else 6]
        optimizer.step(lambda params=params, step=step: closure(params, step))
        reference.step(lambda weights, step=step: Problem().gradients(weights, step))
    assert_weights_close(parameters, reference.weights, 8, 0.01)
    assert [group["updates"] for group in optimizer.param_groups] == [8, 8]


# -- a learning rate that rises ----------------------------------------------------------------------------------------


def radius_of_perturbation(model: nn.Module, optimizer: FSAM) -> float:
    before = weights_of(model)
    closure_of(model, optimizer, 0)()
    optimizer.perturb()
    moved = global_norm(p.detach() - w for p, w in zip(model.parameters(), before, strict=True))
    optimizer.restore()
    return moved


def one_cycle(optimizer: FSAM):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20, cycle_momentum=False)


def warm_up(optimizer: FSAM):
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=15)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], milestones=[5])


@pytest.mark.parametrize("kind", [float, tensor_of], ids=["float", "tensor"])
@pytest.mark.parametrize(("scheduler_of", "lr"), [(one_cycle, 0.03), (warm_up, 0.1)], ids=["one_cycle", "warm_up"])
def test_rho_is_full_where_the_scheduled_learning_rate_has_its_peak_and_never_higher(scheduler_of, lr, kind):
    model = small_model(torch.float64)
    optimizer = FSAM(model.parameters(), lr=kind(lr), rho=RHO, schedule=Schedule(rho_follows="lr"))
    scheduler, radii = scheduler_of(optimizer), []
    for step in range(19):
        radii.append(radius_of_perturbation(model, optimizer))
        # A norm of 568 terms, rounded to an ulp of a weight each.
        expected = RHO * float(optimizer.param_groups[0]["lr"]) / 0.1
        assert abs(radii[-1] - expected) < 600 * 2.0**-52
        train(model, optimizer, 1, start=step)
        scheduler.step()
    assert max(radii) == pytest.approx(RHO)


@pytest.mark.parametrize("kind", [float, tensor_of], ids=["float", "tensor"])
def test_learning_rate_that_somebody_raises_takes_rho_to_its_highest_and_no_further(kind):
    model = small_model(torch.float64)
    optimizer = FSAM(model.parameters(), lr=kind(0.01), rho=RHO, schedule=Schedule(rho_follows="lr"))
    for lr in (0.005, 0.01, 0.1, 1.0):
        optimizer.param_groups[0]["lr"] = kind(lr)
        expected = RHO * min(lr / 0.01, 1.0)
        assert abs(radius_of_perturbation(model, optimizer) - expected) < 600 * 2.0**-52


# -- what is saved -----------------------------------------------------------------------------------------------------


def test_schedule_and_number_of_steps_are_in_the_parameter_groups_as_plain_values():
    model = small_model()
    schedule = Schedule(every=2, last=0.5, total_steps=10, rho_warmup=1)
    optimizer = FSAM(model.parameters(), schedule=schedule)
    train(model, optimizer, 3)
    group = round_trip(optimizer.state_dict())["param_groups"][0]
    assert group["schedule"] == schedule.as_dict()
    assert group["updates"] == 3


def test_loading_keeps_the_saved_schedule_and_goes_on_at_the_saved_step():
    model, other = small_model(), small_model()
    schedule = Schedule(every=3, rho_follows="cosine", total_steps=20)
    optimizer = FSAM(model.parameters(), rho=RHO, schedule=schedule)
    train(model, optimizer, 4)
    loaded = FSAM(other.parameters(), schedule=Schedule(every=2))
    loaded.load_state_dict(round_trip(optimizer.state_dict()))
    assert loaded.schedule == schedule
    assert loaded.param_groups[0]["updates"] == 4
    assert not loaded.is_sharp


def test_loading_a_schedule_that_contradicts_an_argument_is_refused_and_changes_nothing():
    """The same that the constructor refuses."""
    saved = FSAM(small_model().parameters(), schedule=Schedule(every=2, reuse=0.5)).state_dict()
    for kwargs, name in (({"alpha": 0.4}, "alpha"), ({"beta": 0.5, "beta_per": "tensor"}, "beta_per")):
        optimizer = FSAM(small_model().parameters(), **kwargs)
        with pytest.raises(ArgumentError) as error:
            optimizer.load_state_dict(copy.deepcopy(saved))
        assert error.value.name == name
        assert optimizer.schedule == Schedule()


def test_state_of_torch_adamw_leaves_the_schedule_as_it_is():
    model, twin = small_model(), small_model()
    adamw = torch.optim.AdamW(twin.parameters(), lr=0.01)
    train(twin, adamw, 3)
    optimizer = FSAM(model.parameters(), schedule=Schedule(every=2, rho_follows="lr", rho_min=0.01))
    optimizer.load_state_dict(adamw.state_dict())
    assert optimizer.schedule == Schedule(every=2, rho_follows="lr", rho_min=0.01)
    assert optimizer.param_groups[0]["updates"] == 0
    # rho's full height is the learning rate with which it was made.
    assert optimizer.param_groups[0]["lr_max"] == 1e-3
    train(model, optimizer, 3)


def fresh(seed: int, schedule: Schedule, **kwargs) -> tuple[nn.Module, FSAM, torch.optim.lr_scheduler.LambdaLR]:
    model = small_model(seed=seed)
    optimizer = FSAM(model.named_parameters(), lr=0.01, rho=RHO, schedule=schedule, **kwargs)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min((t + 1) / 4, 1.0) / (1 + t))


def train_with_scheduler(model, optimizer, scheduler, start: int, stop: int) -> None:
    for step in range(start, stop):
        train(model, optimizer, 1, start=step)
        scheduler.step()


SCHEDULES = {
    "every_third": Schedule(every=3),
    "warmup": Schedule(rho_warmup=8),
    "lr": Schedule(rho_follows="lr", rho_min=0.01, every=2),
    "cosine": Schedule(rho_follows="cosine", total_steps=12, rho_warmup=2, last=0.75),
    "looksam": Schedule(every=4, reuse=0.5),
}


@pytest.mark.parametrize("kwargs", [{}, {"beta": 0.5}], ids=["sam", "esam"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_resumed_training_equals_uninterrupted_training_to_the_bit(schedule, kwargs):
    trained = fresh(0, schedule, **kwargs)
    train_with_scheduler(*trained, 0, 6)
    saved = round_trip([part.state_dict() for part in trained])
    train_with_scheduler(*trained, 6, 12)
    resumed = fresh(1, schedule, **kwargs)
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    train_with_scheduler(*resumed, 6, 12)
    assert_same_bits(resumed[0], trained[0])


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_copy_of_model_and_optimizer_continues_identically(schedule):
    model, optimizer, _ = fresh(0, schedule)
    train(model, optimizer, 6)
    twin, copied = copy.deepcopy((model, optimizer))
    train(twin, copied, 6, start=6)
    train(model, optimizer, 6, start=6)
    assert_same_bits(twin, model)
