"""Small checkpoints: the weights that a FishMask selects, to be put into the model from which they were trained."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import operator
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Module

from ..errors import check
from ..files import read_file, write_file
from ..masks.trained import FishMask, decode_mask, encode_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_DELTA = "fsam_delta.safetensors"
ADAPTER_CONFIG = "fsam_delta_config.json"
# How many weights are hashed at a time.
_PIECE = 1 << 20


class DeltaError(ValueError):
    """A delta is damaged, or belongs to another model."""


@dataclasses.dataclass(frozen=True)
class _Delta:
    """The content of a file.

    Args:
        mask: which weights the file contains.
        base: the fingerprint of the model that they belong to; see `_fingerprint`.
        values: by parameter name, the selected weights [selected], where there are any.
        buffers: the model's buffers by name.
    """

    mask: FishMask
    base: dict[str, list[Any]]
    values: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def write(self, path: str | os.PathLike[str]) -> None:
        tensors, meta = encode_mask(self.mask)
        tensors.update({f"values/{name}": value for name, value in self.values.items()})
        tensors.update({f"buffers/{name}": value for name, value in self.buffers.items()})
        write_file(path, "delta", tensors, {**meta, "base": self.base})

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> _Delta:
        try:
            tensors, meta = read_file(path, "delta")
        except ValueError as error:
            raise DeltaError(str(error)) from error
        values, buffers = (
            {key.removeprefix(kind): tensor for key, tensor in tensors.items() if key.startswith(kind)}
            for kind in ("values/", "buffers/")
        )
        message = f"{path} contradicts itself: it was not written by save_delta"
        try:
            mask, base = decode_mask(tensors, meta), meta["base"]
            needed = {name: (base[name][0], (n,)) for name in mask.shapes if (n := len(mask.indices(name)))}
            fits = needed == {name: (_dtype(value), value.shape) for name, value in values.items()}
            fits &= all(base[name][1] == list(shape) for name, shape in mask.shapes.items())
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DeltaError(message) from error
        if not fits:
            raise DeltaError(message)
        return cls(mask, base, values, buffers)


def save_delta(model: Module, mask: FishMask, path: str | os.PathLike[str], base: Module | None = None) -> None:
    """Write the selected weights of a trained model, and all of its buffers, as a small file.

    The weights are stored as they are, not as differences, so that applying them gives exactly the trained model. The
    model from which they were trained is identified by a fingerprint: names, shapes and dtypes of its parameters, and
    for each of them the SHA-256 of its weights with the selected weights as zeros. Training leaves the other weights
    alone (to the bit; adding 0 would change -0.0), so the trained model has its base's fingerprint. The base's values
    of the selected weights make no difference: a new classifier that is selected as a whole may start from any random
    numbers. Buffers (BatchNorm statistics) are not part of the fingerprint.

    The file is a safetensors file, written whole or not at all. At a density of 0.5 % it takes 0.7 % of the size of the
    fp32 model. A checksum detects damage; it is not a signature against forgery.

    Args:
        model: the trained model. If an optimizer keeps weights perturbed between steps, the clean weights are saved.
        mask: which weights were trained. Parameters that are not in the mask count as not selected.
        path: the file to write.
        base: the model from which it was trained, to check that only selected weights have changed (default: no check).

    Raises:
        ValueError: the mask does not fit the model.
        DeltaError: the model and `base` differ in more than the selected weights.

    Example:
        >>> import copy, os, tempfile
        >>> base = torch.nn.Linear(4, 2)
        >>> model, mask = copy.deepcopy(base), FishMask.random(base, keep_ratio=0.3)
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(mask.bits("weight"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "delta.safetensors")
        ...     save_delta(model, mask, path, base)
        ...     apply_delta(base, path) == mask
        True
        >>> torch.equal(base.weight, model.weight)
        True
    """
    mask.check_fits(model)
    # Through state_dict(), because it shows clean weights.
    state = model.state_dict()
    parameters = {name: state.get(name, p).detach() for name, p in model.named_parameters()}
    buffers = {name: state[name].cpu().clone(memory_format=torch.contiguous_format) for name in saved_buffers(model)}
    values = {name: take(parameters[name], mask.indices(name)) for name in mask.shapes}
    values = {name: value for name, value in values.items() if len(value)}
    delta = _Delta(mask, _fingerprint(parameters, mask), values, buffers)
    if base is not None:
        _check_base(delta, base, "the model was not trained from this base, or not only in the selected weights")
    delta.write(path)


def apply_delta(base_model: Module, path: str | os.PathLike[str]) -> FishMask:
    """Put a delta written by `save_delta` into the model from which it was trained, in place.

    Everything is verified before the first weight is written.

    Args:
        base_model: a model with the base's weights; the weights that will be overwritten may have any values.
        path: the file.

    Returns:
        The mask.

    Raises:
        DeltaError: the file is not a delta, is of another version, truncated or damaged, or the model is not its base;
            the message names the parameter that differs. The model is then unchanged.
    """
    delta = _Delta.read(path)
    _check_base(delta, base_model, f"{path} is not for this model")
    parameters, buffers = dict(base_model.named_parameters()), dict(base_model.named_buffers())
    writes = [(parameters[name], delta.mask.indices(name).long(), value) for name, value in delta.values.items()]
    writes = [(p, indices.to(p.device), value.to(p.device)) for p, indices, value in writes]
    with torch.no_grad():
        for p, indices, value in writes:
            # Not put_, which deterministic algorithms rule out. A copy, put back, only if the strides ask for one.
            flat = p.reshape(-1)
            flat[indices] = value
            p.copy_(flat.view(p.shape))
        for name, value in delta.buffers.items():
            buffers[name].copy_(value)
    return delta.mask


def merge_deltas(
    paths: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str], base: Module, how: str = "mean"
) -> FishMask:
    """Merge several deltas that were trained from the same model into one.

    A weight that only some of the deltas have trained becomes the mean or sum over *those*: a delta that has not
    trained a weight has no vote for its old value, as in TIES-Merging (arXiv 2306.01708). The parts of a
    `FishMask.split` are therefore combined undiminished either way, and deltas with the same mask give the mean model.
    The result is computed in fp64 and rounded once. Floating-point buffers are always averaged; other buffers
    (counters) are those of the first delta.

    Args:
        paths: the deltas, at least one.
        path: the file to write; may be one of them.
        base: the model from which all were trained; it is not changed.
        how: ``"mean"`` of the trained weights, or ``"sum"``: the old weight plus the sum of all changes (task
            arithmetic, arXiv 2212.04089). The sum needs the exact values from which training started, even for a new
            classifier; the mean does not (default: ``"mean"``).

    Returns:
        The mask of the merged delta: the union.

    Raises:
        ValueError: an argument is out of its range, or the masks are not of the same parameters.
        DeltaError: as for `apply_delta`.
    """
    check(how in ("mean", "sum"), "how", how, 'must be "mean" or "sum"')
    check(len(paths) > 0, "paths", paths, "must have at least one")
    deltas = [_Delta.read(each) for each in paths]
    for each, delta in zip(paths, deltas, strict=True):
        _check_base(delta, base, f"{each} is not for this base")
    mask = functools.reduce(operator.or_, (delta.mask for delta in deltas))
    parameters = {name: p.detach() for name, p in base.named_parameters()}
    values = {}
    for name in {name: None for delta in deltas for name in delta.values}:
        indices, p = mask.indices(name), parameters[name]
        old = take(p, indices).double() if how == "sum" else torch.zeros(len(indices), dtype=torch.float64)
        total, count = torch.zeros_like(old), torch.zeros_like(old)
        for delta in deltas:
            if name in delta.values:
                where = torch.searchsorted(indices, delta.mask.indices(name))
                total[where] += delta.values[name].double() - old[where]
                count[where] += 1
        values[name] = (old + (total / count if how == "mean" else total)).to(p.dtype)
    buffers = {}
    for name, first in deltas[0].buffers.items():
        each = [delta.buffers[name] for delta in deltas if name in delta.buffers]
        wide = torch.stack(each).double().mean(0) if first.is_floating_point() else first
        buffers[name] = wide.to(first.dtype)
    _Delta(mask, _fingerprint(parameters, mask), values, buffers).write(path)
    return mask


def save_pretrained(model: PreTrainedModel, mask: FishMask, adapter_dir: str | os.PathLike[str]) -> None:
    """Write the delta of a transformers model, and the configuration with which `from_pretrained` rebuilds the model.

    `fsam_delta.safetensors` is the file of `save_delta`; `fsam_delta_config.json` has the base model's name or path,
    the model's class, dtype and configuration (including labels), the density of the mask and the versions of the
    packages. The files get their names only once both are complete.

    Args:
        model: a trained `transformers.PreTrainedModel`.
        mask: which weights were trained. New weights, such as a classifier's, must all be selected: see
            `always_trainable`.
        adapter_dir: a folder; created if necessary.

    Raises:
        ValueError: the mask does not fit the model.
    """
    import transformers

    from .. import __version__

    folder = Path(adapter_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as temporary:
        delta, config = Path(temporary, ADAPTER_DELTA), Path(temporary, ADAPTER_CONFIG)
        save_delta(model, mask, delta)
        content = {
            "base_model_name_or_path": model.name_or_path,
            "architecture": type(model).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "keep_ratio": mask.density,
            "trained_weights": mask.count,
            "delta_sha256": hashlib.sha256(delta.read_bytes()).hexdigest(),
            "versions": {
                "fsam_triton": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "config": json.loads(model.config.to_json_string()),
        }
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for file in (delta, config):
            os.replace(file, folder / file.name)


def from_pretrained(
    base_or_path: Module | str | os.PathLike[str] | None, adapter_dir: str | os.PathLike[str]
) -> Module:
    """Rebuild the transformers model that was saved by `save_pretrained`.

    Args:
        base_or_path: the base model as a folder or hub name; None for the model from which it was trained; or as a
            model of the right class and number of labels, which is changed in place.
        adapter_dir: the folder written by `save_pretrained`.

    Returns:
        The model, in evaluation mode unless it was passed in.

    Raises:
        DeltaError: as for `apply_delta`; or the two files do not belong together, or need another version of
            transformers.
    """
    import transformers

    folder = Path(adapter_dir)
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        checksum, architecture, dtype = config["delta_sha256"], config["architecture"], config["dtype"]
        path, settings = config["base_model_name_or_path"], config["config"]
    except (KeyError, TypeError, ValueError) as error:
        raise DeltaError(f"{folder / ADAPTER_CONFIG} was not written by save_pretrained, or is damaged") from error
    if hashlib.sha256((folder / ADAPTER_DELTA).read_bytes()).hexdigest() != checksum:
        raise DeltaError(f"{folder}: {ADAPTER_DELTA} is damaged, or not the one that {ADAPTER_CONFIG} was written with")
    if isinstance(base_or_path, Module):
        model = base_or_path
    else:
        kind = getattr(transformers, architecture, None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)) or kind.config_class is None:
            raise DeltaError(f"{folder}: transformers {transformers.__version__} has no model {architecture!r}")
        verbosity = transformers.logging.get_verbosity()
        # It would report that a new classifier needs training.
        transformers.logging.set_verbosity_error()
        try:
            model = kind.from_pretrained(
                path if base_or_path is None else base_or_path,
                config=kind.config_class.from_dict(settings),
                dtype=getattr(torch, dtype),
                ignore_mismatched_sizes=True,
            )
        finally:
            transformers.logging.set_verbosity(verbosity)
    apply_delta(model, folder / ADAPTER_DELTA)
    return model


def saved_buffers(model: Module) -> list[str]:
    """The names of the buffers that are saved with a model; others are derived from its configuration."""
    state = model.state_dict()
    return [name for name, _ in model.named_buffers() if name in state]


def take(p: Tensor, indices: Tensor) -> Tensor:
    """The weights at these positions in row-major order, whatever the strides; on the CPU."""
    return p.detach().take(indices.to(p.device, torch.int64)).cpu()


def _fingerprint(parameters: Mapping[str, Tensor], mask: FishMask) -> dict[str, list[Any]]:
    """By name, each parameter's dtype, shape, and the SHA-256 of its weights with the selected weights as zeros.

    The hash covers the weights' bytes (little-endian) in row-major order.
    """
    out = {}
    for name, p in parameters.items():
        selected = mask.indices(name).long() if name in mask.shapes else torch.zeros(0, dtype=torch.int64)
        out[name] = [_dtype(p), list(p.shape), _digest(p.detach(), selected)]
    return out


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _digest(p: Tensor, selected: Tensor) -> str:
    sha = hashlib.sha256()
    flat = p.reshape(-1)
    for start in range(0, len(flat), _PIECE):
        piece = flat[start : start + _PIECE].to("cpu", copy=True)
        first, last = torch.searchsorted(selected, torch.tensor([start, start + _PIECE])).tolist()
        # As bytes, because not every dtype knows how to fill.
        raw = piece.view(torch.uint8).view(len(piece), -1)
        raw.index_fill_(0, selected[first:last] - start, 0)
        sha.update(raw.numpy().data)
    return sha.hexdigest()


def _check_base(delta: _Delta, model: Module, message: str) -> None:
    """Raise a DeltaError that begins with the message unless the delta was trained from this model."""

    def fail(reason: str) -> NoReturn:
        raise DeltaError(f"{message}: {reason}")

    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name in [*delta.base, *parameters]:
        if name not in parameters or name not in delta.base:
            fail(f"only {'the delta' if name in delta.base else 'the model'} has a parameter {name!r}")
    for name, (dtype, shape, _) in delta.base.items():
        found = parameters[name]
        if (_dtype(found), list(found.shape)) != (dtype, shape):
            fail(f"{name!r} must be {dtype} {tuple(shape)}, is {_dtype(found)} {tuple(found.shape)}")
    for name, value in delta.buffers.items():
        if name not in buffers:
            fail(f"only the delta has a buffer {name!r}")
        found = buffers[name]
        if (found.dtype, found.shape) != (value.dtype, value.shape):
            fail(f"{name!r} must be {_dtype(value)} {tuple(value.shape)}, is {_dtype(found)} {tuple(found.shape)}")
    found = _fingerprint(parameters, delta.mask)
    changed = [name for name in delta.base if found[name] != delta.base[name]]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        fail(
            f"weights that are not selected differ in {changed[0]!r}{more}; a new parameter, which starts from random "
            "weights, must be selected whole (always_trainable)"
        )
