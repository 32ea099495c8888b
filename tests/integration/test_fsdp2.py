"""Training with FSDP2 equals training in one process."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import Partial, distribute_tensor

from fsam_triton import FSAM, SAM, AdamWL2SP, ArgumentError, FisherMask, FishMask
from fsam_triton.buffers.sharded import local
from tests.integration.fsdp2 import (
    CASES,
    STEPS,
    Case,
    alone,
    assert_same_run,
    assign_gradients,
    batch_of,
    difference,
    loss_between,
    loss_of,
    make_model,
    make_optimizer,
    of_members,
    rank_and_size,
    result_of,
    shard,
    train,
    whole,
)
from tests.processes import eager_passes, run_example, spawn

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = Case(dtype=torch.float32)
WITH_THREE = ("adamw", "fisher", "gsam", "looksam", "momentum-sam")


# -- the processes -----------------------------------------------------------------------------------------------------


def run_all(rank: int, n: int, folder) -> dict:
    """Three processes, or two of them."""
    meshes = {"two": DeviceMesh("cpu", [0, 1]), "three": DeviceMesh("cpu", [0, 1, 2])}
    out: dict = {}
    for world, names in (("two", CASES), ("three", WITH_THREE)):
        if meshes[world].get_coordinate() is not None:
            for name in names:
                out[f"{world} {name}"] = run_case(CASES[name], meshes[world])
    if meshes["two"].get_coordinate() is not None:
        out["mixed precision"] = train_in_mixed_precision(meshes["two"])
        out["scaler"] = train_under_scaler(meshes["two"])
        out["averaged loss"] = averaged_loss(meshes["two"])
        out["clean"] = state_dict_between_passes(meshes["two"])
        out["by hand"] = {name: steps_by_hand(name, meshes["two"]) for name in BY_HAND}
    out["ties"] = masks_of_ties(meshes["three"])
    out["errors"] = {name: argument_refused(action, meshes["three"]) for name, action in REFUSED.items()}
    return out


def run_case(case: Case, mesh: DeviceMesh) -> dict:
    model = shard(case, make_model(case), mesh)
    optimizer = make_optimizer(case, model)
    return result_of(optimizer, train(case, model, optimizer, *rank_and_size(mesh)))


def train_in_mixed_precision(mesh: DeviceMesh) -> dict:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(PLAIN, make_model(PLAIN), mesh, mp_policy=policy)
    optimizer = make_optimizer(PLAIN, model)
    return result_of(optimizer, train(PLAIN, model, optimizer, *rank_and_size(mesh)))


def averaged_loss(mesh: DeviceMesh | None = None) -> Tensor:
    """Of the average of the weights, evaluated after the model has gathered the weights themselves."""
    case = CASES["adamw"]
    model = make_model(case) if mesh is None else shard(case, make_model(case), mesh)
    optimizer = make_optimizer(case, model)
    train(case, model, optimizer, *((0, 1) if mesh is None else rank_and_size(mesh)), stop=5)
    with torch.no_grad():
        loss_of(case, model, 1000, 0, 1)
        with optimizer.ema_weights():
            loss = loss_of(case, model, 1000, 0, 1)
        return torch.stack([loss, loss_of(case, model, 1000, 0, 1)])


def state_dict_between_passes(mesh: DeviceMesh) -> bool:
    """Whether it shows the weights of before the perturbation."""
    model = shard(PLAIN, make_model(PLAIN), mesh)
    optimizer = make_optimizer(PLAIN, model)
    loss_of(PLAIN, model, 0, *rank_and_size(mesh)).backward()
    before = {name: whole(p) for name, p in model.named_parameters()}
    optimizer.perturb()
    shown = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    moved = not any(torch.equal(whole(p), before[name]) for name, p in model.named_parameters())
    return moved and all(torch.equal(shown[name], value) for name, value in before.items())


BY_HAND = {
    "bf16": Case(AdamWL2SP, {"l2_sp": 0.1, "ema_decay": 0.9}, torch.bfloat16),
    "bf16-masters": Case(AdamWL2SP, {"master_weights": True, "amsgrad": True}, torch.bfloat16),
    "fp16-masters": Case(AdamWL2SP, {"master_weights": True}, torch.float16),
    "bf16-esam": Case(FSAM, {"beta": 0.6}, torch.bfloat16),
}


def steps_by_hand(name: str, mesh: DeviceMesh | None = None) -> dict:
    case = BY_HAND[name]
    model = make_model(case) if mesh is None else shard(case, make_model(case), mesh)
    optimizer = make_optimizer(case, model)
    for step in range(5):
        assign_gradients(model, step)
        if case.kind is FSAM:
            optimizer.perturb()
            assign_gradients(model, 100 + step)
        optimizer.step()
        optimizer.zero_grad()
    return result_of(optimizer, [])


def train_under_scaler(mesh: DeviceMesh | None = None) -> dict:
    """In the fourth step the gradient of one weight, on the last rank's shard, overflows."""
    model = make_model(PLAIN) if mesh is None else shard(PLAIN, make_model(PLAIN), mesh)
    optimizer, scaler = make_optimizer(PLAIN, model), torch.amp.GradScaler("cpu", init_scale=256.0)
    rank, n = (0, 1) if mesh is None else rank_and_size(mesh)
    for step in range(6):
        for ascend in (True, False):
            optimizer.zero_grad()
            scaler.scale(loss_of(PLAIN, model, step, rank, n)).backward()
            if step == 3 and not ascend and rank == n - 1:
                local(model[0].weight.grad)[-1, 0] = float("inf")
            if ascend:
                optimizer.perturb(scaler)
            else:
                scaler.step(optimizer)
                scaler.update()
    return {**result_of(optimizer, []), "scale": scaler.get_scale()}


