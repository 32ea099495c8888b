"""Perturbations along what is made of gradient and average: kernel and C++ against the reference, and by hand."""

import math

import pytest
import torch
from torch import Tensor

from fsam_triton.kernels import build, cpu, reference, spec
from fsam_triton.kernels.directions import Along, direction
from fsam_triton.kernels.segments import Plan, Segments
from tests.kernels.cases import FLOATS, label, ordinary, pairwise, with_specials
from tests.kernels.launches import (
    Launch,
    any_integer,
    assert_as_the_reference,
    exact_square_root,
    keys,
    perturb_launch,
    scales,
)

RATE, FACTOR = 0.1, 0.75


def possible(kind: str, dtype: str, lane: str, **_) -> bool:
    if lane == "codes":
        return kind == "over_root" and dtype != "fp64"
    return lane == dtype or (lane == "fp32" and dtype != "fp64")


CASES = pairwise(
    possible,
    kind=list(spec.ALONG[1:]),
    dtype=list(FLOATS),
    lane=[*FLOATS, "codes"],
    adaptive=[False, True],
    masked=[False, True],
    scaled=[False, True],
)


def launch_along(kind: str, dtype: str, lane: str, adaptive=False, masked=False, scaled=False, **more) -> Launch:
    """A perturbation, with the lane of averages as "average" and the scales of codes as "unit"."""
    launch = perturb_launch(dtype, adaptive=adaptive, masked=masked, stochastic=False, **more)
    if lane == "codes":
        launch.lane("average", torch.uint8, 900, any_integer)
        launch.lanes["unit"] = scales(launch.plan.size, seed=8)
    else:
        launch.lane("average", FLOATS[lane], 900, more.get("make", ordinary))
        if kind == "over_root":
            launch.lanes["average"].abs_()
    launch.rest |= {"kind": kind, "grad_scale": torch.tensor([3.0]) if scaled else None}
    return launch


def along_of(launch: Launch) -> Along:
    coef = torch.tensor([[RATE, FACTOR]], dtype=launch.rest["compute"]).repeat(len(launch.plan.lengths), 1)
    coef[:, spec.DIRECTION.index("factor")] *= 1 + torch.arange(len(coef)) / 10
    return Along(
        launch.rest["kind"], launch.lanes["average"], coef, launch.lanes.get("unit"), launch.rest["grad_scale"]
    )


def perturb(module, launch: Launch) -> None:
    coef = torch.zeros(len(launch.plan.lengths), len(spec.PERTURB), dtype=launch.rest["compute"])
    # The norm of one segment was not finite.
    coef[:, spec.PERTURB.index("scale")] = 0.03 * torch.arange(len(coef))
    flags = (launch.rest["adaptive"], False, False, None, along_of(launch))
    module.perturb_(launch.segments(), launch.lanes["backup"], launch.lanes["mask"], coef, keys(len(coef)), *flags)


@pytest.mark.parametrize("make", [ordinary, with_specials], ids=["ordinary", "special"])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_kernel_equals_the_reference_to_the_bit(kernels, case, make):
    shapes = [(2 * spec.BLOCK + 77,), (1,), (0,), (spec.BLOCK + 5,), (7,), (32,), (129, 33)]
    assert_as_the_reference(perturb, launch_along(**case, make=make, shapes=shapes), kernels)


@pytest.mark.skipif(not build.available(), reason="no C++ compiler")
@pytest.mark.parametrize("case", CASES, ids=label)
def test_compiled_code_equals_the_reference_to_the_bit(case):
    for make in (ordinary, with_specials):
        assert_as_the_reference(perturb, launch_along(**case, make=make), cpu)


def directions_of(launch: Launch) -> list[tuple[Tensor, Tensor]]:
    """Of each segment that takes part the direction in fp64, and its counted elements."""
    along, segments, out = along_of(launch), launch.segments(), []
    for i, active in enumerate(segments.active):
        if active and launch.plan.lengths[i]:
            average = launch.plan.part(along.lane, i).double()
            d, _ = direction(along.kind, segments.flat("grad", i).double(), average, along.coef[i].double(), None)
            out.append((d, segments.flat("weight", i).double()))
    return out


