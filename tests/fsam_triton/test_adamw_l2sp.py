"""AdamWL2SP against torch.optim.AdamW and the fp64 reference: the numbers, the gradients' ways in, what users save."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_optimizers import optim_inputs_func_adamw

from fsam_triton import AdamWL2SP
from tests.reference import Problem, ReferenceAdamW, assert_weights_close, small_model

WIDE = [torch.float32, torch.float64]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Buffers of a few thousand weights: threads would spend the time waiting for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(model: nn.Module, optimizer, steps: int, *, problem=Problem(), start=0, scheduler=None) -> None:
    for step in range(start, start + steps):
        optimizer.zero_grad()
        problem.loss(model.parameters(), step).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_same_bits(model: nn.Module, other: nn.Module) -> None:
    for (name, actual), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(actual, expected), name


def assert_states_close(optimizer, other, steps: int) -> None:
    """exp_avg forgets 3 roundings of at most 1.5 at rate 0.1; exp_avg_sq <= 2.25 keeps 3 a step; the gradient has 4."""
    for group, other_group in zip(optimizer.param_groups, other.param_groups, strict=True):
        for parameter, twin in zip(group["params"], other_group["params"], strict=True):
            state, expected = optimizer.state[parameter], other.state[twin]
            eps = torch.finfo(parameter.dtype).eps
            assert float(state["step"]) == float(expected["step"])
            torch.testing.assert_close(state["exp_avg"], expected["exp_avg"], rtol=0, atol=60 * eps)
            bound = 2.25 * (3 * steps + 8) * eps
            torch.testing.assert_close(state["exp_avg_sq"], expected["exp_avg_sq"], rtol=0, atol=bound)


def listed_by_pytorch() -> list[tuple[str, dict]]:
    return [(entry.desc, dict(entry.kwargs)) for entry in optim_inputs_func_adamw("cuda")]


CASES = [
    *listed_by_pytorch(),
    ("Tensor lr", {"lr": torch.tensor(0.01)}),
    ("Tensor lr with one dimension", {"lr": torch.tensor([0.01], dtype=torch.float64)}),
    ("betas", {"lr": 0.01, "betas": (0.8, 0.95)}),
    ("large eps", {"lr": 0.01, "eps": 0.1}),
    ("large eps, amsgrad, maximize", {"lr": 0.01, "eps": 0.1, "amsgrad": True, "maximize": True}),
    ("foreach, fused", {"foreach": False, "fused": False}),
]


def low_precision_constants(steps: int, kwargs: dict) -> float:
    """What torch.optim.AdamW itself loses by computing with the fp32 of Tensor arguments: lr / (1 - beta ** t) at every
    step, times a quotient of at most 3, and 1 - lr * weight_decay, times a weight of at most 3.
    """
    lr, betas = kwargs.get("lr", 1e-3), kwargs.get("betas", (0.9, 0.999))
    if not any(isinstance(value, Tensor) for value in (lr, *betas)):
        return 0.0
    beta1, beta2 = float(betas[0]), float(betas[1])
    roundings = sum(2 + 1 / (1 - beta1**t) + 0.5 / (1 - beta2**t) for t in range(1, steps + 1))
    return 3 * torch.finfo(torch.float32).eps * (float(lr) * roundings + steps)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(("description", "kwargs"), CASES, ids=[description for description, _ in CASES])
def test_two_hundred_steps_equal_torch_adamw(description, kwargs, dtype):
    model, twin = small_model(dtype), small_model(dtype)
    kwargs = copy.deepcopy(kwargs)
    optimizer = AdamWL2SP(model.parameters(), **kwargs)
    # torch takes capturable on accelerators only; on the CPU it stands for the same numbers.
    expected = torch.optim.AdamW(twin.parameters(), **{k: v for k, v in kwargs.items() if k != "capturable"})
    # Gradients that do not depend on the weights feed no rounding error back.
    train(model, optimizer, 200, problem=Problem(curvature=0.0))
    train(twin, expected, 200, problem=Problem(curvature=0.0))
    bound = {"steps": 200, "lr": float(kwargs.get("lr", 1e-3)), "extra": low_precision_constants(200, kwargs)}
    assert_weights_close(model.parameters(), twin.parameters(), curvature=0.0, **bound)


@pytest.mark.parametrize("dtype", WIDE)
def test_moments_and_step_counts_equal_torch_adamw(dtype):
    model, twin = small_model(dtype), small_model(dtype)
    optimizer, expected = AdamWL2SP(model.parameters(), lr=0.01), torch.optim.AdamW(twin.parameters(), lr=0.01)
    train(model, optimizer, 50, problem=Problem(sparse=True))
    train(twin, expected, 50, problem=Problem(sparse=True))
    assert_states_close(optimizer, expected, 50)


def test_first_steps_from_zero_weights_are_accurate_to_a_few_ulps():
    """1 - beta2 ** t in fp32 would be wrong by 1e-4; weights of zero hide nothing behind their own ulp."""
    parameter, twin = (nn.Parameter(torch.zeros(24, 16)) for _ in range(2))
    gradient = Problem().linear_term(0, 0, parameter)
    for weight, factory in ((parameter, AdamWL2SP), (twin, torch.optim.AdamW)):
        optimizer = factory([weight], lr=0.01, betas=(0.9, 0.9999))
        for _ in range(5):
            weight.grad = gradient.clone()
            optimizer.step()
    # Equal gradients never cancel, so errors are relative. In units of half an ulp, at step t of each program: 3 t of
    # exp_avg, 1.5 t of the root of exp_avg_sq, 10 of the quotient and its factors, 2 of the weight.
    torch.testing.assert_close(parameter, twin, rtol=(4.5 * 5 + 12) * torch.finfo(torch.float32).eps, atol=0)


def different_groups(model: nn.Module) -> list[dict]:
    p = list(model.parameters())
    return [
        {"params": p[:2], "lr": 0.01, "weight_decay": 0.1},
        {"params": p[2:3], "betas": (0.8, 0.95), "eps": 1e-3},
        {"params": p[3:5], "lr": torch.tensor(0.005, dtype=torch.float64), "amsgrad": True},
        {"params": p[5:], "lr": 0.002, "maximize": True, "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("dtype", WIDE)
def test_every_group_keeps_its_own_hyper_parameters(dtype):
    model, twin = small_model(dtype), small_model(dtype)
    train(model, AdamWL2SP(different_groups(model)), 100)
    train(twin, torch.optim.AdamW(different_groups(twin)), 100)
    assert_weights_close(model.parameters(), twin.parameters(), 100, 0.01)


@pytest.mark.parametrize("dtype", WIDE)
def test_changed_hyper_parameters_take_effect_at_the_next_step(dtype):
    model, twin = small_model(dtype), small_model(dtype)
    for trained, optimizer in (
        (model, AdamWL2SP(model.parameters())),
        (twin, torch.optim.AdamW(twin.parameters())),
    ):
        train(trained, optimizer, 5)
        optimizer.param_groups[0].update(lr=0.01, betas=(0.85, 0.99), eps=1e-2, weight_decay=0.3)
        train(trained, optimizer, 5, start=5)
    assert_weights_close(model.parameters(), twin.parameters(), 10, 0.01)


@dataclass(frozen=True)
class Feed:
    """One of the ways in which gradients come to an optimizer."""

    name: str
    give: Callable[[Problem, nn.Module, torch.optim.Optimizer, int], None]
    static_grads: bool = False


def after(zero: Callable[[nn.Module, torch.optim.Optimizer], None]):
    def give(problem, model, optimizer, step):
        zero(model, optimizer)
        problem.loss(model.parameters(), step).backward()

    return give


def assigned(problem, model, optimizer, step):
    for parameter, gradient in zip(model.parameters(), problem.gradients(model.parameters(), step), strict=True):
        parameter.grad = gradient


def accumulated(problem, model, optimizer, step):
    optimizer.zero_grad()
    for fraction in (0.25, 0.5, 0.25):
        (fraction * problem.loss(model.parameters(), step)).backward()


def accumulated_into_zeros(problem, model, optimizer, step):
    optimizer.zero_grad(set_to_none=False)
    for fraction in (0.25, 0.75):
        (fraction * problem.loss(model.parameters(), step)).backward()


def discarded(problem, model, optimizer, step):
    optimizer.zero_grad()
    Problem(problem.curvature, sparse=False, seed=problem.seed).loss(model.parameters(), step).backward()
    for index, parameter in enumerate(model.parameters()):
        if not problem.present(step, index):
            parameter.grad = None


def alternating(problem, model, optimizer, step):
    (assigned, FEEDS[0].give, FEEDS[2].give, accumulated)[step % 4](problem, model, optimizer, step)


FEEDS = [
    Feed("model.zero_grad", after(lambda model, optimizer: model.zero_grad())),
    Feed("optimizer.zero_grad", after(lambda model, optimizer: optimizer.zero_grad())),
    Feed("zero_grad_to_zeros", after(lambda model, optimizer: optimizer.zero_grad(set_to_none=False))),
    Feed("assigned", assigned),
    Feed("accumulated", accumulated),
    Feed("accumulated_into_zeros", accumulated_into_zeros),
    Feed("discarded", discarded),
    Feed("alternating", alternating),
    Feed("static", after(lambda model, optimizer: optimizer.zero_grad()), static_grads=True),
    Feed("static_to_zeros", after(lambda model, optimizer: optimizer.zero_grad(set_to_none=False)), static_grads=True),
]


@pytest.mark.parametrize("feed", FEEDS, ids=lambda feed: feed.name)
def test_gradients_give_the_same_numbers_whichever_way_they_arrive(feed):
    # Without curvature the gradients, and the fractions of them that are accumulated, are exact.
    problem, model, twin = Problem(curvature=0.0, sparse=True), small_model(), small_model()
    optimizer = AdamWL2SP(model.parameters(), lr=0.01, static_grads=feed.static_grads)
    expected = torch.optim.AdamW(twin.parameters(), lr=0.01)
    for step in range(40):
        feed.give(problem, model, optimizer, step)
        optimizer.step()
        assigned(problem, twin, expected, step)
        expected.step()
    assert_weights_close(model.parameters(), twin.parameters(), 40, 0.01)
    assert_states_close(optimizer, expected, 40)


@pytest.mark.parametrize("feed", FEEDS, ids=lambda feed: feed.name)
def test_gradients_give_the_same_bits_whichever_way_they_arrive(feed):
    problem, model, twin = Problem(curvature=0.0, sparse=True), small_model(), small_model()
    optimizer = AdamWL2SP(model.parameters(), lr=0.01, static_grads=feed.static_grads)
    expected = AdamWL2SP(twin.parameters(), lr=0.01)
    for step in range(20):
        feed.give(problem, model, optimizer, step)
        optimizer.step()
        assigned(problem, twin, expected, step)
        expected.step()
    assert_same_bits(model, twin)


@pytest.mark.parametrize("feed", FEEDS, ids=lambda feed: feed.name)
def test_parameter_without_gradient_is_left_alone_to_the_bit(feed):
    model, problem = small_model(), Problem(sparse=True)
    optimizer = AdamWL2SP(model.parameters(), lr=0.01, weight_decay=0.5, static_grads=feed.static_grads)
    parameters = list(model.parameters())
    for step in range(8):
        before = [(p.detach().clone(), copy.deepcopy(optimizer.state.get(p))) for p in parameters]
        feed.give(problem, model, optimizer, step)
        optimizer.step()
        for index, (parameter, (weight, state)) in enumerate(zip(parameters, before, strict=True)):
            if problem.present(step, index):
                assert not torch.equal(parameter, weight)
                continue
            assert torch.equal(parameter, weight)
            for name, value in (state or {}).items():
                assert torch.equal(optimizer.state[parameter][name], value), name


def test_step_without_any_gradient_changes_nothing():
    model, twin = small_model(), small_model()
    optimizer = AdamWL2SP(model.parameters(), lr=0.01)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert_same_bits(model, twin)


def test_gradients_that_stay_are_applied_again_as_under_torch_adamw():
    model, twin = small_model(), small_model()
    for trained, factory in ((model, AdamWL2SP), (twin, torch.optim.AdamW)):
        optimizer = factory(trained.parameters(), lr=0.01)
        Problem().loss(trained.parameters(), 0).backward()
        for _ in range(3):
            optimizer.step()
    assert_weights_close(model.parameters(), twin.parameters(), 3, 0.01)


def test_gradients_that_are_never_zeroed_accumulate_as_under_torch_adamw():
    model, twin = small_model(torch.float64), small_model(torch.float64)
    for trained, factory in ((model, AdamWL2SP), (twin, torch.optim.AdamW)):
        optimizer = factory(trained.parameters(), lr=0.01, eps=0.1)
        for step in range(4):
            Problem(sparse=True).loss(trained.parameters(), step).backward()
            optimizer.step()
    # Sums of up to four gradients have twice the roundings, and may cancel to a quarter of one.
    assert_weights_close(model.parameters(), twin.parameters(), 4 * 8, 0.01)


def test_gradients_changed_in_place_are_used_as_changed():
    model, twin = small_model(), small_model()
    for trained, factory in ((model, AdamWL2SP), (twin, torch.optim.AdamW)):
        optimizer = factory(trained.parameters(), lr=0.01, eps=1e-2)
        for step in range(5):
            optimizer.zero_grad()
            Problem().loss(trained.parameters(), step).backward()
            nn.utils.clip_grad_norm_(trained.parameters(), 2.0)
            optimizer.step()
    assert_weights_close(model.parameters(), twin.parameters(), 5, 0.01)


def test_gradient_that_carries_a_graph_is_used():
    model, twin = small_model(), small_model()
    for trained, factory in ((model, AdamWL2SP), (twin, torch.optim.AdamW)):
        optimizer = factory(trained.parameters(), lr=0.01)
        loss = Problem().loss(trained.parameters(), 0)
        gradients = torch.autograd.grad(loss, trained.parameters(), create_graph=True)
        for weight, gradient in zip(trained.parameters(), gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
    assert_weights_close(model.parameters(), twin.parameters(), 1, 0.01)


def test_backward_through_weights_that_were_updated_since_is_refused_by_autograd():
    model = small_model()
    optimizer = AdamWL2SP(model.parameters())
    loss = model["dense"].weight.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_closure_is_called_once_with_gradients_enabled_and_its_loss_returned():
    model = small_model()
    optimizer, losses = AdamWL2SP(model.parameters()), []

    def closure():
        optimizer.zero_grad()
        losses.append(Problem().loss(model.parameters(), 0))
        losses[-1].backward()
        return losses[-1]

    with torch.no_grad():
        assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1


def anchors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@dataclass(frozen=True)
class L2SPCase:
    """A configuration beyond torch.optim.AdamW, to compare with the fp64 reference."""

    name: str
    kwargs: dict = field(default_factory=dict)
    anchored: tuple[str, ...] | None = None
    groups: bool = False


L2SP_CASES = [
    L2SPCase("initial_anchors", {"l2_sp": 0.1}),
    L2SPCase("anchors_of_another_model", {"l2_sp": 0.2}, ("dense.weight", "dense.bias", "norm.weight", "norm.bias")),
    L2SPCase("all_novel", {"l2_sp": 0.2, "weight_decay": 0.3}, ()),
    L2SPCase("clipped", {"max_grad_norm": 0.5, "eps": 1e-2}),
    L2SPCase("barely_clipped", {"max_grad_norm": 20.0, "eps": 1e-2}),
    L2SPCase("groups", {"l2_sp": 0.1, "max_grad_norm": 10.0, "eps": 1e-2}, groups=True),
]


def l2_sp_groups(model: nn.Module) -> list[dict]:
    named = list(model.named_parameters())
    return [
        {"params": named[:2], "lr": 0.01},
        {"params": named[2:4], "l2_sp": 0.0, "weight_decay": 0.2},
        {"params": named[4:], "l2_sp": 0.4, "lr": 0.005},
    ]


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("case", L2SP_CASES, ids=lambda case: case.name)
def test_l2_sp_and_clipping_equal_the_reference(case, dtype):
    model, problem = small_model(dtype), Problem(sparse=True)
    kwargs = {"lr": 0.01, **case.kwargs}
    if case.anchored is not None:
        other = anchors_of(small_model(dtype, seed=7))
        kwargs["anchors"] = {name: other[name] for name in case.anchored}
    params = l2_sp_groups(model) if case.groups else list(model.named_parameters())
    reference = ReferenceAdamW(params, **kwargs)
    optimizer = AdamWL2SP(params, **kwargs)
    for step in range(50):
        reference.step(problem.gradients(reference.weights, step))
    train(model, optimizer, 50, problem=problem)
    assert_weights_close(model.parameters(), reference.weights, 50, 0.01)


def test_anchors_are_a_copy_of_the_initial_values_and_of_the_mapping():
    model, twin = small_model(), small_model()
    mapping = anchors_of(twin)
    optimizer = AdamWL2SP(model.named_parameters(), lr=0.01, l2_sp=0.5)
    expected = AdamWL2SP(twin.named_parameters(), lr=0.01, l2_sp=0.5, anchors=mapping)
    for anchor in mapping.values():
        anchor.add_(100.0)
    train(model, optimizer, 5)
    train(twin, expected, 5)
    assert_same_bits(model, twin)


def test_clipping_equals_clip_grad_norm_before_the_step():
    model, twin, problem = small_model(), small_model(), Problem(sparse=True)
    optimizer = AdamWL2SP(model.parameters(), lr=0.01, eps=1e-2, max_grad_norm=2.0)
    expected = torch.optim.AdamW(twin.parameters(), lr=0.01, eps=1e-2)
    train(model, optimizer, 20, problem=problem)
    for step in range(20):
        expected.zero_grad()
        problem.loss(twin.parameters(), step).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 2.0)
        expected.step()
    assert_weights_close(model.parameters(), twin.parameters(), 20, 0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coordinate_with_a_non_finite_gradient_keeps_its_weight_and_moments(dtype, bad):
    model, twin = small_model(dtype), small_model(dtype)
    optimizers = [AdamWL2SP(m.parameters(), lr=0.01, weight_decay=0.5) for m in (model, twin)]
    for trained, optimizer in zip((model, twin), optimizers, strict=True):
        train(trained, optimizer, 3)
    weight, state = model["dense"].weight, optimizers[0].state[model["dense"].weight]
    frozen = [t[3, 5].clone() for t in (weight.detach(), state["exp_avg"], state["exp_avg_sq"])]
    for trained, optimizer in zip((model, twin), optimizers, strict=True):
        optimizer.zero_grad()
        Problem().loss(trained.parameters(), 3).backward()
    weight.grad[3, 5] = bad
    for optimizer in optimizers:
        optimizer.step()
    assert [t[3, 5] for t in (weight.detach(), state["exp_avg"], state["exp_avg_sq"])] == frozen
    with torch.no_grad():
        twin["dense"].weight[3, 5] = weight[3, 5]
    assert_same_bits(model, twin)


def test_clipping_with_a_non_finite_gradient_leaves_no_nan_anywhere():
    model = small_model()
    optimizer = AdamWL2SP(model.parameters(), lr=0.01, max_grad_norm=1.0)
    for step, bad in enumerate((float("nan"), float("inf"), 0.0)):
        optimizer.zero_grad()
        Problem().loss(model.parameters(), step).backward()
        model["head"].weight.grad[0, 0] = bad
        optimizer.step()
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert all(t.isfinite().all() for t in (parameter, state["exp_avg"], state["exp_avg_sq"]))


def regression_loss(dtype: torch.dtype, steps: int, **kwargs) -> tuple[float, float]:
    """First and last loss of a linear regression whose solution is inside the initial box."""
    weight = nn.Parameter(torch.zeros(24, 16, dtype=dtype))
    target = Problem().linear_term(0, 0, weight)
    optimizer, losses = AdamWL2SP([weight], lr=1e-3, weight_decay=0.0, **kwargs), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (weight - target).float().square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses[0], losses[-1]


@pytest.mark.parametrize("master_weights", [False, True], ids=["rounded", "master"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_move_as_far_as_fp32_weights(dtype, master_weights):
    """300 steps of 1e-3 take every |w| from 0 to about 0.3, of targets of about 1; the loss falls from 1 to 0.53."""
    _, exact = regression_loss(torch.float32, 300)
    first, last = regression_loss(dtype, 300, master_weights=master_weights)
    # A 16-bit weight of 0.3 is off by at most one ulp of 2**-9, and as a random walk over 300 steps by sqrt(300) halves
    # of 2**-10 at the most: 0.01 in the mean absolute weight, of a slope of 2 * 0.7.
    assert abs(last - exact) < 0.015 < first - last


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_of_the_update_is_unbiased(dtype):
    n, lr = 2**16, 2.0**-14
    weight = nn.Parameter(torch.full((n,), 1.5, dtype=dtype))
    optimizer = AdamWL2SP([weight], lr=lr, weight_decay=0.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    ulp = torch.finfo(dtype).eps
    assert set(((weight.detach().double() - 1.5) / ulp).unique().tolist()) == {-1.0, 0.0}
    moved = (1.5 - weight.detach().double()).mean().item()
    # n coin flips of probability p = lr / ulp and height ulp; five standard deviations.
    assert abs(moved - lr) < 5 * ulp * ((lr / ulp) * (1 - lr / ulp) / n) ** 0.5


def test_without_stochastic_rounding_a_small_update_rounds_to_nearest():
    weight = nn.Parameter(torch.full((24, 16), 1.5, dtype=torch.bfloat16))
    optimizer = AdamWL2SP([weight], lr=2.0**-14, weight_decay=0.0, stochastic_rounding=False)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(weight, torch.full_like(weight, 1.5))


@pytest.mark.parametrize(("seed", "equal"), [(0, True), (1, False)])
def test_stochastic_rounding_depends_on_the_seed_alone(seed, equal):
    weights = []
    for chosen in (0, seed):
        model = small_model(torch.bfloat16)
        train(model, AdamWL2SP(model.parameters(), seed=chosen), 5)
        weights.append(model["dense"].weight)
    assert torch.equal(*weights) is equal


def test_stochastic_rounding_is_new_at_every_step():
    """Of 2**16 weights that move with probability 1/8 at each of two steps, 1/64 move twice: 1024 +- 5 sigma."""
    weight = nn.Parameter(torch.full((2**16,), 1.5, dtype=torch.bfloat16))
    optimizer = AdamWL2SP([weight], lr=2.0**-10, betas=(0.0, 0.0), weight_decay=0.0)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    moves = ((1.5 - weight.detach().double()) * 128).round()
    assert abs((moves == 2).sum().item() - 1024) < 5 * (1024 * 63 / 64) ** 0.5
    assert abs((moves == 1).sum().item() - 2**16 * 14 / 64) < 5 * (2**16 * 14 / 64 * 50 / 64) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_follow_an_fp32_run_with_the_same_gradients(dtype):
    """Without curvature the gradients are the same numbers in every dtype, and so is the start."""
    problem, model, twin = Problem(curvature=0.0, sparse=True), small_model(dtype), small_model()
    optimizer = AdamWL2SP(model.parameters(), lr=0.01, master_weights=True)
    expected = torch.optim.AdamW(twin.parameters(), lr=0.01)
    train(model, optimizer, 50, problem=problem)
    train(twin, expected, 50, problem=problem)
    masters = [optimizer.state[parameter]["master"] for parameter in model.parameters()]
    assert all(master.dtype == torch.float32 for master in masters)
    assert_weights_close(masters, twin.parameters(), 50, 0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameter_is_its_master_rounded_to_nearest(dtype):
    model = small_model(dtype)
    optimizer = AdamWL2SP(model.parameters(), lr=0.01, master_weights=True)
    train(model, optimizer, 5)
    for parameter in model.parameters():
        assert torch.equal(parameter, optimizer.state[parameter]["master"].to(dtype))


@pytest.mark.parametrize(
    ("dtype", "master_weights", "moments"),
    [
        (torch.float32, False, torch.float32),
        (torch.float64, False, torch.float64),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float16, False, torch.float32),
        (torch.bfloat16, True, torch.float32),
        (torch.float16, True, torch.float32),
    ],
)
def test_state_has_torch_adamws_names_shapes_and_documented_dtypes(dtype, master_weights, moments):
    model = small_model(dtype)
    optimizer = AdamWL2SP(model.parameters(), master_weights=master_weights)
    train(model, optimizer, 1)
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"} | ({"master"} if master_weights else set())
        assert state["step"].dtype == torch.float32
        assert state["step"].shape == ()
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].dtype == moments
            assert state[name].shape == parameter.shape


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    ("before", "then"), [(AdamWL2SP, torch.optim.AdamW), (torch.optim.AdamW, AdamWL2SP)], ids=["to_torch", "from_torch"]
)
def test_checkpoint_continues_under_the_other_optimizer(before, then, amsgrad):
    problem, model, twin = Problem(sparse=True), small_model(), small_model()
    expected = torch.optim.AdamW(twin.parameters(), lr=0.01, amsgrad=amsgrad)
    train(twin, expected, 20, problem=problem)

    first = before(model.parameters(), lr=0.01, amsgrad=amsgrad)
    train(model, first, 10, problem=problem)
    fresh = small_model(seed=1)
    second = then(fresh.parameters(), lr=0.5, amsgrad=amsgrad)
    fresh.load_state_dict(model.state_dict())
    second.load_state_dict(first.state_dict())
    train(fresh, second, 10, problem=problem, start=10)
    assert_weights_close(fresh.parameters(), twin.parameters(), 20, 0.01)
    assert_states_close(second, expected, 20)


def test_state_dict_is_empty_before_the_first_step_as_torchs():
    assert AdamWL2SP(small_model().parameters()).state_dict()["state"] == {}


@pytest.mark.parametrize("with_optimizer", [False, True], ids=["model_alone", "model_and_optimizer"])
def test_master_weights_follow_weights_loaded_into_the_model(with_optimizer):
    """The checkpoint was written without master weights, so the 16-bit weights are all there is."""
    donor, model, twin = (small_model(torch.bfloat16, seed) for seed in (1, 2, 1))
    other = AdamWL2SP(donor.parameters(), lr=0.01)
    train(donor, other, 3)
    optimizer = AdamWL2SP(model.parameters(), lr=0.01, master_weights=True)
    model.load_state_dict(donor.state_dict())
    twin.load_state_dict(donor.state_dict())
    expected = AdamWL2SP(twin.parameters(), lr=0.01, master_weights=True)
    if with_optimizer:
        optimizer.load_state_dict(other.state_dict())
        expected.load_state_dict(other.state_dict())
    train(model, optimizer, 2)
    train(twin, expected, 2)
    assert_same_bits(model, twin)


def test_loading_does_not_tie_the_two_optimizers_together():
    model, fresh = small_model(), small_model()
    first, second = AdamWL2SP(model.parameters()), AdamWL2SP(fresh.parameters())
    train(model, first, 2)
    saved = copy.deepcopy(first.state_dict())
    second.load_state_dict(first.state_dict())
    train(fresh, second, 2)
    for key, state in first.state_dict()["state"].items():
        assert all(torch.equal(value, saved["state"][key][name]) for name, value in state.items())


def round_trip(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


RESUMED = {
    "plain": (torch.float32, {}),
    "initial_anchors": (torch.float32, {"l2_sp": 0.1}),
    "anchors_of_another_model": (torch.float32, {"l2_sp": 0.1, "anchors": "other"}),
    "stochastic_rounding": (torch.bfloat16, {"seed": 3}),
    "master": (torch.bfloat16, {"master_weights": True}),
}


def resumable(dtype: torch.dtype, kwargs: dict, seed: int) -> tuple[nn.Module, AdamWL2SP]:
    model = small_model(dtype, seed)
    if kwargs.get("anchors") == "other":
        other = anchors_of(small_model(dtype, seed=7))
        kwargs = {**kwargs, "anchors": {name: other[name] for name in ("dense.weight", "norm.bias")}}
    return model, AdamWL2SP(model.named_parameters(), lr=0.01, **kwargs)


@pytest.mark.parametrize(("dtype", "kwargs"), RESUMED.values(), ids=RESUMED.keys())
def test_resumed_training_equals_uninterrupted_training_to_the_bit(dtype, kwargs):
    problem = Problem(sparse=True)
    model, optimizer = resumable(dtype, kwargs, seed=0)
    train(model, optimizer, 10, problem=problem)
    saved = round_trip({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, 10, problem=problem, start=10)

    fresh, resumed = resumable(dtype, kwargs, seed=1)
    fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(fresh, resumed, 10, problem=problem, start=10)
    assert_same_bits(fresh, model)


def wrong_shape(saved):
    saved["state"][0]["exp_avg"] = torch.zeros(3)


def wrong_group_count(saved):
    saved["param_groups"].append(copy.deepcopy(saved["param_groups"][0]))


def wrong_group_size(saved):
    saved["param_groups"][0]["params"].pop()


@pytest.mark.parametrize("damage", [wrong_shape, wrong_group_count, wrong_group_size])
def test_mismatched_state_dict_is_refused_and_changes_nothing(damage):
    model, twin = small_model(), small_model()
    optimizers = [AdamWL2SP(m.parameters(), lr=0.01) for m in (model, twin)]
    for trained, optimizer in zip((model, twin), optimizers, strict=True):
        train(trained, optimizer, 3)
    donor = small_model(seed=1)
    other = AdamWL2SP(donor.parameters(), lr=0.5)
    train(donor, other, 7)
    saved = copy.deepcopy(other.state_dict())
    damage(saved)
    with pytest.raises(ValueError, match=r"state|shape|group"):
        optimizers[0].load_state_dict(saved)
    for trained, optimizer in zip((model, twin), optimizers, strict=True):
        train(trained, optimizer, 3, start=3)
    assert_same_bits(model, twin)


SCHEDULERS = {
    "one_cycle": (0.001, lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=41)),
    "one_cycle_tensor_lr": (
        torch.tensor(0.001, dtype=torch.float64),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=41),
    ),
    "lambda": (0.01, lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))),
    "lambda_tensor_lr": (
        torch.tensor(0.01, dtype=torch.float64),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    ),
}


@pytest.mark.parametrize(("lr", "make"), SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_schedulers_steer_it_as_they_steer_torch_adamw(lr, make):
    models = [small_model(torch.float64) for _ in range(2)]
    for model, factory in zip(models, (AdamWL2SP, torch.optim.AdamW), strict=True):
        optimizer = factory(model.parameters(), lr=copy.deepcopy(lr))
        train(model, optimizer, 40, scheduler=make(optimizer))
    assert_weights_close(models[0].parameters(), models[1].parameters(), 40, 0.01)


def test_group_added_after_some_steps_trains_as_under_torch_adamw():
    models = [small_model(torch.float64) for _ in range(2)]
    problem = Problem()
    for model, factory in zip(models, (AdamWL2SP, torch.optim.AdamW), strict=True):
        optimizer = factory([*model["dense"].parameters(), *model["norm"].parameters()], lr=0.01)
        train(model, optimizer, 5, problem=problem)
        model.zero_grad()
        optimizer.add_param_group({"params": list(model["head"].parameters()), "lr": 0.002, "weight_decay": 0.3})
        train(model, optimizer, 5, problem=problem, start=5)
    assert_weights_close(models[0].parameters(), models[1].parameters(), 10, 0.01)


def pickled(pair):
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copy_of_model_and_optimizer_continues_identically_and_apart(duplicate, dtype):
    model = small_model(dtype)
    optimizer = AdamWL2SP(model.named_parameters(), lr=0.01, l2_sp=0.1)
    train(model, optimizer, 3)
    twin, twin_optimizer = duplicate((model, optimizer))
    assert_same_bits(twin, model)
    train(twin, twin_optimizer, 3, start=3)
    assert not torch.equal(twin["dense"].weight, model["dense"].weight)
    train(model, optimizer, 3, start=3)
    assert_same_bits(twin, model)


def test_copy_of_the_model_alone_has_nothing_to_do_with_the_optimizer():
    model, twin = small_model(), small_model()
    optimizer = AdamWL2SP(model.parameters(), lr=0.01)
    average = copy.deepcopy(model)
    Problem().loss(average.parameters(), 0).backward()
    optimizer.step()
    assert_same_bits(model, twin)
    train(model, optimizer, 1)
    assert_same_bits(average, twin)


def test_new_optimizer_takes_the_parameters_over_and_the_old_one_says_so():
    model, twin = small_model(), small_model()
    old = AdamWL2SP(model.parameters(), lr=0.01)
    train(model, old, 2)
    train(twin, AdamWL2SP(twin.parameters(), lr=0.01), 2)
    train(model, AdamWL2SP(model.parameters(), lr=0.01), 2)
    train(twin, AdamWL2SP(twin.parameters(), lr=0.01), 2)
    assert_same_bits(model, twin)
    with pytest.raises(RuntimeError, match="only one optimizer"):
        old.step()


LAYOUTS = {
    "transposed": lambda: torch.randn(6, 4).t(),
    "permuted": lambda: torch.randn(2, 3, 4).permute(2, 0, 1),
    "channels_last": lambda: torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
    "no_elements": lambda: torch.randn(0, 3),
    "no_dimensions": lambda: torch.randn(()),
    "one_element": lambda: torch.randn(1, 1, 1),
    "odd_length": lambda: torch.randn(1027),
}


def optimizers_of(tensor: Tensor, *others: Tensor):
    """The same tensors under AdamWL2SP and torch.optim.AdamW, with twin gradients in the tensors' own layout."""
    for factory in (AdamWL2SP, torch.optim.AdamW):
        # clone() alone would make a dense copy of a tensor with gaps.
        copies = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t) for t in (tensor, *others)]
        parameters = [nn.Parameter(t) for t in copies]
        yield parameters, factory(parameters, lr=0.01)


