"""The few numbers a pass needs: hyper-parameters on the device, keys, coefficients against the papers' formulas."""

import math

import pytest
import torch
from torch import Tensor

from fsam_triton import coefficients

CPU = torch.device("cpu")


def fp64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- hyper-parameters --------------------------------------------------------------------------------------------------


def test_hyper_parameters_are_rows_of_fp64():
    rows = coefficients.HyperParameters().rows([(0.1, 1e-8), (0.2, 1e-6)], CPU)
    assert rows.dtype == torch.float64
    assert rows.tolist() == [[0.1, 1e-8], [0.2, 1e-6]]


def test_unchanged_hyper_parameters_are_not_sent_again():
    hyper = coefficients.HyperParameters()
    first = hyper.rows([(0.1, 0.2)], CPU)
    assert hyper.rows([(0.1, 0.2)], CPU) is first


@pytest.mark.parametrize("changed", [[(0.1, 0.3)], [(0.1, 0.2), (0.1, 0.2)], [(0.1,)]], ids=["value", "row", "column"])
def test_changed_hyper_parameters_are_sent(changed):
    hyper = coefficients.HyperParameters()
    hyper.rows([(0.1, 0.2)], CPU)
    assert hyper.rows(changed, CPU).tolist() == [list(row) for row in changed]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_tensor_among_them_is_followed(shape):
    hyper, lr = coefficients.HyperParameters(), torch.full(shape, 0.5)
    assert hyper.rows([(lr, 0.25)], CPU).tolist() == [[0.5, 0.25]]
    lr.fill_(0.125)
    assert hyper.rows([(lr, 0.25)], CPU).tolist() == [[0.125, 0.25]]


def test_number_in_place_of_a_tensor_is_sent():
    hyper = coefficients.HyperParameters()
    hyper.rows([(torch.tensor(0.5), 0.25)], CPU)
    assert hyper.rows([(0.0, 0.25)], CPU).tolist() == [[0.0, 0.25]]


# -- keys --------------------------------------------------------------------------------------------------------------


def test_keys_are_integers_of_32_bits_exact_in_fp64():
    steps = torch.tensor([0.0, 1.0, 1e6, 16777216.0])
    keys = coefficients.keys(steps, torch.tensor([0, 1, 0xFFFFFFFF, 5]), torch.tensor([0, 0, 10**10, 1 << 40]))
    assert keys.dtype == torch.float64
    assert ((keys >= 0) & (keys < 2**32) & (keys == keys.floor())).all()


def test_keys_depend_on_nothing_but_their_own_row():
    step, salt, offset = torch.tensor([3.0, 4.0]), torch.tensor([7, 8]), torch.tensor([0, 1024])
    together = coefficients.keys(step, salt, offset)
    apart = [coefficients.keys(step[i : i + 1], salt[i : i + 1], offset[i : i + 1]) for i in range(2)]
    assert torch.equal(together, torch.cat(apart))


# -- coefficients ------------------------------------------------------------------------------------------------------


def test_ascent_is_rho_over_the_norm():
    coef = coefficients.ascent(fp64(0.05, 2.0), fp64(16.0)[0], fp64(3, 4))
    assert coef.tolist() == [[0.05 / (4 + 1e-12), 3.0], [2.0 / (4 + 1e-12), 4.0]]


@pytest.mark.parametrize("norm_sq", [math.inf, math.nan])
def test_ascent_of_a_norm_that_is_not_finite_is_zero(norm_sq):
    assert coefficients.ascent(fp64(0.05), fp64(norm_sq)[0], fp64(3)).tolist() == [[0.0, 3.0]]


def test_ascent_of_a_zero_norm_is_finite():
    """Times the zero gradient it moves nothing."""
    assert coefficients.ascent(fp64(0.05), fp64(0.0)[0], fp64(3)).isfinite().all()


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 100.0])
def test_clip_factor_is_what_clip_grad_norm_multiplies_with(max_norm):
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    parameter.grad = fp64(1.0, 2.0, -3.0, 0.5)
    factor, skip = coefficients.clip_factor(parameter.grad.square().sum(), 1.0, max_norm)
    expected = parameter.grad * factor
    torch.nn.utils.clip_grad_norm_(parameter, max_norm)
    # The two sum four squares in their own order.
    torch.testing.assert_close(parameter.grad, expected, rtol=8 * torch.finfo(torch.float64).eps, atol=0)
    assert not skip


def test_clip_factor_unscales_the_norm_first():
    factor, _ = coefficients.clip_factor(fp64(1024.0**2)[0], 1 / 1024, 0.5)
    assert float(factor) == 0.5 / (1 + 1e-6)


@pytest.mark.parametrize("norm_sq", [math.inf, math.nan])
def test_norm_that_is_not_finite_asks_to_skip(norm_sq):
    assert coefficients.clip_factor(fp64(norm_sq)[0], 1.0, 1.0)[1]


