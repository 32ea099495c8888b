"""The error for a bad argument, and warnings that point to the line that calls us."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

# Of calls to a step, torch's hooks around it are not what the user has written.
_NOT_THE_CALLER = tuple(str(Path(file).parent) for file in (__file__, torch.__file__))


class ArgumentError(ValueError):
    """An argument has a value that is not allowed.

    Attributes:
        name: The argument.
        value: The value received.
        allowed: The values that would be accepted.
    """

    name: str
    value: object
    allowed: str

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(name, value, allowed)
        self.name = name
        self.value = value
        self.allowed = allowed

    def __str__(self) -> str:
        return f"Invalid {self.name}: {self.value!r}; {self.allowed}"


def check(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise an ArgumentError unless `ok`."""
    if not ok:
        raise ArgumentError(name, value, allowed)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, pointing to the innermost line that is neither this package's nor torch's."""
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_CALLER):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
