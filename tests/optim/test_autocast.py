"""FSAM under autocast, which keeps 16-bit copies of the weights within a block."""

import pytest
import torch
from torch import nn

from fsam_triton import FSAM
from tests.training import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")


def linear_under_autocast(**kwargs):
    """A model, its optimizer, and a closure that returns the losses of the samples and notes their mean."""
    generator = torch.Generator().manual_seed(0)
    model, seen = nn.Linear(32, 4), []
    with torch.no_grad():
        model.weight.copy_(torch.randn(4, 32, generator=generator))
        model.bias.zero_()
    inputs, labels = torch.randn(8, 32, generator=generator), torch.randint(0, 4, (8,), generator=generator)

    def losses(batch):
        out = nn.functional.cross_entropy(model(batch[0]).float(), batch[1], reduction="none")
        seen.append(out.mean().item())
        return out

    return model, FSAM(model.parameters(), lr=0.01, rho=2.0, **kwargs), losses, (inputs, labels), seen


def test_second_pass_sees_the_perturbed_weights_under_autocast():
    _, optimizer, losses, batch, seen = linear_under_autocast()

    def closure():
        optimizer.zero_grad()
        loss = losses(batch).mean()
        loss.backward()
        return loss

    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(closure)
        # And the next forward pass sees the updated ones.
        losses(batch)
    assert seen[1] > seen[0] + 0.1
    assert len(set(seen)) == 3


def test_second_pass_would_see_the_clean_weights_if_autocast_kept_its_copies(monkeypatch):
    """Shows that the test before this one can fail."""
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: None)
    _, optimizer, losses, batch, seen = linear_under_autocast()
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(losses, batch)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_step_under_autocast_gives_the_same_bits_without_its_cache(gamma):
    """With gamma < 1 the weights are first seen without gradients: their copies must not be used with gradients."""
    models = []
    for cache_enabled in (True, False):
        model, optimizer, losses, batch, _ = linear_under_autocast(gamma=gamma)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled):
            for _ in range(3):
                optimizer.step(losses, batch)
        models.append(model)
    assert_same_bits(*models)
