"""Parameters that are frozen, unfrozen or added while a mask is in use, or between the two passes of a step."""

import pytest
import torch
from torch import nn

from fsam_triton import FSAM, FisherMask

pytestmark = pytest.mark.usefixtures("one_thread")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False))


def gradients(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None


@pytest.mark.parametrize("samples", [1, 2])
def test_mask_stays_when_a_parameter_is_unfrozen_between_the_passes_of_the_first_step(samples):
    """The optimizer's buffers are made again then, before there is a state that has the mask."""
    model, late = net(), nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    optimizer = FSAM([*model.parameters(), late], mask=FisherMask(keep_ratio=0.5, interval=10, samples=samples))
    gradients(model)
    optimizer.perturb()
    masks = [optimizer.mask_of(p) for p in model.parameters()]
    assert any(mask.any() for mask in masks)
    late.requires_grad_(True)
    late.grad = torch.ones_like(late)
    gradients(model)
    optimizer.step()
    for p, mask in zip(model.parameters(), masks, strict=True):
        assert torch.equal(optimizer.mask_of(p), mask)
    assert not optimizer.mask_of(late).any()


def test_mask_stays_when_a_group_is_added_before_the_first_step():
    model, late = net(), nn.Parameter(torch.zeros(4, 4))
    optimizer = FSAM(model.parameters(), mask=FisherMask(keep_ratio=0.5, interval=10))
    gradients(model)
    optimizer.perturb()
    masks = [optimizer.mask_of(p) for p in model.parameters()]
    optimizer.add_param_group({"params": [late]})
    optimizer.restore()
    gradients(model)
    optimizer.perturb()
    for p, mask in zip(model.parameters(), masks, strict=True):
        assert torch.equal(optimizer.mask_of(p), mask)


def test_nothing_of_a_frozen_parameter_is_chosen_the_next_time():
    model = net()
    optimizer = FSAM(model.parameters(), mask=FisherMask(keep_ratio=0.5))
    first, last = model.parameters()
    for freeze in (False, True):
        last.requires_grad_(not freeze)
        gradients(model)
        optimizer.perturb()
        gradients(model)
        optimizer.step()
        assert optimizer.mask_of(last).any() == (not freeze)
        kept = int(optimizer.mask_of(first).sum() + optimizer.mask_of(last).sum())
        assert kept == (32 if freeze else 64)
