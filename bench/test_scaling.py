"""pytest-benchmark of SAM steps over more and more weights, and over the same weights in more and more tensors.

pytest bench/test_scaling.py --benchmark-only
"""

import pytest

from .harness import Case
from .traffic import BF16, FP32, sam_step
from .workloads import IMPLEMENTATIONS, make_parameters

COMPARED = [one for one in IMPLEMENTATIONS if one.name in ("FSAM", "eager SAM over fused AdamW")]
WEIGHTS = (10**6, 4 * 10**6, 16 * 10**6, 64 * 10**6, 256 * 10**6, 10**9)
TENSORS = (10, 30, 100, 300, 1000, 3000)
# All tensors together, few enough for the work of the host to show.
TOTAL = 3_000_000


def record_step(record, suite, implementation, precision, device, size, tensors):
    def build():
        params = make_parameters([(size,)] * tensors, precision.dtype, device=device, period=1 << 20)
        return implementation.build(params, precision)

    weights = size * tensors
    model = f"{tensors} x {size}"
    case = Case(suite, "SAM", implementation.name, model, precision, weights, sam_step(precision), tensors)
    record(case, build, inputs=2 * weights * precision.bytes, room=implementation.room(weights, precision))


@pytest.mark.parametrize("implementation", COMPARED, ids=lambda one: one.name)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_cost_of_weights(record, device, tiny, weights, implementation):
    record_step(record, "sizes", implementation, BF16, device, weights // 10**5 if tiny else weights, 1)


@pytest.mark.parametrize("implementation", COMPARED, ids=lambda one: one.name)
@pytest.mark.parametrize("tensors", TENSORS)
def test_cost_of_tensors(record, device, tiny, tensors, implementation):
    record_step(record, "tensors", implementation, FP32, device, 1 if tiny else TOTAL // tensors, tensors)
