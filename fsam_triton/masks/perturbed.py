"""FisherMask: which weights a sharpness-aware step perturbs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import check

# Parts of parameter names, in lower case: biases, embeddings (wte and wpe are GPT-2's) and norm layers (ln_1, bn2).
DEFAULT_EXCLUDE = ("bias", "embed", "wte", "wpe", "norm", "ln_", "bn")
_UNITS = ("element", "tensor", "row", 32, 128)


@dataclasses.dataclass(frozen=True)
class FisherMask:
    """Selects the weights that SAM perturbs: those with the largest Fisher information (arXiv 2210.05497).

    All weights are trained, whatever the mask. (The other mask, `FishMask`, selects the weights that are trained; an
    optimizer takes it as ``trainable``.) A `FisherMask` is an immutable set of options: the optimizer keeps the
    selection, and shows it with `FSAM.mask_of` and `FSAM.mask_density`.

    The weights are selected over all selectable tensors together: exactly ``int(keep_ratio * n)`` of their n weights,
    those with the largest mean square of the ascent gradient; of equal values, the first. Units of several weights are
    taken in the order of their weights' mean score until the next unit would exceed that number.

    Args:
        keep_ratio: fraction of the selectable weights to perturb, in (0, 1].
        interval: select again after this many perturbations, beginning with the first; >= 1 (default: 1).
        exclude: tensors not to select from, given by parts of their names (case is ignored). Default: tensors of at
            most one dimension (biases, norm layers) and, if the optimizer was given names, embeddings. If you pass
            names of your own, a bias in front of BatchNorm, whose gradient is zero except for rounding errors, can be
            selected too; it ranks only before exact zeros.
        excluded: perturb the excluded tensors ``"always"``, as the reference implementation does, or ``"never"``
            (default: ``"always"``).
        samples: average the squares over this many of the last perturbations, from 1 to interval (the first mask has
            only one). More than one takes another buffer while they are summed (default: 1).
        unit: the weights that are selected as a whole: ``"element"`` (a weight), ``"tensor"``, ``"row"`` (an index of
            the tensor's first dimension), or 32 or 128 (that many neighbouring weights in memory; a tensor's last unit
            may be shorter) (default: ``"element"``).
        scores: ``"fisher"``, or ``"random"`` to select as many weights at random, as a control (default: ``"fisher"``).

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
    unit: str | int = "element"
    scores: str = "fisher"

    def __post_init__(self) -> None:
        check(0 < self.keep_ratio <= 1, "keep_ratio", self.keep_ratio, "must be in (0, 1]")
        check(isinstance(self.interval, int) and self.interval >= 1, "interval", self.interval, "must be an int >= 1")
        check(self.excluded in ("always", "never"), "excluded", self.excluded, 'must be "always" or "never"')
        check(
            1 <= self.samples <= self.interval, "samples", self.samples, f"must be from 1 to interval={self.interval}"
        )
        check(not isinstance(self.exclude, str), "exclude", self.exclude, "must be a sequence of strings")
        if self.exclude is not None:
            # A list could be changed, and could not be hashed.
            object.__setattr__(self, "exclude", tuple(self.exclude))
        # The type too, because 32.0 equals 32.
        fits = type(self.unit) in (str, int) and self.unit in _UNITS
        check(fits, "unit", self.unit, 'must be "element", "tensor", "row", 32 or 128')
        check(self.scores in ("fisher", "random"), "scores", self.scores, 'must be "fisher" or "random"')

    def selects_from(self, name: str | None, p: Tensor) -> bool:
        """Whether the mask selects from the weights of a parameter (otherwise the parameter is excluded)."""
        if self.exclude is None:
            # A norm layer in a Sequential has no telling name.
            return p.dim() > 1 and not (name and any(part in name.lower() for part in DEFAULT_EXCLUDE))
        needs_name = len(self.exclude) > 0
        check(name is not None or not needs_name, "exclude", self.exclude, "needs names: pass named_parameters()")
        return name is None or not any(part.lower() in name.lower() for part in self.exclude)

    def count(self, selectable: Sequence[torch.Size]) -> int:
        """The number of weights that the mask may keep.

        Args:
            selectable: the shapes of the selectable parameters.

        Raises:
            ValueError: it is less than the size of the largest unit, so that nothing might be selected.
        """
        total = sum(map(math.prod, selectable))
        largest = max([1, *map(self._largest_unit, selectable)])
        k = int(self.keep_ratio * total)
        # One float further: the quotient times the total may round to less than the unit's size.
        least = math.nextafter(largest / max(total, 1), 1.0)
        allowed = f"keeps {k} of {total} weights, the largest unit has {largest}; must be >= {least}"
        check(k >= largest, "keep_ratio", self.keep_ratio, allowed)
        return k

    def _largest_unit(self, shape: torch.Size) -> int:
        n = math.prod(shape)
        if self.unit == "row":
            return n // max(shape[0], 1) if shape else n
        if isinstance(self.unit, int):
            return min(n, self.unit)
        return n if self.unit == "tensor" else min(n, 1)
