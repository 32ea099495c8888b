"""MomentumSAM against the fp64 reference: clean and perturbed weights, precisions, schedules, rules."""

import math

import pytest
import torch
from torch import nn

from fsam_triton import AdamWL2SP, MomentumSAM, Schedule
from fsam_triton.optim.optimizer import FusedOptimizer
from tests.fp64_optimizers import ReferenceMomentumSAM, global_norm
from tests.optim.momentum import (
    Objective,
    assert_equals_reference,
    backward,
    clean_weights,
    eps_bound,
    every_precision,
    follow,
    pair,
    perturbed_weights,
    same,
    train,
)
from tests.problem import Problem, assert_weights_close, rounding_bound, small_model
from tests.training import several_groups, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = [torch.float32, torch.float64]


def one_group(model: nn.Module) -> list:
    return list(model.named_parameters())


def one_with_maximize_and_amsgrad(model: nn.Module) -> list[dict]:
    first, second, third = several_groups(model)
    return [{**first, "maximize": True}, {**second, "amsgrad": True}, third]


CASES = {
    "plain": (one_group, {}),
    "l2_sp": (one_group, {"l2_sp": 0.1}),
    # With a larger eps, as clipping makes gradients small.
    "clipped": (one_group, {"max_grad_norm": 5.0, "eps": 1e-2}),
    "groups": (several_groups, {"l2_sp": 0.1}),
    "groups_clipped": (several_groups, {"max_grad_norm": 5.0, "eps": 1e-2}),
    "maximize_amsgrad": (one_with_maximize_and_amsgrad, {}),
    "flat": (several_groups, {"flatten": True}),
}


def assert_fifty_steps_equal_the_reference(grouping, kwargs: dict, problem: Problem, dtype: torch.dtype) -> None:
    model = small_model(dtype)
    mathematical = {name: value for name, value in kwargs.items() if name != "flatten"}
    reference = ReferenceMomentumSAM(grouping(model), lr=0.01, rho=0.5, **mathematical)
    optimizer = MomentumSAM(grouping(model), lr=0.01, rho=0.5, **kwargs)
    norm = follow(reference, problem, 50)
    train(model, optimizer, 50, problem=problem)
    assert_equals_reference(model, optimizer, reference, norm, 50, 0.01)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(("grouping", "kwargs"), CASES.values(), ids=CASES.keys())
def test_fifty_steps_with_missing_gradients_equal_the_reference(grouping, kwargs, dtype):
    assert_fifty_steps_equal_the_reference(grouping, kwargs, Problem(sparse=True), dtype)


