"""PyTorch's own wrappers of optimizers, and data parallelism by hand, in two processes: as around torch.optim.AdamW."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

from fsam_triton import FSAM, AdamWL2SP
from tests.optim.by_hand import SAMByHand, halves, square_model, take_step
from tests.problem import Problem, assert_weights_close
from tests.processes import spawn

STEPS, LR = 6, 0.01


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# -- what each process does --------------------------------------------------------------------------------------------


def post_local_sgd(kind: Callable, rank: int) -> list[Tensor]:
    """Two steps with gradients of its own, then an average of the weights."""
    model = square_model()
    optimizer = PostLocalSGDOptimizer(
        optim=kind(model.parameters(), lr=LR), averager=PeriodicModelAverager(period=2, warmup_steps=1)
    )
    for step in range(STEPS):
        take_step(model, optimizer, step, problem=Problem(seed=rank))
    return weights_of(model)


def post_local_sgd_resumed(kind: Callable, rank: int) -> list[Tensor]:
    model = square_model()
    averager = PeriodicModelAverager(period=2, warmup_steps=1)
    optimizer = PostLocalSGDOptimizer(optim=kind(model.parameters(), lr=LR), averager=averager)
    for step in range(STEPS):
        if step == 3:
            saved = optimizer.state_dict()
            optimizer = PostLocalSGDOptimizer(optim=kind(model.parameters(), lr=LR), averager=averager)
            optimizer.load_state_dict(saved)
        take_step(model, optimizer, step, problem=Problem(seed=rank))
    return weights_of(model)


def zero(kind: Callable, rank: int, as_views: bool) -> list[Tensor]:
    """Each rank has the state of a part of the parameters."""
    model = square_model()
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=kind, parameters_as_bucket_view=as_views, lr=LR, weight_decay=0.1
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(STEPS):
        take_step(model, optimizer, step)
        scheduler.step()
    return weights_of(model)


def zero_resumed(kind: Callable, rank: int) -> list[Tensor]:
    model = square_model()

    def make() -> ZeroRedundancyOptimizer:
        return ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=kind, parameters_as_bucket_view=True, lr=LR, weight_decay=0.1
        )

    optimizer = make()
    for step in range(STEPS):
        if step == 3:
            optimizer.consolidate_state_dict(0)
            saved = [optimizer.state_dict() if rank == 0 else None]
            dist.broadcast_object_list(saved, 0)
            optimizer = make()
            optimizer.load_state_dict(saved[0])
        take_step(model, optimizer, step)
    return weights_of(model)


def reduced_by_hand(kind: Callable, rank: int, how: str) -> list[Tensor]:
    """Gradients are averaged by hand, which raises no version counters; one rank alone uses a part of the model."""
    model = square_model()
    optimizer = kind(model.parameters(), lr=LR)
    Problem().loss(model.parameters(), 0).backward()
    for step in range(STEPS):
        for half in halves(optimizer):
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
            own = [model[2 * rank], model[1]]
            Problem(seed=rank).loss([p for module in own for p in module.parameters()], step).backward()
            for p in model.parameters():
                if how == "data":
                    dist.all_reduce(p.grad.data)
                    p.grad.data /= 2
                elif how == "in place":
                    dist.all_reduce(p.grad)
                    p.grad /= 2
                else:
                    total = p.grad.clone()
                    dist.all_reduce(total)
                    p.grad = total / 2
            half()
    return weights_of(model)


def broadcast_by_hand(kind: Callable, rank: int) -> list[Tensor]:
    """Ranks begin with weights of their own, which the first one's replace after a step."""
    model = square_model()
    optimizer = kind(model.parameters(), lr=LR)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + rank)
    for step in range(STEPS):
        take_step(model, optimizer, step, problem=Problem(curvature=0.0))
        with torch.no_grad():
            for p in model.parameters() if step == 1 else ():
                dist.broadcast(p, 0)
    return weights_of(model)


PROGRAMS: dict[str, tuple[Callable, tuple, list[str]]] = {
    "post_local_sgd": (post_local_sgd, (), ["adamw"]),
    "post_local_sgd_resumed": (post_local_sgd_resumed, (), ["adamw"]),
    "zero": (zero, (False,), ["adamw", "adamw_flat"]),
    "zero_with_views_of_buckets": (zero, (True,), ["adamw", "adamw_flat"]),
    "zero_resumed": (zero_resumed, (), ["adamw"]),
    "reduced_in_place": (reduced_by_hand, ("in place",), ["adamw", "adamw_flat", "sam"]),
    "reduced_by_data": (reduced_by_hand, ("data",), ["adamw", "adamw_flat", "sam"]),
    "reduced_and_assigned": (reduced_by_hand, ("assigned",), ["adamw", "adamw_flat", "sam"]),
    "broadcast": (broadcast_by_hand, (), ["adamw", "adamw_flat", "sam"]),
}


class Flat(AdamWL2SP):
    """A class, because ZeroRedundancyOptimizer wants one."""

    def __init__(self, params, **options) -> None:
        super().__init__(params, flatten=True, **options)


KINDS = {"adamw": (torch.optim.AdamW, AdamWL2SP), "adamw_flat": (torch.optim.AdamW, Flat), "sam": (SAMByHand, FSAM)}
CASES = [(name, kind) for name, (_, _, kinds) in PROGRAMS.items() for kind in kinds]


def worker(rank: int, n: int, folder: Path) -> dict:
    return {
        f"{name} {kind}": [PROGRAMS[name][0](make, rank, *PROGRAMS[name][1]) for make in KINDS[kind]]
        for name, kind in CASES
    }


# -- and what comes of it ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    return spawn(worker, 2, tmp_path_factory.mktemp("wrappers") / "processes")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_weights_are_those_of_torchs_optimizer(results, name, kind, rank):
    theirs, ours = results[rank][f"{name} {kind}"]
    # Averages of gradients are at most 1.5 too, and of opposite ones the sum of their errors is what counts, over a
    # moment that can be as small as theirs: ten times what a gradient alone would have.
    assert_weights_close(ours, theirs, 10 * STEPS, LR)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_ranks_agree_where_they_do_under_torchs_optimizer(results, name, kind):
    (theirs, ours), (other_theirs, other_ours) = (result[f"{name} {kind}"] for result in results)
    if all(map(torch.equal, theirs, other_theirs)):
        assert all(map(torch.equal, ours, other_ours))
    pairs = zip(ours, square_model().parameters(), strict=True)
    moved = [float((p - start.detach()).abs().max()) for p, start in pairs]
    assert min(moved) > LR / 2
