"""Draws the tables of docs/evidence.md from the records of the runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.records import Record

from .choices import CLASSIFICATION, LORA, PRETRAINING, SEEDS, Block, Missing, choose, found_runs, in_records
from .comparisons import Comparison, compare, holm
from .methods import ADAMW, METHODS

MARKER = "<!-- python -m bench.experiments --report -->\n```\n"
# Adjusted p below which a difference is marked.
LEVEL = 0.05


@dataclass(frozen=True)
class Measure:
    """A figure of a run.

    Args:
        title: of its table.
        of: the figure.
        digits: after the point.
    """

    title: str
    of: Callable[[Record], float]
    digits: int


def _key(title: str, key: str, scale: float = 1.0, digits: int = 3, less: str | None = None) -> Measure:
    """The measure of an entry, less another entry."""
    return Measure(title, lambda one: scale * (one[key] - (one[less] if less else 0.0)), digits)


_CLEAN = [_key("test accuracy, %", "accuracy", 100, 2), _key("test loss", "loss")]
_ROUNDED = [_key(f"test accuracy with {bits}-bit weights, %", f"accuracy_{bits}", 100, 2) for bits in (8, 4, 3)] + [
    _key("test loss added by 4-bit weights", "loss_4", less="loss")
]
_AFTER = [
    _key("loss on the old texts after fine-tuning", "old_loss"),
    _key("loss on the new texts after fine-tuning", "new_loss"),
    Measure("mean of both", lambda one: (one["old_loss"] + one["new_loss"]) / 2, 3),
    _key("forgetting: rise of the loss on the old texts", "old_loss", less="old_loss_before"),
    _key("rise of the loss on the new texts by 4-bit weights, after fine-tuning", "new_loss_4", less="new_loss"),
]
_BEFORE = [
    _key("loss on the old texts before fine-tuning", "old_loss_before"),
    _key("rise of that loss by 4-bit weights", "old_loss_before_4", less="old_loss_before"),
    _key("rise of that loss by 3-bit weights", "old_loss_before_3", less="old_loss_before"),
]


def measures(block: Block) -> list[Measure]:
    """The figures that a block has a table of each."""
    if block.experiment in (CLASSIFICATION, LORA):
        return _CLEAN if block.noise else _CLEAN + _ROUNDED
    return (_BEFORE if block.experiment == PRETRAINING else []) + _AFTER


def title(block: Block) -> str:
    """What is trained on what."""
    if block.experiment in (CLASSIFICATION, LORA):
        trained = "LoRA adapters" if block.experiment == LORA else f"{block.noise:.0%} wrong labels"
        what = f"{block.texts} training texts, {block.epochs} epochs, {trained}"
    else:
        what = f"the method has the {block.experiment}, {block.texts} batches"
    return f"{block.data}, {what} ({block.model})"


def blocks_of(records: Sequence[Record]) -> list[Block]:
    """The blocks that have judged runs of two seeds or more, in the order of their first ones."""
    seeds: dict[Block, set[int]] = {}
    for one in records:
        if one["judged_on"] == "test":
            seeds.setdefault(Block.of(one), set()).add(one["seed"])
    return [block for block, of in seeds.items() if len(of) > 1]


def report(records: Sequence[Record]) -> str:
    """All tables."""
    return "\n\n".join(part for block in blocks_of(records) for part in block_report(block, records)) or "no runs"


def block_report(block: Block, records: Sequence[Record]) -> list[str]:
    """The tables of a block, and what its learning rates were chosen by."""
    runs = found_runs(block, records)
    heading = f"{title(block)}\n{'=' * min(len(title(block)), 120)}"
    least = min(len(of) for of in runs.values())
    if least < len(SEEDS):
        heading += f"\nINCOMPLETE: {least} of {len(SEEDS)} seeds have all methods"
    tables = [measure_table(measure, runs) for measure in measures(block)] if runs[ADAMW] else []
    return [heading, *tables, choice_table(block, records, runs)]


def pairs(measure: Measure, runs: dict[int, Record], others: dict[int, Record]) -> Comparison | None:
    """The comparison of a method's runs with those of another at the same seeds; None if there are none."""
    differences = [measure.of(runs[seed]) - measure.of(others[seed]) for seed in runs if seed in others]
    return compare(differences) if differences else None


