"""pytest-benchmark of choosing a Fisher mask, the k weights with the largest gradients, over BERT-base's parameters.

pytest bench/test_topk_mask.py --benchmark-only
"""

import pytest
import torch

from fsam_triton import FSAM
from fsam_triton.masks.selection import select_top_k

from .harness import Case
from .traffic import BF16, FP32
from .workloads import bert_base_shapes, make_parameters

KEEP_RATIO = 0.1


def radix_select(params, k):
    """Ours, over gradients in the layout of the lanes, into one bit a weight."""
    optimizer = FSAM(params, lr=1e-5)
    optimizer.ledger.refresh(optimizer.param_groups, optimizer.state)
    (lanes,) = optimizer.ledger
    scores = torch.zeros(lanes.plan.size, dtype=lanes.dtype, device=lanes.device)
    for i, p in enumerate(params):
        lanes.plan.part(scores, i).copy_(p.grad.view(-1))
    return lambda: select_top_k([(lanes, range(len(lanes)))], [scores], k)


def topk(params, k):
    """torch.topk of all magnitudes, flat before it is timed; no mask is made of its indices yet."""
    grad = torch.cat([p.grad.flatten() for p in params]).abs_()
    return lambda: torch.topk(grad, k, sorted=False)


@pytest.mark.parametrize("implementation", [radix_select, topk], ids=["fsam_triton", "torch.topk"])
@pytest.mark.parametrize("precision", [FP32, BF16], ids=lambda one: one.name)
def test_choice_of_a_mask(record, device, tiny, precision, implementation):
    shapes = bert_base_shapes()[-2:] if tiny else bert_base_shapes()
    weights = sum(torch.Size(shape).numel() for shape in shapes)
    k = int(KEEP_RATIO * weights)

    def build():
        params = make_parameters(shapes, precision.dtype, device=device)
        return implementation(params, k)

    name = "fsam_triton" if implementation is radix_select else "torch.topk"
    case = Case("masks", "choice of a tenth", name, "BERT-base", precision, weights, None, len(shapes))
    # Parameters and gradients, or the flat magnitudes that torch.topk is given.
    copies = 2 if implementation is radix_select else 1
    record(case, build, inputs=copies * weights * precision.bytes)
