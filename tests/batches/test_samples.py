"""select_samples: which samples are kept, in which containers, and what is refused."""

import collections
import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from fsam_triton import select_samples

NAN, INF = float("nan"), float("inf")
Pair = collections.namedtuple("Pair", ["x", "y"])


@dataclasses.dataclass(frozen=True)
class Batch:
    x: Tensor
    name: str = "train"


def kept(rises: list[float], gamma: float) -> list[int]:
    rise = torch.tensor(rises)
    return select_samples(torch.arange(len(rises)), torch.zeros_like(rise), rise, gamma).tolist()


def second_and_fourth(batch):
    """The batch of four reduced to its samples 1 and 3."""
    return select_samples(batch, torch.zeros(4), torch.tensor([0.1, 0.4, 0.2, 0.3]), 0.5)


# -- which samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "expected"), [(0.01, [1]), (0.2, [1]), (0.5, [1, 4]), (0.99, [0, 1, 2, 4])])
def test_those_whose_loss_rose_most_are_kept_in_their_order(gamma, expected):
    assert kept([0.2, 0.5, 0.3, -0.1, 0.4], gamma) == expected


def test_losses_themselves_do_not_count():
    before, after = torch.tensor([9.0, 1.0, 5.0]), torch.tensor([9.1, 2.0, 5.2])
    assert select_samples(torch.arange(3), before, after, 0.4).tolist() == [1]


def test_equal_rises_go_to_the_lower_index():
    assert kept([1.0] * 40, 0.25) == list(range(10))
    assert kept([0.0, 1.0, 0.0, 1.0, 0.0], 0.6) == [0, 1, 3]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_rise_that_is_not_finite_counts_as_the_smallest(bad):
    assert kept([bad, -5.0, 1.0, bad], 0.5) == [1, 2]
    assert kept([bad, -5.0, 1.0, bad], 0.75) == [0, 1, 2]
    assert kept([bad] * 4, 0.5) == [0, 1]


def test_overflow_at_both_weights_does_not_crash():
    losses = torch.tensor([INF, 1.0, 2.0])
    assert select_samples(torch.arange(3), losses, losses, 0.4).tolist() == [1]


def test_rise_smaller_than_a_rounding_of_sixteen_bits_is_seen():
    before = torch.tensor([4.0, 4.0], dtype=torch.bfloat16)
    after = torch.tensor([4.0, 4.0 + 2**-10])
    assert select_samples(torch.arange(2), before, after, 0.5).tolist() == [1]


def test_one_sample_is_always_kept():
    assert kept([0.5], 0.1) == [0]


def test_losses_may_require_gradients_and_the_batch_keeps_its_own():
    losses = torch.rand(4, requires_grad=True) + 0
    embeds = torch.rand(4, 2, requires_grad=True)
    out = select_samples(embeds, losses, losses + torch.arange(4), 0.5)
    out.sum().backward()
    assert embeds.grad.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]


# -- which containers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16, torch.float32])
def test_tensor_is_reduced_along_its_first_dimension(dtype):
    batch = torch.arange(8).view(4, 2).to(dtype)
    assert torch.equal(second_and_fourth(batch), batch[[1, 3]])


def test_list_of_values_is_reduced():
    assert second_and_fourth(["a", "b", "c", "d"]) == ["b", "d"]


def test_list_of_samples_is_reduced_whatever_they_are():
    samples = [{"ids": [1] * 4}, {"ids": [2]}, {"ids": [3] * 4}, {"ids": [4] * 4}]
    assert second_and_fourth(samples) == [samples[1], samples[3]]


def test_list_of_tensors_of_different_lengths_is_a_list_of_samples():
    samples = [torch.ones(length) for length in (4, 5, 6, 4)]
    out = second_and_fourth(samples)
    assert out[0] is samples[1]
    assert out[1] is samples[3]
    assert len(out) == 2


def test_list_of_as_many_inputs_as_there_are_samples_is_a_list_of_inputs():
    x, y = torch.tensor([[1, 2], [3, 4]]), torch.tensor([0, 1])
    out = select_samples([x, y], torch.zeros(2), torch.tensor([0.0, 1.0]), 0.5)
    assert [part.tolist() for part in out] == [[[3, 4]], [1]]


def test_nested_containers_are_reduced_and_all_else_is_passed_on():
    other, text, number = torch.ones(3, 4), "abcd", torch.tensor(4.0)
    batch = {
        "x": {"ids": torch.arange(4), "names": ["a", "b", "c", "d"]},
        "pair": (torch.arange(4) * 2, None),
        "list": [other, [torch.arange(4) * 3, 1.5, True]],
        "other": other,
        "text": text,
        "number": number,
        "none": None,
    }
    out = second_and_fourth(batch)
    assert list(out) == list(batch)
    assert out["x"]["ids"].tolist() == [1, 3]
    assert out["x"]["names"] == ["b", "d"]
    assert out["pair"][0].tolist() == [2, 6]
    assert out["pair"][1] is None
    assert out["list"][0] is other
    assert out["list"][1][0].tolist() == [3, 9]
    assert out["list"][1][1:] == [1.5, True]
    assert out["other"] is other
    assert out["text"] is text
    assert out["number"] is number
    assert out["none"] is None


