"""Coefficients of the passes against the papers' formulas, and keys of the random numbers."""

import math

import pytest
import torch
from torch import Tensor

from fsam_triton.kernels import formulas, reference, spec

FP64 = torch.finfo(torch.float64).eps


def fp64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- keys --------------------------------------------------------------------------------------------------------------


def key_of(step: float, salt: int, offset: int) -> int:
    made = formulas.keys(torch.tensor([step]), torch.tensor([salt]), torch.tensor([offset]))
    assert made.dtype == torch.int32
    return int(made)


def test_keys_depend_on_nothing_but_their_own_row():
    step, salt, offset = torch.tensor([3.0, 4.0]), torch.tensor([7, 8]), torch.tensor([0, 1024])
    together = formulas.keys(step, salt, offset)
    assert together.tolist() == [key_of(3.0, 7, 0), key_of(4.0, 8, 1024)]


def test_key_is_another_one_for_every_step_and_salt():
    keys = {key_of(float(step), salt, 0) for step in range(30) for salt in (0, 1, 0xFFFFFFFF, 12345)}
    assert len(keys) == 120


@pytest.mark.parametrize(("step", "salt", "offset"), [(16777216, 0xFFFFFFFF, 0), (10**6, 5, 10**10), (0, 0, 1 << 40)])
def test_key_is_exact_for_large_steps_salts_and_offsets(step, salt, offset):
    """In Python's integers."""
    key = (step * spec.STEP + salt) % 2**32
    for factor in spec.MIXES:
        key = (key ^ (key >> 15)) * factor % 2**32
    key = ((key ^ (key >> 16)) + offset * spec.WEYL) % 2**32
    assert key_of(float(step), salt, offset) % 2**32 == key


def test_part_of_a_tensor_draws_with_its_own_key_what_the_whole_draws_there():
    like = torch.empty(5000)
    whole = reference.random_bits(like, torch.tensor(key_of(3.0, 7, 0)))
    part = reference.random_bits(like[:904], torch.tensor(key_of(3.0, 7, 4096)))
    assert torch.equal(part, whole[4096:])


# -- perturbation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm_sq", "expected"), [(16.0, 0.0125), (math.inf, 0.0), (math.nan, 0.0), (0.0, 0.05e12)])
def test_radius_over_the_norm_is_zero_where_that_is_not_finite(norm_sq, expected):
    assert float(formulas.radius(0.05, fp64(norm_sq)[0])) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1024.0, 2.0**-20])
def test_radius_of_scaled_gradients_unscales_them(scale):
    plain = formulas.radius(0.05, fp64(16.0)[0])
    scaled = formulas.radius(0.05, fp64(16.0 * scale**2)[0], torch.tensor(scale))
    assert float(scaled) * scale == float(plain)


def test_radii_of_several_groups_share_the_norm():
    assert formulas.radius(fp64(0.05, 2.0), fp64(16.0)[0]).tolist() == [0.05 / (4 + 1e-12), 2.0 / (4 + 1e-12)]


# -- clipping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 100.0])
def test_clip_factor_is_what_clip_grad_norm_multiplies_with(max_norm):
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    parameter.grad = fp64(1.0, 2.0, -3.0, 0.5)
    factor, skip = formulas.clip_factor(parameter.grad.square().sum(), 1.0, max_norm)
    expected = parameter.grad * factor
    torch.nn.utils.clip_grad_norm_(parameter, max_norm)
    # The two sum four squares in their own order.
    torch.testing.assert_close(parameter.grad, expected, rtol=8 * torch.finfo(torch.float64).eps, atol=0)
    assert not skip


def test_clip_factor_unscales_the_norm_first():
    factor, _ = formulas.clip_factor(fp64(1024.0**2)[0], 1 / 1024, 0.5)
    assert float(factor) == 0.5 / (1 + 1e-6)


@pytest.mark.parametrize("norm_sq", [math.inf, math.nan])
def test_norm_that_is_not_finite_asks_to_skip(norm_sq):
    assert formulas.clip_factor(fp64(norm_sq)[0], 1.0, 1.0)[1]


# -- rules -------------------------------------------------------------------------------------------------------------

