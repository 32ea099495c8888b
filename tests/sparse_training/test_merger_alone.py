"""SparseMerger in one process: its arguments, its folder, and that it changes nothing in the training."""

import pytest
import torch
from torch import nn

from fsam_triton import FSAM, AdamWL2SP, FishMask, SparseMerger, load_merged
from tests.sparse_training.merging import LOCAL_STEPS, STEPS, Case, Masks, local_step, make_model, make_optimizer, train
from tests.training import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")


def test_one_process_without_a_group_trains_as_if_there_were_no_merger(tmp_path):
    case = Case(FSAM, {"refresh_every": 2})
    model, other = make_model(case), make_model(case)
    optimizer = make_optimizer(case, model)
    merger = SparseMerger(model, optimizer, Masks(model), local_steps=LOCAL_STEPS, refresh_every=2)
    train(merger, case, 0)
    merger.finish()
    assert (merger.steps, merger.merges, merger.bytes_sent) == (14, 5, 0)
    alone, choose = make_optimizer(case, other), Masks(other)
    for step in range(STEPS):
        if step % (2 * LOCAL_STEPS) == 0:
            alone.set_trainable(choose())
        local_step(case, other, alone, 0, step)
    assert_same_bits(model, other)


def test_merged_state_is_loaded_into_a_model_of_other_strides(tmp_path):
    model = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    mask = FishMask.random(model, 0.5)
    optimizer = AdamWL2SP(model.named_parameters())
    merger = SparseMerger(model, optimizer, lambda: mask, local_steps=1, checkpoint=tmp_path)
    model(torch.randn(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    merger.step()
    other = nn.Conv2d(3, 4, 2)
    assert load_merged(other, tmp_path) == mask
    assert_same_bits(other, model)


def test_folder_without_a_merge_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Invalid folder.*merges\.json"):
        load_merged(make_model(Case()), tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", None),
        ("choose_mask", 0.005),
        ("choose_mask", lambda: 0.005),
        ("local_steps", 0),
        ("masks", "own"),
        ("how", "median"),
        ("refresh_every", 0),
        ("dense_merges", -1),
    ],
)
def test_bad_argument_is_refused_by_name(name, value):
    model = make_model(Case())
    arguments = {"optimizer": make_optimizer(Case(), model), "choose_mask": Masks(model), name: value}
    with pytest.raises(ValueError, match=f"Invalid {name}"):
        SparseMerger(model, **arguments)


def test_merge_between_the_two_passes_of_sam_is_refused():
    model = make_model(Case())
    optimizer = FSAM(model.named_parameters())
    merger = SparseMerger(model, optimizer, Masks(model), local_steps=1)
    model(torch.randn(2, 6)).sum().backward()
    optimizer.perturb()
    with pytest.raises(RuntimeError, match=r"optimizer\.step\(\) before merger\.step\(\)"):
        merger.step()
