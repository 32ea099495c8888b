"""Rounds a model's linear layers to few bits for a while, to see how much of its quality survives quantization."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import check

GROUP = 64


def round_to_nearest(weight: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """Round weights to the nearest of ``2**bits - 1`` values, symmetric about zero, without calibration.

    Each run of `group` weights of a row has its own scale, its largest magnitude over ``2**(bits - 1) - 1``. The last
    run of a row may be shorter. This is the simplest method of post-training quantization (round-to-nearest, RTN).

    Args:
        weight: [rows, columns], floating point.
        bits: per weight, from 2 to 8.
        group: weights per scale, >= 1 (default: 64).

    Returns:
        The rounded weights, as a new tensor of the same shape and type.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> round_to_nearest(torch.tensor([[0.1, -0.7, 0.34, 0.0]]), bits=4)  # steps of 0.7 / 7
        tensor([[ 0.1000, -0.7000,  0.3000,  0.0000]])
    """
    check(weight.ndim == 2 and weight.is_floating_point(), "weight", weight, "must be a floating-point matrix")
    _check_sizes(bits, group)
    rows, columns = weight.shape
    largest = 2 ** (bits - 1) - 1
    padded = nn.functional.pad(weight.float(), (0, -columns % group)).view(rows, -1, group)
    # A run of zeros stays one.
    scale = (padded.abs().amax(-1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    return ((padded / scale).round() * scale).view(rows, -1)[:, :columns].to(weight.dtype)


def linear_weights(model: nn.Module) -> list[Tensor]:
    """The floating-point weights of the model's linear layers, except those shared with an embedding: a row per output.

    Linear layers are `torch.nn.Linear` and transformers' Conv1D, whose weight is transposed.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights: dict[int, Tensor] = {}
    for module in model.modules():
        transposed = (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D")
        if not (isinstance(module, nn.Linear) or transposed):
            continue
        weight = module.weight
        if isinstance(weight, Tensor) and weight.is_floating_point():
            weights.setdefault(id(weight), weight.detach().T if transposed else weight.detach())
    return [weight for key, weight in weights.items() if key not in embeddings]


@contextlib.contextmanager
def rounded_weights(model: nn.Module, bits: int = 4, group: int = GROUP) -> Iterator[None]:
    """Context in which the linear layers of a model have weights rounded by `round_to_nearest`.

    Evaluate the model inside the context: the difference from its usual quality is the price of quantizing it. The
    embeddings, and an output layer that shares its weights with them, are left alone, as most quantizers do. At the
    end the weights are put back bit for bit, also after an exception; a copy of them is kept until then.

    Args:
        model: any module with linear layers: `torch.nn.Linear`, or transformers' Conv1D (GPT-2).
        bits: per weight, from 2 to 8 (default: 4).
        group: weights per scale, >= 1 (default: 64).

    Raises:
        ValueError: an argument is out of its range, or the model has no such layer.

    Example:
        >>> model = torch.nn.Linear(64, 2)
        >>> with rounded_weights(model, bits=3):
        ...     len(model.weight[0].unique()) <= 2**3 - 1
        True
    """
    _check_sizes(bits, group)
    weights = linear_weights(model)
    check(len(weights) > 0, "model", type(model).__name__, "must have linear layers")
    kept = [weight.clone() for weight in weights]
    try:
        for weight in weights:
            weight.copy_(round_to_nearest(weight, bits, group))
        yield
    finally:
        for weight, own in zip(weights, kept, strict=True):
            weight.copy_(own)


def _check_sizes(bits: int, group: int) -> None:
    check(isinstance(bits, int) and 2 <= bits <= 8, "bits", bits, "must be an int from 2 to 8")
    check(isinstance(group, int) and group >= 1, "group", group, "must be an int >= 1")
