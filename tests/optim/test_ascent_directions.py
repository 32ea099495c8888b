"""FriendlySAM and preconditioned SAM against an independent fp64 reference, and what they keep between steps."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, SAM, ArgumentError, FisherMask
from tests.fp64_optimizers import ReferenceFSAM
from tests.problem import Problem, assert_weights_close, combination_bound, small_model
from tests.training import assert_same_bits, closure_of, gradients_apart, round_trip, several_groups, train, train_apart

pytestmark = pytest.mark.usefixtures("one_thread")
WIDE = [torch.float32, torch.float64]


class Reference(ReferenceFSAM):
    """SAM's ascent along gradients less their averages, or over the roots of second moments."""

    def __init__(self, params, *, sigma=0.0, lmbda=0.9, preconditioned=False, **kwargs):
        super().__init__(params, **kwargs)
        self.sigma, self.lmbda, self.preconditioned = sigma, lmbda, preconditioned
        self.averages = [torch.zeros_like(entry.weight) for entry in self.entries]

    def ascent(self, gradients):
        return super().ascent([None if g is None else self.turned(i, g) for i, g in enumerate(gradients)])

    def turned(self, i: int, g: Tensor) -> Tensor:
        g, entry = g.double(), self.entries[i]
        if self.preconditioned:
            beta2 = entry.group["betas"][1]
            return g / ((beta2 * entry.exp_avg_sq + (1 - beta2) * g**2).sqrt() + entry.group["eps"])
        self.averages[i] = self.lmbda * self.averages[i] + (1 - self.lmbda) * g
        return g - self.sigma * self.averages[i]


CASES = {
    "friendly": {"sigma": 1.0},
    "friendly, other numbers": {"sigma": 0.6, "lmbda": 0.5},
    "friendly, adaptive": {"sigma": 1.0, "adaptive": True},
    "friendly, gsam": {"sigma": 1.0, "alpha": 0.4, "eps": 1.0},
    "friendly, maximizing": {"sigma": 1.0, "maximize": True},
    "preconditioned": {"preconditioned": True},
    "preconditioned, other numbers": {"preconditioned": True, "eps": 0.1, "betas": (0.9, 0.95)},
    "preconditioned, amsgrad": {"preconditioned": True, "amsgrad": True},
}


def direction_bound(steps: int, lr: float, rho: float, weight: Tensor) -> float:
    """What an error of the perturbation adds to `rounding_bound`.

    d has an error of some 10 u of |g| <= 1.5, next to a norm of at least norm(d) >= 0.1 norm(g): eps is off by 300 u
    rho at most, the gradient by 0.25 times that, and Adam's quotient by (1 + 3) / 0.5 times.
    """
    return 2 * lr * steps * 8 * 0.25 * 300 * rho * torch.finfo(weight.dtype).eps * math.exp(2 * lr * steps)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("grouping", [list, several_groups], ids=["one_group", "several_groups"])
@pytest.mark.parametrize("kwargs", CASES.values(), ids=CASES.keys())
def test_fifty_steps_equal_the_reference(kwargs, grouping, dtype):
    model, problem = small_model(dtype), Problem(seed=1)
    params = several_groups(model) if grouping is several_groups else list(model.parameters())
    kwargs = {"lr": 0.01, "rho": 0.5, **kwargs}
    reference, optimizer = Reference(params, **kwargs), FSAM(params, **kwargs)
    for step in range(50):
        reference.step(gradients_apart(problem, step))
    train_apart(model, optimizer, 50, problem=problem)
    weight = model["dense"].weight
    extra = direction_bound(50, 0.01, 1.0, weight)
    if "alpha" in kwargs:
        extra += combination_bound(50, 0.01, weight, kwargs["alpha"], sum(p.numel() for p in model.parameters()))
    assert_weights_close(model.parameters(), reference.weights, 50, 0.01, extra=extra)


@pytest.mark.parametrize("kwargs", [{"sigma": 1.0}, {"preconditioned": True}], ids=str)
def test_parameters_without_a_gradient_keep_their_average(kwargs):
    model, problem = small_model(torch.float64), Problem(sparse=True)
    reference = Reference(list(model.parameters()), lr=0.01, rho=0.5, **kwargs)
    optimizer = FSAM(model.parameters(), lr=0.01, rho=0.5, **kwargs)
    for step in range(12):
        reference.step(gradients_apart(problem, step))
    train_apart(model, optimizer, 12, problem=problem)
    extra = direction_bound(12, 0.01, 0.5, model["dense"].weight)
    assert_weights_close(model.parameters(), reference.weights, 12, 0.01, extra=extra)
    if "sigma" in kwargs:
        # Also of what has never had a gradient in the second pass.
        state = optimizer.state_dict()["state"]
        for i, average in enumerate(reference.averages):
            torch.testing.assert_close(state[i]["ascent_avg"], average)


def test_average_is_kept_around_another_optimizer_too():
    model, twin = small_model(torch.float64), small_model(torch.float64)
    numbers = {"lr": 0.01, "weight_decay": 0.1}
    train_apart(model, SAM(torch.optim.AdamW(model.parameters(), **numbers), rho=0.5, sigma=1.0), 10)
    train_apart(twin, FSAM(twin.parameters(), rho=0.5, sigma=1.0, **numbers), 10)
    for p, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, other, rtol=1e-13, atol=1e-13)


def perturbations(model: nn.Module, optimizer) -> list[Tensor]:
    return [p.detach().double() - optimizer.clean_weight(p).double() for p in model.parameters()]


