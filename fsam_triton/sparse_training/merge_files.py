"""The folder in which workers keep their last merge, so that training can resume from it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from ..errors import ArgumentError, check
from ..files import written_whole
from ..masks.trained import FishMask
from .delta import saved_buffers, take
from .workers import Workers

# Names the last complete merge.
_MARKER = "merges.json"


class MergeFiles:
    """A folder with the last complete merge and, for a while, the merges before and after it.

    `merge-N-model` is the whole model after merge N and `merge-N-mask` the mask from then on, if there is one.
    `merge-M-values` holds the changes of the merges up to M > N since then. Each rank R writes `merge-M-optimizer-R`;
    rank 0 writes all other files. When all ranks have written theirs, rank 0 writes the marker, which names M and N;
    only then are older files removed. Ranks do not read each other's files, so the folder need not be shared.

    Args:
        folder: created if necessary.
        workers: the workers that write.
        settings: those of the training, for JSON; a run can only resume with the same settings.

    Attributes:
        folder: as given.
        last: the last complete merge that this rank knows of, or None.
    """

    def __init__(self, folder: str | os.PathLike[str], workers: Workers, settings: Mapping[str, Any]) -> None:
        self.folder: Path = Path(folder)
        self._workers, self._settings = workers, settings
        self.folder.mkdir(parents=True, exist_ok=True)
        self.last: int | None = None
        self._whole = 0

    def find(self) -> dict[str, Any] | None:
        """The merge to resume from: rank 0's marker, on all ranks; None if there is none."""
        marker = self._workers.json_of_first(_read_marker(self.folder))
        if marker is not None:
            for name, value in self._settings.items():
                allowed = f"must be {marker[name]!r} as in the run whose merges are in {str(self.folder)!r}"
                check(marker[name] == value, name, value, allowed)
            self.last, self._whole = marker["merges"], marker["whole"]
        return marker

    def load_optimizer(self) -> dict[str, Any]:
        """This rank's state dict of the last complete merge."""
        assert self.last is not None
        return torch.load(self._path(self.last, self._own, "pt"), map_location="cpu", weights_only=True)

    def write(
        self, model: Module, optimizer: Optimizer, mask: FishMask | None, merges: int, steps: int, whole: bool
    ) -> None:
        """Write a merge, and remove older ones.

        Args:
            model, optimizer: after the merge.
            mask: the mask from now on; None if all weights are trained.
            merges, steps: their numbers so far.
            whole: whether weights outside the mask can have changed since the last call, or the mask has changed.

        Raises:
            WorkerError: another worker did not get as far.
        """
        with written_whole(self._path(merges, self._own, "pt")) as temporary:
            torch.save(optimizer.state_dict(), temporary)
        if whole:
            self._whole = merges
        if self._workers.rank == 0:
            if whole and mask is not None:
                mask.save(self._path(merges, "mask"))
            tensors = model_tensors(model) if whole or mask is None else _changing(model, mask)
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            with written_whole(self._path(merges, "model" if whole else "values")) as temporary:
                save_file(tensors, temporary)
        self._workers.wait_for_all()
        if self._workers.rank == 0:
            counts = {"merges": merges, "steps": steps, "whole": self._whole, "mask": mask is not None}
            with written_whole(self.folder / _MARKER) as temporary:
                temporary.write_text(json.dumps({**counts, **self._settings}) + "\n", encoding="utf-8")
            self._remove({"model": [self._whole], "mask": [self._whole], "values": [merges]})
        # The one before stays: rank 0 may not have written the marker yet.
        self._remove({self._own: [merges, self.last]})
        self.last = merges

    @property
    def _own(self) -> str:
        return f"optimizer-{self._workers.rank}"

    def _path(self, merges: int, kind: str, suffix: str = "safetensors") -> Path:
        return self.folder / f"merge-{merges}-{kind}.{suffix}"

    def _remove(self, kept: Mapping[str, list[int | None]]) -> None:
        for path in self.folder.glob("merge-*"):
            found = re.fullmatch(r"merge-(\d+)-([\w-]+)\.(safetensors|pt)", path.name)
            if found and found[2] in kept and int(found[1]) not in kept[found[2]]:
                path.unlink()


def load_merged(model: Module, folder: str | os.PathLike[str]) -> FishMask | None:
    """Put the last merged weights and buffers of a `SparseMerger` into a model; needs no other worker.

    Args:
        model: a model of the trained architecture; changed in place.
        folder: the `checkpoint` folder of the training.

    Returns:
        The mask that would be trained next, by all workers together; None if all weights would be.

    Raises:
        ValueError: there is no merge in the folder.
    """
    folder = Path(folder)
    if (marker := _read_marker(folder)) is None:
        raise ArgumentError("folder", str(folder), f"must have {_MARKER}, which SparseMerger writes")
    n, m = marker["whole"], marker["merges"]
    mask = FishMask.load(folder / f"merge-{n}-mask.safetensors") if marker["mask"] else None
    tensors = model_tensors(model)
    with torch.no_grad():
        for name, value in load_file(folder / f"merge-{n}-model.safetensors").items():
            tensors[name].copy_(value)
        for name, value in load_file(folder / f"merge-{m}-values.safetensors").items() if m > n else ():
            own = tensors[name]
            if mask is not None and name in mask.shapes:
                flat = own.reshape(-1)
                flat[mask.indices(name).to(own.device).long()] = value.to(own.device)
                value = flat.view(own.shape)
            own.copy_(value)
    return mask


def model_tensors(model: Module) -> dict[str, Tensor]:
    """Parameters, and the buffers that are saved with the model, each once under its first name."""
    buffers = dict(model.named_buffers())
    return {**dict(model.named_parameters()), **{name: buffers[name] for name in saved_buffers(model)}}


def _changing(model: Module, mask: FishMask) -> dict[str, Tensor]:
    """The selected weights, and the buffers."""
    tensors = model_tensors(model)
    selected = {name: take(tensors.pop(name), mask.indices(name)) for name in mask.shapes}
    parameters = dict(model.named_parameters())
    buffers = {name: tensor for name, tensor in tensors.items() if name not in parameters}
    return {**{name: values for name, values in selected.items() if len(values)}, **buffers}


def _read_marker(folder: Path) -> dict[str, Any] | None:
    path = folder / _MARKER
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