@pytest.mark.parametrize("dtype", WIDE)
def test_fifty_steps_equal_the_reference(dtype):
    assert_fifty_steps_equal_the_reference(several_groups, {}, Problem(), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fifty_steps_with_master_weights_equal_the_reference(dtype):
    """Without curvature gradients are exact in 16 bits: masters have fp32's errors, and parameters are their rounding.

    A perturbed weight is the parameter plus eps, rounded to one of its two neighbours.
    """
    problem, model, twin = Problem(curvature=0.0, sparse=True), small_model(dtype), small_model()
    optimizer = MomentumSAM(several_groups(model), rho=0.5, master_weights=True)
    reference = ReferenceMomentumSAM(several_groups(twin), rho=0.5)
    norm = follow(reference, problem, 50)
    train(model, optimizer, 50, problem=problem)
    masters = [optimizer.master_weight(parameter) for parameter in model.parameters()]
    assert_weights_close(masters, reference.weights, 50, 0.01, curvature=0.0)
    assert same(model.parameters(), [master.to(dtype) for master in masters])
    shown = perturbed_weights(model, optimizer)
    for weight, master, exact in zip(shown, masters, reference.perturbed, strict=True):
        wide = 2 * rounding_bound(50, 0.01, master, 0.0) + 2 * eps_bound(reference, norm, torch.float32)
        half_ulp = torch.finfo(dtype).eps / 2 * master.abs()
        ulp = torch.finfo(dtype).eps * (exact.abs() + wide + half_ulp)
        assert ((weight.double() - exact).abs() <= wide + half_ulp + ulp).all()


def test_parameters_without_gradients_for_a_while_are_perturbed_along_their_old_moments():
    model, problem = small_model(torch.float64), Problem()
    groups = [{"params": list(model[name].parameters())} for name in ("dense", "norm", "head")]
    reference = ReferenceMomentumSAM(groups, lr=0.01, rho=0.5)
    optimizer, norm = MomentumSAM(groups, lr=0.01, rho=0.5), math.inf
    for step in range(20):

        def gradients(weights, step=step):
            out = problem.gradients(weights, step)
            return [None if index in (2, 3) and step % 5 > 1 else g for index, g in enumerate(out)]

        optimizer.perturb()
        for parameter, gradient in zip(model.parameters(), gradients(model.parameters()), strict=True):
            parameter.grad = gradient
        optimizer.step()
        reference.step(gradients)
        norm = min(norm, global_norm(entry.exp_avg for entry in reference.entries))
        assert_equals_reference(model, optimizer, reference, norm, step + 1, 0.01)


SCHEDULES = {
    "last_half": Schedule(last=0.5, total_steps=20),
    "warmup": Schedule(rho_warmup=7),
    "cosine": Schedule(rho_follows="cosine", rho_min=0.1, rho_warmup=3, total_steps=20),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_schedule_decides_on_the_radius_of_each_step(schedule):
    model = small_model(torch.float64)

    def rho_of(step):
        return schedule.rho(step, 0.5, 0.01, 0.01) if schedule.is_sharp(step) else 0.0

    reference = ReferenceMomentumSAM(model.parameters(), lr=0.01, rho=0.0)
    optimizer = MomentumSAM(model.parameters(), lr=0.01, rho=0.5, schedule=schedule)
    for steps in (1, 9, 1, 5):
        start = optimizer.param_groups[0]["updates"]
        norm = follow(reference, Problem(), steps, start=start, rho_of=rho_of)
        train(model, optimizer, steps, start=start)
        for entry in reference.entries:
            entry.group["rho"] = rho_of(start + steps)
        assert_equals_reference(model, optimizer, reference, norm, start + steps, 0.01)


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01, dtype=torch.float64)], ids=["float", "tensor"])
def test_rho_follows_the_learning_rate_of_its_own_step(lr):
    model = small_model(torch.float64)
    optimizer = MomentumSAM(model.parameters(), lr=lr, rho=0.5, schedule=Schedule(rho_follows="lr", rho_min=0.1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    reference = ReferenceMomentumSAM(model.parameters(), lr=0.01, rho=0.5)

    def rho_of(step):
        return 0.1 + 0.4 / (1 + step)

    for step in range(10):
        for entry in reference.entries:
            entry.group["lr"] = 0.01 / (1 + step)
        norm = follow(reference, Problem(), 1, start=step, rho_of=rho_of)
        train(model, optimizer, 1, start=step)
        scheduler.step()
        for entry in reference.entries:
            entry.group["rho"] = rho_of(step + 1)
        assert_equals_reference(model, optimizer, reference, norm, step + 1, 0.01)


@every_precision
def test_rho_zero_is_adamw_l2_sp_to_the_bit(dtype, kwargs):
    problem, twin = Problem(sparse=True), small_model(dtype)
    shared = {"lr": 0.01, "l2_sp": 0.1, **kwargs}
    model, optimizer = pair(dtype, **shared, rho=0.0)
    plain = AdamWL2SP(twin.named_parameters(), **shared)
    train(model, optimizer, 10, problem=problem)
    train(twin, plain, 10, problem=problem)
    assert same(model.parameters(), twin.parameters())
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert optimizer.state[parameter].keys() == plain.state[other].keys()
        for name, value in plain.state[other].items():
            assert torch.equal(optimizer.state[parameter][name], value), name


RULES = {
    "sgd": {"rule": "sgd", "momentum": 0.9},
    "nesterov": {"rule": "sgd", "momentum": 0.9, "nesterov": True},
    "lion": {"rule": "lion"},
    "adamw": {"rule": "adamw"},
}


@pytest.mark.parametrize("arguments", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("dtype", WIDE)
def test_any_rule_takes_its_gradient_against_its_own_momentum(arguments, dtype):
    """The rule without a perturbation, given the gradients taken where a perturbation by hand leads."""
    (model, optimizer), twin = pair(dtype, **arguments), small_model(dtype)
    rule = {name: value for name, value in arguments.items() if name != "rule"}
    plain = FusedOptimizer(twin.named_parameters(), arguments["rule"], lr=0.01, **rule)
    name = "momentum_buffer" if arguments["rule"] == "sgd" else "exp_avg"
    # Of one sum of 568 squares and three more roundings; each weight of at most 4 is rounded once.
    u = torch.finfo(dtype).eps / 2
    for step in range(20):
        moments = [
            plain.state[p][name].double() if p in plain.state else torch.zeros_like(p) for p in twin.parameters()
        ]
        norm = global_norm(moments) + 1e-12
        shown = perturbed_weights(model, optimizer)
        for weight, p, m in zip(shown, twin.parameters(), moments, strict=True):
            exact = p.detach().double() - 0.5 * m / norm
            assert ((weight.double() - exact).abs() <= 0.5 * (568 / 2 + 3) * u + 4 * u).all()
        gradients = Problem().gradients(shown, step)
        for p, gradient in zip(twin.parameters(), gradients, strict=True):
            p.grad = gradient
        plain.step()
        train(model, optimizer, 1, start=step)
        assert same(model.parameters(), twin.parameters())


@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 0.5}], ids=["plain", "clipped"])
def test_perturbation_after_the_first_step_is_rho_long(kwargs):
    model, optimizer = pair(rho=0.25, **kwargs)
    train(model, optimizer, 1)
    moved = zip(clean_weights(model), perturbed_weights(model, optimizer), strict=True)
    u = torch.finfo(torch.float32).eps / 2
    # One sum of 568 squares gives the norm; six roundings of eps; each weight of at most 2 is rounded once.
    bound = 0.25 * (568 / 2 + 6) * u + 2 * u * 568**0.5
    assert abs(global_norm(c.double() - p.double() for c, p in moved) - 0.25) <= bound


