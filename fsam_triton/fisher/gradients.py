"""Per-sample gradients of one parameter, in the form that a use of the parameter gives them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .objective import Objective


@dataclass
class Product:
    """Gradients D_b^T A_b of a matrix: the parameter with all dimensions except the first flattened.

    inputs: A [batch, positions, in]; grads: D [batch, positions, out].
    """

    inputs: Tensor
    grads: Tensor

    @staticmethod
    def merge(parts: list[Product]) -> Product:
        """The sum: all positions of all uses."""
        return Product(torch.cat([part.inputs for part in parts], 1), torch.cat([part.grads for part in parts], 1))

    def add_to(self, fisher: Tensor, objective: Objective) -> None:
        ops.linear_fisher_(fisher.flatten(1), self.inputs, self.grads, objective.absolute)

    def gradient(self, i: int, like: Tensor) -> Tensor:
        """Sample i's gradient, with the shape and type of `like`."""
        return (self.grads[i].T.to(like.dtype) @ self.inputs[i].to(like.dtype)).view(like.shape)


@dataclass
class Lookup:
    """Gradients of an embedding: rows D [batch, positions, ...] for indices [batch, positions]."""

    indices: Tensor
    grads: Tensor

    @staticmethod
    def merge(parts: list[Lookup]) -> Lookup:
        return Lookup(torch.cat([part.indices for part in parts], 1), torch.cat([part.grads for part in parts], 1))

    def add_to(self, fisher: Tensor, objective: Objective) -> None:
        # One row for each index that a sample has: positions of the same index add up before they are squared.
        sample = torch.arange(len(self.indices), device=fisher.device)[:, None]
        rows, place = torch.unique(sample * len(fisher) + self.indices, return_inverse=True)
        grads = fisher.new_zeros(len(rows), *fisher.shape[1:])
        grads.index_add_(0, place.flatten(), self.grads.flatten(0, 1).to(fisher.dtype))
        fisher.index_add_(0, rows % len(fisher), objective.statistic(grads))

    def gradient(self, i: int, like: Tensor) -> Tensor:
        return torch.zeros_like(like).index_add_(0, self.indices[i], self.grads[i].to(like.dtype))


@dataclass
class Dense:
    """Gradients of a small parameter, one row per sample."""

    grads: Tensor

    @staticmethod
    def merge(parts: list[Dense]) -> Dense:
        return Dense(functools.reduce(torch.add, [part.grads for part in parts]))

    def add_to(self, fisher: Tensor, objective: Objective) -> None:
        fisher += objective.statistic(self.grads.to(fisher.dtype)).sum(0)

    def gradient(self, i: int, like: Tensor) -> Tensor:
        return self.grads[i].to(like.dtype)


Part = Product | Lookup | Dense


@dataclass
class SharedLookup:
    """An embedding whose indices are not the samples' own, such as positions."""

    key: int
    output: Tensor
    indices: Tensor
    lookup: Callable[[Tensor, Tensor], Lookup]
