"""The perturbation's kernel in the interpreter against the reference, to the bit, and what both promise."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from fsam_triton.kernels import reference, spec
from fsam_triton.kernels.segments import Plan, Segments
from tests.kernels.cases import (
    FLOATS,
    any_bits,
    assert_same_bits,
    assert_uncorrelated,
    label,
    ordinary,
    random_mask,
    used_keys,
    with_specials,
)
from tests.kernels.launches import PERTURB, assert_as_the_reference, perturb, perturb_launch
from tests.kernels.one_tensor import perturbed

every_dtype = pytest.mark.parametrize("dtype", FLOATS)
narrow = pytest.mark.parametrize("dtype", ["bf16", "fp16"])
# Whole blocks and a tail, at an aligned address and at others; one element, none, a multiple of a word of the mask.
SHAPES = [(2 * spec.BLOCK + 77,), (1,), (0,), (spec.BLOCK + 5,), (7,), (32,), (2 * spec.BLOCK,), (129, 33)]


@pytest.fixture(params=["kernel", "reference"])
def module(request, kernels):
    return kernels if request.param == "kernel" else reference


@pytest.mark.parametrize("make", [ordinary, with_specials], ids=["ordinary", "special"])
@pytest.mark.parametrize("case", PERTURB, ids=label)
def test_kernel_equals_the_reference_to_the_bit(kernels, case, make):
    """Both do the same IEEE operations in the same order, none of them fused: there is nothing to tolerate."""
    assert_as_the_reference(perturb, perturb_launch(**case, make=make, shapes=SHAPES), kernels)


@pytest.mark.parametrize("stochastic", [False, True])
@narrow
def test_kernel_equals_the_reference_for_any_bit_pattern(kernels, dtype, stochastic):
    launch = perturb_launch(dtype, stochastic=stochastic, make=any_bits, shapes=[(1 << 15,), (3, 5)])
    launch.rest["scale"] = 1.0
    assert_as_the_reference(perturb, launch, kernels)


@pytest.mark.slow
def test_many_small_tensors_are_perturbed_once_each(kernels):
    sizes = torch.randint(0, 200, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    assert_as_the_reference(perturb, perturb_launch("bf16", shapes=[*[(n,) for n in sizes], (4, 3)]), kernels)


# -- one tensor --------------------------------------------------------------------------------------------------------


@every_dtype
def test_zero_scale_leaves_the_weights_alone_whatever_the_gradient_holds(module, dtype):
    weight, grad = with_specials(1000, FLOATS[dtype], seed=1), with_specials(1000, FLOATS[dtype], seed=2)
    # x + 0 is x but for -0 + 0.
    weight[weight == 0] = 0.0
    assert_same_bits(perturbed(module, weight, grad, 0.0)[0], weight)


@every_dtype
def test_coordinate_with_a_non_finite_gradient_does_not_move(module, dtype):
    weight, grad = ordinary(1000, FLOATS[dtype], seed=1), with_specials(1000, FLOATS[dtype], seed=2)
    after, _ = perturbed(module, weight, grad, 0.5)
    assert_same_bits(after[~grad.isfinite()], weight[~grad.isfinite()])
    assert after.isfinite().all()


@every_dtype
def test_coordinates_outside_the_mask_keep_their_bits(module, dtype):
    weight, grad = with_specials(4999, FLOATS[dtype], seed=1), ordinary(4999, FLOATS[dtype], seed=2)
    weight[weight == 0] = 0.0
    mask = random_mask(4999, seed=3)
    outside = ~reference.unpack_mask(mask, weight)
    after, _ = perturbed(module, weight, grad, 0.5, mask=mask)
    assert_same_bits(after[outside], weight[outside])
    assert not torch.equal(after[~outside], weight[~outside])


@every_dtype
def test_backup_is_the_clean_weights_to_the_bit(module, dtype):
    weight, grad = with_specials(4999, FLOATS[dtype], seed=1), ordinary(4999, FLOATS[dtype], seed=2)
    assert_same_bits(perturbed(module, weight, grad, 0.5)[1], weight)


@narrow
def test_random_numbers_depend_on_the_key_alone(module, dtype):
    weight, grad = ordinary(4999, FLOATS[dtype], seed=1), ordinary(4999, FLOATS[dtype], seed=2)
    first, again, other = (perturbed(module, weight, grad, 1e-3, key=key)[0] for key in (1, 1, 2**31 - 1))
    assert_same_bits(first, again)
    assert not torch.equal(first, other)


def test_nothing_that_takes_part_is_no_work(module):
    weight = ordinary(100, torch.float32, seed=1)
    for lengths, tensors, grads in (([100], [weight], [None]), ([0], [weight[:0]], [weight[:0]]), ([], [], [])):
        plan = Plan(lengths, weight.device)
        coef, key = torch.ones(len(lengths), len(spec.PERTURB)), torch.zeros(len(lengths), dtype=torch.int32)
        module.perturb_(Segments(plan, tensors, grads), torch.zeros(plan.size), None, coef, key, False, True, False)
    assert_same_bits(weight, ordinary(100, torch.float32, seed=1))


# -- a random part of the coordinates ----------------------------------------------------------------------------------


def moved(module, n: int, key: int, beta: float, mask: Tensor | None = None, dtype="fp32") -> Tensor:
    """Which coordinates of n move with that probability."""
    zeros = torch.zeros(n, dtype=FLOATS[dtype])
    return perturbed(module, zeros, torch.ones_like(zeros), 1.0, key=key, mask=mask, beta=beta)[0].bool()


KEYS = used_keys(4)
BETAS = [2.0**-15, 0.125, 0.5, 0.90625, 1 - 2.0**-15]


@pytest.mark.parametrize("beta", BETAS)
def test_share_that_moves_is_the_probability(kernels, beta):
    """n Bernoulli trials: within five standard deviations. The kernel's choice is the reference's, to the bit."""
    n = 1 << 21
    for key in KEYS:
        count = int(moved(reference, n, key, beta).sum())
        assert abs(count - n * beta) <= 5 * math.sqrt(n * beta * (1 - beta))
    assert torch.equal(*(moved(module, 20_003, KEYS[2], beta) for module in (reference, kernels)))


def test_probability_is_exact_over_all_random_numbers():
    """Of the 2**15 values of the noise as many are below the threshold as beta says."""
    every = reference.uniform(torch.arange(-32768, 32768, dtype=torch.int32))
    for part in (1, 2, 1000, 16384, 32767, 32768):
        beta = torch.tensor(part * 2.0**-15, dtype=torch.float64)
        assert int((every < (beta - 0.5).float()).sum()) == 2 * part


@pytest.mark.parametrize("beta", [0.0, 1.0])
@every_dtype
def test_probability_of_zero_moves_nothing_and_of_one_everything(module, dtype, beta):
    weight, grad = with_specials(4999, FLOATS[dtype], seed=1), with_specials(4999, FLOATS[dtype], seed=2)
    weight[weight == 0] = 0.0
    expected = perturbed(module, weight, grad, 0.5 * beta)
    for actual, tensor in zip(perturbed(module, weight, grad, 0.5, beta=beta), expected, strict=True):
        assert_same_bits(actual, tensor)


@every_dtype
def test_chosen_coordinates_move_as_without_a_choice_and_the_others_keep_their_bits(module, dtype):
    weight, grad = with_specials(4999, FLOATS[dtype], seed=1), with_specials(4999, FLOATS[dtype], seed=2)
    weight[weight == 0] = 0.0
    chosen = moved(reference, 4999, KEYS[2], 0.5)
    everything, _ = perturbed(module, weight, grad, 0.5, key=KEYS[2])
    after, backup = perturbed(module, weight, grad, 0.5, key=KEYS[2], beta=0.5)
    assert_same_bits(after[chosen], everything[chosen])
    assert_same_bits(after[~chosen], weight[~chosen])
    assert_same_bits(backup, weight)


def test_choice_depends_on_the_key_alone(module):
    """Not on the type, the mask, or what else the pass does."""
    first, again, other = (moved(module, 4999, key, 0.5) for key in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for dtype in FLOATS:
        assert torch.equal(moved(module, 4999, 1, 0.5, dtype=dtype), first)


def test_smaller_probability_chooses_a_part_of_what_a_larger_one_does():
    choices = [moved(reference, 1 << 16, KEYS[2], beta) for beta in BETAS]
    for fewer, more in itertools.pairwise(choices):
        assert (fewer <= more).all()


@pytest.mark.parametrize("n", [4096, 4999])
def test_mask_and_choice_move_what_both_allow(module, n):
    mask = random_mask(n, seed=3)
    allowed = reference.unpack_mask(mask, torch.empty(n))
    both = moved(module, n, KEYS[2], 0.5, mask)
    assert torch.equal(both, moved(module, n, KEYS[2], 0.5) & allowed)
    assert 0 < int(both.sum()) < int(allowed.sum())


@pytest.mark.parametrize("beta", [0.125, 0.5, 0.90625])
def test_choices_of_neighbouring_elements_and_rows_are_uncorrelated(beta):
    for key in KEYS:
        choice = moved(reference, 1 << 18, key, beta)
        for lag in (1, 2, 3, 31, 32, 64, 128, 768, 1024, 3072, 4096):
            assert_uncorrelated(choice[lag:], choice[:-lag])


@pytest.mark.parametrize("beta", [0.125, 0.5, 0.90625])
def test_choices_of_consecutive_steps_are_uncorrelated(beta):
    choices = [moved(reference, 1 << 18, key, beta) for key in KEYS]
    for one, other in itertools.pairwise(choices):
        assert_uncorrelated(one, other)


def rounded_up(dtype: torch.dtype, key: int, share: float, beta: float) -> Tensor:
    """Which ones among n weights of 1 that move by a share of a step are rounded up."""
    weight = torch.ones(1 << 20, dtype=dtype)
    scale = share * torch.finfo(dtype).eps
    return perturbed(reference, weight, torch.ones_like(weight), scale, key=key, beta=beta)[0] > 1


@pytest.mark.parametrize("beta", [0.125, 0.5, 0.90625])
@narrow
def test_choice_does_not_depend_on_the_rounding(dtype, beta):
    """Of what moves from 1 by p steps, a share p is rounded up, whatever part moves. The share of m trials, within
    five standard deviations; the noise's spacing is 2**-12 of a step at the most, the sum's rounding less."""
    for key, p in zip(KEYS, (0.25, 0.5, 0.75, 0.0625), strict=True):
        up, chosen = rounded_up(FLOATS[dtype], key, p, beta), moved(reference, 1 << 20, key, beta)
        assert not (up & ~chosen).any()
        m = int(chosen.sum())
        assert abs(float(up[chosen].double().mean()) - p) <= 5 * math.sqrt(p * (1 - p) / m) + 2.0**-12
