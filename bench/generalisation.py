"""Measure whether sharpness-aware fine-tuning of MiniLM makes better classifiers than AdamW does.

    OMP_NUM_THREADS=1 python -m bench.generalisation    # hours; resumes where it was stopped
    python -m bench.generalisation --report             # prints the tables of the file of results, trains nothing
    python -m bench.generalisation --page docs/evidence.md    # puts them into the page

At one seed every method starts from the same weights and sees the same training texts in the same order, so methods
are compared in pairs. Learning rate, rho and strength of L2-SP are the values of a small grid that do best on
validation texts of the film reviews, chosen with separate seeds. Methods are judged on test texts, which are neither
training nor validation texts. Each run adds a line to the file of results as soon as it is finished, and runs found in
that file are not repeated.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from bench.records import Record, find, record, recorded
from fsam_triton.finetune.models import encode, load_tokenizer, model_path
from fsam_triton.finetune.options import Arguments
from fsam_triton.finetune.texts import Texts, label_names, read_bbc_news, read_texts
from fsam_triton.finetune.training import Trainer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results/generalisation.jsonl"
ADAMW, TWICE = "AdamW", "AdamW, 2x epochs"
LEARNING_RATES = (5e-5, 1e-4, 2e-4, 5e-4)
RHOS = (0.01, 0.02, 0.05, 0.15)
# Of each data set: training texts, and how often they are seen.
EPOCHS = {"film reviews": {100: 6, 500: 3, 2000: 2}, "BBC news": {100: 6, 500: 3, 1300: 2}}
TEST = {"film reviews": 1000, "BBC news": 500}
VALIDATION = 300
CHOICE_DATA, CHOICE_TEXTS, CHOICE_SEEDS = "film reviews", 500, (101, 102)
SEEDS = (1, 2, 3, 4, 5)
# A run that is not this much better than the most frequent label has collapsed.
MARGIN = 0.05
RESAMPLES = 10_000
MARKER = "<!-- python -m bench.generalisation --report -->\n```\n"


@dataclass(frozen=True)
class Method:
    """A way to train: options of `fsam-finetune`, and the one that is chosen from a grid, besides the learning rate.

    Args:
        sam_type: of fsam-finetune.
        tuned: name of the option, or None.
        grid: its values.
        epochs: factor on the epochs.
        options: others.
    """

    sam_type: str
    tuned: str | None = None
    grid: Sequence[float] = (0.0,)
    epochs: int = 1
    options: dict[str, Any] = field(default_factory=dict)


METHODS = {
    ADAMW: Method("none"),
    TWICE: Method("none", epochs=2),
    "AdamW-L2SP": Method("none", "l2_sp", (1.0, 10.0, 100.0, 1000.0)),
    "SAM": Method("sam", "rho", RHOS),
    "ASAM": Method("asam", "rho", tuple(round(10 * rho, 3) for rho in RHOS)),
    "GSAM": Method("gsam", "rho", RHOS),
    "FSAM, 0.1": Method("fisher-sam", "rho", RHOS, options={"keep_ratio": 0.1}),
    "FSAM, 0.5": Method("fisher-sam", "rho", RHOS, options={"keep_ratio": 0.5}),
    "momentum-SAM": Method("momentum-sam", "rho", (0.05, 0.15, 0.5)),
    "tail-SAM, 0.2": Method("sam", "rho", RHOS, options={"sam_last": 0.2}),
}


@dataclass(frozen=True)
class Setting:
    """A run: what is trained how, and on which texts it is judged; `strength` is the value of the tuned option."""

    data: str
    texts: int
    epochs: int
    method: str
    learning_rate: float
    strength: float
    seed: int
    judged_on: str
    batch_size: int = 16
    max_seq_length: int = 32
    bf16: bool = True


# Of each method the learning rate and the strength.
Choices = dict[str, tuple[float, float]]
Grids = dict[str, list[list[Record]]]
LookUp = Callable[[Sequence[Setting]], list[Record]]


def choice_settings(method: str, learning_rate: float, strength: float) -> list[Setting]:
    """The runs that tell how good a learning rate and a strength are."""
    epochs = EPOCHS[CHOICE_DATA][CHOICE_TEXTS] * METHODS[method].epochs
    return [
        Setting(CHOICE_DATA, CHOICE_TEXTS, epochs, method, learning_rate, strength, seed, "validation")
        for seed in CHOICE_SEEDS
    ]


def candidates(method: str, learning_rate: float | None) -> list[list[Setting]]:
    """The grid of a method: of learning rates for AdamW, else of strengths at AdamW's learning rate."""
    if method == ADAMW:
        return [choice_settings(method, rate, 0.0) for rate in LEARNING_RATES]
    return [choice_settings(method, learning_rate, strength) for strength in METHODS[method].grid]


