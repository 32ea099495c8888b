"""The bytes per weight that each pass and each whole step must move, to which every measured time is compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """What weights and gradients are kept in; moments are fp32 beside master weights, else of the weights' type.

    Attributes:
        master: whether there are master weights.
        is_short: whether these have 24 bits; moments are codes of 8 bits then, and backups count steps in 8 bits.
    """

    name: str
    dtype: torch.dtype
    master: bool = False
    is_short: bool = False

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize

    @property
    def moment_bytes(self) -> float:
        """With the scale of two bytes that 32 codes share."""
        if self.is_short:
            return 1 + 2 / 32
        return 4 if self.master else self.bytes

    @property
    def remainder_bytes(self) -> int:
        """Of master weights: what their rounding loses."""
        return (1 if self.is_short else 2) if self.master else 0

    @property
    def options(self) -> dict[str, object]:
        """What an optimizer of this package takes; one that perturbs has a backup's format besides."""
        if self.is_short:
            return {"master_weights": "24bit", "state_format": "8bit"}
        return {"master_weights": self.master}

    @property
    def backup_options(self) -> dict[str, object]:
        return {"backup_format": "8bit"} if self.is_short else {}


FP32 = Precision("fp32", torch.float32)
BF16 = Precision("bf16", torch.bfloat16)
MASTER = Precision("bf16+master", torch.bfloat16, master=True)
SHORT = Precision("bf16+8-bit", torch.bfloat16, master=True, is_short=True)
# What others than this package's optimizers can do, and all.
PRECISIONS = (FP32, BF16, MASTER)
ALL = (*PRECISIONS, SHORT)


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


def perturb(precision: Precision, direction: float | None = None) -> Traffic:
    """Gradient, or whatever has so many bytes, read; weights moved; clean weights kept, or how far they are."""
    b = precision.bytes
    return Traffic(read=b if direction is None else direction, updated=b, written=1 if precision.is_short else b)


def descend(precision: Precision) -> Traffic:
    """Gradient and clean weights read, weights written, both moments updated, and the remainder of master weights."""
    b, lanes = precision.bytes, 2 * precision.moment_bytes + precision.remainder_bytes
    if precision.is_short:
        # The clean weights are found from the perturbed ones.
        return Traffic(read=b + 1, updated=b + lanes)
    return Traffic(read=2 * b, updated=lanes, written=b)


def adamw(precision: Precision) -> Traffic:
    """`descend` from weights that are not perturbed."""
    b = precision.bytes
    return Traffic(read=b, updated=b + 2 * precision.moment_bytes + precision.remainder_bytes)


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
