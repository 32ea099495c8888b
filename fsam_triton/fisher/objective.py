"""What is estimated and from which samples, and what the fast and the slow way share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import check
from ..kernels.reference import compute_dtype


@dataclass(frozen=True)
class Batch:
    """Samples: the model's arguments, and labels."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any
    size: int

    @classmethod
    def of(cls, raw: Any, device: torch.device, labelled: bool) -> Batch:
        """A batch of a data loader, on a device."""
        allowed = "batches must be dicts with 'labels' or pairs (inputs, labels), of tensors with one row a sample"
        mapping = isinstance(raw, Mapping)
        pair = isinstance(raw, tuple | list) and len(raw) == 2
        check(mapping or pair, "dataloader", type(raw).__name__, allowed)
        args, kwargs, labels = ((), dict(raw), raw.get("labels")) if mapping else ((raw[0],), {}, raw[1])
        check(labels is not None or not labelled, "dataloader", "a batch without labels", allowed)

        def move(x: Any) -> Any:
            return x.detach().to(device, non_blocking=True) if isinstance(x, Tensor) else x

        args, kwargs, labels = tree_map(move, (args, kwargs, labels))
        rows = [x for x in tree_leaves((labels, args, kwargs)) if isinstance(x, Tensor) and x.dim() > 0]
        check(len(rows) > 0, "dataloader", "a batch without tensors", allowed)
        return cls(args, kwargs, labels, len(rows[0]))

    def has_rows(self, x: Any) -> bool:
        """Whether the first dimension of x counts samples."""
        return isinstance(x, Tensor) and x.dim() > 0 and len(x) == self.size

    def __getitem__(self, rows: slice) -> Batch:
        parts = (self.args, self.kwargs, self.labels)
        args, kwargs, labels = tree_map(lambda x: x[rows] if self.has_rows(x) else x, parts)
        return Batch(args, kwargs, labels, len(range(self.size)[rows]))


@dataclass(frozen=True)
class Objective:
    """The functions of the parameters whose per-sample gradients are squared (or made absolute) and summed."""

    kind: str
    absolute: bool
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None

    def __call__(self, output: Any, batch: Batch) -> Tensor:
        """The losses, [batch, 1]; or log-probabilities, [batch, classes], with weights that leave p after squaring."""
        logits = getattr(output, "logits", output)
        check(isinstance(logits, Tensor), "model", type(logits).__name__, "it must return logits")
        logits = logits.to(compute_dtype(logits.dtype))
        if self.loss_fn is not None:
            losses = self.loss_fn(logits, batch.labels)
            check(losses.shape == (batch.size,), "loss_fn", losses.shape, f"losses [{batch.size}] are expected")
            return losses[:, None]
        shape = tuple(logits.shape)
        allowed = f"logits [{batch.size}, classes] are expected"
        if self.kind == "label":
            allowed += "; for others give a loss_fn, for causal language models causal_lm_loss"
        check(len(shape) == 2 and shape[0] == batch.size, "model", shape, allowed)
        if self.kind == "label":
            return F.cross_entropy(logits, batch.labels, reduction="none")[:, None]
        log_p = logits.log_softmax(-1)
        p = log_p.detach().exp()
        return (p if self.absolute else p.sqrt()) * log_p

    def statistic(self, grads: Tensor) -> Tensor:
        return grads.abs() if self.absolute else grads.square()


def wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))


def epsilon(params: Iterable[Tensor]) -> float:
    """The coarsest precision that passes through the model compute in."""
    types, devices = ({getattr(p, what) for p in params} for what in ("dtype", "device"))
    types |= {torch.get_autocast_dtype(d.type) for d in devices if torch.is_autocast_enabled(d.type)}
    return max(torch.finfo(dtype).eps for dtype in types)


def tensors(values: Iterable[Any]) -> Iterator[Any]:
    for x in values:
        if isinstance(x, tuple | list):
            yield from tensors(x)
        else:
            yield x
