"""FSAM against the fp64 reference: the numbers of every variant, what steers them, and the arguments."""

import pytest
import torch
from torch import nn

from fsam_triton import FSAM, ArgumentError, Schedule
from tests.fp64_optimizers import ReferenceFSAM, assert_masks_are_well_separated
from tests.optim.variants import (
    FISHER_ASAM,
    MASKED,
    VARIANTS,
    WIDE,
    Variant,
    assert_same_states,
    every_variant,
    loss_of,
    pair,
)
from tests.problem import Problem, assert_weights_close, small_model
from tests.training import assert_same_bits, closure_of, several_groups, train, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def mixed_adaptive_groups(model: nn.Module) -> list[dict]:
    first, second, third = several_groups(model)
    return [first, {**second, "adaptive": True}, {**third, "adaptive": True}]


GROUPINGS = {
    "one_group": lambda model: list(model.named_parameters()),
    "several_groups": several_groups,
    "mixed_adaptive_groups": mixed_adaptive_groups,
}


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("grouping", GROUPINGS.values(), ids=GROUPINGS.keys())
@every_variant
def test_fifty_steps_equal_the_reference(variant, grouping, dtype):
    model, problem = small_model(dtype), Problem(sparse=True)
    params = grouping(model)
    reference = variant.reference(params, lr=0.01, l2_sp=0.1)
    optimizer = variant.optimizer(params, lr=0.01, l2_sp=0.1)
    for step in range(50):
        reference.step(lambda weights, step=step: problem.gradients(weights, step))
    train(model, optimizer, 50, problem=problem)
    assert_masks_are_well_separated(reference, dtype)
    assert_weights_close(model.parameters(), reference.weights, 50, 0.01)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("grouping", GROUPINGS.values(), ids=GROUPINGS.keys())
@every_variant
def test_perturbation_equals_the_reference(variant, grouping, dtype):
    model, problem = small_model(dtype), Problem(sparse=True)
    params = grouping(model)
    reference, optimizer = variant.reference(params), variant.optimizer(params)
    ascent = reference.ascent(problem.gradients(reference.weights, 2))
    problem.loss(model.parameters(), 2).backward()
    optimizer.perturb()
    for parameter, weight, eps in zip(model.parameters(), reference.weights, ascent, strict=True):
        # eps: a norm of 568 terms and six more roundings; the sum: one rounding of at most 1 + |eps|.
        bound = torch.finfo(dtype).eps * (600 * float(eps.abs().max()) + 2)
        torch.testing.assert_close(parameter.double(), weight + eps, rtol=0, atol=bound)


@every_variant
def test_maximizing_equals_minimizing_the_negative(variant):
    """The worst neighbour of a maximum is downhill."""
    model, twin = small_model(), small_model()
    maximizing = variant.optimizer(model.named_parameters(), lr=0.01, maximize=True)
    minimizing = variant.optimizer(twin.named_parameters(), lr=0.01)
    for step in range(5):
        maximizing.step(closure_of(model, maximizing, step))
        closure = closure_of(twin, minimizing, step)

        def negative(closure=closure):
            closure()
            for parameter in twin.parameters():
                # A tensor that the mask leaves out has no gradient in the first pass.
                if parameter.grad is not None:
                    parameter.grad.neg_()

        minimizing.step(negative)
    assert_same_bits(model, twin)


def test_parameter_may_have_a_gradient_in_only_one_of_the_two_passes():
    model, problem = small_model(torch.float64), Problem(sparse=True)
    reference, optimizer = ReferenceFSAM(model.parameters(), lr=0.01), FSAM(model.parameters(), lr=0.01)
    for step in range(10):
        # The parameters without gradient are others at the next step of the problem.
        passes = iter((step, step + 1))
        reference.step(lambda weights, passes=passes: problem.gradients(weights, next(passes)))
        problem.loss(model.parameters(), step).backward()
        optimizer.perturb()
        problem.loss(model.parameters(), step + 1).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_weights_close(model.parameters(), reference.weights, 10, 0.01)