def masks_of_ties(mesh: DeviceMesh | None = None) -> dict:
    """Masks of gradients of few values, which have many ties; and how much of each tensor is chosen."""
    out = {}
    for ratio in (0.1, 0.3, 0.5, 0.9):
        case = Case(arguments={"mask": FisherMask(ratio, exclude=())})
        model = make_model(case) if mesh is None else shard(case, make_model(case), mesh)
        optimizer = make_optimizer(case, model)
        assign_gradients(model, 0, torch.round)
        optimizer.perturb()
        out[str(ratio)] = result_of(optimizer, [])["masks"]
        out[f"density {ratio}"] = optimizer.mask_density()
    return out


def argument_refused(action: Callable[[DeviceMesh], object], mesh: DeviceMesh) -> str:
    try:
        action(mesh)
    except ArgumentError as error:
        return error.name
    return ""


def sharded_model(mesh: DeviceMesh) -> nn.Module:
    return shard(PLAIN, make_model(PLAIN), mesh)


def some_weights() -> FishMask:
    return FishMask.random(make_model(PLAIN), 0.5)


def step_with_replaced_parameters(optimizer_of: Callable[[nn.Module], torch.optim.Optimizer], mesh: DeviceMesh) -> None:
    """The parameters are no shards yet when the optimizer is made."""
    plain, model = make_model(PLAIN), sharded_model(mesh)
    optimizer = optimizer_of(plain)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    assign_gradients(model, 0)
    optimizer.perturb()


def partial(mesh: DeviceMesh) -> nn.Parameter:
    shares = distribute_tensor(torch.ones(4, 4), mesh, [Partial()], src_data_rank=None)
    return nn.Parameter(shares)


