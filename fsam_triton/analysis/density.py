"""The share of each parameter that a mask selects, and a plot of it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer

from ..errors import ArgumentError, check
from ..optim.two_pass import TwoPass
from .figures import written_figure


def mask_density(optimizer: Optimizer, model: nn.Module) -> dict[str, float]:
    """The share of each of a model's parameters that the optimizer's `FisherMask` perturbs.

    Like `FSAM.mask_density`, but by the model's names, and for all of its parameters. (A `FishMask`, which selects the
    trained weights, knows the names itself: `FishMask.density_by_tensor`.)

    Args:
        optimizer: an `FSAM` or `SAM` with a `FisherMask`.
        model: the model whose parameters the optimizer has.

    Returns:
        By name, the fraction of the weights that `perturb` moves; 0.0 for a parameter that the optimizer does not have,
        and, before the first perturbation, for those that the mask selects from.

    Raises:
        ValueError: the optimizer has no `FisherMask`.

    Example:
        >>> import torch
        >>> from fsam_triton import FSAM, FisherMask
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = FSAM(model.named_parameters(), mask=FisherMask(keep_ratio=0.5))
        >>> model(torch.eye(4)).square().sum().backward()
        >>> optimizer.perturb()
        >>> mask_density(optimizer, model)
        {'weight': 0.5, 'bias': 1.0}
    """
    if not isinstance(optimizer, TwoPass) or optimizer.mask is None:
        raise ArgumentError("optimizer", type(optimizer).__name__, "must be an FSAM or SAM with a FisherMask")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    density = dict(zip(params, optimizer.mask_density().values(), strict=True))
    return {name: density.get(p, 0.0) for name, p in model.named_parameters()}


def plot_mask_density(densities: Mapping[str, float], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw densities as a heat map: rows are layers, columns the tensors in a layer.

    Args:
        densities: fractions in [0, 1] by parameter name, from `mask_density` or `FishMask.density_by_tensor`.
        path: the file to write; its suffix decides the type of the image.
        title: title of the plot (default: none).

    Raises:
        ValueError: there are no densities.
        ImportError: matplotlib is not installed.
    """
    check(len(densities) > 0, "densities", densities, "must have at least one parameter")
    rows, columns, cells = layers_by_tensors(densities)
    with written_figure(path, 4 + 0.3 * len(columns), 2.5 + 0.25 * len(rows)) as figure:
        from matplotlib.colors import SymLogNorm

        axes = figure.subplots()
        axes.set_facecolor("lightgray")
        # Linear below the smallest density, so that a logarithmic scale can show zero.
        least = min([value for value in densities.values() if value > 0], default=1.0)
        drawn = axes.imshow(cells, norm=SymLogNorm(least, vmin=0, vmax=1), aspect="auto")
        axes.set_xticks(range(len(columns)), columns, rotation=90)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_title(title)
        figure.colorbar(drawn, label="density")


def layers_by_tensors(densities: Mapping[str, float]) -> tuple[list[str], list[str], list[list[float]]]:
    """Densities as a table: layers, tensors in a layer, and a row of densities for each layer (NaN: no such tensor).

    A layer is a parameter's name up to its first number or, without a number, the name without its last part.

    Example:
        >>> layers_by_tensors({"embed.weight": 1.0, "layer.0.key.weight": 0.5, "layer.1.key.weight": 0.25})
        (['embed', 'layer.0', 'layer.1'], ['weight', 'key.weight'], [[1.0, nan], [nan, 0.5], [nan, 0.25]])
    """
    places = {}
    for name in densities:
        numbered = re.match(r"((?:.*?\.)?\d+)\.(.+)", name)
        layer, _, tensor = name.rpartition(".")
        places[name] = numbered.groups() if numbered else (layer, tensor)
    rows, columns = (list(dict.fromkeys(part)) for part in zip(*places.values(), strict=True))
    cells = [[math.nan] * len(columns) for _ in rows]
    for name, (row, column) in places.items():
        cells[rows.index(row)][columns.index(column)] = densities[name]
    return rows, columns, cells
