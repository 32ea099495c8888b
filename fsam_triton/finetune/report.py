"""Measures a training run and reports several: peak memory, a table, a plot of the curves."""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..analysis import RhoSearch
from ..analysis.rho import draw_rho_search
from ..files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# How the table shows each metric.
METRICS = {"accuracy": ".4f", "perplexity": ".2f"}
# Weights are rounded to so many bits for an additional evaluation.
ROUNDED_BITS = 4
# How plots tell runs apart besides by colour; dashes are lengths of lines and gaps, in line widths.
_DASHES = ((), (4.5, 1.5), (1.2, 1.2), (6, 1.5, 1.2, 1.5), (8, 3))
_MARKERS = "os^Dv<>PX*h"
_MOST_POINTS = 50


@dataclass
class Run:
    """What one training run left behind.

    Args:
        name: the optimizer, as the table and the plot call it.
        total_steps: how many steps it is to have.
        losses: training loss of each step, before the step.
        step_seconds: wall-clock seconds of each step.
        evaluations: (step, value of the metric, loss) on the validation texts, in the order they were made.
        peak_memory_bytes: highest memory use seen while it ran; see `PeakMemory`.
        mask_density: share of each parameter's weights that the last Fisher mask perturbs; empty without such a mask.
        metric: what is judged besides the loss: a key of `METRICS`.
        rho_search: the fields of the `RhoSearch` of ``--rho auto``, or None.
        rounded: (value of the metric, loss) of the last step's model with weights rounded to `ROUNDED_BITS`, or None.
        m_sharpness: of the saved model, on the sample of training texts of the report; None without one.
    """

    name: str
    total_steps: int = 0
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float, float]] = field(default_factory=list)
    peak_memory_bytes: int = 0
    mask_density: dict[str, float] = field(default_factory=dict)
    metric: str = "accuracy"
    rho_search: dict[str, Any] | None = None
    rounded: tuple[float, float] | None = None
    m_sharpness: float | None = None

    def summary(self) -> dict[str, float]:
        """Return the figures of the table as a dict; the time is the median, which leaves out compiling."""
        _, value, loss = self.evaluations[-1]
        return {
            f"eval_{self.metric}": value,
            "eval_loss": loss,
            "seconds_per_step": statistics.median(self.step_seconds),
            "peak_memory_bytes": self.peak_memory_bytes,
        }


class PeakMemory:
    """Context manager that measures the peak memory of what runs inside it, in ``bytes``.

    On CUDA: the most the PyTorch allocator had handed out (``torch.cuda.max_memory_allocated``). Elsewhere: the most
    resident memory of the process seen by a thread that looks every 10 ms, libraries and data included. (The
    operating system's own maximum is of the process's whole life, so a second run could not be told from the first.)
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device: torch.device = torch.device(device)
        self.bytes: int = 0

    @property
    def meaning(self) -> str:
        """What ``bytes`` counts, in words."""
        return "CUDA memory allocated" if self.device.type == "cuda" else "process memory (sampled RSS)"

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._stop = threading.Event()
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self._stop.set()
            self._sampler.join()

    def _sample(self) -> None:
        import psutil

        process = psutil.Process()
        while True:
            self.bytes = max(self.bytes, process.memory_info().rss)
            if self._stop.wait(0.01):
                return


def table_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Return the figures of ``runs`` as rows of strings: the headings, then one row per run.

    What has been measured of no run has no column; of a single one, a dash.
    """
    metric = runs[0].metric
    columns: dict[str, list[str] | list[str | None]] = {
        metric: [format(run.evaluations[-1][1], METRICS[metric]) for run in runs],
        "loss": [f"{run.evaluations[-1][2]:.4f}" for run in runs],
        f"{ROUNDED_BITS}-bit {metric}": [run.rounded and format(run.rounded[0], METRICS[metric]) for run in runs],
        "m-sharpness": [None if run.m_sharpness is None else f"{run.m_sharpness:.4f}" for run in runs],
        "s/step": [f"{run.summary()['seconds_per_step']:.3f}" for run in runs],
        "peak MiB": [f"{run.peak_memory_bytes / 2**20:,.0f}" for run in runs],
    }
    columns = {heading: cells for heading, cells in columns.items() if any(cells)}
    names = [run.name for run in runs]
    cells = ([cell or "-" for cell in column] for column in columns.values())
    return [("optimizer", *columns), *zip(names, *cells, strict=True)]


