"""Print the time of a whole training step with each variant, as a multiple of torch.optim.AdamW's in the same run.

    python -m bench.training_step [--rounds 3] [--batch_size 16] [--max_seq_length 96]

A step is forward, backward and optimizer on the packaged MiniLM and BBC news texts. The variants take turns, one step
each, so that drifts in the machine's speed affect them equally. Each step of a period of ten is timed several times and
its median taken. The mean over the period is printed, so that schedules are weighted correctly.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fsam_triton import FSAM, AdamWL2SP, FisherMask, MomentumSAM, Schedule
from fsam_triton.finetune.models import model_path
from fsam_triton.finetune.options import Arguments
from fsam_triton.finetune.texts import label_ids, label_names, read_bbc_news

PERIOD = 10


def torch_adamw(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for _, p in named], lr=1e-5, fused=True)


VARIANTS: dict[str, Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]] = {
    "torch.optim.AdamW, fused": torch_adamw,
    "AdamWL2SP": lambda named: AdamWL2SP(named, lr=1e-5),
    "momentum-SAM": lambda named: MomentumSAM(named, lr=1e-5),
    "SAM": lambda named: FSAM(named, lr=1e-5),
    "SAM in the last 30 %": lambda named: FSAM(named, lr=1e-5, schedule=Schedule(last=0.3, total_steps=PERIOD)),
    "LookSAM, every 5th step": lambda named: FSAM(named, lr=1e-5, schedule=Schedule(every=5, reuse=0.7)),
    "GSAM": lambda named: FSAM(named, lr=1e-5, alpha=0.4),
    "ESAM, elements, beta = gamma = 0.5": lambda named: FSAM(named, lr=1e-5, beta=0.5, gamma=0.5),
    "ESAM, tensors, beta = gamma = 0.5": lambda named: FSAM(named, lr=1e-5, beta=0.5, beta_per="tensor", gamma=0.5),
    "Fisher-SAM, elements": lambda named: FSAM(named, lr=1e-5, mask=FisherMask(0.1, interval=PERIOD)),
    "Fisher-SAM, tensors": lambda named: tensor_mask(named, "all"),
    "Fisher-SAM, tensors, gradients skipped": lambda named: tensor_mask(named, "masked"),
}


def tensor_mask(named: list[tuple[str, nn.Parameter]], mask_norm: str) -> FSAM:
    """A tensor-level mask; with the norm over the mask alone, the ascent can do without the other gradients."""
    mask = FisherMask(0.1, interval=PERIOD, unit="tensor", excluded="never")
    return FSAM(named, lr=1e-5, mask=mask, mask_norm=mask_norm)


@dataclass
class Variant:
    """A model of its own, its optimizer, and the seconds of each step by its place in the period."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    seconds: list[list[float]] = field(default_factory=lambda: [[] for _ in range(PERIOD)])

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")

    def step(self, batch: dict[str, Tensor]) -> None:
        if isinstance(self.optimizer, FSAM):
            self.optimizer.step(self.losses, batch)
            return
        self.losses(batch).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def mean(self) -> float:
        return statistics.mean(statistics.median(times) for times in self.seconds)


def batches(batch_size: int, max_seq_length: int) -> list[dict[str, Tensor]]:
    """The period's batches, all of the same length."""
    texts, _ = read_bbc_news()
    tokenizer = AutoTokenizer.from_pretrained(model_path(Arguments()))
    rows = [row[0] for row in texts.rows]
    encoded = tokenizer(rows, truncation=True, padding="max_length", max_length=max_seq_length, return_tensors="pt")
    encoded["labels"] = torch.tensor(label_ids(texts, label_names(texts)))
    order = torch.arange(PERIOD * batch_size) % len(rows)
    return [{key: value[part] for key, value in encoded.items()} for part in order.split(batch_size)]


def measure(names: list[str], rounds: int, data: list[dict[str, Tensor]]) -> dict[str, Variant]:
    """Every variant's times: `rounds` steps at each place of the period, after one period to warm up."""
    variants = {}
    for name in names:
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(model_path(Arguments()), num_labels=5).train()
        variants[name] = Variant(model, VARIANTS[name](list(model.named_parameters())))
    for i in range(rounds + 1):
        for variant in variants.values():
            for group in variant.optimizer.param_groups:
                # Every period is a training of its own to a schedule.
                group["updates"] = 0
        for place, batch in enumerate(data):
            for variant in variants.values():
                start = time.perf_counter()
                variant.step(batch)
                if i:
                    variant.seconds[place].append(time.perf_counter() - start)
    return variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often each of the period's steps is timed")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_seq_length", type=int, default=96)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS)[1:], choices=list(VARIANTS))
    args = parser.parse_args()
    baseline = next(iter(VARIANTS))
    names = [baseline, *(name for name in args.only if name != baseline)]
    variants = measure(names, args.rounds, batches(args.batch_size, args.max_seq_length))
    unit = variants[baseline].mean
    print(
        f"MiniLM, batch {args.batch_size} of {args.max_seq_length} tokens, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}\n{'':42}{'s/step':>8}{'ratio':>8}"
    )
    for name, variant in variants.items():
        print(f"{name:42}{variant.mean:8.3f}{variant.mean / unit:7.2f}x")


if __name__ == "__main__":
    main()
