"""The passes of the radix select: the kernels in the interpreter, C++ and the reference against plain Python."""

import math
import struct
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fsam_triton.kernels import cpu, reference
from tests.kernels.cases import FLOATS, any_bits, ordinary, special_values

topk_mask = pytest.importorskip("fsam_triton.kernels.topk_mask")
every_dtype = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())


@pytest.fixture(params=["kernel", "cpu", "reference"])
def passes(request, interpret):
    """`digit_histogram` and `write_mask_`, as the kernels, the C++ and the reference do them."""
    if request.param != "kernel":
        return cpu if request.param == "cpu" else reference
    return SimpleNamespace(
        digit_histogram=lambda *args: interpret(topk_mask.digit_histogram, *args),
        write_mask_=lambda *args: interpret(topk_mask.write_mask_, *args),
    )


def key_of(value: float, wide: bool) -> int:
    """The bit pattern of |value|, 0 for a NaN."""
    if math.isnan(value):
        return 0
    return int.from_bytes(struct.pack("<d" if wide else "<f", abs(value)), "little")


def keys_of(values: Tensor, wide: bool) -> list[int]:
    return [key_of(value, wide) for value in values.double().tolist()]


def scalar(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


def mask_words(n: int) -> Tensor:
    """Words that were something else before."""
    return torch.full(((n + 31) // 32,), 0x5A5A5A5A, dtype=torch.int32)


def bits_of(mask: Tensor) -> list[bool]:
    return [bool(word >> bit & 1) for word in mask.tolist() for bit in range(32)]


def expected_bits(values: Tensor, threshold: int, quota: int, wide: bool) -> list[bool]:
    out = []
    for key in keys_of(values, wide):
        tie = key == threshold
        out.append(key > threshold or (tie and quota > 0))
        quota -= tie
    return out


def tied(n: int, dtype: torch.dtype, seed: int, levels: int = 5) -> Tensor:
    """Numbers of few magnitudes and both signs."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.randint(0, levels, (n,), generator=generator) / 4
    return (magnitude * (torch.randint(0, 2, (n,), generator=generator) * 2 - 1)).to(dtype)


# -- keys --------------------------------------------------------------------------------------------------------------


@every_dtype
def test_keys_have_the_order_of_magnitudes(dtype):
    values = torch.cat([any_bits(4096, dtype, seed=1), special_values(dtype)])
    values = values[~values.isnan()]
    key = reference.magnitude_key(values, dtype == torch.float64)
    by_key, by_magnitude = key.argsort(stable=True), values.abs().argsort(stable=True)
    assert torch.equal(by_key, by_magnitude)


@pytest.mark.parametrize(("wide", "infinity"), [(False, 0x7F800000), (True, 0x7FF0000000000000)])
@every_dtype
def test_keys_of_special_values(dtype, wide, infinity):
    keys = reference.magnitude_key(torch.tensor([0.0, -0.0, math.nan, -math.nan, math.inf], dtype=dtype), wide)
    assert keys.tolist() == [0, 0, 0, 0, infinity]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_narrow_types_have_the_keys_of_the_same_fp32_numbers(dtype):
    """So that gradients of different types can be compared with one another."""
    values = torch.cat([any_bits(4096, dtype, seed=1), special_values(dtype)])
    assert torch.equal(reference.magnitude_key(values, False), reference.magnitude_key(values.float(), False))
    assert torch.equal(reference.magnitude_key(values, True), reference.magnitude_key(values.double(), True))


# -- histogram ---------------------------------------------------------------------------------------------------------


def expected_histogram(values: Tensor, prefix: int, shift: int, bits: int, wide: bool) -> list[int]:
    counts = [0] * (1 << bits)
    for key in keys_of(values, wide):
        if key >> (shift + bits) == prefix >> (shift + bits):
            counts[key >> shift & ((1 << bits) - 1)] += 1
    return counts


@pytest.mark.parametrize("n", [1, 31, 1024, 16384, 16389])
@every_dtype
def test_first_histogram_counts_every_key_once(passes, dtype, n):
    wide = dtype == torch.float64
    values, shift = ordinary(n, dtype, seed=n), 56 if wide else 23
    hist = passes.digit_histogram(values, scalar(0), shift, 7 if wide else 8, wide)
    assert hist.tolist() == expected_histogram(values, 0, shift, 7 if wide else 8, wide)
    assert int(hist.sum()) == n


@pytest.mark.parametrize(("shift", "bits"), [(23, 8), (15, 8), (7, 8), (0, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_later_histograms_count_the_keys_of_the_prefix_alone(passes, dtype, shift, bits):
    values = torch.cat([tied(3000, dtype, seed=1), special_values(dtype), ordinary(1000, dtype, seed=2)])
    for value in (0.75, float(values[-1]), 123.0):
        prefix = key_of(value, False) >> (shift + bits) << (shift + bits)
        hist = passes.digit_histogram(values, scalar(prefix), shift, bits, False)
        assert hist.tolist() == expected_histogram(values, prefix, shift, bits, False)


@pytest.mark.parametrize("shift", [56, 49, 28, 7, 0])
def test_wide_histograms_count_the_keys_of_the_prefix_alone(passes, shift):
    values = torch.cat([tied(3000, torch.float64, seed=1), special_values(torch.float64)])
    prefix = key_of(0.75, True) >> (shift + 7) << (shift + 7)
    hist = passes.digit_histogram(values, scalar(prefix), shift, 7, True)
    assert hist.tolist() == expected_histogram(values, prefix, shift, 7, True)


def test_histogram_of_nothing_is_zero(passes):
    assert passes.digit_histogram(torch.empty(0), scalar(0), 23, 8, False).tolist() == [0] * 256


# -- mask --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quota", [0, 1, 100, 10**6])
@pytest.mark.parametrize("n", [1, 31, 33, 1000, 1024, 16384, 16389])
def test_ties_are_taken_from_the_lowest_index_on(passes, n, quota):
    values, mask, threshold = tied(n, torch.float32, seed=n), mask_words(n), key_of(0.5, False)
    left = passes.write_mask_(mask, values, scalar(threshold), scalar(quota), False)
    assert bits_of(mask)[:n] == expected_bits(values, threshold, quota, False)
    assert int(left) == max(0, quota - keys_of(values, False).count(threshold))


@every_dtype
def test_mask_of_special_values(passes, dtype):
    wide = dtype == torch.float64
    values = torch.cat([special_values(dtype), ordinary(100, dtype, seed=1), special_values(dtype)])
    for threshold in sorted(set(keys_of(special_values(dtype), wide))):
        mask = mask_words(values.numel())
        passes.write_mask_(mask, values, scalar(threshold), scalar(3), wide)
        assert bits_of(mask)[: values.numel()] == expected_bits(values, threshold, 3, wide)


@pytest.mark.parametrize("n", [1, 31, 33, 1000, 16389])
def test_bits_after_the_end_are_zero(passes, n):
    mask = mask_words(n)
    passes.write_mask_(mask, torch.ones(n), scalar(0), scalar(n), False)
    bits = bits_of(mask)
    assert all(bits[:n])
    assert not any(bits[n:])


def test_words_after_the_mask_are_not_touched(passes):
    words = mask_words(64 * 32)
    passes.write_mask_(words[:3], torch.ones(70), scalar(0), scalar(70), False)
    assert torch.equal(words[3:], mask_words(61 * 32))


def test_nan_comes_after_everything_but_zeros(passes):
    values = torch.tensor([math.nan, 1e-45, -1e-45, math.nan, 0.0])
    mask = mask_words(5)
    passes.write_mask_(mask, values, scalar(0), scalar(2), False)
    assert bits_of(mask)[:5] == [True, True, True, True, False]


def test_zeros_of_both_signs_tie(passes):
    values = torch.tensor([-0.0, 0.0, -0.0, 0.0])
    mask = mask_words(4)
    passes.write_mask_(mask, values, scalar(0), scalar(3), False)
    assert bits_of(mask)[:4] == [True, True, True, False]


def test_quota_runs_on_over_several_tensors(passes):
    parts = [tied(n, torch.float32, seed=n) for n in (40, 1, 20000, 33, 5)]
    threshold = key_of(0.75, False)
    left = scalar(sum(keys_of(part, False).count(threshold) for part in parts[:3]) - 7)
    quota, got = int(left), []
    for part in parts:
        mask = mask_words(part.numel())
        left = passes.write_mask_(mask, part, scalar(threshold), left, False)
        got += bits_of(mask)[: part.numel()]
    assert got == expected_bits(torch.cat(parts), threshold, quota, False)
    assert int(left) == 0


def test_quota_given_is_not_changed(passes):
    quota = scalar(5)
    left = passes.write_mask_(mask_words(10), torch.ones(10), scalar(key_of(1.0, False)), quota, False)
    assert (int(quota), int(left)) == (5, 0)


def test_nothing_to_choose_from_leaves_the_quota(passes):
    mask = torch.empty(0, dtype=torch.int32)
    assert int(passes.write_mask_(mask, torch.empty(0), scalar(3), scalar(5), False)) == 5


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
def test_threads_of_the_cpp_share_the_work_as_if_it_were_one(dtype):
    """Many ties, of which the first are taken, over several blocks and a ragged end."""
    values = (ordinary(3 * 65536 + 17, torch.float32, seed=1) * 8).round().to(dtype)
    wide = dtype == torch.float64
    threshold, quota = scalar(key_of(8.0, wide)), scalar(5000)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        hist = cpu.digit_histogram(values, threshold, *((56, 7) if wide else (23, 8)), wide)
        mask = mask_words(values.numel())
        left = cpu.write_mask_(mask, values, threshold, quota, wide)
    finally:
        torch.set_num_threads(before)
    expected = mask_words(values.numel())
    assert torch.equal(hist, reference.digit_histogram(values, threshold, *((56, 7) if wide else (23, 8)), wide))
    assert int(left) == int(reference.write_mask_(expected, values, threshold, quota, wide))
    assert torch.equal(mask, expected)
    assert int((values.abs() == 8).sum()) > 5000
