"""How the C++ is built: what is kept, for whom, and what happens where it cannot be."""

import json
import os
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fsam_triton.kernels import build, cpu, reference
from fsam_triton.kernels.segments import Plan, Segments

pytestmark = pytest.mark.slow
needs_compiler = pytest.mark.skipif(not build.available(), reason="needs a C++ compiler")

# Two passes in a new process, C++ against reference, and what else is to be seen there.
PROGRAM = """
import json, sys, time, warnings
import torch
from fsam_triton.kernels import cpu, reference
from fsam_triton.kernels.segments import Plan, Segments

def run(module):
    weight, grad = torch.arange(70) / 8 - 3, torch.arange(70) / 64
    segments, coef = Segments(Plan([70], weight.device), [weight], [grad]), torch.tensor([[0.5, 0.0]])
    norm = module.norm_sq(segments, False, None)
    module.perturb_(segments, torch.zeros(96), None, coef, torch.zeros(1, dtype=torch.int32), False, False, False)
    return [float(norm), *weight.tolist()]

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    start = time.perf_counter()
    same = run(cpu) == run(reference)
    seconds = time.perf_counter() - start
try:
    mapped = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
except OSError:
    mapped = set()
print(json.dumps({
    "same": same,
    "seconds": seconds,
    "warnings": [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)],
    "openmp": sorted(path for path in mapped if any(name in path for name in ("libgomp", "libomp", "libiomp"))),
    "inductor": "torch._inductor.codecache" in sys.modules,
}))
"""


def start(cache: Path, **env: str) -> subprocess.Popen:
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), **env}
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=env, stdout=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen) -> dict:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_compiled_code_is_kept_and_the_next_process_runs_no_compiler(tmp_path):
    log = tmp_path / "log"
    wrapper = script(tmp_path / "wrapper", f'echo "$@" >> {log}\nexec {build.compiler()[0]} "$@"')
    first = outcome(start(tmp_path / "cache", CXX=wrapper))
    calls = log.read_text()
    second = outcome(start(tmp_path / "cache", CXX=wrapper))
    assert log.read_text() == calls
    for result in (first, second):
        assert (result["same"], result["warnings"], result["inductor"]) == (True, [], False)
        # PyTorch's own: threads of a second library would be in the way of the first one's.
        assert len(result["openmp"]) <= 1
    # What is damaged is compiled again.
    libraries = list((tmp_path / "cache/fsam_triton").iterdir())
    assert libraries
    for library in libraries:
        library.write_bytes(library.read_bytes()[:100])
    third = outcome(start(tmp_path / "cache", CXX=wrapper))
    assert (third["same"], third["warnings"]) == (True, [])
    assert log.read_text() != calls


@needs_compiler
def test_processes_that_compile_the_same_at_once_do_not_disturb_one_another(tmp_path):
    processes = [start(tmp_path) for _ in range(3)]
    for result in map(outcome, processes):
        assert (result["same"], result["warnings"]) == (True, [])
    left = list((tmp_path / "fsam_triton").iterdir())
    assert len(left) == 2
    assert all(path.suffix == ".so" for path in left)


FAILING = {
    "is missing": None,
    "says no": "echo 'fatal error: no' >&2; exit 1",
    "makes no library": 'for last; do :; done; echo nonsense > "$last"',
    "has no room": "echo 'error: No space left on device' >&2; exit 1",
}


@pytest.mark.parametrize("kind", FAILING)
def test_where_the_compiler_fails_it_warns_once_and_computes_the_same(kind, tmp_path):
    text = FAILING[kind]
    named = str(tmp_path / "missing") if text is None else script(tmp_path / "compiler", text)
    result = outcome(start(tmp_path / "cache", CXX=named, TMPDIR=str(tmp_path)))
    assert result["same"]
    assert len(result["warnings"]) == 1
    assert "no working C++ compiler" in result["warnings"][0]


def test_without_a_compiler_on_the_path_it_warns_once_and_computes_the_same(tmp_path):
    environment = {"PATH": str(tmp_path), "CXX": ""}
    result = outcome(start(tmp_path / "cache", **environment))
    assert (result["same"], len(result["warnings"])) == (True, 1)


@needs_compiler
def test_a_cache_that_cannot_be_made_is_made_elsewhere(tmp_path):
    file = tmp_path / "file"
    file.touch()
    result = outcome(start(file, TMPDIR="/does/not/exist"))
    assert (result["same"], result["warnings"]) == (True, [])


# -- in this process ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch):
    """A process that has compiled nothing so far."""
    caches = (build._can_compile, cpu._norm_sq, cpu._perturb)
    monkeypatch.setattr(build, "_failure", None)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def norm(module=cpu) -> float:
    tensor = torch.arange(100) / 8
    return float(module.norm_sq(Segments(Plan([100], tensor.device), [tensor], [tensor]), False, None))


def test_a_disk_that_is_full_later_warns_once_and_changes_no_numbers(fresh, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    norm()
    monkeypatch.setattr(build, "_cached", full)
    weight, grad, backup = torch.ones(5), torch.arange(5.0), torch.zeros(32)
    segments = Segments(Plan([5], weight.device), [weight], [grad])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        coef, key = torch.tensor([[2.0, 0.0]]), torch.zeros(1, dtype=torch.int32)
        cpu.perturb_(segments, backup, None, coef, key, False, False, False)
        cpu.perturb_(segments, backup, None, coef, key, True, False, False)
        assert not build.available()
        norm()
    assert len(caught) == 1
    assert "No space left" in str(caught[0].message)
    assert backup[:5].tolist() == [1, 3, 5, 7, 9]
    assert weight.tolist() == [1, 21, 105, 301, 657]


@needs_compiler
def test_a_folder_in_which_others_may_write_is_not_used(fresh, monkeypatch, tmp_path):
    """They might put code there that would be run."""
    shared, own = tmp_path / "shared", tmp_path / "own"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setattr(build, "_folders", lambda: iter([shared, own]))
    assert norm() == norm(reference)
    assert not list(shared.iterdir())
    assert list(own.iterdir())
    assert stat.S_IMODE(own.stat().st_mode) == 0o700


@needs_compiler
def test_a_folder_that_may_only_be_read_serves_what_it_has(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_folders", lambda: iter([tmp_path]))
    tmp_path.chmod(0o700)
    norm()
    cpu._norm_sq.cache_clear()

    def forbidden(*args):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(build, "_compiled", forbidden)
    assert norm() == norm(reference)


def test_a_user_whom_nobody_knows_has_a_folder_for_temporary_files(monkeypatch, tmp_path):
    pwd = pytest.importorskip("pwd")

    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    assert list(build._folders()) == [tmp_path / f"fsam_triton-{os.getuid()}"]


def test_without_any_folder_nothing_can_be_compiled(fresh, monkeypatch):
    def nowhere():
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative/folder")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(build.tempfile, "gettempdir", nowhere)
    assert list(build._folders()) == []
    with pytest.warns(RuntimeWarning, match="no folder"):
        assert norm() == norm(reference)


def test_what_code_depends_on_is_part_of_its_name(fresh, monkeypatch, tmp_path):
    """Headers, flags and the processor."""
    facts = [build._surroundings.__wrapped__()]
    headers = tmp_path / "cpu"
    shutil.copytree(build.HEADERS, headers)
    (headers / "norm.h").write_text("// changed")
    for name, value in (
        ("HEADERS", headers),
        ("FLAGS", (*build.FLAGS, "-g")),
        ("_processor", lambda: "another one"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(build, name, value)
            facts.append(build._surroundings.__wrapped__())
    assert len(set(facts)) == len(facts)
