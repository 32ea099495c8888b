"""Shared by the pytest-benchmark suites (`pytest bench/ --benchmark-only`): fixtures, and the choice of JSON fields."""

from __future__ import annotations

import functools
import gc
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .bandwidth import ELEMENTS
from .harness import record, short

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tiny", action="store_true", help="sizes that show whether the benchmarks run, and nothing else")


@pytest.fixture(scope="session")
def tiny(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--tiny")


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def buffer(device: str, tiny: bool) -> torch.Tensor:
    """What bandwidth is measured with."""
    return torch.ones(1 << 10 if tiny else ELEMENTS, device=device)


@pytest.fixture(name="record")
def bound_record(benchmark: Any, buffer: torch.Tensor) -> functools.partial[None]:
    """`harness.record` for this benchmark and device."""
    return functools.partial(record, benchmark, buffer=buffer)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def short_collections() -> Iterator[None]:
    """Garbage collections, one before each benchmark, look at what was made since then alone, not at all modules."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def enough_compilations() -> Iterator[None]:
    # A reference pass is compiled for more combinations here than torch.compile allows before it runs eagerly.
    with torch._dynamo.config.patch(recompile_limit=100):
        yield


def processor() -> str:
    """The processor's name."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """What the times depend on, and nothing that names the machine."""
    info = {"cpu": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    return info | ({"cuda": torch.cuda.get_device_name()} if "cuda" in DEVICES else {})


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """A file to commit: no names, paths or dates, few digits, no single measurements."""
    for key in ("commit_info", "datetime"):
        output_json.pop(key)
    output_json["benchmarks"] = [
        {
            **one["extra_info"],
            "rounds": one["stats"]["rounds"],
            **{name: short(one["stats"][name]) for name in ("min", "median", "max")},
        }
        for one in output_json["benchmarks"]
    ]
