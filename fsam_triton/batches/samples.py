"""Parts of a batch: its first samples, or ESAM's choice of those whose loss the perturbation raises most."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import ArgumentError, check


def select_samples(batch: Any, before: Tensor, after: Tensor, gamma: float) -> Any:
    """Sharpness-sensitive data selection (ESAM, arXiv 2110.03141, section 3.2): a batch's most sensitive samples.

    Keeps the ``max(1, int(gamma * n))`` of n samples whose loss rose most from `before` to `after` (of equal ones, the
    first), in the order in which they are in the batch. A rise that is not finite (an overflow, for example) counts as
    the smallest: its sample is kept only if there are no others, so that it does not spoil the second pass.

    Tensors (on any device) and lists whose first dimension is n are reduced, in dicts and other mappings, lists, tuples
    and dataclasses, at any depth of nesting; everything else is passed on unchanged. If all tensors in a list of length
    n have n as their first dimension, the list is treated as a list of inputs, otherwise as a list of samples. A
    reduced BatchEncoding does not have the tokenizer's encodings. Nothing waits for the GPU if batch and losses are
    there, unless there is a list to reduce.

    Args:
        batch: the model's input, any nesting. It is not changed.
        before: per-sample losses at the weights, [n], n >= 1.
        after: per-sample losses at the perturbed weights, [n].
        gamma: fraction of the samples to keep, in (0, 1].

    Returns:
        A batch of the same types; the same object if all samples are kept (gamma = 1).

    Raises:
        ValueError: gamma is out of range, the losses are not two tensors of one shape [n], or nothing in the batch has
            n as its first dimension.

    Example:
        >>> import torch
        >>> from fsam_triton import select_samples
        >>> batch = {"input_ids": torch.tensor([[1, 2], [3, 4], [5, 6]]), "text": ["a", "b", "c"]}
        >>> select_samples(batch, torch.zeros(3), torch.tensor([0.3, 0.1, 0.2]), gamma=0.7)
        {'input_ids': tensor([[1, 2],
                [5, 6]]), 'text': ['a', 'c']}
    """
    check(isinstance(gamma, int | float) and 0 < gamma <= 1, "gamma", gamma, "must be in (0, 1]")
    for name, losses in (("before", before), ("after", after)):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses)
        fits = isinstance(losses, Tensor) and losses.dim() == 1 and len(losses) > 0
        check(fits, name, shape, "must be losses per sample, a tensor of shape [n], n >= 1")
    n = len(before)
    check(len(after) == n, "after", tuple(after.shape), f"must have the shape of before, ({n},)")
    k = max(1, int(gamma * n))
    found = False
    index = _largest_rises(before.detach(), after.detach(), k)

    @functools.cache
    def positions(device: torch.device) -> Tensor:
        return index.to(device)

    @functools.cache
    def numbers() -> list[int]:
        return index.tolist()

    def reduced(value: Tensor | list[Any]) -> Tensor | list[Any]:
        nonlocal found
        found = True
        if k == n:
            return value
        if isinstance(value, Tensor):
            return value.index_select(0, positions(value.device))
        out = copy.copy(value)
        out[:] = [value[i] for i in numbers()]
        return out

    result = _reduce(batch, n, reduced)
    check(found, "batch", type(batch), f"must hold a tensor or list of length {n}, as the losses are")
    return result


def first_samples(batch: Any, fraction: float) -> Any:
    """The first samples of a batch, at least one.

    Args:
        batch: the model's input, any nesting that `select_samples` takes; n is the first dimension of the first tensor
            in it. It is not changed.
        fraction: in (0, 1]; ``ceil(fraction * n)`` samples are taken.

    Returns:
        A batch of the same types, whose tensors are views; the same object if all samples are taken.

    Raises:
        ArgumentError: the batch contains no tensor with a dimension.

    Example:
        >>> import torch
        >>> from fsam_triton.batches.samples import first_samples
        >>> first_samples({"input_ids": torch.tensor([[1, 2], [3, 4], [5, 6]]), "labels": torch.tensor([0, 1, 0])}, 0.5)
        {'input_ids': tensor([[1, 2],
                [3, 4]]), 'labels': tensor([0, 1])}
    """
    if not (n := _count(batch)):
        allowed = "must hold a tensor with samples along its first dimension"
        raise ArgumentError("batch", type(batch).__name__, allowed)
    k = math.ceil(fraction * n)
    return batch if k == n else _reduce(batch, n, lambda value: value[:k])


def _count(value: Any) -> int | None:
    """The first dimension of the first tensor in a nesting."""
    if isinstance(value, Tensor):
        return value.shape[0] if value.dim() else None
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    else:
        parts = value if isinstance(value, list | tuple) else []
    return next(filter(None, map(_count, parts)), None)


def _largest_rises(before: Tensor, after: Tensor, k: int) -> Tensor:
    """Positions of the k largest rises, ascending."""
    # A rise is a small difference of losses: of 16-bit ones it would itself be rounded to 16 bits.
    wide = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    rise = after.to(wide) - before.to(after.device, wide)
    rise = torch.where(rise.isfinite(), rise, -torch.inf)
    return rise.sort(descending=True, stable=True).indices[:k].sort().values


def _reduce(value: Any, n: int, reduced: Callable[[Any], Any]) -> Any:
    """`value` with everything of length n in it reduced; the same object if there is nothing to reduce."""
    if isinstance(value, Tensor):
        return reduced(value) if value.dim() > 0 and value.shape[0] == n else value
    if isinstance(value, list) and len(value) == n and not _is_list_of_inputs(value, n):
        return reduced(value)
    if isinstance(value, Mapping):
        parts = dict(value)
    elif isinstance(value, list | tuple):
        parts = dict(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        return value
    changed = {key: new for key, old in parts.items() if (new := _reduce(old, n, reduced)) is not old}
    return _with(value, {**parts, **changed}, changed) if changed else value


def _is_list_of_inputs(value: list[Any], n: int) -> bool:
    tensors = [item for item in value if isinstance(item, Tensor)]
    return bool(tensors) and all(item.dim() > 0 and item.shape[0] == n for item in tensors)


def _with(value: Any, parts: dict[Any, Any], changed: dict[Any, Any]) -> Any:
    """A container of the same kind as `value` with these parts, some of which have changed."""
    if isinstance(value, tuple):
        return type(value)(*parts.values()) if hasattr(value, "_fields") else type(value)(parts.values())
    if isinstance(value, Mapping) and not isinstance(value, dict):
        # Not a copy: in a BatchEncoding that would keep the encodings of samples that are gone.
        try:
            return cast("Callable[..., Any]", type(value))(parts)
        except TypeError:
            return parts
    out = copy.copy(value)
    for key, new in changed.items():
        if isinstance(value, dict | list):
            out[key] = new
        else:
            object.__setattr__(out, key, new)
    return out