def take_steps(parameters: list[nn.Parameter], optimizer, steps: int) -> None:
    problem = Problem()
    for step in range(steps):
        optimizer.zero_grad()
        problem.loss(parameters, step).backward()
        optimizer.step()


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_parameter_keeps_its_shape_and_strides(make):
    tensor = make()
    (ours, optimizer), (expected, torch_adamw) = optimizers_of(tensor, torch.randn(24, 16))
    assert torch.equal(ours[0], tensor)
    take_steps(ours, optimizer, 5)
    take_steps(expected, torch_adamw, 5)
    assert ours[0].shape == tensor.shape
    assert ours[0].stride() == tensor.stride()
    assert_weights_close(ours, expected, 5, 0.01)


def test_parameter_with_gaps_between_its_elements_trains_as_under_torch_adamw():
    (ours, optimizer), (expected, torch_adamw) = optimizers_of(torch.randn(24, 32)[:, ::2], torch.randn(24, 16))
    take_steps(ours, optimizer, 5)
    take_steps(expected, torch_adamw, 5)
    assert_weights_close(ours, expected, 5, 0.01)


def test_unflattened_group_trains_as_a_flat_one_and_keeps_its_storage():
    model, twin = small_model(), small_model()
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    train(model, AdamWL2SP(model.parameters(), lr=0.01, flatten=False), 10)
    train(twin, AdamWL2SP(twin.parameters(), lr=0.01), 10)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    # The same arithmetic in loops of other lengths, where the compiler may contract other products.
    assert_weights_close(model.parameters(), twin.parameters(), 10, 0.01)


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    optimizer = AdamWL2SP(model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    assert model[1].weight is model[0].weight
    x = torch.randn(2, 8)
    assert torch.equal(model(x), nn.functional.linear(model[0](x), model[0].weight, model[1].bias))


def test_frozen_parameter_in_the_list_is_left_alone():
    model, twin = small_model(), small_model()
    for trained, factory in ((model, AdamWL2SP), (twin, torch.optim.AdamW)):
        trained["norm"].weight.requires_grad_(False)
        train(trained, factory(trained.parameters(), lr=0.01), 5)
    assert torch.equal(model["norm"].weight, small_model()["norm"].weight)
    assert_weights_close(model.parameters(), twin.parameters(), 5, 0.01)


def test_parameter_unfrozen_later_trains_from_then_on():
    model, twin = small_model(), small_model()
    for trained, factory in ((model, AdamWL2SP), (twin, torch.optim.AdamW)):
        trained["dense"].requires_grad_(False)
        optimizer = factory(trained.parameters(), lr=0.01)
        train(trained, optimizer, 3)
        trained["dense"].requires_grad_(True)
        train(trained, optimizer, 3, start=3)
    assert_weights_close(model.parameters(), twin.parameters(), 6, 0.01)


def test_parameters_of_several_dtypes_share_a_group():
    model = small_model()
    model["norm"].double()
    model["head"].bfloat16()
    twin, problem = copy.deepcopy(model).float(), Problem(curvature=0.0)
    optimizer = AdamWL2SP(model.parameters(), lr=0.01, master_weights=True)
    train(model, optimizer, 10, problem=problem)
    train(twin, torch.optim.AdamW(twin.parameters(), lr=0.01), 10, problem=problem)
    weights = [optimizer.state[parameter].get("master", parameter) for parameter in model.parameters()]
    assert [weight.dtype for weight in weights] == [torch.float32] * 2 + [torch.float64] * 2 + [torch.float32] * 2
    assert_weights_close([weight.float() for weight in weights], twin.parameters(), 10, 0.01)


def small_and_large() -> nn.ModuleDict:
    return nn.ModuleDict({"small": nn.Linear(4, 4), "large": nn.Linear(512, 512)})


def test_saving_one_module_does_not_save_the_whole_model():
    model = small_and_large()
    train(model, AdamWL2SP(model.parameters()), 1)
    buffer = io.BytesIO()
    torch.save(model["small"].state_dict(), buffer)
    # 80 bytes of weights; the file's own records take a few KB, the other module would take 1 MB.
    assert buffer.getbuffer().nbytes < 16384


def test_saving_one_parameters_state_does_not_save_all_of_it():
    model = small_and_large()
    optimizer = AdamWL2SP(model.parameters())
    train(model, optimizer, 1)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict()["state"][0], buffer)
    assert buffer.getbuffer().nbytes < 16384


