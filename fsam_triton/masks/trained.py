"""FishMask: which weights sparse training trains, and the file that stores them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .. import ops
from ..errors import check
from ..files import read_file, write_file
from ..kernels.reference import unpack_mask
from .selection import kth_largest

# How gaps between indices are stored: the type, and the code that says "this much, and more to come".
_CODES = {torch.uint8: 2**8 - 1, torch.uint16: 2**16 - 1, torch.int32: 2**31 - 1}
# Words of a bit mask that are made booleans at a time.
_PIECE = 1 << 15


class FishMask:
    """Selects the weights that are trained, while all others stay as they are (FISH Mask, arXiv 2111.09839).

    An optimizer takes it as ``trainable``. (The other mask, `FisherMask`, selects the weights that SAM perturbs; all
    weights are then trained.)

    Create one with `from_scores`, `random`, `bias_only`, `magnitude`, `deviation` or `load`, or from indices. A mask
    never changes. It is stored on the CPU, wherever the model is. `|`, `&` and `-` combine masks over the same
    parameters, and `==` compares them.

    Args:
        indices: by parameter name, the positions of its selected weights, integers [selected] in ascending order: 0 is
            the first weight in row-major order of the parameter's shape, whatever its strides. A name may be left out
            if none of its weights is selected.
        shapes: by name, the shapes of all parameters from which weights could have been selected.

    Raises:
        ValueError: a name without a shape; indices that are not ascending integers within their shape.

    Example:
        >>> mask = FishMask.from_scores({"weight": torch.tensor([[3.0, 1.0], [2.0, 5.0]])}, keep_ratio=0.5)
        >>> mask
        FishMask(2 of 4 weights)
        >>> mask.indices("weight")
        tensor([0, 3], dtype=torch.int32)
    """

    def __init__(self, indices: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
        self._shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        unknown = [name for name in indices if name not in self._shapes]
        check(not unknown, "indices", unknown, "every name must have a shape")
        self._indices = {}
        for name, shape in self._shapes.items():
            own, n = indices.get(name, torch.zeros(0, dtype=torch.int32)).detach(), shape.numel()
            fits = own.dim() == 1 and not (own.is_floating_point() or own.is_complex() or own.dtype == torch.bool)
            if fits and len(own):
                fits = bool((own[0] >= 0) & (own[-1] < n) & (own[1:] > own[:-1]).all())
            check(fits, "indices", own, f"those of {name!r} must be ascending integers [selected] from 0 to {n - 1}")
            self._indices[name] = own.to("cpu", torch.int32 if n <= 2**31 else torch.int64, copy=True).contiguous()

    @classmethod
    @torch.no_grad()
    def from_scores(
        cls, scores: Mapping[str, Tensor], keep_ratio: float, always_trainable: Sequence[str] = ()
    ) -> FishMask:
        """Select exactly ``int(keep_ratio * n)`` of n weights: those with the highest scores; of equal ones, the first.

        This is a radix select: it makes one bit per weight, and neither sorts nor copies the scores.

        Args:
            scores: by name, floats >= 0 in the parameters' shapes, such as their diagonal Fisher information (arXiv
                2111.09839, eq. 4). The order of the names decides between equal scores.
            keep_ratio: fraction of the weights to select, in (0, 1].
            always_trainable: select parameters as a whole if their names contain one of these parts (case is ignored),
                such as a new classifier. They count towards the total; the others share what is left (default: none).

        Raises:
            ValueError: an argument is out of its range, or a score is negative or NaN; or the fraction is too small to
                select anything, or to select `always_trainable`.

        Example:
            >>> scores = {"encoder.weight": torch.tensor([1.0, 3.0, 2.0, 0.0]), "classifier.bias": torch.zeros(1)}
            >>> FishMask.from_scores(scores, 0.4, always_trainable=["classifier"]).density_by_tensor()
            {'encoder.weight': 0.25, 'classifier.bias': 1.0}
        """
        for name, score in scores.items():
            check(score.is_floating_point(), "scores", score.dtype, f"those of {name!r} must be floats")
            # Not min() < 0, which an empty tensor has not and a NaN hides.
            check(bool((score >= 0).all()), "scores", name, "negative or NaN; must be >= 0")
        return cls._of_largest(scores, keep_ratio, always_trainable)

    @classmethod
    def random(cls, model: Module, keep_ratio: float, seed: int = 0, always_trainable: Sequence[str] = ()) -> FishMask:
        """Select as many weights as `from_scores`, at random, as a control.

        Args:
            model: a model; its parameters with `requires_grad` count.
            keep_ratio, always_trainable: as for `from_scores`.
            seed: determines the mask, together with the parameters' shapes and order (default: 0).
        """
        generator = torch.Generator().manual_seed(seed)
        scores = {name: torch.rand(p.shape, generator=generator) for name, p in _trainable(model).items()}
        return cls._of_largest(scores, keep_ratio, always_trainable)

    @classmethod
    def bias_only(cls, model: Module, always_trainable: Sequence[str] = ()) -> FishMask:
        """Select all biases and nothing else (BitFit, arXiv 2106.10199): parameters with "bias" after the last dot.

        Args:
            model: a model; its parameters with `requires_grad` count.
            always_trainable: also select parameters whose names contain one of these parts (case is ignored; default:
                none).

        Raises:
            ValueError: there is nothing to select.
        """
        parameters = _trainable(model)
        chosen = {name for name in parameters if "bias" in name.rpartition(".")[2].lower()}
        chosen |= _matching(parameters, always_trainable)
        check(bool(chosen), "model", type(model).__name__, "must have a trainable parameter with 'bias' in its name")
        return cls(
            {name: torch.arange(parameters[name].numel()) for name in chosen},
            {name: p.shape for name, p in parameters.items()},
        )

    @classmethod
    def magnitude(cls, model: Module, keep_ratio: float, always_trainable: Sequence[str] = ()) -> FishMask:
        """Select as many weights as `from_scores`: those with the largest magnitude. NaN counts as zero.

        Args:
            model: a model; its parameters with `requires_grad` count.
            keep_ratio, always_trainable: as for `from_scores`.
        """
        return cls._of_largest(_trainable(model), keep_ratio, always_trainable)

    @classmethod
    @torch.no_grad()
    def deviation(
        cls,
        model: Module,
        other: Module | Mapping[str, Tensor],
        keep_ratio: float,
        always_trainable: Sequence[str] = (),
    ) -> FishMask:
        """Select as many weights as `from_scores`: those that differ most from another model's. NaN counts as zero.

        Args:
            model: a model; its parameters with `requires_grad` count.
            other: a model or a state dict, in any dtype; it need not contain the parameters in `always_trainable`.
            keep_ratio, always_trainable: as for `from_scores`.

        Raises:
            ValueError: also if `other` lacks a parameter or has it in another shape.
        """
        parameters = _trainable(model)
        others = other.state_dict() if isinstance(other, Module) else other
        moved, whole = dict(parameters), _matching(parameters, always_trainable)
        for name, p in parameters.items():
            if name in whole:
                continue
            check(name in others, "other", type(other).__name__, f"must have {name!r}")
            start = others[name].detach().to(p.device)
            check(start.shape == p.shape, "other", tuple(start.shape), f"{name!r} must have shape {tuple(p.shape)}")
            # bf16 and fp16 differences would round to the same few values.
            wide = torch.promote_types(torch.promote_types(p.dtype, start.dtype), torch.float32)
            moved[name] = p.to(wide) - start.to(wide)
        return cls._of_largest(moved, keep_ratio, always_trainable)

    @classmethod
    def _of_largest(cls, values: Mapping[str, Tensor], keep_ratio: float, always_trainable: Sequence[str]) -> FishMask:
        """Select the largest magnitudes; `values` are the scores, or their magnitudes are."""
        check(0 < keep_ratio <= 1, "keep_ratio", keep_ratio, "must be in (0, 1]")
        whole = _matching(values, always_trainable)
        total, fixed = sum(v.numel() for v in values.values()), sum(values[name].numel() for name in whole)
        k = int(keep_ratio * total)
        allowed = f"keeps {k} of {total} weights, always_trainable has {fixed}; must keep at least {max(fixed, 1)}"
        check(k >= max(fixed, 1), "keep_ratio", keep_ratio, allowed)
        indices = {name: torch.arange(values[name].numel()) for name in whole}
        if k > fixed:
            rest = {name: v for name, v in values.items() if name not in whole}
            # Each in the order of its elements: the first is then the first over all, whatever dtypes and strides.
            flats = {name: v.detach().reshape(-1) for name, v in rest.items()}
            threshold, quota, wide = kth_largest([(None, flat) for flat in flats.values()], k - fixed)
            for name, flat in flats.items():
                words = torch.zeros(-(-len(flat) // 32), dtype=torch.int32, device=flat.device)
                quota = ops.write_mask_(words, flat, threshold.to(flat.device), quota.to(flat.device), wide)
                indices[name] = _positions(words)
        return cls(indices, {name: v.shape for name, v in values.items()})

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of all parameters by name, including those without a selected weight."""
        return dict(self._shapes)

    @property
    def count(self) -> int:
        """The number of selected weights."""
        return sum(map(len, self._indices.values()))

    @property
    def total(self) -> int:
        """The number of weights of all parameters."""
        return sum(shape.numel() for shape in self._shapes.values())

    @property
    def density(self) -> float:
        """The fraction of all weights that is selected."""
        return self.count / max(self.total, 1)

    def density_by_tensor(self) -> dict[str, float]:
        """The fraction of each parameter's weights that is selected, by name; 0 for an empty one."""
        return {name: len(own) / max(self._shapes[name].numel(), 1) for name, own in self._indices.items()}

    def indices(self, name: str) -> Tensor:
        """The selected positions of a parameter: ascending int32 (int64 beyond 2**31 weights) [selected], a copy."""
        self._check_name(name)
        return self._indices[name].clone()

    def bits(self, name: str) -> Tensor:
        """Whether each weight of a parameter is selected: bool, in the parameter's shape."""
        self._check_name(name)
        out = torch.zeros(self._shapes[name].numel(), dtype=torch.bool)
        out[self._indices[name].long()] = True
        return out.view(self._shapes[name])

    def _check_name(self, name: str) -> None:
        check(name in self._shapes, "name", name, "must be one of the mask's parameters")

    def check_fits(self, model: Module) -> None:
        """Raise a ValueError that names the first parameter that the model lacks or has in another shape."""
        parameters = dict(model.named_parameters())
        for name, shape in self._shapes.items():
            check(name in parameters, "model", type(model).__name__, f"must have the mask's parameter {name!r}")
            found = tuple(parameters[name].shape)
            check(found == shape, "model", found, f"{name!r} must have the mask's shape {tuple(shape)}")

    def __or__(self, other: FishMask) -> FishMask:
        return self._with(other, lambda own, others: torch.cat([own, others]).unique())

    def __and__(self, other: FishMask) -> FishMask:
        return self._with(other, lambda own, others: own[torch.isin(own, others, assume_unique=True)])

    def __sub__(self, other: FishMask) -> FishMask:
        return self._with(other, lambda own, others: own[~torch.isin(own, others, assume_unique=True)])

    def _with(self, other: FishMask, combine: Callable[[Tensor, Tensor], Tensor]) -> FishMask:
        if not isinstance(other, FishMask):
            return NotImplemented
        for name in [*self._shapes, *other._shapes]:
            mine, theirs = self._shapes.get(name), other._shapes.get(name)
            check(mine == theirs, "mask", theirs, f"{name!r} must have the other mask's shape {mine}")
        return FishMask({name: combine(own, other._indices[name]) for name, own in self._indices.items()}, self._shapes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FishMask):
            return NotImplemented
        return self._shapes == other._shapes and all(
            torch.equal(own, other._indices[name]) for name, own in self._indices.items()
        )

    def overlap(self, other: FishMask) -> float:
        """The overlap of two masks: weights in both over weights in either (Jaccard); 1 if both are empty."""
        either = (self | other).count
        return (self & other).count / either if either else 1.0

    def split(self, n: int) -> list[FishMask]:
        """Divide the selected weights of all tensors among n masks: mask i gets every n-th weight from the i-th on.

        Raises:
            ValueError: n < 1.

        Example:
            >>> whole = FishMask({"weight": torch.tensor([0, 2, 3])}, {"weight": (4,)})
            >>> [part.indices("weight").tolist() for part in whole.split(2)]
            [[0, 3], [2]]
        """
        check(n >= 1, "n", n, "must be >= 1")
        parts: list[dict[str, Tensor]] = [{} for _ in range(n)]
        before = 0
        for name, own in self._indices.items():
            for i, part in enumerate(parts):
                part[name] = own[(i - before) % n :: n]
            before += len(own)
        return [FishMask(part, self._shapes) for part in parts]

    def __repr__(self) -> str:
        return f"FishMask({self.count:,} of {self.total:,} weights)"

    def table(self) -> str:
        """Text with a line for each parameter and one for all weights: how many are selected, and the density."""
        rows = [(name, self._shapes[name].numel(), len(own)) for name, own in self._indices.items()]
        rows.append(("all", self.total, self.count))
        width = max(len("parameter"), *(len(name) for name, *_ in rows))
        lines = [f"{'parameter':<{width}}{'weights':>15}{'selected':>15}{'density':>10}"]
        lines += [f"{name:<{width}}{n:>15,}{k:>15,}{k / max(n, 1):>10.3%}" for name, n, k in rows]
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the density of each parameter into an image, as `fsam_triton.analysis.plot_mask_density` does."""
        from ..analysis import plot_mask_density

        plot_mask_density(self.density_by_tensor(), path, title=f"{self.density:.3%} of the weights")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all: 1.4 bytes for each selected weight at a density of 0.5 %."""
        write_file(path, "FishMask", *encode_mask(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FishMask:
        """Read a file written by `save`.

        Raises:
            ValueError: the file is of another kind or version, truncated or damaged.
        """
        return decode_mask(*read_file(path, "FishMask"))


def _trainable(model: Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _matching(names: Mapping[str, Any], parts: Sequence[str]) -> set[str]:
    check(not isinstance(parts, str), "always_trainable", parts, "must be a sequence of strings")
    return {name for name in names if any(part.lower() in name.lower() for part in parts)}


def _positions(words: Tensor) -> Tensor:
    """The positions of the ones in a bit mask, int64 on the CPU."""
    pieces = words.cpu().split(_PIECE)
    bits = (unpack_mask(piece, torch.empty(len(piece) * 32, device="meta")) for piece in pieces)
    return torch.cat([piece.nonzero().view(-1) + i * _PIECE * 32 for i, piece in enumerate(bits)])


def encode_mask(mask: FishMask) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A mask as tensors and JSON: gaps between indices, in the smallest type; none for wholly selected tensors."""
    shapes = mask.shapes
    indices = {name: own for name, own in mask._indices.items() if len(own)}
    whole = [name for name, own in indices.items() if len(own) == shapes[name].numel()]
    tensors = {f"gaps/{name}": _gaps(own) for name, own in indices.items() if name not in whole}
    return tensors, {"shapes": {name: list(shape) for name, shape in shapes.items()}, "whole": whole}


def decode_mask(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> FishMask:
    """The inverse of `encode_mask`; other tensors are ignored."""
    shapes = {name: torch.Size(shape) for name, shape in meta["shapes"].items()}
    indices = {name: torch.arange(shapes[name].numel()) for name in meta["whole"]}
    for key, codes in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "gaps":
            ends = codes.long() != _CODES[codes.dtype]
            indices[name] = codes.long().cumsum(0)[ends] + torch.arange(int(ends.sum()))
    return FishMask(indices, shapes)


def _gaps(indices: Tensor) -> Tensor:
    """The number of weights between neighbouring indices; a gap of q * escape + r is q times the escape, then r."""
    gaps = indices.long().diff(prepend=torch.tensor([-1])) - 1
    size = {dtype: dtype.itemsize * (len(gaps) + int((gaps // escape).sum())) for dtype, escape in _CODES.items()}
    dtype = min(size, key=lambda dtype: size[dtype])
    ends = (gaps // _CODES[dtype] + 1).cumsum(0) - 1
    codes = torch.full((size[dtype] // dtype.itemsize,), _CODES[dtype])
    codes[ends] = gaps % _CODES[dtype]
    return codes.to(dtype)
