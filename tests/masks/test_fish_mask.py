"""FishMask: what goes in and comes out, and set algebra."""

import itertools
import os

import pytest
import torch
from torch import nn

from fsam_triton import FishMask
from tests.masks.fish_masks import odd_scores, sets, sizes, small_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("indices", "shape"),
    [
        ([0, 4], (2, 2)),
        ([-1, 2], (2, 2)),
        ([2, 1], (2, 2)),
        ([1, 1], (2, 2)),
        ([[0, 1]], (2, 2)),
        ([0.0, 1.0], (2, 2)),
        ([False, True], (2, 2)),
        ([0], (0,)),
    ],
)
def test_indices_that_are_not_ascending_integers_in_the_shape_are_refused(indices, shape):
    with pytest.raises(ValueError, match="those of 'w' must be ascending integers"):
        FishMask({"w": torch.tensor(indices)}, {"w": shape})


def test_indices_without_a_shape_are_refused():
    with pytest.raises(ValueError, match=r"Invalid indices: \['v'\]; every name must have a shape"):
        FishMask({"v": torch.tensor([0])}, {"w": (2, 2)})


def test_nothing_that_goes_in_or_comes_out_can_change_a_mask():
    indices, shapes = torch.tensor([0, 2], dtype=torch.int32), {"w": [2, 2]}
    mask = FishMask({"w": indices}, shapes)
    indices[0] = 1
    shapes["w"][0] = 7
    mask.indices("w")[0] = 1
    mask.bits("w").fill_(True)
    mask.shapes.clear()
    assert mask.indices("w").tolist() == [0, 2]
    assert mask.shapes == {"w": (2, 2)}


def test_indices_are_int64_only_where_int32_does_not_reach():
    mask = FishMask({"a": torch.tensor([5, 2**31])}, {"a": (2**31 + 1,), "b": (2**31,)})
    assert mask.indices("a").dtype == torch.int64
    assert mask.indices("a").tolist() == [5, 2**31]
    assert mask.indices("b").dtype == torch.int32


def test_bits_are_booleans_in_the_shape_of_the_parameter():
    mask = FishMask({"w": torch.tensor([1, 5]), "s": torch.tensor([0])}, {"w": (2, 3), "s": (), "e": (0, 4)})
    assert mask.bits("w").tolist() == [[False, True, False], [False, False, True]]
    assert mask.bits("s").shape == ()
    assert mask.bits("s").item() is True
    assert mask.bits("e").shape == (0, 4)


def test_names_that_a_mask_does_not_know_are_refused():
    for ask in (FishMask({}, {"w": (2,)}).bits, FishMask({}, {"w": (2,)}).indices):
        with pytest.raises(ValueError, match="Invalid name: 'v'"):
            ask("v")


def test_counts_and_densities_are_those_of_the_bits():
    mask = FishMask.from_scores(odd_scores(), 0.3)
    assert mask.count == sum(int(mask.bits(name).sum()) for name in mask.shapes)
    assert mask.total == sizes(odd_scores())
    assert mask.density == mask.count / mask.total
    for name, density in mask.density_by_tensor().items():
        assert density == (mask.bits(name).double().mean() if mask.bits(name).numel() else 0)
    assert FishMask({}, {}).density == 0


