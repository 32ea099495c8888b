"""State dicts of AdamWL2SP: to and from torch.optim.AdamW, resumed to the bit, refused as a whole, small files."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import AdamWL2SP, ArgumentError
from tests.optim.by_hand import assert_states_close
from tests.problem import Problem, assert_weights_close, small_model
from tests.training import assert_same_bits, round_trip, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    ("before", "then"), [(AdamWL2SP, torch.optim.AdamW), (torch.optim.AdamW, AdamWL2SP)], ids=["to_torch", "from_torch"]
)
def test_checkpoint_continues_under_the_other_optimizer(before, then, amsgrad):
    problem, model, twin = Problem(sparse=True), small_model(), small_model()
    expected = torch.optim.AdamW(twin.parameters(), lr=0.01, amsgrad=amsgrad)
    train(twin, expected, 20, problem=problem)

    first = before(model.parameters(), lr=0.01, amsgrad=amsgrad)
    train(model, first, 10, problem=problem)
    fresh = small_model(seed=1)
    second = then(fresh.parameters(), lr=0.5, amsgrad=amsgrad)
    fresh.load_state_dict(model.state_dict())
    second.load_state_dict(first.state_dict())
    train(fresh, second, 10, problem=problem, start=10)
    assert_weights_close(fresh.parameters(), twin.parameters(), 20, 0.01)
    assert_states_close(second, expected, 20)


def test_state_dict_is_empty_before_the_first_step_as_torchs():
    assert AdamWL2SP(small_model().parameters()).state_dict()["state"] == {}


@pytest.mark.parametrize("with_optimizer", [False, True], ids=["model_alone", "model_and_optimizer"])
def test_master_weights_follow_weights_loaded_into_the_model(with_optimizer):
    """The checkpoint was written without master weights, so the 16-bit weights are all there is."""
    donor, model, twin = (small_model(torch.bfloat16, seed) for seed in (1, 2, 1))
    other = AdamWL2SP(donor.parameters(), lr=0.01)
    train(donor, other, 3)
    optimizer = AdamWL2SP(model.parameters(), lr=0.01, master_weights=True)
    model.load_state_dict(donor.state_dict())
    twin.load_state_dict(donor.state_dict())
    expected = AdamWL2SP(twin.parameters(), lr=0.01, master_weights=True)
    if with_optimizer:
        optimizer.load_state_dict(other.state_dict())
        expected.load_state_dict(other.state_dict())
    train(model, optimizer, 2)
    train(twin, expected, 2)
    assert_same_bits(model, twin)


def test_loading_does_not_tie_the_two_optimizers_together():
    model, fresh = small_model(), small_model()
    first, second = AdamWL2SP(model.parameters()), AdamWL2SP(fresh.parameters())
    train(model, first, 2)
    saved = copy.deepcopy(first.state_dict())
    second.load_state_dict(first.state_dict())
    train(fresh, second, 2)
    for key, state in first.state_dict()["state"].items():
        assert all(torch.equal(value, saved["state"][key][name]) for name, value in state.items())


def anchors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


RESUMED = {
    "plain": (torch.float32, {}),
    "initial_anchors": (torch.float32, {"l2_sp": 0.1}),
    "anchors_of_another_model": (torch.float32, {"l2_sp": 0.1, "anchors": "other"}),
    "stochastic_rounding": (torch.bfloat16, {"seed": 3}),
    "master": (torch.bfloat16, {"master_weights": True}),
}


def resumable(dtype: torch.dtype, kwargs: dict, seed: int) -> tuple[nn.Module, AdamWL2SP]:
    model = small_model(dtype, seed)
    if kwargs.get("anchors") == "other":
        other = anchors_of(small_model(dtype, seed=7))
        kwargs = {**kwargs, "anchors": {name: other[name] for name in ("dense.weight", "norm.bias")}}
    return model, AdamWL2SP(model.named_parameters(), lr=0.01, **kwargs)


@pytest.mark.parametrize(("dtype", "kwargs"), RESUMED.values(), ids=RESUMED.keys())
def test_resumed_training_equals_uninterrupted_training_to_the_bit(dtype, kwargs):
    problem = Problem(sparse=True)
    model, optimizer = resumable(dtype, kwargs, seed=0)
    train(model, optimizer, 10, problem=problem)
    saved = round_trip({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, 10, problem=problem, start=10)

    fresh, resumed = resumable(dtype, kwargs, seed=1)
    fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(fresh, resumed, 10, problem=problem, start=10)
    assert_same_bits(fresh, model)


def wrong_shape(saved):
    saved["state"][0]["exp_avg"] = torch.zeros(3)


def wrong_group_count(saved):
    saved["param_groups"].append(copy.deepcopy(saved["param_groups"][0]))


def wrong_group_size(saved):
    saved["param_groups"][0]["params"].pop()


@pytest.mark.parametrize("damage", [wrong_shape, wrong_group_count, wrong_group_size])
def test_mismatched_state_dict_is_refused_and_changes_nothing(damage):
    model, twin = small_model(), small_model()
    optimizers = [AdamWL2SP(m.parameters(), lr=0.01) for m in (model, twin)]
    for trained, optimizer in zip((model, twin), optimizers, strict=True):
        train(trained, optimizer, 3)
    donor = small_model(seed=1)
    other = AdamWL2SP(donor.parameters(), lr=0.5)
    train(donor, other, 7)
    saved = copy.deepcopy(other.state_dict())
    damage(saved)
    with pytest.raises(ArgumentError) as error:
        optimizers[0].load_state_dict(saved)
    assert error.value.name.startswith("state")
    for trained, optimizer in zip((model, twin), optimizers, strict=True):
        train(trained, optimizer, 3, start=3)
    assert_same_bits(model, twin)


def small_and_large() -> nn.ModuleDict:
    return nn.ModuleDict({"small": nn.Linear(4, 4), "large": nn.Linear(512, 512)})


def test_saving_one_module_does_not_save_the_whole_model():
    model = small_and_large()
    train(model, AdamWL2SP(model.parameters()), 1)
    buffer = io.BytesIO()
    torch.save(model["small"].state_dict(), buffer)
    # 80 bytes of weights; the file's own records take a few KB, the other module would take 1 MB.
    assert buffer.getbuffer().nbytes < 16384


def test_saving_one_parameters_state_does_not_save_all_of_it():
    model = small_and_large()
    optimizer = AdamWL2SP(model.parameters())
    train(model, optimizer, 1)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict()["state"][0], buffer)
    assert buffer.getbuffer().nbytes < 16384


def test_safetensors_saves_the_model(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = small_and_large()
    train(model, AdamWL2SP(model.parameters()), 1)
    safetensors.save_file(model.state_dict(), tmp_path / "all.safetensors")
    safetensors.save_model(model["small"], tmp_path / "small.safetensors")
    loaded = safetensors.load_file(tmp_path / "all.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    assert (tmp_path / "small.safetensors").stat().st_size < 4096


@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize("given", [False, True], ids=["initial_anchors", "given_anchors"])
def test_state_without_anchors_keeps_those_that_there_are_or_takes_the_present_weights(trained, given):
    """That of torch.optim.AdamW, say."""
    donor, model = small_model(seed=1), small_model()
    other = torch.optim.AdamW(donor.parameters(), lr=0.01)
    train(donor, other, 3)
    anchors = anchors_of(small_model(seed=7)) if given else "initial"
    optimizer = AdamWL2SP(model.named_parameters(), lr=0.01, l2_sp=0.1, anchors=anchors)
    if trained:
        train(model, optimizer, 2)
    model.load_state_dict(donor.state_dict())
    optimizer.load_state_dict(other.state_dict())
    train(model, optimizer, 1)
    expected = anchors if given else anchors_of(small_model() if trained else donor)
    for name, p in model.named_parameters():
        assert torch.equal(optimizer.state[p]["anchor"], expected[name])


@pytest.mark.parametrize("name", ["ema", "remainder"])
def test_what_an_optimizer_does_not_keep_is_not_taken_over(name):
    model, fresh = small_model(torch.bfloat16), small_model(torch.bfloat16)
    optimizer = AdamWL2SP(model.parameters(), ema_decay=0.9, master_weights=True)
    train(model, optimizer, 2)
    other = AdamWL2SP(fresh.parameters(), ema_decay=None if name == "ema" else 0.9, master_weights=name == "ema")
    other.load_state_dict(optimizer.state_dict())
    assert all((key in entry) == (key != name) for entry in other.state.values() for key in ("ema", "remainder"))
