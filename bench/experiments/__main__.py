"""Measure what sharpness-aware training is good for: forgetting, rounding of weights, wrong labels.

    OMP_NUM_THREADS=1 python -m bench.experiments --texts movie_reviews.tsv bbc --forgetting bbc movie_reviews.tsv
    OMP_NUM_THREADS=1 python -m bench.experiments --lora movie_reviews.tsv bbc --methods AdamW BAR
    python -m bench.experiments --report                      # prints the tables of the file of results, trains nothing
    python -m bench.experiments --page docs/evidence.md       # puts them into the page

Each run is a line in the file of results as soon as it is done, and runs that are found there are not made again. A
file of texts is a TSV, CSV or JSON file that `fsam-finetune` can read; `bbc` is the packaged BBC news.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from bench.generalisation import put_into
from bench.records import Record, record, recorded
from fsam_triton.finetune.models import load_tokenizer, model_path
from fsam_triton.finetune.options import Arguments

from .choices import FINE_TUNING, LORA, PRETRAINING, SEEDS, Block, Setting, runs
from .classification import Task, load_texts
from .forgetting import Corpora, Forgetting
from .methods import METHODS
from .tables import MARKER, report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results/experiments.jsonl"
CACHE = ROOT / "runs/experiments"
Run = Callable[[Setting], Record]


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", nargs="+", default=[], metavar="FILE", help="classify these texts")
    parser.add_argument("--lora", nargs="+", default=[], metavar="FILE", help="classify these with LoRA adapters")
    parser.add_argument("--noise", nargs="+", type=float, default=[0.0, 0.2, 0.4], help="shares of wrong labels")
    parser.add_argument("--forgetting", nargs=2, metavar=("OLD", "NEW"), help="a language model's old and new texts")
    parser.add_argument("--model", help="folder of a pretrained encoder (default: the packaged MiniLM)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="only these")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="the first so many")
    parser.add_argument("--runs", type=Path, default=RESULTS, help="file of results")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for the pretrained language model")
    parser.add_argument("--report", action="store_true", help="print the tables, train nothing")
    parser.add_argument("--page", type=Path, help="put the tables into this page instead, docs/evidence.md say")
    return parser


def forgetting(sources: list[str], model: str, cache: Path) -> list[dict[Block, Run]]:
    """The blocks of a pair of corpora, and what makes their runs: all of one experiment before the other."""
    (old, old_texts), (new, new_texts) = (load_texts(source) for source in sources)
    corpora = Corpora(load_tokenizer(model), *([" ".join(row) for row in t.rows] for t in (old_texts, new_texts)))
    task = Forgetting(f"{old}, then {new}", corpora, cache)
    return [{task.block(experiment): task.run} for experiment in (FINE_TUNING, PRETRAINING)]


def classification(source: str, noise: list[float], model: str) -> dict[Block, Run]:
    """The blocks of one data set, and what makes their runs."""
    task = Task(*load_texts(source), model)
    return {task.block(share): task.run for share in noise}


def lora(source: str, model: str) -> dict[Block, Run]:
    """The block of one data set whose classifiers are trained with adapters."""
    task = Task(*load_texts(source), model)
    return {task.block(experiment=LORA): task.run}


def experiment(
    path: Path, groups: list[dict[Block, Run]], seeds: Sequence[int], methods: Collection[str] = tuple(METHODS)
) -> None:
    """Make all runs of these methods that the file lacks, of one group after the other."""
    run_of = {one: run for group in groups for block, run in group.items() for one in (block, block.chosen_in)}

    def run(setting: Setting) -> Record:
        result = run_of[Block.of(asdict(setting))](setting)
        print(setting, result, flush=True)
        return result

    def look_up(setting: Setting) -> Record:
        (found,) = record([setting], path, run)
        return found

    for group in groups:
        for _ in runs(list(group), seeds, look_up, methods):
            pass


def main() -> None:
    parser = options()
    given = parser.parse_args()
    if given.page or given.report:
        tables = report(recorded(given.runs))
        put_into(given.page, tables, MARKER) if given.page else print(tables)
        return
    if not (given.texts or given.lora or given.forgetting):
        parser.error("--texts, --lora or --forgetting is needed to train")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    model = given.model or model_path(Arguments())
    groups = forgetting(given.forgetting, model, given.cache) if given.forgetting else []
    groups += [classification(source, given.noise, model) for source in given.texts]
    groups += [lora(source, model) for source in given.lora]
    experiment(given.runs, groups, SEEDS[: given.seeds], given.methods)


if __name__ == "__main__":
    main()
