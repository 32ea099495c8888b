"""Says how the figures of the default comparison compare with those of other seeds, from `python -m bench.demo`."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .options import SAM_TYPES, Arguments
from .report import ROUNDED_BITS, Run

FILE = Path(__file__).with_name("evidence.json")
# Options that do not change a figure.
_FREE = {"output_dir", "overwrite_output_dir", "report", "save_steps", "resume_from_checkpoint", "seed", "use_cpu"}
# What is compared: a figure of a run, or None if it was not measured.
FIGURES: dict[str, Callable[[Run], float | None]] = {
    "accuracy": lambda run: run.evaluations[-1][1],
    f"{ROUNDED_BITS}-bit accuracy": lambda run: run.rounded and run.rounded[0],
    "m-sharpness": lambda run: run.m_sharpness,
}


@functools.cache
def read_evidence() -> dict[str, Any]:
    """Return the content of the file: seeds, and the mean and 95 % interval of each difference from AdamW."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def is_default(arguments: Arguments) -> bool:
    """Whether the options are those of the comparison that the evidence is about."""
    own, default = (dataclasses.asdict(one) for one in (arguments, Arguments()))
    return all(own[name] == value for name, value in default.items() if name not in _FREE)


def other_seeds(arguments: Arguments, runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Return how the differences from AdamW at this seed compare with those at others: rows of strings, headings first.

    The list is empty where that is not known: for other options, or before all runs are finished.
    """
    finished = [run.name for run in runs if len(run.losses) == run.total_steps]
    if not is_default(arguments) or finished != [SAM_TYPES[sam_type] for sam_type in arguments.sam_type]:
        return []
    evidence, (baseline, *others) = read_evidence(), runs
    rows = [(f"less {baseline.name}", "here", f"mean of {len(evidence['seeds'])} other seeds", "95 % interval")]
    for run in others:
        for name, figure in FIGURES.items():
            own, other = figure(run), figure(baseline)
            if own is not None and other is not None:
                mean, low, high = evidence["differences"][run.name][name]
                values = f"{own - other:+.4f}", f"{mean:+.4f}", f"{low:+.4f} to {high:+.4f}"
                rows.append((f"{run.name}, {name}", *values))
    return rows