def best(grid: Sequence[Sequence[Record]]) -> tuple[float, float]:
    """Learning rate and strength of the highest mean accuracy; of equal ones those of the lowest mean loss."""

    def quality(runs: Sequence[Record]) -> tuple[float, float]:
        # Rounded, because equal counts of right answers may have means that differ in the last bit.
        accuracy = round(statistics.mean(one["accuracy"] for one in runs), 9)
        return accuracy, -statistics.mean(one["loss"] for one in runs)

    first = max(grid, key=quality)[0]
    return first["learning_rate"], first["strength"]


def final_settings(data: str, texts: int, choices: Choices, seed: int) -> list[Setting]:
    """The runs of all methods, with their choices, at one seed."""
    return [
        Setting(data, texts, EPOCHS[data][texts] * METHODS[method].epochs, method, *choices[method], seed, "test")
        for method in METHODS
    ]


def stratified(texts: Texts, count: int, seed: int) -> tuple[Texts, Texts]:
    """Draw `count` texts, of each label in proportion; return them in random order, and the others."""
    generator = random.Random(seed)
    order = generator.sample(range(len(texts)), len(texts))
    # With labels sorted, texts at equal distances are of each label in proportion, but for one.
    order.sort(key=lambda i: texts.labels[i])
    drawn = {order[k * len(order) // count] for k in range(count)}
    chosen = generator.sample(sorted(drawn), count)
    return texts.select(chosen), texts.select([i for i in range(len(texts)) if i not in drawn])


class TimedTrainer(Trainer):
    """A `Trainer` that counts its passes over the model and the processor time of its steps."""

    passes = 0
    seconds = 0.0

    def forward(self, batch: Any) -> Any:
        self.passes += self.model.training
        return super().forward(batch)

    def step(self, features: list[dict[str, Any]]) -> float:
        # Of the processor: with one thread it is what a clock shows on an idle machine, and stops when we are stopped.
        start = time.process_time()
        loss = super().step(features)
        self.seconds += time.process_time() - start
        return loss

    def judge(self, features: list[dict[str, Any]]) -> tuple[float, float]:
        """Accuracy and loss."""
        self.evaluate(features)
        return self.run.evaluations[-1][1:]


class Task:
    """A data set, split and encoded."""

    def __init__(self, texts: Texts, test: int, validation: int, max_seq_length: int) -> None:
        # A text that occurs twice is used once, so that none can be in two parts.
        texts = texts.select(list({row: i for i, row in enumerate(texts.rows)}.values()))
        self.path, self.names, self.max_seq_length = model_path(Arguments()), label_names(texts), max_seq_length
        self.tokenizer = load_tokenizer(self.path)
        self.warm_up = functools.cache(self.warm_up)
        test, rest = stratified(texts, test, seed=0)
        validation, self.pool = stratified(rest, validation, seed=0)
        self.judges = {"test": self.encode(test), "validation": self.encode(validation)}
        self.most_frequent = {
            name: max(part.labels.count(label) for label in self.names) / len(part)
            for name, part in (("test", test), ("validation", validation))
        }

    def encode(self, texts: Texts) -> list[dict[str, Any]]:
        return encode(self.tokenizer, texts, self.max_seq_length, self.names)

    def trainer(self, setting: Setting, steps: int | None = None) -> TimedTrainer:
        """The run of a setting, with a number of steps of its own or the setting's."""
        method = METHODS[setting.method]
        options = method.options | ({method.tuned: setting.strength} if method.tuned else {})
        arguments = Arguments(
            sam_type=[method.sam_type],
            learning_rate=setting.learning_rate,
            num_train_epochs=setting.epochs,
            per_device_train_batch_size=setting.batch_size,
            seed=setting.seed,
            bf16=setting.bf16,
            use_cpu=True,
            **options,
        )
        steps = steps or arguments.total_steps(setting.texts)
        return TimedTrainer(arguments, method.sam_type, self.path, self.names, self.tokenizer, steps)

    def warm_up(self, method: str) -> None:
        """Make a few steps that count for nothing: the first ones of a process compile."""
        strength = METHODS[method].grid[0]
        setting = Setting("", 80, 1, method, 1e-4, strength, 0, "test")
        self.trainer(setting, steps=5).train(self.judges["validation"][:80], self.judges["validation"][:1])

    def run(self, setting: Setting) -> Record:
        """Train and judge."""
        self.warm_up(setting.method)
        train = self.encode(stratified(self.pool, setting.texts, setting.seed)[0])
        trainer = self.trainer(setting)
        # It evaluates after each pass over the texts; what counts are the evaluations below.
        trainer.train(train, train[:1])
        accuracy, loss = trainer.judge(self.judges[setting.judged_on])
        return {
            "accuracy": accuracy,
            "loss": loss,
            "train_loss": trainer.judge(train)[1],
            "collapsed": accuracy <= self.most_frequent[setting.judged_on] + MARGIN,
            "steps": trainer.total_steps,
            "passes": trainer.passes,
            "seconds": round(trainer.seconds, 3),
            "torch": torch.__version__,
        }


def load_task(data: str, film_reviews: Path) -> Task:
    """The task of a data set."""
    if data == "film reviews":
        texts = read_texts(film_reviews)
    else:
        texts, _ = read_bbc_news(train_per_label=1000, validation_per_label=0)
    return Task(texts, TEST[data], VALIDATION, Setting.max_seq_length)


def choose(look_up: LookUp) -> tuple[Choices, Grids]:
    """The choices, and the records behind them by method: for each value of the grid, one a seed."""
    choices: Choices = {}
    grids: Grids = {}
    for method in METHODS:
        if method == TWICE:
            choices[method] = choices[ADAMW]
            continue
        rate = None if method == ADAMW else choices[ADAMW][0]
        grids[method] = [look_up(settings) for settings in candidates(method, rate)]
        choices[method] = best(grids[method])
    return choices, grids


def blocks(choices: Choices) -> Iterator[Setting]:
    """The final runs, the smallest training sets of all data first, and of the largest one seed after the other."""
    for sizes in zip(*EPOCHS.values(), strict=True):
        for seed in SEEDS:
            for data, texts in zip(EPOCHS, sizes, strict=True):
                yield from final_settings(data, texts, choices, seed)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and its 95 % percentile bootstrap interval."""
    values = np.asarray(values)
    generator = np.random.default_rng(0)
    means = values[generator.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    return values.mean(), *np.percentile(means, (2.5, 97.5))


def difference(runs: dict[int, Record], others: dict[int, Record]) -> str:
    """The mean paired difference of accuracies, in points, over the seeds that both have, as a cell of the table."""
    points = [100 * (runs[seed]["accuracy"] - others[seed]["accuracy"]) for seed in runs if seed in others]
    if not points:
        return "-"
    mean, low, high = interval(points)
    # One pair has no spread, and its interval would look like certainty.
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" if len(points) > 1 else f"{mean:+.2f}"


def block_table(data: str, texts: int, choices: Choices, records: Sequence[Record]) -> str:
    """The table of one data set and size; empty if there is no run."""
    runs: dict[str, dict[int, Record]] = {method: {} for method in METHODS}
    for seed in SEEDS:
        for setting in final_settings(data, texts, choices, seed):
            if found := find(setting, records):
                runs[setting.method][seed] = found
    if not any(runs.values()):
        return ""
    complete = all(len(of) == len(SEEDS) for of in runs.values())
    lines = [
        f"{data}, {texts} training texts, {EPOCHS[data][texts]} epochs" + ("" if complete else "  (INCOMPLETE)"),
        f"{'method':17}{'n':>2}  {'accuracy, %':21}{'less AdamW':22}{'less AdamW, 2x epochs':23}"
        f"{'loss':>6}{'train':>7}{'coll.':>6}{'time':>6}",
    ]
    for method, of in runs.items():
        if not of:
            continue
        mean, low, high = interval([100 * one["accuracy"] for one in of.values()])
        cells = [
            f"{mean:.2f} [{low:.2f}, {high:.2f}]",
            "" if method == ADAMW else difference(of, runs[ADAMW]),
            "" if method == TWICE else difference(of, runs[TWICE]),
        ]
        lines.append(f"{method:17}{len(of):>2}  {cells[0]:21}{cells[1]:22}{cells[2]:23}" + figures(of, runs[ADAMW]))
    return "\n".join(lines)


def figures(runs: dict[int, Record], adamw: dict[int, Record]) -> str:
    """The right-hand columns of a line of the table."""

    def mean(key: str) -> float:
        return statistics.mean(one[key] for one in runs.values())

    both = runs.keys() & adamw.keys()
    ratio = sum(runs[seed]["seconds"] for seed in both) / sum(adamw[seed]["seconds"] for seed in both) if both else None
    return f"{mean('loss'):>6.3f}{mean('train_loss'):>7.3f}{mean('collapsed'):>6.0%}" + (
        f"{ratio:.2f}x" if both else "-"
    ).rjust(6)


def grid_table(choices: Choices, grids: Grids) -> str:
    """What the learning rate and the strengths were chosen by."""
    lines = [
        f"{CHOICE_DATA}, {CHOICE_TEXTS} training texts: validation accuracy (loss), "
        f"means of {len(CHOICE_SEEDS)} seeds; * chosen"
    ]
    for method, grid in grids.items():
        key, tuned = ("learning_rate", "lr") if method == ADAMW else ("strength", METHODS[method].tuned)
        cells = []
        for runs in grid:
            accuracy, loss = (statistics.mean(one[name] for one in runs) for name in ("accuracy", "loss"))
            mark = "*" if (runs[0]["learning_rate"], runs[0]["strength"]) == choices[method] else ""
            cells.append(f"{runs[0][key]:g}: {100 * accuracy:.2f} ({loss:.3f}){mark}")
        lines.append(f"{method:15}{tuned:7}" + "".join(f"{cell:24}" for cell in cells).rstrip())
    return "\n".join(lines)


def report(records: Sequence[Record]) -> str:
    """All tables."""

    def look_up(settings: Sequence[Setting]) -> list[Record]:
        found = [find(setting, records) for setting in settings]
        if None in found:
            raise LookupError
        return found

    try:
        choices, grids = choose(look_up)
    except LookupError:
        return "the choices are not complete"
    tables = (block_table(data, texts, choices, records) for data, sizes in EPOCHS.items() for texts in sizes)
    return "\n\n".join([*filter(None, tables), grid_table(choices, grids)])


def put_into(page: Path, tables: str, marker: str = MARKER) -> None:
    """Replace the fenced block below the page's marker by the tables."""
    before, after = page.read_text(encoding="utf-8").split(marker)
    rest = after.split("```\n", 1)[1]
    page.write_text(f"{before}{marker}{tables}\n```\n{rest}", encoding="utf-8")


def experiment(path: Path, film_reviews: Path) -> None:
    """Make all runs that the file lacks."""
    task = functools.cache(lambda data: load_task(data, film_reviews))

    def run(setting: Setting) -> Record:
        result = task(setting.data).run(setting)
        print(setting, result, flush=True)
        return result

    choices, _ = choose(lambda settings: list(record(settings, path, run)))
    for _ in record(blocks(choices), path, run):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="print the tables, train nothing")
    parser.add_argument("--page", type=Path, help="put the tables into this page instead, docs/evidence.md say")
    parser.add_argument("--runs", type=Path, default=RESULTS, help="file of results")
    parser.add_argument("--film_reviews", type=Path, help="a TSV file of texts and labels; needed to train")
    options = parser.parse_args()
    if options.page:
        put_into(options.page, report(recorded(options.runs)))
        return
    if options.report:
        print(report(recorded(options.runs)))
        return
    if options.film_reviews is None:
        parser.error("--film_reviews is needed to train")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    experiment(options.runs, options.film_reviews)


if __name__ == "__main__":
    main()
