"""FSAM when gradients are zero, infinite or NaN, in either pass."""

import pytest
import torch

from fsam_triton import FSAM
from tests.optim.variants import MASKED, NON_FINITE, VARIANTS, assert_same_states, every_variant, pair, spoil
from tests.problem import Problem, small_model
from tests.training import assert_same_bits, assert_unchanged, closure_of, train, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("value", [0.0, *NON_FINITE])
@every_variant
def test_useless_ascent_gradient_leaves_adamw_l2sp_to_the_bit(variant, value):
    model, optimizer, twin, plain = pair(torch.float32, variant)
    train(twin, plain, 5)
    for step in range(5):
        closure_of(model, optimizer, step)()
        spoil(model, value)
        optimizer.perturb()
        closure_of(model, optimizer, step)()
        optimizer.step()
    assert_same_bits(model, twin)
    assert_same_states(model, optimizer, twin, plain)


@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_stay_finite_while_perturbed_by_a_non_finite_gradient(dtype, value):
    model = small_model(dtype)
    optimizer = FSAM(model.parameters())
    Problem().loss(model.parameters(), 0).backward()
    spoil(model, value)
    optimizer.perturb()
    assert_same_bits(model, small_model(dtype))


@pytest.mark.parametrize("bad", NON_FINITE)
@pytest.mark.parametrize("variant", [VARIANTS[0], MASKED], ids=lambda variant: variant.name)
def test_non_finite_update_gradient_keeps_the_unperturbed_weight_and_its_moments(variant, bad):
    model = small_model()
    optimizer = variant.optimizer(model.named_parameters(), lr=0.01)
    train(model, optimizer, 2)
    weight, state = model["dense"].weight, optimizer.state[model["dense"].weight]
    frozen = [t[3, 5].clone() for t in (weight.detach(), state["exp_avg"], state["exp_avg_sq"])]
    closure_of(model, optimizer, 2)()
    optimizer.perturb()
    closure_of(model, optimizer, 2)()
    spoil(model, bad)
    optimizer.step()
    assert [t[3, 5] for t in (weight.detach(), state["exp_avg"], state["exp_avg_sq"])] == frozen
    assert all(p.isfinite().all() for p in model.parameters())


@every_variant
def test_step_skipped_by_clipping_restores_the_weights_to_the_bit(variant):
    model = small_model()
    optimizer = variant.optimizer(model.named_parameters(), lr=0.01, max_grad_norm=1.0)
    train(model, optimizer, 2)
    before, step = weights_of(model), optimizer.state[model["dense"].weight]["step"].clone()
    closure_of(model, optimizer, 2)()
    optimizer.perturb()
    closure_of(model, optimizer, 2)()
    spoil(model, float("inf"))
    optimizer.step()
    assert not optimizer.perturbed
    assert_unchanged(model, before)
    assert optimizer.state[model["dense"].weight]["step"] == step
