"""Slices of the loss along random directions, and plots of them."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import check
from .figures import written_figure
from .mean_loss import Loss, Vector, measuring, moved, random_like

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.contour import ContourSet
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Landscape:
    """Losses on a grid around the weights.

    Attributes:
        coordinates: fp64 [points], from -radius to radius, in units of the directions.
        losses: fp64 [points], or [points, points]: entry (i, j) at ``w + coordinates[i] * d1 + coordinates[j] * d2``.
    """

    coordinates: Tensor
    losses: Tensor


def loss_landscape(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    dimensions: int = 2,
    radius: float = 1.0,
    points: int = 11,
    seed: int = 0,
) -> Landscape:
    """The mean loss over all batches along one or two random directions with filter normalisation (arXiv 1712.09913).

    Each filter of a direction (the numbers that belong to one index of a weight's first dimension: the inputs of one
    unit, or one row of an embedding) has the norm of the same filter of the weights, so that landscapes of two models
    can be compared. Biases and the parameters of norm layers (all with fewer than two dimensions) stay as they are. The
    model and random states are left alone, as by `m_sharpness`.

    Args:
        model, loss, batches: as for `m_sharpness`.
        dimensions: 1 for a line, 2 for a plane: ``points ** dimensions`` forward passes over all batches (default: 2).
        radius: coordinates range from -radius to radius, > 0; at 1 a filter has moved by its own norm (default: 1.0).
        points: number of points along each direction, >= 2; if it is odd, the weights are the middle point (default:
            11).
        seed: determines the directions, together with the parameters' shapes and order: they are the same for models of
            the same architecture (default: 0).

    Raises:
        ValueError, FloatingPointError: as for `m_sharpness`; or there is no parameter with two dimensions.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(2.0)
        >>> landscape = loss_landscape(model, lambda model, x: model(x).mean(), [torch.ones(4, 1)], 1, points=3)
        >>> landscape.coordinates.tolist(), landscape.losses.tolist()
        ([-1.0, 0.0, 1.0], [0.0, 2.0, 4.0])
    """
    check(dimensions in (1, 2), "dimensions", dimensions, "must be 1 or 2")
    check(0 < radius < math.inf, "radius", radius, "must be > 0 and finite")
    check(isinstance(points, int) and points >= 2, "points", points, "must be an int >= 2")
    # Not linspace, whose middle may differ from zero.
    coordinates = radius * (2 * torch.arange(points, dtype=torch.float64) - (points - 1)) / (points - 1)
    generator = torch.Generator().manual_seed(seed)
    with measuring(model, loss, batches) as mean:
        filters = any(w.dim() >= 2 for w in mean.weights)
        check(filters, "model", type(model).__name__, "must have a trainable parameter with two dimensions or more")
        directions = [_direction(mean.weights, generator) for _ in range(dimensions)]
        losses = [
            mean.value(_place(mean.weights, directions, at))
            for at in itertools.product(coordinates.tolist(), repeat=dimensions)
        ]
    return Landscape(coordinates, torch.tensor(losses, dtype=torch.float64).view([points] * dimensions))


def _direction(weights: Vector, generator: torch.Generator) -> Vector:
    """A random direction with the norms of the weights' filters."""
    out = []
    for w, d in zip(weights, random_like(weights, generator), strict=True):
        if w.dim() < 2:
            out.append(torch.zeros_like(w))
            continue
        others = tuple(range(1, w.dim()))
        norms = (torch.linalg.vector_norm(x, dim=others, keepdim=True) for x in (w, d))
        out.append(d * torch.div(*norms))
    return out


def _place(weights: Vector, directions: list[Vector], at: Sequence[float]) -> Vector:
    for direction, coordinate in zip(directions, at, strict=True):
        weights = moved(weights, direction, coordinate)
    return weights


def plot_landscape(landscape: Landscape, path: str | os.PathLike[str]) -> None:
    """Draw one landscape, as `plot_landscapes` does."""
    plot_landscapes({"": landscape}, path)


def plot_landscapes(landscapes: Mapping[str, Landscape], path: str | os.PathLike[str]) -> None:
    """Draw landscapes for comparison: lines in one diagram, or maps side by side on the same colour scale.

    Args:
        landscapes: landscapes by title, >= 1, all of one dimension or all of two.
        path: the file to write; its suffix decides the type of the image.

    Raises:
        ValueError: there are none, or their dimensions differ.
        ImportError: matplotlib is not installed.
    """
    dimensions = {landscape.losses.dim() for landscape in landscapes.values()}
    check(len(dimensions) == 1, "landscapes", list(landscapes), "must be at least one, all of the same dimensions")
    lines = dimensions == {1}
    width = 6 if lines else 1 + 4 * len(landscapes)
    with written_figure(path, width, 4) as figure:
        (_plot_lines if lines else _plot_maps)(figure, landscapes)


def _plot_lines(figure: Figure, landscapes: Mapping[str, Landscape]) -> None:
    axes = figure.subplots()
    for title, landscape in landscapes.items():
        axes.plot(landscape.coordinates, landscape.losses, marker=".", label=title)
    axes.set(xlabel="distance along the direction", ylabel="mean loss")
    axes.grid(alpha=0.3)
    if any(landscapes):
        axes.legend()


def _plot_maps(figure: Figure, landscapes: Mapping[str, Landscape]) -> None:
    levels = map_levels(landscapes.values())
    all_axes = figure.subplots(1, len(landscapes), squeeze=False)[0]
    for axes, title in zip(all_axes, landscapes, strict=True):
        axes.set(title=title, xlabel="first direction", ylabel="second direction")
    drawn = [draw_map(*pair, levels) for pair in zip(all_axes, landscapes.values(), strict=True)]
    draw_scale(figure, drawn[-1], ax=list(all_axes))


def map_levels(landscapes: Iterable[Landscape]) -> list[float] | None:
    """The losses at which the maps of all landscapes change colour; None if there is only one loss."""
    losses = torch.cat([landscape.losses.flatten() for landscape in landscapes])
    low, high = float(losses.min()), float(losses.max())
    # Equal steps of the root of the rise: close to the minimum losses grow as a square.
    return [low + (high - low) * (i / 20) ** 2 for i in range(21)] if high > low else None


def draw_map(axes: Axes, landscape: Landscape, levels: list[float] | None) -> ContourSet:
    """Draw a plane's losses; the result is what `draw_scale` needs."""
    x, z = landscape.coordinates, landscape.losses
    # Rows are the second axis of a picture.
    at = [] if levels is None else [levels]
    drawn = axes.contourf(x, x, z.T, *at, cmap="viridis", norm="linear")
    axes.contour(x, x, z.T, *at, colors="white", linewidths=0.4)
    axes.plot(0, 0, marker="+", color="white", markeredgewidth=1.5)
    axes.set_aspect("equal")
    return drawn


def draw_scale(figure: Figure, drawn: ContourSet, **place: Any) -> None:
    """Draw the colours of maps with their losses; ``place`` is given to ``figure.colorbar``."""
    from matplotlib.ticker import MaxNLocator

    # Round numbers at heights of their own: one for each level would be crowded where the loss is low.
    figure.colorbar(drawn, label="mean loss", spacing="proportional", ticks=MaxNLocator(6), **place)
