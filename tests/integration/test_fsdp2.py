"""Training with FSDP2 equals training in one process, and its checkpoints fit any number of processes."""

import dataclasses
import functools
import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fsam_triton import FSAM, AdamWL2SP, FisherMask, FishMask, MomentumSAM, Schedule
from fsam_triton.buffers.sharded import local
from tests.processes import eager_passes, run_example, spawn

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, HALF = 20, 10
FULL = StateDictOptions(full_state_dict=True)
NOTHING = torch.empty(0)
MASK = FisherMask(keep_ratio=0.3, interval=3, samples=2)


@dataclasses.dataclass(frozen=True)
class Case:
    """A training run: with which optimizer, in which type, sharded how."""

    kind: type = FSAM
    arguments: dict = dataclasses.field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    # Arguments of fully_shard.
    fsdp: dict = dataclasses.field(default_factory=dict)
    # An evaluation without a backward pass after each of the optimizer's passes leaves gathered weights behind.
    evaluates: bool = False
    micro_batches: int = 1

    @property
    def tolerance(self) -> float:
        """Relative; gradients are summed in another order."""
        return 1e-12 if self.dtype == torch.float64 else 1e-6


CASES = {
    "adamw": Case(AdamWL2SP, {"l2_sp": 0.1, "max_grad_norm": 0.5, "amsgrad": True, "ema_decay": 0.9}),
    "adamw-fp32": Case(AdamWL2SP, {"l2_sp": 0.1, "max_grad_norm": 0.5}, torch.float32),
    "fisher": Case(arguments={"mask": MASK}),
    "fisher-asam-fp32": Case(arguments={"mask": MASK, "mask_norm": "masked", "adaptive": True}, dtype=torch.float32),
    "fisher-random": Case(arguments={"mask": FisherMask(keep_ratio=0.3, interval=3, scores="random")}),
    "gsam": Case(arguments={"alpha": 0.3, "max_grad_norm": 0.5}),
    "looksam": Case(arguments={"schedule": Schedule(every=3, reuse=0.7)}),
    "esam": Case(arguments={"beta": 0.6}),
    "esam-per-tensor": Case(arguments={"beta": 0.6, "beta_per": "tensor"}),
    "momentum-sam": Case(MomentumSAM, {"rho": 0.3, "max_grad_norm": 0.5}),
    "momentum-sam-fp32": Case(MomentumSAM, {"rho": 0.3}, torch.float32),
    "gsam-accumulated": Case(arguments={"alpha": 0.3}, micro_batches=2),
    "gathered-sam": Case(fsdp={"reshard_after_forward": False}, evaluates=True),
    "gathered-momentum-sam": Case(MomentumSAM, {"rho": 0.3}, fsdp={"reshard_after_forward": False}, evaluates=True),
}


SAM = Case(dtype=torch.float32)
WITH_THREE = ("adamw", "fisher", "gsam", "looksam", "momentum-sam")
REPLICATED = ("fisher", "esam")
# In the middle of what a mask is chosen by, of LookSAM's interval, and while weights are perturbed.
SAVED = ("adamw", "fisher", "looksam", "momentum-sam")


def make_model(case: Case, seed: int = 0) -> nn.Module:
    """Two processes get shards of 4 and 3 rows, three also empty ones."""
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 2)]
    return nn.Sequential(*layers).to(case.dtype)


def shard(model: nn.Module, mesh: DeviceMesh, **arguments) -> nn.Module:
    fully_shard(model[2], mesh=mesh, **arguments)
    return fully_shard(model, mesh=mesh, **arguments)


def make_optimizer(case: Case, model: nn.Module) -> AdamWL2SP:
    rho = {"rho": 0.5} if case.kind is FSAM else {}
    # One process too has a buffer for each tensor, so that it draws the same random numbers.
    return case.kind(model.named_parameters(), **{"lr": 0.01, "flatten": False, **rho, **case.arguments})


