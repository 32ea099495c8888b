"""Writes what a comparison of optimizers has found as one HTML page that needs no other file and no script."""

import datetime
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import shlex
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from .. import __version__
from ..analysis import plot_landscapes
from ..analysis.density import layers_by_tensors
from ..analysis.figures import written_figure
from ..files import written_whole
from . import probe
from .errors import InputError
from .report import PeakMemory, draw_evaluations, draw_losses, draw_rho_searches, table_note, table_rows
from .texts import SUBSET_SEED

# Stands for the colour of the page's text in its pictures.
_INK = "#010203"
# Of a contrast of at least 3 with white and with the page's dark background.
_COLORS = ("#2f7ed8", "#d9572b", "#2e9e5b", "#a45fd0", "#94801a", "#1b93a5", "#d1477f", "#7f7f7f", "#6f6ee8")
_THEME = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.framealpha": 0,
    "svg.fonttype": "none",
    "svg.hashsalt": "fsam-triton",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _INK,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}


def is_possible(arguments):
    """Whether there is to be a page and can be one; raise InputError if it was asked for and lacks a package."""
    missing = [name for name in ("jinja2", "matplotlib", "scipy") if not importlib.util.find_spec(name)]
    if arguments.report and arguments.report_folder and missing:
        raise InputError(f"--report needs {' and '.join(missing)}: pip install 'fsam-triton[demo]'")
    return arguments.report_folder is not None and not missing


def write_report(arguments, argv, task, runs, mask, sharpness):
    """Write ``report.html`` into the folder ``--report``, whole or not at all; return its path.

    Args:
        arguments: the options.
        argv: the words that gave them.
        task: the `Task` of the runs.
        runs: list of `Run`.
        mask: the FishMask of the weights that all runs have trained, or None for all weights.
        sharpness: list of `Sharpness`.
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
        description=task.description,
        runs=runs,
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
    path = Path(arguments.report_folder) / "report.html"
    with written_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def command_line(argv):
    """Return the shell command that gave this process the arguments ``argv``, as quoted words."""
    words = ["fsam-finetune"]
    if dist.is_available() and dist.is_torchelastic_launched():
        workers, everywhere = os.environ["LOCAL_WORLD_SIZE"], os.environ["WORLD_SIZE"]
        nodes = str(int(everywhere) // int(workers))
        words = ["torchrun", "--nnodes", nodes, "--nproc-per-node", workers, "-m", "fsam_triton.finetune"]
    return [shlex.quote(word) for word in (*words, *argv)]


def facts(arguments, own, mask):
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
    }
    for name in ("torch", "triton", "transformers", *(("trl", "peft") if arguments.task == "causal-lm" else ())):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def mask_densities(runs, mask):
    """Return the share of each parameter's weights that a mask selects, by what the mask is."""
    if mask:
        return {"Trained in every run": mask.density_by_tensor()}
    return {f"Perturbed by {run.name}, last mask": run.mask_density for run in runs if run.mask_density}


def mask_table(densities, sizes):
    """Return the table of a mask: layers, tensors, their densities, those of all layers, and that of all weights.

    Args:
        densities: share of each parameter's weights that the mask selects, by name.
        sizes: how many weights each parameter has, by name.
    """
    weights = {name: sizes[name] for name in densities}
    selected = {name: density * sizes[name] for name, density in densities.items()}

    def columns(values):
        return [
            [value for value in column if value == value] for column in zip(*layers_by_tensors(values)[2], strict=True)
        ]

    shares = [sum(some) / sum(all_of) for some, all_of in zip(columns(selected), columns(weights), strict=True)]
    return *layers_by_tensors(densities), shares, sum(selected.values()) / sum(weights.values())


def shade(density):
    """Return how strongly a density is coloured: 0 for at most 0.0001, 1 for all, logarithmic between."""
    return max(0.0, 1 + math.log10(density) / 4) if density > 0 else 0.0


def draw_pictures(runs, landscapes):
    """Return the page's pictures as SVG elements by name; there are none of ``landscapes`` if it is empty."""
    import matplotlib

    styles = matplotlib.cycler(color=_COLORS) + matplotlib.cycler(linestyle=["-", "--", "-."] * 3)
    pictures = {}
    with matplotlib.rc_context({**_THEME, "axes.prop_cycle": styles}), tempfile.TemporaryDirectory() as folder:
        drawings = {"losses": draw_losses, "evaluations": draw_evaluations}
        if any(run.rho_search for run in runs):
            drawings["rho"] = draw_rho_searches
        for name, draw in drawings.items():
            path = Path(folder) / f"{name}.svg"
            with written_figure(path, 5.2, 3.6) as figure:
                draw(runs, figure.subplots())
            pictures[name] = embedded_svg(path)
        if landscapes:
            plot_landscapes(landscapes, Path(folder) / "landscapes.svg")
            pictures["landscapes"] = embedded_svg(Path(folder) / "landscapes.svg")
    return pictures


def embedded_svg(path):
    """Return the element of an SVG file that matplotlib wrote, to be put into a page; its ids take the file's name."""
    from markupsafe import Markup

    text = path.read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S).replace(_INK, "currentColor")
    return Markup(re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{path.stem}-", text))
