"""The alternatives that people use: SAM in eager and in compiled PyTorch, AdamW over fp32 copies of 16-bit weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

LR, RHO, BETAS, EPS, WEIGHT_DECAY = 1e-5, 0.05, (0.9, 0.999), 1e-8, 1e-2


class Base(Protocol):
    """What `EagerSAM` descends with."""

    def step(self) -> object: ...


class EagerSAM:
    """SAM as it is usually written in PyTorch: loops over tensors around an optimizer's step (arXiv 2010.01412)."""

    def __init__(self, params: Sequence[Parameter], base: Base) -> None:
        self.params, self.base = params, base
        self.clean: dict[Parameter, Tensor] = {}

    @torch.no_grad()
    def first_step(self) -> None:
        norm = torch.stack([p.grad.norm(p=2) for p in self.params]).norm(p=2)
        scale = RHO / (norm + 1e-12)
        for p in self.params:
            self.clean[p] = p.data.clone()
            p.add_(p.grad * scale.to(p))

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.params:
            p.data = self.clean[p]
        self.base.step()


class MasterAdamW:
    """torch.optim.AdamW over fp32 copies of 16-bit parameters and their gradients, as mixed precision has it."""

    def __init__(self, params: Sequence[Parameter], **arguments: object) -> None:
        self.params = params
        self.masters = [Parameter(p.detach().float()) for p in params]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.base = torch.optim.AdamW(self.masters, lr=LR, **arguments)

    @torch.no_grad()
    def step(self) -> None:
        torch._foreach_copy_([master.grad for master in self.masters], [p.grad for p in self.params])
        self.base.step()
        torch._foreach_copy_(self.params, self.masters)


def _flat(tensor: Tensor) -> Tensor:
    # Not a view, of which each kind, and each shape of its base, would be compiled anew.
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
        tensor.untyped_storage(), tensor.storage_offset(), (tensor.numel(),)
    )


def _square(grad: Tensor) -> Tensor:
    return grad.float().square().sum()


def _ascend(weight: Tensor, grad: Tensor, clean: Tensor, scale: Tensor) -> None:
    clean.copy_(weight)
    weight.add_(scale * grad)


def _descend(weight: Tensor, grad: Tensor, clean: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, count: Tensor) -> None:
    g, (beta1, beta2) = grad.float(), BETAS
    m = exp_avg.float().lerp(g, 1 - beta1)
    v = beta2 * exp_avg_sq.float() + (1 - beta2) * g * g
    denom = (v / (1 - beta2**count)).sqrt() + EPS
    w = clean.float() * (1 - LR * WEIGHT_DECAY) - LR / (1 - beta1**count) * m / denom
    weight.copy_(w)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)


class CompiledSAM:
    """SAM over AdamW, the arithmetic of each tensor compiled by torch.compile, as torchao has its optimizers."""

    def __init__(self, params: Sequence[Parameter]) -> None:
        self.square, self.ascend, self.descend = (
            torch.compile(function, dynamic=True, fullgraph=True) for function in (_square, _ascend, _descend)
        )
        self.weights = [_flat(p) for p in params]
        self.grads = [_flat(p.grad) for p in params]
        self.clean = [torch.empty_like(weight) for weight in self.weights]
        self.moments = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in self.weights]
        self.count = torch.zeros((), device=self.weights[0].device)

    @torch.no_grad()
    def step(self) -> None:
        scale = RHO / (torch.stack([self.square(grad) for grad in self.grads]).sum().sqrt() + 1e-12)
        for tensors in zip(self.weights, self.grads, self.clean, strict=True):
            self.ascend(*tensors, scale)
        self.count += 1
        for weight, grad, clean, moments in zip(self.weights, self.grads, self.clean, self.moments, strict=True):
            self.descend(weight, grad, clean, *moments, self.count)
