"""AdamWL2SP's numbers: those of torch.optim.AdamW, and with L2-SP and clipping those of the fp64 reference."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_optimizers import optim_inputs_func_adamw

from fsam_triton import AdamWL2SP
from tests.fp64_optimizers import ReferenceAdamW
from tests.optim.by_hand import assert_states_close
from tests.problem import Problem, assert_weights_close, small_model
from tests.training import assert_same_bits, train

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = [torch.float32, torch.float64]


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
def test_hundred_steps_equal_torch_adamw(description, kwargs, dtype):
    model, twin = small_model(dtype), small_model(dtype)
    kwargs = copy.deepcopy(kwargs)
    optimizer = AdamWL2SP(model.parameters(), **kwargs)
    # torch takes capturable on accelerators only; on the CPU it stands for the same numbers.
    expected = torch.optim.AdamW(twin.parameters(), **{k: v for k, v in kwargs.items() if k != "capturable"})
    # Gradients that do not depend on the weights feed no rounding error back.
    train(model, optimizer, 100, problem=Problem(curvature=0.0))
    train(twin, expected, 100, problem=Problem(curvature=0.0))
    bound = {"steps": 100, "lr": float(kwargs.get("lr", 1e-3)), "extra": low_precision_constants(100, kwargs)}
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


def test_anchors_are_a_copy_of_the_weights_or_of_the_mapping_at_the_first_update():
    model, twin = small_model(), small_model()
    # The twin's own weights, which training changes.
    mapping = dict(twin.named_parameters())
    optimizer = AdamWL2SP(model.named_parameters(), lr=0.01, l2_sp=0.5)
    expected = AdamWL2SP(twin.named_parameters(), lr=0.01, l2_sp=0.5, anchors=mapping)
    for trained, each in ((model, optimizer), (twin, expected)):
        train(trained, each, 3)
        # Parameters in another order are followed anew.
        each.param_groups[0]["params"].reverse()
        each.param_groups[0]["param_names"].reverse()
        each.state.clear()
        train(trained, each, 3, start=3)
    assert_same_bits(model, twin)
    for name, p in model.named_parameters():
        assert torch.equal(optimizer.state[p]["anchor"], small_model().get_parameter(name))


@pytest.mark.parametrize("anchors", ["initial", "mapping"])
def test_weights_loaded_before_the_first_update_are_anchors_only_if_these_are_the_initial_weights(anchors):
    """As DDP broadcasts them after the optimizer was made."""
    model, given = small_model(), anchors_of(small_model(seed=7))
    chosen = "initial" if anchors == "initial" else given
    optimizer = AdamWL2SP(model.named_parameters(), lr=0.01, l2_sp=0.5, anchors=chosen)
    loaded = small_model(seed=1)
    model.load_state_dict(loaded.state_dict())
    train(model, optimizer, 1)
    expected = anchors_of(loaded) if anchors == "initial" else given
    for name, p in model.named_parameters():
        assert torch.equal(optimizer.state[p]["anchor"], expected[name])


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
        scheduler = make(optimizer)
        for step in range(40):
            train(model, optimizer, 1, start=step)
            scheduler.step()
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
