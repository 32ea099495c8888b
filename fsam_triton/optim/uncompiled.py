"""What torch.compile leaves alone, without importing torch.compile where nobody compiles anything."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch._C._dynamo import eval_frame
from torch.optim import Optimizer

F = TypeVar("F", bound=Callable[..., Any])


def skip(function: Callable[..., Any]) -> None:
    """Have torch.compile not compile a function by itself, though it may be a part of what calls it."""
    strategy = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)
    eval_frame.set_code_exec_strategy(function.__code__, strategy)


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

    skip(call)
    return cast("F", call)


# Optimizer's own methods, which import torch.compile.
add_param_group: Callable[[Optimizer, dict[str, Any]], None] = uncompiled(inspect.unwrap(Optimizer.add_param_group))
state_dict: Callable[[Optimizer], dict[str, Any]] = uncompiled(inspect.unwrap(Optimizer.state_dict))
zero_grad: Callable[[Optimizer, bool], None] = uncompiled(inspect.unwrap(Optimizer.zero_grad))
