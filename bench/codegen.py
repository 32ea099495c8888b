"""Print figures of every kernel's machine code for five GPUs, and the least time that a step's memory traffic takes.

    python -m bench.codegen [--workers 2]

No GPU is needed: kernels are compiled ahead of time. Their code is read with NVIDIA's disassembler, which is part of
the Triton wheel, or, for AMD, as the text that LLVM writes. This takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from .kernel_builds import PRECISIONS, Build, configurations, is_of_8_bits, is_over_segments, steps, unique
from .machine_code import (
    NVIDIA,
    TARGETS,
    accesses,
    bytes_per_parameter,
    in_flight,
    instructions_per_parameter,
    occupancy,
    resources,
)

# What the command has printed, committed.
RESULTS = Path(__file__).parent / "results" / "codegen.txt"
METHODS = ("AdamW", "AdamW, clipped", "SAM", "FSAM", "GSAM", "momentum-SAM")
MAIN_PRECISIONS = ("fp32", "bf16", "bf16 + master", "bf16, 8-bit")
# What a step of SAM must move: norm, perturbation, update. Scales of two bytes for 32 codes are read and written.
DESIGN = {"fp32": (4, 16, 28), "bf16": (2, 8, 14), "bf16 + master": (2, 8, 26), "bf16, 8-bit": (2, 7, 13 + 4 * 2 / 32)}
SIZES = {"110 M": 110e6, "1 B": 1e9, "7 B": 7e9}


@dataclass(frozen=True)
class Device:
    """A GPU: its architecture, bytes a second of its memory, and number of processors, by its data sheet.

    Attributes:
        clock: Hz; of NVIDIA's what processors keep up under load.
        lanes: instructions of a lane that a processor starts in a cycle.
    """

    target: str
    bandwidth: float
    processors: int
    clock: float
    lanes: int = 128

    def hidden_latency(self, in_flight: int) -> float:
        """Seconds that a memory access may take while the whole bandwidth is used (Little's law).

        Args:
            in_flight: bytes that one processor has asked for.
        """
        return in_flight * self.processors / self.bandwidth

    def share(self, moved: float, instructions: float) -> float:
        """The part of the bandwidth that a pass can use whose instructions may take longer than its bytes.

        Args:
            moved: bytes of an element.
            instructions: of an element.
        """
        memory = moved / self.bandwidth
        return memory / max(memory, instructions / (self.lanes * self.processors * self.clock))

    def seconds(self, passes: Iterable[Figures]) -> float:
        """What passes take for an element, each by its bytes or by its instructions, whichever take longer."""
        moved = ((one.bytes_per_parameter, one.instructions) for one in passes)
        return sum(size / self.bandwidth / self.share(size, instructions) for size, instructions in moved)


DEVICES = {
    "A100 80GB": Device("sm_80", 2.039e12, 108, 1.06e9),
    "H100 SXM": Device("sm_90", 3.35e12, 132, 1.48e9),
    "H200": Device("sm_90", 4.8e12, 132, 1.48e9),
    "B200": Device("sm_100", 8.0e12, 148, 1.72e9),
    "MI300X": Device("gfx942", 5.3e12, 304, 2.1e9, 64),
}
# The least part of the bandwidth that instructions must leave to every pass. With 8-bit formats they are more, and the
# bytes less.
BUDGET = {"H200": 0.9, "B200": 0.85}
BUDGET_OF_8_BITS = {"H100 SXM": 0.85}
# Of those with the same architecture the one that is hardest to feed.
FASTEST = {device.target: device for device in sorted(DEVICES.values(), key=lambda device: device.bandwidth)}


@dataclass(frozen=True)
class Figures:
    """Everything that is printed about a build for a target."""

    loads: Counter
    stores: Counter
    bytes_per_parameter: float
    registers: int
    spills: int
    shared: int
    occupancy: float
    in_flight: int
    instructions: float


NOT_COUNTED = float("nan")
# Where instructions are.
COUNTED = (*NVIDIA, "gfx942")


def figures(one: Build, target: str) -> Figures:
    """Compile a build for a target, if that is not done, and read off its figures."""
    found, used = accesses(one, target), resources(one, target)
    over_parameters = is_over_segments(one) or "n" in one.kernel.arg_names
    is_counted = is_over_segments(one) and target in COUNTED
    return Figures(
        found.loads,
        found.stores,
        bytes_per_parameter(one, target) if over_parameters else NOT_COUNTED,
        used.registers,
        used.spills,
        used.shared,
        occupancy(one, target),
        in_flight(one, target),
        instructions_per_parameter(one, target) if is_counted else NOT_COUNTED,
    )


def _figures_by_number(number: int) -> list[Figures]:
    # Kernels cannot be sent to another process, but each process makes the same list.
    one = list(configurations())[number]
    return [figures(one, target) for target in TARGETS]


def all_figures(workers: int) -> dict[tuple[Build, str], Figures]:
    """Figures of every configuration for every target."""
    builds = list(configurations())
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as executor:
        rows = executor.map(_figures_by_number, range(len(builds)))
        return {
            (one, target): found
            for one, row in zip(builds, rows, strict=True)
            for target, found in zip(TARGETS, row, strict=True)
        }


Source = Callable[[Build, str], Figures]


def main_steps() -> dict[tuple[str, str], list[Build]]:
    """What one step launches, by method and precision."""
    return {(method, name): steps(*PRECISIONS[name])[method] for method in METHODS for name in MAIN_PRECISIONS}


def step_bytes(source: Source, target: str = "sm_90") -> dict[tuple[str, str], float]:
    """Bytes of each parameter that the kernels of a step move, by method and precision."""
    return {key: sum(source(one, target).bytes_per_parameter for one in builds) for key, builds in main_steps().items()}


def bytes_table(source: Source) -> str:
    columns = ("norm", "perturb", "gap", "descend")
    header = ("norm", "perturb", "dot products", "update", "sum", "DESIGN")
    lines = ["1. Bytes of each parameter that a step moves, from the machine code for sm_90"]
    lines.append(f"{'':15}{'weights':15}" + "".join(f"{name:>14}" for name in header))
    for (method, precision), builds in main_steps().items():
        moved = {one.name.split("-")[0]: source(one, "sm_90").bytes_per_parameter for one in builds}
        cells = [f"{moved[name]:g}" if name in moved else "" for name in columns]
        design = f"{sum(DESIGN[precision]):g}" if method == "SAM" else ""
        cells += [f"{sum(moved.values()):g}", design]
        lines.append((f"{method:15}{precision:15}" + "".join(f"{cell:>14}" for cell in cells)).rstrip())
    return "\n".join(lines)


def time_table(source: Source) -> str:
    lines = ["2. Milliseconds of a step's kernels at the data sheet's bandwidth: none can take less"]
    lines.append(f"{'':30}" + "".join(f"{name:>12}" for name in DEVICES))
    lines.append(f"{'TB/s':30}" + "".join(f"{device.bandwidth / 1e12:12.3g}" for device in DEVICES.values()))
    moved = {device.target: step_bytes(source, device.target) for device in DEVICES.values()}
    for size, n in SIZES.items():
        lines.append(f"{size} parameters")
        for method, precision in main_steps():
            times = (moved[d.target][method, precision] * n / d.bandwidth * 1e3 for d in DEVICES.values())
            lines.append(f"  {method:15}{precision:13}" + "".join(f"{time:12.3g}" for time in times))
    return "\n".join(lines)


HEADER = f"{'loads':>15}{'stores':>15}{'bytes':>9}{'instr':>7}{'regs':>6}{'spills':>8}{'shared':>8}{'occup.':>8}"
HEADER += f"{'KiB':>6}{'ns':>7}"


def row(target: str, found: Figures) -> str:
    device = FASTEST.get(target)
    covered = f"{device.hidden_latency(found.in_flight) * 1e9:.0f}" if device else ""
    accessed = f"{target:9}{widths(found.loads):>15}{widths(found.stores):>15}{number(found.bytes_per_parameter):>9}"
    used = f"{number(found.instructions, '.1f'):>7}{found.registers:6}{found.spills:8}{found.shared:8}"
    return f"{accessed}{used}{found.occupancy:8.0%}{found.in_flight / 1024:6.0f}{covered:>7}".rstrip()


def number(value: float, form: str = "g") -> str:
    """Nothing for what is not counted."""
    return format(value, form) if value == value else ""


def widths(found: Mapping[int, int]) -> str:
    """Instructions by their bytes: "3x16 1x8"."""
    return " ".join(f"{count}x{width}" for width, count in sorted(found.items(), reverse=True))


def main_table(source: Source) -> str:
    lines = ["3. The kernels of these steps"]
    lines.append(f"{'':9}{HEADER}")
    for one in unique(one for builds in main_steps().values() for one in builds):
        lines.append(one.name)
        lines += [row(target, source(one, target)) for target in TARGETS]
    return "\n".join(lines)


def share_table(source: Source) -> str:
    """How much of the bandwidth instructions leave to the passes that steps make."""
    shown = ("sm_90", "sm_100", "gfx942")
    lines = ["4. Instructions of an element, and the part of the bandwidth that they leave to each pass"]
    short = [name.split()[0] for name in DEVICES]
    header = "".join(f"{target:>7}" for target in shown) + "".join(f"{name:>{max(6, len(name) + 1)}}" for name in short)
    lines.append(f"{'':66}{'bytes':>7}{header}")
    for one in configurations():
        if is_over_segments(one):
            found = {target: source(one, target) for target in COUNTED}
            cells = [f"{found[target].instructions:7.1f}" for target in shown]
            for name, device in zip(short, DEVICES.values(), strict=True):
                own = found[device.target]
                share = device.share(own.bytes_per_parameter, own.instructions)
                cells.append(f"{share:{max(6, len(name) + 1)}.0%}")
            lines.append(f"{one.name:66}{found['sm_90'].bytes_per_parameter:7g}" + "".join(cells))
    kept = "\n".join(over_budget(source)) or "Every pass keeps it."
    lines.append(f"Budget: {_said(BUDGET)}; with 8-bit formats {_said(BUDGET_OF_8_BITS)}.\n{kept}")
    return "\n".join(lines)


def _said(budget: dict[str, float]) -> str:
    return ", ".join(f"{share:.0%} of {name}'s" for name, share in budget.items())


def budget(one: Build) -> dict[str, float]:
    """The least part of some GPUs' bandwidth that a pass should leave."""
    return BUDGET_OF_8_BITS if is_of_8_bits(one) else BUDGET


def over_budget(source: Source) -> list[str]:
    """Passes whose instructions leave less of the bandwidth than they should."""
    found = []
    for one in filter(is_over_segments, configurations()):
        for name, least in budget(one).items():
            own = source(one, DEVICES[name].target)
            if DEVICES[name].share(own.bytes_per_parameter, own.instructions) < least:
                found.append(f"Not kept by {one.name} on {name}.")
    return found


def gain_table(source: Source) -> str:
    """What a step of SAM takes, and what 8-bit formats make of it."""
    lines = ["5. Milliseconds of SAM's kernels for 1 B parameters, each by its bytes or its instructions"]
    lines.append(f"{'':30}" + "".join(f"{name:>12}" for name in DEVICES))
    times = {}
    for name in MAIN_PRECISIONS:
        builds = steps(*PRECISIONS[name])["SAM"]
        times[name] = [d.seconds(source(one, d.target) for one in builds) * 1e12 for d in DEVICES.values()]
        lines.append(f"{name:30}" + "".join(f"{time:12.3g}" for time in times[name]))
    before, after = "bf16 + master", "bf16, 8-bit"
    gains = (one / other for one, other in zip(times[before], times[after], strict=True))
    lines.append(f"{f'{before} over {after}':30}" + "".join(f"{gain:12.2f}" for gain in gains))
    return "\n".join(lines)


def summary_table(source: Source) -> str:
    """The worst figure over all configurations of a kernel, for each target."""
    lines = ["6. All configurations: the most of each figure, the least occupancy"]
    lines.append(f"{'':34}{'target':10}{'registers':>11}{'spills':>8}{'shared':>8}{'occupancy':>11}")
    kernels: dict[str, list[Build]] = {}
    for one in configurations():
        kernels.setdefault(one.kernel.__name__, []).append(one)
    for name, builds in kernels.items():
        for i, target in enumerate(TARGETS):
            found = [source(one, target) for one in builds]
            most = [max(getattr(f, figure) for f in found) for figure in ("registers", "spills", "shared")]
            label = f"{name}, {len(builds)}" if i == 0 else ""
            lines.append(
                f"{label:34}{target:10}{most[0]:11}{most[1]:8}{most[2]:8}{min(f.occupancy for f in found):11.0%}"
            )
    return "\n".join(lines)


def full_table(source: Source) -> str:
    lines = ["7. Every configuration, and what launches it"]
    lines.append(f"{'':9}{HEADER}")
    for one, launchers in configurations().items():
        lines.append(f"{one.name} ({'; '.join(launchers)})")
        lines += [row(target, source(one, target)) for target in TARGETS]
    return "\n".join(lines)


def title() -> str:
    return f"python -m bench.codegen, Triton {triton.__version__}, torch {torch.__version__.split('+')[0]}"


def report(source: Source) -> str:
    tables = (bytes_table, time_table, main_table, share_table, gain_table, summary_table, full_table)
    return "\n\n".join([title(), *(table(source) for table in tables)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="processes that compile (default: 2)")
    found = all_figures(parser.parse_args().workers)
    print(report(lambda one, target: found[one, target]))


if __name__ == "__main__":
    main()
