"""Which implementation computes a pass: C++ on CPU tensors, the reference without a compiler; and none needs Triton."""

import inspect
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

from fsam_triton import FSAM, FisherMask, ops
from fsam_triton.kernels import build, cpu, reference
from fsam_triton.kernels.segments import Plan, Segments

pytestmark = pytest.mark.skipif(ops.interpreting(), reason="the interpreter takes the place of the compiled passes")
needs_compiler = pytest.mark.skipif(not build.available(), reason="needs a C++ compiler")


def train(dtype=torch.float32, mask=None, lrs=(1e-3,) * 3, rho=0.05) -> list[float]:
    """Weights after some steps on the sum of cubes."""
    weight = torch.nn.Parameter((torch.arange(1, 601) / 100).view(20, 30).to(dtype))
    optimizer = FSAM([("weight", weight)], rho=rho, mask=mask, stochastic_rounding=False)

    def closure():
        optimizer.zero_grad()
        loss = weight.pow(3).sum()
        loss.backward()
        return loss

    for lr in lrs:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step(closure)
        optimizer.param_groups[0]["rho"] *= 0.9
    return weight.detach().double().flatten().tolist()


# -- CPU tensors -------------------------------------------------------------------------------------------------------

PASSES = ("norm_sq", "gap", "perturb_", "descend_", "digit_histogram", "write_mask_", "gather_", "scatter_")


def arguments(name: str) -> tuple:
    tensors = [torch.ones(3)]
    if name in ("norm_sq", "gap", "perturb_", "descend_"):
        return (Segments(Plan([3], torch.device("cpu")), tensors, tensors),)
    return (tensors,) if name == "scatter_" else (tensors[0],)


@needs_compiler
@pytest.mark.parametrize("name", PASSES)
def test_cpu_tensors_go_through_cpp(name, monkeypatch):
    given = arguments(name)
    monkeypatch.setattr(cpu, name, lambda *args: ("C++", args))
    assert getattr(ops, name)(*given) == ("C++", given)


@pytest.mark.parametrize("name", PASSES)
def test_without_cpp_the_reference_computes(name, monkeypatch):
    given = arguments(name)
    monkeypatch.setattr(build, "available", lambda: False)
    monkeypatch.setattr(reference, name, lambda *args: ("PyTorch", args))
    assert getattr(ops, name)(*given) == ("PyTorch", given)


@needs_compiler
@pytest.mark.parametrize("mask", [None, FisherMask(0.5)], ids=["sam", "fisher_sam"])
def test_schedules_of_lr_and_rho_compile_nothing(mask, monkeypatch):
    train(mask=mask, lrs=[1e-3])
    monkeypatch.setattr(build, "library", lambda text: pytest.fail("compiles"))
    train(mask=mask, lrs=[1e-3 / (1 + step) for step in range(5)])


# -- machines without --------------------------------------------------------------------------------------------------


def in_new_process(code: str, **env: str) -> dict:
    """What the code printed last, as JSON."""
    program = f"{inspect.getsource(train)}\n{code}"
    header = "import json, sys, warnings\nimport torch\nfrom fsam_triton import FSAM, FisherMask\n"
    if "BLOCKED" in env:
        header = f"import sys\nsys.modules[{env.pop('BLOCKED')!r}] = None\n" + header
    command = [sys.executable, "-c", header + program]
    run = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def assert_few_ulps_apart(actual: list[float], expected: list[float], steps: int) -> None:
    """Three steps of at most 1e-3: one rounding of the weight each, and PyTorch's square root of an update."""
    tolerance = 2 * steps * torch.finfo(torch.float32).eps
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=tolerance, atol=1e-9)


@pytest.mark.slow
def test_without_a_compiler_it_warns_once_and_computes_the_same(tmp_path):
    code = """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    result = {"sam": train(), "fisher_sam": train(mask=FisherMask(0.5)), "bf16": train(torch.bfloat16)}
texts = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
print(json.dumps({**result, "warnings": texts}))
"""
    result = in_new_process(code, CXX=str(tmp_path / "no_such_compiler"))
    assert len(result["warnings"]) == 1
    assert "C++ compiler" in result["warnings"][0]
    assert_few_ulps_apart(result["sam"], train(), steps=3)
    assert_few_ulps_apart(result["fisher_sam"], train(mask=FisherMask(0.5)), steps=3)


@needs_compiler
def test_with_a_compiler_it_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train()


@pytest.mark.slow
def test_without_triton_it_computes_the_same():
    code = """
try:
    import triton
except ImportError:
    print(json.dumps({"sam": train(), "fisher_sam": train(mask=FisherMask(0.5))}))
"""
    result = in_new_process(code, BLOCKED="triton")
    assert result == {"sam": train(), "fisher_sam": train(mask=FisherMask(0.5))}


@pytest.mark.slow
def test_importing_it_does_not_import_the_triton_kernels():
    code = "print(json.dumps([name for name in sys.modules if name.startswith('fsam_triton.kernels.')]))"
    needs_no_triton = {"build", "cpu", "directions", "formats", "formulas", "jobs", "reference", "segments", "spec"}
    assert set(in_new_process(code)) <= {f"fsam_triton.kernels.{name}" for name in needs_no_triton}
