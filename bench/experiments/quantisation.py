"""Rounds the weights of a model's linear layers to few bits, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

BITS = (8, 4, 3)
GROUP = 64


def round_to_nearest(weight: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """The weights that are left of rounding to the nearest of 2**bits - 1 values, without calibration.

    Each run of `group` weights of a row has a scale of its own, its largest magnitude over 2**(bits - 1) - 1; a row's
    last run may be shorter.

    Args:
        weight: [rows, columns].
        bits: of a weight, at least 2.
        group: weights to a scale.
    """
    rows, columns = weight.shape
    largest = 2 ** (bits - 1) - 1
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % group)).view(rows, -1, group)
    # A run of zeros stays one.
    scale = (padded.abs().amax(-1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    return ((padded / scale).round() * scale).view(rows, -1)[:, :columns].to(weight.dtype)


def linear_weights(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The weights of the linear layers, except those that an embedding shares."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    return [layer.weight for layer in layers if id(layer.weight) not in embeddings]


@contextlib.contextmanager
@torch.no_grad()
def rounded(model: torch.nn.Module, bits: int, group: int = GROUP) -> Iterator[None]:
    """Give the model rounded linear layers inside the context, and its own weights back after it."""
    weights = linear_weights(model)
    kept = [weight.clone() for weight in weights]
    try:
        for weight in weights:
            weight.copy_(round_to_nearest(weight, bits, group))
        yield
    finally:
        with torch.no_grad():
            for weight, own in zip(weights, kept, strict=True):
                weight.copy_(own)
