"""The command for a machine with a GPU: parts that fail, time out or are not there, and the page of the results."""

import json
import os
import sys
import time
from dataclasses import replace

import pytest
import torch

from bench import every_pass, on_gpu
from bench.on_gpu import FILE, Part, counts_of, last_lines, name_of, parts, render, run, run_all, write
from fsam_triton.kernels import formulas, reference

# Where functions of `reference` are defined.
ARITHMETIC = (reference.__name__, formulas.__name__)
MACHINE = {"device": "GPU 9000", "cpu": "A CPU", "torch": "2.13.0", "driver": None}
# Without imports: a process of these takes milliseconds.
PYTHON = (sys.executable, "-S", "-c")
WRITES = "import sys; open(sys.argv[1], 'w').write('[1, 2]')"
GOOD = Part("good", (*PYTHON, WRITES, FILE), 1)
BAD = Part("bad", (*PYTHON, "print('why'); raise SystemExit(3)", FILE), 1)
SLOW = Part("slow", (*PYTHON, "import time; print('began', flush=True); time.sleep(60)"), 0.5 / 60, None)
XML = """<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure message="">no</failure></testcase>
<testcase name="c"><skipped/></testcase><testcase name="d"><error/></testcase></testsuite></testsuites>"""
SKIPPED = '<testsuites><testsuite><testcase name="c"><skipped/></testcase></testsuite></testsuites>'


def results_of(*ran: dict, dry_run: bool = False, small: bool = False) -> dict:
    return {"dry_run": dry_run, "small": small, "commit": "0123456789ab", "machine": MACHINE, "parts": list(ran)}


def part_of(title: str, figures: object, **changed: object) -> dict:
    part = {"title": title, "command": "python -m it", "minutes": 2, "seconds": 3.2, "note": "", "status": "passed"}
    return {**part, "figures": figures, **changed}


def test_part_that_passes_gives_its_figures():
    result = run(GOOD)
    assert (result["status"], result["figures"]) == ("passed", [1, 2])
    assert "output" not in result


def test_part_that_fails_gives_the_end_of_its_output():
    result = run(BAD)
    assert (result["status"], result["figures"], result["output"]) == ("failed", None, ["why"])


def test_part_that_exits_well_without_its_figures_has_failed():
    assert run(Part("empty", (*PYTHON, "pass"), 1))["status"] == "failed"


def test_part_that_takes_too_long_is_ended_with_its_children(tmp_path):
    """The child would write a file after a second."""
    child = f"import time; time.sleep(1); open({str(tmp_path / 'file')!r}, 'w')"
    script = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-S', '-c', {child!r}]); time.sleep(60)"
    start = time.monotonic()
    result = run(Part("slow", (*PYTHON, script), 0.5 / 60, None))
    assert result["status"] == "timed out"
    assert time.monotonic() - start < 30
    time.sleep(1.5)
    assert not (tmp_path / "file").exists()


def test_parts_after_one_that_fails_or_times_out_run(tmp_path, monkeypatch):
    monkeypatch.setattr(on_gpu, "ROOT", tmp_path)
    results = run_all(MACHINE, [BAD, SLOW, GOOD], tmp_path / "gpu.json", False, False)
    assert [part["status"] for part in results["parts"]] == ["failed", "timed out", "passed"]
    assert json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8")) == results
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert all(word in page for word in ("## bad: failed", "why", "## slow: timed out", "began", "## good: passed"))


def test_files_are_written_after_each_part(tmp_path):
    path = tmp_path / "gpu.json"
    # The second part copies what the first one has left.
    copies = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])"
    results = run_all(MACHINE, [GOOD, Part("copy", (*PYTHON, copies, str(path), FILE), 1)], path, False, False)
    assert [part["title"] for part in results["parts"][1]["figures"]["parts"]] == ["good"]


def test_counts_of_tests_are_those_of_the_report(tmp_path):
    (tmp_path / "report").write_text(XML, encoding="utf-8")
    assert counts_of(tmp_path / "report") == {"passed": 1, "failed": 2, "skipped": 1, "names": ["b", "d"]}


def test_tests_that_are_all_skipped_have_not_passed():
    script = f"import sys; open(sys.argv[1], 'w').write({SKIPPED!r})"
    assert run(Part("tests", (*PYTHON, script, FILE), 1, counts_of))["status"] == "nothing ran"


