"""Check and time everything on this machine's GPU; writes bench/results/<device>.json and .md.

    pip install -e '.[test,bench]'
    python -m bench.on_gpu                                   # meant for ten minutes, at most 22
    python -m bench.on_gpu --small                           # a trial with small sizes
    python -m bench.on_gpu --dry-run                         # no GPU needed: see below
    python -m bench.on_gpu --page bench/results/DEVICE.json  # make the page again

Needs one CUDA or ROCm GPU with 24 GB of memory, and nothing from the network. Each part is a process of its own with a
time limit: after one that fails or takes too long, the others still run. The files are written after each part. The
exit status is 1 if a part has not passed.

--dry-run tries the command without a GPU: CPU tensors, small sizes, kernels in Triton's interpreter. Its figures mean
nothing; they are written to bench/results/dry_run.json and .md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .render import table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("torch", "triton", "numpy", "transformers", "pytorch_optimizer")
# Of a part that has not passed.
LINES = 30
Figures = Any


@dataclass(frozen=True)
class Part:
    """A process and what comes of it.

    Attributes:
        title: of its section on the page.
        command: the process; `FILE` stands for a file into which it writes figures.
        minutes: its limit.
        read: the figures of that file; None if it writes none (default: JSON).
        env: environment variables besides this process's (default: none).
        note: what the reader should know (default: "").
    """

    title: str
    command: tuple[str, ...]
    minutes: float
    read: Callable[[Path], Figures] | None = lambda path: json.loads(path.read_text(encoding="utf-8"))
    env: dict[str, str] = field(default_factory=dict)
    note: str = ""


# -- the parts ---------------------------------------------------------------------------------------------------------

FILE = "FILE"
PYTHON = (sys.executable, "-m")
# What keeps a GPU out of a dry run.
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
GPU_TESTS = ("tests/optim/test_gpu.py", "tests/batches/test_samples.py")


def description(device: str) -> Part:
    """The part whose figures describe the machine; this process itself does not occupy the GPU."""
    return Part("Machine", (*PYTHON, "bench.on_gpu", "--machine", FILE), 2, env=HIDDEN if device == "cpu" else {})


def parts(small: bool, device: str) -> list[Part]:
    """All others."""
    on_gpu = device == "cuda"
    hidden = {} if on_gpu else HIDDEN
    sanitizer = shutil.which("compute-sanitizer") if on_gpu else None
    # Every tensor is an allocation of its own then, so that an access past its end is seen.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if sanitizer else {}
    memcheck = (sanitizer, "--tool", "memcheck", "--error-exitcode", "1") if sanitizer else ()
    # Most of the tests' time is that of compilations.
    pytest = (*PYTHON, "pytest", *GPU_TESTS, "-m", "gpu", "-q", f"--junitxml={FILE}", *(("-n", "4") if on_gpu else ()))

    def bench(module: str, *words: str, when_small: str = "") -> tuple[str, ...]:
        return (*PYTHON, f"bench.{module}", "--device", device, *words, *(when_small.split() if small else ()))

    return [
        Part("GPU tests", (*pytest, "-k", "not graph and not replay"), 5, counts_of, hidden),
        Part("CUDA graphs: tests", (*pytest, "-k", "graph or replay"), 3, counts_of, hidden),
        Part(
            "Every pass once",
            (*memcheck, *bench("every_pass", "--dtypes", "bf16", *(() if small else ("fp32",)))),
            4,
            read=None,
            env=uncached,
            note="Under compute-sanitizer." if sanitizer else "compute-sanitizer is not there: run without it.",
        ),
        Part(
            "CUDA graphs: whole steps",
            bench("graphs", "--write", FILE, when_small="--layers 1 --steps 3"),
            2,
            note="" if on_gpu else "A CPU has no graphs: all steps are launched.",
        ),
        Part(
            "Kernels",
            bench("kernel_rates", "--write", FILE, when_small="--elements 4096"),
            3,
            env={} if on_gpu else {"TRITON_INTERPRET": "1", **HIDDEN},
        ),
        Part(
            "Real loop",
            bench(
                "real_loop",
                *("--models", "MiniLM", *(() if small else ("BERT-base",)), "--write", FILE),
                when_small="--precisions bf16 --rounds 2 --memory_batch 0 0",
            ),
            5,
        ),
    ]


def counts_of(path: Path) -> Figures:
    """How many tests passed, failed and were skipped, and the names of the failed ones, of JUnit's XML."""
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "names": []}
    for case in ElementTree.parse(path).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
            counts["names"].append(case.get("name"))
        else:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
    return counts