def test_safetensors_saves_the_model(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = small_and_large()
    train(model, AdamWL2SP(model.parameters()), 1)
    safetensors.save_file(model.state_dict(), tmp_path / "all.safetensors")
    safetensors.save_model(model["small"], tmp_path / "small.safetensors")
    loaded = safetensors.load_file(tmp_path / "all.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    assert (tmp_path / "small.safetensors").stat().st_size < 4096


def parameter(*shape: int, **kwargs) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, **kwargs), requires_grad=kwargs.get("dtype") != torch.int64)


INVALID = [
    ("lr", -1.0),
    ("lr", float("nan")),
    ("lr", torch.tensor([0.1, 0.2])),
    ("betas", (1.0, 0.999)),
    ("betas", (0.9, -0.5)),
    ("eps", -1e-8),
    ("weight_decay", -0.1),
    ("l2_sp", -0.1),
    ("max_grad_norm", 0.0),
    ("max_grad_norm", -1.0),
    ("anchors", "final"),
]
NAMES = {"lr": "learning rate", "betas": "beta", "eps": "epsilon"}
SHOWN = {(1.0, 0.999): "1.0", (0.9, -0.5): "-0.5"}


@pytest.mark.parametrize(("argument", "value"), INVALID, ids=str)
def test_bad_argument_is_refused_by_name_and_value(argument, value):
    with pytest.raises(ValueError, match=r"Invalid|must") as error:
        AdamWL2SP([parameter(4, 4)], **{argument: value})
    message = str(error.value).lower()
    assert argument in message or NAMES[argument] in message
    if not isinstance(value, Tensor):
        assert SHOWN.get(value, str(value)) in message


