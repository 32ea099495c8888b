"""Keeps the results of long experiments in a file of JSON lines, so that no run is repeated or lost."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def recorded(path: Path) -> list[Record]:
    """The records of a file, without a last line that was not written to its end."""
    return [json.loads(line) for line in _whole(path).splitlines()]


def find(setting: Any, records: Iterable[Record]) -> Record | None:
    """The record of a setting, a dataclass; None if there is none."""
    wanted = asdict(setting).items()
    return next((one for one in records if wanted <= one.items()), None)


def record(settings: Iterable[Any], path: Path, run: Callable[[Any], Record]) -> Iterator[Record]:
    """Give the record of each setting: the one in the file, or that of a run, which is put there.

    Raises:
        BlockingIOError: another process is doing so, and would make the same runs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(len(_whole(path)))
        done = recorded(path)
        for setting in settings:
            found = find(setting, done)
            if found is None:
                found = asdict(setting) | run(setting)
                # Opened anew, because the file may have been replaced during the run, by a checkout say.
                with path.open("ab") as present:
                    present.write(json.dumps(found).encode() + b"\n")
            yield found


def _whole(path: Path) -> bytes:
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1]