def defaultdict_of(x: Tensor) -> collections.defaultdict:
    return collections.defaultdict(list, {"x": x})


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (lambda x: {"x": x}, lambda b: b["x"]),
        (lambda x: collections.OrderedDict(x=x), lambda b: b["x"]),
        (defaultdict_of, lambda b: b["x"]),
        (lambda x: collections.UserDict(x=x), lambda b: b["x"]),
        (lambda x: [x, 0], lambda b: b[0]),
        (lambda x: (x, 0), lambda b: b[0]),
        (lambda x: Pair(x, 0), lambda b: b.x),
        (lambda x: Batch(x), lambda b: b.x),
    ],
    ids=["dict", "OrderedDict", "defaultdict", "UserDict", "list", "tuple", "namedtuple", "dataclass"],
)
def test_type_of_the_container_is_kept(make, read):
    batch = make(torch.arange(4))
    out = second_and_fourth(batch)
    assert type(out) is type(batch)
    assert read(out).tolist() == [1, 3]
    assert read(batch).tolist() == [0, 1, 2, 3]


def test_default_factory_is_kept():
    assert second_and_fourth(defaultdict_of(torch.arange(4)))["missing"] == []


def test_mapping_that_cannot_be_made_of_a_dict_becomes_one():
    class Odd(collections.UserDict):
        def __init__(self, *, x):
            super().__init__({"x": x})

    out = second_and_fourth(Odd(x=torch.arange(4)))
    assert type(out) is dict
    assert out["x"].tolist() == [1, 3]


def test_batch_encoding_stays_one():
    transformers = pytest.importorskip("transformers")
    batch = transformers.BatchEncoding({"input_ids": torch.arange(8).view(4, 2), "labels": [0, 1, 2, 3]})
    out = second_and_fourth(batch)
    assert type(out) is transformers.BatchEncoding
    assert out.input_ids.tolist() == [[2, 3], [6, 7]]
    assert out["labels"] == [1, 3]
    assert batch.input_ids.shape == (4, 2)


def test_reduced_batch_encoding_has_no_encodings_of_samples_that_are_gone():
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    encodings = tokenizer.encode_batch(["a", "b", "a", "b"])
    batch = transformers.BatchEncoding({"input_ids": torch.tensor([e.ids for e in encodings])}, encodings)
    assert second_and_fourth(batch).encodings is None
    assert len(batch.encodings) == 4


def test_model_output_stays_one():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    batch = outputs.BaseModelOutput(last_hidden_state=torch.arange(4), hidden_states=(torch.arange(4),))
    out = second_and_fourth(batch)
    assert type(out) is outputs.BaseModelOutput
    assert out.last_hidden_state.tolist() == out["hidden_states"][0].tolist() == [1, 3]
    assert batch["last_hidden_state"].tolist() == [0, 1, 2, 3]


def test_container_without_samples_is_passed_on_itself():
    constants = {"scale": 2.0, "sizes": [1, 2]}
    assert second_and_fourth({"x": torch.arange(4), "constants": constants})["constants"] is constants


def test_batch_is_not_changed():
    batch = {"x": torch.arange(4), "names": ["a", "b", "c", "d"], "nested": [{"y": torch.ones(4, 2)}]}
    before = copy.deepcopy(batch)
    second_and_fourth(batch)
    assert torch.equal(batch["x"], before["x"])
    assert batch["names"] == before["names"]
    assert torch.equal(batch["nested"][0]["y"], before["nested"][0]["y"])


@pytest.mark.parametrize("gamma", [1, 1.0])
def test_gamma_of_one_returns_the_same_batch(gamma):
    batch = {"x": torch.arange(4), "names": ["a", "b", "c", "d"]}
    assert select_samples(batch, torch.zeros(4), torch.rand(4), gamma) is batch


def test_tensors_are_selected_without_reading_an_index():
    """Meta tensors have no values: anything that read one would raise."""
    meta = torch.zeros(4, device="meta")
    batch = {"x": torch.zeros(4, 2, device="meta"), "mask": None, "pair": (torch.zeros(4, device="meta"), 1)}
    out = select_samples(batch, meta, meta, 0.5)
    assert out["x"].shape == (2, 2)
    assert out["pair"][0].shape == (2,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
def test_selection_on_the_gpu_does_not_wait_for_it():
    batch = {"x": torch.arange(8, device="cuda").view(4, 2), "flag": True}
    before, after = torch.zeros(4, device="cuda"), torch.tensor([0.1, 0.4, 0.2, 0.3], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = select_samples(batch, before, after, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out["x"].tolist() == [[2, 3], [6, 7]]


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0, -0.5, 1.5, NAN, None, "0.5"])
def test_bad_gamma_is_refused(gamma):
    with pytest.raises(ValueError, match=r"Invalid gamma: .*must be in \(0, 1\]"):
        select_samples(torch.arange(4), torch.zeros(4), torch.zeros(4), gamma)


@pytest.mark.parametrize("bad", [torch.zeros(()), torch.zeros(4, 1), torch.zeros(0), [0.0] * 4, None])
@pytest.mark.parametrize("name", ["before", "after"])
def test_losses_that_are_not_one_per_sample_are_refused(name, bad):
    losses = {"before": torch.zeros(4), "after": torch.zeros(4), name: bad}
    with pytest.raises(ValueError, match=rf"Invalid {name}: .*shape \[n\]"):
        select_samples(torch.arange(4), gamma=0.5, **losses)


def test_losses_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"Invalid after: \(3,\); must have the shape of before, \(4,\)"):
        select_samples(torch.arange(4), torch.zeros(4), torch.zeros(3), 0.5)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("batch", [{"x": torch.arange(3)}, [torch.zeros(()), "abcd"], (1, 2, 3, 4), None, {}])
def test_batch_without_a_first_dimension_of_the_losses_is_refused(batch, gamma):
    with pytest.raises(ValueError, match=r"Invalid batch: .*of length 4"):
        select_samples(batch, torch.zeros(4), torch.zeros(4), gamma)