def test_descent_has_the_bias_corrections_of_each_step():
    hyper = fp64(0.1, 0.9, 0.999, 1e-8, 0.01, 1.0).repeat(3, 1)
    steps, keys = (1.0, 2.0, 1000.0), (5.0, 6.0, 7.0)
    coef = coefficients.descent(hyper, torch.tensor(steps), 0.5, fp64(*keys))
    for row, step, key in zip(coef.tolist(), steps, keys, strict=True):
        step_size, inv_sqrt_bias2 = 0.1 / (1 - 0.9**step), 1 / math.sqrt(1 - 0.999**step)
        expected = [0.5, 0.1 * 0.01, 1 - 0.9, 0.999, 1 - 0.999, step_size, inv_sqrt_bias2, 1e-8, key]
        # Two pow functions, each good to an ulp of 0.999, under 1 - 0.999 of 1e-3.
        assert row == pytest.approx(expected, rel=4000 * torch.finfo(torch.float64).eps)


def test_descent_to_maximize_turns_the_gradient_alone():
    hyper, key = fp64(0.1, 0.9, 0.999, 1e-8, 0.01, 1.0)[None], fp64(5)
    turned = hyper * fp64(1, 1, 1, 1, 1, -1)
    up, down = (coefficients.descent(h, torch.ones(1), 0.5, key)[0] for h in (turned, hyper))
    assert up.tolist() == [-0.5, *down.tolist()[1:]]


def test_descent_with_a_factor_of_nan_has_a_nan_in_the_factor_alone():
    hyper = fp64(0.1, 0.9, 0.999, 1e-8, 0.01, 1.0)[None]
    coef = coefficients.descent(hyper, torch.ones(1), torch.tensor(math.nan), fp64(5))
    assert coef.isnan().tolist() == [[True] + [False] * 8]


def test_descent_with_betas_of_zero_is_finite():
    hyper = fp64(0.1, 0.0, 0.0, 1e-8, 0.01, 1.0)[None]
    assert coefficients.descent(hyper, torch.ones(1), 1.0, fp64(5)).isfinite().all()


def test_ascent_with_a_probability_has_it_less_a_half():
    coef = coefficients.ascent(fp64(0.05, 2.0), fp64(16.0)[0], fp64(3, 4), beta=0.25)
    assert coef.tolist() == [[0.05 / (4 + 1e-12), 3.0, -0.25], [2.0 / (4 + 1e-12), 4.0, -0.25]]


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.6, 1 / 3, 1e-9, 2.0**-15, 1 - 1e-9])
def test_representable_probability_is_the_nearest_multiple_above_zero(beta):
    value = coefficients.representable(beta)
    assert 0 < value <= 1
    assert value * 2**15 == int(value * 2**15)
    assert abs(value - beta) <= 2.0**-16 or value == 2.0**-15


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_descent_with_a_second_gradient_has_its_factor_and_room_for_the_next_perturbation(sign):
    hyper, key = fp64(0.1, 0.9, 0.999, 1e-8, 0.01, sign)[None], fp64(5)
    plain, combined = (coefficients.descent(hyper, torch.ones(1), 0.5, key, *other) for other in ((), (0.25,)))
    assert combined.tolist() == [[*plain[0].tolist(), sign * 0.25, 0.0, 0.0]]


@pytest.mark.parametrize("factor", [0.5, math.nan])
def test_descent_with_an_average_has_its_rate_or_nan_where_the_update_is_skipped(factor):
    hyper, key = fp64(0.1, 0.9, 0.999, 1e-8, 0.01, -1.0)[None], fp64(5)
    for other, column in ((None, 0.0), (0.25, -0.25)):
        coef = coefficients.descent(hyper, torch.ones(1), torch.tensor(factor), key, other, ema_decay=0.75)
        assert coef[0, 9:12].tolist() == [column, 0.0, 0.0]
        assert coef[0, 12:].tolist() == pytest.approx([math.nan if math.isnan(factor) else 0.25], nan_ok=True)


# -- combinations of two gradients -------------------------------------------------------------------------------------

ALPHAS = [0.0, 0.1, 0.7, 3.0]
# Sums of 50 products, and a few operations after them.
CLOSE = {"rtol": 200 * torch.finfo(torch.float64).eps, "atol": 0}


def two_vectors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 50, generator=generator, dtype=torch.float64).unbind()


def dots_of(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a @ b, a @ a, b @ b])


def without(a: Tensor, b: Tensor) -> Tensor:
    """The part of a that is orthogonal to b."""
    return a - (a @ b) / (b @ b) * b


def assert_vectors_close(actual: Tensor, expected: Tensor, *terms: Tensor) -> None:
    """To the rounding of the terms that make the vector: its elements may be small by cancellation."""
    size = max(float(term.abs().max()) for term in terms)
    torch.testing.assert_close(actual, expected, rtol=0, atol=CLOSE["rtol"] * size)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_decomposition_leaves_out_the_part_of_the_first_gradient_that_is_orthogonal_to_the_second(alpha):
    first, second = two_vectors()
    of_second, of_first, norm_sq = coefficients.decomposition(dots_of(first, second), alpha)
    expected = second - alpha * without(first, second)
    assert_vectors_close(of_second * second + of_first * first, expected, second, alpha * first)
    torch.testing.assert_close(norm_sq, expected @ expected, **CLOSE)


