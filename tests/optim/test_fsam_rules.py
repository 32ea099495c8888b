"""FSAM over SGD and Lion, against SAM over them written by hand in fp64."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, ArgumentError, FisherMask, MomentumSAM, Schedule
from tests.fp64_optimizers import double, global_norm, inner, top_k_mask
from tests.optim.variants import NON_FINITE, WIDE, assert_same_states, every_precision, spoil
from tests.problem import Problem, small_model
from tests.training import assert_same_bits, assert_unchanged, closure_of, round_trip, train, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

LR, RHO = 0.01, 0.5


@dataclass
class Sgd:
    """torch.optim.SGD's arithmetic for one tensor; decay is a part of the gradient, to the anchor with `l2_sp`."""

    anchor: Tensor
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    l2_sp: float = 0.0
    buffer: Tensor | None = None

    def __call__(self, w: Tensor, g: Tensor) -> Tensor:
        g = g + (self.l2_sp * (w - self.anchor) if self.l2_sp else self.weight_decay * w)
        if self.momentum:
            first = self.buffer is None
            self.buffer = g if first else self.momentum * self.buffer + (1 - self.dampening) * g
            g = g + self.momentum * self.buffer if self.nesterov else self.buffer
        return w - LR * g


@dataclass
class Lion:
    """Algorithm 2 of arXiv 2302.06675."""

    anchor: Tensor
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    l2_sp: float = 0.0
    exp_avg: Tensor | float = 0.0

    def __call__(self, w: Tensor, g: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        direction = beta1 * self.exp_avg + (1 - beta1) * g
        self.exp_avg = beta2 * self.exp_avg + (1 - beta2) * g
        w = w - LR * (self.l2_sp * (w - self.anchor) if self.l2_sp else self.weight_decay * w)
        return w - LR * direction.sign()


CASES: dict[str, tuple[Callable, dict]] = {
    "sgd": (Sgd, {}),
    "sgd, decay": (Sgd, {"weight_decay": 0.1}),
    "momentum": (Sgd, {"momentum": 0.9}),
    "nesterov, decay": (Sgd, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "dampened, anchored": (Sgd, {"momentum": 0.8, "dampening": 0.5, "l2_sp": 0.1}),
    "lion": (Lion, {}),
    "lion, decay": (Lion, {"betas": (0.8, 0.9), "weight_decay": 0.3}),
    "lion, anchored": (Lion, {"l2_sp": 0.5}),
}
every_case = pytest.mark.parametrize(("reference", "kwargs"), CASES.values(), ids=CASES.keys())


def rule_of(reference: Callable) -> str:
    return reference.__name__.lower()


def sam(model: nn.Module, rules: list, steps: int, *, alpha: float = 0.0, keep: float | None = None) -> list[Tensor]:
    """The weights after SAM, GSAM or Fisher-SAM (a mask at every step) over these rules."""
    weights = [double(p) for p in model.parameters()]
    for step in range(steps):
        first = Problem().gradients(weights, step)
        moved = [torch.ones_like(g) for g in first]
        if keep is not None:
            chosen = [i for i, g in enumerate(first) if g.dim() > 1]
            squares = torch.cat([first[i].square().flatten() for i in chosen])
            mask = top_k_mask(squares, int(keep * squares.numel()))
            for i, part in zip(chosen, mask.split([first[i].numel() for i in chosen]), strict=True):
                moved[i] = part.view_as(first[i]).double()
        norm = global_norm(first) + 1e-12
        second = Problem().gradients(
            [w + RHO * m * g / norm for w, m, g in zip(weights, moved, first, strict=True)], step
        )
        if alpha:
            c = inner(first, second) / inner(second, second)
            second = [b - alpha * (a - c * b) for a, b in zip(first, second, strict=True)]
        weights = [rule(w, g) for rule, w, g in zip(rules, weights, second, strict=True)]
    return weights


def assert_close(model: nn.Module, expected: list[Tensor], steps: int) -> None:
    """To rounding, of two programs.

    With u = eps / 2 and |g| <= 1.5 (GSAM's is no larger than 2), of which four roundings: a momentum of 0.9 has at most
    20, three roundings of it a step, forgotten at a rate of 0.1: 700 u. Nesterov's sum and the decay are two more. The
    weight is rounded twice a step. A gradient that depends on the weight feeds an error back, 20 times its curvature.
    Lion moves a weight by lr alone; a sign that rounding turns would show as 2 lr.
    """
    for p, exact in zip(model.parameters(), expected, strict=True):
        u = torch.finfo(p.dtype).eps / 2
        largest = 1 + float(p.detach().abs().max())
        bound = 2 * steps * (LR * 750 * u + 2 * largest * u) * math.exp(20 * 0.25 * LR * steps)
        assert float((p.detach().double() - exact).abs().max()) <= bound


VARIANTS = {
    "sam": ({}, {}),
    "gsam": ({"alpha": 0.4}, {"alpha": 0.4}),
    "fisher": ({"mask": FisherMask(0.3)}, {"keep": 0.3}),
}


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(("ours", "theirs"), VARIANTS.values(), ids=VARIANTS.keys())
@every_case
def test_twenty_steps_equal_sam_written_by_hand(reference, kwargs, ours, theirs, dtype):
    model = small_model(dtype)
    rules = [reference(double(p), **kwargs) for p in model.parameters()]
    expected = sam(model, rules, 20, **theirs)
    train(model, FSAM(model.named_parameters(), lr=LR, rho=RHO, rule=rule_of(reference), **kwargs, **ours), 20)
    assert_close(model, expected, 20)


@pytest.mark.parametrize("kwargs", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}])
def test_without_a_perturbation_it_is_torchs_sgd(kwargs):
    model, twin = small_model(torch.float64), small_model(torch.float64)
    optimizer = FSAM(model.parameters(), lr=LR, rho=0.0, rule="sgd", **kwargs)
    plain = torch.optim.SGD(twin.parameters(), lr=LR, **kwargs)
    train(model, optimizer, 10)
    train(twin, plain, 10)
    assert_close(model, weights_of(twin), 10)


