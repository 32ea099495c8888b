"""How many bytes a weight each pass and each whole step must move: what every measured time is held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """What weights and gradients are kept in; moments are fp32 beside master weights, else of the weights' type."""

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


def perturb(precision: Precision, direction: int | None = None) -> Traffic:
    """Gradient, or whatever has so many bytes, read; weights moved; clean weights kept."""
    b = precision.bytes
    return Traffic(read=b if direction is None else direction, updated=b, written=b)


def descend(precision: Precision) -> Traffic:
    """Gradient and clean weights read, weights written, both moments updated, and the remainder of master weights."""
    b = precision.bytes
    remainder = 2 if precision.master else 0
    return Traffic(read=2 * b, updated=2 * precision.moment_bytes + remainder, written=b)


def adamw(precision: Precision) -> Traffic:
    """`descend` from weights that are not perturbed."""
    b = precision.bytes
    remainder = 2 if precision.master else 0
    return Traffic(read=b, updated=b + 2 * precision.moment_bytes + remainder)


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
    """The norm of the moment, the perturbation along it, and the descent."""
    moment = precision.moment_bytes
    return Traffic(read=moment) + perturb(precision, moment) + descend(precision)


STEPS = {
    "SAM": sam_step,
    "Fisher-SAM": masked_step,
    "GSAM": gsam_step,
    "momentum-SAM": momentum_step,
    "AdamW": adamw,
}
