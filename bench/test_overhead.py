"""pytest-benchmark of a step's costs other than memory traffic: the host's work, and the first step of a process.

pytest bench/test_overhead.py --benchmark-only
"""

import os
import subprocess
import sys

import pytest
import torch

from .harness import Case
from .traffic import FP32
from .workloads import IMPLEMENTATIONS, MODELS, make_parameters

COMPARED = [one for one in IMPLEMENTATIONS if one.name in ("FSAM", "eager SAM over fused AdamW", "AdamWL2SP")]
# As many as MiniLM has, and many.
TENSORS = (len(MODELS["MiniLM"]()), 1000, 3000)
# A process that takes one SAM step, or none.
IMPORTS = "import torch, fsam_triton"
FIRST_STEP = """
weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
weight.grad = torch.ones_like(weight)
optimizer = fsam_triton.FSAM([weight], lr=1e-5)
optimizer.perturb()
weight.grad = torch.ones_like(weight)
optimizer.step()
"""


@pytest.mark.parametrize("implementation", COMPARED, ids=lambda one: one.name)
@pytest.mark.parametrize("tensors", TENSORS)
def test_work_of_the_host(record, device, tensors, implementation):
    """Tensors of one weight each: next to nothing for the device to do."""

    def build():
        return implementation.build(make_parameters([(1,)] * tensors, FP32.dtype, device=device), FP32)

    model = f"{tensors:,} tensors"
    case = Case("host", implementation.algorithm, implementation.name, model, FP32, tensors, None, tensors)
    record(case, build, rounds=200 if tensors <= 1000 else 50)


@pytest.mark.parametrize("cache", ["imports alone", "warm cache", "cold cache"])
def test_first_step_of_a_process(benchmark, device, tmp_path, cache):
    """A process with everything imported, and one that also takes a bf16 SAM step, compiled before or not."""
    if device == "cuda":
        pytest.skip("what is compiled here is the C++ of a CPU")
    code = IMPORTS if cache == "imports alone" else IMPORTS + FIRST_STEP
    folders = [str(tmp_path / ("once" if cache == "warm cache" else str(i))) for i in range(3)]

    def run():
        environment = {**os.environ, "XDG_CACHE_HOME": folders.pop()}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)

    benchmark.group = "first step"
    benchmark.pedantic(run, rounds=2, warmup_rounds=1)
    benchmark.extra_info.update(
        suite="first_step",
        subject="a process",
        implementation=cache,
        model="-",
        precision="bf16",
        device=device,
        weights=4096,
        tensors=1,
        held_bytes=0,
        peak_bytes=0,
        rates=[],
        threads=torch.get_num_threads(),
    )
