"""Landscapes, densities of masks, and their pictures."""

import copy
import math

import numpy
import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, SAM, FisherMask, FishMask
from fsam_triton.analysis import (
    Landscape,
    density,
    loss_landscape,
    mask_density,
    plot_landscape,
    plot_landscapes,
    plot_mask_density,
)
from fsam_triton.analysis.landscape import _plot_maps
from tests.analysis.cases import BOWL, EPS, FLAT, LINE, UNEQUAL, classify, language_model, mlp
from tests.training import weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


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


# -- densities of a mask -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
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


def test_mask_density_of_sam_around_another_optimizer():
    model = mlp()
    base = torch.optim.SGD(model.named_parameters(), lr=0.1)
    optimizer = SAM(base, mask=FisherMask(keep_ratio=0.3))
    classify(model, UNEQUAL[0]).backward()
    optimizer.perturb()
    density_of = mask_density(optimizer, model)
    assert density_of == {name: float(optimizer.mask_of(p).double().mean()) for name, p in model.named_parameters()}
    assert 0 < density_of["0.weight"] < 1


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
    # An old matplotlib calls a new pyparsing by names that it deprecates, in warnings of both categories.
    warnings = [warning for warning in recwarn if not issubclass(warning.category, DeprecationWarning)]
    assert [str(warning.message) for warning in warnings if issubclass(warning.category, UserWarning)] == []


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
