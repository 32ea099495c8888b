"""Optimizers of torch.optim that tests wrap in `SAM`, and a model that each of them can train."""

import pytest
import torch
from torch import nn

from tests.problem import small_model

BASES = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "fused adamw": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.001),
    "nadam": lambda params: torch.optim.NAdam(params, lr=0.01),
}
if hasattr(torch.optim, "Muon"):
    BASES["muon"] = lambda params: torch.optim.Muon(params, lr=0.01)
every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())


def matrices_of(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.ParameterDict:
    """Two matrices, which Muon can train too."""
    model = small_model(dtype, seed)
    return nn.ParameterDict({"a": model["dense"].weight, "b": model["head"].weight})
