"""Write the tables and plots of docs/performance.md from the JSON of the benchmark suites.

    python -m bench.render

Reads every bench/results/benchmarks_*.json. A table is written between the marks `<!-- NAME -->` and `<!-- /NAME -->`
of the page. NAME is one of `BLOCKS`, or the suite (`harness.Case.suite`) of benchmarks without a table of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "docs" / "performance.md",)
RESULTS = ROOT / "bench" / "results"
IMAGES = ROOT / "docs" / "images"

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The benchmarks of one file and one device, in the order they ran."""

    name: str
    device: str
    machine: Row
    rows: list[Row]

    def suite(self, name: str) -> list[Row]:
        return [row for row in self.rows if row["suite"] == name]

    @property
    def title(self) -> str:
        machine = self.machine
        processor = machine["cuda"] if self.device == "cuda" else f"{machine['cpu']}, {machine['threads']} threads"
        return f"**{processor}, torch {machine['torch']}** (`bench/results/benchmarks_{self.name}.json`)"

    def image(self, kind: str) -> str:
        return f"performance_{self.name}_{self.device}_{kind}.svg"


def load(folder: Path = RESULTS) -> list[Run]:
    """The runs of all files, by name and device."""
    runs = []
    for path in sorted(folder.glob("benchmarks_*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = content["benchmarks"]
        for device in unique(row["device"] for row in rows):
            name = path.stem.removeprefix("benchmarks_")
            own = [row for row in rows if row["device"] == device]
            runs.append(Run(name, device, content["machine_info"], own))
    return runs


def unique(values: Iterable[Any]) -> list[Any]:
    """Each value once, where it comes first."""
    return list(dict.fromkeys(values))


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def pick(rows: list[Row], **wanted: Any) -> Row | None:
    """The one row that has these values, or None."""
    return next((row for row in rows if wanted.items() <= row.items()), None)


def digits(number: float) -> str:
    """Three of them."""
    return f"{number:#.3g}".rstrip(".")


def nanoseconds(row: Row) -> float:
    """Per weight."""
    return row["min"] / row["weights"] * 1e9


def times(row: Row, ours: Row) -> float:
    """How often the time of `ours` a row's is, both as multiples of the limit that the memory had then.

    It may have been faster for one of them: they are minutes apart.
    """
    return ours["fraction"] / row["fraction"]


def figures(row: Row | None, ours: Row | None = None) -> str:
    """Time per weight, how often it is that of `ours`, and the share of the bandwidth."""
    if row is None:
        return "-"
    ratio = "" if ours in (None, row) else f" ({times(row, ours):.2f}x)"
    return f"{digits(nanoseconds(row))} ns{ratio}, {row['fraction']:.0%}"


def bandwidth(run: Run) -> str:
    """The rates measured before each benchmark, GB/s."""
    kinds = ("read", "updated in place", "written")
    rates = zip(*(row["rates"] for row in run.rows if row["rates"]), strict=True)
    cells = [[digits(use(own) / 1e9) for use in (median, min, max)] for own in rates]
    return table(["GB/s", "median", "least", "most"], [[kind, *own] for kind, own in zip(kinds, cells, strict=True)])


def steps(run: Run) -> str:
    """A table for each precision: time of a step by implementation and model."""
    out = []
    rows = run.suite("steps")
    for precision in unique(row["precision"] for row in rows):
        own = [row for row in rows if row["precision"] == precision]
        models = unique(row["model"] for row in own)
        lines = []
        for subject, name in unique((row["subject"], row["implementation"]) for row in own):
            first = next(row["implementation"] for row in own if row["subject"] == subject)
            cells = [
                figures(
                    pick(own, model=model, subject=subject, implementation=name),
                    pick(own, model=model, subject=subject, implementation=first),
                )
                for model in models
            ]
            needed = pick(own, subject=subject)["bytes_per_weight"]
            lines.append([name, f"{needed:.4g}", *cells])
        out.append(f"{precision}:\n\n" + table(["", "bytes", *models], lines))
    return "\n\n".join([*out, f"![Time of a SAM step](images/{run.image('steps')})"])


def memory(run: Run, model: str = "BERT-base") -> str:
    """Bytes a weight, at the peak of a step and between steps."""
    own = [row for row in run.suite("steps") if row["model"] == model]
    precisions = unique(row["precision"] for row in own)
    lines = []
    for name in unique(row["implementation"] for row in own):
        found = [pick(own, implementation=name, precision=precision) for precision in precisions]
        lines.append([name] + ["-" if row is None else peak_and_held(row) for row in found])
    return table([f"{model}: peak (held)", *precisions], lines)


def peak_and_held(row: Row) -> str:
    return f"{row['peak_bytes'] / row['weights']:.1f} ({row['held_bytes'] / row['weights']:.1f})"


def passes(run: Run) -> str:
    """A table for each precision: time of a pass by implementation."""
    out = []
    rows = run.suite("passes")
    for precision in unique(row["precision"] for row in rows):
        own = [row for row in rows if row["precision"] == precision]
        names = unique(row["implementation"] for row in own)
        lines = []
        for subject in unique(row["subject"] for row in own):
            found = [pick(own, subject=subject, implementation=name) for name in names]
            needed = pick(own, subject=subject)["bytes_per_weight"]
            lines.append([subject, f"{needed:.4g}", *(figures(row, found[0]) for row in found)])
        out.append(f"{precision}:\n\n" + table(["", "bytes", *names], lines))
    return "\n\n".join(out)


def updates(run: Run) -> str:
    """AdamW by people whose states have different sizes."""
    lines = [
        [f"{row['implementation']}, {row['precision']}", f"{row['bytes_per_weight']:.4g}", figures(row)]
        for row in run.suite("updates")
    ]
    return table(["", "bytes", "time"], lines)


def scaling(run: Run) -> str:
    """Time by weights, and time by tensors."""
    sizes, tensors = run.suite("sizes"), run.suite("tensors")
    names = unique(row["implementation"] for row in sizes)

    def lines(rows: list[Row], key: str, cell: Callable[[Row | None], str]) -> list[list[str]]:
        keys = unique(row[key] for row in rows)
        return [[f"{one:,}", *(cell(pick(rows, implementation=n, **{key: one})) for n in names)] for one in keys]

    first = table(["weights, in one bf16 tensor", *names], lines(sizes, "weights", figures))
    second = table(
        [f"tensors, {tensors[0]['weights']:,} fp32 weights", *names], lines(tensors, "tensors", milliseconds)
    )
    image = f"![Time by weights and by tensors](images/{run.image('scaling')})"
    return "\n\n".join([first, second, slopes(tensors), image])


def milliseconds(row: Row | None) -> str:
    return "-" if row is None else f"{digits(row['min'] * 1e3)} ms"


def slopes(rows: list[Row]) -> str:
    """What each tensor adds, from the fewest to the most."""
    found = []
    for name in unique(row["implementation"] for row in rows):
        own = [row for row in rows if row["implementation"] == name]
        if more := own[-1]["tensors"] - own[0]["tensors"]:
            found.append(f"{name}: {(own[-1]['min'] - own[0]['min']) / more * 1e6:.2f} µs")
    return f"Each tensor more, from the fewest to the most: {', '.join(found)}."


def host(run: Run) -> str:
    """The work of the host by tensors."""
    return f"{plain(run, 'host')}\n\n{slopes(run.suite('host'))}"


def plain(run: Run, suite: str) -> str:
    """Any other suite: a line for each benchmark, and its ratio to the first of the same subject and model."""
    rows = run.suite(suite)
    lines = []
    for row in rows:
        first = pick(rows, **{key: row[key] for key in ("subject", "model", "precision")})
        peak = f"{row['peak_bytes'] / 1e6:,.2f} MB" if row["peak_bytes"] else "-"
        ratio = f"{row['min'] / first['min']:.2f}x"
        lines.append([row["subject"], row["model"], row["implementation"], milliseconds(row), ratio, peak])
    return table(["", "", "", "time", "to the first", "peak memory"], lines)


# The suite that each is about.
BLOCKS: dict[str, tuple[str, Callable[[Run], str]]] = {
    "bandwidth": ("steps", bandwidth),
    "steps": ("steps", steps),
    "memory": ("steps", memory),
    "passes": ("passes", passes),
    "updates": ("updates", updates),
    "scaling": ("sizes", scaling),
    "host": ("host", host),
}


def block(name: str, runs: list[Run]) -> str:
    """What stands between the marks of that name."""
    suite, draw = BLOCKS.get(name, (name, lambda run: plain(run, name)))
    return "\n\n".join(f"{run.title}\n\n{draw(run)}" for run in runs if run.suite(suite))


def render(page: str, runs: list[Run]) -> str:
    """The page with its tables made anew."""

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        return f"<!-- {name} -->\n\n{block(name, runs)}\n\n<!-- /{name} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", fill, page, flags=re.S)


def draw(run: Run, folder: Path = IMAGES) -> None:
    """The plots of a run, the same bytes for the same numbers."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "fsam_triton", "svg.fonttype": "none", "font.size": 9})
    folder.mkdir(parents=True, exist_ok=True)
    for kind, suite, plot in (("steps", "steps", _plot_steps), ("scaling", "sizes", _plot_scaling)):
        if run.suite(suite):
            figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
            plot(run, *axes)
            figure.savefig(folder / run.image(kind), metadata={"Date": None, "Creator": None})
            pyplot.close(figure)


def _limit(row: Row) -> float:
    """Nanoseconds a weight at the bandwidth measured beside it."""
    return row["bytes_per_weight"] / row["bandwidth"] * 1e9


def _plot_steps(run: Run, *axes: Any) -> None:
    """SAM's step: a group of bars for each model, a panel for each precision."""
    sam = [row for row in run.suite("steps") if row["subject"] == "SAM"]
    colours = {name: f"C{i}" for i, name in enumerate(unique(row["implementation"] for row in sam))}
    shown = {}
    for precision, axis in zip(("fp32", "bf16"), axes, strict=True):
        rows = [row for row in sam if row["precision"] == precision]
        models = unique(row["model"] for row in rows)
        names = unique(row["implementation"] for row in rows)
        width = 0.8 / max(len(names), 1)
        for i, name in enumerate(names):
            found = [pick(rows, model=model, implementation=name) for model in models]
            at = [j + (i - (len(names) - 1) / 2) * width for j in range(len(models))]
            heights = [0 if row is None else nanoseconds(row) for row in found]
            shown[name] = axis.bar(at, heights, width, color=colours[name])
        for j, model in enumerate(models):
            limit = _limit(pick(rows, model=model))
            shown["limit of the memory"] = axis.hlines(limit, j - 0.45, j + 0.45, "black")
        axis.set_xticks(range(len(models)), models)
        axis.set_title(precision)
        axis.set_ylabel("ns a weight")
    axes[0].figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, fontsize=8)


def _plot_scaling(run: Run, by_weights: Any, by_tensors: Any) -> None:
    """Nanoseconds a weight by weights; milliseconds a step by tensors."""
    sizes, tensors = run.suite("sizes"), run.suite("tensors")
    for name in unique(row["implementation"] for row in sizes):
        own = [row for row in sizes if row["implementation"] == name]
        by_weights.plot([row["weights"] for row in own], [nanoseconds(row) for row in own], "o-", label=name)
        own = [row for row in tensors if row["implementation"] == name]
        by_tensors.plot([row["tensors"] for row in own], [row["min"] * 1e3 for row in own], "o-", label=name)
    own = [row for row in sizes if row["implementation"] == sizes[0]["implementation"]]
    by_weights.plot([row["weights"] for row in own], [_limit(row) for row in own], "k--", label="limit of the memory")
    by_weights.set(xscale="log", xlabel="weights, bf16", ylabel="ns a weight", ylim=(0, None))
    by_tensors.set(xlabel="tensors", ylabel="ms a step", ylim=(0, None))
    for axis in (by_weights, by_tensors):
        axis.legend()


def main() -> None:
    runs = load()
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8"), runs), encoding="utf-8")
    for run in runs:
        draw(run)


if __name__ == "__main__":
    main()
