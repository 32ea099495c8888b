"""Settings of the pytest-benchmark suites: `pytest bench/ --benchmark-only`."""

import pytest
import torch


def pytest_make_parametrize_id(val: object) -> str | None:
    """Dtypes by their short names."""
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)