def batch_of(case: Case, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(12, 6, generator=generator).to(case.dtype), torch.randint(2, (12,), generator=generator)


def loss_of(case: Case, model: nn.Module, step: int, rank: int, n: int) -> Tensor:
    """The mean over this rank's part of the batch."""
    inputs, labels = (part.chunk(n)[rank] for part in batch_of(case, step))
    return nn.functional.cross_entropy(model(inputs), labels)


def backward(case: Case, model: nn.Module, step: int, rank: int, n: int) -> None:
    """Forward and backward passes of all micro-batches; gradients are exchanged in the last."""
    for part in range(case.micro_batches):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(part == case.micro_batches - 1)
        loss_of(case, model, step + 100 * part, rank, n).backward()


def train(
    case: Case, model: nn.Module, optimizer: AdamWL2SP, rank: int = 0, n: int = 1, start: int = 0, stop: int = STEPS
) -> list[Tensor]:
    """The losses that evaluations have found, at perturbed and at clean weights in turn."""
    losses = []

    def evaluate() -> None:
        if case.evaluates:
            with torch.no_grad():
                loss = loss_of(case, model, 1000, 0, 1)
            losses.append(loss)

    for step in range(start, stop):
        optimizer.zero_grad()
        if case.kind is FSAM and optimizer.is_sharp:
            with optimizer.ascent_pass():
                backward(case, model, step, rank, n)
            evaluate()
            optimizer.perturb()
            evaluate()
        backward(case, model, step, rank, n)
        optimizer.step()
        evaluate()
        if case.kind is MomentumSAM and case.evaluates:
            optimizer.eval()
            evaluate()
            optimizer.train()
    return losses


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def result_of(optimizer: AdamWL2SP, losses: list[Tensor]) -> dict:
    optimizer.restore()
    # The optimizer's, because after an evaluation the model has gathered ones.
    group = optimizer.param_groups[0]
    named = dict(zip(group["param_names"], group["params"], strict=True))
    optimizer.state_dict()
    state = {
        name: {key: whole(value) for key, value in optimizer.state[p].items() if key != "mask"}
        for name, p in named.items()
    }
    masks = {name: whole(optimizer.mask_of(p)) for name, p in named.items()} if isinstance(optimizer, FSAM) else {}
    return {"weights": {name: whole(p) for name, p in named.items()}, "state": state, "masks": masks, "losses": losses}


# -- the processes -----------------------------------------------------------------------------------------------------


def run_all(rank: int, n: int, folder) -> dict:
    """Four processes; smaller worlds are some of them."""
    meshes = {
        "two": DeviceMesh("cpu", [0, 1]),
        "three": DeviceMesh("cpu", [0, 1, 2]),
        "replicated": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")),
    }
    out: dict = {}
    for world, mesh in meshes.items():
        if mesh.get_coordinate() is not None:
            for name in CASES if world == "two" else WITH_THREE if world == "three" else REPLICATED:
                out[f"{world} {name}"] = run_case(CASES[name], mesh, folder / f"{world}-{name}")
    for before, after in (("two", "three"), ("three", "two")):
        # What a rank saved, others read.
        dist.barrier()
        if meshes[after].get_coordinate() is not None:
            for name in SAVED:
                run = go_on(CASES[name], meshes[after], folder / f"{before}-{name}")
                out[f"{before} to {after} {name}"] = run
    if meshes["two"].get_coordinate() is not None:
        out["mixed precision"] = train_in_mixed_precision(meshes["two"])
        out["scaler"] = train_under_scaler(meshes["two"])
        out["full"] = {name: save_full(CASES[name], meshes["two"]) for name in SAVED}
        out["from plain"] = load_plain(meshes["two"])
        out["by hand"] = {name: steps_by_hand(name, meshes["two"]) for name in BY_HAND}
    if meshes["three"].get_coordinate() is not None:
        out["ties"] = masks_of_ties(meshes["three"])
    out["errors"] = {name: error_of(action, meshes) for name, action in REFUSED.items()}
    return out


def rank_and_size(mesh: DeviceMesh) -> tuple[int, int]:
    return mesh.mesh.flatten().tolist().index(dist.get_rank()), mesh.size()


def run_case(case: Case, mesh: DeviceMesh, path) -> dict:
    model = shard(make_model(case), mesh, **case.fsdp)
    optimizer = make_optimizer(case, model)
    rank, n = rank_and_size(mesh)
    losses = train(case, model, optimizer, rank, n, stop=HALF)
    if case in map(CASES.get, SAVED) and mesh.ndim == 1:
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path, process_group=mesh.get_group())
    losses += train(case, model, optimizer, rank, n, start=HALF)
    return result_of(optimizer, losses)


def load(model: nn.Module, optimizer: AdamWL2SP, weights: dict, state: dict, options=None) -> None:
    # Not set_state_dict, which loads the optimizer first.
    set_model_state_dict(model, weights, options=options)
    set_optimizer_state_dict(model, optimizer, state, options=options)


