"""The choice of units with the highest scores, against brute force with exact fractions."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fsam_triton import FisherMask
from fsam_triton.buffers.lanes import Lanes
from fsam_triton.buffers.members import Member
from fsam_triton.masks import selection

pytestmark = pytest.mark.usefixtures("one_thread")


# -- units -------------------------------------------------------------------------------------------------------------

UNITS = ("element", "tensor", "row", 32, 128)


def units_of(p: Tensor, unit: str | int) -> list[list[tuple[int, ...]]]:
    """The coordinates of a parameter's weights, unit by unit and within a unit in memory order."""
    coordinates = itertools.product(*map(range, p.shape))
    in_memory = sorted(coordinates, key=lambda at: sum(i * stride for i, stride in zip(at, p.stride(), strict=True)))
    if unit == "row":
        rows = {at[:1]: [other for other in in_memory if other[:1] == at[:1]] for at in sorted(in_memory)}
        return list(rows.values())
    size = {"element": 1, "tensor": max(p.numel(), 1)}.get(unit, unit)
    return [in_memory[start : start + size] for start in range(0, len(in_memory), size)]


def expected_masks(values: list[Tensor], k: int, unit: str | int, squared: bool = False) -> list[Tensor]:
    """The masks by the definition, with scores that are exact fractions."""
    units = []
    for value in values:
        out = torch.zeros(value.shape, dtype=torch.bool)
        for unit_of_it in units_of(value, unit):
            numbers = [float(value[at]) for at in unit_of_it]
            exact = [Fraction(0 if math.isnan(x) else x) ** (1 if squared else 2) for x in numbers]
            score = Fraction(0) if any(map(math.isnan, numbers)) else sum(exact) / len(exact)
            units.append((score, unit_of_it, out))
        units.append((Fraction(-1), [], out))
    left = k
    for _, unit_of_it, out in sorted(units, key=lambda entry: -entry[0]):
        if len(unit_of_it) > left:
            break
        left -= len(unit_of_it)
        for at in unit_of_it:
            out[at] = True
    return [out for _, unit_of_it, out in units if not unit_of_it]