def test_parameter_without_a_gradient_is_neither_perturbed_nor_updated():
    model, problem = small_model(), Problem(sparse=True)
    optimizer = FSAM(model.parameters(), rho=1.0, weight_decay=0.5)
    before = weights_of(model)
    problem.loss(model.parameters(), 1).backward()
    optimizer.perturb()
    absent = [index for index in range(6) if not problem.present(1, index)]
    assert absent
    assert all(torch.equal(list(model.parameters())[index], before[index]) for index in absent)
    problem.loss(model.parameters(), 1).backward()
    optimizer.step()
    assert all(torch.equal(list(model.parameters())[index], before[index]) for index in absent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", [Variant("sam", {"rho": 0.0}), Variant("asam", {"rho": 0.0, "adaptive": True})])
def test_rho_zero_is_adamw_l2sp_to_the_bit(variant, dtype):
    model, optimizer, twin, plain = pair(dtype, variant)
    train(model, optimizer, 10, problem=Problem(sparse=True))
    train(twin, plain, 10, problem=Problem(sparse=True))
    assert_same_bits(model, twin)
    assert_same_states(model, optimizer, twin, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_without_perturb_is_adamw_l2sp_to_the_bit(dtype):
    model, optimizer, twin, plain = pair(dtype, VARIANTS[0])
    for step in range(10):
        closure_of(model, optimizer, step)()
        optimizer.step()
    train(twin, plain, 10)
    assert_same_bits(model, twin)
    assert_same_states(model, optimizer, twin, plain)


def test_one_cycle_scheduler_steers_the_update():
    model, reference_model = small_model(torch.float64), small_model(torch.float64)
    optimizer = FSAM(model.parameters(), lr=0.001)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=21)
    reference = ReferenceFSAM(reference_model.parameters())
    for step in range(20):
        for entry in reference.entries:
            entry.group.update({name: optimizer.param_groups[0][name] for name in ("lr", "betas")})
        reference.step(lambda weights, step=step: Problem().gradients(weights, step))
        train(model, optimizer, 1, start=step)
        scheduler.step()
    assert_weights_close(model.parameters(), reference.weights, 20, 0.01)


def test_rho_changed_between_steps_takes_effect():
    model = small_model(torch.float64)
    optimizer, reference = FSAM(model.parameters(), lr=0.01), ReferenceFSAM(model.parameters(), lr=0.01)
    for step, rho in enumerate((0.0, 0.5, 2.0)):
        optimizer.param_groups[0]["rho"] = rho
        for entry in reference.entries:
            entry.group["rho"] = rho
        reference.step(lambda weights, step=step: Problem().gradients(weights, step))
        train(model, optimizer, 1, start=step)
    assert_weights_close(model.parameters(), reference.weights, 3, 0.01)


def test_group_added_after_some_steps_is_perturbed_and_updated():
    model = small_model(torch.float64)
    parameters = list(model.parameters())
    problem, added = Problem(), {"params": parameters[4:], "lr": 0.002, "rho": 1.0}
    optimizer = FSAM(parameters[:4], lr=0.01)
    reference = ReferenceFSAM([{"params": parameters[:4], "lr": 0.01}])
    for step in range(3):
        reference.step(lambda weights, step=step: problem.gradients(weights, step))
        optimizer.step(lambda step=step: loss_of(problem, optimizer, parameters[:4], step))
    optimizer.add_param_group(dict(added))
    reference.entries += ReferenceFSAM([added]).entries
    for step in range(3, 6):
        reference.step(lambda weights, step=step: problem.gradients(weights, step))
        optimizer.step(lambda step=step: loss_of(problem, optimizer, parameters, step))
    assert_weights_close(parameters, reference.weights, 6, 0.01)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_perturbation_and_update_keep_shape_and_strides(layout):
    tensor = torch.randn(4, 3, 2, 2, dtype=torch.float64).to(memory_format=layout)
    others = [torch.randn((), dtype=torch.float64), torch.zeros(0, 3, dtype=torch.float64)]
    parameters = [nn.Parameter(t) for t in (tensor.clone(memory_format=layout), *others)]
    reference = ReferenceFSAM(parameters, lr=0.01, adaptive=True)
    optimizer = FSAM(parameters, lr=0.01, adaptive=True)
    for step in range(3):
        reference.step(lambda weights, step=step: Problem().gradients(weights, step))
        optimizer.step(lambda step=step: loss_of(Problem(), optimizer, parameters, step))
    assert parameters[0].stride() == tensor.stride()
    assert_weights_close(parameters, reference.weights, 3, 0.01)


@pytest.mark.parametrize("variant", [VARIANTS[0], MASKED, FISHER_ASAM], ids=lambda variant: variant.name)
def test_flattened_parameters_equal_the_reference(variant):
    model, problem = small_model(torch.float64), Problem(sparse=True)
    named = list(model.named_parameters())
    reference = variant.reference(named, lr=0.01)
    optimizer = variant.optimizer(named, lr=0.01, flatten=True)
    for step in range(5):
        reference.step(lambda weights, step=step: problem.gradients(weights, step))
    train(model, optimizer, 5, problem=problem)
    assert_weights_close(model.parameters(), reference.weights, 5, 0.01)


def test_clipping_applies_to_the_update_gradient_alone():
    model = small_model(torch.float64)
    kwargs = {"lr": 0.01, "eps": 1e-2, "max_grad_norm": 2.0}
    reference, optimizer = ReferenceFSAM(model.parameters(), **kwargs), FSAM(model.parameters(), **kwargs)
    for step in range(10):
        reference.step(lambda weights, step=step: Problem().gradients(weights, step))
    train(model, optimizer, 10)
    assert_weights_close(model.parameters(), reference.weights, 10, 0.01)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *((name, -1.0) for name in ("rho", "lr", "l2_sp", "alpha", "beta", "gamma", "eps", "weight_decay")),
        *((name, float("nan")) for name in ("rho", "lr", "l2_sp", "alpha", "beta", "gamma", "max_grad_norm")),
        *((name, value) for name in ("beta", "gamma") for value in (0.0, 0, 1.0001)),
        ("mask_norm", "none"),
        ("mask", 0.5),
        ("beta_per", "row"),
        ("schedule", {"every": 2}),
    ],
)
def test_bad_argument_is_refused_by_name_and_value(argument, value):
    with pytest.raises(ArgumentError) as error:
        FSAM([nn.Parameter(torch.zeros(4, 4))], **{argument: value})
    assert error.value.name == ("learning rate" if argument == "lr" else argument)
    assert repr(error.value.value) == repr(value)


@pytest.mark.parametrize(
    ("argument", "kwargs"),
    [
        ("alpha", {"alpha": 0.4, "schedule": Schedule(every=2, reuse=0.5)}),
        ("beta_per", {"beta_per": "tensor", "beta": 0.5, "alpha": 0.4}),
        ("beta_per", {"beta_per": "tensor", "beta": 0.5, "schedule": Schedule(every=2, reuse=0.5)}),
        ("rho_min", {"rho": 0.05, "schedule": Schedule(rho_follows="lr", rho_min=0.1)}),
    ],
)
def test_arguments_that_contradict_one_another_are_refused(argument, kwargs):
    with pytest.raises(ArgumentError) as error:
        FSAM(small_model().parameters(), **kwargs)
    assert error.value.name == argument


def test_bad_rho_of_a_group_is_refused():
    with pytest.raises(ArgumentError) as error:
        FSAM([{"params": [nn.Parameter(torch.zeros(4, 4))], "rho": -1.0}])
    assert (error.value.name, error.value.value) == ("rho", -1.0)


def test_argument_of_another_rule_is_refused():
    with pytest.raises(TypeError, match="momentum"):
        FSAM(small_model().parameters(), momentum=0.9)
