"""Gradient release: a parameter is updated in the backward pass, as soon as its gradient is there, which is freed."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import check

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer


class GradientRelease:
    """Hooks that update parameters during the backward pass, until `remove`; see `FusedOptimizer.release_gradients`.

    Args:
        optimizer: whose parameters.

    Raises:
        ArgumentError: it clips gradients, or trains a FishMask.
        RuntimeError: its steps need all gradients at once, or those of other processes.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        norm = optimizer.max_grad_norm
        check(norm is None, "max_grad_norm", norm, "must be None: clipping needs all gradients")
        check(optimizer.trainable is None, "trainable", "a FishMask", "must be None with released gradients")
        balances = optimizer.balance.is_on(optimizer.param_groups)
        check(not balances, "balance", "> 0", "must be 0 with released gradients: it compares those of two parameters")
        if hasattr(optimizer, "ascent_pass"):
            raise RuntimeError("two passes need their gradients until perturb() and step(): use MomentumSAM")
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError("released gradients would not be averaged over processes: use FSDP2, which frees them")
        self._optimizer = weakref.ref(optimizer)
        # The parameters that have been updated since the last step.
        self._updated: set[Tensor] = set()
        params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._handles: list[Any] = [p.register_post_accumulate_grad_hook(self._update) for p in params]
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self._updated.clear()))

    def remove(self) -> None:
        """Leave gradients to `step` again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def _update(self, p: Tensor) -> None:
        if (optimizer := self._optimizer()) is None:
            return
        if p in self._updated:
            raise RuntimeError(
                "a released gradient came twice before step(): gradients cannot be accumulated, nor a parameter be "
                "used in parts of the model that are recomputed separately"
            )
        optimizer.update_one(p, follow=not self._updated)
        self._updated.add(p)
        p.grad = None
