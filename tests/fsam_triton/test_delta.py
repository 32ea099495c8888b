"""Deltas: to the bit what was trained, only into what it was trained from, whole or not there."""

import copy
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import MomentumSAM, delta
from fsam_triton.delta import DeltaError, apply_delta, from_pretrained, merge_deltas, save_delta, save_pretrained
from fsam_triton.files import read_file, write_file
from fsam_triton.fish import FishMask

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Odd(nn.Module):
    """Tied, 0-dim, empty, transposed, channels-last and frozen parameters, and buffers of all sorts."""

    def __init__(self, seed: int = 0, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 6)
        self.norm = nn.BatchNorm1d(6)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.scale = nn.Parameter(torch.zeros(()))
        self.empty = nn.Parameter(torch.zeros(0, 5))
        self.transposed = nn.Parameter(torch.zeros(7, 11).t())
        self.frozen = nn.Parameter(torch.zeros(9), requires_grad=False)
        self.head = nn.Linear(6, 40)
        if tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("made_anew", torch.zeros(3), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in [*self.parameters(), *self.buffers()]:
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))


def trained(base: nn.Module, mask: FishMask, seed: int = 1) -> nn.Module:
    """A copy with other numbers in the selected weights, strange ones among them, and in the buffers."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    strange = torch.tensor([torch.nan, -0.0, torch.inf, 0.0, -torch.inf, 1e-45, -1e-7])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in mask.shapes:
                new = torch.randn(p.numel(), generator=generator)
                new[: len(strange)] = strange[: p.numel()]
                p.copy_(torch.where(mask.bits(name), new.view(p.shape).to(p.dtype), p))
        for name, buffer in model.named_buffers():
            if name in model.state_dict():
                buffer.add_(seed)
    return model


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Everything a model has, as bytes."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: bits_of(tensor).clone() for name, tensor in named}


def assert_same(model: nn.Module, other: dict[str, Tensor]) -> None:
    mine = snapshot(model)
    assert mine.keys() == other.keys()
    for name in mine:
        assert torch.equal(mine[name], other[name]), name


def odd_mask(model: nn.Module, seed: int = 0) -> FishMask:
    return FishMask.random(model, 0.4, seed, always_trainable=["conv", "scale"])


# -- saving and applying -----------------------------------------------------------------------------------------------


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


def test_weights_that_are_perturbed_between_steps_are_saved_clean(tmp_path):
    model, mask = nn.Linear(8, 8), None
    mask = FishMask.random(model, 0.5)
    optimizer = MomentumSAM(model.named_parameters(), lr=0.1, rho=0.5)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(2):
            model(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    perturbed = model.weight.detach().clone()
    save_delta(model, mask, tmp_path / "delta")
    clean = nn.Linear(8, 8)
    clean.load_state_dict(model.state_dict())
    assert not torch.equal(clean.weight, perturbed)
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


# -- damaged files -----------------------------------------------------------------------------------------------------


def small_delta(path: pathlib.Path) -> nn.Module:
    base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    mask = FishMask.random(base, 0.5)
    save_delta(trained(base, mask), mask, path)
    return base


def test_every_byte_that_is_changed_is_noticed_before_anything_is_written(tmp_path):
    path = tmp_path / "delta"
    base = small_delta(path)
    before, data = snapshot(base), path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :])
        with pytest.raises(DeltaError, match=r"damaged|must be a delta file"):
            apply_delta(base, path)
    assert_same(base, before)


def test_every_truncation_is_noticed_before_anything_is_written(tmp_path):
    path = tmp_path / "delta"
    base = small_delta(path)
    before, data = snapshot(base), path.read_bytes()
    for end in range(0, len(data), 3):
        path.write_bytes(data[:end])
        with pytest.raises(DeltaError, match="damaged"):
            apply_delta(base, path)
    assert_same(base, before)


def test_mask_file_is_no_delta(tmp_path):
    FishMask.random(Odd(), 0.5).save(tmp_path / "mask")
    with pytest.raises(DeltaError, match="is a FishMask file of version 1; must be a delta file"):
        apply_delta(Odd(), tmp_path / "mask")


def test_error_is_a_value_error():
    assert issubclass(DeltaError, ValueError)


FORGERIES = {
    "too_few_values": lambda tensors, meta: tensors.update({"values/0.weight": tensors["values/0.weight"][1:].clone()}),
    "no_values": lambda tensors, meta: tensors.pop("values/0.weight"),
    "more_values": lambda tensors, meta: tensors.update({"values/new": torch.zeros(1)}),
    "dtype": lambda tensors, meta: tensors.update({"values/0.weight": tensors["values/0.weight"].double()}),
    "shape": lambda tensors, meta: meta["base"]["0.weight"].__setitem__(1, [4, 4]),
    "mask_shape": lambda tensors, meta: meta["shapes"].__setitem__("0.weight", [1, 1]),
    "no_base": lambda tensors, meta: meta.pop("base"),
    "no_shapes": lambda tensors, meta: meta.pop("shapes"),
    "gap_type": lambda tensors, meta: tensors.update({"gaps/0.weight": torch.zeros(4)}),
    "negative_gap": lambda tensors, meta: tensors.update({"gaps/0.weight": torch.tensor([-5] * 6).int()}),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_file_that_contradicts_itself_is_refused_before_anything_is_written(forge, tmp_path):
    base = small_delta(tmp_path / "delta")
    before = snapshot(base)
    tensors, meta = read_file(tmp_path / "delta", "delta")
    del meta["sha256"]
    write_file(tmp_path / "delta", "delta", tensors, meta)
    apply_delta(copy.deepcopy(base), tmp_path / "delta")
    forge(tensors, meta)
    write_file(tmp_path / "delta", "delta", tensors, meta)
    with pytest.raises(DeltaError, match="contradicts itself"):
        apply_delta(base, tmp_path / "delta")
    assert_same(base, before)


# -- writes that do not end --------------------------------------------------------------------------------------------


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
    base = Odd()
    mask = odd_mask(base)
    old = trained(base, mask)
    save_delta(old, mask, tmp_path / "delta")
    monkeypatch.setattr(owner, name, failure)
    with pytest.raises((OSError, KeyboardInterrupt)):
        save_delta(trained(base, mask, seed=2), mask, tmp_path / "delta")
    with pytest.raises((OSError, KeyboardInterrupt)):
        merge_deltas([tmp_path / "delta"], tmp_path / "delta", base)
    monkeypatch.undo()
    apply_delta(base, tmp_path / "delta")
    assert_same(base, snapshot(old))
    assert os.listdir(tmp_path) == ["delta"]


KILLED = """
import os, signal, sys, pathlib, torch
from fsam_triton.delta import save_delta
from fsam_triton.fish import FishMask

