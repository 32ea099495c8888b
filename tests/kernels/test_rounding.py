"""Rounding to 16 bits and its random numbers: the Triton helpers in the interpreter, and the reference."""

import math

import pytest
import torch
from torch import Tensor

from fsam_triton.kernels import formulas, reference
from tests.kernels import rounding_kernels
from tests.kernels.cases import assert_same_bits, assert_uncorrelated, bits, used_keys

NARROW = [torch.bfloat16, torch.float16]
EVERY_RAND = torch.arange(-32768, 32768, dtype=torch.int32)
# Distance of two values of the noise, as a fraction of a step: half of it is how biased a rounding may be. The lower
# half of an fp32 number has as many values as the random numbers of bf16.
NOISE_SPACING = {torch.bfloat16: 0.0, torch.float16: 2.0**-12}
COUNTERS = 1 << 18

narrow = pytest.mark.parametrize("dtype", NARROW, ids=str)


@pytest.fixture(params=["kernel", "reference"])
def stochastic_round(request, interpret):
    """`stochastic_round(x, rand, dtype)`, as the kernels and as the reference do it."""
    if request.param == "kernel":
        return lambda *args: interpret(rounding_kernels.round_to, *args)
    return lambda x, rand, dtype: reference.stochastic_round(x, rand, dtype).to(dtype)


@pytest.fixture(params=["kernel", "reference"])
def random_halves(request, interpret):
    """`random_halves(n, key)`: high and low halves of n random numbers."""
    if request.param == "kernel":
        return lambda n, key: interpret(rounding_kernels.random_halves, n, key_tensor(key))[:2]
    return reference_halves


def key_tensor(key: int) -> Tensor:
    """A key of 32 bits, signed or not, as the passes get it."""
    return torch.tensor([key]).to(torch.int32)


def reference_halves(n: int, key: int) -> tuple[Tensor, Tensor]:
    random = reference.random_bits(torch.empty(n), key_tensor(key)[0])
    return reference.high_half(random), reference.low_half(random)


def every_value(dtype: torch.dtype) -> Tensor:
    """All 2**16 values of a 16-bit type, as fp32."""
    return torch.arange(-32768, 32768, dtype=torch.int16).view(dtype).float()


def with_ulps(values: Tensor) -> Tensor:
    """fp32 values and their fp32 neighbours, two on each side."""
    return torch.cat([(bits(values) + ulps).view(torch.float32) for ulps in (-2, -1, 0, 1, 2)])


def around_ties(dtype: torch.dtype) -> Tensor:
    """Every value, the middle of every two neighbours, and the fp32 neighbours of both."""
    values = every_value(dtype)
    magnitudes = values[values.isfinite() & (values >= 0)].double().unique()
    middles = ((magnitudes[1:] + magnitudes[:-1]) / 2).float()
    return torch.cat([with_ulps(values), with_ulps(middles), with_ulps(-middles)])


