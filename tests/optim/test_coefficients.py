"""What FSAM's arguments become before they are coefficients."""

import pytest

from fsam_triton.optim import coefficients


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.6, 1 / 3, 1e-9, 2.0**-15, 1 - 1e-9])
def test_representable_probability_is_the_nearest_multiple_above_zero(beta):
    value = coefficients.representable(beta)
    assert 0 < value <= 1
    assert value * 2**15 == int(value * 2**15)
    assert abs(value - beta) <= 2.0**-16 or value == 2.0**-15


def test_purpose_is_another_one_for_every_seed_and_number():
    purposes = {coefficients.purpose(seed, number) for seed in range(100) for number in range(100)}
    assert len(purposes) == 10_000
    assert all(0 <= purpose < 2**32 for purpose in purposes)
