"""What all tests share."""

import gc
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.objects import freeze_objects

INTEGRATION = Path(__file__).parent / "integration"


def load_bench() -> None:
    """Make `bench` importable, which is not installed. Not by way of sys.path, where `kernels` would turn up too."""
    folder = Path(__file__).parents[1] / "bench"
    spec = importlib.util.spec_from_file_location(
        "bench", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["bench"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["bench"])


load_bench()


def pytest_configure() -> None:
    """Processes of pytest-xdist share the cores: threads of one would wait, spinning, for those of another."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module", autouse=True)
def objects_of_before_are_frozen() -> Iterator[None]:
    """None of them is a model of this file's. Tests see whether they have frozen others themselves."""
    freeze_objects()
    frozen, freeze, unfreeze = [], gc.freeze, gc.unfreeze
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "freeze", lambda: frozen.append(True) or freeze())
        patch.setattr(gc, "unfreeze", lambda: frozen.clear() or unfreeze())
        patch.setattr(gc, "get_freeze_count", lambda: len(frozen))
        yield


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Nothing of ten thousand tests is garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A first check does not wait for the imports of other libraries, whose tests it leaves out."""
    return True if collection_path == INTEGRATION and config.option.markexpr == "not slow" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What a first check leaves out: other libraries, and all but the first and the last case of each test."""
    cases = itertools.groupby(items, lambda item: (item.path, getattr(item, "originalname", item.name)))
    for (path, _), of_one in cases:
        of_one = list(of_one)
        for item in of_one if path.is_relative_to(INTEGRATION) else of_one[1:-1]:
            item.add_marker(pytest.mark.slow)


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="module")
def one_thread():
    """Models of a few thousand weights: threads would spend the time waiting for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
