"""SparseMerger: training by several workers that exchange only the weights selected by a FishMask."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel

from ..buffers.sparse import flat_in_memory, in_memory
from ..errors import check
from ..masks.trained import FishMask
from ..optim.optimizer import FusedOptimizer
from .delta import saved_buffers
from .merge_files import MergeFiles, load_merged, model_tensors
from .workers import Workers


class SparseMerger:
    """Trains one model on several workers (torch.distributed); `docs/distributed.md` has a complete program.

    This is the distributed training of "Training Neural Networks with Fixed Sparse Masks" (arXiv 2111.09839). Each
    worker takes `local_steps` steps by itself. Then the selected weights are merged, so that all workers have the same
    weights again, to the bit. Floating-point buffers (BatchNorm statistics) are averaged, and other buffers are rank
    0's; moments are not exchanged. All ranks begin with rank 0's weights, and must take the same number of steps.

    If there is a merge in `checkpoint`, training resumes from it: skip the batches of its `merger.steps`.

    Args:
        model: the same on all ranks; not in DistributedDataParallel, which would exchange the gradients of all weights.
        optimizer: created with ``model.named_parameters()``. The merger sets which weights it trains.
        choose_mask: returns a mask chosen from the merged weights. All ranks call it at the same time, and rank 0's
            mask is used; it may average a Fisher estimate over the ranks, but does not have to.
        local_steps: steps from one merge to the next, >= 1 (default: 10).
        masks: ``"same"``: all workers train the whole mask; ``"disjoint"``: rank i trains part i of its
            `FishMask.split`, and nothing needs to be averaged (default: ``"same"``).
        how: merge the same mask by the ``"mean"`` of the weights, or by the ``"sum"`` of their changes since the last
            merge, which makes larger steps the more workers there are (default: ``"mean"``).
        refresh_every: choose the mask again after this many merges, >= 1 (default: None, never).
        dense_merges: before there is a mask, train all weights and merge them this many times, by the mean (default:
            0).
        checkpoint: a folder in which to keep the last merge and from which to resume (default: None).

    Attributes:
        mask: the weights that all workers together are training at the moment; None while these are all weights.
        steps: how many steps this worker has taken, including those of the run that it resumes.
        merges: how many merges there have been, including those of that run.
        bytes_sent: bytes of weights and floating-point buffers that this process has sent in merges; each byte counts
            once, however many workers it goes to.

    Raises:
        ValueError: an argument is out of its range, or the folder has a run with other workers or masks.
        WorkerError: another worker has died or does not answer within the process group's timeout.

    Example:
        With a process group created by torchrun the loop is the same, but there are other workers to send to.

        >>> from fsam_triton import AdamWL2SP, FishMask, SparseMerger
        >>> model = torch.nn.Linear(8, 2)
        >>> optimizer = AdamWL2SP(model.named_parameters(), lr=1e-3)
        >>> merger = SparseMerger(model, optimizer, lambda: FishMask.random(model, 0.25), local_steps=2)
        >>> for batch in torch.randn(5, 4, 8):
        ...     optimizer.zero_grad()
        ...     model(batch).square().mean().backward()
        ...     optimizer.step()
        ...     merger.step()
        >>> merger.finish()
        >>> merger.steps, merger.merges, merger.bytes_sent
        (5, 3, 0)
    """

    def __init__(
        self,
        model: Module,
        optimizer: FusedOptimizer,
        choose_mask: Callable[[], FishMask],
        *,
        local_steps: int = 10,
        masks: str = "same",
        how: str = "mean",
        refresh_every: int | None = None,
        dense_merges: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        wrapped = isinstance(model, DistributedDataParallel)
        check(not wrapped, "model", type(model).__name__, "must be its .module: DDP exchanges all gradients")
        fits = isinstance(optimizer, FusedOptimizer)
        check(fits, "optimizer", type(optimizer).__name__, "must be an AdamWL2SP, FSAM or MomentumSAM")
        check(callable(choose_mask), "choose_mask", choose_mask, "must be a function that gives a FishMask")
        check(local_steps >= 1, "local_steps", local_steps, "must be >= 1")
        check(masks in ("same", "disjoint"), "masks", masks, 'must be "same" or "disjoint"')
        check(how in ("mean", "sum"), "how", how, 'must be "mean" or "sum"')
        check(refresh_every is None or refresh_every >= 1, "refresh_every", refresh_every, "must be >= 1 or None")
        check(dense_merges >= 0, "dense_merges", dense_merges, "must be >= 0")
        self._model, self._optimizer, self._choose = model, optimizer, choose_mask
        self._local_steps, self._masks, self._how = local_steps, masks, how
        self._refresh_every, self._dense_merges = refresh_every, dense_merges
        self.mask: FishMask | None = None
        self.steps: int = 0
        self.merges: int = 0
        self._steps_merged = 0
        self._files: MergeFiles | None = None
        self._workers = Workers(next(model.parameters()).device, self._describe_failure)
        if checkpoint is not None:
            self._files = MergeFiles(checkpoint, self._workers, {"workers": self._workers.size, "masks": masks})
        marker = self._files.find() if self._files else None
        if self._files is None or marker is None:
            self._begin()
        else:
            self._resume(self._files, marker)
        self._remember()

    @property
    def bytes_sent(self) -> int:
        return self._workers.bytes_sent

    def step(self) -> None:
        """Call this after each `optimizer.step`; it merges if it is time.

        Raises:
            WorkerError: another worker has died or does not answer within the process group's timeout.
        """
        self.steps += 1
        if self.steps - self._steps_merged == self._local_steps:
            self._merge()

    def finish(self) -> None:
        """Call this after the last step; it merges what has not been merged yet.

        Raises:
            WorkerError: another worker has died or does not answer within the process group's timeout.
        """
        if self.steps > self._steps_merged:
            self._merge()

    def _begin(self) -> None:
        self._workers.follow_first(model_tensors(self._model).values())
        if self._dense_merges:
            self._train_on(None)
        else:
            self._renew_mask()
        self._save(whole=True)

    def _resume(self, files: MergeFiles, marker: Mapping[str, Any]) -> None:
        mask = load_merged(self._model, files.folder) if self._workers.rank == 0 else None
        self._workers.follow_first(model_tensors(self._model).values())
        self._train_on(self._workers.mask_of_first(mask) if marker["mask"] else None)
        self._optimizer.load_state_dict(files.load_optimizer())
        self.merges, self.steps = marker["merges"], marker["steps"]
        self._steps_merged = self.steps

    def _merge(self) -> None:
        if self._optimizer.perturbed:
            raise RuntimeError("the weights are perturbed: call optimizer.step() before merger.step()")
        if self._workers.size > 1:
            self._exchange()
        self.merges += 1
        self._steps_merged = self.steps
        sparse = self.merges - self._dense_merges
        renewed = self._dense_merges > 0 and sparse == 0
        renewed |= self._refresh_every is not None and sparse > 0 and sparse % self._refresh_every == 0
        if renewed:
            self._renew_mask()
        self._remember()
        self._save(whole=renewed or self.mask is None)

    @torch.no_grad()
    def _exchange(self) -> None:
        """Exchange everything, then write: if another worker is lost meanwhile, this one still has its own weights."""
        workers = self._workers
        own = self._places.read() if self._is_disjoint else self._optimizer.trained_weights()
        packed = _pack(own, workers.device)
        merged = workers.interleave(packed) if self._is_disjoint else workers.reduce(packed, self._merged)
        tensors = model_tensors(self._model)
        buffers = [tensors[name] for name in saved_buffers(self._model)]
        averaged = [buffer for buffer in buffers if buffer.is_floating_point()]
        means = workers.reduce(_pack(averaged, workers.device)) if averaged else None
        others = [buffer for buffer in buffers if not buffer.is_floating_point()]
        firsts = [workers.broadcast(buffer) for buffer in others]
        if self._is_disjoint:
            self._places.write(merged)
        else:
            _unpack(merged, own)
            self._optimizer.set_trained_weights(own)
        if means is not None:
            _unpack(means, averaged)
        for buffer, first in zip(others, firsts, strict=True):
            buffer.copy_(first)

    @property
    def _is_disjoint(self) -> bool:
        return self._masks == "disjoint" and self.mask is not None

    def _remember(self) -> None:
        """Keep the merged weights, from which changes are counted if they are to be summed."""
        self._merged = None
        if self._how == "sum" and self._masks == "same" and self.mask is not None:
            self._merged = _pack(self._optimizer.trained_weights(), self._workers.device)

    def _renew_mask(self) -> None:
        mask = self._choose()
        check(isinstance(mask, FishMask), "choose_mask()", mask, "must be a FishMask")
        mask = self._workers.mask_of_first(mask)
        mask.check_fits(self._model)
        least = self._workers.size if self._masks == "disjoint" else 1
        check(mask.count >= least, "choose_mask()", mask, f"must select at least {least} weights")
        self._train_on(mask)

    def _train_on(self, mask: FishMask | None) -> None:
        self.mask = mask
        own = mask
        if mask is not None and self._is_disjoint:
            self._places = _Places(mask, dict(self._model.named_parameters()))
            own = mask.split(self._workers.size)[self._workers.rank]
        if self._optimizer.trainable != own:
            self._optimizer.set_trainable(own)

    def _save(self, whole: bool) -> None:
        if self._files:
            self._files.write(self._model, self._optimizer, self.mask, self.merges, self.steps, whole)

    def _describe_failure(self) -> str:
        resume = "nothing was kept of its merges, because there is no checkpoint"
        if self._files:
            resume = f"the last complete merge is in {self._files.folder}: to resume from it, start all workers again"
        return (
            f"Worker {self._workers.rank} of {self._workers.size} has lost another one before merge {self.merges + 1} "
            "was complete: it has died, or did not answer within the timeout of the process group "
            f"(init_process_group(timeout=...)); {resume}"
        )


class _Places:
    """The places of the selected weights in the model's memory, in the order of the mask."""

    def __init__(self, mask: FishMask, parameters: Mapping[str, Parameter]) -> None:
        self._places = []
        for name in mask.shapes:
            p, indices = parameters[name], mask.indices(name)
            if len(indices):
                self._places.append((p, in_memory(indices.to(p.device), p.shape, p.stride()).to(indices.dtype)))

    def read(self) -> list[Tensor]:
        return [flat_in_memory(p.detach()).index_select(0, index) for p, index in self._places]

    def write(self, values: Tensor) -> None:
        parts = values.split([len(index) for _, index in self._places])
        for (p, index), part in zip(self._places, parts, strict=True):
            flat_in_memory(p.detach()).index_copy_(0, index.long(), part.to(p))


def _pack(pieces: list[Tensor], device: torch.device) -> Tensor:
    """Tensors as one flat tensor, in the widest of their types."""
    dtype = functools.reduce(torch.promote_types, (piece.dtype for piece in pieces))
    return torch.cat([piece.detach().reshape(-1).to(device, dtype) for piece in pieces])


def _unpack(packed: Tensor, pieces: list[Tensor]) -> None:
    """The inverse of `_pack`, in place."""
    for piece, values in zip(pieces, packed.split([piece.numel() for piece in pieces]), strict=True):
        piece.copy_(values.view(piece.shape))
