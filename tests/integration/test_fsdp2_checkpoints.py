"""Checkpoints of sharded training, by torch.distributed.checkpoint, fit any number of processes."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh

from fsam_triton import AdamWL2SP
from tests.integration.fsdp2 import (
    CASES,
    HALF,
    STEPS,
    Case,
    alone,
    assert_same_run,
    assign_gradients,
    make_model,
    make_optimizer,
    of_members,
    rank_and_size,
    result_of,
    shard,
    train,
)
from tests.processes import eager_passes, spawn

pytestmark = pytest.mark.usefixtures("one_thread")

# In the middle of what a mask is chosen by, and of LookSAM's interval.
SAVED = ("adamw", "fisher", "looksam", "momentum-sam")
FULL = StateDictOptions(full_state_dict=True)
# Its state has 16-bit integers, which no collective knows.
MASTERS = Case(AdamWL2SP, {"master_weights": True}, torch.bfloat16)


# -- the processes -----------------------------------------------------------------------------------------------------


def run_all(rank: int, n: int, folder) -> dict:
    """Three processes, or two of them."""
    meshes = {"two": DeviceMesh("cpu", [0, 1]), "three": DeviceMesh("cpu", [0, 1, 2])}
    out: dict = {}
    for world, mesh in meshes.items():
        if mesh.get_coordinate() is not None:
            for name in SAVED:
                save(CASES[name], mesh, folder / f"{world}-{name}")
    for before, after in (("two", "three"), ("three", "two")):
        # What a rank saved, others read.
        dist.barrier()
        if meshes[after].get_coordinate() is not None:
            for name in SAVED:
                run = load_and_train(CASES[name], meshes[after], folder / f"{before}-{name}")
                out[f"{before} to {after} {name}"] = run
    if meshes["two"].get_coordinate() is not None:
        out["full"] = {name: save_full(CASES[name], meshes["two"]) for name in SAVED}
        out["masters"] = masters_by_hand(meshes["two"])
    out["from plain"] = load_plain(meshes["three"])
    return out


def begin(case: Case, mesh: DeviceMesh, seed: int = 0):
    model = shard(case, make_model(case, seed), mesh)
    return model, make_optimizer(case, model)


def save(case: Case, mesh: DeviceMesh, path) -> None:
    model, optimizer = begin(case, mesh)
    train(case, model, optimizer, *rank_and_size(mesh), stop=HALF)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path, process_group=mesh.get_group())


def load_and_train(case: Case, mesh: DeviceMesh, path) -> dict:
    model, optimizer = begin(case, mesh, seed=1)
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state}
    dcp.load(saved, checkpoint_id=path, process_group=mesh.get_group())
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    return result_of(optimizer, train(case, model, optimizer, *rank_and_size(mesh), start=HALF))


def save_full(case: Case, mesh: DeviceMesh) -> tuple[dict, dict]:
    model, optimizer = begin(case, mesh)
    train(case, model, optimizer, *rank_and_size(mesh), stop=HALF)
    weights, state = get_state_dict(model, optimizer, options=FULL)
    return {name: tensor.clone() for name, tensor in weights.items()}, state


def load_plain(mesh: DeviceMesh) -> dict:
    """A checkpoint of one process, by torch's functions and by the optimizer's own."""
    out = {}
    for name in ("adamw", "fisher"):
        case = CASES[name]
        plain = make_model(case)
        optimizer = make_optimizer(case, plain)
        train(case, plain, optimizer, stop=HALF)
        model, sharded = begin(case, mesh, seed=1)
        if name == "adamw":
            weights, state = plain.state_dict(), get_optimizer_state_dict(plain, optimizer)
            set_state_dict(model, sharded, model_state_dict=weights, optim_state_dict=state, options=FULL)
        else:
            set_model_state_dict(model, plain.state_dict(), options=FULL)
            sharded.load_state_dict(optimizer.state_dict())
        out[name] = result_of(sharded, train(case, model, sharded, *rank_and_size(mesh), start=HALF))
    return out


def steps_by_hand(model, optimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        assign_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()


def masters_by_hand(mesh: DeviceMesh) -> tuple[dict, dict, dict]:
    model, optimizer = begin(MASTERS, mesh)
    steps_by_hand(model, optimizer, 0, HALF)
    weights, state = get_state_dict(model, optimizer, options=FULL)
    # Loading puts shards into the dicts.
    saved = copy.deepcopy((weights, state))
    other_model, other = begin(MASTERS, mesh, seed=1)
    set_state_dict(other_model, other, model_state_dict=weights, optim_state_dict=state, options=FULL)
    steps_by_hand(other_model, other, HALF, STEPS)
    return *saved, result_of(other, [])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return spawn(run_all, 3, tmp_path_factory.mktemp("checkpoints"))


# -- the tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("worlds", ["two to three", "three to two"])
def test_checkpoint_is_loaded_by_another_number_of_processes(worlds, name, results):
    for result in of_members(results, f"{worlds} {name}"):
        assert_same_run(result, alone(name), CASES[name])


@pytest.mark.parametrize("name", SAVED)
@eager_passes()
def test_full_state_dict_is_loaded_by_one_process(name, results):
    case = CASES[name]
    weights, state = results[0]["full"][name]
    model = make_model(case, seed=1)
    optimizer = make_optimizer(case, model)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    assert_same_run(result_of(optimizer, train(case, model, optimizer, start=HALF)), alone(name), case)


@pytest.mark.parametrize("name", ["adamw", "fisher"])
def test_checkpoint_of_one_process_is_loaded_by_several(name, results):
    for result in of_members(results, "from plain"):
        assert_same_run(result[name], alone(name), CASES[name])


@eager_passes()
def test_full_state_dict_of_master_weights_goes_on_to_the_bit_in_one_process_and_several(results):
    model = make_model(MASTERS)
    optimizer = make_optimizer(MASTERS, model)
    steps_by_hand(model, optimizer, 0, STEPS)
    expected = result_of(optimizer, [])
    weights, state, _ = results[0]["masters"]
    model = make_model(MASTERS, seed=1)
    optimizer = make_optimizer(MASTERS, model)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    steps_by_hand(model, optimizer, HALF, STEPS)
    ends = [result_of(optimizer, []), *(again for _, _, again in of_members(results, "masters"))]
    for end in ends:
        for name, weight in expected["weights"].items():
            assert torch.equal(end["weights"][name], weight), name
            for lane, value in expected["state"][name].items():
                assert torch.equal(end["state"][name][lane], value), (name, lane)
