"""Plots that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..files import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextlib.contextmanager
def written_figure(path: str | os.PathLike[str], width: float, height: float) -> Iterator[Figure]:
    """A figure of that size in inches to draw into; it is written at the end, in the format of the path's suffix."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'fsam-triton[analysis]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=120)