@pytest.fixture(params=["kernel", "compiled", "reference"])
def module(request, kernels):
    if request.param == "compiled" and not build.available():
        pytest.skip("no C++ compiler")
    return {"kernel": kernels, "compiled": cpu, "reference": reference}[request.param]


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("kind", spec.ALONG[1:])
def test_norm_is_that_of_the_direction(module, kind, adaptive):
    """Terms are positive: u for each addition of a chunk and each of at most seven operations that make a term; where
    an average is subtracted their absolute error is that of what is subtracted, 2 at most for standard normal ones
    times the largest of some 1e5, so that u counts a hundred times."""
    launch = launch_along(kind, "fp32", "fp32", adaptive=adaptive)
    exact = math.fsum(float(((d * w) if adaptive else d).square().sum()) for d, w in directions_of(launch))
    actual = float(module.norm_sq(launch.segments(), adaptive, None, None, along_of(launch)))
    assert abs(actual - exact) <= (spec.CHUNK + 100) * 2.0**-24 * exact


def one(module, kind: str, grad: Tensor, average: Tensor, scale: float = 1.0, grad_scale=None) -> tuple[Tensor, Tensor]:
    """The change of zero weights, and the average afterwards."""
    plan, weight = Plan([grad.numel()], grad.device), torch.zeros_like(grad)
    lane, backup = (torch.zeros(plan.size) for _ in range(2))
    plan.part(lane, 0).copy_(average)
    coef, about = torch.tensor([[scale, 0.0]]), torch.tensor([[RATE, FACTOR]])
    key = torch.zeros(1, dtype=torch.int32)
    along = Along(kind, lane, about, None, grad_scale)
    module.perturb_(Segments(plan, [weight], [grad]), backup, None, coef, key, False, False, False, None, along)
    return weight, plan.part(lane, 0).clone()


def test_average_is_followed_and_subtracted(module):
    grad, average = torch.tensor([1.0, 2.0, -4.0]), torch.tensor([0.0, 2.0, 4.0])
    d, after = one(module, "less_average", grad, average)
    expected = 0.9 * average + 0.1 * grad
    torch.testing.assert_close(after, expected)
    torch.testing.assert_close(d, grad - FACTOR * expected)


def test_root_counts_the_gradient_at_hand_and_the_average_is_only_read(module):
    grad, average = torch.tensor([1.0, 2.0, -4.0]), torch.tensor([0.0, 2.0, 4.0])
    d, after = one(module, "over_root", grad, average)
    torch.testing.assert_close(d, grad / ((0.9 * average + 0.1 * grad.square()).sqrt() + FACTOR))
    assert torch.equal(after, average)


@pytest.mark.parametrize("kind", spec.ALONG[1:])
def test_powers_of_two_of_a_grad_scaler_change_nothing(module, kind):
    grad, average = ordinary(100, torch.float32, seed=1), ordinary(100, torch.float32, seed=2).abs()
    expected = one(module, kind, grad, average)
    actual = one(module, kind, grad * 1024, average, grad_scale=torch.tensor([1024.0]))
    assert all(map(torch.equal, actual, expected))


def test_average_stays_where_the_norm_or_a_gradient_is_not_finite(module):
    average = torch.ones(3)
    grad = torch.tensor([1.0, math.inf, math.nan])
    d, after = one(module, "less_average", grad, average, scale=0.0)
    assert torch.equal(after, average)
    assert not d.any()
    d, after = one(module, "less_average", grad, average)
    assert torch.equal(after[1:], average[1:])
    assert not d[1:].any()


@pytest.mark.parametrize("kind", spec.ALONG[1:])
@pytest.mark.parametrize("bad", [math.inf, math.nan, 1e30])
def test_what_is_not_finite_or_has_no_finite_square_shows_in_the_norm(module, kind, bad):
    grad = ordinary(100, torch.float32, seed=1)
    grad[57] = bad
    plan = Plan([100], grad.device)
    along = Along(kind, torch.zeros(plan.size), torch.tensor([[RATE, FACTOR]]))
    total = module.norm_sq(Segments(plan, [grad], [grad]), False, None, None, along)
    assert not math.isfinite(float(total))


def test_zero_over_a_root_of_zero_is_zero():
    d, _ = direction("over_root", torch.zeros(3), torch.zeros(3), torch.tensor([0.1, 0.0]), None)
    assert torch.equal(d, torch.zeros(3))
    assert exact_square_root(torch.zeros(1)) == 0