def test_output_names_no_folder_of_the_machine(tmp_path):
    home = os.path.expanduser("~")
    text = f"{tmp_path}/x {on_gpu.ROOT}/bench/y {sys.prefix}/z {home}/w"
    shown = "\n".join(last_lines(text, str(tmp_path)))
    assert shown == ".../x ./bench/y <python>/z ~/w"


def test_page_shows_every_kind_of_figures():
    kernel = {"pass": "norm", "precision": "fp32", "weights": 10**9, "bytes_per_weight": 4.0}
    kernel |= {"seconds": 1e-3, "fraction": 0.8, "rates": [5e12, 5e12, 5e12]}
    both = {"launched": 2e-3, "replayed": 1e-3}
    loop = {"model": "MiniLM", "precision": "bf16", "weights": 10**6, "memory": {}}
    loop |= {"seconds": {"FSAM": 2e-3, "AdamWL2SP": 1e-3}}
    page = render(
        results_of(
            part_of("GPU tests", {"passed": 7, "failed": 1, "skipped": 2, "names": ["test_it"]}, status="failed"),
            part_of("Every pass once", None, note="It is not there."),
            part_of(
                "CUDA graphs: whole steps", [{"precision": "bf16", "weights": 10**6, "seconds": both, "loss": both}]
            ),
            part_of("Kernels", [kernel]),
            part_of("Real loop", {"machine": {}, "results": [loop]}),
        )
    )
    assert page.startswith("# GPU 9000\n")
    assert "| driver |" not in page
    for line in (
        "| commit | 0123456789ab |",
        "| GPU tests | failed | 3 s | 2 min |",
        "7 passed, 1 failed, 2 skipped.",
        "- test_it",
        "It is not there.",
        "| 1 M weights, bf16 | 2.00 ms | 1.00 ms | 2.00x | 0.002000 | 0.001000 |",
        "| norm, fp32 | 4 | 0.00100 | 4000.0 | 80% |",
        "| FSAM | 2.00 | 1.00x | - | - |",
    ):
        assert line in page.splitlines(), line


def test_page_of_written_results_is_made_of_the_json_alone(tmp_path):
    path = tmp_path / "gpu.json"
    write(results_of(part_of("Kernels", [])), path)
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert render(json.loads(path.read_text(encoding="utf-8"))) == page


def test_dry_run_is_marked_and_not_written_under_the_name_of_a_gpu():
    assert name_of(MACHINE, True, True) == "dry_run"
    assert "Dry run without a GPU" in render(results_of(dry_run=True, small=True))
    assert "Dry run" not in render(results_of())


def test_results_of_small_sizes_are_marked():
    assert name_of(MACHINE, False, False) == "gpu_9000"
    assert name_of(MACHINE, False, True) == "gpu_9000_small"
    assert "Small sizes" in render(results_of(small=True))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_limits_of_the_parts_add_up_to_what_the_command_says(device):
    assert f"at most {sum(part.minutes for part in parts(False, device)):g}" in on_gpu.__doc__


def test_passes_run_under_compute_sanitizer_where_it_is(monkeypatch):
    for path, note in (("/bin/compute-sanitizer", "Under compute-sanitizer"), (None, "compute-sanitizer is not there")):
        monkeypatch.setattr(on_gpu.shutil, "which", lambda name, path=path: path)
        part = next(part for part in parts(False, "cuda") if part.title == "Every pass once")
        assert (part.command[0] == path) == (path is not None)
        assert part.note.startswith(note)


def test_no_part_of_a_dry_run_sees_a_gpu():
    script = "import json, os, sys; json.dump(os.environ['CUDA_VISIBLE_DEVICES'], open(sys.argv[1], 'w'))"
    for part in [on_gpu.description("cpu"), *parts(True, "cpu")]:
        if "pytest" in part.command or part.title in ("Machine", "Kernels"):
            assert run(replace(part, command=(*PYTHON, script, FILE), read=Part.read))["figures"] == ""
        else:
            assert part.command[part.command.index("--device") + 1] == "cpu"


def test_program_for_compute_sanitizer_runs_every_pass(one_thread):
    calls = every_pass.run("cpu", [torch.bfloat16])
    assert all(calls.values()), calls


def test_list_of_passes_is_that_of_ops():
    passes = {
        name for name in vars(every_pass.ops) if getattr(vars(reference).get(name), "__module__", "") in ARITHMETIC
    }
    assert set(every_pass.PASSES) == passes
