"""Modules whose state_dict() shows the clean weights while an optimizer keeps their parameters perturbed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import Parameter

from .sharded import local

if TYPE_CHECKING:
    from .state import FlatState


class ShowClean:
    """A state_dict hook that replaces an optimizer's perturbed parameters by their clean values.

    An object, not a closure, so that modules can still be pickled and copied; the hook of a copy does nothing.
    """

    def __init__(self, optimizer: FlatState | None = None) -> None:
        self.optimizer = (lambda: None) if optimizer is None else weakref.ref(optimizer)
        # What is shown for a parameter, while somebody has it.
        self._shown: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict) -> None:
        if (optimizer := self.optimizer()) is None:
            return
        for name, p in module._parameters.items():
            shown = state_dict.get(prefix + name)
            # With keep_vars=True the parameter itself is wanted.
            if shown is not None and shown is not p and (clean := optimizer.clean_weight(p)) is not None:
                # A tied parameter shares one storage in the state dict too, so that it is saved once.
                if (before := self._shown.get(id(p))) is None or local(before).data_ptr() != local(clean).data_ptr():
                    self._shown[id(p)] = before = clean
                state_dict[prefix + name] = before

    def __reduce__(self) -> tuple:
        return ShowClean, ()


def show_clean(optimizer: FlatState, params: Iterable[Parameter]) -> None:
    """Hook the modules that own the parameters: their state_dict() shows clean weights from now on.

    An optimizer is given parameters, not modules. The garbage collector knows the modules too, unless they were hidden
    from it (gc.freeze). A hook on forward passes would come too late for a model that is loaded and saved again, or
    whose parts are called one by one, and torch.compile would trace it.
    """
    show, params = ShowClean(optimizer), set(params)
    for module in gc.get_objects():
        # isinstance would ask the object, which may be a proxy.
        if issubclass(type(module), nn.Module):
            owned = module.__dict__.get("_parameters", {}).values()
            if not params.isdisjoint(p for p in owned if p is not None):
                module.register_state_dict_post_hook(show)
