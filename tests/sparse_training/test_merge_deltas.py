"""Deltas that are merged: means and sums over those that have trained a weight."""

import copy
import pathlib

import pytest
import torch
from torch import nn

from fsam_triton import DeltaError, FishMask, apply_delta, merge_deltas, save_delta
from tests.sparse_training.deltas import DTYPES, Odd, assert_same, odd_mask, snapshot, trained

pytestmark = pytest.mark.usefixtures("one_thread")


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