def measure_table(measure: Measure, runs: dict[str, dict[int, Record]]) -> str:
    """The table of one figure: means, and differences from AdamW and from the rival of about the same price.

    All comparisons of a table are one family.
    """
    rivals = {method: [ADAMW] + [METHODS[method].rival] * bool(METHODS[method].rival) for method in runs}
    del rivals[ADAMW]
    found = {(m, r): pairs(measure, runs[m], runs[r]) for m, of in rivals.items() for r in of}
    known = {key: one for key, one in found.items() if one}
    adjusted = [holm([getattr(one, test) for one in known.values()]) for test in ("t", "flips")]
    tests = dict(zip(known, zip(*adjusted, strict=True), strict=True))
    lines = [
        measure.title,
        f"{'method':17}{'n':>2}{'mean':>8}  {'less AdamW':26}{'t':>6}{'flips':>6}   "
        f"{'less rival of equal price':26}{'t':>6}{'flips':>6}",
    ]
    for method, of in runs.items():
        if of:
            mean = statistics.mean(measure.of(one) for one in of.values())
            cells = [
                cell(known.get((method, rival)), tests.get((method, rival)), measure.digits)
                for rival in (ADAMW, METHODS[method].rival)
            ]
            lines.append(f"{method:17}{len(of):>2}{mean:>8.{measure.digits}f}  {cells[0]}   {cells[1]}".rstrip())
    return "\n".join(lines)


def cell(one: Comparison | None, tests: tuple[float, float] | None, digits: int) -> str:
    """A difference with its interval, and the adjusted p of both tests; `*` if both are below `LEVEL`."""
    if one is None:
        return " " * 38
    if one.count == 1:
        return f"{one.mean:+.{digits}f}".ljust(38)
    mark = "*" if max(tests) < LEVEL else ""
    interval = f"{one.mean:+.{digits}f} [{one.low:+.{digits}f}, {one.high:+.{digits}f}]{mark}"
    return f"{interval:26}{tests[0]:>6.3f}{tests[1]:>6.3f}"


def time_ratio(of: dict[int, Record], adamw: dict[int, Record]) -> str:
    """Processor time of the steps over AdamW's, at the seeds that both have."""
    both = of.keys() & adamw.keys()
    return f"{sum(of[s]['seconds'] for s in both) / sum(adamw[s]['seconds'] for s in both):.2f}x" if both else "-"


def choice_table(block: Block, records: Sequence[Record], runs: dict[str, dict[int, Record]]) -> str:
    """The choices of all methods, and the time of their steps."""
    lines = []
    for method, of in runs.items():
        own = METHODS[method]
        asked: list[Record] = []

        def look_up(setting, asked=asked):
            asked.append(in_records(records)(setting))
            return asked[-1]

        try:
            rate, strength = choose(block, method, look_up)
        except Missing:
            lines.append(f"{method:17}not complete")
            continue
        tried = len({(one["learning_rate"], one["strength"]) for one in asked})
        if own.found:
            strength = statistics.mean(one["rho"] for one in of.values() or asked)
        tuned = f"{own.tuned} {strength:.3g}" if own.tuned else ""
        time = time_ratio(of, runs[ADAMW])
        lines.append(f"{method:17}lr {rate:<8g}{tuned:12}of {tried:<2} tried{time:>9}")
    heading = f"chosen on validation texts{at(block)}"
    return "\n".join([f"{heading:51}  time", *lines])


def at(block: Block) -> str:
    """Where, if elsewhere."""
    return "" if block.chosen_in == block else f" with {block.chosen_in.noise:.0%} wrong labels"
