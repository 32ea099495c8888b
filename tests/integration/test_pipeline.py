"""Pipeline parallelism: two stages, each with an optimizer of its own, take the steps of one process."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from fsam_triton import FSAM, SAM, ArgumentError, FisherMask, MomentumSAM, Schedule
from fsam_triton.optim.optimizer import FusedOptimizer
from tests.processes import eager_passes, run_example, spawn

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4


def around_adagrad(params, **arguments) -> SAM:
    return SAM(torch.optim.Adagrad(params, lr=0.01), rho=0.5, **arguments)


CASES: dict[str, tuple[Callable, dict]] = {
    "sam": (FSAM, {"lr": 0.01, "rho": 0.5}),
    "asam-clipped": (FSAM, {"lr": 0.01, "rho": 0.5, "adaptive": True, "max_grad_norm": 0.1}),
    "gsam": (FSAM, {"lr": 0.01, "rho": 0.5, "alpha": 0.3}),
    "looksam": (FSAM, {"lr": 0.01, "rho": 0.5, "schedule": Schedule(every=2, reuse=0.7)}),
    "around-adagrad": (around_adagrad, {}),
    "sgd-clipped": (FusedOptimizer, {"rule": "sgd", "lr": 0.1, "max_grad_norm": 0.1}),
}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2)]
    return nn.Sequential(*layers).double()


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs, targets = (torch.randn(12, n, generator=generator).double() for n in (6, 2))
    return inputs, targets


def train(optimizer: torch.optim.Optimizer, backward: Callable[[Tensor, Tensor], None]) -> None:
    for step in range(STEPS):

        def closure(step=step) -> None:
            optimizer.zero_grad()
            backward(*batch_of(step))

        optimizer.step(closure)


# -- the processes -----------------------------------------------------------------------------------------------------


def train_stage(rank: int, kind: Callable, arguments: dict) -> dict[str, Tensor]:
    model = make_model()
    part = model[:3] if rank == 0 else model[3:]
    stage = PipelineStage(part, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=3, loss_fn=nn.functional.mse_loss)

    def backward(inputs: Tensor, targets: Tensor) -> None:
        if rank == 0:
            schedule.step(inputs)
        else:
            schedule.step(target=targets)

    train(kind(part.parameters(), norm_group=dist.group.WORLD, **arguments), backward)
    return {name: p.detach() for name, p in part.named_parameters()}


def copied(rank: int) -> bool:
    """Whether a copy has the group, which itself cannot be copied."""
    optimizer = FSAM(make_model().parameters(), norm_group=dist.group.WORLD)
    return copy.deepcopy(optimizer).others.group is dist.group.WORLD


def refusals() -> dict[str, str]:
    params, arguments = list(make_model().named_parameters()), {"norm_group": dist.group.WORLD}
    actions = {
        "mask": lambda: FSAM(params, mask=FisherMask(0.1), **arguments),
        "norm_group": lambda: MomentumSAM(params, **arguments),
    }
    out = {}
    for name, action in actions.items():
        try:
            action()
        except ArgumentError as error:
            out[name] = str(error)
    return out


def run_all(rank: int, n: int, folder: Path) -> dict:
    out: dict = {name: train_stage(rank, *case) for name, case in CASES.items()}
    return {**out, "copied": copied(rank), "refusals": refusals()}


# -- and what comes of it ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    return spawn(run_all, 2, tmp_path_factory.mktemp("pipeline") / "processes")


@eager_passes()
def alone(kind: Callable, arguments: dict) -> dict[str, Tensor]:
    model = make_model()

    def backward(inputs: Tensor, targets: Tensor) -> None:
        # As the schedule: a mean of the means of the micro-batches.
        parts = zip(inputs.chunk(3), targets.chunk(3), strict=True)
        sum(nn.functional.mse_loss(model(x), y) / 3 for x, y in parts).backward()

    train(kind(model.parameters(), **arguments), backward)
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", CASES)
def test_stages_take_the_steps_of_one_process(results, name):
    """Sums are in another order: to 1e-12 in fp64."""
    expected = alone(*CASES[name])
    found = results[0][name] | results[1][name]
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-12, atol=1e-12)


def test_copy_of_an_optimizer_has_the_group(results):
    assert results[0]["copied"]


@pytest.mark.parametrize(("name", "why"), [("mask", "norm_group"), ("norm_group", "forward")])
def test_what_does_not_fit_is_refused(results, name, why):
    assert why in results[0]["refusals"][name]


def test_stages_without_the_group_take_other_steps():
    """The distance that the test of equality could miss."""
    kind, arguments = CASES["sam"]
    model, expected = make_model(), alone(kind, arguments)
    stages = [kind(part.parameters(), **arguments) for part in (model[:3], model[3:])]
    for step in range(STEPS):
        inputs, targets = batch_of(step)
        for half in (FSAM.perturb, FSAM.step):
            for stage in stages:
                stage.zero_grad()
            nn.functional.mse_loss(model(inputs), targets).backward()
            for stage in stages:
                half(stage)
    assert max(float((p - expected[name]).detach().abs().max()) for name, p in model.named_parameters()) > 1e-4


def test_example_of_the_page_runs_in_two_processes(tmp_path):
    printed = run_example("data_parallel.md", "pipeline.py", tmp_path)
    assert printed.startswith("loss 0.")
