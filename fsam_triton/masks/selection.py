"""The exact selection of the weights, or units of weights, with the highest scores, over all lanes together."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..buffers.lanes import Lanes
from ..buffers.sharded import of_all_shards, sum_over_shards
from ..kernels.reference import key_at, random_bits

if TYPE_CHECKING:
    from .perturbed import FisherMask

# How many weights are widened to fp64 at a time.
_PIECE = 1 << 20
# Lanes, and the numbers of those of their parameters that are chosen from.
Selectable = Sequence[tuple[Lanes, Sequence[int]]]


def choose(
    mask: FisherMask,
    selectable: Selectable,
    scores: Sequence[Tensor] | None,
    k: int,
    key: int,
    *,
    squared: bool = False,
) -> None:
    """Write the masks of the selectable parameters: the units with the highest scores, at most k weights.

    With single weights, exactly k are selected. A unit's score is the mean over its weights (a sum would favour large
    units), summed in fp64 on the weights' device. Nothing waits for a device.

    Args:
        mask: says what the units and scores are.
        selectable: whose masks are written.
        scores: flat floats in the layout of each lanes, with zeros where nothing is selected: gradients, whose squares
            are the scores, or the scores themselves. A unit with a NaN counts as zero. Not read, and may be None, if
            scores are random.
        k: number of weights, from 1 (or the size of the largest unit) to the number of selectable weights.
        key: any integer; determines the random scores, which are the same on every device.
        squared: whether `scores` are the scores, >= 0.
    """
    # Through Python's generator, because neighbouring keys of `random_bits` give similar numbers.
    key = random.Random(key).getrandbits(32)
    if mask.unit != "element":
        _choose_units(mask, selectable, scores, k, key, squared)
    elif mask.scores == "fisher":
        assert scores is not None
        select_top_k(selectable, scores, k)
    else:
        select_top_k(selectable, _random_scores(selectable, key), k)


def _random_scores(selectable: Selectable, key: int) -> list[Tensor]:
    """Random numbers for the selectable weights, in the layout of each lanes with zeros elsewhere."""
    out, start = [], 0
    for lanes, numbers in selectable:
        out.append(torch.zeros(lanes.plan.size, device=lanes.device))
        starts = lanes.starts()
        for i in numbers:
            part = lanes.plan.part(out[-1], i)
            part.copy_(_random(len(part), lanes.device, key, start + starts[i]))
            start += lanes.params[i].numel()
    return out


def _random(n: int, device: torch.device, key: int, start: int) -> Tensor:
    """Integers in [0, 2**24) as fp32 [n], taken from the key's sequence from `start` on."""
    first = key_at(torch.full((), key, dtype=torch.int64, device=device), start)
    return ((random_bits(torch.empty(n, device="meta"), first) >> 8) + (1 << 23)).float()


def _choose_units(
    mask: FisherMask, selectable: Selectable, values: Sequence[Tensor] | None, k: int, key: int, squared: bool
) -> None:
    home = selectable[0][0].device
    scores, sizes, start = [], [], 0
    for j, (lanes, numbers) in enumerate(selectable):
        # Of random scores only the units' sizes are asked for.
        flat = torch.empty(lanes.plan.size, dtype=torch.bfloat16, device=lanes.device) if values is None else values[j]
        for i in numbers:
            for units in _units(lanes.plan.part(flat, i), lanes.shapes[i], lanes.strides[i], mask.unit):
                # A tensor, because a GPU divides by a number as it multiplies by its reciprocal: means that are equal
                # would come out different.
                size = torch.full((len(units),), units[0].numel(), device=home)
                by_fisher = mask.scores == "fisher"
                score = _sums(units, squared).to(home) / size if by_fisher else _random(len(units), home, key, start)
                start += len(units)
                scores.append(torch.where(score.isnan(), 0.0, score))
                sizes.append(size)
    order = torch.cat(scores).sort(descending=True, stable=True).indices
    fits = torch.cat(sizes).gather(0, order).cumsum(0) <= k
    chosen = iter(torch.zeros_like(fits).scatter_(0, order, fits).split([len(part) for part in scores]))
    for lanes, numbers in selectable:
        words = lanes.lane("mask", torch.int32)
        zero = torch.zeros((), dtype=torch.int64, device=lanes.device)
        for i in numbers:
            ones = torch.zeros(lanes.plan.lengths[i], dtype=torch.bfloat16, device=lanes.device)
            for units in _units(ones, lanes.shapes[i], lanes.strides[i], mask.unit):
                units.copy_(next(chosen).view(-1, *[1] * (units.dim() - 1)))
            ops.write_mask_(lanes.plan.words(words, i), ones, zero, zero, False)


def _units(part: Tensor, shape: torch.Size, strides: tuple[int, ...], unit: str | int) -> list[Tensor]:
    """A parameter's part of a lane as views whose first index counts its units, in order."""
    n = part.numel()
    if unit == "row" and shape and n:
        return [part.as_strided(shape, strides)]
    size = unit if isinstance(unit, int) else max(n, 1)
    whole = n // size * size
    return [view for view in (part[:whole].view(-1, size), part[whole:].view(1, -1)) if view.numel()]


