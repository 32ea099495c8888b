"""How many bytes a weight each pass and each whole step must move: what every measured time is held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """What weights and gradients are kept in; moments are fp32 beside fp32 masters, else of the weights' type."""

    name: str
    dtype: torch.dtype
    master: bool = False

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize

    @property
    def moment_bytes(self) -> int:
        return 4 if self.master else self.bytes


FP32 = Precision("fp32", torch.float32)
BF16 = Precision("bf16", torch.bfloat16)
MASTER = Precision("bf16+master", torch.bfloat16, master=True)
PRECISIONS = (FP32, BF16, MASTER)


@dataclass(frozen=True)
class Traffic:
    """Bytes a weight: read only; updated in place, which are read and written; and written without being read."""

    read: float = 0.0
    updated: float = 0.0
    written: float = 0.0

    @property
    def total(self) -> float:
        """Bytes read plus bytes written."""
        return self.read + 2 * self.updated + self.written

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.read + other.read, self.updated + other.updated, self.written + other.written)


def norm(precision: Precision) -> Traffic:
    """Of the gradient."""
    return Traffic(read=precision.bytes)


def dots(first: int, second: int) -> Traffic:
    """The dot products of two tensors whose elements have so many bytes."""
    return Traffic(read=first + second)


def perturb(precision: Precision) -> Traffic:
    """Gradient read, weights moved, clean weights kept, unless a master has them."""
    backup = 0 if precision.master else precision.bytes
    return Traffic(read=precision.bytes, updated=precision.bytes, written=backup)


def descend(precision: Precision) -> Traffic:
    """Gradient read, both moments updated, and the weights made from the backup or the master."""
    b = precision.bytes
    if precision.master:
        return Traffic(read=b, updated=2 * 4 + 4, written=b)
    return Traffic(read=2 * b, updated=2 * b, written=b)


def descend_and_perturb(precision: Precision) -> Traffic:
    """`descend`, whose clean weights go to the backup or the master, and the perturbed ones to the weights."""
    b = precision.bytes
    return descend(precision) if precision.master else Traffic(read=b, updated=3 * b, written=b)


def adamw(precision: Precision) -> Traffic:
    """`descend` from weights that are not perturbed."""
    b = precision.bytes
    return descend(precision) if precision.master else Traffic(read=b, updated=3 * b)


def mask_words() -> Traffic:
    """One bit a weight."""
    return Traffic(read=1 / 8)


def second_gradient(precision: Precision) -> Traffic:
    """What a pass reads besides, where it combines two gradients."""
    return Traffic(read=precision.bytes)


def sam_step(precision: Precision) -> Traffic:
    """SAM: norm, ascent, descent."""
    return norm(precision) + perturb(precision) + descend(precision)


def masked_step(precision: Precision) -> Traffic:
    """Fisher-SAM between two choices of the mask."""
    return sam_step(precision) + mask_words()


def gsam_step(precision: Precision) -> Traffic:
    """SAM, the dot products of both gradients, and the second gradient in the descent."""
    return sam_step(precision) + dots(precision.bytes, precision.bytes) + second_gradient(precision)


def momentum_step(precision: Precision) -> Traffic:
    """The dot products of moment and gradient, then one pass."""
    return dots(precision.moment_bytes, precision.bytes) + descend_and_perturb(precision)


STEPS = {
    "SAM": sam_step,
    "Fisher-SAM": masked_step,
    "GSAM": gsam_step,
    "momentum-SAM": momentum_step,
    "AdamW": adamw,
}
