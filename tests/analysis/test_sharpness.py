"""Sharpness and eigenvalues against closed forms and dense Hessians."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fsam_triton.analysis import (
    hessian_eigenvalues,
    m_sharpness,
    worst_case_sharpness,
)
from tests.analysis.cases import (
    EPS,
    UNEQUAL,
    Point,
    classify,
    half_square,
    language_model,
    mlp,
    next_token,
    normal,
    quadratic,
    symmetric,
    token_batch,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# -- sharpness ---------------------------------------------------------------------------------------------------------


def test_m_sharpness_of_a_quadratic_is_its_closed_form():
    hessian, w, rho = symmetric([5.0, 3.0, 1.0, 0.5, 0.1, -0.2, -1.0, -2.0]), normal(8, seed=2), 0.3
    batches = [normal(5, 8, seed=3), normal(2, 8, seed=4)]
    expected = 0.0
    for batch in batches:
        g = hessian @ w + batch.mean(0)
        rise = rho * g.norm() + rho**2 / 2 * (g @ hessian @ g) / g.norm() ** 2
        expected += len(batch) / 7 * float(rise)
    actual = m_sharpness(Point(w), quadratic(hessian), batches, rho)
    # Losses are sums of 8 * 8 products, of which the eigenvalues bound the sum.
    assert actual == pytest.approx(expected, abs=64 * EPS * 5.0 * float(w.norm() + rho) ** 2)


def test_m_sharpness_takes_every_batch_for_a_group():
    x, w = normal(6, 8, seed=3), normal(8, seed=2)
    apart = [m_sharpness(Point(w), half_square, [group]) for group in x.split(2)]
    assert m_sharpness(Point(w), half_square, DataLoader(x, batch_size=2)) == pytest.approx(sum(apart) / 3, rel=8 * EPS)
    assert m_sharpness(Point(w), half_square, [x]) < 0.9 * sum(apart) / 3


def test_batch_without_a_gradient_adds_nothing_to_m_sharpness():
    w, x = normal(8, seed=2), normal(2, 8, seed=3)
    alone = m_sharpness(Point(w), half_square, [x])
    assert m_sharpness(Point(w), half_square, [x, torch.zeros(2, 8, dtype=torch.float64)]) == alone / 2


def largest_rise(hessian: Tensor, g: Tensor, rho: float) -> tuple[float, float]:
    """The maximum of g'e + 1/2 e'He over norm(e) = rho, and its multiplier mu: (mu - H) e = g."""
    values, vectors = torch.linalg.eigh(hessian)
    c = vectors.T @ g
    low, high = float(values[-1]), float(values[-1] + g.norm() / rho)
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if float((c / (mu - values)).norm()) > rho else (low, mu)
    e = c / (high - values)
    return float(c @ e + 0.5 * (values * e * e).sum()), high


@pytest.mark.parametrize("smallest", [0.1, -3.0])
def test_worst_case_sharpness_of_a_quadratic_is_the_trust_regions_maximum(smallest):
    hessian, w, rho, steps = symmetric([4.0, 2.0, 1.5, 1.0, 0.5, 0.3, 0.2, smallest]), normal(8, seed=2), 0.5, 100
    batches = [normal(5, 8, seed=3), normal(2, 8, seed=4)]
    exact, mu = largest_rise(hessian, hessian @ w + torch.cat(batches).mean(0), rho)
    # Close to the maximum, a step of 2 rho multiplies an error along the sphere by this; the rise errs by its square.
    assert ((1 + 2 * 4.0 / mu) / 3) ** (2 * steps) < EPS
    actual = worst_case_sharpness(Point(w), quadratic(hessian), batches, rho, steps)
    assert actual == pytest.approx(exact, abs=64 * EPS * 5.0 * float(w.norm() + rho) ** 2)


def test_worst_case_sharpness_at_a_minimum_is_that_of_the_largest_eigenvalue():
    hessian, rho, steps = symmetric([10.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]), 0.1, 60
    assert ((1 + 2 * 1.0 / 10.0) / 3) ** (2 * steps) < EPS
    actual = worst_case_sharpness(
        Point(torch.zeros(8, dtype=torch.float64)),
        quadratic(hessian),
        [torch.zeros(1, 8, dtype=torch.float64)],
        rho,
        steps,
    )
    assert actual == pytest.approx(rho**2 / 2 * 10.0, rel=64 * EPS)


def test_worst_case_sharpness_finds_a_maximum_inside_the_ball():
    """w - 2 w^2 from 0: SAM's step to 1 falls; halved steps of 2, 1, 1/2 and 1/4 find the maximum, to the bit."""
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.zero_()

    def loss(model, batch):
        w = model(batch).mean()
        return w - 2 * w * w

    batches = [torch.ones(1, 1, dtype=torch.float64)]
    assert m_sharpness(model, loss, batches, rho=1.0) == -1.0
    assert [worst_case_sharpness(model, loss, batches, 1.0, steps) for steps in (1, 3, 4)] == [0.0, 0.0, 0.125]


