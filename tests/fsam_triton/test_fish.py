"""FishMask: exactly the weights that the definition says, set algebra, and files that are whole or not there."""

import itertools
import os
import pathlib
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fsam_triton.files import read_file, write_file
from fsam_triton.fish import FishMask

pytestmark = pytest.mark.usefixtures("one_thread")


def sets(mask: FishMask) -> dict[str, set[int]]:
    return {name: set(mask.indices(name).tolist()) for name in mask.shapes}


def by_definition(scores: dict[str, Tensor], k: int) -> dict[str, set[int]]:
    """The k largest by Python's stable sort, of equal ones the first in row-major order."""
    entries = [(float(x), name, i) for name, score in scores.items() for i, x in enumerate(score.flatten())]
    chosen = sorted(entries, key=lambda entry: -entry[0])[:k]
    return {name: {i for _, n, i in chosen if n == name} for name in scores}


def odd_scores(seed: int = 0, levels: int = 6) -> dict[str, Tensor]:
    """Scores of odd shapes, strides and types with many ties; small integers are exact in all types."""
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randint(0, levels, shape, generator=generator).to(dtype)

    return {
        "a.weight": made(13, 7),
        "b.weight": made(9, 40).t(),
        "half": made(6, 3, 4, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last),
        "empty": made(0, 3),
        "scalar": made(),
        "double": made(33, dtype=torch.float64),
        "half16": made(64, dtype=torch.float16),
        "classifier.weight": made(2, 13),
        "classifier.bias": made(2),
    }


def sizes(scores: dict[str, Tensor]) -> int:
    return sum(score.numel() for score in scores.values())


def small_model() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.ModuleDict({"encoder": nn.Linear(12, 20), "norm": nn.LayerNorm(20), "classifier": nn.Linear(20, 3)})
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


# -- choosing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 2, 6, 200])
@pytest.mark.parametrize("keep_ratio", [0.002, 0.1, 1 / 3, 0.5, 0.999, 1.0])
def test_exactly_the_highest_scores_are_selected_and_of_equal_ones_the_first(keep_ratio, levels):
    scores = odd_scores(levels=levels)
    mask = FishMask.from_scores(scores, keep_ratio)
    k = int(keep_ratio * sizes(scores))
    assert mask.count == k
    assert sets(mask) == by_definition(scores, k)


def test_scores_of_a_large_tensor_give_the_set_of_torch_topk():
    score = torch.randn(1100, 1000, generator=torch.Generator().manual_seed(0)).abs()
    mask = FishMask.from_scores({"w": score}, 0.05)
    kth = score.flatten().topk(55_000).values[-1]
    assert mask.count == 55_000
    assert score[mask.bits("w")].min() == kth
    assert score[~mask.bits("w")].max() <= kth


def test_infinite_scores_come_first():
    scores = {"a": torch.tensor([3e38, 1.0]), "b": torch.tensor([0.0, torch.inf])}
    assert sets(FishMask.from_scores(scores, 0.25)) == {"a": set(), "b": {1}}


def test_scores_are_left_as_they_are():
    scores, again = odd_scores(), odd_scores()
    FishMask.from_scores(scores, 0.5, always_trainable=["classifier"])
    assert all(torch.equal(scores[name], again[name]) for name in scores)
    assert all(scores[name].stride() == again[name].stride() for name in scores)


def test_scores_with_a_graph_are_accepted():
    assert FishMask.from_scores({"w": torch.ones(4, requires_grad=True) * 2}, 0.5).count == 2


@pytest.mark.parametrize("pattern", ["classifier", "CLASSI", "ifier."])
def test_what_is_always_trainable_is_selected_whole_and_counts(pattern):
    scores = odd_scores()
    mask = FishMask.from_scores(scores, 0.1, always_trainable=[pattern])
    k = int(0.1 * sizes(scores))
    rest = {name: score for name, score in scores.items() if not name.startswith("classifier")}
    expected = by_definition(rest, k - 28)
    assert mask.count == k
    assert sets(mask) == {**expected, "classifier.weight": set(range(26)), "classifier.bias": {0, 1}}