NUMBERS = {"lr": 0.1, "rate": 0.01, "sign": 1.0, "alpha": 0.0, "max_norm": math.inf, "average": 0.25, "balance": 0.0}
NUMBERS |= {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "momentum": 0.9, "new": 0.75, "of_grad": 1.0, "of_buffer": 0.9}


def columns_of(rule: str, updates: list[float], *, measured=None, scale=None, overflow=None, **numbers: float) -> dict:
    """The columns of an update of segments that were updated so often before."""
    rows = fp64(*({**NUMBERS, **numbers}[name] for name in spec.NUMBERS[rule]))[None]
    members = torch.zeros(len(updates), len(spec.MEMBER), dtype=torch.int64)
    steps = torch.tensor(updates)
    measured = None if measured is None else fp64(measured)[0]
    scalars = (None if value is None else torch.tensor([value]) for value in (scale, None, overflow))
    coef, _ = formulas.descend_coefficients(
        rule, "alone", rows, members, steps, None, 7, measured, *scalars, None, None, torch.float64
    )
    return {**dict(zip(spec.DESCEND[rule], coef.T.tolist(), strict=True)), "steps": steps.tolist()}


def test_adamw_has_the_bias_corrections_of_each_step():
    updates = [0.0, 1.0, 999.0]
    columns = columns_of("adamw", updates)
    expected = {
        "factor": [1.0] * 3,
        "rate": [0.25] * 3,
        "decay": [0.1 * 0.01] * 3,
        "new1": [1 - 0.9] * 3,
        "beta2": [0.999] * 3,
        "new2": [1 - 0.999] * 3,
        "step_size": [0.1 / (1 - 0.9 ** (step + 1)) for step in updates],
        "inv_sqrt_bias2": [1 / math.sqrt(1 - 0.999 ** (step + 1)) for step in updates],
        "eps": [1e-8] * 3,
        "steps": [1.0, 2.0, 1000.0],
    }
    for name, values in expected.items():
        # Two pow functions, each good to an ulp of 0.999, under 1 - 0.999 of 1e-3.
        assert columns[name] == pytest.approx(values, rel=4000 * FP64), name


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.999), (0.9, 0.0)])
def test_adamw_with_betas_of_zero_is_finite(betas):
    columns = columns_of("adamw", [0.0, 1.0], beta1=betas[0], beta2=betas[1])
    assert all(math.isfinite(value) for values in columns.values() for value in values)


def test_first_gradient_of_sgd_is_its_momentum_undampened():
    columns = columns_of("sgd", [0.0, 1.0, 2.0])
    assert columns["momentum"] == [0.0, 0.9, 0.9]
    assert columns["new"] == [1.0, 0.75, 0.75]


def test_decay_of_sgd_is_of_the_gradient_and_that_of_lion_of_the_weight():
    assert columns_of("sgd", [0.0])["decay"] == [0.01]
    assert columns_of("lion", [0.0])["decay"] == [0.1 * 0.01]


def test_the_larger_one_of_a_pair_grows_and_the_smaller_one_decays():
    squares, pairs = (
        fp64(4.0, 1.0, 2.0, 2.0, math.inf, math.nan),
        torch.tensor([[0, 1], [1, 0], [2, 3], [4, 0], [5, 0]]),
    )
    rates = formulas.balanced(fp64(*[0.5] * 5), fp64(*[0.1] * 5), fp64(*[2.0] * 5), squares, pairs)
    factors = 1 - 0.1 * rates
    assert factors.tolist() == pytest.approx([0.95 * 1.2, 0.95 * 0.8, 0.95, 0.95, 0.95], rel=4 * FP64)


@pytest.mark.parametrize("rule", spec.NUMBERS)
def test_sign_and_scale_are_of_the_gradient_alone(rule):
    plain, turned = columns_of(rule, [3.0]), columns_of(rule, [3.0], sign=-1.0, scale=4.0)
    assert turned.pop("factor") == [-0.25]
    assert plain.pop("factor") == [1.0]
    assert turned == plain


