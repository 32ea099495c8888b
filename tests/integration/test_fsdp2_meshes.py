"""Meshes of two dimensions, tensor parallelism, and what a step costs on shards: launches and collectives."""

import contextlib
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from fsam_triton import AdamWL2SP, FisherMask, MomentumSAM, ops
from tests.integration.fsdp2 import (
    CASES,
    HALF,
    Case,
    alone,
    assert_same_run,
    assign_gradients,
    load,
    make_even_model,
    make_model,
    make_optimizer,
    of_members,
    parallelize,
    rank_and_size,
    result_of,
    shard,
    train,
)
from tests.processes import spawn

pytestmark = pytest.mark.usefixtures("one_thread")

REPLICATED = ("adamw", "fisher", "esam")
# Neither random numbers nor the order of ties are those of one process there.
PARALLEL = ("adamw", "fisher", "gsam", "momentum-sam", "gathered-sam")
BY_HAND = {
    "adamw": Case(AdamWL2SP),
    "clipped adamw": Case(AdamWL2SP, {"max_grad_norm": 0.5}),
    "fsam": Case(),
    "clipped fsam": Case(arguments={"max_grad_norm": 0.5}),
    "gsam": Case(arguments={"alpha": 0.3}),
    "masked fsam": Case(arguments={"mask": FisherMask(0.3, interval=100)}),
    "momentum-sam": Case(MomentumSAM),
}


# -- the processes -----------------------------------------------------------------------------------------------------


def run_all(rank: int, n: int, folder) -> dict:
    """Four processes."""
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    two = DeviceMesh("cpu", [0, 1])
    out: dict = {}
    for name in REPLICATED:
        out[f"replicated {name}"] = run_replicated(CASES[name], square)
    for name in PARALLEL:
        out[f"parallel {name}"] = run_parallel(CASES[name], square, folder / name)
    dist.barrier()
    if two.get_coordinate() is not None:
        out["tensors alone"] = run_tensor_parallel(CASES["gsam"], two)
        out["parallel to two"] = go_on(CASES["fisher"], two, folder / "fisher")
    for world, mesh in (("two", two), ("square", square)):
        if mesh.get_coordinate() is not None:
            out[f"counts of {world}"] = {name: counts_of(case, mesh) for name, case in BY_HAND.items()}
    out["random"] = random_masks(square)
    return out


def run_replicated(case: Case, mesh: DeviceMesh) -> dict:
    model = shard(case, make_model(case), mesh)
    optimizer = make_optimizer(case, model)
    return result_of(optimizer, train(case, model, optimizer, *rank_and_size(mesh)))


def shard_parallel(case: Case, mesh: DeviceMesh) -> nn.Module:
    """FSDP2 over the outer dimension of what tensor parallelism cuts over the inner one."""
    return shard(case, parallelize(make_even_model(case), mesh["inner"]), mesh["outer"])


def run_parallel(case: Case, mesh: DeviceMesh, path) -> dict:
    model = shard_parallel(case, mesh)
    optimizer = make_optimizer(case, model)
    rank, n = mesh["outer"].get_local_rank(), mesh["outer"].size()
    losses = train(case, model, optimizer, rank, n, stop=HALF)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)
    losses += train(case, model, optimizer, rank, n, start=HALF)
    return result_of(optimizer, losses)


def go_on(case: Case, mesh: DeviceMesh, path) -> dict:
    """From a checkpoint of four processes."""
    model = shard(case, make_even_model(case, seed=1), mesh)
    optimizer = make_optimizer(case, model)
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state}
    dcp.load(saved, checkpoint_id=path, process_group=mesh.get_group())
    load(model, optimizer, saved["model"], saved["optimizer"])
    return result_of(optimizer, train(case, model, optimizer, *rank_and_size(mesh), start=HALF))