@every_precision
def test_perturbation_is_against_the_moment(dtype, kwargs):
    model, optimizer = pair(dtype, rho=4.0, **kwargs)
    train(model, optimizer, 3)
    shown = perturbed_weights(model, optimizer)
    for clean, weight, parameter in zip(clean_weights(model), shown, model.parameters(), strict=True):
        moved = weight.double() - clean.double()
        assert (moved * optimizer.state[parameter]["exp_avg"].double()).sum() < 0


@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_realises_a_perturbation_below_half_an_ulp(dtype, master_weights):
    n, size = 2**16, torch.finfo(dtype).eps / 16
    weight = nn.Parameter(torch.full((n,), 1.5, dtype=dtype))
    sign = torch.randint(0, 2, (n,)) * 2 - 1
    optimizer = MomentumSAM([weight], lr=0.0, rho=size * n**0.5, master_weights=master_weights)
    weight.grad = sign.to(dtype)
    optimizer.step()
    optimizer.perturb()
    moved = ((1.5 - weight.detach().double()) * sign).mean().item()
    # n coin flips of probability p = size / ulp = 1 / 16 and height ulp; five standard deviations.
    assert abs(moved - size) < 5 * torch.finfo(dtype).eps * (15 / 256 / n) ** 0.5


@pytest.mark.slow
def test_perturbation_is_rho_long_where_moment_and_gradient_cancel():
    """m + 0.1 (g - m) with g = -9 m: what is left of the moment is rounding noise, of any length."""
    u = torch.finfo(torch.float32).eps / 2
    for seed in range(50):
        weight = nn.Parameter(torch.zeros(3))
        optimizer = MomentumSAM([weight], lr=0.0, rho=0.05)
        weight.grad = torch.rand(3, generator=torch.Generator().manual_seed(seed)) + 0.5
        optimizer.step()
        weight.grad = -9 * optimizer.state[weight]["exp_avg"]
        optimizer.step()
        norm = float(optimizer.state[weight]["exp_avg"].double().norm())
        optimizer.perturb()
        # Three roundings of the scale and of each product.
        assert abs(float(weight.detach().double().norm()) - 0.05 * norm / (norm + 1e-12)) <= 0.05 * 6 * u


def test_gradients_of_micro_batches_add_up():
    (model, optimizer), (twin, whole) = pair(), pair()
    # Without curvature the gradients, and these fractions of them, are exact.
    problem = Problem(curvature=0.0, sparse=True)
    train(twin, whole, 6, problem=problem)
    for step in range(6):
        for fraction in (0.25, 0.5, 0.25):
            (fraction * Objective(model, problem)(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same(model.parameters(), twin.parameters())


def test_clean_weights_over_a_hundred_steps_equal_two_explicit_passes_to_the_bit():
    """AdamWL2SP with copies: keep the clean weights, perturb by hand, take the gradient, copy them back, step."""
    model, optimizer = pair()
    twin, problem = small_model(), Problem(sparse=True)
    plain = AdamWL2SP(twin.named_parameters(), lr=0.01)
    for step in range(100):
        clean = weights_of(twin)
        assert same(clean, model.parameters())
        with torch.no_grad():
            for parameter, weight in zip(twin.parameters(), perturbed_weights(model, optimizer), strict=True):
                parameter.copy_(weight)
        backward(twin, plain, step, problem)
        with torch.no_grad():
            for parameter, weight in zip(twin.parameters(), clean, strict=True):
                parameter.copy_(weight)
        plain.step()
        train(model, optimizer, 1, problem=problem, start=step)