@pytest.mark.parametrize("rule", spec.NUMBERS)
@pytest.mark.parametrize(
    "cause", [{"overflow": 1.0}, {"measured": math.inf, "max_norm": 1.0}, {"measured": math.nan, "max_norm": 1.0}]
)
def test_update_that_is_skipped_has_a_nan_for_a_factor_and_is_not_counted(rule, cause):
    columns = columns_of(rule, [3.0, 0.0], **cause)
    assert columns["steps"] == [3.0, 0.0]
    assert all(map(math.isnan, columns["factor"]))
    assert all(map(math.isnan, columns["rate"]))


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_norm_that_is_not_finite_counts_only_where_it_is_clipped(norm):
    assert columns_of("adamw", [3.0], measured=norm)["factor"] == [1.0]


@pytest.mark.parametrize(("norm", "scale", "expected"), [(4.0, 1.0, 0.25), (0.5, 1.0, 1.0), (4096.0, 1024.0, 0.25)])
def test_gradients_are_clipped_after_they_are_unscaled(norm, scale, expected):
    columns = columns_of("adamw", [3.0], measured=norm**2, scale=scale, max_norm=1.0)
    # 1e-6 is added to the norm.
    assert columns["factor"] == pytest.approx([expected / scale], rel=1e-6)


# -- combinations of two gradients -------------------------------------------------------------------------------------

ALPHAS = [0.0, 0.1, 0.7, 3.0]
# Sums of 50 products, and a few operations after them.
CLOSE = {"rtol": 200 * FP64, "atol": 0}


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
    of_second, of_first, norm_sq = formulas.decomposition(dots_of(first, second), alpha)
    expected = second - alpha * without(first, second)
    assert_vectors_close(of_second * second + of_first * first, expected, second, alpha * first)
    torch.testing.assert_close(norm_sq, expected @ expected, **CLOSE)


@pytest.mark.parametrize("scale", [2.0, -0.5])
def test_decomposition_of_parallel_gradients_is_the_second(scale):
    """Nothing is orthogonal; what the rounding leaves of it is small."""
    second = fp64(3.0, -4.0)
    of_second, of_first, norm_sq = formulas.decomposition(dots_of(scale * second, second), 0.7)
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
    of_second, of_first, norm_sq = formulas.decomposition(fp64(*dots), 0.7)
    assert (float(of_second), float(of_first)) == (1.0, 0.0)
    torch.testing.assert_close(norm_sq, fp64(dots[2])[0], rtol=0, atol=0, equal_nan=True)


def test_decomposition_of_a_zero_first_gradient_is_the_second():
    of_second, _, norm_sq = formulas.decomposition(fp64(0.0, 0.0, 9.0), 0.7)
    assert (float(of_second), float(norm_sq)) == (1.0, 9.0)


def test_orthogonal_part_leaves_what_is_orthogonal_to_the_first_gradient():
    first, second = two_vectors()
    part = second - formulas.orthogonal_part(dots_of(first, second)) * first
    assert_vectors_close(part, without(second, first), first, second)


@pytest.mark.parametrize(
    "dots", [(0.0, 0.0, 9.0), (math.nan, math.nan, 9.0), (math.inf, math.inf, 9.0), (math.nan, math.inf, 9.0)], ids=str
)
def test_orthogonal_part_to_a_gradient_that_is_zero_or_not_finite_is_everything(dots):
    assert float(formulas.orthogonal_part(fp64(*dots))) == 0.0


@pytest.mark.parametrize("alpha", ALPHAS)
def test_reuse_adds_the_kept_part_as_long_as_alpha_times_the_gradient(alpha):
    kept, grad = two_vectors()
    factor, norm_sq = formulas.reuse(dots_of(kept, grad), alpha)
    expected = grad + alpha * grad.norm() / kept.norm() * kept
    assert_vectors_close(grad + factor * kept, expected, grad, factor * kept)
    torch.testing.assert_close(norm_sq, expected @ expected, **CLOSE)


@pytest.mark.parametrize(
    "dots", [(0.0, 0.0, 9.0), (math.nan, math.nan, 9.0), (math.inf, math.inf, 9.0), (math.inf, 4.0, math.inf)], ids=str
)
def test_reuse_of_a_part_that_is_zero_or_not_finite_adds_nothing(dots):
    factor, norm_sq = formulas.reuse(fp64(*dots), 0.7)
    assert (float(factor), float(norm_sq)) == (0.0, dots[2])
