"""What the sharpness tools leave as it was, and which weights they measure."""

import copy
import math
import random

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fsam_triton import FSAM, MomentumSAM
from fsam_triton.analysis import (
    Landscape,
    m_sharpness,
)
from tests.analysis.cases import (
    MEASURES,
    UNEQUAL,
    classify,
    language_model,
    measures,
    mlp,
    next_token,
    rows,
    token_batch,
)
from tests.training import assert_same_bits, assert_unchanged, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


# -- 16 bits -----------------------------------------------------------------------------------------------------------


@measures
def test_weights_of_16_bits_are_evaluated_in_fp32(measure):
    """A frozen parameter and buffers, too."""
    model = language_model("sdpa").bfloat16()
    model.transformer.h[0].mlp.c_proj.weight.requires_grad_(False)
    model.register_buffer("scale", torch.ones((), dtype=torch.bfloat16))

    def scaled_loss(model, batch):
        assert model.scale.dtype == torch.float32
        return model.scale * next_token(model, batch)

    results = [measure(m, scaled_loss, [token_batch(2, 1)]) for m in (model, copy.deepcopy(model).float())]
    if measure is MEASURES["loss_landscape"]:
        results = [landscape.losses.tolist() for landscape in results]
    assert results[0] == results[1]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# -- what stays as it was ----------------------------------------------------------------------------------------------


class Boom(Exception):
    pass


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3), nn.Linear(3, 3))
    return nn.Sequential(*layers).double()


class Noisy:
    """A loss that draws random numbers, counts in a buffer, and may raise in its third call."""

    def __init__(self, fails: bool = False) -> None:
        self.left = 2 if fails else math.inf
        self.modes: set[bool] = set()

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if self.left == 0:
            raise Boom
        self.left -= 1
        self.modes |= {module.training for module in model.modules()}
        torch.rand(1), numpy.random.rand(), random.random()
        model[1].num_batches_tracked += 1
        return classify(model, batch)


@pytest.mark.parametrize("fails", [False, True])
@measures
def test_model_and_random_states_stay_as_they_were(measure, fails):
    model, loss, called = net().train(), Noisy(fails), []
    model[4].eval()
    model[5].weight.requires_grad_(False)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 7.0) if i % 2 else None
        if p.requires_grad:
            p.register_hook(lambda g: called.append("tensor hook"))
            p.register_post_accumulate_grad_hook(lambda p: called.append("post-accumulate hook"))
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    before = {name: (x, x.clone(), x._version, x.grad, x.requires_grad) for name, x in tensors.items()}
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    loader = DataLoader([(x, y) for x, y in zip(*rows(6, 3), strict=True)], batch_size=3, shuffle=True)
    if fails:
        with pytest.raises(Boom):
            measure(model, loss, loader)
    else:
        measure(model, loss, loader)
    assert loss.modes == {False}
    assert [module.training for module in model.modules()] == modes
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        same, value, version, grad, requires_grad = before[name]
        assert x is same, name
        assert torch.equal(x, value), name
        assert (x._version, x.requires_grad) == (version, requires_grad)
        assert x.grad is grad
        assert grad is None or bool((grad == 7.0).all())
    assert not called
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert str(numpy.random.get_state()) == str(states[2])


@pytest.mark.parametrize("fails", [False, True])
def test_states_are_put_back_when_the_loader_raises(fails):
    model, state = net().train(), torch.get_rng_state()

    def loader():
        torch.rand(1)
        assert not model.training
        yield rows(3, 1)
        if fails:
            raise Boom

    if fails:
        with pytest.raises(Boom):
            m_sharpness(model, classify, loader())
    else:
        m_sharpness(model, classify, loader())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


@measures
def test_frozen_parameters_are_not_moved(measure):
    model, seen = net(), set()
    model[4].requires_grad_(False)

    def loss(model, batch):
        seen.add(tuple(model[4].weight.flatten().tolist()))
        return classify(model, batch)

    measure(model, loss, [rows(3, 1)])
    assert seen == {tuple(model[4].weight.flatten().tolist())}


@measures
@pytest.mark.parametrize("make", [FSAM, MomentumSAM])
def test_training_with_master_weights_continues_as_if_nothing_had_been_measured(make, measure):
    """Had a 16-bit weight been written, its master would have lost the lower bits."""

    def trained(measured: bool) -> nn.Module:
        model = mlp(torch.bfloat16)
        optimizer = make(model.parameters(), lr=1e-3, master_weights=True)
        batch = UNEQUAL[0][0].bfloat16(), UNEQUAL[0][1]
        wide = UNEQUAL[0][0].float(), UNEQUAL[0][1]

        def closure():
            optimizer.zero_grad()
            loss = classify(model, batch)
            loss.backward()
            return loss

        for step in range(4):
            optimizer.step(closure)
            if measured and step % 2:
                before = weights_of(model)
                measure(model, classify, [wide])
                assert_unchanged(model, before)
        return model

    assert_same_bits(trained(True), trained(False))


@pytest.mark.parametrize("make", [FSAM, MomentumSAM])
def test_sharpness_of_perturbed_weights_is_that_of_the_clean_ones(make):
    model = mlp()
    optimizer = make(model.parameters(), lr=1e-2, rho=0.5)
    classify(model, UNEQUAL[0]).backward()
    optimizer.step()
    clean = m_sharpness(model, classify, UNEQUAL)
    optimizer.zero_grad()
    classify(model, UNEQUAL[0]).backward()
    if not optimizer.perturbed:
        optimizer.perturb()
    assert m_sharpness(model, classify, UNEQUAL) == clean
    assert optimizer.perturbed


@measures
def test_gradients_may_be_off_around_the_call(measure):
    with torch.no_grad():
        actual = measure(mlp(), classify, UNEQUAL)
    expected = measure(mlp(), classify, UNEQUAL)
    if isinstance(actual, Landscape):
        actual, expected = actual.losses.tolist(), expected.losses.tolist()
    assert actual == expected


@measures
def test_compiled_model_is_evaluated_uncompiled(measure):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    actual, expected = (measure(m, classify, UNEQUAL) for m in (torch.compile(mlp(), backend=backend), mlp()))
    if isinstance(actual, Landscape):
        actual, expected = actual.losses.tolist(), expected.losses.tolist()
    assert actual == expected
    assert not compiled
