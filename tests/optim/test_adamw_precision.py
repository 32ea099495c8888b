"""AdamWL2SP on 16-bit parameters: stochastic rounding, master weights, types of the state; and counts of steps."""

import copy

import pytest
import torch
from torch import nn

from fsam_triton import AdamWL2SP
from tests.optim.by_hand import every_state, halves
from tests.problem import Problem, assert_weights_close, small_model
from tests.training import largest_allocation, train

pytestmark = pytest.mark.usefixtures("one_thread")


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
    masters = [optimizer.master_weight(parameter) for parameter in model.parameters()]
    assert all(master.dtype == torch.float32 for master in masters)
    assert_weights_close(masters, twin.parameters(), 50, 0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameter_is_its_master_rounded_to_nearest(dtype):
    model = small_model(dtype)
    optimizer = AdamWL2SP(model.parameters(), lr=0.01, master_weights=True)
    train(model, optimizer, 5)
    for parameter in model.parameters():
        assert torch.equal(parameter, optimizer.master_weight(parameter).to(dtype))


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
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"} | ({"remainder"} if master_weights else set())
        assert state["step"].dtype == torch.float32
        assert state["step"].shape == ()
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].dtype == moments
            assert state[name].shape == parameter.shape


DOORS = {
    "in_place": lambda p: p.mul_(0.5),
    "data_in_place": lambda p: p.data.clamp_(-0.05, 0.05),
    "data_replaced": lambda p: setattr(p, "data", torch.full_like(p, 0.25)),
    "copy_": lambda p: p.copy_(torch.full_like(p, -0.75)),
    "set_": lambda p: p.set_(torch.full_like(p, 0.125)),
    "half_of_them": lambda p: p.view(-1)[::2].zero_(),
}


@pytest.mark.parametrize("write", DOORS.values(), ids=DOORS.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_are_what_somebody_writes_into_the_parameters(dtype, write):
    """To within what rounding had lost of the weights before, at most half a step of the 16-bit type."""
    model = small_model(dtype)
    optimizer = AdamWL2SP(model.parameters(), lr=0.01, master_weights=True)
    train(model, optimizer, 3)
    with torch.no_grad():
        for p in model.parameters():
            write(p)
    for p in model.parameters():
        # Half a step of a weight of at most 1 in magnitude.
        bound = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(optimizer.master_weight(p), p.float(), rtol=0, atol=bound)


@pytest.mark.parametrize("write", DOORS.values(), ids=DOORS.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_goes_on_from_what_somebody_writes_into_the_parameters(dtype, write):
    model = small_model(dtype)
    optimizer = AdamWL2SP(model.parameters(), lr=0.01, weight_decay=0.0, master_weights=True)
    train(model, optimizer, 3)
    with torch.no_grad():
        for p in model.parameters():
            write(p)
    before = [p.detach().float() for p in model.parameters()]
    train(model, optimizer, 1, start=3)
    for p, weight in zip(model.parameters(), before, strict=True):
        # Adam's quotient is at most 3 here (see `rounding_bound`); two roundings of a weight of at most 1.
        assert (p.float() - weight).abs().max() <= 0.03 + torch.finfo(dtype).eps


def test_copy_of_a_master_weight_is_nobodys_memory():
    model = small_model(torch.bfloat16)
    optimizer = AdamWL2SP(model.parameters(), lr=0.01, master_weights=True)
    train(model, optimizer, 1)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        optimizer.master_weight(p).fill_(3.0)
    assert all(map(torch.equal, model.parameters(), before))


def test_parameters_of_several_dtypes_share_a_group():
    model = small_model()
    model["norm"].double()
    model["head"].bfloat16()
    twin, problem = copy.deepcopy(model).float(), Problem(curvature=0.0)
    optimizer = AdamWL2SP(model.parameters(), lr=0.01, master_weights=True)
    train(model, optimizer, 10, problem=problem)
    train(twin, torch.optim.AdamW(twin.parameters(), lr=0.01), 10, problem=problem)
    weights = [optimizer.master_weight(parameter) for parameter in model.parameters()]
    assert [weight.dtype for weight in weights] == [torch.float32] * 2 + [torch.float64] * 2 + [torch.float32] * 2
    assert_weights_close([weight.float() for weight in weights], twin.parameters(), 10, 0.01)


@every_state
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_steps_are_counted_and_numbers_computed_whatever_the_default_type(kind, default):
    """bf16 can count to 256 only."""
    results = []
    for name, dtype in (("default", default), ("usual", torch.float32)):
        torch.set_default_dtype(dtype)
        try:
            p = nn.Parameter(torch.ones(33, dtype=torch.float32))
            optimizer = kind.ours([p], lr=1e-3)
            for step in range(300):
                for half in halves(optimizer):
                    p.grad = torch.full_like(p, 0.1 + step / 1000)
                    half()
                if step == 280:
                    optimizer.load_state_dict(optimizer.state_dict())
        finally:
            torch.set_default_dtype(torch.float32)
        assert float(optimizer.state[p]["step"]) == 300, name
        results.append(p.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_hundreds_of_steps_equal_torch_adamw_whatever_the_default_type(default):
    torch.set_default_dtype(default)
    try:
        model, twin = small_model(torch.float32), small_model(torch.float32)
        # Gradients that do not depend on the weights feed no rounding error back.
        problem = Problem(curvature=0.0)
        train(model, AdamWL2SP(model.parameters(), lr=1e-3), 300, problem=problem)
        train(twin, torch.optim.AdamW(twin.parameters(), lr=1e-3), 300, problem=problem)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_weights_close(model.parameters(), twin.parameters(), 300, 1e-3, curvature=0.0)


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
    optimizer = AdamWL2SP([weight], **kwargs)
    gradient = torch.randn_like(weight)

    def take_a_step():
        weight.grad.copy_(gradient)
        optimizer.step()

    weight.sum().backward()
    optimizer.step()
    take_a_step()
    assert largest_allocation(take_a_step) < weight.numel() // 8