def _sums(units: Tensor, squared: bool) -> Tensor:
    """Sums of the scores, fp64 [units]."""
    rows = units.reshape(len(units), -1)

    def total(part: Tensor) -> Tensor:
        return (part.double() if squared else part.double().square()).sum(1)

    blocks = rows.split(max(_PIECE // rows.shape[1], 1))
    return torch.cat([functools.reduce(torch.add, map(total, block.split(_PIECE, 1))) for block in blocks])


def kth_largest(parts: Sequence[tuple[Lanes | None, Tensor]], k: int) -> tuple[Tensor, Tensor, bool]:
    """The k-th largest magnitude of flat floats by a radix select: each pass counts keys by one more digit.

    Nothing is sorted and no index is stored. Zeros in gaps do no harm, because they are the smallest.

    Returns:
        Its key (see `kernels.reference.magnitude_key`) and how many weights with the same key are among the k, int64
        scalars on the first tensor's device; and whether keys are of fp64.
    """
    home = parts[0][1].device
    wide = any(values.dtype == torch.float64 for _, values in parts)
    threshold = torch.zeros((), dtype=torch.int64, device=home)
    quota = torch.full((), k, dtype=torch.int64, device=home)
    top, bits = (63, 7) if wide else (31, 8)
    while top > 0:
        bits = min(bits, top)
        top -= bits
        hists = [
            (lanes, ops.digit_histogram(values, threshold.to(values.device), top, bits, wide))
            for lanes, values in parts
        ]
        hist = sum_over_shards(hists, home)
        at_least = hist.flip(0).cumsum(0).flip(0)
        # The last digit that still leaves `quota` keys at or above it. Gathered: indexing would wait for the device.
        digit = (at_least >= quota).sum().view(1) - 1
        quota = quota - (at_least - hist).gather(0, digit)[0]
        threshold = threshold | (digit[0] << top)
    return threshold, quota, wide


def select_top_k(selectable: Selectable, scores: Sequence[Tensor], k: int) -> None:
    """Write the masks of the selectable parameters: the k largest magnitudes overall; of equal ones, the first.

    Args:
        selectable: whose masks are written.
        scores: flat floats in the layout of each lanes; their magnitudes are compared exactly.
        k: number of weights, from 1 to the number of selectable weights, including those of other shards.
    """
    parts = [(lanes, values) for (lanes, _), values in zip(selectable, scores, strict=True)]
    threshold, quota, wide = kth_largest(parts, k)
    for (lanes, numbers), values in zip(selectable, scores, strict=True):
        words = lanes.lane("mask", torch.int32)
        limit, left = threshold.to(values.device), quota.to(values.device)
        if lanes.shard_groups:
            left = _write_shards(lanes, numbers, values, limit, left, wide)
        else:
            # Parameter by parameter, so that zeros in between never count as ties.
            for i in numbers:
                part = lanes.plan.part(values, i)
                left = ops.write_mask_(lanes.plan.words(words, i), part, limit, left, wide)
        quota = left.to(threshold.device)


def _write_shards(
    lanes: Lanes, numbers: Sequence[int], values: Tensor, limit: Tensor, quota: Tensor, wide: bool
) -> Tensor:
    """Write the masks of shards: among ties, lower parameters come first, then lower shards.

    Returns:
        The quota that is left.
    """
    none = torch.zeros((), dtype=torch.int64, device=values.device)
    all_ties = torch.full((), 1 << 62, dtype=torch.int64, device=values.device)
    ties = []
    for i in numbers:
        words = lanes.plan.words(lanes.lanes["mask"], i)
        ties.append(all_ties - ops.write_mask_(words, lanes.plan.part(values, i), limit, all_ties, wide))
    of_shards = of_all_shards(lanes, torch.stack(ties))
    before = of_shards.cumsum(0) - of_shards
    for j, i in enumerate(numbers):
        own = (quota - before[lanes.shard_index, j]).clamp(min=0)
        words = lanes.plan.words(lanes.lanes["mask"], i)
        ops.write_mask_(words, lanes.plan.part(values, i), limit, torch.maximum(own, none), wide)
        quota = (quota - of_shards[:, j].sum()).clamp(min=0)
    return quota


def tensors_chosen(lanes: Sequence[Lanes]) -> list[list[bool]]:
    """Per lanes and parameter, whether the mask selects any of its weights; waits for the device, once."""
    return _of_each_tensor(lanes, Tensor.any)


def weights_chosen(lanes: Sequence[Lanes]) -> list[list[int]]:
    """Per lanes and parameter, how many of its weights the mask selects; waits for the device, once."""
    return _of_each_tensor(lanes, _count_ones)


def _of_each_tensor(all_lanes: Sequence[Lanes], measure: Callable[[Tensor], Tensor]) -> list[list[Any]]:
    """A scalar computed from each parameter's words of the mask, by lanes, read from the device in one go."""
    rows = []
    for lanes in all_lanes:
        words = lanes.lane("mask", torch.int32)
        row = torch.stack([measure(lanes.plan.words(words, i)) for i in range(len(lanes))])
        rows.append(of_all_shards(lanes, row.to(torch.int64)).sum(0).to(row.dtype))
    flat = iter(torch.cat([row.to(rows[0].device) for row in rows]).tolist() if rows else ())
    return [[next(flat) for _ in range(len(lanes))] for lanes in all_lanes]


def _count_ones(words: Tensor) -> Tensor:
    # Bit by bit: all bits of a tensor at once would take as much memory as its weights.
    return functools.reduce(torch.add, (((words >> bit) & 1).sum() for bit in range(32)))
