"""Training with a FishMask, and dense training with masked gradients to compare it with."""

import torch
from torch import nn

from fsam_triton import FSAM, AdamWL2SP, FishMask, MomentumSAM
from tests.problem import Problem
from tests.training import closure_of, weights_of

KEEP = 0.3
KINDS = [AdamWL2SP, FSAM, MomentumSAM]


def masked(model: nn.Module, seed: int = 0) -> FishMask:
    return FishMask.random(model, KEEP, seed=seed)


def train(model: nn.Module, optimizer, steps: int, *, problem=Problem(), start=0) -> None:
    for step in range(start, start + steps):
        if isinstance(optimizer, MomentumSAM):
            # A `Problem` is no module, whose call would be noticed.
            optimizer.perturb()
        optimizer.step(closure_of(model, optimizer, step, problem))


def train_dense(model: nn.Module, optimizer, mask: FishMask, steps: int, problem=Problem()) -> None:
    """Dense training with masked gradients; what decays outside the mask is put back."""
    before = weights_of(model)
    for step in range(steps):
        closure_of(model, optimizer, step, problem)()
        for name, p in model.named_parameters():
            if p.grad is not None:
                p.grad *= mask.bits(name)
        optimizer.step()
        with torch.no_grad():
            for (name, p), old in zip(model.named_parameters(), before, strict=True):
                p.copy_(torch.where(mask.bits(name), p, old))


def mask_of_the_head(model: nn.Module) -> FishMask:
    return FishMask({"head.weight": torch.arange(5)}, {name: p.shape for name, p in model.named_parameters()})
