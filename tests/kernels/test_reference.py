"""The reference passes against the formulas of the papers in exact arithmetic, and the packing of masks."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fsam_triton.kernels import reference
from tests.kernel_cases import FLOATS, LENGTHS, assert_same_bits, ordinary, random_mask

wide = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
N = 200


def exact(values: Tensor) -> list[Fraction]:
    return [Fraction(value) for value in values.double().tolist()]


def roundings(count: int, dtype: torch.dtype) -> Fraction:
    """The relative error of that many roundings, at the most."""
    return count * Fraction(torch.finfo(dtype).eps) / 2


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 31, 32, 33, 1000, 4096])
def test_packed_mask_unpacks_to_the_same_bits(n):
    bits = ordinary(n, torch.float32, seed=n) > 0
    assert torch.equal(reference.unpack_mask(reference.pack_mask(bits), torch.empty(n)), bits)


def test_bit_i_of_a_word_belongs_to_element_i():
    bits = torch.zeros(64, dtype=torch.bool)
    bits[[0, 5, 31, 33]] = True
    assert reference.pack_mask(bits).tolist() == [(1 << 0) + (1 << 5) - (1 << 31), 1 << 1]


def test_bits_after_the_end_are_packed_as_zeros():
    assert reference.pack_mask(torch.ones(35, dtype=torch.bool)).tolist() == [-1, 0b111]


# -- perturbation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
@wide
def test_perturbation_is_the_published_one(dtype, adaptive, masked):
    """eps takes four roundings at the most (scale, product, square, product), the sum one more."""
    weight, grad = ordinary(N, dtype, seed=1), ordinary(N, dtype, seed=2)
    mask = random_mask(N, seed=3) if masked else None
    moves = reference.unpack_mask(mask, weight).tolist() if masked else [True] * N
    before, scale = exact(weight), 0.0123
    reference.perturb_(
        weight, grad, None, mask, torch.tensor([scale, 0.0], dtype=torch.float64), adaptive, False, False
    )
    for after, w, g, moved in zip(exact(weight), before, exact(grad), moves, strict=True):
        eps = Fraction(scale) * g * (w * w if adaptive else 1) * moved
        assert abs(after - (w + eps)) <= roundings(4, dtype) * abs(eps) + roundings(1, dtype) * abs(w + eps) * 2


@narrow
def test_stochastic_perturbation_realises_the_intended_one_on_average(dtype):
    """Steps far below half an ulp: n roundings whose steps are at most s have a mean within 5 s / (2 sqrt(n))."""
    n, move = 1 << 16, 2.0**-14
    weight = torch.full((n,), 1.0, dtype=dtype)
    coef = torch.tensor([move, 12345.0], dtype=torch.float64)
    reference.perturb_(weight, torch.ones_like(weight), None, None, coef, False, True, False)
    step = torch.finfo(dtype).eps
    assert abs(float(weight.double().mean() - 1) - move) <= 5 * step / (2 * math.sqrt(n)) + step * 2.0**-13


@narrow
def test_perturbation_rounded_to_nearest_loses_small_steps(dtype):
    weight = torch.full((100,), 1.0, dtype=dtype)
    coef = torch.tensor([2.0**-14, 0.0], dtype=torch.float64)
    reference.perturb_(weight, torch.ones_like(weight), None, None, coef, False, False, False)
    assert (weight == 1.0).all()


# -- update ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("anchored", [False, True])
@wide
def test_update_is_the_published_one(dtype, anchored, amsgrad):
    """With u half an ulp of 1: the moments take four roundings of their terms, the quotient at most twelve, the
    coefficients one each (in fp32), the decay and the sum three of the weight."""
    coef = torch.tensor([0.5, 1e-3, 0.1, 0.999, 0.001, 1e-2, 1.3, 1e-8, 0.0], dtype=torch.float64)
    factor, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_bias2, eps, _ = exact(coef)
    tensors = {name: ordinary(N, dtype, seed) for seed, name in enumerate(["weight", "grad", "exp_avg", "anchor"])}
    squares = [ordinary(N, dtype, seed).square() + 0.01 for seed in (5, 6)]
    old = {name: exact(tensor) for name, tensor in tensors.items()}
    old_v, old_top = exact(squares[0]), exact(squares[1])
    top = squares[1] if amsgrad else None
    anchor = tensors.pop("anchor") if anchored else None
    tensors.pop("anchor", None)
    reference.adamw_l2sp_(*tensors.values(), squares[0], top, None, None, anchor, coef, False, False)

    for i in range(N):
        g = factor * old["grad"][i]
        w, m = old["weight"][i], old["exp_avg"][i] + one_minus_beta1 * (g - old["exp_avg"][i])
        v = beta2 * old_v[i] + one_minus_beta2 * g * g
        pull = decay * (w - (old["anchor"][i] if anchored else 0))
        largest = max(v, old_top[i]) if amsgrad else v
        root = Fraction(math.sqrt(largest))
        update = step_size * m / (root * inv_sqrt_bias2 + eps)
        terms = abs(old["exp_avg"][i]) + abs(g)
        u = roundings(1, dtype)
        assert abs(Fraction(float(tensors["exp_avg"][i])) - m) <= 4 * u * terms
        assert abs(Fraction(float(squares[0][i])) - v) <= 5 * u * v
        if amsgrad:
            assert abs(Fraction(float(top[i])) - largest) <= 5 * u * largest
        error = 12 * u * abs(update) + 4 * u * step_size * terms / root + 3 * u * (abs(w) + abs(update)) + 3 * u * pull
        assert abs(Fraction(float(tensors["weight"][i])) - (w - pull - update)) <= abs(error)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
def test_update_from_a_backup_is_the_update_from_the_same_weights(dtype):
    coef = torch.tensor([0.5, 1e-3, 0.1, 0.999, 0.001, 1e-2, 1.3, 1e-8, 5.0], dtype=torch.float64)
    results = []
    for backed in (False, True):
        clean, grad, exp_avg = (ordinary(N, dtype, seed) for seed in range(3))
        weight = torch.full_like(clean, 7.0) if backed else clean
        backup = clean if backed else None
        reference.adamw_l2sp_(weight, grad, exp_avg, exp_avg.square(), None, backup, None, None, coef, True, False)
        results.append(weight)
    assert_same_bits(*results)


@narrow
def test_weight_is_its_master_rounded_to_nearest(dtype):
    coef = torch.tensor([0.5, 1e-3, 0.1, 0.999, 0.001, 1e-2, 1.3, 1e-8, 5.0], dtype=torch.float64)
    weight, grad = ordinary(N, dtype, seed=1), ordinary(N, dtype, seed=2)
    master, moments = weight.float(), [torch.ones(N), torch.ones(N)]
    reference.adamw_l2sp_(weight, grad, *moments, None, None, master, None, coef, True, False)
    assert_same_bits(weight, master.to(dtype))


@wide
def test_update_with_a_second_gradient_is_that_with_the_sum(dtype):
    """Times 1 - beta1, six roundings of a gradient's term (coefficient, product, sum, difference, two of the product
    with 1 - beta1) and the last three of the old moment; one of the new moment. One more each for products of errors.
    """
    coef = torch.tensor([0.5, 0.0, 0.1, 0.999, 0.001, 0.0, 1.3, 1e-8, 0.0, -0.7, 0.0, 0.0], dtype=torch.float64)
    weight, grad, exp_avg, other_grad = (ordinary(N, dtype, seed) for seed in range(4))
    old, exp_avg_sq = exact(exp_avg), torch.ones_like(weight)
    flat = (weight, grad, exp_avg, exp_avg_sq, None, None, None, None)
    reference.adamw_l2sp_(*flat, coef, False, False, other_grad)
    factor, _, one_minus_beta1, *_, other, _, _ = exact(coef)
    for after, m, g, o in zip(exact(exp_avg), old, exact(grad), exact(other_grad), strict=True):
        terms = abs(factor * g) + abs(other * o)
        expected = m + one_minus_beta1 * (factor * g + other * o - m)
        error = one_minus_beta1 * (7 * terms + 4 * abs(m)) + 2 * abs(expected)
        assert abs(after - expected) <= roundings(1, dtype) * error


@wide
def test_perturbation_along_the_new_moment_is_the_published_one(dtype):
    """eps takes two roundings (scale, product), the sum one more."""
    coef = torch.tensor([0.5, 1e-3, 0.1, 0.999, 0.001, 1e-2, 1.3, 1e-8, 0.0, 0.0, -0.0123, 0.0], dtype=torch.float64)
    clean, grad, exp_avg = (ordinary(N, dtype, seed) for seed in range(3))
    weight, exp_avg_sq = torch.full_like(clean, 7.0), exp_avg.square()
    flat = (weight, grad, exp_avg, exp_avg_sq, None, clean, None, None)
    reference.adamw_l2sp_(*flat, coef, False, False, perturb=True)
    for after, w, m in zip(exact(weight), exact(clean), exact(exp_avg), strict=True):
        eps = exact(coef)[10] * m
        assert abs(after - (w + eps)) <= roundings(2, dtype) * abs(eps) + roundings(1, dtype) * abs(w + eps) * 2


@narrow
def test_stochastic_perturbation_along_the_moment_realises_the_intended_one_on_average(dtype):
    """As that of `perturb_`: steps far below half an ulp."""
    n, move = 1 << 16, 2.0**-14
    coef = torch.tensor([math.nan, *(1.0,) * 7, 1.0, 0.0, move, 12345.0], dtype=torch.float64)
    weight, grad, exp_avg, exp_avg_sq, clean = torch.ones(5, n, dtype=dtype).unbind()
    flat = (weight, grad, exp_avg, exp_avg_sq, None, clean, None, None)
    reference.adamw_l2sp_(*flat, coef, True, False, perturb=True)
    step = torch.finfo(dtype).eps
    assert abs(float(weight.double().mean() - 1) - move) <= 5 * step / (2 * math.sqrt(n)) + step * 2.0**-13
    assert (clean == 1.0).all()


# -- norm --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", LENGTHS)
def test_norm_of_rows_and_of_a_ragged_end_cover_everything(n):
    grad = torch.ones(n)
    assert float(reference.grad_norm_sq(grad, None, None)) == n
    assert float(reference.grad_norm_sq(grad, None, torch.full(((n + 31) // 32,), -1, dtype=torch.int32))) == n


def test_compute_type_is_fp64_for_fp64_alone():
    types = {name: reference.compute_dtype(dtype) for name, dtype in FLOATS.items()}
    assert types == {name: torch.float64 if name == "fp64" else torch.float32 for name in FLOATS}


# -- rounding and noise ------------------------------------------------------------------------------------------------


def test_uniform_takes_odd_multiples_of_a_spacing_equally_often():
    values = reference.uniform(torch.arange(-32768, 32768, dtype=torch.int32))
    assert values.dtype == torch.float32
    odd = torch.arange(-32767, 32768, 2, dtype=torch.float64) * 2.0**-16
    assert torch.equal(values.double(), odd.repeat_interleave(2))
