"""What a bad argument raises: its fields, its text, and that it can be sent to another process."""

import copy
import pickle

import pytest

from fsam_triton import FSAM, ArgumentError, Schedule
from fsam_triton.errors import check


def test_error_of_an_argument_has_its_name_its_value_and_what_is_allowed():
    with pytest.raises(ArgumentError) as caught:
        check(False, "rho", -1.0, "must be >= 0")
    assert (caught.value.name, caught.value.value, caught.value.allowed) == ("rho", -1.0, "must be >= 0")
    assert str(caught.value) == "Invalid rho: -1.0; must be >= 0"


def test_argument_that_is_allowed_raises_nothing():
    check(True, "rho", 0.05, "must be >= 0")


def test_error_of_an_argument_is_a_value_error():
    with pytest.raises(ValueError, match=r"^Invalid rho: -1\.0; "):
        FSAM([], rho=-1.0)
    with pytest.raises(ValueError, match=r"^Invalid every: 0; must be an int >= 1$"):
        Schedule(every=0)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_copy_of_an_error_is_the_same_error(copied):
    error = ArgumentError("betas", (0.9, "x"), "must be two numbers")
    other = copied(error)
    assert type(other) is ArgumentError
    assert (vars(other), str(other)) == (vars(error), str(error))
