"""FSAM in every precision: restoring to the bit, stochastic rounding, master weights."""

import pytest
import torch
from torch import nn

from fsam_triton import FSAM
from tests.fp64_optimizers import ReferenceFSAM
from tests.optim.variants import FISHER_ASAM, VARIANTS, every_precision
from tests.problem import Problem, assert_weights_close, small_model
from tests.training import assert_unchanged, closure_of, train, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


@every_precision
@pytest.mark.parametrize("variant", [VARIANTS[1], FISHER_ASAM], ids=lambda variant: variant.name)
def test_restore_is_bit_exact(variant, dtype, kwargs):
    model = small_model(dtype)
    optimizer = variant.optimizer(model.named_parameters(), **kwargs)
    train(model, optimizer, 2)
    before = weights_of(model)
    Problem().loss(model.parameters(), 2).backward()
    optimizer.perturb()
    assert optimizer.perturbed
    assert not torch.equal(model["dense"].weight, before[0])
    optimizer.restore()
    assert not optimizer.perturbed
    assert_unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("master_weights", [False, True], ids=["rounded", "master"])
def test_stochastic_rounding_realises_a_perturbation_below_half_an_ulp(dtype, master_weights):
    n, size = 2**16, torch.finfo(dtype).eps / 16
    weight = nn.Parameter(torch.full((n,), 1.5, dtype=dtype))
    sign = torch.randint(0, 2, (n,)) * 2 - 1
    optimizer = FSAM([weight], rho=size * n**0.5, master_weights=master_weights)
    weight.grad = sign.to(dtype)
    optimizer.perturb()
    moved = ((weight.detach().double() - 1.5) * sign).mean().item()
    # n coin flips of probability p = size / ulp = 1 / 16 and height ulp; five standard deviations.
    assert abs(moved - size) < 5 * torch.finfo(dtype).eps * (15 / 256 / n) ** 0.5


def test_without_stochastic_rounding_a_perturbation_below_half_an_ulp_is_lost():
    weight = nn.Parameter(torch.full((24, 16), 1.5, dtype=torch.bfloat16))
    optimizer = FSAM([weight], rho=2.0**-11 * 384**0.5, stochastic_rounding=False)
    weight.grad = torch.ones_like(weight)
    optimizer.perturb()
    assert torch.equal(weight, torch.full_like(weight, 1.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_follow_an_fp32_run_with_the_same_gradients(dtype):
    """Without curvature the gradients do not depend on the perturbation: they are the same numbers in every dtype."""
    problem, model, twin = Problem(curvature=0.0, sparse=True), small_model(dtype), small_model()
    optimizer = FSAM(model.parameters(), lr=0.01, master_weights=True)
    train(model, optimizer, 20, problem=problem)
    train(twin, torch.optim.AdamW(twin.parameters(), lr=0.01), 20, problem=problem)
    masters = [optimizer.master_weight(p) for p in model.parameters()]
    assert_weights_close(masters, twin.parameters(), 20, 0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_perturbed_weight_with_a_master_is_the_perturbed_sixteen_bit_weight_rounded_to_a_neighbour(dtype):
    model = small_model(dtype)
    optimizer = FSAM(model.parameters(), lr=0.01, rho=1.0, master_weights=True)
    train(model, optimizer, 3)
    reference = ReferenceFSAM(list(model.parameters()), rho=1.0)
    closure_of(model, optimizer, 3)()
    ascent = reference.ascent([parameter.grad for parameter in model.parameters()])
    optimizer.perturb()
    for parameter, weight, eps in zip(model.parameters(), reference.weights, ascent, strict=True):
        # One ulp of the 16-bit value, and fp32's own rounding of a value on the verge of the next one.
        ulp = torch.finfo(dtype).eps * (weight + eps).abs() + 2**-20
        assert ((parameter.double() - weight - eps).abs() <= ulp).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_training_lowers_the_loss(dtype):
    weight = nn.Parameter(torch.zeros(24, 16, dtype=dtype))
    target = Problem().linear_term(0, 0, weight)
    optimizer, losses = FSAM([weight], lr=1e-3, weight_decay=0.0), []

    def closure():
        optimizer.zero_grad()
        loss = (weight - target).float().square().mean()
        loss.backward()
        return loss

    for _ in range(300):
        losses.append(optimizer.step(closure).item())
    # 300 steps of 1e-3 take every |w| to about 0.3 of its target of at least 0.75.
    assert losses[-1] < 0.6 * losses[0]
