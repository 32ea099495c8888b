"""Deltas: to the bit what was trained, only into what it was trained from."""

import copy
import os

import pytest
import torch
from torch import nn

from fsam_triton import FSAM, DeltaError, FishMask, apply_delta, merge_deltas, save_delta
from fsam_triton.sparse_training import delta
from tests.sparse_training.deltas import DTYPES, Odd, assert_same, odd_mask, snapshot, trained

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_trained_model_comes_back_to_the_bit(dtype, tied, tmp_path):
    base = Odd(tied=tied).to(dtype)
    mask = odd_mask(base)
    model = trained(base, mask)
    expected = snapshot(model)
    save_delta(model, mask, tmp_path / "delta", base)
    assert_same(model, expected)
    places = {name: (p.data_ptr(), p.stride()) for name, p in base.named_parameters()}
    assert apply_delta(base, str(tmp_path / "delta")) == mask
    assert_same(base, expected)
    assert {name: (p.data_ptr(), p.stride()) for name, p in base.named_parameters()} == places
    assert os.listdir(tmp_path) == ["delta"]


def test_what_the_base_has_in_the_selected_places_makes_no_difference(tmp_path):
    base = Odd()
    mask = odd_mask(base)
    model = trained(base, mask)
    save_delta(model, mask, tmp_path / "delta")
    other = trained(base, mask, seed=5)
    apply_delta(other, tmp_path / "delta")
    assert_same(other, snapshot(model))
    apply_delta(other, tmp_path / "delta")
    assert_same(other, snapshot(model))


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_fingerprint_is_the_same_whatever_is_hashed_at_a_time(piece, tmp_path, monkeypatch):
    base = Odd()
    mask = odd_mask(base)
    save_delta(trained(base, mask), mask, tmp_path / "delta")
    monkeypatch.setattr(delta, "_PIECE", piece)
    apply_delta(base, tmp_path / "delta")


def test_fingerprint_is_the_same_whatever_the_strides(tmp_path):
    base = Odd()
    mask = odd_mask(base)
    model = trained(base, mask)
    save_delta(model, mask, tmp_path / "delta")
    base.transposed = nn.Parameter(base.transposed.detach().contiguous())
    base.conv.to(memory_format=torch.contiguous_format)
    apply_delta(base, tmp_path / "delta")
    assert_same(base, snapshot(model))


