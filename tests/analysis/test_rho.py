"""What find_rho measures, against closed forms and the optimizer's own perturbation, and what it suggests."""

import math

import numpy
import pytest
import torch
from torch.utils.data import DataLoader

from fsam_triton import FSAM
from fsam_triton.analysis import find_rho, plot_rho_search
from tests.analysis.cases import EPS, UNEQUAL, Point, classify, half_square, mlp, normal, quadratic, symmetric

pytestmark = pytest.mark.usefixtures("one_thread")

RHOS = (0.01, 0.03, 0.1, 0.3, 1.0)


def positive_quadratic(hessian):
    inner = quadratic(hessian)
    return lambda model, batch: 100.0 + inner(model, batch)


def test_losses_of_a_quadratic_are_their_closed_form():
    hessian, w = symmetric([5.0, 3.0, 1.0, 0.5, 0.1, -0.2, -1.0, -2.0]), normal(8, seed=2)
    batches = [normal(5, 8, seed=3), normal(2, 8, seed=4)]
    loss, expected = positive_quadratic(hessian), []
    for rho in RHOS:
        rises = []
        for batch in batches:
            g = hessian @ w + batch.mean(0)
            rises.append(float(rho * g.norm() + rho**2 / 2 * (g @ hessian @ g) / g.norm() ** 2))
        expected.append((5 * rises[0] + 2 * rises[1]) / 7)
    search = find_rho(Point(w), loss, batches, rhos=RHOS)
    # Losses are 100 and sums of 8 * 8 products, of which the eigenvalues bound the sum.
    tolerance = 64 * EPS * (100.0 + 5.0 * float(w.norm() + 1) ** 2)
    assert [value - search.loss for value in search.losses] == pytest.approx(expected, abs=tolerance)
    assert search.rhos == RHOS


def test_moves_are_those_of_the_optimizer():
    search = find_rho(mlp(), classify, UNEQUAL, rhos=RHOS)
    expected = [0.0] * len(RHOS)
    for inputs, labels in UNEQUAL:
        for i, rho in enumerate(RHOS):
            model = mlp()
            optimizer = FSAM(model.parameters(), rho=rho)
            classify(model, (inputs, labels)).backward()
            optimizer.perturb()
            expected[i] += len(labels) / 7 * classify(model, (inputs, labels)).item()
            optimizer.restore()
    # The optimizer adds 1e-12 to a norm that is above 0.1, and rounds its coefficient to fp64.
    assert search.losses == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("rise", [0.001, 0.05, 0.4])
def test_suggestion_raises_the_loss_by_the_part_that_was_asked_for(rise):
    w, batches = normal(8, seed=2), [normal(6, 8, seed=3), normal(6, 8, seed=4)]
    search = find_rho(Point(w), half_square, batches, rise=rise, rhos=RHOS)
    between = numpy.interp((1 + rise) * search.loss, [search.loss, *search.losses], [0.0, *RHOS])
    assert search.rho == pytest.approx(float(between), rel=64 * EPS / rise)
    assert search.rise == rise


def test_longest_is_suggested_where_none_raises_the_loss_enough():
    w, x = normal(8, seed=2), normal(6, 8, seed=3)
    search = find_rho(Point(w), half_square, [x], rise=1e6, rhos=RHOS)
    assert search.rho == RHOS[-1]
    assert max(search.losses) < 1e6 * search.loss


def cliff(at):
    """1 + sum(w), which is not finite from a sum on."""

    def loss(model, batch):
        value = model().sum()
        return 1 + value if value < at else value * math.inf

    return loss


def test_loss_that_is_not_finite_ends_the_range():
    """Of 8 weights at zero, the sum rises by sqrt(8) * rho."""
    w, x = torch.zeros(8, dtype=torch.float64), normal(2, 8)
    search = find_rho(Point(w), cliff(1.0), [x], rise=2.0, rhos=RHOS)
    assert [math.isfinite(value) for value in search.losses] == [True, True, True, True, False]
    assert search.rho == 0.3
    with pytest.raises(FloatingPointError, match=r"not finite at a rho of 0\.5"):
        find_rho(Point(w), cliff(1.0), [x], rhos=[0.5, 1.0])


def test_at_most_twenty_forward_passes_are_made_by_default():
    passes, x = [], normal(24, 8, seed=3)

    def loss(model, batch):
        passes.append(len(batch))
        return half_square(model, batch)

    find_rho(Point(normal(8, seed=2)), loss, DataLoader(x, batch_size=4))
    assert passes == [4] * 20


def test_batch_without_a_gradient_stays_at_its_loss():
    w, x = normal(8, seed=2), normal(2, 8, seed=3)
    with_it = find_rho(Point(w), half_square, [x, torch.zeros(2, 8, dtype=torch.float64)], rhos=RHOS)
    assert with_it.losses == tuple(value / 2 for value in find_rho(Point(w), half_square, [x], rhos=RHOS).losses)


def test_model_without_a_gradient_is_refused():
    with pytest.raises(ValueError, match=r"^Invalid model: 'Point'; its gradient is zero for every batch"):
        find_rho(Point(normal(8)), half_square, [torch.zeros(2, 8, dtype=torch.float64)])


def test_loss_below_zero_is_refused():
    with pytest.raises(ValueError, match=r"^Invalid loss: -.*must be > 0"):
        find_rho(mlp(), lambda model, batch: -classify(model, batch), UNEQUAL)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot_is_of_the_kind_that_its_name_says(suffix, tmp_path):
    path = tmp_path / f"plot{suffix}"
    search = find_rho(Point(torch.zeros(8, dtype=torch.float64)), cliff(1.0), [normal(2, 8)], rise=2.0, rhos=RHOS)
    plot_rho_search(search, path)
    assert path.read_bytes().startswith({".png": b"\x89PNG", ".svg": b"<?xml"}[suffix])