@pytest.mark.parametrize("kwargs", [{"sigma": 1.0}, {"preconditioned": True}], ids=str)
def test_perturbation_is_as_long_as_rho_and_inside_the_mask(kwargs):
    model, problem = small_model(torch.float64), Problem()
    optimizer = FSAM(
        model.named_parameters(), rho=0.5, mask=FisherMask(0.3, excluded="never"), mask_norm="masked", **kwargs
    )
    for step in range(3):
        closure_of(model, optimizer, step, problem)()
        optimizer.perturb()
        moved = perturbations(model, optimizer)
        assert math.sqrt(sum(float(m.square().sum()) for m in moved)) == pytest.approx(0.5, rel=1e-9)
        for p, m in zip(model.parameters(), moved, strict=True):
            assert not m[~optimizer.mask_of(p)].any()
        problem.loss(model.parameters(), step).backward()
        optimizer.step()
    if "sigma" in kwargs:
        # Of what is not on the mask, too.
        assert all(bool(optimizer.state[p]["ascent_avg"].all()) for p in model.parameters())


# -- GradScaler --------------------------------------------------------------------------------------------------------


def scaled_steps(kwargs: dict, scale: float | None, overflow_at: int | None = None) -> tuple[nn.Module, FSAM]:
    """Four steps whose gradients are scaled as a GradScaler does it; one may overflow."""
    model, problem = small_model(torch.float32), Problem()
    optimizer = FSAM(model.parameters(), lr=0.01, rho=0.5, **kwargs)
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    for step in range(4):
        optimizer.zero_grad()
        loss = problem.loss(model.parameters(), step)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if step == overflow_at:
            model["dense"].weight.grad[3, 5] = math.inf
        optimizer.perturb(scaler)
        loss = problem.loss(model.parameters(), step)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return model, optimizer


@pytest.mark.parametrize("kwargs", [{"sigma": 1.0}, {"preconditioned": True}], ids=str)
def test_grad_scaler_changes_no_bit(kwargs):
    assert_same_bits(scaled_steps(kwargs, 1024.0)[0], scaled_steps(kwargs, None)[0])


def test_overflow_leaves_the_average_as_it_was():
    model, optimizer = scaled_steps({"sigma": 1.0}, 1024.0, overflow_at=3)
    twin = small_model(torch.float32)
    other = FSAM(twin.parameters(), lr=0.01, rho=0.5, sigma=1.0)
    train(twin, other, 3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["ascent_avg"], other.state[q]["ascent_avg"])


# -- state -------------------------------------------------------------------------------------------------------------


def around(params, **kwargs) -> SAM:
    return SAM(torch.optim.SGD(params, lr=0.01, momentum=0.9), **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [FSAM, around])
def test_resumed_training_has_the_same_bits(make, dtype):
    model, optimizer = small_model(dtype), None
    optimizer = make(model.parameters(), rho=0.5, sigma=1.0)
    train(model, optimizer, 3)
    twin = copy.deepcopy(model)
    other = make(twin.parameters(), rho=0.5, sigma=1.0)
    other.load_state_dict(round_trip(optimizer.state_dict()))
    train(model, optimizer, 2, start=3)
    train(twin, other, 2, start=3)
    assert_same_bits(model, twin)


def test_copy_has_the_average():
    model = small_model()
    optimizer = around(model.parameters(), rho=0.5, sigma=1.0)
    train(model, optimizer, 3)
    twin, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2, start=3)
    train(twin, other, 2, start=3)
    assert_same_bits(model, twin)


def test_average_of_16_bit_weights_has_a_type_that_holds_it():
    for dtype, expected in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        model = small_model(dtype)
        optimizer = FSAM(model.parameters(), sigma=1.0)
        train(model, optimizer, 1)
        assert optimizer.state[model["dense"].weight]["ascent_avg"].dtype == expected


def test_loaded_average_without_use_is_dropped():
    model = small_model()
    optimizer = FSAM(model.parameters(), sigma=1.0)
    train(model, optimizer, 1)
    other = FSAM(model.parameters())
    other.load_state_dict(optimizer.state_dict())
    assert "ascent_avg" not in other.state[model["dense"].weight]


def test_codes_of_second_moments_precondition_too():
    """A code's error is 4 / 255 of a second moment at the largest of its group, at the root 1 %."""
    model = nn.Linear(64, 32, dtype=torch.float32)
    twin = copy.deepcopy(model)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    optimizers = [
        FSAM(m.parameters(), lr=0.0, rho=0.5, preconditioned=True, state_format=f)
        for m, f in ((model, "8bit"), (twin, None))
    ]
    for _ in range(3):
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            m(x).square().sum().backward()
            optimizer.perturb()
            if _ < 2:
                m(x).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    coded, exact = (perturbations(m, o)[0] for m, o in zip((model, twin), optimizers, strict=True))
    assert 0 < float((coded - exact).norm() / exact.norm()) < 0.02


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("sigma", {"sigma": -1.0}),
        ("sigma", {"sigma": math.inf}),
        ("lmbda", {"sigma": 1.0, "lmbda": 1.0}),
        ("sigma", {"sigma": 1.0, "preconditioned": True}),
        ("beta_per", {"sigma": 1.0, "beta": 0.5, "beta_per": "tensor"}),
        ("preconditioned", {"preconditioned": True, "rule": "lion"}),
        ("adaptive", {"preconditioned": True, "adaptive": True}),
    ],
)
def test_wrong_argument_is_named(name, kwargs):
    with pytest.raises(ArgumentError) as caught:
        FSAM(small_model().parameters(), **kwargs)
    assert caught.value.name == name
