"""The gradient norm: the kernel in the interpreter and the reference against exact sums, and its finite check."""

import math

import pytest
import torch
from torch import Tensor

from fsam_triton.kernels import grad_norm, reference
from tests.kernel_cases import FLOATS, LENGTHS, label, ordinary, pairwise, random_mask


@pytest.fixture(params=["kernel", "reference"])
def grad_norm_sq(request, interpret):
    """`grad_norm_sq(grad, weight, mask)`, as the kernel and as the reference do it."""
    if request.param == "kernel":
        return lambda *args: interpret(grad_norm.grad_norm_sq, *args)
    return reference.grad_norm_sq


def terms(grad: Tensor, weight: Tensor | None, mask: Tensor | None) -> Tensor:
    """(s g)^2 of the counted elements in fp64."""
    x = grad.double() if weight is None else grad.double() * weight.double()
    return (x if mask is None else x[reference.unpack_mask(mask, x)]).square()


def integers(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    """-2 to 2: a sum of 16384 of their squares, even of products of two, is an integer below 2**24, exact in fp32."""
    return torch.randint(-2, 3, (n,), generator=torch.Generator().manual_seed(seed)).to(dtype)


CASES = pairwise(dtype=list(FLOATS), n=LENGTHS, adaptive=[False, True], masked=[False, True])


def arguments(case: dict, make) -> tuple[Tensor, Tensor | None, Tensor | None]:
    n, dtype = case["n"], FLOATS[case["dtype"]]
    weight = make(n, dtype, seed=n + 1) if case["adaptive"] else None
    return make(n, dtype, seed=n), weight, random_mask(n, seed=n + 2) if case["masked"] else None


@pytest.mark.parametrize("case", CASES, ids=label)
def test_sum_of_integers_is_exact(grad_norm_sq, case):
    args = arguments(case, integers)
    assert float(grad_norm_sq(*args)) == float(terms(*args).sum())


@pytest.mark.parametrize("case", CASES, ids=label)
def test_error_is_that_of_summing_a_chunk(grad_norm_sq, case):
    """All terms are positive: a relative error of u for each of at most 16383 additions of a chunk, in whatever order,
    and for each of three products; the fp64 sum over chunks is exact next to that in fp32."""
    args = arguments(case, ordinary)
    u = torch.finfo(reference.compute_dtype(args[0].dtype)).eps / 2
    additions = min(case["n"], reference.CHUNK) + math.ceil(case["n"] / reference.CHUNK)
    exact = math.fsum(terms(*args).tolist())
    assert abs(float(grad_norm_sq(*args)) - exact) <= (additions + 3) * u * exact


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
def test_two_calls_give_the_same_bits(grad_norm_sq, dtype):
    grad = ordinary(2 * 16384 + 5, dtype, seed=1)
    assert torch.equal(grad_norm_sq(grad, None, None), grad_norm_sq(grad.clone(), None, None))


def test_sum_over_whole_chunks_is_the_sum_of_their_sums(grad_norm_sq):
    """What other chunks there are does not change a chunk's sum, so neither does the number of processors."""
    grad = ordinary(3 * reference.CHUNK, torch.float32, seed=1)
    parts = [float(grad_norm_sq(part, None, None)) for part in grad.split(reference.CHUNK)]
    # fp32 numbers, added in fp64: exact in any order.
    assert float(grad_norm_sq(grad, None, None)) == sum(parts)


@pytest.mark.parametrize("place", [0, 1023, 16384, 2 * 16384 + 4])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
def test_non_finite_gradient_shows(grad_norm_sq, dtype, bad, place):
    grad = ordinary(2 * 16384 + 5, dtype, seed=1)
    grad[place] = bad
    total = float(grad_norm_sq(grad, None, None))
    assert math.isnan(total) if math.isnan(bad) else total == math.inf


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
def test_non_finite_gradient_outside_the_mask_shows_too(grad_norm_sq, dtype, bad, adaptive):
    """It is the finite check of the whole gradient."""
    grad, weight = integers(4999, dtype, seed=1), ordinary(4999, dtype, seed=2) if adaptive else None
    mask = random_mask(4999, seed=3)
    outside = (~reference.unpack_mask(mask, grad)).nonzero().flatten()
    grad[outside[len(outside) // 2]] = bad
    assert not math.isfinite(float(grad_norm_sq(grad, weight, mask)))


def test_infinite_gradient_of_a_zero_weight_shows_as_nan(grad_norm_sq):
    grad, weight = torch.ones(100), torch.ones(100)
    grad[7], weight[7] = math.inf, 0.0
    assert math.isnan(float(grad_norm_sq(grad, weight, None)))


def test_squares_of_fp16_gradients_do_not_overflow(grad_norm_sq):
    grad = torch.full((5000,), 65504.0, dtype=torch.float16)
    assert float(grad_norm_sq(grad, None, None)) == pytest.approx(5000 * 65504.0**2, rel=5003 * 2.0**-24)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
def test_result_is_an_fp64_scalar(grad_norm_sq, dtype):
    total = grad_norm_sq(ordinary(100, dtype, seed=1), None, None)
    assert (total.dtype, total.shape) == (torch.float64, ())


def test_no_elements_sum_to_zero(grad_norm_sq):
    assert float(grad_norm_sq(torch.empty(0), None, None)) == 0.0


def test_elements_past_a_ragged_end_do_not_count(grad_norm_sq):
    whole = torch.full((2048,), math.nan)
    whole[:1100] = 1.0
    assert float(grad_norm_sq(whole[:1100], None, None)) == 1100.0
