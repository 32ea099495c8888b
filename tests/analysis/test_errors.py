"""What the sharpness tools refuse, and how they say so."""

import math
import sys

import pytest
import torch
from torch import nn

from fsam_triton import FSAM
from fsam_triton.analysis import (
    find_rho,
    hessian_eigenvalues,
    loss_landscape,
    m_sharpness,
    mask_density,
    plot_landscape,
    plot_landscapes,
    plot_mask_density,
    worst_case_sharpness,
)
from tests.analysis.cases import BOWL, LINE, UNEQUAL, Point, classify, measures, mlp, normal

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("measure", "options", "name"),
    [
        (m_sharpness, {"rho": 0.0}, "rho"),
        (m_sharpness, {"rho": math.inf}, "rho"),
        (m_sharpness, {"rho": math.nan}, "rho"),
        (worst_case_sharpness, {"rho": -0.1}, "rho"),
        (worst_case_sharpness, {"steps": 0}, "steps"),
        (worst_case_sharpness, {"steps": 1.5}, "steps"),
        (hessian_eigenvalues, {"k": 0}, "k"),
        (hessian_eigenvalues, {"k": 43}, "k"),
        (hessian_eigenvalues, {"tolerance": 0.0}, "tolerance"),
        (hessian_eigenvalues, {"tolerance": 1.0}, "tolerance"),
        (find_rho, {"rise": 0.0}, "rise"),
        (find_rho, {"rhos": []}, "rhos"),
        (find_rho, {"rhos": [0.0, 0.1]}, "rhos"),
        (find_rho, {"rhos": [0.1, 0.1]}, "rhos"),
        (find_rho, {"rhos": [0.1, math.inf]}, "rhos"),
        (find_rho, {"num_batches": 0}, "num_batches"),
        (loss_landscape, {"dimensions": 3}, "dimensions"),
        (loss_landscape, {"radius": 0.0}, "radius"),
        (loss_landscape, {"points": 1}, "points"),
        (loss_landscape, {"model": nn.LayerNorm(4, dtype=torch.float64)}, "model"),
    ],
)
def test_bad_argument_is_named(measure, options, name):
    with pytest.raises(ValueError, match=f"^Invalid {name}: "):
        measure(**{"model": mlp(), "loss": classify, "batches": UNEQUAL, **options})


def exhausted():
    batches = iter(UNEQUAL)
    list(batches)
    return batches


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"batches": []}, "batches"),
        ({"batches": exhausted()}, "batches"),
        ({"loss": 3}, "loss"),
        ({"loss": lambda model, batch: 1.0}, "loss"),
        ({"loss": lambda model, batch: model(batch[0])}, "loss"),
        ({"model": mlp().requires_grad_(False)}, "model"),
        ({"model": nn.LazyLinear(3)}, "model"),
    ],
)
@measures
def test_bad_argument_is_named_by_every_measure(measure, options, name):
    arguments = {"model": mlp(), "loss": classify, "batches": UNEQUAL, **options}
    with pytest.raises(ValueError, match=f"^Invalid {name}"):
        measure(*arguments.values())


@pytest.mark.parametrize("measure", [m_sharpness, worst_case_sharpness, hessian_eigenvalues, find_rho])
def test_loss_that_does_not_depend_on_the_parameters_is_refused(measure):
    with pytest.raises(ValueError, match=r"^Invalid loss: .*must depend on the model's parameters"):
        measure(mlp(), lambda model, batch: batch[0].mean(), UNEQUAL)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@measures
def test_loss_that_is_not_finite_is_named_with_its_batch(measure, value):
    bad = (torch.full((2, 4), value, dtype=torch.float64), torch.zeros(2, dtype=torch.long))
    with pytest.raises(FloatingPointError, match="loss of batch 1 is nan"):
        measure(mlp(), classify, [UNEQUAL[0], bad])


def test_hessian_that_is_not_finite_is_named():
    """The length of w has no second derivative at zero."""
    model = Point(torch.zeros(8, dtype=torch.float64))
    with pytest.raises(FloatingPointError, match="product with the Hessian"):
        hessian_eigenvalues(model, lambda model, batch: model().norm(), [normal(1, 8)])


def test_optimizer_without_a_fisher_mask_is_refused():
    model = mlp()
    with pytest.raises(ValueError, match=r"^Invalid optimizer: 'FSAM'; must be an FSAM or SAM with a FisherMask"):
        mask_density(FSAM(model.parameters()), model)


@pytest.mark.parametrize("landscapes", [{}, {"line": LINE, "plane": BOWL}])
def test_landscapes_of_different_dimensions_are_refused(landscapes, tmp_path):
    with pytest.raises(ValueError, match=r"^Invalid landscapes"):
        plot_landscapes(landscapes, tmp_path / "plot.png")


def test_densities_of_no_parameter_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^Invalid densities"):
        plot_mask_density({}, tmp_path / "plot.png")


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("scipy.sparse.linalg", lambda path: hessian_eigenvalues(mlp(), classify, UNEQUAL)),
        ("matplotlib.figure", lambda path: plot_landscape(LINE, path)),
        ("matplotlib.figure", lambda path: plot_mask_density({"weight": 0.5}, path)),
    ],
)
def test_missing_library_is_named_with_the_extra_that_has_it(module, call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"fsam-triton\[analysis\]"):
        call(tmp_path / "plot.png")
