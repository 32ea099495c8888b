"""What the tests of ESAM share."""

import pytest
from torch import Tensor, nn

from fsam_triton import FSAM, FisherMask
from tests.fp64_optimizers import ReferenceMask
from tests.training import weights_of

MASK = {"mask": FisherMask(0.3, interval=5)}
REFERENCE_MASK = {"mask": ReferenceMask(0.3, interval=5)}
BOTH_MASKS = pytest.mark.parametrize(
    ("ours", "theirs"), [({}, {}), (MASK, REFERENCE_MASK)], ids=["esam", "fisher_esam"]
)


def moved_by_perturb(model: nn.Module, optimizer: FSAM) -> list[Tensor]:
    before = weights_of(model)
    optimizer.perturb()
    return [p.detach() != w for p, w in zip(model.parameters(), before, strict=True)]