@every_case
def test_maximizing_equals_minimizing_the_negative(reference, kwargs):
    model, twin = small_model(), small_model()
    shared = {"lr": LR, "rho": RHO, "rule": rule_of(reference), **kwargs}
    maximizing = FSAM(model.parameters(), maximize=True, **shared)
    minimizing = FSAM(twin.parameters(), **shared)
    for step in range(5):
        maximizing.step(closure_of(model, maximizing, step))
        closure = closure_of(twin, minimizing, step)

        def negative(closure=closure):
            closure()
            for parameter in twin.parameters():
                parameter.grad.neg_()

        minimizing.step(negative)
    assert_same_bits(model, twin)


@every_case
def test_resumed_training_equals_uninterrupted_training_to_the_bit(reference, kwargs):
    def fresh(seed: int):
        model = small_model(seed=seed)
        return model, FSAM(model.parameters(), lr=LR, rho=RHO, rule=rule_of(reference), **kwargs)

    model, optimizer = fresh(0)
    train(model, optimizer, 5)
    saved = round_trip({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, 5, start=5)
    other, resumed = fresh(1)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, 5, start=5)
    assert_same_bits(other, model)


def test_state_of_torchs_sgd_goes_on_under_fsam_and_the_other_way_round():
    kwargs = {"lr": LR, "momentum": 0.9}
    model, twin, back = small_model(torch.float64), small_model(torch.float64), small_model(torch.float64)
    plain, fused = torch.optim.SGD(model.parameters(), **kwargs), FSAM(twin.parameters(), rule="sgd", rho=0.0, **kwargs)
    train(model, plain, 3)
    twin.load_state_dict(model.state_dict())
    fused.load_state_dict(plain.state_dict())
    train(twin, fused, 3, start=3)
    back.load_state_dict(twin.state_dict())
    again = torch.optim.SGD(back.parameters(), **kwargs)
    again.load_state_dict(fused.state_dict())
    train(back, again, 3, start=6)
    train(model, plain, 6, start=3)
    assert_close(back, weights_of(model), 9)


@every_precision
@pytest.mark.parametrize("rule", ["sgd", "lion"])
def test_restore_is_bit_exact_and_training_stays_finite(rule, dtype, kwargs):
    model = small_model(dtype)
    more = {"momentum": 0.9} if rule == "sgd" else {}
    optimizer = FSAM(model.parameters(), lr=LR, rho=1.0, rule=rule, **more, **kwargs)
    train(model, optimizer, 2)
    before = weights_of(model)
    Problem().loss(model.parameters(), 2).backward()
    optimizer.perturb()
    assert not torch.equal(model["dense"].weight, before[0])
    optimizer.restore()
    assert_unchanged(model, before)
    train(model, optimizer, 3, start=2)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("value", NON_FINITE)
@every_case
def test_non_finite_update_gradient_keeps_that_weight_and_its_state(reference, kwargs, value):
    model = small_model()
    optimizer = FSAM(model.parameters(), lr=LR, rho=RHO, rule=rule_of(reference), **kwargs)
    train(model, optimizer, 2)
    weight = model["dense"].weight
    before = {name: state[3, 5].clone() for name, state in optimizer.state[weight].items() if name != "step"}
    kept = weight.detach()[3, 5].clone()
    closure_of(model, optimizer, 2)()
    optimizer.perturb()
    closure_of(model, optimizer, 2)()
    spoil(model, value)
    optimizer.step()
    assert weight[3, 5] == kept
    assert all(optimizer.state[weight][name][3, 5] == state for name, state in before.items())
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("rule", "more"), [("sgd", {"momentum": 0.9}), ("lion", {})])
def test_steps_that_are_not_sharp_are_those_of_rho_zero_to_the_bit(rule, more):
    model, twin = small_model(), small_model()
    shared = {"lr": LR, "rule": rule, **more}
    optimizer = FSAM(model.parameters(), rho=RHO, schedule=Schedule(last=0.1, total_steps=100), **shared)
    plain = FSAM(twin.parameters(), rho=0.0, **shared)
    train(model, optimizer, 5)
    train(twin, plain, 5)
    assert_same_bits(model, twin)
    assert_same_states(model, optimizer, twin, plain)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("rule", {"rule": "adam"}),
        ("momentum", {"rule": "sgd", "momentum": -0.1}),
        ("nesterov", {"rule": "sgd", "nesterov": True}),
        ("nesterov", {"rule": "sgd", "momentum": 0.9, "dampening": 0.1, "nesterov": True}),
        ("beta parameter at index 1", {"rule": "lion", "betas": (0.9, 1.0)}),
        ("betas", {"rule": "lion", "betas": 0.9}),
    ],
)
def test_bad_argument_of_a_rule_is_refused(name, kwargs):
    with pytest.raises(ArgumentError) as error:
        FSAM(small_model().parameters(), **kwargs)
    assert error.value.name == name


def test_momentum_sam_needs_a_momentum():
    with pytest.raises(ArgumentError) as error:
        MomentumSAM(small_model().parameters(), rule="sgd")
    assert error.value.name == "momentum"
