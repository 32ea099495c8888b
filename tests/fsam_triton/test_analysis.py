"""The sharpness tools against closed forms and dense Hessians; what they leave as it was; errors."""

import copy
import math
import random
import sys

import numpy
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fsam_triton import FSAM, FisherMask, FishMask, MomentumSAM
from fsam_triton.analysis import (
    Landscape,
    density,
    hessian_eigenvalues,
    loss_landscape,
    m_sharpness,
    mask_density,
    plot_landscape,
    plot_landscapes,
    plot_mask_density,
    worst_case_sharpness,
)
from fsam_triton.analysis.landscape import _plot_maps
from tests.training import assert_same_bits, assert_unchanged, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = 2.0**-52
MEASURES = {
    "m_sharpness": m_sharpness,
    "worst_case_sharpness": lambda *args: worst_case_sharpness(*args, steps=3),
    "hessian_eigenvalues": hessian_eigenvalues,
    "loss_landscape": lambda *args: loss_landscape(*args, points=2),
}
measures = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES.keys())


# -- models ------------------------------------------------------------------------------------------------------------


class Point(nn.Module):
    """Weights in two tensors, with nothing around them."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(w[:6].reshape(2, 3).clone())
        self.rest = nn.Parameter(w[6:].clone())

    def forward(self) -> Tensor:
        return torch.cat([self.matrix.flatten(), self.rest])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(eigenvalues: list[float]) -> Tensor:
    n = len(eigenvalues)
    basis = torch.linalg.qr(normal(n, n, seed=1))[0]
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


def quadratic(hessian: Tensor):
    """1/2 w'Hw + c'w, with c the mean of the batch's rows."""

    def loss(model: Point, batch: Tensor) -> Tensor:
        w = model()
        return 0.5 * w @ hessian @ w + batch.mean(0) @ w

    return loss


def half_square(model: Point, batch: Tensor) -> Tensor:
    """The mean over rows x of 1/2 (x'w)^2."""
    return 0.5 * (batch @ model()).square().mean()


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return normal(n, 4, seed=seed), torch.randint(3, (n,), generator=generator)


UNEQUAL = [rows(5, 1), rows(2, 2)]


def language_model(attention: str) -> nn.Module:
    """A decoder whose embedding is its output layer too."""
    config = transformers.GPT2Config(
        vocab_size=7,
        n_embd=4,
        n_layer=1,
        n_head=2,
        n_inner=5,
        n_positions=6,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).double().eval()


def next_token(model: nn.Module, batch: transformers.BatchEncoding) -> Tensor:
    """Not the model's own loss, which is in fp32."""
    return F.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def token_batch(n: int, seed: int) -> transformers.BatchEncoding:
    ids = torch.randint(7, (n, 6), generator=torch.Generator().manual_seed(seed))
    return transformers.BatchEncoding({"input_ids": ids})


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


# -- landscapes --------------------------------------------------------------------------------------------------------


def coordinate(model: nn.Module, index: Tensor) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters())[index].sum()