ROWS = FisherMask(0.5, unit="row")
# What is refused, and the argument that the error names.
REFUSED = {
    "trainable": lambda mesh: AdamWL2SP(sharded_model(mesh).named_parameters(), trainable=some_weights()),
    "trainable, later": lambda mesh: AdamWL2SP(sharded_model(mesh).named_parameters()).set_trainable(some_weights()),
    "mask.unit": lambda mesh: FSAM(sharded_model(mesh).named_parameters(), mask=ROWS),
    "mask.unit, later": lambda mesh: step_with_replaced_parameters(
        lambda model: FSAM(model.named_parameters(), mask=ROWS), mesh
    ),
    "mask.unit, around another optimizer": lambda mesh: step_with_replaced_parameters(
        lambda model: SAM(torch.optim.SGD(model.named_parameters(), lr=0.1), mask=ROWS), mesh
    ),
    "placements of parameter number 0": lambda mesh: AdamWL2SP([partial(mesh)]),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return spawn(run_all, 3, tmp_path_factory.mktemp("fsdp"))


# -- the tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [*(f"two {name}" for name in CASES), *(f"three {name}" for name in WITH_THREE)])
def test_sharded_training_equals_one_process(run, results):
    name = run.split()[-1]
    for result in of_members(results, run):
        assert_same_run(result, alone(name), CASES[name])
        torch.testing.assert_close(result["losses"], alone(name)["losses"])


@pytest.mark.parametrize("name", BY_HAND)
@eager_passes()
def test_sixteen_bit_shards_draw_the_random_numbers_of_one_process(name, results):
    expected = steps_by_hand(name)
    for result in of_members(results, "by hand"):
        assert result[name]["weights"].keys() == expected["weights"].keys()
        for key, value in expected["weights"].items():
            assert torch.equal(result[name]["weights"][key], value), key
        for key, state in expected["state"].items():
            for lane, value in state.items():
                assert torch.equal(result[name]["state"][key][lane], value), (key, lane)


@eager_passes()
def test_mask_over_all_shards_breaks_ties_as_one_process_does(results):
    expected = masks_of_ties()
    for result in of_members(results, "ties"):
        for ratio in ("0.1", "0.3", "0.5", "0.9"):
            total = sum(mask.numel() for mask in result[ratio].values())
            assert sum(int(mask.sum()) for mask in result[ratio].values()) == int(float(ratio) * total)
            for key, mask in expected[ratio].items():
                assert torch.equal(result[ratio][key], mask), key
        assert result["density 0.3"] == expected["density 0.3"]


@eager_passes()
def test_mixed_precision_equals_one_process_that_computes_in_bf16(results):
    model, start = make_model(PLAIN), make_model(PLAIN)
    narrow = make_model(PLAIN).to(torch.bfloat16)
    optimizer = make_optimizer(PLAIN, model)

    def assign(step: int) -> None:
        each = []
        for rank in range(2):
            narrow.zero_grad()
            for copy, p in zip(narrow.parameters(), model.parameters(), strict=True):
                copy.data.copy_(p)
            inputs, labels = (part.chunk(2)[rank] for part in batch_of(PLAIN, step))
            loss_between(narrow(inputs.bfloat16()), labels).backward()
            each.append([p.grad.float() for p in narrow.parameters()])
        for p, a, b in zip(model.parameters(), *each, strict=True):
            p.grad = a / 2 + b / 2

    for step in range(STEPS):
        assign(step)
        optimizer.perturb()
        assign(step)
        optimizer.step()
    # An fp32 weight that differs in its last bit can be rounded to another bf16 number, half an ulp away.
    for result in of_members(results, "mixed precision"):
        for (name, p), before in zip(model.named_parameters(), start.parameters(), strict=True):
            moved = torch.linalg.vector_norm(p - before)
            assert torch.linalg.vector_norm(result["weights"][name] - p) <= 2**-8 * moved, name


@eager_passes()
def test_step_that_overflows_on_one_shard_is_skipped_on_all(results):
    expected = train_under_scaler()
    for result in of_members(results, "scaler"):
        assert result["scale"] == expected["scale"] == 128
        assert {float(state["step"]) for state in result["state"].values()} == {5.0}
        assert difference(result["weights"], expected["weights"]) <= PLAIN.tolerance


@eager_passes()
def test_average_of_the_weights_is_evaluated_like_in_one_process(results):
    for result in of_members(results, "averaged loss"):
        torch.testing.assert_close(result, averaged_loss())


def test_state_dict_of_the_model_between_the_passes_is_clean(results):
    assert all(of_members(results, "clean"))


@pytest.mark.parametrize("what", REFUSED)
def test_what_shards_cannot_do_is_refused(what, results):
    for result in results:
        assert result["errors"][what] == what.split(",")[0]


def test_example_of_the_page_runs_with_torchrun(tmp_path):
    printed = run_example("data_parallel.md", "fsdp2.py", tmp_path)
    # The biases, which are always perturbed, and a tenth of the other weights.
    assert re.search(rf"{66 + int(0.1 * 640)} weights perturbed, accuracy (0\.9|1)", printed)
