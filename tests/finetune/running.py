"""Runs the command line in this process, and reads what it has written."""

import contextlib
import json

import pytest

from fsam_triton.finetune.command import finetune
from fsam_triton.finetune.parser import parse

WORDS = ["good", "fine", "bright", "bad", "dull", "grey", "film", "plot", "was", "the"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def command_line(options):
    """Options by name as words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def results(tmp_path):
    return json.loads((tmp_path / "out" / "all_results.json").read_text())


def trained(options, *more):
    """Run the command line in this process, whatever it wrote before, and return its runs."""
    return finetune(parse(["--overwrite_output_dir", *options, *more]))


@contextlib.contextmanager
def files_of_at_most(size):
    """Let no file grow beyond so many bytes: writing more fails, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
