"""The slow way to per-sample gradients, for any parameter: each sample by itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from .objective import Batch, Objective, epsilon, tensors, wide

# Elements of per-sample gradients that may be in memory at a time.
ELEMENTS = 1 << 26


class SlowPasses:
    """Per-sample gradients of any parameter: a forward and a backward pass for each sample by itself.

    torch.func.vmap runs them for several samples at once. Models that it cannot handle (control flow that depends on
    data, functions without a batching rule) are run one sample at a time. Because vmap cannot see parameters that a
    module holds outside the tree of modules, its result is first compared with autograd's on one sample.
    """

    def __init__(
        self, model: nn.Module, params: Mapping[str, Tensor], fisher: dict[str, Tensor], objective: Objective
    ) -> None:
        self.model = model
        self.params = params
        self.fisher = fisher
        self.objective = objective
        # The parameters that vmap was compared for, and whether it was right.
        self.names: list[str] = []
        self.vectorised: bool = False

    def add(self, names: list[str], batch: Batch) -> None:
        """Add the batch's statistics for the parameters of these names."""
        if not names:
            return
        if names != self.names:
            self.names, self.vectorised = names, self.agree(names, batch[:1])
        totals = self.by_vmap(names, batch) if self.vectorised else None
        for name, total in (totals or self.by_loop(names, batch)).items():
            self.fisher[name] += total

    def agree(self, names: list[str], sample: Batch) -> bool:
        """Whether vmap gives autograd's result, except for rounding."""
        totals, exact = self.by_vmap(names, sample), self.by_loop(names, sample)
        if totals is None:
            return False
        eps = epsilon([self.params[name] for name in names])
        # Some gradients, as those of attention's key biases, are zero except for rounding errors.
        noise = (100 * eps) ** (1 if self.objective.absolute else 2) * max(float(x.norm()) for x in exact.values())
        return all(
            float((totals[name] - exact[name]).norm()) <= math.sqrt(eps) * float(exact[name].norm()) + noise
            for name in names
        )

    def by_vmap(self, names: list[str], batch: Batch) -> dict[str, Tensor] | None:
        """Sums over the samples by name; None if vmap fails."""
        params = {name: self.params[name].detach() for name in names}
        chunk = max(1, ELEMENTS // (3 * sum(p.numel() for p in params.values())))
        totals = {name: torch.zeros_like(self.fisher[name]) for name in names}
        for start in range(0, batch.size, chunk):
            part = batch[start : start + chunk]
            flat, spec = tree_flatten((part.args, part.kwargs, part.labels))
            is_row = [part.has_rows(x) for x in flat]
            of_sample = functools.partial(self.of_sample, params, flat, is_row, spec)
            try:
                with torch.no_grad():
                    rows = [x for x, row in zip(flat, is_row, strict=True) if row]
                    found = torch.func.vmap(of_sample, randomness="different")(*rows)
            except Exception:  # whatever a model and functorch can raise: the loop shows what is the model's own fault
                return None
            for name, values in found.items():
                totals[name] += values.sum(0)
        return totals

    def of_sample(
        self, params: dict[str, Tensor], flat: list[Any], is_row: list[bool], spec: TreeSpec, *rows: Tensor
    ) -> dict[str, Tensor]:
        """One sample's statistics by name, with the sample's own tensors in the places of the batch's."""
        own = iter(rows)
        rebuilt = [next(own)[None] if row else x for x, row in zip(flat, is_row, strict=True)]
        args, kwargs, labels = tree_unflatten(rebuilt, spec)
        sample = Batch(args, kwargs, labels, 1)

        def losses(params: dict[str, Tensor]) -> Tensor:
            output = torch.func.functional_call(self.model, params, sample.args, sample.kwargs)
            return self.objective(output, sample)[0]

        # Of a function without a second result there are two.
        values, vjp = cast("tuple[Tensor, Callable[[Tensor], Any]]", torch.func.vjp(losses, params))
        totals: dict[str, Tensor | float] = dict.fromkeys(params, 0.0)
        for one in torch.eye(len(values), dtype=values.dtype, device=values.device):
            for name, grads in vjp(one)[0].items():
                totals[name] = totals[name] + self.objective.statistic(wide(grads))
        return cast("dict[str, Tensor]", totals)

    def by_loop(self, names: list[str], batch: Batch) -> dict[str, Tensor]:
        """Sums over the samples by name."""
        params = [self.params[name] for name in names]
        totals = {name: torch.zeros_like(self.fisher[name]) for name in names}
        for i in range(batch.size):
            sample = batch[i : i + 1]
            with Aliases(params) as aliases:
                losses = self.objective(self.model(*sample.args, **sample.kwargs), sample)[0]
            own = [aliases.own[id(p)] for p in params]
            for value in losses if losses.requires_grad else ():
                grads = torch.autograd.grad(value, own + params, retain_graph=True, allow_unused=True)
                for name, *both in zip(names, grads[: len(own)], grads[len(own) :], strict=True):
                    both = [wide(g.to_dense()) for g in both if g is not None]
                    if both:
                        totals[name] += self.objective.statistic(functools.reduce(torch.add, both))
        return totals


class Aliases(TorchFunctionMode):
    """Passes aliases of parameters to torch functions, so that gradients do not trigger the parameters' own hooks."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__()
        self.own: dict[int, Tensor] = {id(p): p.detach().requires_grad_() for p in params}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if any(id(x) in self.own for x in tensors((*args, *named.values()))):
            args, named = tree_map(lambda x: self.own.get(id(x), x), (args, named))
        return func(*args, **named)
