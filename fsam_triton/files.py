"""Files that are whole or not there, and that show damage."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

_VERSION = 1
_BLANK = b"0" * 64


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary file to write beside `path`; it takes the name `path` only once it is complete."""
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)


def write_file(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and JSON as a safetensors file with a version and a checksum of every byte; whole or not at all.

    Args:
        path: where to.
        kind: what `read_file` will ask for.
        tensors: dense and contiguous, on the CPU.
        meta: what JSON can hold.
    """
    from safetensors.torch import save

    # The checksum comes first in the file. One entry, because the order of several is not always the same.
    text = json.dumps({"sha256": _BLANK.decode(), "kind": kind, "version": _VERSION, **meta})
    data = save(dict(tensors), metadata={"fsam_triton": text})
    with written_whole(path) as temporary:
        temporary.write_bytes(data.replace(_BLANK, hashlib.sha256(data).hexdigest().encode(), 1))


def read_file(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_file` has written.

    Raises:
        ValueError: the file is of another kind or version, truncated or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = Path(path).read_bytes()
    try:
        end = 8 + int.from_bytes(data[:8], "little")
        meta = json.loads(json.loads(data[8:end])["__metadata__"]["fsam_triton"])
        found, version, checksum = meta["kind"], meta["version"], meta["sha256"].encode()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a {kind} file of fsam_triton, or its beginning is damaged") from error
    if (found, version) != (kind, _VERSION):
        raise ValueError(f"{path} is a {found} file of version {version}; must be a {kind} file of version {_VERSION}")
    if hashlib.sha256(data.replace(checksum, _BLANK, 1)).hexdigest().encode() != checksum:
        raise ValueError(f"{path} is truncated or damaged: its checksum is not that of its content")
    try:
        return load(data), meta
    except SafetensorError as error:
        raise ValueError(f"{path} is no valid safetensors file: {error}") from error