@pytest.mark.parametrize("scale", [2.0, -0.5])
def test_decomposition_of_parallel_gradients_is_the_second(scale):
    """Nothing is orthogonal; what the rounding leaves of it is small."""
    second = fp64(3.0, -4.0)
    of_second, of_first, norm_sq = coefficients.decomposition(dots_of(scale * second, second), 0.7)
    assert_vectors_close((of_second + of_first * scale) * second, second, second)
    torch.testing.assert_close(norm_sq, fp64(25.0)[0], **CLOSE)


@pytest.mark.parametrize(
    "dots",
    [
        (0.0, 4.0, 0.0),
        (math.nan, math.nan, 9.0),
        (math.inf, math.inf, 9.0),
        (-math.inf, math.inf, 9.0),
        (math.nan, math.inf, 9.0),
        (math.nan, 4.0, math.nan),
        (math.inf, 4.0, math.inf),
    ],
    ids=str,
)
def test_decomposition_of_gradients_that_do_not_allow_one_is_the_second(dots):
    of_second, of_first, norm_sq = coefficients.decomposition(fp64(*dots), 0.7)
    assert (float(of_second), float(of_first)) == (1.0, 0.0)
    torch.testing.assert_close(norm_sq, fp64(dots[2])[0], rtol=0, atol=0, equal_nan=True)


def test_decomposition_of_a_zero_first_gradient_is_the_second():
    of_second, _, norm_sq = coefficients.decomposition(fp64(0.0, 0.0, 9.0), 0.7)
    assert (float(of_second), float(norm_sq)) == (1.0, 9.0)


def test_orthogonal_part_leaves_what_is_orthogonal_to_the_first_gradient():
    first, second = two_vectors()
    part = second - coefficients.orthogonal_part(dots_of(first, second)) * first
    assert_vectors_close(part, without(second, first), first, second)


@pytest.mark.parametrize(
    "dots", [(0.0, 0.0, 9.0), (math.nan, math.nan, 9.0), (math.inf, math.inf, 9.0), (math.nan, math.inf, 9.0)], ids=str
)
def test_orthogonal_part_to_a_gradient_that_is_zero_or_not_finite_is_everything(dots):
    assert float(coefficients.orthogonal_part(fp64(*dots))) == 0.0


@pytest.mark.parametrize("alpha", ALPHAS)
def test_reuse_adds_the_kept_part_as_long_as_alpha_times_the_gradient(alpha):
    kept, grad = two_vectors()
    factor, norm_sq = coefficients.reuse(dots_of(kept, grad), alpha)
    expected = grad + alpha * grad.norm() / kept.norm() * kept
    assert_vectors_close(grad + factor * kept, expected, grad, factor * kept)
    torch.testing.assert_close(norm_sq, expected @ expected, **CLOSE)


@pytest.mark.parametrize(
    "dots", [(0.0, 0.0, 9.0), (math.nan, math.nan, 9.0), (math.inf, math.inf, 9.0), (math.inf, 4.0, math.inf)], ids=str
)
def test_reuse_of_a_part_that_is_zero_or_not_finite_adds_nothing(dots):
    factor, norm_sq = coefficients.reuse(fp64(*dots), 0.7)
    assert (float(factor), float(norm_sq)) == (0.0, dots[2])


@pytest.mark.parametrize("factor", [1.0, 0.37, -2.0, 0.0])
@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_next_moment_has_the_norm_that_was_predicted(beta1, factor):
    moment, grad = two_vectors()
    expected = beta1 * moment + (1 - beta1) * factor * grad
    actual = coefficients.next_moment_sq(dots_of(moment, grad), beta1, factor)
    torch.testing.assert_close(actual, expected @ expected, **CLOSE)


def test_predicted_norm_of_a_moment_that_vanishes_is_a_thousandth_of_what_cancels():
    """Rounding noise there, the moment is too: a smaller norm would make a long perturbation of it."""
    grad = fp64(0.1**0.5, -0.3, 1 / 3)
    norm_sq = coefficients.next_moment_sq(dots_of(-grad / 9, grad), 0.9, 1.0)
    assert float(norm_sq) == pytest.approx(2.0**-20 * 2 * 0.01 * float(grad @ grad), rel=CLOSE["rtol"])


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_predicted_norm_of_a_gradient_that_is_not_finite_moves_nothing(bad):
    norm_sq = coefficients.next_moment_sq(fp64(bad, 4.0, bad), 0.9, 0.5)
    assert float(coefficients.radius(0.05, norm_sq)) == 0.0


@pytest.mark.parametrize(("norm_sq", "expected"), [(16.0, 0.0125), (math.inf, 0.0), (math.nan, 0.0), (0.0, 0.05e12)])
def test_radius_over_the_norm_is_zero_where_that_is_not_finite(norm_sq, expected):
    assert float(coefficients.radius(0.05, fp64(norm_sq)[0])) == pytest.approx(expected, rel=1e-12)
