"""Writes what a comparison of optimizers has found as one HTML page that needs no other file and no script."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .. import FishMask, __version__
from ..analysis import Landscape
from ..analysis.density import layers_by_tensors
from ..analysis.figures import written_figure
from ..analysis.landscape import draw_map, draw_scale, map_levels
from ..files import written_whole
from . import probe
from .errors import InputError
from .evidence import other_seeds
from .options import Arguments
from .report import (
    METRICS,
    PeakMemory,
    Run,
    draw_evaluations,
    draw_losses,
    draw_rho_searches,
    line_style,
    steps_per_point,
    table_note,
    table_rows,
)
from .texts import SUBSET_SEED

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

    from .command import AnyTask

    Pictures = Markup | list[Markup] | dict[str, Markup]

# Stand in the pictures for the colour of the page's text and for those of the runs, which depend on the page's theme.
_INK = "#010203"
_COLORS = {f"#0102f{number}": f"var(--run-{number})" for number in range(5)}
_THEME: dict[Any, object] = {
    "font.size": 11,
    "lines.linewidth": 2,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "fsam-triton",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _INK,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}


def is_possible(arguments: Arguments) -> bool:
    """Whether there is to be a page and can be one; raise InputError if it was asked for and lacks a package."""
    missing = [name for name in ("jinja2", "matplotlib", "scipy") if not importlib.util.find_spec(name)]
    if arguments.report and arguments.report_folder and missing:
        raise InputError(f"--report needs {' and '.join(missing)}: pip install 'fsam-triton[demo]'")
    return arguments.report_folder is not None and not missing


def write_report(
    arguments: Arguments,
    argv: Sequence[str],
    task: AnyTask,
    runs: list[Run],
    mask: FishMask | None,
    sharpness: list[probe.Sharpness],
) -> Path:
    """Write ``report.html`` into the folder ``--report``, whole or not at all; return its path.

    Args:
        arguments: the options.
        argv: the words that gave them.
        task: that of the runs.
        runs: what is reported.
        mask: the FishMask of the weights that all runs have trained, or None for all weights.
        sharpness: of the model that every run started from, and of those that the runs have saved.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fsam_triton.finetune"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        names=", ".join(run.name for run in runs),
        title=title([run.name for run in runs]),
        outcome=outcome(runs, len(task.validation)),
        density=mask and mask.density,
        model=task.facts(arguments).get("model"),
        description=task.description,
        runs=runs,
        steps_per_point=steps_per_point(runs),
        other_seeds=other_seeds(arguments, runs),
        table=table_rows(runs),
        table_note=table_note(runs, PeakMemory(arguments.device).meaning),
        pictures=draw_pictures(runs, {one.name: one.landscape for one in sharpness if one.landscape}),
        sharpness=sharpness,
        probe=probe,
        losses=[one.loss for one in sharpness if math.isfinite(one.loss)],
        masks={title: mask_table(densities, task.sizes) for title, densities in mask_densities(runs, mask).items()},
        shade=shade,
        command=command_line(argv),
        facts=facts(arguments, task.facts(arguments), mask),
        options=asdict(arguments),
    )
    assert arguments.report_folder is not None
    path = Path(arguments.report_folder) / "report.html"
    with written_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def title(names: Sequence[str]) -> str:
    """Return what the page is about, in a few words."""
    if len(names) == 1:
        return f"Fine-tuning with {names[0]}"
    if len(names) > 4:
        return f"{len(names)} optimizers compared"
    return f"{', '.join(names[:-1])} and {names[-1]} compared"


def outcome(runs: Sequence[Run], texts: int) -> str:
    """Return in a sentence how the runs compare in their metric, which was measured on so many validation texts."""
    metric = runs[0].metric
    values = [run.summary()[f"eval_{metric}"] for run in runs]
    best, worst = (max(values), min(values)) if metric == "accuracy" else (min(values), max(values))
    best_shown, worst_shown = (format(value, METRICS[metric]) for value in (best, worst))
    if len(runs) == 1:
        return f"At the end, {metric} on the validation texts is {best_shown}."
    if best_shown == worst_shown:
        return f"All reach the same {metric} on the validation texts: {best_shown}."

    def having(value: float) -> str:
        return ", ".join(run.name for run, own in zip(runs, values, strict=True) if own == value)

    gap = ""
    if metric == "accuracy":
        count = round((best - worst) * texts)
        gap = f", a gap of {count} text{'s' if count > 1 else ''} in {texts}"
    return (
        f"The best {metric} on the validation texts is {best_shown} ({having(best)}), "
        f"the worst {worst_shown} ({having(worst)}){gap}."
    )


