"""Training in DistributedDataParallel equals one process that averages the two gradients, to the bit."""

import contextlib
import dataclasses
import re

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from fsam_triton import FSAM, AdamWL2SP, FisherMask, MomentumSAM, Schedule, select_samples
from tests.processes import eager_passes, run_example, spawn
from tests.training import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")

RANKS, STEPS = 2, 12
MASK = FisherMask(keep_ratio=0.3, interval=3, samples=2)


@dataclasses.dataclass(frozen=True)
class Case:
    """A training run: with which optimizer, with DDP arguments, in how many micro-batches a step."""

    kind: type = FSAM
    arguments: dict = dataclasses.field(default_factory=dict)
    ddp: dict = dataclasses.field(default_factory=dict)
    micro_batches: int = 1
    by_closure: bool = True
    # Each rank climbs by its own gradient, without communication.
    own_ascent: bool = False
    # The optimizer is made before the model is wrapped.
    wrapped_last: bool = False


CASES = {
    "adamw": Case(AdamWL2SP, {"l2_sp": 0.1, "max_grad_norm": 1.0}),
    "adamw-bucket-views": Case(AdamWL2SP, ddp={"gradient_as_bucket_view": True}, micro_batches=3),
    "sam": Case(),
    "sam-by-hand": Case(by_closure=False),
    "sam-accumulated": Case(micro_batches=3),
    "sam-accumulated-by-hand": Case(micro_batches=3, by_closure=False),
    "sam-bucket-views": Case(ddp={"gradient_as_bucket_view": True}, micro_batches=2),
    "sam-wrapped-last": Case(wrapped_last=True),
    "sam-flat": Case(arguments={"flatten": True}),
    "sam-static-graph": Case(ddp={"static_graph": True}),
    "fisher": Case(arguments={"mask": MASK}),
    "fisher-by-hand-accumulated": Case(arguments={"mask": MASK}, by_closure=False, micro_batches=2),
    "fisher-random": Case(arguments={"mask": FisherMask(keep_ratio=0.3, interval=3, scores="random")}),
    "gsam": Case(arguments={"alpha": 0.3}),
    "gsam-bucket-views": Case(arguments={"alpha": 0.3}, ddp={"gradient_as_bucket_view": True}),
    "looksam": Case(arguments={"schedule": Schedule(every=3, reuse=0.7)}),
    "esam": Case(arguments={"beta": 0.6}),
    "momentum-sam": Case(MomentumSAM, {"rho": 0.3}, micro_batches=2),
    "momentum-sam-wrapped-last": Case(MomentumSAM, {"rho": 0.3}, wrapped_last=True),
    "esam-per-tensor": Case(
        arguments={"beta": 0.5, "beta_per": "tensor"}, ddp={"find_unused_parameters": True}, micro_batches=2
    ),
    "tensor-mask": Case(
        arguments={"mask": FisherMask(keep_ratio=0.5, interval=3, unit="tensor"), "mask_norm": "masked"},
        ddp={"find_unused_parameters": True},
    ),
    "own-ascent": Case(own_ascent=True),
    "own-ascent-by-hand": Case(own_ascent=True, by_closure=False, micro_batches=2),
    "own-ascent-some-steps": Case(arguments={"schedule": Schedule(every=2)}, own_ascent=True),
    "own-ascent-fisher": Case(arguments={"mask": MASK}, own_ascent=True),
}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def make_optimizer(case: Case, model: nn.Module) -> AdamWL2SP:
    rho = {"rho": 0.5} if case.kind is FSAM else {}
    return case.kind(model.named_parameters(), **{"lr": 0.01, **rho, **case.arguments})


def batch_of(step: int, rank: int, part: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step * 100 + rank * 10 + part)
    return torch.randn(4, 6, generator=generator), torch.randint(3, (4,), generator=generator)


def sample_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels, reduction="none")


def loss_of(model: nn.Module, step: int, rank: int, part: int) -> Tensor:
    inputs, labels = batch_of(step, rank, part)
    return nn.functional.cross_entropy(model(inputs), labels)


# -- the simulation ----------------------------------------------------------------------------------------------------


def gradients_of(case: Case, model: nn.Module, step: int, rank: int) -> list[Tensor | None]:
    """One rank's gradients at its own weights."""
    model.zero_grad()
    for part in range(case.micro_batches):
        loss_of(model, step, rank, part).backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assign(model: nn.Module, gradients: list[Tensor | None]) -> None:
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = None if gradient is None else gradient.clone()


def mean(each: list[list[Tensor | None]]) -> list[Tensor | None]:
    """As DDP takes it: divided, then added."""
    return [None if a is None else a / 2 + b / 2 for a, b in zip(*each, strict=True)]


@eager_passes()
def simulate(case: Case) -> list[nn.Module]:
    """One model for each rank, which differ at most between the two passes of a step."""
    models = [make_model() for _ in range(RANKS)]
    optimizers = [make_optimizer(case, model) for model in models]
    for step in range(STEPS):
        if case.kind is FSAM and optimizers[0].is_sharp:
            with contextlib.ExitStack() as stack:
                for optimizer in optimizers:
                    stack.enter_context(optimizer.ascent_pass())
                each = [gradients_of(case, model, step, rank) for rank, model in enumerate(models)]
            for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                assign(model, each[rank] if case.own_ascent else mean(each))
                optimizer.perturb()
        each = [gradients_of(case, model, step, rank) for rank, model in enumerate(models)]
        for model, optimizer in zip(models, optimizers, strict=True):
            assign(model, mean(each))
            optimizer.step()
            optimizer.zero_grad()
    for optimizer in optimizers:
        optimizer.restore()
    return models


# -- the processes -----------------------------------------------------------------------------------------------------