@pytest.mark.parametrize(("argument", "value"), INVALID[:8], ids=str)
def test_bad_argument_of_a_group_is_refused(argument, value):
    with pytest.raises(ValueError, match=r"Invalid|must"):
        AdamWL2SP([{"params": [parameter(4, 4)], argument: value}])


def test_anchors_of_another_shape_are_refused_by_parameter_name():
    with pytest.raises(ValueError, match=r"dense\.weight"):
        AdamWL2SP([("dense.weight", parameter(4, 4))], l2_sp=0.1, anchors={"dense.weight": torch.zeros(4, 5)})


def test_mapping_of_anchors_needs_names():
    with pytest.raises(ValueError, match="named_parameters"):
        AdamWL2SP([parameter(4, 4)], l2_sp=0.1, anchors={"dense.weight": torch.zeros(4, 4)})


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_parameter_that_is_not_real_is_refused_with_its_dtype(dtype):
    with pytest.raises(ValueError, match=str(dtype).removeprefix("torch.")):
        AdamWL2SP([parameter(4, 4, dtype=dtype)])


def test_two_parameters_in_the_same_memory_are_refused():
    memory = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="memory"):
        AdamWL2SP([nn.Parameter(memory), nn.Parameter(memory)])


def test_empty_parameter_list_is_refused_as_torch_refuses_it():
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamWL2SP([])


