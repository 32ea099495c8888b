"""Measure which rho is best for SAM on several tasks, and how far from it the suggestion of `find_rho` is.

    pip download --no-deps --no-binary :all: vaderSentiment==2.5    # sentences rated for their sentiment
    OMP_NUM_THREADS=1 python -m bench.rho --sentiments vaderSentiment-2.5.tar.gz    # resumes where it was stopped
    python -m bench.rho --report    # prints the tables of the file of results, trains nothing

At one seed all runs start from the same weights and see the same texts in the same order, so they are compared in
pairs. Of each run the file of results keeps which test texts it got right, and of each run of AdamW how the loss rises
around the weights at some of its steps.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.generalisation import ADAMW, Setting, Task, TimedTrainer, stratified
from bench.records import Record, record
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
    """All runs, one seed of all tasks after the other."""
    for seed, data in itertools.product(SEEDS, TEST):
        yield setting_of(data, AUTO, 0.0, seed)
        for rho in RHOS[1:]:
            yield setting_of(data, SAM, rho, seed)
    for seed, data in itertools.product(SEEDS, TEST):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=RESULTS, help="file of results")
    parser.add_argument("--sentiments", type=Path, help="the sdist of vaderSentiment 2.5; needed to train")
    options = parser.parse_args()
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
