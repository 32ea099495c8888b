"""Dot products of two gradients: kernel in the interpreter and reference against exact sums, and finite checks."""

import math

import pytest
import torch
from torch import Tensor

from fsam_triton.kernels import reference, spec
from fsam_triton.kernels.segments import Plan, Segments
from tests.kernels.cases import FLOATS, LENGTHS, label, ordinary, pairwise
from tests.kernels.launches import launch_of

LENGTH = 2 * spec.CHUNK + 5
every_dtype = pytest.mark.parametrize("dtype", FLOATS)
# Several chunks and a tail, at an aligned address and at another.
SHAPES = [(2 * spec.CHUNK + 77,), (1,), (0,), (spec.CHUNK + 5,), (7,), (32,), (2 * spec.BLOCK,), (129, 33)]


@pytest.fixture(params=["kernel", "reference"])
def module(request, kernels):
    return kernels if request.param == "kernel" else reference


def gap(module, first: Tensor, second: Tensor) -> Tensor:
    """Of one segment: `first` are the other gradients."""
    plan = Plan([first.numel()], first.device)
    return module.gap(Segments(plan, [torch.zeros_like(first)], [second], other=[first]))


def terms(first: Tensor, second: Tensor) -> list[Tensor]:
    """a b, a^2 and b^2 in fp64."""
    a, b = first.double(), second.double()
    return [a * b, a * a, b * b]


def integers(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    """-2 to 2: a sum of 16384 of their products is an integer below 2**24, exact in fp32."""
    return torch.randint(-2, 3, (n,), generator=torch.Generator().manual_seed(seed)).to(dtype)


CASES = pairwise(dtype=list(FLOATS), n=LENGTHS)


def arguments(case: dict, make) -> tuple[Tensor, Tensor]:
    n, dtype = case["n"], FLOATS[case["dtype"]]
    return make(n, dtype, seed=n), make(n, dtype, seed=n + 1)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_sums_of_integers_are_exact(module, case):
    args = arguments(case, integers)
    assert gap(module, *args).tolist() == [float(products.sum()) for products in terms(*args)]


@pytest.mark.parametrize("case", CASES, ids=label)
def test_error_is_that_of_summing_a_chunk(module, case):
    """A relative error of u of every term for each of at most 16383 additions of a chunk, in whatever order, and for
    its product; the fp64 sum over chunks is exact next to that in fp32, and what fsum adds up is rounded in fp64."""
    args = arguments(case, ordinary)
    u = torch.finfo(reference.compute_dtype(args[0].dtype)).eps / 2
    additions = min(case["n"], spec.CHUNK) + math.ceil(case["n"] / spec.CHUNK)
    for actual, products in zip(gap(module, *args).tolist(), terms(*args), strict=True):
        exact, size = math.fsum(products.tolist()), math.fsum(products.abs().tolist())
        assert abs(actual - exact) <= (additions + 2) * u * size


@every_dtype
def test_sums_over_several_tensors_are_exact(module, dtype):
    """At any addresses, some of them without elements, one without a gradient."""
    launch = launch_of(dtype, ("weight", "grad", "other"), make=integers, shapes=SHAPES)
    segments, expected = launch.segments(), torch.zeros(3, dtype=torch.float64)
    for i, active in enumerate(segments.active):
        if active:
            parts = terms(segments.flat("other", i), segments.flat("grad", i))
            expected += torch.stack([part.sum() for part in parts])
    assert module.gap(segments).tolist() == expected.tolist()


@pytest.mark.parametrize("case", CASES, ids=label)
def test_exchanged_tensors_give_exchanged_norms_to_the_bit(module, case):
    first, second = arguments(case, ordinary)
    dot, first_sq, second_sq = gap(module, first, second).tolist()
    assert gap(module, second, first).tolist() == [dot, second_sq, first_sq]


@every_dtype
def test_dot_product_of_a_tensor_with_itself_is_its_norm_to_the_bit(module, dtype):
    values = ordinary(LENGTH, FLOATS[dtype], seed=1)
    assert len(set(gap(module, values, values.clone()).tolist())) == 1


def test_result_does_not_depend_on_zeros_after_the_end(kernels):
    """Nor on whether the length is one of whole chunks, which take another way."""
    whole = [ordinary(3 * spec.CHUNK, torch.float32, seed) for seed in (1, 2)]
    for tensor in whole:
        tensor[LENGTH:] = 0.0
    ragged = [tensor[:LENGTH] for tensor in whole]
    assert torch.equal(*(gap(kernels, *tensors) for tensors in (whole, ragged)))


def test_sums_over_whole_chunks_are_the_sums_of_theirs(module):
    """What other chunks there are does not change a chunk's sums, so neither does the number of processors."""
    first, second = (ordinary(3 * spec.CHUNK, torch.float32, seed) for seed in (1, 2))
    parts = [gap(module, a, b) for a, b in zip(first.split(spec.CHUNK), second.split(spec.CHUNK), strict=True)]
    # fp32 numbers, added in fp64: exact in any order.
    assert torch.equal(gap(module, first, second), torch.stack(parts).sum(0))


@pytest.mark.parametrize("place", [0, 1023, 16384, LENGTH - 1])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@every_dtype
def test_non_finite_number_shows_in_the_sums_it_is_part_of(module, dtype, bad, place):
    first, second = (ordinary(LENGTH, FLOATS[dtype], seed) for seed in (1, 2))
    spoilt = first.clone()
    spoilt[place] = bad
    for which, args in enumerate(((spoilt, second), (second, spoilt))):
        sums = gap(module, *args).tolist()
        assert [math.isfinite(value) for value in sums] == [False, which == 1, which == 0]
        assert math.isnan(sums[0]) == math.isnan(sums[1 + which]) == math.isnan(bad)


def test_infinity_times_zero_shows_as_nan(module):
    first, second = torch.ones(100), torch.ones(100)
    first[7], second[7] = math.inf, 0.0
    dot, first_sq, second_sq = gap(module, first, second).tolist()
    assert math.isnan(dot)
    assert (first_sq, second_sq) == (math.inf, 99.0)


def test_products_of_fp16_numbers_do_not_overflow(module):
    values = torch.full((5000,), 65504.0, dtype=torch.float16)
    assert gap(module, values, -values).tolist() == pytest.approx(
        [sign * 5000 * 65504.0**2 for sign in (-1, 1, 1)], rel=5002 * 2.0**-24
    )


@every_dtype
def test_result_is_three_fp64_numbers(module, dtype):
    sums = gap(module, *(ordinary(100, FLOATS[dtype], seed) for seed in (1, 2)))
    assert (sums.dtype, sums.shape) == (torch.float64, (3,))


def test_nothing_that_takes_part_sums_to_zero(module):
    grad = torch.ones(100)
    for lengths, grads in (([100], [None]), ([0], [grad[:0]]), ([], [])):
        parts = [grad[:n] for n in lengths]
        assert module.gap(Segments(Plan(lengths, grad.device), parts, grads, other=parts)).tolist() == [0.0, 0.0, 0.0]


def test_elements_past_a_ragged_end_do_not_count(module):
    whole = torch.full((2048,), math.nan)
    whole[:1100] = 1.0
    assert gap(module, whole[:1100], 2 * whole[:1100]).tolist() == [2200.0, 1100.0, 4400.0]
