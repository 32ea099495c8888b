"""Train the default comparison of `fsam-finetune` at other seeds, to say how typical its one seed is.

OMP_NUM_THREADS=1 python -m bench.demo                    # trains; resumes where it was stopped
python -m bench.demo --report                             # prints the table of the runs that there are
python -m bench.demo --page docs/evidence.md              # puts it into the page
python -m bench.demo --write fsam_triton/finetune/evidence.json   # what the command compares its seed with
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path

import transformers

from bench.experiments.comparisons import Comparison, compare
from bench.generalisation import put_into
from bench.records import Record, record, recorded
from fsam_triton.files import written_whole
from fsam_triton.finetune import probe
from fsam_triton.finetune.command import prepare, train_all
from fsam_triton.finetune.evidence import FIGURES
from fsam_triton.finetune.parser import parse
from fsam_triton.finetune.results import Output

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results/demo.jsonl"
MARKER = "<!-- python -m bench.demo --report -->\n```\n"
SEEDS = tuple(range(1, 11))


@dataclasses.dataclass(frozen=True)
class Setting:
    """A run of the default comparison.

    Args:
        seed: value of ``--seed``.
    """

    seed: int


def run(setting: Setting) -> Record:
    """Train all its optimizers, and note the figures that are compared, of each by its name in the table."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = parse(["--seed", str(setting.seed), "--output_dir", folder])
        task = prepare(arguments)
        output = Output(arguments, task.description)
        train_all(arguments, task, task.total_steps(arguments, 1), output, None, (0, 1))
        for one, sharpness in zip(output.runs, probe.measure_m_sharpness(arguments, task), strict=True):
            one.m_sharpness = sharpness
    figures = {one.name: {name: of(one) for name, of in FIGURES.items()} for one in output.runs}
    rho = {one.name: one.rho_search["rho"] for one in output.runs if one.rho_search}
    return {"figures": figures, "rho": rho}


def differences(records: list[Record]) -> dict[str, dict[str, Comparison]]:
    """The comparison of each optimizer's figures with those of the first one, AdamW, at the same seeds."""
    baseline, *others = records[0]["figures"]
    return {
        other: {
            name: compare([one["figures"][other][name] - one["figures"][baseline][name] for one in records])
            for name in FIGURES
        }
        for other in others
    }


def report(records: list[Record]) -> str:
    """The table of means and differences."""
    if not records:
        return "no runs"
    found, lines = differences(records), [f"{len(records)} seeds"]
    for name in FIGURES:
        lines += ["", f"{name:14}{'mean':>8}  less AdamW, 95 % interval          t   flips"]
        for optimizer in records[0]["figures"]:
            line = f"{optimizer:14}{statistics.mean(one['figures'][optimizer][name] for one in records):8.4f}"
            if optimizer in found:
                one = found[optimizer][name]
                line += f"  {one.mean:+.4f} [{one.low:+.4f}, {one.high:+.4f}]  {one.t:6.3f}  {one.flips:6.3f}"
            lines.append(line)
    return "\n".join(lines)


def summary(records: list[Record]) -> dict:
    """What `fsam_triton.finetune.evidence` reads."""
    return {
        "seeds": [one["seed"] for one in records],
        "differences": {
            optimizer: {name: [round(value, 6) for value in (one.mean, one.low, one.high)] for name, one in of.items()}
            for optimizer, of in differences(records).items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=RESULTS, help="file of results")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="the first so many")
    parser.add_argument("--report", action="store_true", help="print the table, train nothing")
    parser.add_argument("--page", type=Path, help="put the table into this page instead")
    parser.add_argument("--write", type=Path, help="write the summary that the command line reads")
    given = parser.parse_args()
    if not (given.report or given.page or given.write):
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        for one in record([Setting(seed) for seed in SEEDS[: given.seeds]], given.runs, run):
            print(json.dumps(one), flush=True)
        return
    records = recorded(given.runs)
    if given.report:
        print(report(records))
    if given.page:
        put_into(given.page, report(records), MARKER)
    if given.write:
        with written_whole(given.write) as temporary:
            temporary.write_text(json.dumps(summary(records), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
