"""The measurements of bench/fidelity.py, where the right answer is known."""

import math

import pytest
import torch

from bench.fidelity import BF16, FP32, cast, compare, dithered, intend, perturb, rounded

N = 2**15
# Of bf16 between 2**-7 and 2**-6, where the weights lie and stay.
SPACING = 2.0**-14


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    sign = torch.randint(2, (N,), generator=generator) * 2 - 1
    weights = {"w": sign * (torch.rand(N, generator=generator) * 0.004 + 0.01)}
    return weights, {"w": torch.randn(N, generator=generator)}


def test_fp32_weights_take_the_whole_perturbation(problem):
    rho = 0.05
    figures = compare(*perturb(*problem, rho, FP32), rho)
    # Rounding errors of the N sums, at most 2**-31 each, and some of the factors' last bits.
    assert figures == pytest.approx((1, 1, 1), abs=math.sqrt(N) * 2**-31 / rho + 2**-20)


def test_rounding_to_nearest_loses_a_perturbation_below_half_a_spacing(problem):
    weights, grads = problem
    rho = 0.49 * SPACING * grads["w"].norm().item() / grads["w"].abs().max().item()
    assert compare(*perturb(weights, grads, rho, BF16, stochastic_rounding=False), rho) == (0, 0, 0)


@pytest.mark.parametrize("arguments", [{}, {"master_weights": True}], ids=str)
def test_stochastic_rounding_keeps_the_projection(problem, arguments):
    rho = 0.05
    _, _, projection = compare(*perturb(*problem, rho, BF16, **arguments), rho)
    # A rounding's variance is at most spacing**2 / 4 and the direction's squares sum to 1; five standard errors.
    assert projection == pytest.approx(1, abs=5 * SPACING / 2 / rho)


def test_cast_weights_of_a_checkpoint_are_weights_rounded_to_nearest(problem):
    weights, grads = rounded(problem[0], BF16), rounded(problem[1], BF16)
    stored, _ = perturb(weights, grads, 0.5, BF16, stochastic_rounding=False)
    seen = cast(weights, intend(grads, 0.5), BF16, {"w"})
    # The sums differ by up to 2**-30, because rho / norm has another last bit: one weight in 2**16 may round otherwise.
    assert (stored["w"] != seen["w"]).sum() <= 5


def test_autocast_computes_with_cast_weights():
    generator = torch.Generator().manual_seed(0)
    w, eps, x = (torch.randn(32, 32, generator=generator) for _ in range(3))
    with torch.autocast("cpu", BF16):
        out = torch.nn.functional.linear(x, w + eps)
    seen = w.bfloat16() + cast({"w": w}, {"w": eps}, BF16, {"w"})["w"]
    assert torch.equal(out, torch.nn.functional.linear(x.bfloat16(), seen.bfloat16()))


def test_dither_is_below_the_checkpoints_rounding(problem):
    checkpoint = rounded(problem[0], BF16)
    noisy = dithered(checkpoint)
    assert torch.equal(rounded(noisy, BF16)["w"], checkpoint["w"])
    # Uniform in a spacing: variance 1 / 12, and 1 / 180 of the square; five standard errors.
    noise = (noisy["w"] - checkpoint["w"]) / SPACING
    assert noise.mean() == pytest.approx(0, abs=5 * math.sqrt(1 / 12 / N))
    assert noise.square().mean() == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 180 / N))
