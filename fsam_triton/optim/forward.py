"""ForwardWatch: tells an optimizer that a forward pass through its parameters begins."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook


class ForwardWatch:
    """Calls `begin(optimizer, training)` before the outermost module that has some of its parameters is evaluated.

    By PyTorch's hook for all modules, because an optimizer is given parameters, not modules. The hook is taken away
    during that evaluation, so that inner modules are not slowed down and torch.compile does not see it, and nothing is
    left in the modules, which can be pickled.

    Args:
        optimizer: only a weak reference is kept.
        owns: whether a module has any of the optimizer's parameters that `begin` would move.
        begin: `training` says whether the module is in training mode and gradients are recorded.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        owns: Callable[[Any, nn.Module], bool],
        begin: Callable[[Any, bool], None],
    ) -> None:
        self._optimizer, self._owns, self._begin = weakref.ref(optimizer), owns, begin
        self._handle: Any = None
        weakref.finalize(optimizer, self.stop)

    def start(self) -> None:
        """Watch from now on."""
        if self._handle is None:
            self._handle = register_module_forward_pre_hook(self._called)

    def stop(self) -> None:
        """Watch no longer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @torch._disable_dynamo
    def _called(self, module: nn.Module, args: Any) -> None:
        optimizer = self._optimizer()
        if optimizer is None or not self._owns(optimizer, module):
            return
        self._begin(optimizer, module.training and torch.is_grad_enabled())
        if not isinstance(module, torch.jit.ScriptModule):
            self.stop()
            ended: list[Any] = []

            def end(*_: Any) -> None:
                ended[0].remove()
                if self._optimizer() is not None:
                    self.start()

            ended.append(module.register_forward_hook(end, always_call=True))
