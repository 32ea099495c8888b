"""The formats of fewer bits: every code and every bit pattern, against arithmetic in fp64."""

import math

import pytest
import torch
from torch import Tensor

from fsam_triton.kernels import formats, spec
from tests.kernels.cases import assert_same_bits, bits

narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
both = pytest.mark.parametrize("signed", [True, False], ids=["first moments", "second moments"])


def every_pattern(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def bytes_of(n: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def moments(groups: int, signed: bool, seed: int = 0) -> Tensor:
    """Of many magnitudes, between groups and within them."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randint(-60, 40, (groups, 1), generator=generator).double())
    within = torch.exp2(-8 * torch.rand(groups, spec.GROUP, generator=generator).double())
    x = (scale * within * torch.randn(groups, spec.GROUP, generator=generator).double()).float().flatten()
    x[:: 3 * spec.GROUP + 1] = 0.0
    return x if signed else x.abs()


# -- moments -----------------------------------------------------------------------------------------------------------


def scale_in_fp64(x: Tensor) -> Tensor:
    """The smallest number of 8 significant bits that no element of a group exceeds."""
    largest = x.double().abs().view(-1, spec.GROUP).amax(1)
    exponent = torch.frexp(largest).exponent - 8
    return torch.ldexp(torch.ceil(torch.ldexp(largest, -exponent)), exponent)


def levels(x: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """What the codes are the rounding of, in fp64."""
    ratio = x.double() / scale.clamp(min=1e-300).repeat_interleave(spec.GROUP)
    return ratio.sign() * 127 * ratio.abs().sqrt() if signed else 255 * ratio.pow(0.25)


@both
def test_codes_are_the_nearest_ones_of_the_roots(signed):
    x = moments(2000, signed)
    codes, scale = formats.encode(x, signed)
    assert torch.equal(scale.double(), scale_in_fp64(x))
    level = levels(x, scale.double(), signed)
    # An fp32 root of an fp32 quotient: a few ulp of 255. The codes of second moments begin at 1.
    expected_error = 0.5 + 255 * 4 * 2.0**-24 + 2.0**-15
    lifted = (codes == 1) & (level < 0.5)
    assert (codes.double() - level).abs()[~lifted | signed].max() <= expected_error
    assert signed or (codes > 0).all()


@both
def test_every_code_is_decoded_as_defined(signed):
    codes = torch.arange(-127, 128, dtype=torch.int8) if signed else torch.arange(256, dtype=torch.int32).byte()
    for scale in (1.0, 2.0**-80, 1.375 * 2.0**60):
        scales = torch.full((math.ceil(len(codes) / spec.GROUP),), scale, dtype=torch.bfloat16)
        ratio = codes.double() / (127 if signed else 255)
        expected = scales[0].double() * (ratio * ratio.abs() if signed else ratio**4)
        # A relative error of 2**-24 by each rounding: of the levels, of the unit, and of products that are not exact.
        roundings = 3 if signed else 4
        decoded = formats.decode(codes, scales).double()
        torch.testing.assert_close(decoded, expected, rtol=roundings * 2.0**-24, atol=0.0)


@both
def test_error_of_a_round_trip_is_half_a_step_of_the_codes(signed):
    """With r the root of x over its scale, and a step 1/127 or 1/255: at most the step's half times the slope there."""
    x = moments(2000, signed, seed=1)
    codes, scale = formats.encode(x, signed)
    ratio = x.double().abs() / scale.double().clamp(min=1e-300).repeat_interleave(spec.GROUP)
    error = (formats.decode(codes, scale).double() - x.double()).abs()
    error = error / scale.double().clamp(min=1e-300).repeat_interleave(spec.GROUP)
    power, step = (2, 1 / 127) if signed else (4, 1 / 255)
    root = ratio ** (1 / power)
    bound = (root + step / 2) ** power - ratio
    # Second moments below half a step are kept as one step.
    bound = bound if signed else torch.maximum(bound, torch.where(root < step, step**power, 0.0))
    assert (error <= bound * (1 + 1e-5) + 1e-7).all()


@both
def test_codes_are_kept_by_decoding_and_encoding_them(signed):
    """Where the largest element has the largest code: its scale is the same then."""
    codes, scale = formats.encode(moments(500, signed, seed=2), signed)
    groups = codes.view(-1, spec.GROUP)
    groups[:, 7] = 127 if signed else 255
    decoded = formats.decode(codes, scale)
    again, same_scale = formats.encode(decoded, signed)
    usable = (scale.float() > 0).repeat_interleave(spec.GROUP)
    # A code may be 255.00001 of the scale, which rounds up to the next one.
    same = (same_scale == scale).repeat_interleave(spec.GROUP) & usable
    assert same.double().mean() > 0.5
    assert torch.equal(again[same], codes[same])


@both
def test_random_rounding_is_right_on_the_average_and_never_a_step_off(signed):
    x = moments(40, signed, seed=3)
    scale = scale_in_fp64(x)
    level = levels(x, scale, signed)
    total = torch.zeros_like(level)
    for byte in range(256):
        codes, _ = formats.encode(x, signed, torch.full((len(x),), byte, dtype=torch.int32))
        assert ((codes.double() - level).abs() < 1 + 1e-3)[signed | (level >= 1)].all()
        total += codes
    # The bytes are 256 of all probabilities, in the middle of their ranges.
    exact = signed | (level >= 1)
    assert (total / 256 - level).abs()[exact].max() <= 0.5 / 256 + 1e-3


def test_second_moments_beside_larger_ones_never_become_zero():
    x = torch.zeros(64)
    x[0], x[1], x[33] = 1.0, 1e-30, 1e-26
    for random in (None, bytes_of(64, 1), torch.zeros(64, dtype=torch.int32)):
        codes, scale = formats.encode(x, False, random)
        assert (formats.decode(codes, scale) > 0).all()


@both
def test_largest_and_smallest_numbers(signed):
    x = torch.zeros(4 * spec.GROUP)
    x[0], x[spec.GROUP], x[2 * spec.GROUP] = torch.finfo(torch.float32).max, spec.SMALLEST, spec.SMALLEST / 2
    codes, scale = formats.encode(x, signed)
    decoded = formats.decode(codes, scale)
    assert decoded.isfinite().all()
    assert decoded[0] == pytest.approx(float(x[0]), rel=0.01)
    assert decoded[spec.GROUP] == pytest.approx(spec.SMALLEST, rel=0.02)
    # Too small, and nothing.
    assert not decoded[2 * spec.GROUP :].any()


@both
def test_a_group_that_is_not_whole_has_a_scale_of_its_own(signed):
    x = moments(3, signed, seed=4)
    whole, scales = formats.encode(x, signed)
    codes, scale = formats.encode(x[:70], signed)
    assert torch.equal(codes[:64], whole[:64])
    assert torch.equal(scale[:2], scales[:2])
    assert scale[2].double() == scale_in_fp64(torch.cat((x[64:70], torch.zeros(26))))


# -- backups -----------------------------------------------------------------------------------------------------------


@narrow
def test_neighbours_are_one_step_apart(dtype):
    weights = every_pattern(dtype)
    order = formats.ordered(weights)
    assert torch.equal(order.sort().values, torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32))
    assert_same_bits(formats.unordered(order, dtype), weights)
    by_order = weights[order.argsort()].float()
    numbers = by_order[~by_order.isnan()]
    assert (numbers.diff() >= 0).all()


@narrow
@pytest.mark.parametrize("target", ["near", "any"])
def test_every_bit_pattern_is_put_back_from_wherever_it_was_moved(dtype, target):
    weights = every_pattern(dtype)
    generator = torch.Generator().manual_seed(5)
    for _ in range(8):
        if target == "any":
            aims = weights[torch.randperm(len(weights), generator=generator)]
        else:
            aims = (weights.float() * (1 + 0.2 * torch.randn(len(weights), generator=generator))).to(dtype)
        moved, steps = weights.clone(), torch.zeros(len(weights), dtype=torch.int8)
        formats.displace(moved, aims, steps)
        assert torch.equal(bits(formats.replace(moved, steps)), bits(weights))
        distance = formats.ordered(aims) - formats.ordered(weights)
        assert torch.equal(steps.to(torch.int32), distance.clamp(-127, 127))
        reached = distance.abs() <= 127
        assert torch.equal(bits(moved)[reached], bits(aims)[reached])


# -- master weights ----------------------------------------------------------------------------------------------------


def test_all_master_weights_of_24_bits_are_kept_exactly():
    for high in range(0, 1 << 16, 1 << 13):
        patterns = torch.arange(high << 8, (high + (1 << 13)) << 8, dtype=torch.int64) << 8
        master = (patterns - ((patterns >> 31) << 32)).to(torch.int32).view(torch.float32)
        weight, remainder = torch.empty_like(master, dtype=torch.bfloat16), torch.empty(len(master), dtype=torch.int8)
        formats.split(master, weight, remainder)
        again = formats.combine(weight, remainder)
        # From the largest bf16 number on the rounding is an infinity.
        kept = weight.isfinite()
        assert torch.equal(bits(again)[kept], bits(master)[kept])
        distance = (weight.double() - master.double()).abs()[kept]
        nearest = (master.bfloat16().double() - master.double()).abs()[kept]
        assert torch.equal(distance, nearest)


def test_24_bits_are_rounded_to_one_of_two_neighbours_with_the_right_probabilities():
    generator = torch.Generator().manual_seed(6)
    master = torch.randn(1 << 12, generator=generator)
    up = torch.zeros(len(master), dtype=torch.int64)
    for byte in range(256):
        weight, remainder = torch.empty_like(master, dtype=torch.bfloat16), torch.empty(len(master), dtype=torch.int8)
        formats.split(master, weight, remainder, torch.full((len(master),), byte, dtype=torch.int32))
        lost = bits(formats.combine(weight, remainder)) - (bits(master) & -0x100)
        assert ((lost == 0) | (lost == 0x100)).all()
        up += lost == 0x100
    assert torch.equal(up, (bits(master) & 0xFF).to(torch.int64))


def test_what_is_not_a_number_stays_so():
    canonical = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    master = torch.cat((torch.tensor([float("nan"), float("inf"), float("-inf")]), canonical))
    weight, remainder = torch.empty(5, dtype=torch.bfloat16), torch.empty(5, dtype=torch.int8)
    formats.split(master, weight, remainder, torch.full((5,), 255, dtype=torch.int32))
    assert_same_bits(weight, master.bfloat16())
    assert_same_bits(formats.combine(weight, remainder), master)
