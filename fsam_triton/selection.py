"""The exact choice of the weights, or units of weights, with the highest scores, over several buckets together."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import ops
from .buffers import Bucket
from .kernels.reference import key_at, random_bits
from .sharded import of_all_shards, sum_over_shards

if TYPE_CHECKING:
    from .masks import FisherMask

# How many weights are widened to fp64 at a time.
_PIECE = 1 << 20


def choose(
    mask: FisherMask,
    buckets: Sequence[Bucket],
    values: Sequence[Tensor] | None,
    k: int,
    key: int,
    *,
    squared: bool = False,
) -> None:
    """Write the masks of the buckets: the units of the highest scores, at most k weights (exactly k single ones).

    The score of a unit is the mean over its weights (a sum would favour large units), added up in fp64 on the weights'
    device. Nothing waits for a device.

    Args:
        mask: what the units and scores are.
        buckets: their masks are written. All of their parameters may be chosen.
        values: flat floats in the layout of each bucket, gaps as zeros: gradients, whose squares are the scores, or the
            scores. A unit with a NaN counts as zero. Not read, and may be None, if the scores are random.
        k: how many weights, from 1 (or the size of the largest unit) to the number of weights in the buckets.
        key: any integer; makes the random scores, the same on every device.
        squared: whether `values` are the scores, >= 0.
    """
    # Through Python's generator, because neighbouring keys of `random_bits` give similar numbers.
    key = random.Random(key).getrandbits(32)
    if mask.unit != "element":
        _choose_units(mask, buckets, values, k, key, squared)
    elif mask.scores == "fisher":
        select_top_k(buckets, values, k)
    else:
        select_top_k(buckets, _random_values(buckets, key), k)


def _random_values(buckets: Sequence[Bucket], key: int) -> list[Tensor]:
    """Random numbers for the weights, in the layout of each bucket with zeros in the gaps."""
    out, start = [], 0
    for bucket in buckets:
        out.append(torch.zeros(bucket.size, device=bucket.device))
        for p, offset, shape in zip(bucket.params, bucket.offsets, bucket.shapes, strict=True):
            n = shape.numel()
            out[-1][offset : offset + n] = _random(n, bucket.device, key, start + bucket.shard_start)
            start += p.numel()
    return out


def _random(n: int, device: torch.device, key: int, start: int) -> Tensor:
    """Integers in [0, 2**24) as fp32 [n], the ones from `start` on of the key's sequence."""
    first = key_at(torch.full((), key, dtype=torch.int64, device=device), start)
    return ((random_bits(torch.empty(n, device="meta"), first) >> 8) + (1 << 23)).float()


def _choose_units(
    mask: FisherMask, buckets: Sequence[Bucket], values: Sequence[Tensor] | None, k: int, key: int, squared: bool
) -> None:
    home = buckets[0].device
    scores, sizes, start = [], [], 0
    for bucket, flat in zip(buckets, values or [bucket.weight for bucket in buckets], strict=True):
        for i, shape in enumerate(bucket.shapes):
            part = flat[bucket.offsets[i] : bucket.offsets[i] + shape.numel()]
            for units in _units(part, shape, bucket.strides[i], mask.unit):
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
    for bucket in buckets:
        bucket.lane("mask", torch.int32)
        zero = torch.zeros((), dtype=torch.int64, device=bucket.device)
        for i, shape in enumerate(bucket.shapes):
            ones = torch.zeros(shape.numel(), dtype=torch.bfloat16, device=bucket.device)
            for units in _units(ones, shape, bucket.strides[i], mask.unit):
                units.copy_(next(chosen).view(-1, *[1] * (units.dim() - 1)))
            ops.write_mask_(bucket.mask_words(i), ones, zero, zero, False)


def _units(part: Tensor, shape: torch.Size, strides: tuple[int, ...], unit: str | int) -> list[Tensor]:
    """A parameter's part of a buffer as views whose first index counts its units, in their order."""
    n = part.numel()
    if unit == "row" and shape and n:
        return [part.as_strided(shape, strides)]
    size = unit if isinstance(unit, int) else max(n, 1)
    whole = n // size * size
    return [view for view in (part[:whole].view(-1, size), part[whole:].view(1, -1)) if view.numel()]


