"""Noise on weights: kernel and C++ against the reference to the bit, the reference against the description in fp64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fsam_triton.kernels import cpu, reference, spec
from tests.kernels.cases import FLOATS, assert_same_bits, ordinary, pairwise

noise = pytest.importorskip("fsam_triton.kernels.noise")
# Parts of tiles, whole ones, rows of one element.
SHAPES = [(3, 5), (8, 128), (17, 200), (5, 1), (1, 300), (0, 4)]
CASES = pairwise(lambda **_: True, dtype=list(FLOATS), out=[*FLOATS, "itself"], shape=SHAPES, by_column=[False, True])


@pytest.fixture(params=["kernel", "C++"])
def add_noise_(request, interpret):
    if request.param == "C++":
        return cpu.add_noise_
    return lambda *args: interpret(noise.add_noise_, *args)


def by_hand(n: int, key: int) -> np.ndarray:
    """The numbers in fp64, from the description in `spec`: two rounds, four bytes, a cubic polynomial."""
    x = (np.arange(n, dtype=np.uint64) * spec.WEYL + key) % 2**32
    for factor in (spec.MIX, spec.MIXES[0]):
        x = (x ^ x >> np.uint64(15)) * factor % 2**32
    t = sum((x >> np.uint64(8 * i)) % 256 for i in range(4)).astype(np.float64) - 510
    return spec.NOISE_LINEAR * t + spec.NOISE_CUBIC * t**3


def arguments(dtype: str, out: str, shape: tuple, by_column: bool) -> tuple[Tensor, Tensor, Tensor]:
    weight = ordinary(shape[0] * shape[1], FLOATS[dtype], seed=1).view(shape)
    scale = ordinary(shape[by_column], reference.compute_dtype(weight.dtype), seed=2)
    return (weight.clone() if out == "itself" else torch.empty(shape, dtype=FLOATS[out])), weight, scale


@pytest.mark.parametrize("case", CASES, ids=str)
def test_noisy_weight_has_the_bits_of_the_reference(case, add_noise_):
    out, weight, scale = arguments(**case)
    expected, before = out.clone(), weight.clone()
    if case["out"] == "itself":
        weight, before = out, expected
    for key in (0, 0xDEADBEEF):
        reference.add_noise_(expected, before, scale, key, case["by_column"])
        add_noise_(out, weight, scale, key, case["by_column"])
        assert_same_bits(out, expected, str(key))


@pytest.mark.parametrize("by_column", [False, True])
def test_threads_share_a_large_weight(by_column):
    out, weight, scale = arguments("fp32", "bf16", (300, 129), by_column)
    expected, threads = out.clone(), torch.get_num_threads()
    reference.add_noise_(expected, weight, scale, 77, by_column)
    torch.set_num_threads(3)
    try:
        cpu.add_noise_(out, weight, scale, 77, by_column)
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(out, expected, "three threads")


@pytest.mark.parametrize("by_column", [False, True])
def test_reference_adds_what_the_description_says(by_column):
    out, weight, scale = arguments("fp64", "fp64", (7, 9), by_column)
    reference.add_noise_(out, weight, scale, 0x9ABCDEF0, by_column)
    z = torch.from_numpy(by_hand(63, 0x9ABCDEF0)).view(7, 9)
    expected = weight + z * (scale[None, :] if by_column else scale[:, None])
    # A few roundings of numbers of this size.
    torch.testing.assert_close(out, expected, rtol=8 * 2.0**-53, atol=8 * 2.0**-53 * 5 * float(scale.abs().max()))


def test_moments_of_the_numbers_are_those_of_a_gaussian():
    """Exactly, over all sums of four bytes."""
    counts = np.ones(1)
    for _ in range(4):
        counts = np.convolve(counts, np.ones(256) / 256)
    t = np.arange(len(counts)) - float(spec.NOISE_CENTRE)
    z = spec.NOISE_LINEAR * t + spec.NOISE_CUBIC * t**3
    moments = [float((counts * z**k).sum()) for k in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=2e-6)
    assert float((counts * z**6).sum()) == pytest.approx(14.46, abs=0.005)
    assert abs(z).max() < 4.05
    cdf = counts.cumsum() - counts / 2
    gaussian = torch.special.ndtr(torch.from_numpy(z)).numpy()
    assert abs(cdf - gaussian).max() < 0.0021


def test_numbers_are_not_correlated_at_any_distance():
    """Nor their squares: of 200,000 Gaussians, which chance makes of the correlations, none is beyond 5.7 sigma."""
    n = 1 << 19
    z = reference.normals(torch.empty(n, dtype=torch.float64), torch.tensor(12345)).numpy()
    for x in (z, (z * z - 1) / np.sqrt(2)):
        spectrum = np.fft.rfft(np.concatenate([x, np.zeros(n)]))
        products = np.fft.irfft(abs(spectrum) ** 2)[1:200_000]
        assert abs(products).max() / np.sqrt(n) < 5.7


def test_another_key_gives_other_numbers():
    like = torch.empty(10_000, dtype=torch.float64)
    first, second = (reference.normals(like, torch.tensor(key)) for key in (7, 8))
    assert abs(float((first * second).mean())) < 5 / 100
