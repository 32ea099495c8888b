"""Print how well MiniLM learns BBC news when all, half a percent of, or only the biases of its weights are trained.

    python -m bench.fish [--texts 200] [--steps 65] [--max_seq_length 32] [--seeds 1 2 3] [--runs runs/fish.jsonl]

Every method takes the same number of steps from the same pretrained weights. A new head is always trained and counted.
Each method's learning rate is the value of a small grid that does best on validation texts, chosen with a separate
seed. The method is then judged with other seeds on test texts, which are neither training nor validation texts. Each
run adds a line to the file --runs as soon as it is finished, and runs found in that file are not repeated.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.records import Record, record
from fsam_triton import FishMask, save_delta
from fsam_triton.finetune.models import encode, load_empty_model, load_tokenizer, model_path
from fsam_triton.finetune.options import Arguments
from fsam_triton.finetune.texts import hold_out, label_names, read_bbc_news
from fsam_triton.finetune.training import Trainer, choose_mask

DENSE, AS_FEW = "dense", "FISH, as few"
# The options of each method. `Task` adds the share that makes FISH's weights as few as BitFit's.
METHODS: dict[str, dict[str, Any]] = {
    DENSE: {"trainable": "all"},
    "FISH": {"trainable": "fish", "keep_ratio": 0.005},
    "random": {"trainable": "random", "keep_ratio": 0.005},
    "BitFit": {"trainable": "bitfit"},
    AS_FEW: {"trainable": "fish"},
}
LEARNING_RATES = {name: (1e-4, 2e-4, 5e-4) if name == DENSE else (5e-4, 2e-3, 5e-3, 1e-2) for name in METHODS}
CHOICE_SEED = 0
VALIDATION_PER_LABEL, TEST_PER_LABEL = 40, 100


@dataclass(frozen=True)
class Setting:
    """A run: what is trained how, and on which texts it is judged."""

    method: str
    learning_rate: float
    seed: int
    judged_on: str
    texts: int
    steps: int
    max_seq_length: int


class Task:
    """The texts, encoded, and the masks of the methods."""

    def __init__(self, texts: int, max_seq_length: int) -> None:
        self.path = model_path(Arguments())
        per_label = texts // 5 + VALIDATION_PER_LABEL
        pool, test = read_bbc_news(per_label, TEST_PER_LABEL)
        train, validation = hold_out(pool, VALIDATION_PER_LABEL / per_label)
        self.names, self.tokenizer = label_names(train), load_tokenizer(self.path)
        parts = {"train": train, "validation": validation, "test": test}
        self.features = {name: encode(self.tokenizer, part, max_seq_length, self.names) for name, part in parts.items()}
        biases = FishMask.bias_only(load_empty_model(self.path, self.names), ["classifier"])
        # In the middle between two counts, so that rounding cannot matter.
        self.few = (biases.count + 0.5) / biases.total
        self.mask = functools.cache(self.mask)

    def arguments(self, method: str, **options: Any) -> Arguments:
        few = {"keep_ratio": self.few} if method == AS_FEW else {}
        return Arguments(sam_type=["none"], use_cpu=True, **METHODS[method], **few, **options)

    def mask(self, method: str, seed: int) -> FishMask | None:
        return choose_mask(
            self.arguments(method, seed=seed), self.path, self.names, self.tokenizer, self.features["train"]
        )

    def run(self, setting: Setting) -> Record:
        """Train and judge."""
        arguments = self.arguments(setting.method, seed=setting.seed, learning_rate=setting.learning_rate)
        mask = self.mask(setting.method, setting.seed)
        trainer = Trainer(arguments, "none", self.path, self.names, self.tokenizer, setting.steps, mask)
        train = self.features["train"]
        # It evaluates after each pass over the texts; what counts is the evaluation after the last.
        trainer.train(train, train[:1])
        trainer.evaluate(self.features[setting.judged_on])
        total = sum(p.numel() for p in trainer.model.parameters())
        return {
            **trainer.run.summary(),
            "share": mask.density if mask else 1.0,
            "weights": mask.count if mask else total,
            "bytes": checkpoint_bytes(trainer.model, mask),
        }


def checkpoint_bytes(model: torch.nn.Module, mask: FishMask | None) -> int:
    """What the file of the weights takes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        if mask is None:
            model.save_pretrained(folder)
        else:
            save_delta(model, mask, file)
        return file.stat().st_size


def best(choices: list[Record]) -> float:
    """The learning rate of the highest validation accuracy; of equal ones that of the lowest loss."""
    return max(choices, key=lambda one: (one["eval_accuracy"], -one["eval_loss"]))["learning_rate"]


def format_table(choices: dict[str, list[Record]], finals: dict[str, list[Record]]) -> str:
    """The figures of the final runs of each method, and below them those that its learning rate was chosen by."""

    def mean(method: str, key: str) -> float:
        return statistics.mean(one[key] for one in finals[method])

    seeds = [one["seed"] for one in finals[DENSE]]
    lines = [
        f"{'test accuracy':14}{'trained':>10}{'lr':>8}{'mean':>9}"
        + "".join(f"{f'seed {seed}':>9}" for seed in seeds)
        + f"{'points':>9}{'bytes':>12}{'s/step':>8}"
    ]
    for method, runs in finals.items():
        accuracies = [one["eval_accuracy"] for one in runs]
        points = 100 * (mean(method, "eval_accuracy") - mean(DENSE, "eval_accuracy"))
        lines.append(
            f"{method:14}{mean(method, 'share'):>10.3%}{runs[0]['learning_rate']:>8g}"
            + "".join(f"{accuracy:>9.4f}" for accuracy in (mean(method, "eval_accuracy"), *accuracies))
            + f"{points:>+9.2f}{round(mean(method, 'bytes')):>12,}{mean(method, 'seconds_per_step'):>8.3f}"
        )
    lines.append("\nvalidation accuracy (loss) by learning rate, from which it was chosen")
    for method, runs in choices.items():
        cells = (f"{one['learning_rate']:g}: {one['eval_accuracy']:.4f} ({one['eval_loss']:.3f})" for one in runs)
        lines.append(f"{method:14}" + "   ".join(f"{cell:<22}" for cell in cells).rstrip())
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=200, help="training texts, the same number of each of 5 labels")
    parser.add_argument("--steps", type=int, default=65)
    parser.add_argument("--max_seq_length", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path("runs/fish.jsonl"))
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    task = Task(options.texts, options.max_seq_length)
    size = (options.texts, options.steps, options.max_seq_length)
    choices, finals = {}, {}
    for method in METHODS:
        rates = (Setting(method, rate, CHOICE_SEED, "validation", *size) for rate in LEARNING_RATES[method])
        choices[method] = list(record(rates, options.runs, task.run))
        rate = best(choices[method])
        final = (Setting(method, rate, seed, "test", *size) for seed in options.seeds)
        finals[method] = list(record(final, options.runs, task.run))
    counts = {name: len(part) for name, part in task.features.items()}
    print(
        f"MiniLM on BBC news: {counts['train']} training, {counts['validation']} validation, {counts['test']} test "
        f"texts of {options.max_seq_length} tokens, {options.steps} steps of 16, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}\n\n{format_table(choices, finals)}"
    )


if __name__ == "__main__":
    main()