def _sums(units: Tensor, squared: bool) -> Tensor:
    """Sums of the scores, fp64 [units]."""
    rows = units.reshape(len(units), -1)

    def scores(part: Tensor) -> Tensor:
        return part.double() if squared else part.double().square()

    blocks = rows.split(max(_PIECE // rows.shape[1], 1))
    return torch.cat([sum(scores(part).sum(1) for part in block.split(_PIECE, 1)) for block in blocks])


def select_top_k(buckets: Sequence[Bucket], values: Sequence[Tensor], k: int) -> None:
    """Write the masks of the buckets: the k largest magnitudes over all of them, of equal ones the first.

    A radix select: each pass counts the keys by one more digit and fixes that digit of the k-th largest. Nothing is
    sorted and no index is stored.

    Args:
        buckets: their masks are written.
        values: flat floats in the layout of each bucket; their magnitudes are compared exactly.
        k: how many, from 1 to the number of weights in the buckets and their other shards.
    """
    home = values[0].device
    wide = any(v.dtype == torch.float64 for v in values)
    threshold = torch.zeros((), dtype=torch.int64, device=home)
    quota = torch.full((), k, dtype=torch.int64, device=home)
    top, bits = (63, 7) if wide else (31, 8)
    while top > 0:
        bits = min(bits, top)
        top -= bits
        hists = [ops.digit_histogram(v, threshold.to(v.device), top, bits, wide) for v in values]
        hist = sum_over_shards(zip(buckets, hists, strict=True), home)
        at_least = hist.flip(0).cumsum(0).flip(0)
        # The last digit that still leaves `quota` keys at or above it. Gathered: indexing would wait for the device.
        digit = (at_least >= quota).sum().view(1) - 1
        quota = quota - (at_least - hist).gather(0, digit)[0]
        threshold = threshold | (digit[0] << top)
    sharded = [bucket for bucket in buckets if bucket.shard_group is not None]
    pairs = zip(buckets, hists, strict=True)
    ties = [hist.gather(0, digit.to(hist.device)) for bucket, hist in pairs if bucket.shard_group is not None]
    of_shards = dict(zip(sharded, of_all_shards(sharded, ties), strict=True))
    for bucket, v in zip(buckets, values, strict=True):
        bucket.lane("mask", torch.int32)
        left, limit = quota.to(v.device), threshold.to(v.device)
        if bucket in of_shards:
            before = of_shards[bucket][: bucket.shard_index].sum()
            ops.write_mask_(bucket.lanes["mask"], v, limit, (left - before).clamp(min=0), wide)
            quota = (quota - of_shards[bucket].sum().to(home)).clamp(min=0)
            continue
        # Parameter by parameter, so that gaps between them, which hold zeros, never count as ties.
        for i, shape in enumerate(bucket.shapes):
            part = v[bucket.offsets[i] : bucket.offsets[i] + shape.numel()]
            left = ops.write_mask_(bucket.mask_words(i), part, limit, left, wide)
        quota = left.to(home)


def tensors_chosen(buckets: Sequence[Bucket]) -> list[list[bool]]:
    """Per bucket and parameter, whether the mask chose any of its weights; it waits for the device, once."""
    return _of_each_tensor(buckets, Tensor.any)


def weights_chosen(buckets: Sequence[Bucket]) -> list[list[int]]:
    """Per bucket and parameter, how many of its weights the mask chose; it waits for the device, once."""
    return _of_each_tensor(buckets, _count_ones)


def _of_each_tensor(buckets: Sequence[Bucket], measure: Callable[[Tensor], Tensor]) -> list[list[Any]]:
    """A scalar made of each parameter's words of the mask, by bucket, read from the device in one go."""
    if not buckets:
        return []
    rows = []
    for bucket in buckets:
        bucket.lane("mask", torch.int32)
        rows.append(torch.stack([measure(bucket.mask_words(i)) for i in range(len(bucket.shapes))]))
    rows = [row.sum(0, dtype=row.dtype) for row in of_all_shards(buckets, rows)]
    flat = iter(torch.cat([row.to(rows[0].device) for row in rows]).tolist())
    return [[next(flat) for _ in bucket.shapes] for bucket in buckets]


def _count_ones(words: Tensor) -> Tensor:
    # Bit by bit: all bits of a tensor at once would take as much memory as its weights.
    return sum(((words >> bit) & 1).sum() for bit in range(32))