def integers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """From -5 to 5, so that there are ties and all squares, sums and comparisons of means are exact."""
    return torch.randint(-5, 6, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def odd_values(seed: int = 0) -> list[list[Tensor]]:
    """Values for four lanes of parameters of odd shapes, strides and types."""

    def made(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [integers(shape, dtype, seed * 100 + len(shape) * 10 + i) for i, shape in enumerate(shapes)]

    pixels, transposed = made((6, 3, 4, 5), (9, 40))
    return [
        [*made((7, 5)), pixels.to(memory_format=torch.channels_last), *made((), (0, 3), (33,)), transposed.t()],
        made((10, 13), (129,), (2, 64), dtype=torch.bfloat16),
        [made((3, 50, 2), dtype=torch.float64)[0].permute(2, 0, 1)],
        made((128,), (1, 32), (4, 0), (31,)),
    ]


def lanes_for(values: list[list[Tensor]], apart: bool = False) -> tuple[selection.Selectable, list[Tensor]]:
    """Lanes of parameters that have the shapes, strides and types of the values, and the values in their layout."""
    selectable, flats = [], []
    for group in [[value] for value in flattened(values)] if apart else values:
        parameters = [nn.Parameter(value.clone()) for value in group]
        options = {"params": parameters}
        lanes = Lanes([Member(p, options, i, i) for i, p in enumerate(parameters)])
        selectable.append((lanes, range(len(group))))
        flats.append(torch.zeros(lanes.plan.size, dtype=group[0].dtype))
        for i, value in enumerate(group):
            lanes.plan.part(flats[-1], i).as_strided(value.shape, value.stride()).copy_(value)
    return selectable, flats


def masks_in(selectable: selection.Selectable) -> list[Tensor]:
    """The masks of the parameters, read bit by bit; nothing else may be set in the lanes' masks."""
    out = []
    for lanes, _ in selectable:
        words = lanes.lanes["mask"].tolist()
        ones = {i * 32 + bit for i, word in enumerate(words) for bit in range(32) if word >> bit & 1}
        for i, p in enumerate(lanes.params):
            out.append(torch.zeros(p.shape, dtype=torch.bool))
            for at in itertools.product(*map(range, p.shape)):
                place = lanes.plan.offsets[i] + sum(j * stride for j, stride in zip(at, p.stride(), strict=True))
                out[-1][at] = place in ones
                ones.discard(place)
        assert not ones
    return out


def flattened(values: list[list[Tensor]]) -> list[Tensor]:
    return [value for group in values for value in group]


def weights(values: list[Tensor]) -> int:
    return sum(value.numel() for value in values)


def assert_same(masks: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(*pair) for pair in zip(masks, expected, strict=True))


# The largest tensor has 360 weights, the largest row 150; all have 1,667.
@pytest.mark.parametrize("k", [360, 361, 500, 777, 1666, 1667])
@pytest.mark.parametrize("unit", UNITS)
def test_units_of_the_highest_mean_squares_are_chosen(unit, k):
    values = odd_values(seed=k)
    assert weights(flattened(values)) == 1667
    selectable, flats = lanes_for(values)
    selection.choose(FisherMask(0.5, unit=unit), selectable, flats, k, key=0)
    chosen = masks_in(selectable)
    assert_same(chosen, expected_masks(flattened(values), k, unit))
    assert 0 < sum(mask.sum() for mask in chosen) <= k


@pytest.mark.parametrize("unit", UNITS)
def test_units_are_chosen_alike_in_lanes_of_one_parameter(unit):
    values = odd_values()
    selectable, flats = lanes_for(values, apart=True)
    selection.choose(FisherMask(0.5, unit=unit), selectable, flats, 500, key=0)
    assert_same(masks_in(selectable), expected_masks(flattened(values), 500, unit))


@pytest.mark.parametrize("unit", UNITS)
def test_sums_of_squares_are_scores_themselves(unit):
    values = [[value.double().square() for value in group] for group in odd_values()]
    selectable, flats = lanes_for(values)
    selection.choose(FisherMask(0.5, unit=unit), selectable, flats, 500, key=0, squared=True)
    assert_same(masks_in(selectable), expected_masks(flattened(values), 500, unit, squared=True))


@pytest.mark.parametrize("piece", [1, 7, 64])
@pytest.mark.parametrize("unit", UNITS)
def test_units_are_the_same_whatever_is_added_up_at_a_time(monkeypatch, unit, piece):
    monkeypatch.setattr(selection, "_PIECE", piece)
    test_units_are_chosen_alike_in_lanes_of_one_parameter(unit)


@pytest.mark.parametrize("unit", UNITS)
def test_of_equal_units_the_first_are_chosen(unit):
    values = [[torch.full_like(value, -3.0) for value in group] for group in odd_values()]
    selectable, flats = lanes_for(values)
    selection.choose(FisherMask(0.5, unit=unit), selectable, flats, 600, key=0)
    assert_same(masks_in(selectable), expected_masks(flattened(values), 600, unit))


def test_means_that_are_equal_fractions_are_ties():
    """1/3, 2/6 and 5/15: were one rounded apart, a later row would come before the first."""
    values = [torch.zeros(1, 3), torch.zeros(1, 6), torch.zeros(1, 15)]
    for value, ones in zip(values, (1, 2, 5), strict=True):
        value[0, :ones] = 1
    for order in itertools.permutations(values):
        selectable, flats = lanes_for([list(order)])
        selection.choose(FisherMask(0.5, unit="row"), selectable, flats, order[0].numel(), key=0)
        assert [mask.all() for mask in masks_in(selectable)] == [True, False, False]


@pytest.mark.parametrize("unit", UNITS)
def test_unit_with_a_nan_counts_as_zero(unit):
    values = odd_values()
    for group in values:
        group[0][(0,) * group[0].dim()] = math.nan
    selectable, flats = lanes_for(values)
    selection.choose(FisherMask(0.5, unit=unit), selectable, flats, 1000, key=0)
    assert_same(masks_in(selectable), expected_masks(flattened(values), 1000, unit))


@pytest.mark.parametrize("unit", ["tensor", "row", 32, 128])
def test_unit_with_an_infinite_gradient_is_taken_first(unit):
    values = [[torch.full((5, 8), 1e4), torch.zeros(4, 8), torch.ones(2, 8)]]
    values[0][1][0, 0] = math.inf
    selectable, flats = lanes_for(values)
    selection.choose(FisherMask(0.5, unit=unit), selectable, flats, 41, key=0)
    assert masks_in(selectable)[1][0].all()


def test_squares_beyond_the_range_of_fp32_are_told_apart():
    for scale in (1e30, 1e-30):
        selectable, flats = lanes_for([[torch.tensor([[1.0, 1.0], [3.0, 3.0], [2.0, 2.0]]) * scale]])
        selection.choose(FisherMask(0.5, unit="row"), selectable, flats, 4, key=0)
        assert masks_in(selectable)[0].tolist() == [[False] * 2, [True] * 2, [True] * 2]


def test_choice_ends_at_the_first_unit_that_does_not_fit():
    values = [[torch.full((10,), 5.0), torch.full((20,), 4.0), torch.full((5,), 3.0)]]
    for k, expected in ((29, [1, 0, 0]), (30, [1, 1, 0]), (34, [1, 1, 0]), (35, [1, 1, 1]), (9, [0, 0, 0])):
        selectable, flats = lanes_for(values)
        selection.choose(FisherMask(0.5, unit="tensor"), selectable, flats, k, key=0)
        assert [int(mask.all()) for mask in masks_in(selectable)] == expected


def test_a_choice_replaces_the_one_before():
    values = odd_values()
    selectable, flats = lanes_for(values)
    for unit, k in ((32, 1667), ("tensor", 400), ("row", 300), ("element", 5)):
        selection.choose(FisherMask(0.5, unit=unit), selectable, flats, k, key=0)
        assert_same(masks_in(selectable), expected_masks(flattened(values), k, unit))


@pytest.mark.parametrize("scores", ["fisher", "random"])
@pytest.mark.parametrize("unit", UNITS)
def test_values_are_left_as_they_are(unit, scores):
    selectable, flats = lanes_for(odd_values())
    before = [flat.clone() for flat in flats]
    weights = [p.detach().clone() for lanes, _ in selectable for p in lanes.params]
    selection.choose(FisherMask(0.5, unit=unit, scores=scores), selectable, flats, 500, key=0)
    assert_same(flats, before)
    assert_same([p for lanes, _ in selectable for p in lanes.params], weights)


class NoReads(TorchDispatchMode):
    """Refuses what would wait for a device: reading a value, or a shape that depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        assert torch.Tag.dynamic_output_shape not in func.tags
        return func(*args, **(kwargs or {}))


def launched(run: Callable) -> Callable:
    """A pass, which on a device would be a launch: what it reads there nobody waits for."""

    def launch(*args):
        with _disable_current_modes():
            return run(*args)

    return launch


@pytest.mark.parametrize("scores", ["fisher", "random"])
@pytest.mark.parametrize("unit", UNITS)
def test_choice_reads_nothing_from_the_device(unit, scores, monkeypatch):
    for name in ("write_mask_", "digit_histogram"):
        monkeypatch.setattr(selection.ops, name, launched(getattr(selection.ops, name)))
    selectable, flats = lanes_for(odd_values())
    with NoReads():
        selection.choose(FisherMask(0.5, unit=unit, scores=scores), selectable, flats, 500, key=0)
    with pytest.raises(AssertionError), NoReads():
        flats[0][0].item()


# -- random scores -----------------------------------------------------------------------------------------------------


def random_masks(values: list[list[Tensor]], unit: str | int, k: int, key: int) -> list[Tensor]:
    selectable, _ = lanes_for(values)
    selection.choose(FisherMask(0.5, unit=unit, scores="random"), selectable, None, k, key)
    return masks_in(selectable)


@pytest.mark.parametrize("k", [1, 2, 500, 1666, 1667])
def test_random_weights_are_exactly_k(k):
    assert sum(mask.sum() for mask in random_masks(odd_values(), "element", k, key=3)) == k


@pytest.mark.parametrize("k", [360, 700, 1666, 1667])
@pytest.mark.parametrize("unit", ["tensor", "row", 32, 128])
def test_random_units_are_whole_and_as_many_as_fit(unit, k):
    values = odd_values()
    chosen, rejected = 0, []
    for value, mask in zip(flattened(values), random_masks(values, unit, k, key=3), strict=True):
        for coordinates in units_of(value, unit):
            whole = {bool(mask[at]) for at in coordinates}
            assert len(whole) == 1
            chosen += len(coordinates) * whole.pop()
            rejected += [len(coordinates)] * (not mask[coordinates[0]])
    assert chosen <= k
    assert not rejected or chosen + max(rejected) > k


@pytest.mark.parametrize("unit", UNITS)
def test_random_choice_depends_on_the_key_alone(unit):
    first, again, other = (random_masks(odd_values(seed), unit, 700, key) for seed, key in ((0, 5), (1, 5), (0, 6)))
    assert_same(first, again)
    assert not all(torch.equal(*pair) for pair in zip(first, other, strict=True))


def test_random_choice_does_not_depend_on_how_parameters_are_spread_over_lanes():
    values = [integers((9, 8), torch.float32, i) for i in range(4)]
    for unit in UNITS:
        together = random_masks([values], unit, 100, key=1)
        assert_same(together, random_masks([values[:1], values[1:]], unit, 100, key=1))


@pytest.mark.parametrize("unit", ["element", "row", 32])
@pytest.mark.parametrize("parts", [(2,), (1, 1)], ids=["together", "apart"])
def test_equal_parameters_get_different_random_masks(unit, parts):
    values = [[torch.zeros(64, 8)] * part for part in parts]
    assert not torch.equal(*random_masks(values, unit, 512, key=0))


@pytest.mark.parametrize("unit", ["element", "row"])
def test_random_choices_take_every_unit_equally_often_and_independently(unit):
    """64 units, 16 of them taken, under 400 neighbouring keys; everything stays within 5 standard deviations."""
    shape = (8, 8) if unit == "element" else (64, 3)
    k = 16 * (1 if unit == "element" else 3)
    taken = [torch.cat(random_masks([[torch.zeros(shape)]], unit, k, key)) for key in range(400)]
    taken = torch.stack([(mask if unit == "element" else mask[:, 0]).flatten() for mask in taken]).double()
    count, p = len(taken), 1 / 4
    assert (taken.sum(1) == 16).all()
    assert ((taken.sum(0) - count * p).abs() < 5 * math.sqrt(count * p * (1 - p))).all()
    both = taken.T @ taken
    p = 16 / 64 * 15 / 63
    apart = ~torch.eye(64, dtype=torch.bool)
    assert ((both - count * p).abs() < 5 * math.sqrt(count * p * (1 - p)))[apart].all()
    # One choice says nothing about the next: 16 * 16 / 64 in common, hypergeometric.
    common = (taken[1:] * taken[:-1]).sum(1)
    deviation = math.sqrt(16 * 0.25 * 0.75 * 48 / 63)
    assert abs(common.mean() - 4) < 5 * deviation / math.sqrt(len(common))


@pytest.mark.parametrize("unit", UNITS)
def test_tensors_chosen_are_those_with_a_weight_in_the_mask(unit):
    values = odd_values()
    selectable, flats = lanes_for(values)
    lanes = [own for own, _ in selectable]
    assert selection.tensors_chosen(lanes) == [[False] * len(group) for group in values]
    selection.choose(FisherMask(0.5, unit=unit), selectable, flats, 400, key=0)
    masks = masks_in(selectable)
    assert flattened(selection.tensors_chosen(lanes)) == [bool(mask.any()) for mask in masks]
    assert {bool(mask.any()) for mask in masks} == {True, False}
    assert flattened(selection.weights_chosen(lanes)) == [int(mask.sum()) for mask in masks]
    assert [len(row) for row in selection.tensors_chosen(lanes)] == [len(group) for group in values]
    assert selection.tensors_chosen([]) == []


def test_only_the_numbered_parameters_are_chosen_from_and_others_keep_their_mask():
    values = odd_values()
    for unit in UNITS:
        selectable, flats = lanes_for(values)
        some = [(lanes, [i for i in numbers if i % 2 == 0]) for lanes, numbers in selectable]
        for lanes, numbers in selectable:
            for i in numbers:
                lanes.plan.words(lanes.lane("mask", torch.int32), i).fill_(i % 2)
        chosen_from = [[value for i, value in enumerate(group) if i % 2 == 0] for group in values]
        if unit == "element":
            # What is not chosen from must hold zeros, as the ledger's scores do.
            for (lanes, numbers), flat in zip(selectable, flats, strict=True):
                for i in numbers:
                    lanes.plan.part(flat, i).mul_(i % 2 == 0)
        selection.choose(FisherMask(0.5, unit=unit), some, flats, 400, key=0)
        expected = iter(expected_masks(flattened(chosen_from), 400, unit))
        for lanes, numbers in selectable:
            for i in numbers:
                if i % 2 == 0:
                    assert torch.equal(lanes.chosen(i), next(expected))
                else:
                    assert (lanes.plan.words(lanes.lanes["mask"], i) == 1).all()
