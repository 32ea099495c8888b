"""What stops the command line with one line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what and where."""


class OutputError(OSError):
    """A file cannot be written; the message is one line that says where and why."""


def one_line(error: BaseException) -> str:
    """Return the text of an exception as one line."""
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def writing(path: str | Path | None) -> Iterator[None]:
    """Turn what a full disk and its like raise while ``path`` is written into an OutputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: {getattr(error, 'strerror', None) or one_line(error)}") from error
    except RuntimeError as error:
        # torch's writer hides what the file system has said.
        if isinstance(error.__context__, OSError):
            raise OutputError(f"{path}: {error.__context__.strerror}") from error
        raise