def run_tensor_parallel(case: Case, mesh: DeviceMesh) -> dict:
    """Gradients of the norm layer are partial: each rank has those of its part of the batch."""
    model = parallelize(make_even_model(case), mesh, sequence=True)
    optimizer = make_optimizer(case, model)
    return result_of(optimizer, train(case, model, optimizer))


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Launches by pass, and collectives."""
    counts: Counter = Counter()

    def count(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("norm_sq", "gap", "perturb_", "descend_"):
            patch.setattr(ops, name, count(name, getattr(ops, name)))
        for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast"):
            patch.setattr(dist, name, count(name, getattr(dist, name)))
        yield counts


def counts_of(case: Case, mesh: DeviceMesh) -> dict[str, int]:
    """Of the third step, with gradients that are there already."""
    if mesh.ndim == 2:
        model = shard_parallel(case, mesh)
    else:
        model = make_even_model(case)
        fully_shard(model, mesh=mesh)
    named = list(model.named_parameters())
    groups = [{"params": named[:3], "lr": 0.1}, {"params": named[3:], "weight_decay": 0.0}]
    optimizer = case.kind(groups, **case.arguments)
    for step in range(3):
        with counted() as counts:
            assign_gradients(model, step)
            if not isinstance(optimizer, AdamWL2SP):
                optimizer.perturb()
                assign_gradients(model, step)
            optimizer.step()
    return dict(counts)


def random_masks(mesh: DeviceMesh) -> dict:
    case = CASES["fisher-random"]
    model = shard_parallel(case, mesh)
    optimizer = make_optimizer(case, model)
    assign_gradients(model, 0)
    optimizer.perturb()
    return result_of(optimizer, [])["masks"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return spawn(run_all, 4, tmp_path_factory.mktemp("meshes"))


# -- the tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REPLICATED)
def test_replicas_of_shards_equal_one_process(name, results):
    for result in of_members(results, f"replicated {name}"):
        assert_same_run(result, alone(name), CASES[name])


@pytest.mark.parametrize("name", PARALLEL)
def test_shards_of_tensor_parallel_layers_equal_one_process(name, results):
    expected = alone(name, make_even_model)
    for result in of_members(results, f"parallel {name}"):
        assert_same_run(result, expected, CASES[name])
        torch.testing.assert_close(result["losses"], expected["losses"])


def test_partial_gradients_of_tensor_parallelism_are_added_up(results):
    for result in of_members(results, "tensors alone"):
        assert_same_run(result, alone("gsam", make_even_model), CASES["gsam"])


def test_checkpoint_of_a_mesh_is_loaded_by_two_processes(results):
    for result in of_members(results, "parallel to two"):
        assert_same_run(result, alone("fisher", make_even_model), CASES["fisher"])


# One launch for all shards and groups; a collective for each norm or set of dot products, none for the rest.
COSTS = {
    "adamw": {"descend_": 1},
    "clipped adamw": {"norm_sq": 1, "all_reduce": 1, "descend_": 1},
    "fsam": {"norm_sq": 1, "all_reduce": 1, "perturb_": 1, "descend_": 1},
    "clipped fsam": {"norm_sq": 2, "all_reduce": 2, "perturb_": 1, "descend_": 1},
    "gsam": {"norm_sq": 1, "all_reduce": 2, "perturb_": 1, "gap": 1, "descend_": 1},
    "masked fsam": {"norm_sq": 1, "all_reduce": 1, "perturb_": 1, "descend_": 1},
    "momentum-sam": {"norm_sq": 1, "all_reduce": 1, "perturb_": 1, "descend_": 1},
}


@pytest.mark.parametrize("name", COSTS)
def test_step_on_shards_has_one_launch_a_pass_and_one_collective_a_norm(name, results):
    for result in of_members(results, "counts of two"):
        assert result[name] == COSTS[name]


@pytest.mark.parametrize("name", COSTS)
def test_step_on_a_mesh_has_one_collective_a_norm_and_dimension(name, results):
    """Parameters that are cut in two dimensions, and those that are cut in one, have passes of their own."""
    for result in of_members(results, "counts of square"):
        launches = {key: value for key, value in result[name].items() if key != "all_reduce"}
        assert launches == {key: 2 * value for key, value in COSTS[name].items() if key != "all_reduce"}
        assert result[name].get("all_reduce", 0) == 2 * COSTS[name].get("all_reduce", 0)


def test_random_mask_over_a_mesh_is_the_same_on_all_ranks_and_has_its_size(results):
    masks = [result["random"] for result in results]
    for mask in masks[1:]:
        assert all(torch.equal(mask[name], masks[0][name]) for name in mask)
    matrices = [mask for mask in masks[0].values() if mask.dim() > 1]
    assert sum(int(mask.sum()) for mask in matrices) == int(0.3 * sum(mask.numel() for mask in matrices))
