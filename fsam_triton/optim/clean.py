"""Modules show the clean weights of parameters that an optimizer has perturbed for a while."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import Parameter

from ..buffers.sharded import local

if TYPE_CHECKING:
    from ..buffers.ledger import Ledger


class CleanView:
    """While it is open, `state_dict()` of the modules that own some parameters shows their clean weights.

    Opened when the parameters are perturbed and closed when they are restored, so that a module that is saved as a
    whole has nothing of it. One that is copied or pickled in between is refused: the copy would be perturbed for ever.

    An optimizer is given parameters, not modules. The garbage collector knows the modules too, unless they were hidden
    from it (gc.freeze) before the optimizer was made.
    """

    def __init__(self) -> None:
        self._owners: dict[int, weakref.ref[nn.Module]] = {}
        self._known: set[Parameter] = set()
        self._handles: list[Any] = []

    def find(self, params: Iterable[Parameter]) -> None:
        """Look for the modules that own parameters which no known module owns."""
        params = {p for p in params if p not in self._known}
        if not params:
            return
        for module in gc.get_objects():
            # isinstance would ask the object, which may be a proxy.
            if issubclass(type(module), nn.Module):
                self.add(module, params)
        self._known.update(params)

    def add(self, module: nn.Module, params: set[Parameter]) -> None:
        """Note a module if it owns one of the parameters."""
        owned = module.__dict__.get("_parameters", {}).values()
        if not params.isdisjoint(p for p in owned if p is not None):
            self._owners[id(module)] = weakref.ref(module)

    def open(self, ledger: Ledger) -> None:
        """Show clean weights from now on."""
        self.find(p for lanes in ledger for p in lanes.params)
        hook = _ShowClean(ledger)
        self._handles = [
            module.register_state_dict_post_hook(hook) for ref in self._owners.values() if (module := ref()) is not None
        ]

    def close(self) -> None:
        """Show parameters as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _ShowClean:
    """A state_dict hook that replaces perturbed parameters by their clean values."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = weakref.ref(ledger)
        # What is shown for a parameter, while somebody has it.
        self._shown: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict) -> None:
        if (ledger := self._ledger()) is None:
            return
        for name, p in module._parameters.items():
            shown = state_dict.get(prefix + name)
            # With keep_vars=True the parameter itself is wanted.
            if shown is not None and shown is not p and (clean := ledger.clean_weight(p)) is not None:
                # A tied parameter shares one storage in the state dict too, so that it is saved once.
                before = self._shown.get(id(p))
                if before is None or (local(before).data_ptr() != local(clean).data_ptr() and clean.shape != p.shape):
                    self._shown[id(p)] = before = clean
                state_dict[prefix + name] = before

    def __reduce_ex__(self, protocol: int) -> tuple:
        raise RuntimeError(
            "the model's weights are perturbed: call step() or restore() of the optimizer before copying or pickling it"
        )


def warn_of_hidden_modules() -> None:
    """Say that modules may exist that nobody can find."""
    if gc.get_freeze_count():
        warnings.warn(
            "gc.freeze() has hidden modules: state_dict() between perturb() and step() may show perturbed weights",
            RuntimeWarning,
            stacklevel=3,
        )