def table_note(runs: Sequence[Run], memory_meaning: str) -> str:
    """Return what the figures of the table are, in words."""
    parts = [f"{runs[0].metric} and loss: on the validation texts"]
    if any(run.rounded for run in runs):
        parts.append(f"{ROUNDED_BITS}-bit: with the linear layers' weights rounded to {ROUNDED_BITS} bits")
    if any(run.m_sharpness is not None for run in runs):
        parts.append("m-sharpness: rise of the loss around the weights, on training texts")
    return "; ".join([*parts, "s/step: median", f"peak MiB: {memory_meaning}"])


def format_table(runs: Sequence[Run], memory_meaning: str) -> str:
    """Return the figures of ``runs`` as lines of text, one per run, under a heading."""
    stopped = [
        f"{run.name}: stopped after step {len(run.losses)} of {run.total_steps}"
        for run in runs
        if len(run.losses) < run.total_steps
    ]
    return "\n".join([*aligned(table_rows(runs)), *stopped, table_note(runs, memory_meaning)])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of strings as lines whose columns are as wide as they must be, all but the first flush right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        name.ljust(first) + "".join(f"  {cell.rjust(width)}" for cell, width in zip(cells, others, strict=True))
        for name, *cells in rows
    ]


def line_style(number: int) -> dict[str, Any]:
    """Return the colour, dashes and marker of a run, as keywords of ``axes.plot``."""
    # One more for each round, so that no two runs have both colour and dashes in common.
    dashes = _DASHES[(number + number // len(_DASHES)) % len(_DASHES)]
    return {
        "color": f"C{number}",
        "linestyle": (0, dashes) if dashes else "-",
        "marker": _MARKERS[number % len(_MARKERS)],
    }


def steps_per_point(runs: Sequence[Run]) -> int:
    """Return how many steps have one point in the plot of the losses: several in long runs, to show less noise."""
    return math.ceil(max(len(run.losses) for run in runs) / _MOST_POINTS)


def draw_losses(runs: Sequence[Run], axes: Axes) -> None:
    """Draw the training loss of each run's steps, as means over `steps_per_point` steps."""
    count = steps_per_point(runs)
    means = []
    for number, run in enumerate(runs):
        parts = [run.losses[start : start + count] for start in range(0, len(run.losses), count)]
        means += (values := [statistics.fmean(part) for part in parts])
        middles = [count * i + (len(part) + 1) / 2 for i, part in enumerate(parts)]
        axes.plot(middles, values, label=run.name, **{**line_style(number), "marker": ""})
    # Within one decade the labels of a logarithmic scale are hard to read.
    axes.set(xlabel="step", ylabel="training loss", yscale="log" if max(means) > 10 * min(means) else "linear")
    _finish(axes)


def draw_evaluations(runs: Sequence[Run], axes: Axes) -> None:
    """Draw the metric of each run on the validation texts after the steps at which it was evaluated."""
    for number, run in enumerate(runs):
        steps, values, _ = zip(*run.evaluations, strict=True)
        axes.plot(steps, values, label=run.name, **line_style(number))
    axes.set(xlabel="step", ylabel=f"validation {runs[0].metric}")
    _finish(axes)


def draw_rho_searches(runs: Sequence[Run], axes: Axes) -> None:
    """Draw how the loss rises with rho, of each run whose rho was searched."""
    for number, run in enumerate(runs):
        if run.rho_search:
            draw_rho_search(RhoSearch(**run.rho_search), axes, run.name, **line_style(number))


def _finish(axes: Axes) -> None:
    axes.locator_params("x", integer=True)
    axes.grid(alpha=0.15)


def plot_curves(runs: Sequence[Run], path: Path) -> None:
    """Write the training loss and the metric on the validation texts as a PNG; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, metric_axes = figure.subplots(1, 2)
    draw_losses(runs, loss_axes)
    draw_evaluations(runs, metric_axes)
    for axes in (loss_axes, metric_axes):
        axes.legend()
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
