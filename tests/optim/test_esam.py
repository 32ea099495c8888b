"""ESAM: the random part of the weights that is perturbed."""

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM
from fsam_triton.optim.coefficients import representable
from tests.fp64_optimizers import ReferenceFSAM, assert_masks_are_well_separated
from tests.optim.esam import BOTH_MASKS, moved_by_perturb
from tests.optim.variants import WIDE
from tests.problem import Problem, assert_weights_close, small_model
from tests.training import assert_same_bits, assert_unchanged, closure_of, gradients_apart, passes_of, train, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@BOTH_MASKS
def test_fifty_steps_of_drawn_weights_equal_the_reference(ours, theirs, adaptive, dtype):
    """The reference is told which weights were drawn: those that moved (every |eps| is far above an ulp)."""
    model, problem, selections = small_model(dtype), Problem(sparse=True), []
    shared = {"lr": 0.01, "rho": 0.5, "adaptive": adaptive, "beta": 0.25}
    named = list(model.named_parameters())
    reference = ReferenceFSAM(named, selections=lambda step, index: selections[step][index], **shared, **theirs)
    optimizer = FSAM(named, **shared, **ours)
    for step in range(50):
        first, second = passes_of(step)
        closure_of(model, optimizer, first, problem)()
        selections.append(moved_by_perturb(model, optimizer))
        problem.loss(model.parameters(), second).backward()
        optimizer.step()
        reference.step(gradients_apart(problem, step))
    assert_masks_are_well_separated(reference, dtype)
    assert_weights_close(model.parameters(), reference.weights, 50, 0.01)


def one_tensor(n: int, dtype: torch.dtype = torch.float64, value: float = 0.0) -> nn.Parameter:
    return nn.Parameter(torch.full((n,), value, dtype=dtype))


def perturbed_once(parameters: list[nn.Parameter], **kwargs) -> list[Tensor]:
    """The perturbed weights; the clean ones come back when the optimizer is gone."""
    optimizer = FSAM(parameters, **kwargs)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.perturb()
    return [p.detach().clone() for p in parameters]


@pytest.mark.parametrize("beta", [0.01, 0.3, 0.5, 0.9])
def test_about_beta_of_the_weights_move_by_one_over_beta(beta):
    n = 2**16
    (weight,) = perturbed_once([one_tensor(n)], rho=float(n) ** 0.5, beta=beta)
    moved = weight != 0
    # Five standard deviations of n coin flips; beta itself is rounded to a multiple of 2**-15.
    assert abs(moved.sum().item() - beta * n) < 5 * (n * beta * (1 - beta)) ** 0.5 + n * 2**-16
    # The norm is of n ones: it has no rounding errors but that of 1e-12 in it.
    expected = torch.full_like(weight[moved], 1 / representable(beta))
    torch.testing.assert_close(weight[moved], expected, rtol=1e-12, atol=0)


def test_weights_are_drawn_independently():
    n = 2**16
    first, second = (w != 0 for w in perturbed_once([one_tensor(n), one_tensor(n)], beta=0.5))
    for a, b in ((first, second), (first[1:], first[:-1]), (first[n // 2 :], first[: n // 2])):
        # How often two fair coins agree: five standard deviations.
        assert abs((a == b).sum().item() - a.numel() / 2) < 5 * (a.numel() / 4) ** 0.5


@pytest.mark.parametrize("between", ["step", "restore"])
def test_every_perturbation_has_a_draw_of_its_own(between):
    model = small_model(torch.float64)
    optimizer, draws = FSAM(model.parameters(), rho=0.5, beta=0.5), []
    for step in range(3):
        closure_of(model, optimizer, step)()
        draws.append(torch.cat([moved.flatten() for moved in moved_by_perturb(model, optimizer)]))
        closure_of(model, optimizer, step)()
        getattr(optimizer, between)()
    for first, second in ((0, 1), (1, 2), (0, 2)):
        assert abs((draws[first] == draws[second]).sum().item() - 284) < 5 * 568**0.5 / 2


def test_draw_depends_on_the_seed():
    weights = [perturbed_once([one_tensor(2**12)], beta=0.5, seed=seed)[0] for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_beta_of_one_draws_everything_and_is_sam_to_the_bit():
    model, twin = small_model(), small_model()
    train(model, FSAM(model.parameters(), lr=0.01, rho=0.5, beta=1.0), 5)
    train(twin, FSAM(twin.parameters(), lr=0.01, rho=0.5), 5)
    assert_same_bits(model, twin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_perturbation_of_a_part_of_sixteen_bit_weights_is_unbiased(dtype):
    """Which weights are drawn and how they are rounded are independent halves of the same random bits."""
    n, beta, size = 2**18, 0.5, torch.finfo(dtype).eps / 16
    (weight,) = perturbed_once([one_tensor(n, dtype, 1.5)], rho=size * beta * n**0.5, beta=beta)
    moved = (weight.double() - 1.5).mean().item()
    # Where drawn (1/2), up by an ulp with probability 1/16: 1/32 in all; five standard deviations of n coin flips.
    assert abs(moved - beta * size) < 5 * torch.finfo(dtype).eps * (31 / 32**2 / n) ** 0.5


def test_restore_after_drawn_weights_is_bit_exact():
    model = small_model()
    optimizer = FSAM(model.parameters(), rho=0.5, beta=0.5)
    train(model, optimizer, 2)
    before = weights_of(model)
    closure_of(model, optimizer, 2)()
    optimizer.perturb()
    optimizer.restore()
    assert_unchanged(model, before)
