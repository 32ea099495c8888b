"""pytest-benchmark of whole optimizer steps over real models' parameters: ours and the alternatives that people use.

pytest bench/test_sam_step.py --benchmark-only [-k "MiniLM and fp32"]
"""

import math

import pytest

from .harness import Case
from .traffic import ALL, BF16, STEPS
from .workloads import IMPLEMENTATIONS, MODELS, is_installed, make_parameters

CASES = [
    pytest.param(model, precision, implementation, id=f"{model}-{precision.name}-{implementation.name}")
    for model in MODELS
    for precision in ALL
    for implementation in IMPLEMENTATIONS
    if precision in implementation.precisions and (model != "TinyLlama-1.1B" or precision == BF16)
]


@pytest.mark.parametrize(("model", "precision", "implementation"), CASES)
def test_step(record, device, tiny, model, precision, implementation):
    if not is_installed(implementation.package):
        pytest.skip(f"{implementation.package} is not installed")
    shapes = MODELS[model]()
    if tiny:
        shapes = [tuple(min(extent, 32) for extent in shape) for shape in shapes[:9]]
    weights = sum(map(math.prod, shapes))

    def build():
        params = make_parameters(shapes, precision.dtype, device=device, period=1 << 20)
        return implementation.build(params, precision)

    case = Case(
        "steps",
        implementation.algorithm,
        implementation.name,
        model,
        precision,
        weights,
        STEPS[implementation.algorithm](precision),
        len(shapes),
    )
    record(case, build, inputs=2 * weights * precision.bytes, room=implementation.room(weights, precision))
