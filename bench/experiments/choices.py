"""Finds each method's own learning rate and strength on validation texts, and orders the runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from bench.records import Record, find

from .methods import METHODS, ON_ADAPTERS, ON_ALL_WEIGHTS, ON_LANGUAGE_MODELS

# Ten, because of five pairs no test that flips signs can give less than 0.06.
SEEDS = tuple(range(1, 11))
CHOICE_SEEDS = (101, 102)
# Values that a search evaluates at most in each direction from where it begins.
REACH = 3
# Weights are rounded to so many bits, besides.
BITS = (8, 4, 3)
CLASSIFICATION, LORA = "classification", "classification with LoRA"
PRETRAINING, FINE_TUNING = "pretraining", "fine-tuning"
# Where the search for the learning rate begins.
START = {CLASSIFICATION: 1e-4, LORA: 1e-3, PRETRAINING: 2e-3, FINE_TUNING: 5e-4}


@dataclass(frozen=True)
class Setting:
    """A run.

    Args:
        experiment: `CLASSIFICATION`, `LORA`, or which part of training has the method in the experiment on forgetting.
        model: name of the pretrained model.
        data: name of the data.
        noise: share of the training labels that are wrong.
        texts: training texts of a classifier, or batches of a language model.
        epochs: how often they are seen.
        method: one of `METHODS`.
        learning_rate: its peak.
        strength: value of the method's tuned argument; 0 if it is found before the run.
        seed: of the texts, their order, the labels and a new head: what runs of one seed share.
        judged_on: `"validation"` or `"test"`.
    """

    experiment: str
    model: str
    data: str
    noise: float
    texts: int
    epochs: int
    method: str
    learning_rate: float
    strength: float
    seed: int
    judged_on: str


LookUp = Callable[[Setting], Record]


@dataclass(frozen=True)
class Block:
    """Runs that share everything except method and seed, and so can be compared."""

    experiment: str
    model: str
    data: str
    noise: float
    texts: int
    epochs: int

    @classmethod
    def of(cls, one: Record) -> Block:
        """The block of a record."""
        epochs = one["epochs"] // METHODS[one["method"]].epochs
        return cls(one["experiment"], one["model"], one["data"], one["noise"], one["texts"], epochs)

    def setting(self, method: str, learning_rate: float, strength: float, seed: int, judged_on: str) -> Setting:
        """A run of this block."""
        epochs = self.epochs * METHODS[method].epochs
        common = (self.experiment, self.model, self.data, self.noise, self.texts, epochs)
        return Setting(*common, method, learning_rate, strength, seed, judged_on)

    @property
    def methods(self) -> tuple[str, ...]:
        """Those that are compared in it."""
        return {CLASSIFICATION: ON_ALL_WEIGHTS, LORA: ON_ADAPTERS}.get(self.experiment, ON_LANGUAGE_MODELS)

    @property
    def chosen_in(self) -> Block:
        """Where learning rates and strengths are chosen: whatever the share of wrong labels, with 20 %."""
        return replace(self, noise=0.2) if self.experiment == CLASSIFICATION else self


def quality(runs: Sequence[Record]) -> tuple[float, float]:
    """How good a learning rate and a strength are: the greater the better.

    Of classifiers mean accuracy and then loss; of language models the mean of the losses on the old and the new texts.
    """
    if "accuracy" in runs[0]:
        # Rounded, because equal counts of right answers may have means that differ in the last bit.
        accuracy = round(statistics.mean(one["accuracy"] for one in runs), 9)
        return accuracy, -statistics.mean(one["loss"] for one in runs)
    return -statistics.mean((one["old_loss"] + one["new_loss"]) / 2 for one in runs), 0.0


def line_search(start: float, factor: float, evaluate: Callable[[float], tuple[float, float]]) -> float:
    """The best of start * factor**k, for whole k: from the start on, each way until it gets worse.

    The start itself is returned where nothing is better, and no more than `REACH` values are tried each way.
    """
    best, best_quality = start, evaluate(start)
    for direction in (factor, 1 / factor):
        value = start
        for _ in range(REACH):
            # Rounded, so that the way does not matter.
            value = float(f"{value * direction:.4g}")
            found = evaluate(value)
            if found <= best_quality:
                break
            best, best_quality = value, found
    return best


def choose(block: Block, method: str, look_up: LookUp) -> tuple[float, float]:
    """The learning rate and the strength of a method: first the one at the other's start, then the other.

    AdamW with twice the epochs and with another schedule search as well, as every method does.
    """
    block, own = block.chosen_in, METHODS[method]

    def evaluate(learning_rate: float, strength: float) -> tuple[float, float]:
        settings = [block.setting(method, learning_rate, strength, seed, "validation") for seed in CHOICE_SEEDS]
        return quality([look_up(setting) for setting in settings])

    rate = line_search(START[block.experiment], 2.0, lambda value: evaluate(value, own.start))
    if own.tuned is None or own.found:
        return rate, own.start
    return rate, line_search(own.start, own.factor, lambda value: evaluate(rate, value))


def judged(block: Block, method: str, seed: int, look_up: LookUp) -> Setting:
    """The run that counts, of a seed."""
    return block.setting(method, *choose(block, method, look_up), seed, "test")


def runs(
    blocks: Sequence[Block], seeds: Sequence[int], look_up: LookUp, methods: Collection[str] = tuple(METHODS)
) -> Iterator[Record]:
    """Look up all runs, those of the first seed in all blocks first; a method's choices come just before its first."""
    for seed in seeds:
        for block in blocks:
            for method in block.methods:
                if method in methods:
                    yield look_up(judged(block, method, seed, look_up))


class Missing(LookupError):
    """There is no such run yet."""


def in_records(records: Sequence[Record]) -> LookUp:
    """What looks up runs that have been made, and raises `Missing` for others."""

    def look_up(setting: Setting) -> Record:
        found = find(setting, records)
        if found is None:
            raise Missing
        return found

    return look_up


def found_runs(block: Block, records: Sequence[Record]) -> dict[str, dict[int, Record]]:
    """The judged runs of a block by method and seed; of a method whose choices are not complete there are none."""
    look_up = in_records(records)
    found: dict[str, dict[int, Record]] = {method: {} for method in block.methods}
    for method in block.methods:
        try:
            choice = choose(block, method, look_up)
        except Missing:
            continue
        for seed in SEEDS:
            if one := find(block.setting(method, *choice, seed, "test"), records):
                found[method][seed] = one
    return found