def go_on(case: Case, mesh: DeviceMesh, path) -> dict:
    """From a checkpoint of another number of processes."""
    model = shard(make_model(case, seed=1), mesh, **case.fsdp)
    optimizer = make_optimizer(case, model)
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state}
    dcp.load(saved, checkpoint_id=path, process_group=mesh.get_group())
    load(model, optimizer, saved["model"], saved["optimizer"])
    return result_of(optimizer, train(case, model, optimizer, *rank_and_size(mesh), start=HALF))


def save_full(case: Case, mesh: DeviceMesh) -> tuple[dict, dict]:
    model = shard(make_model(case), mesh)
    optimizer = make_optimizer(case, model)
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
        model = shard(make_model(case, seed=1), mesh)
        sharded = make_optimizer(case, model)
        if name == "adamw":
            load(model, sharded, plain.state_dict(), get_optimizer_state_dict(plain, optimizer), FULL)
        else:
            set_model_state_dict(model, plain.state_dict(), options=FULL)
            sharded.load_state_dict(optimizer.state_dict())
        out[name] = result_of(sharded, train(case, model, sharded, *rank_and_size(mesh), start=HALF))
    return out


def train_in_mixed_precision(mesh: DeviceMesh) -> dict:
    case = SAM
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(make_model(case), mesh, mp_policy=policy)
    optimizer = make_optimizer(case, model)
    return result_of(optimizer, train(case, model, optimizer, *rank_and_size(mesh)))


def assign_gradients(model: nn.Module, step: int, values: Callable[[Tensor], Tensor] = torch.clone) -> None:
    """The same gradients, however the parameters are sharded."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        gradient = values(torch.randn(p.shape, generator=generator)).to(p.dtype)
        p.grad = gradient
        if isinstance(p, DTensor):
            p.grad = distribute_tensor(gradient, p.device_mesh, p.placements, src_data_rank=None)


BY_HAND = {
    "bf16": Case(AdamWL2SP, {"l2_sp": 0.1, "ema_decay": 0.9}, torch.bfloat16),
    "bf16-masters": Case(AdamWL2SP, {"master_weights": True, "amsgrad": True}, torch.bfloat16),
    "bf16-esam": Case(FSAM, {"beta": 0.6, "rho": 0.5}, torch.bfloat16),
}


def steps_by_hand(name: str, mesh: DeviceMesh | None = None) -> dict:
    case = BY_HAND[name]
    model = make_model(case) if mesh is None else shard(make_model(case), mesh)
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
    model = make_model(SAM) if mesh is None else shard(make_model(SAM), mesh)
    optimizer, scaler = make_optimizer(SAM, model), torch.amp.GradScaler("cpu", init_scale=256.0)
    rank, n = (0, 1) if mesh is None else rank_and_size(mesh)
    for step in range(6):
        for ascend in (True, False):
            optimizer.zero_grad()
            scaler.scale(loss_of(SAM, model, step, rank, n)).backward()
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
        model = make_model(case) if mesh is None else shard(make_model(case), mesh)
        optimizer = make_optimizer(case, model)
        assign_gradients(model, 0, torch.round)
        optimizer.perturb()
        out[str(ratio)] = result_of(optimizer, [])["masks"]
        out[f"density {ratio}"] = optimizer.mask_density()
    return out


def error_of(action: Callable[[dict[str, DeviceMesh]], object], meshes: dict[str, DeviceMesh]) -> str:
    try:
        action(meshes)
    except ValueError as error:
        return str(error)
    return ""


def sharded_model(meshes: dict[str, DeviceMesh]) -> nn.Module:
    return shard(make_model(SAM), meshes["replicated"])


def some_weights() -> FishMask:
    return FishMask.random(make_model(SAM), 0.5)


def doubly_sharded(meshes: dict[str, DeviceMesh]) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(torch.zeros(4, 4), meshes["replicated"], [Shard(0), Shard(1)]))


REFUSED = {
    "must be None: parameter '0.weight' is sharded": lambda meshes: AdamWL2SP(
        sharded_model(meshes).named_parameters(), trainable=some_weights()
    ),
    "Invalid trainable: 'a FishMask'; must be None": lambda meshes: AdamWL2SP(
        sharded_model(meshes).named_parameters()
    ).set_trainable(some_weights()),
    "Invalid mask.unit: 'row'; must be 'element' with sharded parameters": lambda meshes: FSAM(
        sharded_model(meshes).named_parameters(), mask=FisherMask(0.5, unit="row")
    ),
    "Invalid placements of parameter number 0": lambda meshes: AdamWL2SP([doubly_sharded(meshes)]),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return spawn(run_all, 4, tmp_path_factory.mktemp("fsdp"))


# -- the tests ---------------------------------------------------------------------------------------------------------


@functools.cache
@eager_passes()
def alone(name: str) -> dict:
    case = CASES[name]
    model = make_model(case)
    optimizer = make_optimizer(case, model)
    return result_of(optimizer, train(case, model, optimizer))


def difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest over tensors, relative to the tensor."""
    assert actual.keys() == expected.keys()
    norm = torch.linalg.vector_norm
    return max(
        float(norm((actual[key] - e).double()) / norm(e.double()).clamp(min=1e-30)) for key, e in expected.items()
    )