def any_fp32(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    """fp32 numbers that the 16-bit type can hold roughly: all binades and mantissas, no subnormal fp32 ones."""
    smallest, largest = (-126, 99) if dtype == torch.bfloat16 else (-30, 20)
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(smallest, largest, (n,), generator=generator)
    mantissa = 1 + torch.randint(0, 1 << 23, (n,), generator=generator) * 2.0**-23
    sign = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    return (sign * mantissa.double() * torch.exp2(exponent.double())).float()


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The values of the 16-bit type next to each x, below and above in magnitude; twice the same where it holds x."""
    nearest = x.to(dtype)
    nearest = torch.where(nearest.isinf(), torch.finfo(dtype).max * x.sign(), nearest.float()).to(dtype)
    above = nearest.float().abs() > x.abs()
    below = nearest.float().abs() < x.abs()
    lower = (bits(nearest) - above.to(torch.int16)).view(dtype)
    upper = (bits(nearest) + below.to(torch.int16)).view(dtype)
    return lower, torch.where(upper.isinf(), nearest.float(), upper.float()).to(dtype)


def some_rand(n: int, seed: int) -> Tensor:
    return torch.randint(-32768, 32768, (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


# -- to nearest --------------------------------------------------------------------------------------------------------


@narrow
def test_kernel_rounds_to_nearest_even_as_pytorch_casts(interpret, dtype):
    """Around every value and every tie of the type: zeros, subnormals, both ends, infinities, NaNs of every payload."""
    x = around_ties(dtype)
    assert_same_bits(interpret(rounding_kernels.round_to, x, None, dtype), x.to(dtype))


@pytest.mark.parametrize("payload", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0x7F80FFFF])
@pytest.mark.parametrize("sign", [0, -(1 << 31)], ids=["positive", "negative"])
def test_nan_stays_nan_whatever_its_payload(interpret, payload, sign):
    x = (torch.full((4,), payload, dtype=torch.int32) | sign).view(torch.float32)
    assert interpret(rounding_kernels.round_to, x, None, torch.bfloat16).isnan().all()


# -- stochastically ----------------------------------------------------------------------------------------------------


@narrow
def test_kernel_and_reference_round_alike_to_the_bit(interpret, dtype):
    x = any_fp32(1 << 18, dtype, seed=1)
    rand = some_rand(x.numel(), seed=2)
    expected = reference.stochastic_round(x, rand, dtype).to(dtype)
    assert_same_bits(interpret(rounding_kernels.round_to, x, rand, dtype), expected)


@narrow
def test_kernel_and_reference_round_subnormal_fp32_numbers_alike_to_the_bit(interpret, dtype):
    x = torch.arange(1, 1 << 23, 4099, dtype=torch.int32).view(torch.float32)
    rand = some_rand(x.numel(), seed=2)
    expected = reference.stochastic_round(x, rand, dtype).to(dtype)
    assert_same_bits(interpret(rounding_kernels.round_to, x, rand, dtype), expected)


@narrow
def test_result_is_one_of_the_two_neighbours(stochastic_round, dtype):
    x = torch.cat([any_fp32(1 << 16, dtype, seed=3), with_ulps(torch.exp2(torch.arange(-14.0, 15.0)))])
    lower, upper = neighbours(x, dtype)
    for rand in (torch.full_like(x, -32768), torch.full_like(x, 32767), torch.zeros_like(x), some_rand(x.numel(), 4)):
        rounded = stochastic_round(x, rand.to(torch.int32), dtype)
        assert ((rounded == lower) | (rounded == upper)).all()


@narrow
def test_value_on_the_grid_stays_for_every_random_number(stochastic_round, dtype):
    values = every_value(dtype)
    values = values[values.abs() < 2.0**100]
    for rand in (-32768, -1, 0, 1, 32767):
        rounded = stochastic_round(values, torch.full_like(values, rand, dtype=torch.int32), dtype)
        assert torch.equal(rounded.float(), values)


@pytest.mark.slow
@narrow
def test_mean_over_all_random_numbers_is_the_value(stochastic_round, dtype):
    """The chance of rounding up is a multiple of the noise's spacing, so it is wrong by half of that at the most."""
    scales = torch.tensor([1.0, 1.7, 2.0**-9, 3.1e4, 2.0**-14, 1.3 * 2.0**-17, 2.0**-24])
    x = torch.cat([scales * (1 + fraction * 2.0**-7) for fraction in (0.0, 1e-5, 0.3, 0.5, 0.77777, 1 - 2.0**-16)])
    x = torch.cat([x, -x])
    rounded = stochastic_round(x.repeat_interleave(1 << 16), EVERY_RAND.repeat(x.numel()), dtype)
    mean = rounded.double().view(-1, 1 << 16).mean(1)
    lower, upper = neighbours(x, dtype)
    step = (upper.double() - lower.double()).abs()
    error = (mean - x.double()).abs()
    assert (error <= step * NOISE_SPACING[dtype] / 2).all()


@narrow
def test_sum_of_many_roundings_of_one_value_is_unbiased(stochastic_round, random_halves, dtype):
    """n Bernoulli trials of a chance p: within five standard deviations, the bias of one, and the rounding of x."""
    for key, p in enumerate((0.01, 0.25, 0.5, 0.9)):
        step = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
        x = torch.full((COUNTERS,), 1 + p * step)
        for rand in random_halves(COUNTERS, key * 0x1234567):
            share = ((stochastic_round(x, rand, dtype).double() - 1) / step).mean()
            sigma = math.sqrt(p * (1 - p) / COUNTERS)
            assert abs(float(share) - p) <= 5 * sigma + NOISE_SPACING[dtype] / 2 + 2.0**-24 / step


@narrow
def test_finite_numbers_stay_finite(stochastic_round, dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([largest, -largest, largest * (1 - 2.0**-20), 1e4, -1e4]).repeat_interleave(1 << 16)
    assert stochastic_round(x, EVERY_RAND.repeat(5), dtype).isfinite().all()


def test_fp16_saturates_at_its_largest_number(stochastic_round):
    x = torch.tensor([65504.0, 65505.0, 65519.0, 65520.0, 65536.0, 1e5, 1e30])
    for rand in (-32768, 0, 32767):
        rounded = stochastic_round(torch.cat([x, -x]), torch.full((14,), rand, dtype=torch.int32), torch.float16)
        assert rounded.abs().tolist() == [65504.0] * 14


@narrow
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinity_and_nan_stay(stochastic_round, dtype, value):
    x = torch.full((8,), value)
    assert_same_bits(stochastic_round(x, some_rand(8, seed=1), dtype), x.to(dtype))


# -- random numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_kernel_and_reference_draw_the_same_numbers(interpret, key):
    high, low, shifted = interpret(rounding_kernels.random_halves, 100_003, key_tensor(key))
    assert torch.equal(shifted, low << 16)
    for half, expected in zip((high, low), reference_halves(100_003, key), strict=True):
        assert torch.equal(half, expected)


def test_key_can_stand_for_an_offset_of_the_counter():
    """A shard of a parameter, from `offset` on, draws what the whole parameter draws there."""
    step, salt = torch.tensor([3.0]), torch.tensor([12345])
    whole, part = (formulas.keys(step, salt, torch.tensor([offset])) for offset in (0, 40_000))
    for of_whole, of_part in zip(
        reference_halves(100_000, int(whole)), reference_halves(60_000, int(part)), strict=True
    ):
        assert torch.equal(of_whole[40_000:], of_part)


def test_keys_of_steps_salts_and_offsets_all_differ():
    grids = torch.meshgrid(torch.arange(50), torch.arange(50), torch.arange(0, 50 * 1024, 1024), indexing="ij")
    step, salt, offset = (grid.flatten() for grid in grids)
    keys = formulas.keys(step.float(), salt, offset)
    # Of 125000 numbers out of 2**32 about 1.8 pairs are equal by chance; 12 or more have a chance below 1e-6.
    assert keys.unique().numel() > keys.numel() - 12
    assert keys.dtype == torch.int32


@pytest.mark.parametrize("shift", [8, 0], ids=["upper_byte", "lower_byte"])
def test_halves_are_uniform(random_halves, shift):
    """Chi-square of 256 classes has mean 255 and variance 510; five standard deviations above is too much."""
    for key in used_keys(3):
        for half in random_halves(COUNTERS, key):
            counts = torch.bincount(((half >> shift) & 255).long(), minlength=256).double()
            expected = COUNTERS / 256
            assert ((counts - expected).square() / expected).sum() < 255 + 5 * math.sqrt(510)


def test_halves_of_a_number_are_uncorrelated(random_halves):
    for key in used_keys(3):
        assert_uncorrelated(*random_halves(COUNTERS, key))


@pytest.mark.parametrize("lag", [1, 2, 3, 31, 32, 64, 128, 768, 1024, 3072, 4096])
def test_numbers_of_neighbouring_elements_and_rows_are_uncorrelated(lag):
    for key in used_keys(3):
        for half in reference_halves(COUNTERS, key):
            assert_uncorrelated(half[lag:], half[:-lag])


def test_numbers_of_consecutive_steps_are_uncorrelated():
    draws = [reference_halves(COUNTERS, key) for key in used_keys(6)]
    for one, other in zip(draws[1:], draws, strict=False):
        for a in one:
            for b in other:
                assert_uncorrelated(a, b)