def describe_machine() -> dict[str, Any]:
    """What the results depend on, and nothing that names the machine."""
    import torch

    from .conftest import processor

    about: dict[str, Any] = {"device": None, "cpu": processor(), "threads": torch.get_num_threads()}
    about |= {"system": platform.system(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            about[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            about[package] = None
    about |= {"cuda": torch.version.cuda, "rocm": torch.version.hip, "driver": driver_version()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        about |= {"device": properties.name, "gpus": torch.cuda.device_count()}
        about |= {"memory": properties.total_memory, "multiprocessors": properties.multi_processor_count}
        about["architecture"] = getattr(properties, "gcnArchName", None) if torch.version.hip else None
        about["architecture"] = about["architecture"] or f"sm_{properties.major}{properties.minor}"
    return about


def driver_version() -> str | None:
    """NVIDIA's or AMD's."""
    for path, pattern in (
        ("/proc/driver/nvidia/version", r"Module.*?\s(\d+\.[\d.]+)"),
        ("/sys/module/amdgpu/version", "(.+)"),
    ):
        if Path(path).exists() and (found := re.search(pattern, Path(path).read_text(encoding="utf-8"))):
            return found[1].strip()
    return None


# -- running them ------------------------------------------------------------------------------------------------------


def run(part: Part) -> dict[str, Any]:
    """A part's status, seconds and figures; the end of its output if it has not passed."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "figures", Path(folder) / "log"
        command = [word.replace(FILE, str(path)) for word in part.command]
        start = time.monotonic()
        with log.open("wb") as output:
            code = finish(command, {**os.environ, **part.env}, output, part.minutes * 60)
        result: dict[str, Any] = {
            "title": part.title,
            "command": shlex.join([Path(part.command[0]).name, *part.command[1:]]),
            "minutes": part.minutes,
            "seconds": round(time.monotonic() - start, 1),
            "note": part.note,
            "status": {0: "passed", None: "timed out"}.get(code, "failed"),
            "figures": None,
        }
        try:
            result["figures"] = part.read(path) if part.read else None
        except (OSError, ValueError, ElementTree.ParseError):
            # A part that has failed need not have come that far.
            if code == 0:
                result["status"] = "failed"
        counts = result["figures"]
        if part.read is counts_of and code in (0, 5) and not (counts and counts["passed"]):
            result["status"] = "nothing ran"
        if result["status"] not in ("passed", "nothing ran"):
            result["output"] = last_lines(log.read_text(encoding="utf-8", errors="replace"), folder)
        return result


def finish(command: Sequence[str], env: dict[str, str], output: Any, seconds: float) -> int | None:
    """The exit status of a process; None if it took too long and was ended with the processes it has started."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def last_lines(text: str, folder: str) -> list[str]:
    """The end of an output, without names of this machine's folders."""
    for path, name in ((folder, "..."), (str(ROOT), "."), (sys.prefix, "<python>"), (str(Path.home()), "~")):
        # A container's home may be the root folder.
        text = text.replace(path, name) if path != "/" else text
    return text.splitlines()[-LINES:]


def commit() -> str | None:
    """The commit of this checkout, with "+" if files differ from it."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


# -- the page ----------------------------------------------------------------------------------------------------------

STAND_IN = (
    "**Dry run without a GPU.** CPU tensors, small sizes and Triton's interpreter stood in for it. "
    "It shows that the command works, and nothing else."
)
SMALL = "**Small sizes.** The times show that the command works, and nothing else."


def show_tests(counts: dict) -> str:
    lines = [f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped."]
    return "\n".join(lines + [f"- {name}" for name in counts["names"]])


def show_loop(results: dict) -> str:
    from .real_loop import lines_of

    return "\n".join(lines_of(results["results"])).strip()


def show_graphs(rows: list[dict]) -> str:
    from .graphs import table_of

    return table_of(rows)


def show_kernels(rows: list[dict]) -> str:
    from .kernel_rates import table_of

    return table_of(rows)


SHOW: dict[str, Callable[[Any], str]] = {
    "GPU tests": show_tests,
    "CUDA graphs: tests": show_tests,
    "CUDA graphs: whole steps": show_graphs,
    "Kernels": show_kernels,
    "Real loop": show_loop,
}


def render(results: dict[str, Any]) -> str:
    """The page of the results."""
    lines = [f"# {results['machine']['device'] or 'Dry run'}", "", "Made by `python -m bench.on_gpu`.", ""]
    if results["dry_run"] or results["small"]:
        lines += [STAND_IN if results["dry_run"] else SMALL, ""]
    about = {"commit": results["commit"], **results["machine"]}
    lines += [table(["", ""], [[name, str(value)] for name, value in about.items() if value is not None]), ""]
    rows = [
        [part["title"], part["status"], f"{part['seconds']:.0f} s", f"{part['minutes']:g} min"]
        for part in results["parts"]
    ]
    lines += [table(["part", "status", "took", "limit"], rows), ""]
    for part in results["parts"]:
        lines += [f"## {part['title']}: {part['status']}", "", f"`{part['command']}`", ""]
        if part["note"]:
            lines += [part["note"], ""]
        if part["figures"] is not None and part["title"] in SHOW:
            lines += [SHOW[part["title"]](part["figures"]), ""]
        if "output" in part:
            lines += ["```", *part["output"], "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def write(results: dict[str, Any], path: Path) -> None:
    """The JSON, and the page beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(render(results), encoding="utf-8")


def name_of(machine: dict[str, Any], dry_run: bool, small: bool) -> str:
    """The results' name, the device's in lower case."""
    if dry_run:
        return "dry_run"
    return re.sub(r"\W+", "_", machine["device"].lower()).strip("_") + ("_small" if small else "")


def run_all(machine: dict[str, Any], wanted: Sequence[Part], path: Path, dry_run: bool, small: bool) -> dict[str, Any]:
    """Run the parts one after the other; the files are written after each."""
    results = {"dry_run": dry_run, "small": small, "commit": commit(), "machine": machine, "parts": []}
    for part in wanted:
        print(f"{part.title} (at most {part.minutes:g} min) ...", end=" ", flush=True)
        results["parts"].append(run(part))
        print(f"{results['parts'][-1]['status']}, {results['parts'][-1]['seconds']:.0f} s", flush=True)
        write(results, path)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python -m bench.on_gpu [options]",
    )
    parser.add_argument("--small", action="store_true", help="small sizes, to try the command")
    parser.add_argument("--dry-run", action="store_true", help="a CPU in the GPU's place, with small sizes")
    parser.add_argument("--page", type=Path, metavar="JSON", help="make the page of these results, run nothing")
    parser.add_argument("--machine", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.machine:
        args.machine.write_text(json.dumps(describe_machine()), encoding="utf-8")
        return
    if args.page:
        write(json.loads(args.page.read_text(encoding="utf-8")), args.page)
        return
    small, device = args.small or args.dry_run, "cpu" if args.dry_run else "cuda"
    described = run(description(device))
    about = described["figures"]
    if about is None:
        sys.exit("\n".join(["This machine cannot be described:", *described["output"]]))
    if about["device"] is None and not args.dry_run:
        sys.exit("torch sees no CUDA or ROCm GPU. `python -m bench.on_gpu --dry-run` tries this command on a CPU.")
    path = RESULTS / f"{name_of(about, args.dry_run, small)}.json"
    wanted = parts(small, device)
    print(f"{len(wanted)} parts, at most {sum(part.minutes for part in wanted):g} minutes", flush=True)
    results = run_all(about, wanted, path, args.dry_run, small)
    shown = [path.relative_to(ROOT), path.with_suffix(".md").relative_to(ROOT)]
    print(f"written: {shown[0]}, {shown[1]}")
    if args.dry_run:
        sys.exit(any(part["status"] not in ("passed", "nothing ran") for part in results["parts"]))
    sys.exit(any(part["status"] != "passed" for part in results["parts"]))


if __name__ == "__main__":
    main()
