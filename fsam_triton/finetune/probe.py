"""Measures how sharp models are on a small sample of texts, at a cost that is known beforehand."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .. import analysis
from ..analysis.mean_loss import Loss
from .errors import one_line
from .optional import tqdm
from .options import SAM_TYPES, Arguments
from .results import run_folder
from .texts import SUBSET_SEED

if TYPE_CHECKING:
    from .command import AnyTask

Batch = dict[str, torch.Tensor]

# Texts of the sample and of its batches; the radius in which sharpness is measured, and the steps to the worst case.
TEXTS = 32
BATCH = 8
RHO = 0.05
ASCENT_STEPS = 3
# What costs most is measured on the sample's first few texts: the eigenvalue, with a relative error, and the landscape,
# which reaches so far in so many points.
FEW = 4
TOLERANCE = 0.05
RADIUS = 0.5
POINTS = 7

FIGURES_PER_MODEL = 5


@dataclass
class Sharpness:
    """What was measured of one model on the sample; NaN and None stand for what could not be.

    Args:
        name: which model.
        loss: mean loss.
        m_sharpness, worst_case, eigenvalue: see `fsam_triton.analysis`.
        landscape: the loss around the weights.
        problems: why something could not be measured.
    """

    name: str
    loss: float = math.nan
    m_sharpness: float = math.nan
    worst_case: float = math.nan
    eigenvalue: float = math.nan
    landscape: analysis.Landscape | None = None
    problems: list[str] = field(default_factory=list)


def measure_sharpness(arguments: Arguments, task: AnyTask) -> list[Sharpness]:
    """Return the `Sharpness` of each model that the runs have saved."""
    start = time.perf_counter()
    batches = list(task.draw_batches(TEXTS, BATCH, SUBSET_SEED))
    print(f"measuring sharpness and loss landscapes of {len(arguments.sam_type)} models", flush=True)
    found = []
    with tqdm(total=FIGURES_PER_MODEL * len(arguments.sam_type), unit="figure") as bar:
        for sam_type in arguments.sam_type:
            model = task.saved_model(arguments, run_folder(arguments, sam_type))
            found.append(measure(SAM_TYPES[sam_type], model.to(arguments.device), batches, bar))
    print(f"sharpness and landscapes: {time.perf_counter() - start:.0f} s")
    return found


def measure_m_sharpness(arguments: Arguments, task: AnyTask) -> list[float]:
    """Return the m-sharpness alone of each model that the runs have saved, the same as in `measure_sharpness`."""
    batches = list(task.draw_batches(TEXTS, BATCH, SUBSET_SEED))
    models = (task.saved_model(arguments, run_folder(arguments, sam_type)) for sam_type in arguments.sam_type)
    return [analysis.m_sharpness(model, _loss, batches, RHO) for model in models]


def measure(name: str, model: Any, batches: Sequence[Batch], bar: Any = None) -> Sharpness:
    """Return the `Sharpness` of a transformers model; its embeddings require no gradient afterwards.

    Args:
        name: what to call it.
        model: has a loss for the batches.
        batches: the sample, as dicts of the model's inputs with ``labels``.
        bar: a progress bar to say there what is being measured (default: None).
    """
    batches = [{key: value.to(model.device) for key, value in batch.items()} for batch in batches]
    found = Sharpness(name)

    def note(attribute: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        words = attribute.replace("_", " ")
        if bar is not None:
            bar.set_description(f"{name}: {words}")
        try:
            setattr(found, attribute, function(model, _loss, *arguments, **keywords))
        except (FloatingPointError, RuntimeError) as error:
            found.problems.append(f"{name}, {words}: {one_line(error)}")
        if bar is not None:
            bar.update()

    note("loss", _mean_loss, batches)
    note("m_sharpness", analysis.m_sharpness, batches, RHO)
    note("worst_case", analysis.worst_case_sharpness, batches, RHO, ASCENT_STEPS)
    few = [{key: value[:FEW] for key, value in batches[0].items()}]
    note("landscape", analysis.loss_landscape, few, radius=RADIUS, points=POINTS, seed=SUBSET_SEED)
    note("eigenvalue", _top_eigenvalue, few)
    return found


def _loss(model: Any, batch: Batch) -> torch.Tensor:
    return model(**batch).loss


@torch.no_grad()
def _mean_loss(model: Any, loss: Loss, batches: Sequence[Batch]) -> float:
    model.eval()
    return sum(loss(model, b).item() * len(b["labels"]) for b in batches) / sum(len(b["labels"]) for b in batches)


def _top_eigenvalue(model: Any, loss: Loss, batches: Sequence[Batch]) -> float:
    """Of all weights but the embeddings: these are many, and so few texts use hardly any."""
    import psutil

    model.get_input_embeddings().requires_grad_(False)
    # Lanczos keeps 16 numbers of 8 bytes for each weight.
    needed = 128 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    free = psutil.virtual_memory().available
    if needed > free / 2:
        raise RuntimeError(f"needs {needed / 2**30:.1f} GiB of memory; {free / 2**30:.1f} GiB are free")
    return analysis.hessian_eigenvalues(model, loss, batches, 1, TOLERANCE)[0]
