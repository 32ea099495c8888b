"""What tests of estimate_fisher share."""

import pytest

from fsam_triton.fisher import slow


@pytest.fixture
def slow_names(monkeypatch) -> set[str]:
    """Fills with the names of parameters that go the slow way."""
    seen: set[str] = set()
    original = slow.SlowPasses.add

    def add(self, names, batch):
        seen.update(names)
        original(self, names, batch)

    monkeypatch.setattr(slow.SlowPasses, "add", add)
    return seen
