"""The C++ of the dense passes is what the compiler vectorises; its numbers are held in fsam_triton/test_ops.py."""

import inspect
import shutil
import subprocess

import pytest
import torch

from fsam_triton.kernels import cpp, passes_cpu

N = 8
COEF, MASK = torch.zeros(13, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def calls(dtype: torch.dtype):
    """Passes without options, with one kind, and with all."""
    w, f = torch.zeros(N, dtype=dtype), torch.zeros(N)
    yield "perturb", lambda: passes_cpu.perturb_(w, w, w, None, COEF, False, True, False)
    yield "perturb all", lambda: passes_cpu.perturb_(w, w, w, MASK, COEF, True, True, True, True)
    flat = (w, w, w, w)
    yield "adamw", lambda: passes_cpu.adamw_l2sp_(*flat, None, w, None, None, COEF, True, False)
    yield "anchored", lambda: passes_cpu.adamw_l2sp_(*flat, None, w, None, w, COEF, True, False)
    yield "all", lambda: passes_cpu.adamw_l2sp_(*flat, w, w, None, w, COEF, True, True, w, True, True, f)
    if dtype != torch.float32:
        master = (w, w, f, f, f, None, f, w)
        yield "master all", lambda: passes_cpu.adamw_l2sp_(*master, COEF, True, True, w, False, True, f)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ says what it has vectorised")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loops_are_vectorized(dtype, monkeypatch, tmp_path):
    """A loop that is not takes ten times as long as the memory."""
    source = tmp_path / "pass.cpp"
    monkeypatch.setattr(passes_cpu, "_pass", passes_cpu._pass.__wrapped__)
    monkeypatch.setattr(passes_cpu, "library", lambda text: source.write_text(text) and passes_cpu)
    monkeypatch.setattr(passes_cpu, "perturb", None, raising=False)
    monkeypatch.setattr(passes_cpu, "adamw_l2sp", None, raising=False)
    monkeypatch.setattr(passes_cpu, "_run", lambda *args: None)
    # As torch.compile calls it: it vectorises by itself and tells the compiler not to.
    flags = ["-O3", "-march=native", "-std=c++20", "-fopenmp", "-fno-trapping-math", "-fno-tree-loop-vectorize"]
    command = ["g++", "-c", "-o", "pass.o", *flags, *cpp._FLAGS, "-fopt-info-vec-optimized", source.name]
    for name, call in calls(dtype):
        call()
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        vectorized = {line.split(": ")[0] for line in run.stderr.splitlines() if "loop vectorized" in line}
        assert len(vectorized) == source.read_text().count(" IN_ANY_ORDER\n"), name


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
def test_no_process_tries_out_vector_instructions(monkeypatch, tmp_path):
    """It takes seconds, and on a busy machine it fails, which made slow code of everything that was built then."""
    from torch._inductor import codecache

    if "needs_vec_isa" not in inspect.signature(codecache.CppCodeCache.load_async).parameters:
        pytest.skip("this torch always does")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(codecache, "pick_vec_isa", lambda: pytest.fail("they are tried out"))
    library = cpp.library.__wrapped__('extern "C" int answer() { return 42; }')
    assert library.answer() == 42
