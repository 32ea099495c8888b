"""Training programs drawn by hypothesis do what the fp64 reference does, and their copies do the same to the bit."""

import pytest
from hypothesis import HealthCheck, given, settings

from tests.optim.checker import Checker
from tests.optim.drawing import programs
from tests.processes import eager_passes

pytestmark = pytest.mark.usefixtures("one_thread", "quick")


@pytest.fixture(scope="module")
def quick():
    """Passes as plain PyTorch, of which other tests say that C++ changes no bit."""
    with eager_passes():
        yield


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has taken 5 steps")
@pytest.mark.parametrize(("kind", "count"), [("AdamWL2SP", 150), ("FSAM", 300), ("MomentumSAM", 250)])
def test_programs_equal_the_reference_and_their_copies(kind, count):
    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(programs(kind))
    def run(program):
        checker = Checker(program)
        for number, action in enumerate(program.actions):
            checker.do(number, action)

    run()
