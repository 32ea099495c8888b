"""Measure which rho is best for SAM on several tasks, and how far the suggestion of `find_rho` is from it.

    pip download --no-deps --no-binary :all: vaderSentiment==2.5    # sentences rated for their sentiment
    OMP_NUM_THREADS=1 python -m bench.rho --sentiments vaderSentiment-2.5.tar.gz    # resumes where it was stopped
    python -m bench.rho --report    # prints the tables of the file of results, trains nothing
    python -m bench.rho --page docs/rho.md    # puts them into the page

At one seed, all runs start from the same weights and see the same texts in the same order, so they are compared in
pairs. For each run, the file of results records which test texts it classified correctly. For each run of AdamW, it
also records how the loss rises around the weights at some of the steps.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import statistics
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from bench.generalisation import ADAMW, RESAMPLES, Setting, Task, TimedTrainer, best, put_into, stratified
from bench.records import Record, find, record, recorded
from fsam_triton.analysis import RhoSearch
from fsam_triton.analysis.mean_loss import measuring, moved, norm
from fsam_triton.finetune.options import Arguments
from fsam_triton.finetune.texts import Texts, read_bbc_news
from fsam_triton.finetune.training import search_rho

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results/rho.jsonl"
SAM, AUTO = "SAM", "SAM, rho auto"
FILM, BBC, EDITORIALS = "film reviews", "BBC news", "NYT editorials"
# Of each task its test texts; the first two are those that the rule was calibrated on.
TEST = {FILM: 2000, BBC: 1000, EDITORIALS: 2000}
SENTIMENTS = {FILM: "movieReviewSnippets", EDITORIALS: "nytEditorialSnippets"}
RHOS = (0.005, 0.01, 0.02, 0.05)
SEEDS = (1, 2, 3)
TEXTS, EPOCHS, LEARNING_RATE = 500, 3, 1e-4
# Steps before which the rise of the loss is measured: the first, and half-way.
CURVE_STEPS = (0, 48)
CURVE_RHOS = tuple(round(10 ** (k / 6 - 3), 6) for k in range(16))
CURVE_BATCHES = 4
MARKER = "<!-- python -m bench.rho --report -->\n```\n"


def read_sentiments(archive: Path, name: str) -> Texts:
    """Sentences of one source in vaderSentiment's sdist, labelled with the sign of their mean rating."""
    with tarfile.open(archive) as outer:
        member = next(one for one in outer.getnames() if one.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(outer.extractfile(member).read())) as inner:
            data = inner.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt").read()
    rows, labels = [], []
    for line in data.decode("utf-8-sig").splitlines():
        _, rating, text = line.split("\t", 2)
        if float(rating):
            rows.append((text.strip(),))
            labels.append(str(int(float(rating) > 0)))
    return Texts(str(archive), ("text",), rows, labels)


def load_task(data: str, sentiments: Path) -> Task:
    if data == BBC:
        texts, _ = read_bbc_news(train_per_label=1000, validation_per_label=0)
    else:
        texts = read_sentiments(sentiments, SENTIMENTS[data])
    return Task(texts, TEST[data], validation=100, max_seq_length=Setting.max_seq_length)


def setting_of(data: str, method: str, rho: float, seed: int) -> Setting:
    return Setting(data, TEXTS, EPOCHS, method, LEARNING_RATE, rho, seed, "test")


def settings() -> Iterator[Setting]:
    """All runs; last those without which the tables still have a grid."""
    for data, seed in itertools.product(reversed(TEST), SEEDS):
        yield setting_of(data, AUTO, 0.0, seed)
        for rho in RHOS[1:]:
            yield setting_of(data, SAM, rho, seed)
    for data, seed in itertools.product(reversed(TEST), SEEDS):
        yield setting_of(data, ADAMW, 0.0, seed)
        yield setting_of(data, SAM, RHOS[0], seed)


