"""FisherMask: which weights a sharpness-aware step perturbs, and the exact choice of the k largest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .adamw_l2sp import check
from .buffers import Bucket

# Parts of parameter names, in lower case: biases, embeddings (wte and wpe are GPT-2's) and norm layers (ln_1, bn2).
DEFAULT_EXCLUDE = ("bias", "embed", "wte", "wpe", "norm", "ln_", "bn")


@dataclass(frozen=True)
class FisherMask:
    """Perturb only the weights with the largest diagonal empirical Fisher information (Fisher-SAM, arXiv 2210.05497).

    The mask is chosen over all selectable tensors together: exactly ``int(keep_ratio * n)`` of their n weights, those
    with the largest mean square of the ascent gradient, of equal ones the first.

    Args:
        keep_ratio: fraction of the selectable weights to perturb, in (0, 1].
        interval: choose anew every so many perturbations, beginning with the first; >= 1 (default: 1).
        exclude: tensors not to choose from, by parts of their names (case is ignored). Default: biases, embeddings and
            norm layers; if the optimizer was given no names, tensors with at most one dimension.
        excluded: perturb those tensors ``"always"``, as the reference implementation does, or ``"never"`` (default:
            ``"always"``).
        samples: average the squares over the last so many perturbations, from 1 to interval (the first mask knows only
            one). More than one takes one more buffer while they are added up (default: 1).

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> from fsam_triton import FisherMask
        >>> FisherMask(keep_ratio=0.1, interval=100).excluded
        'always'
    """

    keep_ratio: float
    interval: int = 1
    exclude: Sequence[str] | None = None
    excluded: str = "always"
    samples: int = 1

    def __post_init__(self) -> None:
        check(0 < self.keep_ratio <= 1, "keep_ratio", self.keep_ratio, "must be in (0, 1]")
        check(self.interval >= 1, "interval", self.interval, "must be >= 1")
        check(self.excluded in ("always", "never"), "excluded", self.excluded, 'must be "always" or "never"')
        check(
            1 <= self.samples <= self.interval, "samples", self.samples, f"must be from 1 to interval={self.interval}"
        )
        check(not isinstance(self.exclude, str), "exclude", self.exclude, "must be a sequence of strings")

    def selects_from(self, name: str | None, p: Tensor) -> bool:
        """Whether the mask chooses among the weights of a parameter (otherwise it is excluded)."""
        if name is None:
            check(
                self.exclude is None or not self.exclude,
                "exclude",
                self.exclude,
                "needs names: pass named_parameters()",
            )
            return self.exclude is not None or p.dim() > 1
        patterns = DEFAULT_EXCLUDE if self.exclude is None else self.exclude
        return not any(part.lower() in name.lower() for part in patterns)

    def count(self, selectable: int) -> int:
        """How many of that many selectable weights the mask keeps."""
        k = int(self.keep_ratio * selectable)
        check(
            k > 0,
            "keep_ratio",
            self.keep_ratio,
            f"selects none of {selectable} weights; must be >= {1 / max(selectable, 1)}",
        )
        return k


def select_top_k(buckets: Sequence[Bucket], values: Sequence[Tensor], k: int) -> None:
    """Write the masks of the buckets: the k largest magnitudes over all of them, of equal ones the first.

    A radix select: each pass counts the keys by one more digit and fixes that digit of the k-th largest. Nothing is
    sorted and no index is stored.

    Args:
        buckets: their masks are written.
        values: flat floats in the layout of each bucket; their magnitudes are compared exactly.
        k: how many, from 1 to the number of weights in the buckets.
    """
    home = values[0].device
    wide = any(v.dtype == torch.float64 for v in values)
    threshold = torch.zeros((), dtype=torch.int64, device=home)
    quota = torch.full((), k, dtype=torch.int64, device=home)
    top, bits = (63, 7) if wide else (31, 8)
    while top > 0:
        bits = min(bits, top)
        top -= bits
        hist = sum(ops.digit_histogram(v, threshold.to(v.device), top, bits, wide).to(home) for v in values)
        at_least = hist.flip(0).cumsum(0).flip(0)
        # The last digit that still leaves `quota` keys at or above it. Gathered: indexing would wait for the device.
        digit = (at_least >= quota).sum().view(1) - 1
        quota = quota - (at_least - hist).gather(0, digit)[0]
        threshold = threshold | (digit[0] << top)
    for bucket, v in zip(buckets, values, strict=True):
        bucket.lane("mask", torch.int32)
        left, limit = quota.to(v.device), threshold.to(v.device)
        # Parameter by parameter, so that gaps between them, which hold zeros, never count as ties.
        for i, shape in enumerate(bucket.shapes):
            part = v[bucket.offsets[i] : bucket.offsets[i] + shape.numel()]
            left = ops.write_mask_(bucket.mask_words(i), part, limit, left, wide)
        quota = left.to(home)
