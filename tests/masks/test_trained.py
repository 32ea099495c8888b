"""FishMask: exactly the weights that the definition says, whatever it is made from."""

import pytest
import torch
from torch import nn

from fsam_triton import FishMask
from tests.masks.fish_masks import by_definition, odd_scores, sets, sizes, small_model

pytestmark = pytest.mark.usefixtures("one_thread")


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
