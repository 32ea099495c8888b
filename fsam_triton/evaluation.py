"""What measuring a model takes: its trainable parameters, and eval mode for a while."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import Parameter

from .errors import check


def trainable_parameters(model: nn.Module) -> dict[str, Parameter]:
    """The parameters that require a gradient, by name (tied ones under their first name).

    Raises:
        ValueError: there is none, or one is not a whole tensor of this process alone.
    """
    replicas = isinstance(model, nn.parallel.DistributedDataParallel)
    check(not replicas, "model", type(model).__name__, "its .module is expected: each process has samples of its own")
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check(len(params) > 0, "model", type(model).__name__, "it has no parameter that requires a gradient")
    for name, p in params.items():
        local = not hasattr(p, "device_mesh") and not nn.parameter.is_lazy(p)
        check(local, f"model: parameter {name}", type(p).__name__, "parameters must be whole tensors")
    return params


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and uncompiled: what torch.compile made of it would hide the uses of parameters."""
    before = [(module, module.training) for module in model.modules()]
    compiling = "torch._dynamo" in sys.modules
    try:
        model.eval()
        with torch.compiler.set_stance("force_eager") if compiling else contextlib.nullcontext():
            yield
    finally:
        # Through train(), which some modules do more in than set the flag, and then module by module.
        model.train(before[0][1])
        for module, training in before:
            module.training = training