def test_what_is_always_trainable_may_take_all_there_is_but_no_more():
    scores = {"encoder": torch.ones(90), "head": torch.zeros(10)}
    assert sets(FishMask.from_scores(scores, 0.1, ["head"])) == {"encoder": set(), "head": set(range(10))}
    with pytest.raises(ValueError, match="keeps 9 of 100 weights, always_trainable has 10; must keep at least 10"):
        FishMask.from_scores(scores, 0.09, ["head"])


@pytest.mark.parametrize("keep_ratio", [0.0, -0.1, 1.01, float("nan")])
def test_keep_ratio_out_of_its_range_is_refused(keep_ratio):
    with pytest.raises(ValueError, match="Invalid keep_ratio"):
        FishMask.from_scores({"w": torch.ones(4)}, keep_ratio)


def test_fraction_that_selects_nothing_is_refused():
    with pytest.raises(ValueError, match="keeps 0 of 4 weights"):
        FishMask.from_scores({"w": torch.ones(4)}, 0.2)


@pytest.mark.parametrize("bad", [torch.tensor([1.0, -1e-9]), torch.tensor([1.0, torch.nan]), torch.tensor([1, 2])])
def test_scores_that_are_negative_or_nan_or_no_floats_are_refused(bad):
    with pytest.raises(ValueError, match=r"Invalid scores.*'?b"):
        FishMask.from_scores({"a": torch.ones(2), "b": bad}, 0.5)


def test_patterns_in_one_string_are_refused():
    with pytest.raises(ValueError, match="must be a sequence of strings"):
        FishMask.from_scores({"w": torch.ones(4)}, 0.5, always_trainable="classifier")