def assert_same_run(actual: dict, expected: dict, case: Case) -> None:
    assert difference(actual["weights"], expected["weights"]) <= case.tolerance
    for name, state in expected["state"].items():
        # A shard shows what a mask is chosen by also when there is nothing yet.
        state = {"fisher": torch.zeros_like(state["exp_avg"]), **state} if "fisher" in actual["state"][name] else state
        # Moments are sums of gradients that cancel, in fp32 to fewer digits than weights have.
        if case.dtype == torch.float64:
            assert difference(actual["state"][name], state) <= case.tolerance, name
        assert torch.equal(actual["masks"].get(name, NOTHING), expected["masks"].get(name, NOTHING)), name


def of_members(results: list[dict], key: str) -> list:
    return [result[key] for result in results if key in result]


def runs() -> list[str]:
    worlds = {"two": CASES, "three": WITH_THREE, "replicated": REPLICATED}
    return [f"{world} {name}" for world, names in worlds.items() for name in names]


@pytest.mark.parametrize("run", runs())
def test_sharded_training_equals_one_process(run, results):
    name = run.split()[-1]
    for result in of_members(results, run):
        assert_same_run(result, alone(name), CASES[name])
        torch.testing.assert_close(result["losses"], alone(name)["losses"])


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
    load(model, optimizer, weights, state)
    assert_same_run(result_of(optimizer, train(case, model, optimizer, start=HALF)), alone(name), case)


@pytest.mark.parametrize("name", ["adamw", "fisher"])
def test_checkpoint_of_one_process_is_loaded_by_several(name, results):
    for result in of_members(results, "from plain"):
        assert_same_run(result[name], alone(name), CASES[name])


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
            masks = result["ties"][ratio] if "ties" in result else result[ratio]
            total = sum(mask.numel() for mask in masks.values())
            assert sum(int(mask.sum()) for mask in masks.values()) == int(float(ratio) * total)
            for key, mask in expected[ratio].items():
                assert torch.equal(masks[key], mask), key
        assert result["density 0.3"] == expected["density 0.3"]


@eager_passes()
def test_mixed_precision_equals_one_process_that_computes_in_bf16(results):
    case = SAM
    model, start = make_model(case), make_model(case)
    narrow = make_model(case).to(torch.bfloat16)
    optimizer = make_optimizer(case, model)

    def assign(step: int) -> None:
        each = []
        for rank in range(2):
            narrow.zero_grad()
            for copy, p in zip(narrow.parameters(), model.parameters(), strict=True):
                copy.data.copy_(p)
            inputs, labels = (part.chunk(2)[rank] for part in batch_of(case, step))
            nn.functional.cross_entropy(narrow(inputs.bfloat16()), labels).backward()
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
        assert difference(result["weights"], expected["weights"]) <= SAM.tolerance


@pytest.mark.parametrize("message", REFUSED)
def test_what_shards_cannot_do_is_refused(message, results):
    for result in results:
        assert message.replace("'element'", '"element"') in result["errors"][message].replace("'element'", '"element"')


def test_example_of_the_page_runs_with_torchrun(tmp_path):
    printed = run_example("data_parallel.md", "fsdp2.py", tmp_path)
    # The biases, which are always perturbed, and a tenth of the other weights.
    assert re.search(rf"{66 + int(0.1 * 640)} weights perturbed, accuracy (0\.9|1)", printed)
