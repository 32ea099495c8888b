"""The norm of all gradients: kernel in the interpreter and reference against exact sums, and its finite check."""

import math

import pytest
import torch
from torch import Tensor

from fsam_triton.kernels import cpu, reference, spec
from fsam_triton.kernels.segments import Plan, Segments
from tests.kernels.cases import FLOATS, LENGTHS, label, ordinary, pairwise, random_mask
from tests.kernels.launches import launch_of

every_dtype = pytest.mark.parametrize("dtype", FLOATS)
# Several chunks and a tail, at an aligned address and at another.
SHAPES = [(2 * spec.CHUNK + 77,), (1,), (0,), (spec.CHUNK + 5,), (7,), (32,), (2 * spec.BLOCK,), (129, 33)]


@pytest.fixture(params=["kernel", "reference"])
def module(request, kernels):
    return kernels if request.param == "kernel" else reference


def norm_sq(module, grad: Tensor, weight: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Of one gradient, scaled by the weights if there are any."""
    weights = [torch.zeros_like(grad) if weight is None else weight]
    return module.norm_sq(Segments(Plan([grad.numel()], grad.device), weights, [grad]), weight is not None, mask)


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
def test_sum_of_integers_is_exact(module, case):
    args = arguments(case, integers)
    assert float(norm_sq(module, *args)) == float(terms(*args).sum())


@pytest.mark.parametrize("case", CASES, ids=label)
def test_error_is_that_of_summing_a_chunk(module, case):
    """All terms are positive: a relative error of u for each of at most 16383 additions of a chunk, in whatever order,
    and for each of three products; the fp64 sum over chunks is exact next to that in fp32."""
    args = arguments(case, ordinary)
    u = torch.finfo(reference.compute_dtype(args[0].dtype)).eps / 2
    additions = min(case["n"], spec.CHUNK) + math.ceil(case["n"] / spec.CHUNK)
    exact = math.fsum(terms(*args).tolist())
    assert abs(float(norm_sq(module, *args)) - exact) <= (additions + 3) * u * exact


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
@every_dtype
def test_sum_over_several_tensors_is_exact(module, dtype, adaptive, masked):
    """At any addresses, some of them without elements, one without a gradient."""
    launch = launch_of(dtype, ("weight", "grad"), make=integers, shapes=SHAPES)
    mask = random_mask(launch.plan.size, seed=3) if masked else None
    segments, expected = launch.segments(), 0.0
    for i, active in enumerate(segments.active):
        if active:
            weight = segments.flat("weight", i) if adaptive else None
            words = None if mask is None else launch.plan.words(mask, i)
            expected += float(terms(segments.flat("grad", i), weight, words).sum())
    assert float(module.norm_sq(segments, adaptive, mask)) == expected


@every_dtype
def test_two_calls_give_the_same_bits(module, dtype):
    grad = ordinary(2 * spec.CHUNK + 5, FLOATS[dtype], seed=1)
    assert torch.equal(norm_sq(module, grad), norm_sq(module, grad.clone()))


@every_dtype
def test_sum_does_not_depend_on_the_address(kernels, dtype):
    """Whole chunks at an aligned address take another way than others."""
    grad = ordinary(spec.CHUNK + 3000, FLOATS[dtype], seed=1)
    elsewhere = torch.zeros(grad.numel() + 1, dtype=grad.dtype)[1:]
    elsewhere.copy_(grad)
    assert elsewhere.data_ptr() % 16
    assert torch.equal(norm_sq(kernels, grad), norm_sq(kernels, elsewhere))


def test_sum_over_whole_chunks_is_the_sum_of_their_sums(module):
    """What other chunks there are does not change a chunk's sum, so neither does the number of processors."""
    grad = ordinary(3 * spec.CHUNK, torch.float32, seed=1)
    parts = [float(norm_sq(module, part)) for part in grad.split(spec.CHUNK)]
    # fp32 numbers, added in fp64: exact in any order.
    assert float(norm_sq(module, grad)) == sum(parts)


@pytest.mark.parametrize("place", [0, 1023, 16384, 2 * 16384 + 4])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@every_dtype
def test_non_finite_gradient_shows(module, dtype, bad, place):
    grad = ordinary(2 * 16384 + 5, FLOATS[dtype], seed=1)
    grad[place] = bad
    total = float(norm_sq(module, grad))
    assert math.isnan(total) if math.isnan(bad) else total == math.inf


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@every_dtype
def test_non_finite_gradient_outside_the_mask_shows_too(module, dtype, bad, adaptive):
    """It is the finite check of the whole gradient."""
    grad, weight = (make(4999, FLOATS[dtype], seed=i) for i, make in enumerate((integers, ordinary)))
    mask = random_mask(4999, seed=3)
    outside = (~reference.unpack_mask(mask, grad)).nonzero().flatten()
    grad[outside[len(outside) // 2]] = bad
    assert not math.isfinite(float(norm_sq(module, grad, weight if adaptive else None, mask)))


def test_infinite_gradient_of_a_zero_weight_shows_as_nan(module):
    grad, weight = torch.ones(100), torch.ones(100)
    grad[7], weight[7] = math.inf, 0.0
    assert math.isnan(float(norm_sq(module, grad, weight)))


def test_squares_of_fp16_gradients_do_not_overflow(module):
    grad = torch.full((5000,), 65504.0, dtype=torch.float16)
    assert float(norm_sq(module, grad)) == pytest.approx(5000 * 65504.0**2, rel=5003 * 2.0**-24)


def test_moments_of_16_bit_weights_have_the_norm_that_they_have(module):
    """Momentum-SAM's direction is in fp32 where the weights are not."""
    grad = ordinary(3000, torch.float32, seed=1)
    segments = Segments(Plan([3000], grad.device), [torch.zeros(3000, dtype=torch.bfloat16)], [grad])
    assert float(module.norm_sq(segments, False, None)) == float(norm_sq(module, grad))


@every_dtype
def test_result_is_an_fp64_scalar(module, dtype):
    total = norm_sq(module, ordinary(100, FLOATS[dtype], seed=1))
    assert (total.dtype, total.shape) == (torch.float64, ())


def test_nothing_that_takes_part_sums_to_zero(module):
    grad = torch.ones(100)
    for lengths, grads in (([100], [None]), ([0], [grad[:0]]), ([], [])):
        segments = Segments(Plan(lengths, grad.device), [grad[:n] for n in lengths], grads)
        assert float(module.norm_sq(segments, False, None)) == 0.0


def test_elements_past_a_ragged_end_do_not_count(module):
    whole = torch.full((2048,), math.nan)
    whole[:1100] = 1.0
    assert float(norm_sq(module, whole[:1100])) == 1100.0


# -- by segment --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["kernel", "C++", "reference"])
def any_module(request, kernels):
    return {"kernel": kernels, "C++": cpu, "reference": reference}[request.param]


@every_dtype
def test_sum_of_each_tensor_is_exact(any_module, dtype):
    segments = launch_of(dtype, ("weight", "grad"), make=integers, shapes=SHAPES).segments()
    expected = [
        float(terms(segments.flat("grad", i), None, None).sum()) if active else 0.0
        for i, active in enumerate(segments.active)
    ]
    assert any_module.norms_sq(segments).tolist() == expected


def test_sums_of_tensors_that_take_no_part_are_zero(any_module):
    grad = torch.ones(100)
    segments = Segments(Plan([100, 0], grad.device), [grad, grad[:0]], [None, None])
    assert any_module.norms_sq(segments).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_non_finite_gradient_shows_in_the_sum_of_its_tensor_alone(any_module, bad):
    first, second = torch.ones(spec.CHUNK + 5), torch.ones(7)
    first[spec.CHUNK + 1] = bad
    plan = Plan([len(first), len(second)], first.device)
    sums = any_module.norms_sq(Segments(plan, [first, second], [first, second])).tolist()
    assert not math.isfinite(sums[0])
    assert sums[1] == 7.0
