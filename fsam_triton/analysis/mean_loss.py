"""The mean loss over batches as a function of the weights, evaluated without touching the model."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import check
from ..evaluation import evaluating, trainable_parameters
from ..kernels.reference import compute_dtype

Loss = Callable[[nn.Module, Any], Tensor]
"""``loss(model, batch)`` returns the mean loss of a batch, a scalar tensor."""

# One tensor for each trainable parameter, in the model's order.
Vector = list[Tensor]


class MeanLoss(nn.Module):
    """L(w) over all batches and L_b(w) of one batch, with gradients and Hessian-vector products; made by `measuring`.

    Other tensors take the places of the parameters (torch.func.functional_call): nothing is ever written into the
    parameters or their gradients. Buffers are copies, so that every evaluation finds them unchanged.

    Attributes:
        weights: the trainable parameters' values, fp32 where the parameters have 16 bits; the clean weights if an
            optimizer has perturbed them.
        shares: each batch's share of the samples, by which its loss is weighted; equal shares if a batch has no tensor.
    """

    def __init__(self, model: nn.Module, loss: Loss, batches: Iterable[Any]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss
        params = trainable_parameters(model)
        # Through state_dict(), because it shows clean weights.
        shown = model.state_dict()
        self.weights: Vector = [_wide(shown.get(name, p).detach()) for name, p in params.items()]
        self._names = [f"model.{name}" for name in params]
        self._frozen = {name: _wide(p.detach()) for name, p in self.named_parameters() if not p.requires_grad}
        self.batches: list[Any] = list(batches)
        check(len(self.batches) > 0, "batches", batches, "it gives no batches; an iterator can be used only once")
        sizes = [_size(batch) for batch in self.batches]
        total = sum(sizes)
        self.shares: list[float] = [size / total if all(sizes) else 1 / len(sizes) for size in sizes]

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.model, batch)

    def _loss_of(self, i: int, weights: Vector) -> Tensor:
        buffers = {name: _wide(buffer.clone()) for name, buffer in self.named_buffers()}
        tensors = self._frozen | buffers | dict(zip(self._names, weights, strict=True))
        value = torch.func.functional_call(self, tensors, (self.batches[i],))
        scalar = isinstance(value, Tensor) and value.numel() == 1
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        check(scalar, "loss", found, "must return the mean loss of the batch, a scalar tensor")
        if not math.isfinite(number := value.item()):
            raise FloatingPointError(f"the loss of batch {i} is {number}; it must be finite, also around the weights")
        return value.reshape(())

    @torch.no_grad()
    def value_of(self, i: int, weights: Vector) -> float:
        """L_b of batch i."""
        return self._loss_of(i, weights).item()

    def gradient_of(self, i: int, weights: Vector) -> tuple[float, Vector]:
        """L_b of batch i, and its gradient."""
        value, _, gradient = self._differentiable(i, weights)
        return value.item(), gradient

    def _differentiable(self, i: int, weights: Vector, twice: bool = False) -> tuple[Tensor, Vector, Vector]:
        """L_b, the weights on which it depends, and its gradient, which can be differentiated again with `twice`."""
        with torch.enable_grad():
            leaves = [w.detach().requires_grad_() for w in weights]
            value = self._loss_of(i, leaves)
            check(value.requires_grad, "loss", value, "must depend on the model's parameters")
            gradient = torch.autograd.grad(value, leaves, create_graph=twice, allow_unused=True, materialize_grads=True)
        return value, leaves, list(gradient)

    def value(self, weights: Vector) -> float:
        """L."""
        return sum(share * self.value_of(i, weights) for i, share in enumerate(self.shares))

    def gradient(self, weights: Vector) -> tuple[float, Vector]:
        """L and its gradient."""
        total, mean = 0.0, [torch.zeros_like(w) for w in weights]
        for i, share in enumerate(self.shares):
            value, gradient = self.gradient_of(i, weights)
            total += share * value
            mean = moved(mean, gradient, share)
        return total, mean

    def hessian_product(self, vector: Vector) -> Vector:
        """The Hessian of L at the model's weights times a vector."""
        total = [torch.zeros_like(w) for w in self.weights]
        for i, share in enumerate(self.shares):
            _, leaves, gradient = self._differentiable(i, self.weights, twice=True)
            # The part of a loss that is linear has a constant gradient.
            pairs = [(g, v) for g, v in zip(gradient, vector, strict=True) if g.requires_grad]
            if pairs:
                outputs, own = zip(*pairs, strict=True)
                product = torch.autograd.grad(outputs, leaves, own, allow_unused=True, materialize_grads=True)
                total = moved(total, product, share)
        return total


@contextlib.contextmanager
def measuring(model: nn.Module, loss: Loss, batches: Iterable[Any]) -> Iterator[MeanLoss]:
    """The model's mean loss, with the model in eval mode; modes and random states are restored at the end."""
    check(callable(loss), "loss", loss, "must be a function of model and batch")
    devices = {p.device for p in trainable_parameters(model).values() if p.device.type == "cuda"}
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices), evaluating(model):
        try:
            yield MeanLoss(model, loss, batches)
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])


def moved(weights: Vector, direction: Sequence[Tensor], length: float) -> Vector:
    """weights + length * direction."""
    return [torch.add(w, d, alpha=length) for w, d in zip(weights, direction, strict=True)]


def scaled(vector: Vector, factor: float) -> Vector:
    return [factor * v for v in vector]


def norm(vector: Vector) -> float:
    """The Euclidean norm, in fp64."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(v, dtype=torch.float64)) ** 2 for v in vector))


def random_like(vector: Vector, generator: torch.Generator) -> Vector:
    """Standard normal numbers; from a CPU generator, so that they are the same on every device."""
    return [torch.randn(v.shape, generator=generator).to(v) for v in vector]


def _wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype)) if x.is_floating_point() else x


def _size(batch: Any) -> int:
    """The number of rows of the first tensor in a batch; 0 if it has none."""
    # transformers' batches are mappings that PyTorch does not look into.
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    return next((len(x) for x in leaves if isinstance(x, Tensor) and x.dim() > 0), 0)