def directions_of(model: nn.Module, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both directions, one coordinate after the other: the landscape of a coordinate is the coordinate itself."""
    n = sum(p.numel() for p in model.parameters())
    made = [loss_landscape(model, coordinate, [torch.tensor([i])], points=3, seed=seed).losses for i in range(n)]
    flat = torch.stack([torch.stack([z[2, 1] - z[1, 1], z[1, 2] - z[1, 1]]) for z in made], 1).to(torch.float64)
    return tuple(split_like(model, d) for d in flat)


def split_like(model: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    pieces = flat.split([p.numel() for p in model.parameters()])
    return {name: d.view_as(p) for (name, p), d in zip(model.named_parameters(), pieces, strict=True)}


def test_filters_of_directions_have_the_norms_of_the_weights_filters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Linear(2, 3)).double()
    one, other = directions_of(model, seed=0)
    for name, p in model.named_parameters():
        for direction in (one, other):
            expected = p.flatten(1).norm(dim=1) if p.dim() > 1 else torch.zeros(())
            # Differences of two coordinates, each rounded.
            torch.testing.assert_close(
                direction[name].flatten(1).norm(dim=1) if p.dim() > 1 else direction[name].norm(),
                expected.to(torch.float64),
                rtol=100 * EPS,
                atol=0.0,
            )
    assert not torch.equal(one["0.weight"], other["0.weight"])
    again, elsewhere = directions_of(model, seed=0)[0], directions_of(model, seed=1)[0]
    assert torch.equal(one["0.weight"], again["0.weight"])
    assert not torch.equal(one["0.weight"], elsewhere["0.weight"])


@pytest.mark.parametrize("dimensions", [1, 2])
def test_landscape_is_that_of_a_loop_that_writes_the_weights(dimensions):
    model, radius = mlp(), 0.5
    actual = loss_landscape(model, classify, UNEQUAL, dimensions, radius, points=3, seed=4)
    assert actual.coordinates.tolist() == [-0.5, 0.0, 0.5]
    directions, expected = directions_of(model, seed=4), torch.empty([3] * dimensions, dtype=torch.float64)
    for place in numpy.ndindex(*expected.shape):
        moved = copy.deepcopy(model)
        for i, direction in zip(place, directions, strict=False):
            for name, p in moved.named_parameters():
                p.data += actual.coordinates[i] * direction[name]
        with torch.no_grad():
            expected[place] = sum(len(batch[1]) / 7 * classify(moved, batch) for batch in UNEQUAL)
    torch.testing.assert_close(actual.losses, expected, rtol=1000 * EPS, atol=0.0)


@pytest.mark.parametrize("points", [5, 99])
def test_middle_of_a_landscape_is_the_loss_of_the_weights(points):
    model = mlp()
    landscape = loss_landscape(model, classify, UNEQUAL[:1], 1, radius=0.3, points=points)
    assert landscape.coordinates[points // 2] == 0.0
    assert landscape.losses[points // 2] == classify(model, UNEQUAL[0]).double()


# -- 16 bits -----------------------------------------------------------------------------------------------------------


@measures
def test_weights_of_16_bits_are_evaluated_in_fp32(measure):
    """A frozen parameter and buffers, too."""
    model = language_model("sdpa").bfloat16()
    model.transformer.h[0].mlp.c_proj.weight.requires_grad_(False)
    model.register_buffer("scale", torch.ones((), dtype=torch.bfloat16))

    def scaled_loss(model, batch):
        assert model.scale.dtype == torch.float32
        return model.scale * next_token(model, batch)

    results = [measure(m, scaled_loss, [token_batch(2, 1)]) for m in (model, copy.deepcopy(model).float())]
    if measure is MEASURES["loss_landscape"]:
        results = [landscape.losses.tolist() for landscape in results]
    assert results[0] == results[1]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# -- what stays as it was ----------------------------------------------------------------------------------------------


class Boom(Exception):
    pass


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3), nn.Linear(3, 3))
    return nn.Sequential(*layers).double()


class Noisy:
    """A loss that draws random numbers, counts in a buffer, and may raise in its third call."""

    def __init__(self, fails: bool = False) -> None:
        self.left = 2 if fails else math.inf
        self.modes: set[bool] = set()

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if self.left == 0:
            raise Boom
        self.left -= 1
        self.modes |= {module.training for module in model.modules()}
        torch.rand(1), numpy.random.rand(), random.random()
        model[1].num_batches_tracked += 1
        return classify(model, batch)


@pytest.mark.parametrize("fails", [False, True])
@measures
def test_model_and_random_states_stay_as_they_were(measure, fails):
    model, loss, called = net().train(), Noisy(fails), []
    model[4].eval()
    model[5].weight.requires_grad_(False)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 7.0) if i % 2 else None
        if p.requires_grad:
            p.register_hook(lambda g: called.append("tensor hook"))
            p.register_post_accumulate_grad_hook(lambda p: called.append("post-accumulate hook"))
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    before = {name: (x, x.clone(), x._version, x.grad, x.requires_grad) for name, x in tensors.items()}
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    loader = DataLoader([(x, y) for x, y in zip(*rows(6, 3), strict=True)], batch_size=3, shuffle=True)
    if fails:
        with pytest.raises(Boom):
            measure(model, loss, loader)
    else:
        measure(model, loss, loader)
    assert loss.modes == {False}
    assert [module.training for module in model.modules()] == modes
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        same, value, version, grad, requires_grad = before[name]
        assert x is same, name
        assert torch.equal(x, value), name
        assert (x._version, x.requires_grad) == (version, requires_grad)
        assert x.grad is grad
        assert grad is None or bool((grad == 7.0).all())
    assert not called
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert str(numpy.random.get_state()) == str(states[2])


@pytest.mark.parametrize("fails", [False, True])
def test_states_are_put_back_when_the_loader_raises(fails):
    model, state = net().train(), torch.get_rng_state()

    def loader():
        torch.rand(1)
        assert not model.training
        yield rows(3, 1)
        if fails:
            raise Boom

    if fails:
        with pytest.raises(Boom):
            m_sharpness(model, classify, loader())
    else:
        m_sharpness(model, classify, loader())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


@measures
def test_frozen_parameters_are_not_moved(measure):
    model, seen = net(), set()
    model[4].requires_grad_(False)

    def loss(model, batch):
        seen.add(tuple(model[4].weight.flatten().tolist()))
        return classify(model, batch)

    measure(model, loss, [rows(3, 1)])
    assert seen == {tuple(model[4].weight.flatten().tolist())}


@pytest.fixture
def eager_optimizers():
    """Compiling their passes takes longer than all of these tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


@measures
@pytest.mark.parametrize("make", [FSAM, MomentumSAM])
@pytest.mark.usefixtures("eager_optimizers")
def test_training_with_master_weights_goes_on_as_if_nothing_had_been_measured(make, measure):
    """Had a 16-bit weight been written, its master would have lost the lower bits."""

    def trained(measured: bool) -> nn.Module:
        model = mlp(torch.bfloat16)
        optimizer = make(model.parameters(), lr=1e-3, master_weights=True)
        batch = UNEQUAL[0][0].bfloat16(), UNEQUAL[0][1]
        wide = UNEQUAL[0][0].float(), UNEQUAL[0][1]

        def closure():
            optimizer.zero_grad()
            loss = classify(model, batch)
            loss.backward()
            return loss

        for step in range(4):
            optimizer.step(closure)
            if measured and step % 2:
                before = weights_of(model)
                measure(model, classify, [wide])
                assert_unchanged(model, before)
        return model

    assert_same_bits(trained(True), trained(False))


@pytest.mark.usefixtures("eager_optimizers")
def test_sharpness_is_that_of_the_clean_weights_once_momentum_sam_is_in_eval_mode():
    model = mlp()
    optimizer = MomentumSAM(model.parameters(), lr=1e-2, rho=0.5)
    for _ in range(2):
        classify(model, UNEQUAL[0]).backward()
        optimizer.step()
    perturbed = m_sharpness(model, classify, UNEQUAL)
    optimizer.eval()
    clean = m_sharpness(model, classify, UNEQUAL)
    assert clean != perturbed
    apart = mlp()
    apart.load_state_dict(model.state_dict())
    assert m_sharpness(apart, classify, UNEQUAL) == clean


@measures
def test_gradients_may_be_off_around_the_call(measure):
    with torch.no_grad():
        actual = measure(mlp(), classify, UNEQUAL)
    expected = measure(mlp(), classify, UNEQUAL)
    if isinstance(actual, Landscape):
        actual, expected = actual.losses.tolist(), expected.losses.tolist()
    assert actual == expected


@measures
def test_compiled_model_is_evaluated_uncompiled(measure):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    actual, expected = (measure(m, classify, UNEQUAL) for m in (torch.compile(mlp(), backend=backend), mlp()))
    if isinstance(actual, Landscape):
        actual, expected = actual.losses.tolist(), expected.losses.tolist()
    assert actual == expected
    assert not compiled


# -- densities of a mask -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.usefixtures("eager_optimizers")
def test_mask_density_is_the_fraction_of_weights_that_moves(named):
    model = mlp()
    model[2].bias.requires_grad_(False)
    given = [(name, p) for name, p in model.named_parameters() if name != "2.bias"]
    optimizer = FSAM(given if named else [p for _, p in given], mask=FisherMask(keep_ratio=0.3), rho=10.0)
    before = weights_of(model)
    classify(model, UNEQUAL[0]).backward()
    optimizer.perturb()
    moved = {
        name: float((p != w).double().mean()) for (name, p), w in zip(model.named_parameters(), before, strict=True)
    }
    assert mask_density(optimizer, model) == moved
    assert 0 < moved["0.weight"] < 1
    assert moved["2.bias"] == 0.0


def test_heat_map_has_a_row_for_each_layer_and_a_column_for_each_of_its_tensors():
    model = language_model("eager")
    densities = {name: i / 100 for i, (name, _) in enumerate(model.named_parameters())}
    layers, tensors, cells = density.layers_by_tensors(densities)
    assert layers == ["transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.ln_f"]
    assert tensors[:3] == ["weight", "ln_1.weight", "ln_1.bias"]
    assert tensors[-1] == "bias"
    filled = {
        f"{layer}.{tensor}": value
        for layer, row in zip(layers, cells, strict=True)
        for tensor, value in zip(tensors, row, strict=True)
        if not math.isnan(value)
    }
    assert filled == densities


# -- pictures ----------------------------------------------------------------------------------------------------------

FLAT = Landscape(torch.tensor([-1.0, 0.0, 1.0]), torch.ones(3, 3))
BOWL = Landscape(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([[2.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 2.0]]))
LINE = Landscape(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 1.0]))


