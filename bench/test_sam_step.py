"""pytest-benchmark of a whole SAM step over BERT-base's parameters, ours and others.

pytest bench/test_sam_step.py --benchmark-only --benchmark-group-by=param:dtype
"""

import pytest
import torch

from .workloads import bert_base_shapes, sam_steps

# A quarter of the layers: enough to be far larger than the caches.
SHAPES = bert_base_shapes()[:53]
NAMES = (
    "fsam_triton",
    "fsam_triton, fp32 master weights",
    "fsam_triton, round to nearest",
    "eager SAM over fused AdamW",
    "eager SAM over foreach AdamW",
    "pytorch_optimizer SAM over fused AdamW",
)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def steps(request):
    return sam_steps(request.param, SHAPES)


@pytest.mark.parametrize("implementation", NAMES)
def test_sam_step(benchmark, steps, implementation):
    if implementation not in steps:
        pytest.skip(f"{implementation}: not installed, or fp32 weights need none")
    benchmark.extra_info["weights"] = sum(torch.Size(shape).numel() for shape in SHAPES)
    benchmark.pedantic(steps[implementation], rounds=5, warmup_rounds=2)