def test_table_has_a_line_for_every_parameter_and_one_for_all():
    mask = FishMask({"w": torch.arange(1500)}, {"w": (2000, 3), "empty": (0,)})
    assert [line.split() for line in mask.table().splitlines()] == [
        ["parameter", "weights", "selected", "density"],
        ["w", "6,000", "1,500", "25.000%"],
        ["empty", "0", "0", "0.000%"],
        ["all", "6,000", "1,500", "25.000%"],
    ]
    assert len({len(line) for line in mask.table().splitlines()}) == 1
    assert repr(mask) == "FishMask(1,500 of 6,000 weights)"


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_is_an_image_of_the_type_of_its_suffix(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    FishMask.from_scores(odd_scores(), 0.3).plot(tmp_path / f"mask.{suffix}")
    start = (tmp_path / f"mask.{suffix}").read_bytes()[:5]
    assert start == {"png": b"\x89PNG\r", "svg": b"<?xml"}[suffix]
    assert os.listdir(tmp_path) == [f"mask.{suffix}"]


def test_plot_of_an_empty_mask_is_an_image_too(tmp_path):
    pytest.importorskip("matplotlib")
    FishMask({}, {"w": (4,)}).plot(tmp_path / "mask.png")
    assert (tmp_path / "mask.png").stat().st_size > 0


# -- set algebra -------------------------------------------------------------------------------------------------------


def pairs() -> list[tuple[FishMask, FishMask]]:
    empty = FishMask({}, {name: score.shape for name, score in odd_scores().items()})
    masks = [FishMask.from_scores(odd_scores(seed), ratio) for seed, ratio in ((0, 0.3), (1, 0.5), (2, 1.0))]
    return list(itertools.product([empty, *masks], repeat=2))


@pytest.mark.parametrize("operation", ["__or__", "__and__", "__sub__"])
def test_operators_are_those_of_sets(operation):
    for first, second in pairs():
        result = getattr(first, operation)(second)
        mine, theirs = sets(first), sets(second)
        assert sets(result) == {name: getattr(mine[name], operation)(theirs[name]) for name in mine}
        assert list(result.shapes) == list(first.shapes)


def test_masks_are_equal_if_they_select_the_same():
    for first, second in pairs():
        assert (first == second) == (sets(first) == sets(second))
    assert FishMask({}, {"w": (2,)}) != FishMask({}, {"w": (3,)})
    assert FishMask({}, {"w": (2,)}) != FishMask({}, {"w": (1, 2)})
    assert FishMask({}, {"v": (1,), "w": (2,)}) == FishMask({}, {"w": (2,), "v": (1,)})
    assert FishMask({}, {}) != "mask"


def test_overlap_is_what_both_select_over_what_either_selects():
    for first, second in pairs():
        either = (first | second).count
        assert first.overlap(second) == ((first & second).count / either if either else 1.0)


@pytest.mark.parametrize("other", [{"w": (4,)}, {"w": (2, 2), "v": (1,)}, {}], ids=["shape", "more", "fewer"])
def test_masks_over_other_parameters_do_not_combine(other):
    first, second = FishMask({}, {"w": (2, 2)}), FishMask({}, other)
    with pytest.raises(ValueError, match="must have the other mask's shape"):
        _ = first | second
    with pytest.raises(ValueError, match="must have the other mask's shape"):
        _ = second & first


def test_masks_do_not_combine_with_other_things():
    with pytest.raises(TypeError):
        _ = FishMask({}, {}) | {}


@pytest.mark.parametrize("n", [1, 2, 3, 7, 1000])
def test_split_deals_the_selected_weights_of_all_tensors_out_in_turn(n):
    mask = FishMask.from_scores(odd_scores(), 0.4)
    order = [(name, i) for name in mask.shapes for i in mask.indices(name).tolist()]
    parts = mask.split(n)
    assert len(parts) == n
    for i, part in enumerate(parts):
        assert [(name, j) for name in part.shapes for j in part.indices(name).tolist()] == order[i::n]
        assert part.shapes == mask.shapes
    union = parts[0]
    for part in parts[1:]:
        assert (union & part).count == 0
        union |= part
    assert union == mask


def test_split_into_no_masks_is_refused():
    with pytest.raises(ValueError, match="Invalid n: 0"):
        FishMask({}, {}).split(0)


def test_check_fits_names_the_first_parameter_that_is_missing_or_has_another_shape():
    mask = FishMask.random(small_model(), 0.5)
    mask.check_fits(small_model())
    more = small_model()
    more["extra"] = nn.Linear(2, 2)
    mask.check_fits(more)
    other = small_model()
    other["norm"] = nn.LayerNorm(4)
    with pytest.raises(ValueError, match=r"Invalid model: \(4,\); 'norm.weight' must have the mask's shape \(20,\)"):
        mask.check_fits(other)
    with pytest.raises(ValueError, match=r"must have the mask's parameter 'encoder.weight'"):
        mask.check_fits(nn.Linear(2, 2))
