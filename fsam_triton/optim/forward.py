"""ForwardWatch: tells an optimizer that a forward pass through its parameters begins."""

from __future__ import annotations

import ctypes
import functools
import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.nn import Parameter
from torch.nn.modules import module as modules
from torch.utils.hooks import RemovableHandle

from ..buffers.sharded import is_sharded, owners_of
from .uncompiled import skip, uncompiled


class ForwardWatch:
    """Notices when the outermost module that has some of an optimizer's trained parameters is evaluated.

    By PyTorch's hook for all modules, because an optimizer is given parameters, not modules. The hook is taken away
    during that evaluation, so that inner modules are not slowed down and torch.compile does not see it, and nothing is
    left in the modules, which can be pickled.

    Args:
        optimizer: only a weak reference is kept.
        begin: called with the optimizer, the module, and whether it is in training mode and gradients will be needed;
            returns what to call after the evaluation, or None.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        begin: Callable[[Any, nn.Module, bool], Callable[[], None] | None],
    ) -> None:
        self._optimizer, self._begin = weakref.ref(optimizer), begin
        # The same whenever the hooks come back: for another one torch.compile would compile again.
        self._number = RemovableHandle(OrderedDict()).id
        # What is evaluated, from its beginning to its end, and what is to be called then.
        self._outermost: weakref.ref[nn.Module] | None = None
        self._afterwards: Callable[[], None] | None = None
        self._params: set[Parameter] = set()
        # FSDP2's modules have other parameters for the time that theirs are gathered.
        self._gatherers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._strangers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._finalizer = weakref.finalize(optimizer, self.stop)
        _silence_compiler()

    def expect(self, groups: list[dict[str, Any]]) -> None:
        """Watch for the parameters of these groups."""
        self._params = {p for group in groups for p in group["params"]}
        self._gatherers = weakref.WeakSet(owners_of(filter(is_sharded, self._params)).values())
        self._strangers.clear()

    def start(self) -> None:
        """Watch from now on, also if an evaluation that was noticed is still under way."""
        self.stop()
        if self._finalizer.alive:
            modules._global_forward_pre_hooks[self._number] = self._called

    def stop(self) -> None:
        """Watch no longer."""
        modules._global_forward_pre_hooks.pop(self._number, None)
        module = None if self._outermost is None else self._outermost()
        if module is not None:
            module._forward_hooks.pop(self._number, None)
            module._forward_hooks_always_called.pop(self._number, None)
        self._outermost = self._afterwards = None

    def _called(self, module: nn.Module, args: Any) -> None:
        # Within a graph of torch.compile the modules of others are as if there was no hook, and ours break it.
        if not torch.compiler.is_dynamo_compiling() or self._owns_at(id(module)):
            self._noticed(module)

    # A graph of it alone would be taken for other optimizers and modules.
    skip(_called)

    def _owns(self, module: nn.Module) -> bool:
        if module in self._strangers:
            return False
        if self._gatherers and not self._gatherers.isdisjoint(module.modules()):
            return True
        is_stranger = True
        for p in module.parameters():
            if p in self._params:
                if p.requires_grad:
                    return True
                is_stranger = False
            elif not isinstance(p, Parameter):
                # torch.func.functional_call has put it into the place of a parameter for the moment.
                is_stranger = False
        if is_stranger:
            self._strangers.add(module)
        return False

    def _owns_at(self, address: int) -> bool:
        """`_owns` of the module with this `id`: to torch before 2.13, a module is no constant."""
        return self._owns(ctypes.cast(address, ctypes.py_object).value)

    # For torch.compile a constant, as by torch.compiler.assume_constant_result, which would import the compiler.
    _owns_at.__dict__["_dynamo_marked_constant"] = True

    @uncompiled
    def _noticed(self, module: nn.Module) -> None:
        optimizer = self._optimizer()
        if optimizer is None or not self._owns(module):
            return
        will_train = module.training and (torch.is_grad_enabled() or _is_in_autograd_function())
        afterwards = self._begin(optimizer, module, will_train)
        self.stop()
        self._outermost, self._afterwards = weakref.ref(module), afterwards
        module._forward_hooks[self._number] = self._ended
        module._forward_hooks_always_called[self._number] = True

    @uncompiled
    def _ended(self, *_: Any) -> None:
        afterwards = self._afterwards
        self.start()
        if afterwards is not None:
            afterwards()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        # Its hook is in a module only then, for good if the evaluation was interrupted.
        raise RuntimeError(
            "a forward pass of the model is under way, or was interrupted: call restore() of the optimizer before "
            "copying or pickling it"
        )


@functools.cache
def _silence_compiler() -> None:
    """Drop what torch.compile(model) says of hooks that see its wrapper, too. Filters of others come first."""
    warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global hooks", append=True)


def _is_in_autograd_function() -> bool:
    """Whether the forward of an autograd function runs, as that of reentrant activation checkpointing.

    Gradients are off there, but its backward evaluates the same modules again, with gradients.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        is_named_so = code.co_name == "forward" and code.co_argcount > 0
        if is_named_so and isinstance(frame.f_locals.get(code.co_varnames[0]), FunctionCtx):
            return True
        frame = frame.f_back
    return False
