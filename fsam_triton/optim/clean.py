"""Modules show the clean weights of parameters that an optimizer has perturbed for a while."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

from torch import Tensor, nn
from torch.nn import Parameter

from ..buffers.sharded import is_sharded
from ..errors import warn

if TYPE_CHECKING:
    from ..buffers.ledger import Ledger


class CleanView:
    """While it is open, `state_dict()` of the modules that own some parameters shows their clean weights.

    Opened when the parameters are perturbed and closed when they are restored, so that a module that is saved as a
    whole has nothing of it. One that is copied or pickled in between is refused: the copy would be perturbed for ever.

    An optimizer is given parameters, not modules. The garbage collector knows the modules too, unless they were hidden
    from it (gc.freeze); and a module that is called can be told.
    """

    def __init__(self) -> None:
        self._owners: dict[int, weakref.ref[nn.Module]] = {}
        # The ids of the parameters that modules were seen to own. A weak reference would keep torch from swapping them.
        self._owned: set[int] = set()
        # Of the ledger for whose parameters `check_seen` was asked last.
        self._seen_at = 0
        self._learned: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._handles: list[Any] = []
        # Of the ledger whose parameters have been looked for.
        self._generation = 0
        self._finalizer: weakref.finalize[[], Ledger] | None = None

    def find(self, params: Iterable[Parameter]) -> None:
        """Look for the modules that own these parameters."""
        params = set(params)
        for module in gc.get_objects():
            # isinstance would ask the object, which may be a proxy.
            if issubclass(type(module), nn.Module) and (own := params.intersection(_own(module))):
                self._owners[id(module)] = weakref.ref(module)
                self._owned.update(map(id, own))

    def learn(self, module: nn.Module) -> None:
        """Know a module and what is in it."""
        if module not in self._learned:
            self._owners |= {id(part): weakref.ref(part) for part in module.modules() if _own(part)}
            self._learned.add(module)

    def check_seen(self, ledger: Ledger, groups: Iterable[Mapping[str, Any]]) -> None:
        """Refuse parameters that no forward pass sees: somebody has put others into the groups than modules have.

        Raises:
            RuntimeError: modules owned some of the parameters there were, and own none of those of the groups.
        """
        if ledger.generation == self._seen_at:
            return
        if self._owned:
            params = [p for group in groups for p in group["params"]]
            if not any(map(self._is_owned, params)):
                self.find(params)
                if not any(map(self._is_owned, params)):
                    raise RuntimeError(_UNSEEN)
        self._seen_at = ledger.generation

    def _is_owned(self, p: Parameter) -> bool:
        # FSDP2's modules have other parameters for the time that theirs are gathered.
        return is_sharded(p) or id(p) in self._owned

    def open(self, ledger: Ledger) -> None:
        """Show clean weights from now on."""
        if ledger.generation != self._generation:
            params = {p for lanes in ledger for p in lanes.params}
            self.find(params)
            self._learned.clear()
            self._generation = ledger.generation
            if gc.get_freeze_count():
                self._warn_of_hidden_modules(params)
        if self._finalizer is None:
            # Garbage in a reference cycle could not take its hooks away by itself.
            self._finalizer = weakref.finalize(ledger, self.close)
        hook = _ShowClean(ledger)
        # Not by the module's own method, which a scripted module does not have.
        self._handles = [nn.Module.register_state_dict_post_hook(module, hook) for module in self._modules()]

    def _modules(self) -> list[nn.Module]:
        return [module for ref in self._owners.values() if (module := ref()) is not None]

    def _warn_of_hidden_modules(self, params: set[Parameter]) -> None:
        if not params.issubset(p for module in self._modules() for p in _own(module)):
            warn(
                "gc.freeze() has hidden the modules of some parameters: their state_dict() between perturb() and "
                "step() shows perturbed weights; make the optimizer before it",
                RuntimeWarning,
            )

    def close(self) -> None:
        """Show parameters as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


_UNSEEN = (
    "the parameters in the optimizer's groups were replaced by tensors that no module has (as DeepSpeed does with ZeRO "
    "and in 16 bits), so the model would not see them perturbed: use DistributedDataParallel or FSDP2 (fully_shard), "
    "or AdamWL2SP in DeepSpeed"
)


class _ShowClean:
    """A state_dict hook that replaces perturbed parameters by their clean values."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = weakref.ref(ledger)
        # What is shown for a parameter, while somebody has it.
        self._shown: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def __call__(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
    ) -> None:
        if (ledger := self._ledger()) is None:
            return
        for name, p in module._parameters.items():
            shown = state_dict.get(prefix + name)
            # With keep_vars=True the parameter itself is wanted.
            if p is None or shown is None or shown is p:
                continue
            if (clean := ledger.clean_weight(p)) is not None:
                # A tied parameter shares one storage in the state dict too, so that it is saved once.
                before = self._shown.get(id(p))
                if before is None or (before.dtype, before.device) != (clean.dtype, clean.device):
                    self._shown[id(p)] = before = clean
                state_dict[prefix + name] = before

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise RuntimeError(
            "the model's weights are perturbed: call step() or restore() of the optimizer before copying or pickling it"
        )


def _own(module: nn.Module) -> list[Parameter]:
    """The parameters that a module has itself."""
    return [p for p in module.__dict__.get("_parameters", {}).values() if p is not None]
