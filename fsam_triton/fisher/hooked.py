"""The fast way to per-sample gradients: from a batch's own forward and backward pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeGuard, cast, overload

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import ArgumentError
from .gradients import Part, SharedLookup
from .objective import Batch, Objective, epsilon, tensors
from .rules import RULES


class HookedPasses(TorchFunctionMode):
    """Computes per-sample gradients from a batch's own activations and output gradients.

    While the model runs, every call of a torch function with a parameter as an argument is intercepted here. A function
    with a rule is called with a constant in the parameter's place, so that autograd does not compute its gradient, and
    a hook on its output computes the per-sample gradients in the backward pass. Modules do not matter, and neither does
    which module a parameter belongs to or how often it is used: the gradients of all uses are added before squaring.

    A parameter goes to `slow`, for `SlowPasses`, as soon as it has a use whose per-sample gradients cannot be derived
    here:

    - A function without a rule is called with an alias of the parameter; if its result requires a gradient, this is
      such a use.
    - Code that is no torch function (an autograd.Function, scripted modules, other threads) sees the parameter itself,
      which is then a leaf of the loss's graph: `leaves` finds it there. There is no third way for a use to change a
      gradient.
    - Rows must belong to single samples, in the order of the batch. If so, the loss of one sample gives no gradient to
      other samples' rows. This is tested with the first and the last sample, when a parameter is first used, and the
      first sample's loss is compared with that of the sample alone. Any other arrangement (positions before samples,
      samples that see each other) sends all parameters to the slow way, where each sample really is alone.
    """

    def __init__(self, params: Mapping[str, Tensor], fisher: Mapping[str, Tensor], objective: Objective) -> None:
        super().__init__()
        self.params: dict[int, Tensor] = {id(p): p for p in params.values()}
        self.fisher: dict[int, Tensor] = {id(p): fisher[name] for name, p in params.items()}
        self.objective = objective
        self.slow: set[int] = set()
        # Parameters with the ways of using them that were tried out; those of embeddings that all samples share.
        self.tried: set[tuple[int, int, bool]] = set()
        self.positional: set[int] = set()
        self.alone: int | None = None
        self.first: bool = True

    def add(self, model: nn.Module, batch: Batch) -> None:
        """Add the batch's statistics for all parameters that are not slow, after deciding which are."""
        if len(self.slow) == len(self.params):
            return
        if self.first:
            self.first = False
            try:
                # Three samples are enough to tell samples from positions by the first and the last, and cost little.
                self.run(model, batch[:3])
            except ArgumentError:
                raise
            except Exception:
                # A constant in a parameter's place is too much for some functions, as for checkpointed ones, which find
                # the parameter itself when they run again. If it is the model's own fault, the slow way will show it.
                self.slow |= self.params.keys()
                return
        losses, inputs = self.run(model, batch)
        for k in range(losses.shape[1]) if self.uses.keys() - self.slow and inputs else ():
            self.backward(losses[:, k].sum(), inputs)
            for key in list(self.parts):
                self.finish(key)

    def run(self, model: nn.Module, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Run the forward pass, and trial backward passes if a parameter is used in a new way.

        Returns:
            Losses, and the leaves of their graph.
        """
        self.size: int = batch.size
        self.known_slow: frozenset[int] = frozenset(self.slow)
        # How often each parameter is used, the ways, and embeddings that all samples share until they are added.
        self.uses: dict[int, int] = {}
        self.ways: set[tuple[int, int, bool]] = set()
        self.shared: dict[int, SharedLookup] = {}
        self.parts: dict[int, list[Part]] = {}
        with self:
            losses = self.objective(model(*batch.args, **batch.kwargs), batch)
        self.shared.clear()
        inputs = leaves(losses)
        self.slow |= {id(leaf) for leaf in inputs} & self.params.keys()
        new = {way for way in self.ways - self.tried if way[0] not in self.slow}
        self.tried |= new
        for i in {0, batch.size - 1} if new and inputs else ():
            self.alone = i
            self.backward(losses[i].sum(), inputs)
        self.alone = None
        if new and batch.size > 1 and not self.independent(model, batch[:1], losses.detach()):
            self.slow |= self.params.keys()
        return losses, inputs

    @torch.no_grad()
    def independent(self, model: nn.Module, first: Batch, losses: Tensor) -> bool:
        """Whether the first sample's losses are the same without the other samples, except for rounding.

        Gradients only show dependence between samples after the first parameter with a rule.
        """
        own = self.objective(model(*first.args, **first.kwargs), first)[0]
        tolerance = math.sqrt(epsilon(self.params.values())) * float(losses.abs().max())
        return bool(((own - losses[0]).abs() <= tolerance).all())

    @staticmethod
    def backward(loss: Tensor, inputs: list[Tensor]) -> None:
        """Run the hooks. No `.grad` is written: autograd.grad returns the gradients, which nobody needs."""
        torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)

    # -- forward pass --

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not any(self.special(x) for x in tensors((*args, *kwargs.values()))):
            return func(*args, **kwargs)
        rule = RULES.get(func) if torch.is_grad_enabled() else None
        result = NotImplemented if rule is None else rule(self, *args, **kwargs)
        return self.unknown(func, args, kwargs) if result is NotImplemented else result

    def special(self, x: object) -> TypeGuard[Tensor]:
        return id(x) in self.params or id(x) in self.shared

    @overload
    def constant(self, x: Tensor) -> Tensor: ...
    @overload
    def constant(self, x: Tensor | None) -> Tensor | None: ...
    def constant(self, x: Tensor | None) -> Tensor | None:
        return x.detach() if self.special(x) else x

    def unknown(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that has no rule; its parameters are slow if they affect a result's gradient."""
        taken: set[int] = set()
        aliases: dict[int, Tensor] = {}

        def alias(x: Any) -> Any:
            if id(x) in self.shared:
                taken.add(self.shared[id(x)].key)
            if id(x) not in self.params:
                return x
            taken.add(id(x))
            own = x.detach().requires_grad_(id(x) not in self.known_slow)
            aliases[id(own)] = x
            return own

        args, kwargs = tree_map(alias, (args, kwargs))
        # A function that returns its argument, as Tensor.to may, is no use yet.
        result = tree_map(lambda x: aliases.get(id(x), x), func(*args, **kwargs))
        if torch.is_grad_enabled():
            used = (x for x in tree_leaves(result) if isinstance(x, Tensor) and not self.special(x))
            if any(x.requires_grad for x in used):
                self.slow |= taken
        return result

    def splits(self, rows: torch.Size) -> bool:
        """Whether dimensions that count rows can be the samples' rows, sample by sample."""
        return math.prod(rows) > 0 and math.prod(rows) % self.size == 0

    def record(self, output: Tensor, row_dims: int, *uses: tuple[Tensor | None, Callable[[Tensor], Part]]) -> Tensor:
        """Attach to a function's output, whose first dimensions count rows, a hook that computes a parameter's part."""
        makers = [(id(p), make) for p, make in uses if id(p) in self.params and id(p) not in self.slow]
        if not makers:
            return output
        if not output.requires_grad:
            # The first layer's. A leaf must not be changed in place, a copy may.
            output = output.detach().requires_grad_().clone()
        for key, _ in makers:
            self.uses[key] = self.uses.get(key, 0) + 1
            self.ways.add((key, row_dims, self.size > 1))
        output.register_hook(functools.partial(self.receive, row_dims, makers))
        return output

    # -- backward pass --

    def by_sample(self, x: Tensor, row_dims: int) -> Tensor:
        return x.reshape(self.size, -1, *x.shape[row_dims:])

    @torch.no_grad()
    def receive(self, row_dims: int, makers: list[tuple[int, Callable[[Tensor], Part]]], grads: Tensor) -> None:
        """A hook: per-sample gradients of an output have arrived."""
        makers = [(key, make) for key, make in makers if key not in self.slow]
        grads = self.by_sample(grads.detach(), row_dims)
        if self.alone is not None:
            if makers and (grads[: self.alone].any() or grads[self.alone + 1 :].any()):
                self.slow |= self.params.keys()
            return
        with torch.autocast(grads.device.type, enabled=False):
            for key, make in makers:
                parts = self.parts.setdefault(key, [])
                parts.append(make(grads))
                if len(parts) == self.uses[key]:
                    self.finish(key)

    def finish(self, key: int) -> None:
        """Add the statistics of a parameter whose uses have all given their parts."""
        parts, fisher = self.parts.pop(key), self.fisher[key]
        if len({type(part) for part in parts}) == 1:
            merge = cast("Callable[[list[Part]], Part]", type(parts[0]).merge)
            part = parts[0] if len(parts) == 1 else merge(parts)
            return part.add_to(fisher, self.objective)
        for i in range(self.size):
            gradient = functools.reduce(torch.add, [part.gradient(i, fisher) for part in parts])
            fisher += self.objective.statistic(gradient)


def leaves(loss: Tensor) -> list[Tensor]:
    """The leaves of a tensor's autograd graph."""
    found, seen, stack = [], set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            # torch's stubs lack this class.
            found.append(cast("Any", node).variable)
        stack.extend(following for following, _ in node.next_functions)
    return found