@pytest.mark.parametrize(
    "plot",
    [
        lambda path: plot_landscape(BOWL, path),
        lambda path: plot_landscape(LINE, path),
        lambda path: plot_landscapes({"AdamW": FLAT, "SAM": BOWL}, path),
        lambda path: plot_landscape(FLAT, path),
        lambda path: plot_landscapes({"AdamW": LINE, "SAM": LINE}, path),
        lambda path: plot_mask_density({"layer.0.weight": 0.1, "layer.1.weight": 1.0, "bias": 0.0}, path, "a mask"),
        lambda path: FishMask({}, {"w": (4,)}).plot(path),
    ],
    ids=["plane", "line", "planes", "flat plane", "lines", "densities", "empty mask"],
)
def test_plot_is_an_image_and_matplotlib_warns_of_nothing(plot, tmp_path, recwarn):
    plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [str(warning.message) for warning in recwarn if issubclass(warning.category, UserWarning)] == []


@pytest.mark.parametrize("rise", [1e-5, 0.1, 300.0])
def test_no_two_heights_of_a_map_have_one_label(rise):
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    _plot_maps(figure, {"": Landscape(BOWL.coordinates, 0.6931 + rise * BOWL.losses)})
    figure.draw_without_rendering()
    labels = [label.get_text() for label in figure.axes[-1].get_yticklabels()]
    assert len(set(labels)) == len(labels) > 2


@pytest.mark.parametrize(("suffix", "head"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_type_of_an_image_follows_the_suffix(suffix, head, tmp_path):
    plot_landscape(LINE, tmp_path / f"plot.{suffix}")
    assert (tmp_path / f"plot.{suffix}").read_bytes().startswith(head)


# -- errors ------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("measure", [m_sharpness, worst_case_sharpness, hessian_eigenvalues])
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
    with pytest.raises(ValueError, match=r"^Invalid optimizer: 'FSAM'; must be an FSAM with a FisherMask"):
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