def test_random_masks_are_made_by_their_seed_alone():
    model = small_model()
    torch.manual_seed(0)
    first = FishMask.random(model, 0.3, seed=1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again, other = FishMask.random(model, 0.3, seed=1), FishMask.random(model, 0.3, seed=2)
    assert first == again
    assert first != other
    assert first.count == int(0.3 * first.total) == other.count
    assert torch.equal(torch.get_rng_state(), state)


def test_random_masks_take_every_weight_equally_often():
    """Under 300 seeds, a quarter each: binomial, within 5 standard deviations."""
    model = nn.Linear(15, 4)
    masks = [FishMask.random(model, 0.25, seed) for seed in range(300)]
    taken = sum(mask.bits("weight").double() for mask in masks)
    assert ((taken - 75).abs() < 5 * (300 * 0.25 * 0.75) ** 0.5).all()


def test_random_masks_respect_what_is_always_trainable():
    mask = FishMask.random(small_model(), 0.3, always_trainable=["classifier"])
    assert mask.bits("classifier.weight").all()
    assert mask.count == int(0.3 * mask.total)


class OddNames(nn.Module):
    """Biases by other names, and a weight of a module called bias, as T5 has."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.relative_attention_bias = nn.Embedding(5, 2)
        self.classifier = nn.Linear(4, 2)


def test_bias_only_selects_all_biases_and_nothing_else():
    mask = FishMask.bias_only(OddNames())
    chosen = {name for name, density in mask.density_by_tensor().items() if density}
    assert chosen == {
        "rnn.bias_ih_l0",
        "rnn.bias_hh_l0",
        "attention.in_proj_bias",
        "attention.out_proj.bias",
        "classifier.bias",
    }
    assert set(mask.density_by_tensor().values()) == {0.0, 1.0}
    assert mask.total == sum(p.numel() for p in OddNames().parameters())


def test_bias_only_selects_what_is_always_trainable_too():
    model = OddNames()
    added = FishMask.bias_only(model, ["classifier"]) - FishMask.bias_only(model)
    assert added.count == added.bits("classifier.weight").sum() == 8


def test_bias_only_refuses_a_model_without_biases():
    with pytest.raises(ValueError, match="'bias' in its name"):
        FishMask.bias_only(nn.Linear(3, 2, bias=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_magnitude_selects_the_largest_weights_of_either_sign(dtype):
    model = small_model().to(dtype)
    mask = FishMask.magnitude(model, 0.2)
    expected = by_definition({name: p.detach().abs() for name, p in model.named_parameters()}, int(0.2 * mask.total))
    assert sets(mask) == expected


def test_magnitude_counts_in_row_major_order_whatever_the_strides():
    model = nn.Module()
    model.weight = nn.Parameter(torch.arange(6.0).view(2, 3).t())
    assert FishMask.magnitude(model, 0.5).bits("weight").tolist() == [[False, True], [False, True], [False, True]]
    assert FishMask.magnitude(model, 0.5).indices("weight").tolist() == [1, 3, 5]


def moved_model(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    other = small_model()
    with torch.no_grad():
        for i, p in enumerate(other.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.01)
    return other.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("as_state_dict", [False, True], ids=["model", "state_dict"])
def test_deviation_selects_the_weights_that_moved_furthest(as_state_dict, dtype):
    model = small_model()
    other = moved_model(model, dtype)
    mask = FishMask.deviation(model, other.state_dict() if as_state_dict else other, 0.2)
    start = dict(other.named_parameters())
    moved = {name: (p.detach() - start[name].detach().float()).abs() for name, p in model.named_parameters()}
    assert sets(mask) == by_definition(moved, int(0.2 * mask.total))


def test_deviation_needs_no_old_values_of_what_is_always_trainable():
    model = small_model()
    old = {name: p for name, p in moved_model(model).state_dict().items() if "classifier" not in name}
    mask = FishMask.deviation(model, {**old, "classifier.bias": torch.zeros(99)}, 0.5, ["classifier"])
    assert mask.bits("classifier.weight").all()
    with pytest.raises(ValueError, match=r"Invalid other: .*must have 'classifier.weight'"):
        FishMask.deviation(model, old, 0.5)
    with pytest.raises(ValueError, match=r"'norm.bias' must have shape \(20,\)"):
        FishMask.deviation(model, {**old, "norm.bias": torch.zeros(3)}, 0.5, ["classifier"])


MAKERS = {
    "random": lambda model: FishMask.random(model, 0.5),
    "bias_only": FishMask.bias_only,
    "magnitude": lambda model: FishMask.magnitude(model, 0.5),
    "deviation": lambda model: FishMask.deviation(model, moved_model(model), 0.5),
}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_only_parameters_that_require_gradients_count(maker):
    model = small_model()
    model["encoder"].requires_grad_(False)
    mask = maker(model)
    assert list(mask.shapes) == ["norm.weight", "norm.bias", "classifier.weight", "classifier.bias"]
    assert mask.total == 20 + 20 + 60 + 3


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_making_a_mask_leaves_the_model_as_it_is(maker):
    model = small_model()
    before = [(p.data_ptr(), p._version) for p in model.parameters()]
    maker(model)
    assert [(p.data_ptr(), p._version) for p in model.parameters()] == before
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), small_model().parameters(), strict=True))


# -- a mask's own ------------------------------------------------------------------------------------------------------


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


# -- files -------------------------------------------------------------------------------------------------------------


def with_gaps(*gaps: int) -> FishMask:
    indices = torch.tensor(gaps).cumsum(0) - 1
    return FishMask({"w": indices}, {"w": (int(indices[-1]) + 3,)})


FILES = {
    "odd": FishMask.from_scores(odd_scores(), 0.3),
    "all": FishMask.from_scores(odd_scores(), 1.0),
    "nothing": FishMask({}, {"w": (3, 4), "empty": (0,)}),
    "no_parameters": FishMask({}, {}),
    "odd_names": FishMask({"a/b.ü \"'": torch.tensor([1])}, {"a/b.ü \"'": (2,), "": (1,)}),
    "uint8": with_gaps(1, 254, 255, 256, 257, 510, 511, 512, *[3] * 50),
    "uint16": with_gaps(1, 65535, 65536, 65537, 131071, *[40_000] * 50),
    "int32": with_gaps(3, *[10**6] * 50),
    "int64": with_gaps(3, 2**31 - 1, 2**31, 2**31 + 1, 2**33),
}


@pytest.mark.parametrize("mask", FILES.values(), ids=FILES)
def test_masks_come_back_from_their_files(mask, tmp_path):
    mask.save(tmp_path / "mask")
    back = FishMask.load(str(tmp_path / "mask"))
    assert back == mask
    assert list(back.shapes) == list(mask.shapes)
    assert back.shapes == mask.shapes
    assert os.listdir(tmp_path) == ["mask"]


@pytest.mark.parametrize("name", ["uint8", "uint16", "int32"])
def test_gaps_are_stored_in_the_smallest_type(name, tmp_path):
    FILES[name].save(tmp_path / "mask")
    tensors, _ = read_file(tmp_path / "mask", "FishMask")
    assert tensors["gaps/w"].dtype == getattr(torch, name)


def test_a_mask_of_one_in_200_takes_a_byte_and_a_half_for_each_weight(tmp_path):
    """The mean gap is 200; exp(-255 / 200) of the gaps are above 254 and take more than one byte: 1.4 on average."""
    scores = {"w": torch.rand(2_000_000, generator=torch.Generator().manual_seed(0))}
    FishMask.from_scores(scores, 0.005).save(tmp_path / "mask")
    assert (tmp_path / "mask").stat().st_size < 1.5 * 10_000


def test_parameters_that_are_selected_whole_take_no_room(tmp_path):
    FishMask({"w": torch.arange(100_000)}, {"w": (100_000,)}).save(tmp_path / "mask")
    assert (tmp_path / "mask").stat().st_size < 500


def test_the_same_mask_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        FishMask.from_scores(odd_scores(), 0.3).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_every_byte_that_is_changed_is_noticed(tmp_path):
    path = tmp_path / "mask"
    FishMask({"w": torch.tensor([1, 5, 300])}, {"w": (20, 20), "b": (2,)}).save(path)
    data = path.read_bytes()
    for i in range(len(data)):
        for changed in (data[i] ^ 1, data[i] ^ 0x80):
            path.write_bytes(data[:i] + bytes([changed]) + data[i + 1 :])
            with pytest.raises(ValueError, match=r"damaged|must be a FishMask file"):
                FishMask.load(path)


def test_every_truncation_and_anything_appended_is_noticed(tmp_path):
    path = tmp_path / "mask"
    FishMask({"w": torch.tensor([1, 5, 300])}, {"w": (20, 20), "b": (2,)}).save(path)
    data = path.read_bytes()
    for cut in (*(data[:i] for i in range(len(data))), data + b"\0", data + data):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match=r"damaged|not a FishMask"):
            FishMask.load(path)


FOREIGN = {
    "text": b"keep_ratio: 0.5\n",
    "list": (4).to_bytes(8, "little") + b"[{}]",
    "string": (18).to_bytes(8, "little") + b'{"__metadata__":1}',
    "pickle": pickle.dumps({"w": [1, 2]}),
    "zeros": bytes(100),
    "long_header": b"\xff" * 100,
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_foreign_files_are_refused(content, tmp_path):
    (tmp_path / "mask").write_bytes(content)
    with pytest.raises(ValueError, match="mask is not a FishMask file of fsam_triton"):
        FishMask.load(tmp_path / "mask")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_files_of_others_are_refused(metadata, tmp_path):
    save_file({"w": torch.zeros(3)}, tmp_path / "mask", metadata=metadata)
    with pytest.raises(ValueError, match="is not a FishMask file of fsam_triton"):
        FishMask.load(tmp_path / "mask")


def test_files_of_another_kind_or_version_are_refused_by_what_they_are(tmp_path, monkeypatch):
    write_file(tmp_path / "other", "delta", {}, {})
    with pytest.raises(ValueError, match="is a delta file of version 1; must be a FishMask file of version 1"):
        FishMask.load(tmp_path / "other")
    write_file(tmp_path / "newer", "FishMask", {}, {"version": 2})
    with pytest.raises(ValueError, match="is a FishMask file of version 2"):
        FishMask.load(tmp_path / "newer")


def test_file_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        FishMask.load(tmp_path / "mask")


def half_a_write(path: pathlib.Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
    raise OSError("no space left on device")


def no_replace(*paths: str) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("owner", "name", "failure"), [(pathlib.Path, "write_bytes", half_a_write), (os, "replace", no_replace)]
)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(owner, name, failure, tmp_path, monkeypatch):
    old, new = FILES["odd"], FILES["all"]
    old.save(tmp_path / "mask")
    monkeypatch.setattr(owner, name, failure)
    with pytest.raises((OSError, KeyboardInterrupt)):
        new.save(tmp_path / "mask")
    monkeypatch.undo()
    assert FishMask.load(tmp_path / "mask") == old
    assert os.listdir(tmp_path) == ["mask"]


def test_errors_of_files_name_the_file(tmp_path):
    (tmp_path / "nonsense").write_bytes(b"x")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "nonsense"))):
        FishMask.load(tmp_path / "nonsense")