def curve(trainer: TimedTrainer, features: list[dict[str, Any]]) -> Record:
    """The loss around the weights, in the mean over batches: along the batch's gradient, of some batches."""

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.nn.functional.cross_entropy(model(**batch).logits.float(), labels[id(batch)])

    labels, batches = {}, []
    for i in range(CURVE_BATCHES):
        batch = trainer.collate(features[16 * i : 16 * (i + 1)])
        own = batch.pop("labels")
        batches.append(dict(batch))
        labels[id(batches[-1])] = own
    with measuring(trainer.model, loss, batches) as mean:
        w = mean.weights
        pairs = [mean.gradient_of(i, w) for i in range(CURVE_BATCHES)]
        return {
            "losses_at_w": [value for value, _ in pairs],
            "gradient_norms": [norm(gradient) for _, gradient in pairs],
            "weight_norm": norm(w),
            "along_own": [
                [mean.value_of(i, moved(w, gradient, rho / norm(gradient))) for rho in CURVE_RHOS]
                for i, (_, gradient) in enumerate(pairs)
            ],
        }


def judge(trainer: TimedTrainer, features: list[dict[str, Any]]) -> Record:
    """Accuracy and loss, and which texts are right: a hexadecimal number with a bit for each, the last one lowest."""
    unlabelled = [{key: value for key, value in feature.items() if key != "labels"} for feature in features]
    labels = torch.tensor([feature["labels"] for feature in features])
    logits = trainer.logits(unlabelled)
    right = logits.argmax(-1) == labels
    return {
        "accuracy": right.double().mean().item(),
        "loss": torch.nn.functional.cross_entropy(logits, labels).item(),
        "test_texts": len(features),
        "right": f"{int(''.join(str(int(one)) for one in right), 2):x}",
    }


def suggestion(task: Task, setting: Setting, train: list[dict[str, Any]]) -> RhoSearch:
    """What ``fsam-finetune --rho auto`` finds."""
    arguments = Arguments(
        sam_type=["sam"],
        rho="auto",
        seed=setting.seed,
        per_device_train_batch_size=setting.batch_size,
        bf16=setting.bf16,
        use_cpu=True,
    )
    return search_rho(arguments, "sam", task.path, task.names, task.tokenizer, train)


def run(task: Task, setting: Setting) -> Record:
    """Train and judge; of AdamW measure the curves on the way."""
    train = task.encode(stratified(task.pool, setting.texts, setting.seed)[0])
    found = {}
    if setting.method == AUTO:
        found = {"search": asdict(suggestion(task, setting, train))}
        setting = replace(setting, method=SAM, strength=found["search"]["rho"])
    task.warm_up(setting.method)
    trainer = task.trainer(setting)
    curves = {}
    if setting.method == ADAMW:
        step = trainer.step

        def measured_step(features: list[dict[str, Any]]) -> float:
            if (number := len(trainer.run.losses)) in CURVE_STEPS:
                curves[number] = curve(trainer, train)
            return step(features)

        trainer.step = measured_step
    trainer.train(train, train[:1])
    result = judge(trainer, task.judges["test"]) | {"seconds": round(trainer.seconds, 3), "torch": torch.__version__}
    return result | found | ({"curves": curves} if curves else {})


def right_bits(one: Record) -> np.ndarray:
    """What `judge` has written: 1 for each test text that was right."""
    return np.array([int(bit) for bit in f"{int(one['right'], 16):0{one['test_texts']}b}"])


def points_apart(runs: list[Record], others: list[Record]) -> tuple[float, float, float]:
    """The mean difference of the accuracies of paired runs in points, and its 95 % bootstrap interval.

    Seeds and test texts are both drawn anew: each is a sample of those that there could be.
    """
    apart = np.array([right_bits(a) - right_bits(b) for a, b in zip(runs, others, strict=True)])
    seeds, texts = apart.shape
    generator = np.random.default_rng(0)
    of_texts = generator.multinomial(texts, np.full(texts, 1 / texts), RESAMPLES) @ apart.T / texts
    of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    return 100 * apart.mean(), *np.percentile(100 * (of_texts * of_seeds).sum(1), (2.5, 97.5))


def percent(runs: list[Record]) -> float:
    return 100 * statistics.mean(one["accuracy"] for one in runs)


