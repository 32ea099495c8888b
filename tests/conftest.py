"""What tests of optimizers share."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Models of a few thousand weights: threads would spend the time waiting for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