def test_the_same_model_gives_the_same_bytes(tmp_path):
    base = Odd()
    for name in ("one", "two"):
        save_delta(trained(base, odd_mask(base)), odd_mask(base), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_empty_mask_saves_the_buffers_alone(tmp_path):
    base = Odd()
    mask = FishMask({}, {name: p.shape for name, p in base.named_parameters()})
    model = trained(base, mask)
    save_delta(model, mask, tmp_path / "delta", base)
    assert apply_delta(base, tmp_path / "delta").count == 0
    assert_same(base, snapshot(model))


def test_applying_is_seen_by_autograd_and_by_optimizers(tmp_path):
    base = Odd()
    mask = odd_mask(base)
    save_delta(trained(base, mask), mask, tmp_path / "delta")
    before = {name: p._version for name, p in base.named_parameters()}
    apply_delta(base, tmp_path / "delta")
    changed = {name for name, p in base.named_parameters() if p._version > before[name]}
    assert changed == {name for name, density in mask.density_by_tensor().items() if density}
    assert all(p.is_leaf for p in base.parameters())


def test_deterministic_algorithms_are_enough(tmp_path):
    base = Odd()
    torch.use_deterministic_algorithms(True)
    try:
        mask = FishMask.magnitude(base, 0.5)
        model = trained(base, mask)
        save_delta(model, mask, tmp_path / "delta")
        merge_deltas([tmp_path / "delta"], tmp_path / "merged", base)
        apply_delta(base, tmp_path / "delta")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(base, snapshot(model))


def test_weights_that_are_perturbed_are_saved_clean(tmp_path):
    model = nn.Linear(8, 8)
    mask = FishMask.random(model, 0.5)
    clean = copy.deepcopy(model)
    optimizer = FSAM(model.named_parameters(), rho=0.5)
    model(torch.ones(2, 8)).square().sum().backward()
    optimizer.perturb()
    assert not torch.equal(clean.weight, model.weight)
    save_delta(model, mask, tmp_path / "delta")
    expected = snapshot(clean)
    apply_delta(clean, tmp_path / "delta")
    assert_same(clean, expected)


def test_mask_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must have the mask's parameter 'weight'"):
        save_delta(Odd(), FishMask({}, {"weight": (3, 3)}), tmp_path / "delta")
    assert os.listdir(tmp_path) == []


def test_second_name_of_a_tied_weight_is_refused(tmp_path):
    """It would not be saved: tied weights go by their first name."""
    with pytest.raises(ValueError, match=r"must have the mask's parameter 'head\.weight'"):
        save_delta(Odd(), FishMask({"head.weight": torch.tensor([1])}, {"head.weight": (40, 6)}), tmp_path / "delta")


def test_training_that_changed_other_weights_is_noticed_where_the_base_is_given(tmp_path):
    base = Odd()
    mask = odd_mask(base)
    model = trained(base, mask)
    with torch.no_grad():
        model.frozen[3] += 1
    with pytest.raises(DeltaError, match="differ in 'frozen';"):
        save_delta(model, mask, tmp_path / "delta", base)
    assert os.listdir(tmp_path) == []
    save_delta(model, mask, tmp_path / "delta")
    with pytest.raises(DeltaError, match="'frozen'"):
        apply_delta(base, tmp_path / "delta")


# -- the wrong base ----------------------------------------------------------------------------------------------------


def one_bit(model: nn.Module, name: str, mask: FishMask) -> None:
    """Flip the lowest bit of a weight that is not selected."""
    p = dict(model.named_parameters())[name]
    selected = mask.bits(name) if name in mask.shapes else torch.zeros(p.shape, dtype=torch.bool)
    place = tuple((~selected).nonzero()[-1].tolist())
    with torch.no_grad():
        p[place] = torch.nextafter(p[place], torch.tensor(9.0))


@pytest.mark.parametrize("name", ["embedding.weight", "transposed", "norm.bias", "frozen"])
def test_base_that_differs_in_one_bit_of_an_unselected_weight_is_refused(name, tmp_path):
    base = Odd()
    mask = odd_mask(base)
    save_delta(trained(base, mask), mask, tmp_path / "delta")
    one_bit(base, name, mask)
    before = snapshot(base)
    with pytest.raises(DeltaError, match=f"differ in '{name}';"):
        apply_delta(base, tmp_path / "delta")
    assert_same(base, before)


def test_zero_of_the_other_sign_is_another_base(tmp_path):
    base = nn.Linear(2, 2)
    nn.init.zeros_(base.weight)
    mask = FishMask({}, {"weight": (2, 2), "bias": (2,)})
    save_delta(base, mask, tmp_path / "delta")
    nn.init.constant_(base.weight, -0.0)
    with pytest.raises(DeltaError, match="'weight'"):
        apply_delta(base, tmp_path / "delta")


def swapped(**modules: nn.Module):
    def change(model: nn.Module) -> nn.Module:
        for name, module in modules.items():
            setattr(model, name, module)
        return model

    return change


def without_statistics(model: nn.Module) -> nn.Module:
    del model.norm._buffers["running_var"]
    return model


def wide_statistics(model: nn.Module) -> nn.Module:
    model.norm.running_var = model.norm.running_var.double()
    return model


WRONG = {
    "dtype": (lambda model: model.bfloat16(), r"'scale' must be float32 \(\), is bfloat16 \(\)"),
    "shape": (swapped(norm=nn.BatchNorm1d(7)), r"'norm.weight' must be float32 \(6,\), is float32 \(7,\)"),
    "transposed": (swapped(transposed=nn.Parameter(torch.zeros(7, 11))), r"must be float32 \(11, 7\), is .*\(7, 11\)"),
    "missing": (swapped(conv=nn.Identity()), "only the delta has a parameter 'conv.weight'"),
    "more": (swapped(more=nn.Linear(1, 1)), "only the model has a parameter 'more.weight'"),
    "untied": (lambda model: Odd(tied=False), "only the model has a parameter 'head.weight'"),
    "buffer": (without_statistics, "only the delta has a buffer 'norm.running_var'"),
    "buffer_dtype": (wide_statistics, r"'norm.running_var' must be float32 \(6,\), is float64 \(6,\)"),
    "weights": (
        lambda model: Odd(seed=3),
        "weights that are not selected differ in 'transposed' and 5 more",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_base_is_refused_and_left_as_it_is(change, message, tmp_path):
    base = Odd()
    mask = odd_mask(base)
    save_delta(trained(base, mask), mask, tmp_path / "delta")
    wrong = change(base)
    before = snapshot(wrong)
    with pytest.raises(DeltaError, match=f"delta is not for this model: .*{message}"):
        apply_delta(wrong, tmp_path / "delta")
    assert_same(wrong, before)