def killed(path, data):
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

pathlib.Path.write_bytes = killed
model = torch.nn.Linear(4, 4)
save_delta(model, FishMask.random(model, 0.5), sys.argv[1])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_process_that_is_killed_in_the_middle_of_a_write_leaves_the_old_file(tmp_path):
    base = small_delta(tmp_path / "delta")
    before = (tmp_path / "delta").read_bytes()
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "delta")], check=False)
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "delta").read_bytes() == before
    apply_delta(base, tmp_path / "delta")


# -- merging -----------------------------------------------------------------------------------------------------------


def gently_trained(base: nn.Module, mask: FishMask, seed: int) -> nn.Module:
    """A copy whose selected weights and floating-point buffers have moved by random numbers."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in mask.shapes:
                p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * mask.bits(name))
        for name, buffer in model.named_buffers():
            if name in model.state_dict():
                buffer.add_(seed)
    return model


def made(tmp_path: pathlib.Path, base: nn.Module, masks: list[FishMask]) -> tuple[list[pathlib.Path], list[nn.Module]]:
    models = [gently_trained(base, mask, seed) for seed, mask in enumerate(masks, start=1)]
    paths = [tmp_path / f"delta{i}" for i in range(len(masks))]
    for model, mask, path in zip(models, masks, paths, strict=True):
        save_delta(model, mask, path, base)
    return paths, models


@pytest.mark.parametrize("how", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_weights_are_the_mean_or_sum_over_the_deltas_that_have_them(dtype, how, tmp_path):
    base = Odd().to(dtype)
    masks = [FishMask.random(base, 0.4, seed) for seed in range(3)]
    paths, models = made(tmp_path, base, masks)
    mask = merge_deltas(paths, tmp_path / "merged", base, how)
    assert mask == masks[0] | masks[1] | masks[2]
    merged = copy.deepcopy(base)
    assert apply_delta(merged, tmp_path / "merged") == mask
    weights = [dict(model.named_parameters()) for model in models]
    for name, p in merged.named_parameters():
        if name not in mask.shapes:
            continue
        old = dict(base.named_parameters())[name].detach().double()
        bits = torch.stack([each.bits(name) for each in masks]).double()
        moved = ((torch.stack([each[name].detach() for each in weights]).double() - old) * bits).sum(0)
        expected = old + moved / (bits.sum(0).clamp(min=1) if how == "mean" else 1)
        # Rounded once: within half an ulp, which eps bounds relatively; and fp64's own sums of a few terms up to 8.
        ulp = torch.finfo(dtype).eps * expected.abs() / (1 if dtype == torch.float64 else 2)
        assert ((p.double() - expected).abs() <= ulp + 64 * torch.finfo(torch.float64).eps).all(), name


def test_merged_buffers_are_means_and_counters_are_the_first_ones(tmp_path):
    base = Odd()
    paths, models = made(tmp_path, base, [odd_mask(base)] * 2)
    for how in ("mean", "sum"):
        merge_deltas(paths, tmp_path / "merged", base, how)
        merged = copy.deepcopy(base)
        apply_delta(merged, tmp_path / "merged")
        both = torch.stack([model.norm.running_var for model in models]).double()
        assert torch.equal(merged.norm.running_var, both.mean(0).float())
        assert merged.norm.num_batches_tracked == models[0].norm.num_batches_tracked == 1


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_parts_of_a_split_mask_come_together_undiminished(how, tmp_path):
    base = Odd()
    whole = odd_mask(base)
    paths, models = made(tmp_path, base, whole.split(3))
    assert merge_deltas(paths, tmp_path / "merged", base, how) == whole
    apply_delta(base, tmp_path / "merged")
    for part, model in zip(whole.split(3), models, strict=True):
        for name, p in model.named_parameters():
            if name in part.shapes:
                bits, merged = part.bits(name), dict(base.named_parameters())[name]
                assert torch.equal(merged[bits], p[bits])


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_of_equal_deltas_is_the_delta_whatever_the_base_has_in_its_places(dtype, tmp_path):
    base = Odd().to(dtype)
    mask = odd_mask(base)
    model = trained(base, mask)
    save_delta(model, mask, tmp_path / "delta")
    other = trained(base, mask, seed=9)
    merge_deltas([tmp_path / "delta"] * 3, tmp_path / "merged", other)
    assert_same(other, snapshot(trained(base, mask, seed=9)))
    apply_delta(other, tmp_path / "merged")
    for (name, p), expected in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p.nan_to_num(99.0), expected.nan_to_num(99.0)), name


def test_merging_may_write_over_one_of_its_files(tmp_path):
    base = Odd()
    paths, _ = made(tmp_path, base, [odd_mask(base, seed) for seed in range(2)])
    merge_deltas(paths, tmp_path / "merged", base)
    merge_deltas(paths, paths[1], base)
    assert paths[1].read_bytes() == (tmp_path / "merged").read_bytes()


def test_merging_refuses_deltas_of_another_base(tmp_path):
    base, other = Odd(), Odd(seed=4)
    first, _ = made(tmp_path, base, [odd_mask(base)])
    save_delta(other, odd_mask(other), tmp_path / "other")
    with pytest.raises(DeltaError, match="other is not for this base"):
        merge_deltas([*first, tmp_path / "other"], tmp_path / "merged", base)
    assert not (tmp_path / "merged").exists()


def test_merging_refuses_masks_over_other_parameters(tmp_path):
    base = Odd()
    paths, _ = made(tmp_path, base, [odd_mask(base), FishMask({}, {"frozen": (9,)})])
    with pytest.raises(ValueError, match="must have the other mask's shape"):
        merge_deltas(paths, tmp_path / "merged", base)


def test_merging_nothing_or_in_an_unknown_way_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Invalid paths"):
        merge_deltas([], tmp_path / "merged", Odd())
    with pytest.raises(ValueError, match="Invalid how: 'max'"):
        merge_deltas([tmp_path / "delta"], tmp_path / "merged", Odd(), "max")


# -- transformers ------------------------------------------------------------------------------------------------------

LABELS = {0: "business", 1: "politics", 2: "sports"}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def base_dir(transformers, tmp_path_factory):
    """A saved encoder without a classifier."""
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def classifier(transformers, folder, dtype=torch.float32):
    """A model with a new head, trained in a few of its weights, and its mask."""
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, id2label=LABELS, label2id={name: i for i, name in LABELS.items()}, dtype=dtype
    )
    mask = FishMask.random(base, 0.05, always_trainable=["classifier"])
    model = trained(base, mask)
    with torch.no_grad():
        for p in model.parameters():
            p.nan_to_num_(0.5, 0.5, 0.5)
    return model.eval(), mask


@pytest.mark.parametrize("given", ["path", "recorded", "model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_gives_the_trained_model_with_its_labels_and_new_head(transformers, base_dir, dtype, given, tmp_path):
    model, mask = classifier(transformers, base_dir, dtype)
    save_pretrained(model, mask, tmp_path / "a" / "adapter")
    torch.manual_seed(77)
    own = transformers.BertForSequenceClassification.from_pretrained(base_dir, num_labels=3, dtype=dtype)
    base = {"path": base_dir, "recorded": None, "model": own}[given]
    back = from_pretrained(base, tmp_path / "a" / "adapter")
    assert type(back) is type(model)
    assert (back is own) == (given == "model")
    assert not back.training
    assert_same(back, snapshot(model))
    if given != "model":
        assert back.config.id2label == LABELS
    tokens = torch.arange(10).view(2, 5)
    assert torch.equal(back(tokens).logits, model(tokens).logits)
    assert sorted(os.listdir(tmp_path / "a" / "adapter")) == ["fsam_delta.safetensors", "fsam_delta_config.json"]


def test_adapter_remembers_the_dtype_the_model_was_cast_to(transformers, base_dir, tmp_path):
    model, mask = classifier(transformers, base_dir)
    save_pretrained(model.bfloat16(), mask, tmp_path)
    assert_same(from_pretrained(base_dir, tmp_path), snapshot(model))


def test_base_may_have_a_head_for_other_labels(transformers, base_dir, tmp_path):
    other = transformers.BertForSequenceClassification.from_pretrained(base_dir, num_labels=7)
    other.save_pretrained(tmp_path / "other")
    model, mask = classifier(transformers, base_dir)
    save_pretrained(model, mask, tmp_path)
    assert_same(from_pretrained(tmp_path / "other", tmp_path), snapshot(model))


def test_adapter_config_says_what_it_was_made_from_and_with(transformers, base_dir, tmp_path):
    model, mask = classifier(transformers, base_dir)
    save_pretrained(model, mask, tmp_path)
    config = json.loads((tmp_path / "fsam_delta_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base_dir)
    assert config["architecture"] == "BertForSequenceClassification"
    assert config["dtype"] == "float32"
    assert config["keep_ratio"] == mask.density
    assert config["trained_weights"] == mask.count
    assert config["versions"].keys() == {"fsam_triton", "torch", "transformers"}
    assert config["config"]["id2label"] == {str(i): name for i, name in LABELS.items()}


def test_loading_an_adapter_reports_no_new_weights(transformers, base_dir, tmp_path, caplog, capfd):
    save_pretrained(*classifier(transformers, base_dir), tmp_path)
    verbosity = transformers.logging.get_verbosity()
    capfd.readouterr()
    caplog.clear()
    from_pretrained(base_dir, tmp_path)
    assert "newly initialized" not in caplog.text + "".join(capfd.readouterr())
    assert transformers.logging.get_verbosity() == verbosity


def test_new_parameters_that_are_not_selected_whole_are_named(transformers, base_dir, tmp_path):
    model, _ = classifier(transformers, base_dir)
    save_pretrained(model, FishMask.random(model, 0.05), tmp_path)
    with pytest.raises(DeltaError, match=r"differ in 'classifier.weight'.*\(always_trainable\)"):
        from_pretrained(base_dir, tmp_path)


def test_adapter_files_of_two_savings_are_told_apart(transformers, base_dir, tmp_path):
    model, mask = classifier(transformers, base_dir)
    save_pretrained(model, mask, tmp_path)
    save_delta(trained(model, mask, seed=3), mask, tmp_path / "fsam_delta.safetensors")
    with pytest.raises(DeltaError, match="is damaged, or not the one"):
        from_pretrained(base_dir, tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"delta_sha256": 1}'])
def test_damaged_adapter_config_is_refused(transformers, base_dir, content, tmp_path):
    save_pretrained(*classifier(transformers, base_dir), tmp_path)
    (tmp_path / "fsam_delta_config.json").write_text(content)
    with pytest.raises(DeltaError, match=r"fsam_delta_config.json was not written by save_pretrained, or is damaged"):
        from_pretrained(base_dir, tmp_path)


@pytest.mark.parametrize("architecture", ["BertForEverything", "AutoConfig", "logging", "__name__"])
def test_architecture_that_is_no_model_of_transformers_is_refused(transformers, base_dir, architecture, tmp_path):
    save_pretrained(*classifier(transformers, base_dir), tmp_path)
    config = json.loads((tmp_path / "fsam_delta_config.json").read_text())
    (tmp_path / "fsam_delta_config.json").write_text(json.dumps({**config, "architecture": architecture}))
    with pytest.raises(DeltaError, match=f"has no model '{architecture}'"):
        from_pretrained(base_dir, tmp_path)


def test_adapter_that_cannot_be_written_leaves_the_old_one(transformers, base_dir, tmp_path, monkeypatch):
    model, mask = classifier(transformers, base_dir)
    save_pretrained(model, mask, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    monkeypatch.setattr(type(model.config), "to_json_string", no_replace)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(trained(model, mask, seed=4), mask, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_one_in_200_weights_of_minilm_take_less_than_a_hundredth_of_the_dense_checkpoint(transformers, tmp_path):
    """A random mask is the longest to write down. The shapes are the packaged all-MiniLM-L6-v2's."""
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=5
    )
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(config)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    mask = FishMask.random(model, 0.005, always_trainable=["classifier"])
    save_delta(model, mask, tmp_path / "delta")
    dense = 4 * sum(p.numel() for p in model.parameters())
    assert mask.count == 113_575
    assert (tmp_path / "delta").stat().st_size < 0.01 * dense