def test_sparse_gradient_is_refused():
    embedding = nn.Embedding(8, 4, sparse=True)
    optimizer = AdamWL2SP(embedding.parameters())

    def closure():
        embedding(torch.tensor([1, 2])).sum().backward()

    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step(closure)


def cast(model):
    model.double()


def replaced(model):
    model["head"].weight.data = torch.zeros(8, 16)


@pytest.mark.parametrize("move", [cast, replaced])
def test_parameter_moved_out_of_the_buffers_is_reported_by_name(move):
    model = small_model()
    optimizer = AdamWL2SP(model.named_parameters())
    train(model, optimizer, 1)
    move(model)
    optimizer.zero_grad()
    Problem().loss(model.parameters(), 1).backward()
    with pytest.raises(RuntimeError, match=r"dense\.weight" if move is cast else r"head\.weight"):
        optimizer.step()


def test_parameter_moved_out_of_the_buffers_is_reported_by_index_without_names():
    model = small_model()
    optimizer = AdamWL2SP(model.parameters())
    replaced(model)
    Problem().loss(model.parameters(), 1).backward()
    with pytest.raises(RuntimeError, match=r"\b4\b"):
        optimizer.step()


def largest_allocation(action: Callable[[], None]) -> int:
    """The largest number of bytes that `action` asks the CPU allocator for at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    events = profile.profiler.kineto_results.events()
    return max((event.nbytes() for event in events if event.name() == "[memory]"), default=0)


def test_the_profiler_sees_allocations_of_compiled_code():
    """Positive control of the tests that say there are none."""
    x = torch.randn(2**16)
    flipped = torch.compile(lambda x: x.flip(0).cumsum(0) + 1)
    flipped(x)
    assert largest_allocation(lambda: flipped(x)) >= 2**18


@pytest.mark.parametrize(
    ("dtype", "kwargs"),
    [
        (torch.float32, {"l2_sp": 0.1}),
        (torch.float32, {"max_grad_norm": 1.0}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"master_weights": True}),
    ],
    ids=["l2_sp", "clipped", "bf16", "bf16_master"],
)
def test_step_allocates_nothing_of_the_parameters_size(dtype, kwargs):
    weight = nn.Parameter(torch.randn(2**18).to(dtype))
    optimizer = AdamWL2SP([weight], static_grads=True, **kwargs)
    gradient = torch.randn_like(weight)

    def take_a_step():
        weight.grad.copy_(gradient)
        optimizer.step()

    weight.sum().backward()
    optimizer.step()
    take_a_step()
    assert largest_allocation(take_a_step) < weight.numel() // 8