def command_line(argv: Sequence[str]) -> list[str]:
    """Return the shell command that gave this process the arguments ``argv``, as quoted words."""
    words = ["fsam-finetune"]
    if dist.is_available() and dist.is_torchelastic_launched():
        workers, everywhere = os.environ["LOCAL_WORLD_SIZE"], os.environ["WORLD_SIZE"]
        nodes = str(int(everywhere) // int(workers))
        words = ["torchrun", "--nnodes", nodes, "--nproc-per-node", workers, "-m", "fsam_triton.finetune"]
    return [shlex.quote(word) for word in (*words, *argv)]


def facts(arguments: Arguments, own: Mapping[str, str], mask: FishMask | None) -> dict[str, str]:
    """Return what else the figures depend on, in words by name."""
    device = f"CPU ({platform.machine()}), threads: {torch.get_num_threads()}"
    if arguments.device.type == "cuda":
        device = torch.cuda.get_device_name(arguments.device)
    found = {
        "date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "trained weights": f"{mask.count:,} of {mask.total:,} ({mask.density:.3%})" if mask else "all",
        **own,
        "seeds": f"{arguments.seed} for training; {SUBSET_SEED} for the sample and the directions of the landscapes",
        "device": device,
        "fsam-triton": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("triton", "transformers", *(("trl", "peft") if arguments.task == "causal-lm" else ())):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def mask_densities(runs: Sequence[Run], mask: FishMask | None) -> dict[str, dict[str, float]]:
    """Return the share of each parameter's weights that a mask selects, by what the mask is."""
    if mask:
        return {"Trained in every run": mask.density_by_tensor()}
    return {f"Perturbed by {run.name}, last mask": run.mask_density for run in runs if run.mask_density}


def mask_table(
    densities: Mapping[str, float], sizes: Mapping[str, int]
) -> tuple[list[str], list[str], list[list[float]], list[float], float]:
    """Return the table of a mask: layers, tensors, their densities, those of all layers, and that of all weights.

    Args:
        densities: share of each parameter's weights that the mask selects, by name.
        sizes: how many weights each parameter has, by name.
    """
    weights = {name: sizes[name] for name in densities}
    selected = {name: density * sizes[name] for name, density in densities.items()}

    def columns(values: Mapping[str, float]) -> list[list[float]]:
        return [
            [value for value in column if value == value] for column in zip(*layers_by_tensors(values)[2], strict=True)
        ]

    shares = [sum(some) / sum(all_of) for some, all_of in zip(columns(selected), columns(weights), strict=True)]
    return *layers_by_tensors(densities), shares, sum(selected.values()) / sum(weights.values())


def shade(density: float) -> float:
    """Return how strongly a density is coloured: 0 for at most 0.0001, 1 for all, logarithmic between."""
    return max(0.0, 1 + math.log10(density) / 4) if density > 0 else 0.0


def draw_pictures(runs: Sequence[Run], landscapes: Mapping[str, Landscape]) -> dict[str, Pictures]:
    """Return the page's pictures as SVG elements by name: curves, a line of each run, maps by run and their scale."""
    import matplotlib
    from matplotlib.rcsetup import cycler

    curves = {"losses": draw_losses, "evaluations": draw_evaluations}
    if any(run.rho_search for run in runs):
        curves["rho"] = draw_rho_searches
    with matplotlib.rc_context({**_THEME, "axes.prop_cycle": cycler(color=_COLORS)}):
        pictures: dict[str, Pictures] = {
            name: picture(name, 4.8, 3.2, lambda figure, draw=draw: draw(runs, figure.subplots()))
            for name, draw in curves.items()
        }
        pictures["keys"] = [
            picture(f"key{number}", 0.55, 0.2, lambda figure, number=number: draw_key(number, figure))
            for number in range(len(runs))
        ]
        if landscapes:
            levels = map_levels(landscapes.values())
            pictures["maps"] = {
                name: picture(f"map{number}", 2.6, 2.5, lambda figure, one=one: draw_small_map(one, levels, figure))
                for number, (name, one) in enumerate(landscapes.items())
            }
            one = next(iter(landscapes.values()))
            pictures["scale"] = picture("scale", 4.8, 0.75, lambda figure: draw_map_scale(one, levels, figure))
    return pictures


def draw_key(number: int, figure: Figure) -> None:
    """Draw a piece of a run's curve."""
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set(xlim=(0, 2), ylim=(-1, 1))
    axes.plot((0, 1, 2), (0, 0, 0), markevery=(1, 2), **line_style(number))


def draw_small_map(landscape: Landscape, levels: list[float] | None, figure: Figure) -> None:
    """Draw a landscape without words."""
    axes = figure.subplots()
    draw_map(axes, landscape, levels)
    axes.set(xticks=(-probe.RADIUS, 0, probe.RADIUS), yticks=(-probe.RADIUS, 0, probe.RADIUS))


def draw_map_scale(landscape: Landscape, levels: list[float] | None, figure: Figure) -> None:
    """Draw the colours of all landscapes, of which ``landscape`` is one."""
    place = figure.subplots()
    axes = figure.add_axes((0, 0, 1, 1))
    draw_scale(figure, draw_map(axes, landscape, levels), cax=place, orientation="horizontal")
    axes.remove()


def picture(name: str, width: float, height: float, draw: Callable[[Figure], object]) -> Markup:
    """Return what ``draw`` has drawn into a figure of that size in inches as an SVG element, for a page."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.svg"
        with written_figure(path, width, height) as figure:
            draw(figure)
        return embedded_svg(path)


def embedded_svg(path: Path) -> Markup:
    """Return the element of an SVG file that matplotlib wrote, to be put into a page; its ids take the file's name."""
    from markupsafe import Markup

    text = path.read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    for color, own in {_INK: "currentColor", **_COLORS}.items():
        text = text.replace(color, own)
    return Markup(re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{path.stem}-", text))