def test_steps_of_worst_case_sharpness_grow_again():
    """A slope, a pit and a hill: halved steps of 2, 1 and 1/2 find the slope, a doubled one from there the hill."""
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.zero_()

    def loss(model, batch):
        w = model(batch).mean()
        pit_and_hill = torch.where((w - 0.75).abs() < 0.1, 1.0, -1.0)
        return torch.where(w < 0.3, w, pit_and_hill)

    batches = [torch.ones(1, 1, dtype=torch.float64)]
    assert [worst_case_sharpness(model, loss, batches, 1.0, steps) for steps in (3, 4, 5)] == [0.0, 0.25, 1.0]


def test_first_step_of_worst_case_sharpness_is_sams():
    x, w = normal(6, 8, seed=3), normal(8, seed=2)
    first = worst_case_sharpness(Point(w), half_square, [x], steps=1)
    # The radius is rounded once more, by the projection.
    assert first == pytest.approx(
        m_sharpness(Point(w), half_square, [x]), abs=64 * EPS * half_square(Point(w), x).item()
    )
    assert worst_case_sharpness(Point(w), half_square, [x], steps=5) > first


def test_batches_of_unknown_size_count_equally():
    model = nn.Linear(1, 1, bias=False).double()

    def loss(model, batch):
        return batch["slope"] * model.weight.sum()

    assert m_sharpness(model, loss, [{"slope": 1.0}, {"slope": 2.0}], rho=1.0) == pytest.approx(1.5, rel=8 * EPS)


# -- eigenvalues of the Hessian ----------------------------------------------------------------------------------------


def test_eigenvalues_of_a_linear_models_hessian_are_those_of_its_data():
    x = normal(12, 8, seed=3)
    expected = torch.linalg.eigvalsh(x.T @ x / 12).flip(0)[:3]
    actual = hessian_eigenvalues(Point(normal(8)), half_square, [x[:9], x[9:]], k=3, tolerance=1e-12)
    assert actual == pytest.approx(expected.tolist(), rel=1e-12 + 100 * EPS)


def test_largest_eigenvalues_are_the_algebraically_largest():
    hessian, batches = symmetric([3.0, 2.0, 0.0, -1.0, -2.0, -3.0, -4.0, -50.0]), [normal(2, 8)]
    actual = hessian_eigenvalues(Point(normal(8)), quadratic(hessian), batches, k=2, tolerance=1e-10)
    # ARPACK's tolerance is relative to the eigenvalue, its arithmetic to the norm.
    assert actual == pytest.approx([3.0, 2.0], rel=1e-10, abs=100 * EPS * 50)


def test_more_eigenvalues_may_be_asked_for_than_the_hessian_has_rank():
    x = normal(1, 8, seed=3)
    actual = hessian_eigenvalues(Point(normal(8)), half_square, [x], k=3)
    assert actual == pytest.approx(
        [float(x.square().sum()), 0.0, 0.0], rel=1e-3, abs=100 * EPS * float(x.square().sum())
    )


def test_eigenvalues_of_a_linear_loss_are_zero():
    assert hessian_eigenvalues(
        Point(normal(8)), lambda model, batch: (batch @ model()).mean(), [normal(2, 8)], k=2
    ) == [
        0.0,
        0.0,
    ]


def test_eigenvalues_of_an_mlp_are_those_of_its_full_hessian():
    model, (x, y) = mlp(), (torch.cat(part) for part in zip(*UNEQUAL, strict=True))
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def loss(flat):
        pieces = flat.split([shape.numel() for shape in shapes.values()])
        weights = {name: w.view(shape) for (name, shape), w in zip(shapes.items(), pieces, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)

    expected = torch.linalg.eigvalsh(torch.func.hessian(loss)(flat)).flip(0)[:2]
    actual = hessian_eigenvalues(model, classify, UNEQUAL, k=2, tolerance=1e-10)
    assert actual == pytest.approx(expected.tolist(), rel=1e-10 + 1000 * EPS)


def test_eigenvalue_of_a_transformer_with_tied_weights_is_that_of_its_full_hessian():
    """Its fused attention could not be differentiated twice."""
    batches, model = [token_batch(3, 1), token_batch(1, 2)], language_model("eager")
    params = list(model.parameters())
    value = sum(len(batch["input_ids"]) / 4 * next_token(model, batch) for batch in batches)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, params, create_graph=True)])
    unit = torch.eye(len(gradient), dtype=torch.float64)
    columns = torch.autograd.grad(gradient, params, unit, is_grads_batched=True)
    expected = torch.linalg.eigvalsh(torch.cat([part.flatten(1) for part in columns], 1))[-1]
    actual = hessian_eigenvalues(language_model("sdpa"), next_token, batches, tolerance=1e-9)
    assert actual == pytest.approx([float(expected)], rel=1e-9 + 1000 * EPS)


def test_eigenvalue_in_fp32_is_within_the_tolerance():
    batches = [(x.float(), y) for x, y in UNEQUAL]
    exact = hessian_eigenvalues(mlp(), classify, UNEQUAL, tolerance=1e-10)
    assert hessian_eigenvalues(mlp(torch.float32), classify, batches) == pytest.approx(exact, rel=1e-3)