def columns(data: str, records: list[Record]) -> dict[str, list[Record]]:
    """The runs of a task by what they have in common; those alone of which every seed is there."""
    kinds = {ADAMW: (ADAMW, 0.0)} | {f"{rho:g}": (SAM, rho) for rho in RHOS} | {"auto": (AUTO, 0.0)}
    found = {
        name: [find(setting_of(data, method, rho, seed), records) for seed in SEEDS]
        for name, (method, rho) in kinds.items()
    }
    return {name: runs for name, runs in found.items() if None not in runs}


def task_table(data: str, records: list[Record]) -> str:
    """Accuracies of one task by rho, and how far the suggestion is from the best; empty if there are no runs."""
    found = columns(data, records)
    grid = [name for name in found if name not in (ADAMW, "auto")]
    if not grid:
        return ""
    texts = found[grid[0]][0]["test_texts"]
    lines = [f"{data}, {TEXTS} training texts, {EPOCHS} epochs, {texts} test texts"]
    lines.append(f"{'rho':12}" + "".join(f"{name:>8}" for name in found))
    for i, seed in enumerate(SEEDS):
        lines.append(f"seed {seed:<7}" + "".join(f"{percent([runs[i]]):>8.2f}" for runs in found.values()))
    lines.append(f"{'mean':12}" + "".join(f"{percent(runs):>8.2f}" for runs in found.values()))
    losses = (statistics.mean(one["loss"] for one in runs) for runs in found.values())
    lines.append(f"{'mean loss':12}" + "".join(f"{loss:>8.3f}" for loss in losses))
    chosen = f"{best([found[name] for name in grid])[1]:g}"
    for name in [name for name in ("0.05", "auto") if name in found and name != chosen]:
        mean, low, high = points_apart(found[name], found[chosen])
        lines.append(f"{name} less the best of the grid, {chosen}: {mean:+.2f} [{low:+.2f}, {high:+.2f}] points")
    if "auto" in found:
        lines.append("auto: rho " + ", ".join(f"{one['search']['rho']:.4f}" for one in found["auto"]))
    return "\n".join(lines)


def rise_table(records: list[Record]) -> str:
    """By how much of it the loss rises at some rho, at the start and half-way through the runs of AdamW."""
    shown = CURVE_RHOS[6:13:2]
    lines = ["rise of a batch's loss, % of it", f"{'rho':26}" + "".join(f"{rho:>8.3f}" for rho in shown)]
    for data, step in itertools.product(TEST, CURVE_STEPS):
        curves = [one["curves"][str(step)] for one in records if one["data"] == data and "curves" in one]
        if curves:
            rises = np.mean([np.mean(one["along_own"], 0) / np.mean(one["losses_at_w"]) - 1 for one in curves], 0)
            by_rho = dict(zip(CURVE_RHOS, rises, strict=True))
            lines.append(f"{f'{data}, step {step}':26}" + "".join(f"{100 * by_rho[rho]:>8.1f}" for rho in shown))
    return "\n".join(lines)


def report(records: list[Record]) -> str:
    """All tables."""
    return "\n\n".join(filter(None, [*(task_table(data, records) for data in TEST), rise_table(records)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=RESULTS, help="file of results")
    parser.add_argument("--sentiments", type=Path, help="the sdist of vaderSentiment 2.5; needed to train")
    parser.add_argument("--report", action="store_true", help="print the tables, train nothing")
    parser.add_argument("--page", type=Path, help="put the tables into this page instead, docs/rho.md say")
    options = parser.parse_args()
    if options.page:
        put_into(options.page, report(recorded(options.runs)), MARKER)
        return
    if options.report:
        print(report(recorded(options.runs)))
        return
    if options.sentiments is None:
        parser.error("--sentiments is needed to train")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    task = functools.cache(lambda data: load_task(data, options.sentiments))

    def make(setting: Setting) -> Record:
        result = run(task(setting.data), setting)
        print(setting, result["accuracy"], result["loss"], flush=True)
        return result

    for _ in record(settings(), options.runs, make):
        pass


if __name__ == "__main__":
    main()
