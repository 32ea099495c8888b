"""State of 8 bits and 24-bit master weights on shards: as in one process, and loaded by other numbers of processes."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from fsam_triton import FSAM, AdamWL2SP, MomentumSAM
from fsam_triton.errors import ArgumentError
from tests.integration.fsdp2 import assign_gradients, of_members, whole
from tests.processes import eager_passes, spawn

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"lr": 1e-2, "state_format": "8bit", "master_weights": "24bit"}
KINDS = {
    "adamw": (AdamWL2SP, {**SMALL, "amsgrad": True}),
    "sam": (FSAM, {**SMALL, "rho": 0.5, "backup_format": "8bit"}),
    "momentum-sam": (MomentumSAM, {**SMALL, "rho": 0.5, "backup_format": "8bit", "rule": "lion"}),
}
STEPS, HALF = 6, 3


def begin(name: str, mesh: DeviceMesh | None = None, seed: int = 0):
    """Seven and five rows, of which three processes get 3, 3, 1 and 2, 2, 1; biases are not coded."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 7), nn.Linear(32, 5)).to(torch.bfloat16)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    kind, arguments = KINDS[name]
    return model, kind(model.named_parameters(), **arguments)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        if not isinstance(optimizer, AdamWL2SP):
            assign_gradients(model, 100 + step)
            optimizer.perturb()
        assign_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()


def result_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    state = {name: {key: whole(v) for key, v in optimizer.state[p].items()} for name, p in model.named_parameters()}
    return {"weights": {name: whole(p) for name, p in model.named_parameters()}, "state": state}


# -- the processes -----------------------------------------------------------------------------------------------------


def run_all(rank: int, n: int, folder) -> dict:
    meshes = {"two": DeviceMesh("cpu", [0, 1]), "three": DeviceMesh("cpu", [0, 1, 2])}
    out: dict = {}
    for world, mesh in meshes.items():
        if mesh.get_coordinate() is not None:
            for name in KINDS:
                model, optimizer = begin(name, mesh)
                train(model, optimizer, 0, HALF)
                weights, state = get_state_dict(model, optimizer)
                saved = {"model": weights, "optimizer": state}
                dcp.save(saved, checkpoint_id=folder / f"{world}-{name}", process_group=mesh.get_group())
                train(model, optimizer, HALF, STEPS)
                out[f"{world} {name}"] = result_of(model, optimizer)
    for before, after in (("two", "three"), ("three", "two")):
        dist.barrier()
        mesh = meshes[after]
        if mesh.get_coordinate() is not None:
            for name in KINDS:
                model, optimizer = begin(name, mesh, seed=1)
                weights, state = get_state_dict(model, optimizer)
                saved = {"model": weights, "optimizer": state}
                dcp.load(saved, checkpoint_id=folder / f"{before}-{name}", process_group=mesh.get_group())
                set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
                train(model, optimizer, HALF, STEPS)
                out[f"{before} to {after} {name}"] = result_of(model, optimizer)
    if meshes["two"].get_coordinate() is not None:
        out["columns"] = {columns: shards_of_columns(columns, meshes["two"]) for columns in (64, 96)}
    return out


def shards_of_columns(columns: int, mesh: DeviceMesh) -> str:
    p = nn.Parameter(distribute_tensor(torch.ones(4, columns), mesh, [Shard(1)]))
    try:
        AdamWL2SP([p], state_format="8bit")
    except ArgumentError as error:
        return error.name
    return "accepted"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return spawn(run_all, 3, tmp_path_factory.mktemp("formats"))


# -- the tests ---------------------------------------------------------------------------------------------------------


@eager_passes()
def alone(name: str) -> dict:
    model, optimizer = begin(name)
    train(model, optimizer, 0, STEPS)
    return result_of(model, optimizer)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("run", ["two", "three", "two to three", "three to two"])
def test_shards_have_the_codes_of_one_process_to_the_bit(run, name, results):
    expected = alone(name)
    assert expected["state"]["0.weight"]["exp_avg"].dtype == torch.int8
    for actual in of_members(results, f"{run} {name}"):
        for parameter, weight in expected["weights"].items():
            assert torch.equal(actual["weights"][parameter], weight), parameter
            for key, value in expected["state"][parameter].items():
                assert torch.equal(actual["state"][parameter][key], value), (parameter, key)


def test_shards_of_columns_must_be_whole_groups(results):
    for found in of_members(results, "columns"):
        assert found == {64: "accepted", 96: "placements of parameter number 0"}