def backward(case: Case, model: DistributedDataParallel, step: int, rank: int, synchronised: bool) -> Tensor:
    """Forward and backward passes of all micro-batches; gradients are exchanged in the last, if at all."""
    for part in range(case.micro_batches):
        last = part == case.micro_batches - 1
        with contextlib.nullcontext() if last and synchronised else model.no_sync():
            loss = loss_of(model, step, rank, part)
            loss.backward()
    return loss


def train_step(case: Case, model: DistributedDataParallel, optimizer: AdamWL2SP, step: int, rank: int) -> None:
    def ascends() -> bool:
        return case.kind is FSAM and optimizer.is_sharp and not optimizer.perturbed

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(case, model, step, rank, synchronised=not (case.own_ascent and ascends()))

    if case.by_closure:
        optimizer.step(closure)
        return
    optimizer.zero_grad()
    if ascends():
        with optimizer.ascent_pass():
            backward(case, model, step, rank, synchronised=not case.own_ascent)
        optimizer.perturb()
    backward(case, model, step, rank, synchronised=True)
    optimizer.step()


def train(case: Case, rank: int) -> nn.Module:
    model = make_model()
    if case.wrapped_last:
        optimizer = make_optimizer(case, model)
        wrapped = DistributedDataParallel(model, **case.ddp)
    else:
        wrapped = DistributedDataParallel(model, **case.ddp)
        optimizer = make_optimizer(case, model)
    for step in range(STEPS):
        train_step(case, wrapped, optimizer, step, rank)
    optimizer.restore()
    return model


def train_on_chosen_samples(model: nn.Module, rank: int) -> None:
    """ESAM's choice from the rank's own batch."""
    wrapped, optimizer = DistributedDataParallel(model), FSAM(model.named_parameters(), lr=0.01, rho=0.5, gamma=0.5)
    for step in range(STEPS):
        optimizer.step(lambda batch: sample_losses(wrapped, batch), batch_of(step, rank, 0))


def train_in_zero(model: nn.Module, rank: int) -> None:
    wrapped = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), AdamWL2SP, lr=0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(wrapped, step, rank, 0).backward()
        optimizer.step()


def train_per_tensor_without_ascent_pass(model: nn.Module, rank: int) -> None:
    wrapped, optimizer = DistributedDataParallel(model), make_optimizer(CASES["esam-per-tensor"], model)
    for step in range(STEPS):
        for ascend in (True, False):
            optimizer.zero_grad()
            backward(CASES["esam-per-tensor"], wrapped, step, rank, synchronised=True)
            (optimizer.perturb if ascend else optimizer.step)()


def error_without_find_unused_parameters(rank: int) -> str:
    model = make_model()
    wrapped, optimizer = DistributedDataParallel(model), make_optimizer(CASES["esam-per-tensor"], model)
    try:
        for step in range(STEPS):
            train_step(CASES["esam-per-tensor"], wrapped, optimizer, step, rank)
    except RuntimeError as error:
        return str(error)
    return ""


def run_cases(rank: int, n: int, folder) -> dict:
    out = {name: train(case, rank).state_dict() for name, case in CASES.items()}
    for run in (train_on_chosen_samples, train_in_zero, train_per_tensor_without_ascent_pass):
        model = make_model()
        run(model, rank)
        out[run.__name__] = model.state_dict()
    out["error"] = error_without_find_unused_parameters(rank)
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return spawn(run_cases, RANKS, tmp_path_factory.mktemp("ddp"))


def assert_trained(trained: list[dict], name: str, expected: nn.Module) -> None:
    for rank in range(RANKS):
        for key, value in expected.state_dict().items():
            assert torch.equal(trained[rank][name][key], value), (rank, key)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one_that_averages_their_gradients_to_the_bit(name, trained):
    simulated = simulate(CASES[name])
    assert_same_bits(*simulated)
    assert_trained(trained, name, simulated[0])


@eager_passes()
def test_each_rank_takes_the_second_gradient_from_samples_of_its_own_batch(trained):
    model = make_model()
    optimizer = FSAM(model.named_parameters(), lr=0.01, rho=0.5)
    for step in range(STEPS):
        batches = [batch_of(step, rank, 0) for rank in range(RANKS)]
        before, each = [], []
        for batch in batches:
            model.zero_grad()
            before.append(sample_losses(model, batch))
            before[-1].mean().backward()
            each.append([p.grad.clone() for p in model.parameters()])
        assign(model, mean(each))
        optimizer.perturb()
        each = []
        for batch, losses in zip(batches, before, strict=True):
            model.zero_grad()
            chosen = select_samples(batch, losses.detach(), sample_losses(model, batch).detach(), 0.5)
            sample_losses(model, chosen).mean().backward()
            each.append([p.grad.clone() for p in model.parameters()])
        assign(model, mean(each))
        optimizer.step()
    assert_trained(trained, "train_on_chosen_samples", model)


def test_ascent_pass_needs_find_unused_parameters(trained):
    for result in trained:
        assert "find_unused_parameters=True" in result["error"]


def test_per_tensor_draw_without_ascent_pass_needs_no_find_unused_parameters(trained):
    assert_trained(trained, "train_per_tensor_without_ascent_pass", simulate(CASES["esam-per-tensor"])[0])


def test_adamw_in_zero_redundancy_optimizer_equals_plain_ddp(trained):
    assert_trained(trained, "train_in_zero", simulate(Case(AdamWL2SP))[0])


def test_example_of_the_page_runs_with_torchrun(tmp_path):
    printed = run_example("data_parallel.md", "ddp.py", tmp_path)
    norms = re.findall(r"rank \d: norm of the weights (\S+), accuracy (?:0\.9|1)", printed)
    assert len(norms) == RANKS
    assert len(set(norms)) == 1
