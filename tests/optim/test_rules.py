"""SGD and Lion as FusedOptimizer's rules: torch.optim.SGD's numbers and state dicts, an independent Lion in fp64."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import ArgumentError
from fsam_triton.optim.optimizer import FusedOptimizer
from tests.fp64_optimizers import double
from tests.optim.by_hand import square_model, take_step
from tests.problem import Problem, small_model
from tests.training import assert_same_bits, round_trip, train

pytestmark = pytest.mark.usefixtures("one_thread")

LR = 0.01
WIDE = [torch.float32, torch.float64]
SGD = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.8, "dampening": 0.5},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "maximize": {"momentum": 0.9, "maximize": True, "weight_decay": 0.1},
}
LION = {
    "plain": {},
    "decay": {"weight_decay": 0.3},
    "betas": {"betas": (0.8, 0.95), "weight_decay": 0.1},
    "maximize": {"maximize": True, "weight_decay": 0.3},
}
every_sgd = pytest.mark.parametrize("options", SGD.values(), ids=SGD.keys())
every_lion = pytest.mark.parametrize("options", LION.values(), ids=LION.keys())


def sgd(model: nn.Module, **options) -> FusedOptimizer:
    return FusedOptimizer(model.parameters(), "sgd", LR, **options)


def assert_close(actual, expected, steps: int) -> None:
    """To rounding, of two programs.

    With u = eps / 2 and |g| <= 1.5, of which four roundings: a momentum of 0.9 has at most 20, three roundings of it a
    step, forgotten at a rate of 0.1: 700 u. Nesterov's sum and the decay are two more. The weight is rounded twice a
    step. A gradient that depends on the weight feeds an error back, 20 times its curvature.
    """
    for p, exact in zip(actual, expected, strict=True):
        u = torch.finfo(p.dtype).eps / 2
        largest = 1 + float(p.detach().abs().max())
        bound = 2 * steps * (LR * 750 * u + 2 * largest * u) * math.exp(20 * 0.25 * LR * steps)
        assert float((p.detach().double() - exact.detach().double()).abs().max()) <= bound


# -- SGD ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("flatten", [False, True])
@every_sgd
def test_fifty_steps_equal_torch_sgd(options, flatten, dtype):
    model, twin = small_model(dtype), small_model(dtype)
    # Without curvature: an error fed back for fifty steps could grow tenfold.
    problem = Problem(curvature=0.0, sparse=True)
    train(model, sgd(model, flatten=flatten, **options), 50, problem=problem)
    train(twin, torch.optim.SGD(twin.parameters(), LR, **options), 50, problem=problem)
    assert_close(model.parameters(), twin.parameters(), 50)


def test_every_group_has_its_own_options():
    def groups(model: nn.Module) -> list[dict]:
        params = list(model.parameters())
        each = [{}, {"momentum": 0.9}, {"momentum": 0.8, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True}]
        pairs = zip(params, [*each, *each[:2]], strict=True)
        return [{"params": [p], "lr": LR / (1 + i), **options} for i, (p, options) in enumerate(pairs)]

    models = [square_model(), square_model()]
    train(models[0], FusedOptimizer(groups(models[0]), "sgd", LR), 20)
    train(models[1], torch.optim.SGD(groups(models[1]), LR), 20)
    assert_close(*(model.parameters() for model in models), 20)


@pytest.mark.parametrize("switched", [(0.0, 0.9), (0.9, 0.0), (0.9, 0.5)])
def test_momentum_of_a_group_may_change_in_training(switched):
    models = [square_model(), square_model()]
    for model, make in zip(models, (sgd, lambda model, **o: torch.optim.SGD(model.parameters(), LR, **o)), strict=True):
        optimizer = make(model, momentum=switched[0])
        train(model, optimizer, 5)
        optimizer.param_groups[0]["momentum"] = switched[1]
        train(model, optimizer, 5, start=5)
    assert_close(*(model.parameters() for model in models), 10)


def ours(model: nn.Module, **options) -> FusedOptimizer:
    return sgd(model, **options)


def theirs(model: nn.Module, **options) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), LR, **options)


@every_sgd
@pytest.mark.parametrize(("before", "then"), [(ours, theirs), (theirs, ours), (ours, ours)], ids=["to", "from", "own"])
def test_state_dict_continues_under_the_other_optimizer(options, before, then):
    model, twin, fresh = square_model(), square_model(), square_model()
    train(twin, theirs(twin, **options), 6)
    first = before(model, **options)
    train(model, first, 3)
    second = then(fresh, **{**options, "weight_decay": 0.7})
    fresh.load_state_dict(model.state_dict())
    second.load_state_dict(round_trip(first.state_dict()))
    train(fresh, second, 3, start=3)
    assert_close(fresh.parameters(), twin.parameters(), 6)


def test_state_dict_of_torchs_sgd_without_momentum_may_have_buffers_of_none():
    """As older versions have written it."""
    model = square_model()
    optimizer = sgd(model)
    state = torch.optim.SGD(model.parameters(), LR).state_dict()
    state["state"] = {i: {"momentum_buffer": None} for i in range(len(list(model.parameters())))}
    optimizer.load_state_dict(state)
    take_step(model, optimizer, 0)
    twin = square_model()
    take_step(twin, sgd(twin), 0)
    assert_same_bits(model, twin)


def test_state_dict_of_torchs_adamw_is_refused_where_a_momentum_is_wanted():
    model = square_model()
    other = torch.optim.AdamW(model.parameters())
    take_step(model, other, 0)
    with pytest.raises(ArgumentError) as error:
        sgd(model, momentum=0.9).load_state_dict(other.state_dict())
    assert "momentum_buffer" in error.value.allowed


# -- Lion --------------------------------------------------------------------------------------------------------------


class ReferenceLion:
    """Algorithm 2 of arXiv 2302.06675, in fp64.

    Attributes:
        closest: the smallest magnitude whose sign counted: below rounding noise a comparison would say nothing.
    """

    def __init__(self, model: nn.Module, betas=(0.9, 0.99), weight_decay=0.0, l2_sp=0.0, maximize=False) -> None:
        self.weights = [double(p) for p in model.parameters()]
        self.anchors = [weight.clone() for weight in self.weights]
        self.moments = [torch.zeros_like(weight) for weight in self.weights]
        self.betas, self.decay, self.l2_sp = betas, weight_decay, l2_sp
        self.sign = -1.0 if maximize else 1.0
        self.closest = math.inf

    def step(self, gradients: list[Tensor | None]) -> None:
        beta1, beta2 = self.betas
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            g = self.sign * double(gradient)
            update = beta1 * self.moments[i] + (1 - beta1) * g
            self.closest = min(self.closest, float(update.abs().min()))
            pull = self.l2_sp * (self.weights[i] - self.anchors[i]) if self.l2_sp else self.decay * self.weights[i]
            self.weights[i] = self.weights[i] - LR * pull - LR * update.sign()
            self.moments[i] = beta2 * self.moments[i] + (1 - beta2) * g


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("options", [*LION.values(), {"l2_sp": 0.5}], ids=[*LION.keys(), "l2_sp"])
def test_fifty_steps_equal_an_independent_lion(options, flatten, dtype):
    # Of this seed no sign is a matter of rounding.
    model, problem = small_model(dtype), Problem(curvature=0.0, sparse=True, seed=2)
    reference = ReferenceLion(model, **options)
    for step in range(50):
        reference.step(problem.gradients(reference.weights, step))
    train(model, FusedOptimizer(model.parameters(), "lion", LR, flatten=flatten, **options), 50, problem=problem)
    # In units of u = eps / 2: a moment is at most 1.5, and so is the rounding of its sum at a step; of the change, at
    # most 3 (1 - beta2), there are two, and of the direction three in the end.
    new2 = 1 - options.get("betas", (0.9, 0.99))[1]
    assert reference.closest > (50 * (1.5 + 6 * new2) + 4.5) * torch.finfo(dtype).eps / 2
    assert_close(model.parameters(), reference.weights, 50)


def test_gradient_of_zeros_moves_nothing_but_decays():
    model = small_model(torch.float64)
    optimizer = FusedOptimizer(model.parameters(), "lion", LR, weight_decay=0.5)
    expected = [p.detach() * (1 - LR * 0.5) for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, weight in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), weight, rtol=4 * torch.finfo(p.dtype).eps, atol=0)


@every_lion
def test_state_of_other_implementations_which_count_no_steps_is_taken(options):
    model, twin = square_model(), square_model()
    optimizer, expected = (FusedOptimizer(each.parameters(), "lion", LR, **options) for each in (model, twin))
    train(model, optimizer, 3)
    train(twin, expected, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        del entry["step"]
    optimizer.load_state_dict(state)
    train(model, optimizer, 3, start=3)
    train(twin, expected, 3, start=3)
    assert_same_bits(model, twin)


# -- both --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "options"), [("sgd", {"momentum": 0.9}), ("lion", {})], ids=["sgd", "lion"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_master_weights_follow_an_fp32_run_with_the_same_gradients(rule, options, dtype):
    problem, model, twin = Problem(curvature=0.0), small_model(dtype), small_model()
    optimizer = FusedOptimizer(model.parameters(), rule, LR, master_weights=True, **options)
    train(model, optimizer, 20, problem=problem)
    train(twin, FusedOptimizer(twin.parameters(), rule, LR, **options), 20, problem=problem)
    assert_close([optimizer.master_weight(p) for p in model.parameters()], twin.parameters(), 20)


@pytest.mark.parametrize(
    ("name", "rule", "options"),
    [
        ("rule", "rmsprop", {}),
        ("momentum", "sgd", {"momentum": -0.1}),
        ("dampening", "sgd", {"dampening": math.nan}),
        ("nesterov", "sgd", {"nesterov": True}),
        ("nesterov", "sgd", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
        ("beta parameter at index 0", "lion", {"betas": (1.0, 0.99)}),
    ],
    ids=str,
)
def test_bad_argument_of_a_rule_is_refused_by_name(name, rule, options):
    with pytest.raises(ArgumentError) as error:
        FusedOptimizer([nn.Parameter(torch.ones(3))], rule, LR, **options)
    assert error.value.name == name


@pytest.mark.parametrize(("rule", "argument"), [("sgd", "betas"), ("lion", "momentum"), ("lion", "eps")])
def test_argument_of_another_rule_is_refused_by_name(rule, argument):
    with pytest.raises(TypeError, match=argument):
        FusedOptimizer([nn.Parameter(torch.ones(3))], rule, LR, **{argument: 0.5})
