"""What torch.compile leaves alone, without importing torch.compile where nobody compiles anything."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """`torch.compiler.disable`, once torch.compile is there: importing it takes seconds and a cache folder."""
    disabled = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return call


# Optimizer's own methods, which import torch.compile.
add_param_group = uncompiled(inspect.unwrap(Optimizer.add_param_group))
state_dict = uncompiled(inspect.unwrap(Optimizer.state_dict))
zero_grad = uncompiled(inspect.unwrap(Optimizer.zero_grad))
