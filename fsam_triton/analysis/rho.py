"""Suggests a rho for SAM, as a learning-rate finder suggests a learning rate: from the loss over a range of rho."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import check
from .figures import written_figure
from .mean_loss import Loss, MeanLoss, Vector, measuring, moved, norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# How much of the loss the suggested perturbation adds to it: see docs/rho.md.
RISE = 0.01
RHOS = tuple(0.001 * 2**k for k in range(9))


@dataclass(frozen=True)
class RhoSearch:
    """How much perturbations raise the loss, and the suggested rho.

    Attributes:
        rho: the suggestion.
        rise: fraction of the loss by which the suggested perturbation raises it.
        loss: mean loss at the weights.
        rhos: the tested lengths, ascending.
        losses: mean loss at each; infinite where it is not finite.
    """

    rho: float
    rise: float
    loss: float
    rhos: tuple[float, ...]
    losses: tuple[float, ...]


def find_rho(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    *,
    rise: float = RISE,
    rhos: Sequence[float] = RHOS,
    num_batches: int = 2,
) -> RhoSearch:
    """Suggest SAM's rho: the length whose perturbation raises a batch's loss by a given fraction of the loss.

    Each batch is perturbed along its own gradient g_b, as SAM's step does (arXiv 2010.01412), over a range of rho:

        L(rho) = mean over batches of L_b(w + rho * g_b / norm(g_b)),   suggested: L(rho) = (1 + rise) * L(0)

    Between two lengths, and from zero to the shortest one, L is assumed to be linear. If even the longest one raises
    the loss by less, the longest is suggested. Call this with the weights from which training starts: the default of
    `rise` was calibrated there. The model and random states are left alone, as by `m_sharpness`.

    Args:
        model: as for `m_sharpness`.
        loss: ``loss(model, batch)`` returns the mean loss of a batch, a scalar tensor > 0.
        batches: training batches of the size used in training, since gradients of large batches are shorter; a
            DataLoader or list, of which the first `num_batches` are read.
        rise: see above, > 0 (default: 0.01).
        rhos: lengths to try, > 0, ascending (default: nine from 0.001 to 0.256, each twice the one before).
        num_batches: number of batches to read, >= 1 (default: 2). Each takes ``1 + len(rhos)`` forward passes and a
            backward pass.

    Returns:
        The suggestion, and the losses from which it follows.

    Raises:
        ValueError: an argument is out of its range, there are no batches, `loss` returns no scalar or one that is not
            positive, or no gradient differs from zero.
        FloatingPointError: a loss at the weights, or at the shortest length, is not finite.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(2.0)
        >>> halved_square = lambda model, x: 0.5 * model(x).square().mean()
        >>> search = find_rho(model, halved_square, [torch.ones(4, 1)], rhos=[0.005, 0.01, 0.02])
        >>> round(search.rho, 4)  # 2.01^2 is 1.01 * 2^2, nearly
        0.01
    """
    check(0 < rise < math.inf, "rise", rise, "must be > 0 and finite")
    lengths = tuple(rhos)
    ascends = all(low < high for low, high in itertools.pairwise((0, *lengths, math.inf)))
    check(len(lengths) > 0 and ascends, "rhos", rhos, "must be > 0, finite and ascending")
    check(isinstance(num_batches, int) and num_batches >= 1, "num_batches", num_batches, "must be an int >= 1")
    with measuring(model, loss, _first(batches, num_batches)) as mean:
        start, losses, longest = 0.0, [0.0] * len(lengths), 0.0
        for i, share in enumerate(mean.shares):
            value, gradient = mean.gradient_of(i, mean.weights)
            length = norm(gradient)
            start, longest = start + share * value, max(longest, length)
            for k, rho in enumerate(lengths):
                losses[k] += share * (_value_at(mean, i, gradient, rho / length) if length else value)
    check(longest > 0, "model", type(model).__name__, "its gradient is zero for every batch")
    check(start > 0, "loss", start, "must be > 0, since the rise is measured as a part of it")
    return RhoSearch(_reached(lengths, losses, start, (1 + rise) * start), rise, start, lengths, tuple(losses))


def _first(batches: Iterable[Any], count: int) -> Iterator[Any]:
    # A function of its own, because islice asks a loader for its iterator, which draws a random number, at once.
    yield from itertools.islice(batches, count)


def _value_at(mean: MeanLoss, i: int, direction: Vector, length: float) -> float:
    try:
        return mean.value_of(i, moved(mean.weights, direction, length))
    except FloatingPointError:
        return math.inf


def _reached(rhos: Sequence[float], losses: Sequence[float], start: float, target: float) -> float:
    """The rho at which a line through the losses first reaches the target."""
    points = [(0.0, start), *zip(rhos, losses, strict=True)]
    for (rho, low), (longer, high) in itertools.pairwise(points):
        if high == math.inf:
            if not rho:
                raise FloatingPointError(f"the loss is not finite at a rho of {longer} either; pass shorter rhos")
            return rho
        if high >= target:
            return rho + (longer - rho) * (target - low) / (high - low)
    return rhos[-1]


def draw_rho_search(search: RhoSearch, axes: Axes, label: str | None = None, **style: Any) -> None:
    """Draw the losses over rho, and the suggestion; ``style`` is that of the curve."""
    finite = [(rho, loss) for rho, loss in zip(search.rhos, search.losses, strict=True) if loss < math.inf]
    (line,) = axes.plot(*zip(*finite, strict=True), label=label, **{"marker": ".", **style})
    axes.axhline(search.loss, color=line.get_color(), linewidth=0.8)
    axes.axvline(search.rho, color=line.get_color(), linewidth=0.8, linestyle=":")
    axes.set(xlabel="rho", ylabel="loss of a batch", xscale="log")
    axes.grid(alpha=0.15)


def plot_rho_search(search: RhoSearch, path: str | os.PathLike[str]) -> None:
    """Draw how the loss rises with rho: the curve, the loss at the weights, and the suggestion as a dotted line.

    Args:
        search: the result of `find_rho`.
        path: the file to write; its suffix decides the type of the image.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with written_figure(path, 6, 4) as figure:
        axes = figure.subplots()
        draw_rho_search(search, axes)
        axes.set_title(f"suggested rho: {search.rho:.3g}")
