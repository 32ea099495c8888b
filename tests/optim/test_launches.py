"""What a step launches on a GPU, and that it never waits: no number is read, nothing is sent from pageable memory.

On a GPU that is not there (see `fake_gpu`): what a CUDA graph of a whole step could not hold is found without one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from fsam_triton import FSAM, SAM, AdamWL2SP, FisherMask, FishMask, MomentumSAM, Schedule
from tests.optim.fake_gpu import DEVICE, READS, FakeGPU, Trace

SHAPES = [(100, 32), (100,), (8, 100), (8,), (3, 5, 7)]


def around(base: Callable) -> Callable:
    return lambda groups, **kwargs: SAM(base(groups), **kwargs)


def capturable(groups) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, capturable=True, foreach=True)


@dataclass(frozen=True)
class Case:
    """An optimizer, and how many launches its ascent and its descent have at most."""

    name: str
    make: Callable
    ascent: int
    descent: int
    kwargs: dict = field(default_factory=dict)


NORM, CLIP = 2, 2  # Partial sums and their sum.
ASCENT = NORM + 2  # Coefficients and the pass itself.
DESCENT = 2
CASES = [
    Case("adamw", AdamWL2SP, 0, DESCENT),
    Case("l2-sp, amsgrad, average", AdamWL2SP, 0, DESCENT, {"l2_sp": 0.1, "amsgrad": True, "ema_decay": 0.9}),
    Case("clipped", AdamWL2SP, 0, CLIP + DESCENT, {"max_grad_norm": 1.0}),
    Case("balanced by gradients", AdamWL2SP, 0, NORM + DESCENT, {"balance": 0.5}),
    # The norm of all gradients is the sum of those by which adapters are balanced.
    Case("balanced, clipped", AdamWL2SP, 0, NORM + 1 + DESCENT, {"balance": 0.5, "max_grad_norm": 1.0}),
    Case("balanced by weights", AdamWL2SP, 0, NORM + DESCENT, {"balance": 0.5, "balance_by": "weights"}),
    Case("sam", FSAM, ASCENT, DESCENT),
    Case("sam, clipped", FSAM, ASCENT, CLIP + DESCENT, {"max_grad_norm": 1.0}),
    Case("asam", FSAM, ASCENT, DESCENT, {"adaptive": True}),
    Case("fisher-sam", FSAM, ASCENT, DESCENT, {"mask": FisherMask(0.3, interval=100)}),
    Case(
        "fisher-sam, masked norm", FSAM, ASCENT, DESCENT, {"mask": FisherMask(0.3, interval=100), "mask_norm": "masked"}
    ),
    Case("esam", FSAM, ASCENT, DESCENT, {"beta": 0.5}),
    # Tables of the tensors that are drawn.
    Case("esam of tensors", FSAM, ASCENT + 1, 1 + DESCENT, {"beta": 0.5, "beta_per": "tensor"}),
    # Rows of their coefficients for the parameters, in the compute type.
    Case("friendly-sam", FSAM, 2 + ASCENT, DESCENT, {"sigma": 1.0}),
    Case("preconditioned sam", FSAM, 2 + ASCENT, DESCENT, {"preconditioned": True}),
    Case("gsam", FSAM, ASCENT, 2 + DESCENT, {"alpha": 0.4}),
    Case("gsam, clipped", FSAM, ASCENT, 2 + DESCENT, {"alpha": 0.4, "max_grad_norm": 1.0}),
    # Its component is zeroed, and the two directions by turns have tables of their own.
    Case("looksam", FSAM, ASCENT, 2 + DESCENT + 2, {"schedule": Schedule(every=2, reuse=0.7)}),
    Case("warm-up", FSAM, ASCENT, DESCENT, {"schedule": Schedule(rho_warmup=1)}),
    Case("sgd", FSAM, ASCENT, DESCENT, {"rule": "sgd", "momentum": 0.9}),
    Case("sgd without momentum", FSAM, ASCENT, DESCENT, {"rule": "sgd"}),
    Case("lion", FSAM, ASCENT, DESCENT, {"rule": "lion"}),
    Case("momentum-sam", MomentumSAM, ASCENT, DESCENT),
    Case("momentum-sam, clipped", MomentumSAM, ASCENT, CLIP + DESCENT, {"max_grad_norm": 1.0}),
    Case("momentum-sam over lion", MomentumSAM, ASCENT, DESCENT, {"rule": "lion"}),
    # Restoring, the count of steps, and what the base launches: as many as without SAM.
    Case("around torch's adamw", around(capturable), ASCENT, 2, {}),
    Case("around torch's adamw, friendly", around(capturable), 2 + ASCENT, 2, {"sigma": 1.0}),
    Case("around torch's adamw, masked", around(capturable), ASCENT, 2, {"mask": FisherMask(0.3, interval=100)}),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
PRECISIONS = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "bf16, nearest": (torch.bfloat16, {"stochastic_rounding": False}),
    "bf16, masters": (torch.bfloat16, {"master_weights": True}),
    "fp16, masters": (torch.float16, {"master_weights": True}),
    "fp64": (torch.float64, {}),
}


class Training:
    """Parameters on a fake GPU in two groups, gradients that lie where they lay before, and an optimizer."""

    def __init__(self, make: Callable, dtype: torch.dtype, *, shapes=SHAPES, groups=2, lr=1e-3, **kwargs) -> None:
        names = [f"w{i // 2}.lora_{'AB'[i % 2]}" if "balance" in kwargs else f"w{i}" for i in range(len(shapes))]
        weights = [nn.Parameter(torch.empty(shape, dtype=dtype, device=DEVICE)) for shape in shapes]
        self.named = list(zip(names, weights, strict=True))
        parts = [{"params": self.named[i::groups], "lr": lr, "weight_decay": 0.1 * i} for i in range(groups)]
        self.optimizer = make(parts, **kwargs)
        self.gradients = [[torch.empty_like(p) for _, p in self.named] for _ in range(2)]

    def give(self, which: int) -> None:
        for (_, p), gradient in zip(self.named, self.gradients[which], strict=True):
            p.grad = gradient

    def ascend(self) -> None:
        if isinstance(self.optimizer, AdamWL2SP) or not getattr(self.optimizer, "is_sharp", True):
            return
        self.give(0)
        self.optimizer.perturb()

    def descend(self) -> None:
        self.give(1)
        self.optimizer.step()


def steady(gpu: FakeGPU, training: Training, warmup: int = 3, steps: int = 2) -> tuple[list[Trace], list[Trace]]:
    """Traces of the ascents and the descents of steps after the first ones, which make lanes and send tables."""
    for _ in range(warmup):
        training.ascend()
        training.descend()
    ascents, descents = [], []
    for _ in range(steps):
        with gpu.tracing() as ascent:
            training.ascend()
        with gpu.tracing() as descent:
            training.descend()
        ascents.append(ascent)
        descents.append(descent)
    return ascents, descents


def most(traces: list[Trace]) -> int:
    return max(len(trace.launches) for trace in traces)


def faults(*traces: list[Trace]) -> list[str]:
    return [fault for some in traces for trace in some for fault in trace.faults]


# SAM around another optimizer has no master weights.
PAIRS = [
    pytest.param(case, dtype, kwargs, id=f"{case.name}-{name}")
    for case in CASES
    for name, (dtype, kwargs) in PRECISIONS.items()
    if not ("around" in case.name and "master_weights" in kwargs)
]


@pytest.mark.parametrize(("case", "dtype", "kwargs"), PAIRS)
def test_step_never_waits_and_has_few_launches(case, dtype, kwargs):
    with FakeGPU() as gpu:
        training = Training(case.make, dtype, **case.kwargs, **kwargs)
        ascents, descents = steady(gpu, training)
        assert not faults(ascents, descents)
        assert most(ascents) <= case.ascent
        alone = 0
        if "around" in case.name:
            with gpu.tracing() as trace:
                training.give(1)
                training.optimizer.base.step()
            alone = len(trace.launches)
        assert most(descents) <= case.descent + alone
        assert "around" in case.name or case.ascent + case.descent <= 10


@every_case
def test_learning_rates_that_are_tensors_on_the_device_never_make_it_wait(case):
    with FakeGPU() as gpu:
        training = Training(case.make, torch.bfloat16, lr=torch.empty((), device=DEVICE), **case.kwargs)
        assert not faults(*steady(gpu, training))


def test_rho_that_follows_such_a_learning_rate_never_makes_it_wait():
    kwargs = {"schedule": Schedule(rho_follows="lr", rho_min=0.01)}
    with FakeGPU() as gpu:
        training = Training(FSAM, torch.float32, lr=torch.empty((), device=DEVICE), **kwargs)
        assert not faults(*steady(gpu, training))


@pytest.mark.parametrize(
    "mask",
    [
        FisherMask(0.3),
        FisherMask(0.3, interval=2, samples=2),
        FisherMask(0.3, scores="random"),
        FisherMask(0.8, unit="tensor"),
        FisherMask(0.5, unit="row"),
        FisherMask(0.5, unit=32, scores="random"),
    ],
    ids=["weights", "two samples", "random", "tensors", "rows", "random neighbours"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choice_of_a_mask_never_waits(mask, dtype):
    with FakeGPU() as gpu:
        assert not faults(*steady(gpu, Training(FSAM, dtype, mask=mask), steps=4))


@pytest.mark.parametrize("kwargs", [{}, {"alpha": 0.4}, {"beta": 0.5, "max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize("kind", [FSAM, MomentumSAM])
def test_step_of_selected_weights_never_waits(kind, kwargs):
    if kind is MomentumSAM:
        kwargs = {name: value for name, value in kwargs.items() if name == "max_grad_norm"}
    chosen = {f"w{i}": torch.arange(0, torch.Size(shape).numel(), 3) for i, shape in enumerate(SHAPES)}
    shapes = {f"w{i}": torch.Size(shape) for i, shape in enumerate(SHAPES)}
    mask = FishMask(chosen, shapes)
    with FakeGPU() as gpu:
        training = Training(kind, torch.bfloat16, trainable=mask, **kwargs)
        assert not faults(*steady(gpu, training))


def test_gradients_that_are_missing_in_some_passes_never_make_it_wait():
    class Sparse(Training):
        count = 0

        def give(self, which: int) -> None:
            super().give(which)
            self.count += 1
            self.named[self.count % 3][1].grad = None

    with FakeGPU() as gpu:
        for kwargs in ({}, {"alpha": 0.4}):
            assert not faults(*steady(gpu, Sparse(FSAM, torch.bfloat16, **kwargs), steps=6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_case
def test_step_can_be_captured_after_a_few_others(case, dtype):
    """Its gradients are elsewhere, in the graph's own memory."""
    with FakeGPU() as gpu:
        training = Training(case.make, dtype, lr=torch.empty((), device=DEVICE), **case.kwargs)
        steady(gpu, training)
        parts = [p.numel() for _, p in training.named]
        for i in range(2):
            buffer = torch.empty(sum(parts), dtype=dtype, device=DEVICE).split(parts)
            training.gradients[i] = [part.view_as(p) for part, (_, p) in zip(buffer, training.named, strict=True)]
        gpu.capturing = True
        ascents, descents = steady(gpu, training, warmup=0)
        assert not faults(ascents, descents)
        assert any("upload" in trace.launches for trace in (*ascents, *descents))


# -- how many ----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "two tensors": {"shapes": [(64, 8), (16,)]},
    "two hundred tensors": {"shapes": [(9, 3 + i % 5) for i in range(200)]},
    "one group": {"groups": 1},
    "six groups": {"shapes": [(9, 3 + i % 5) for i in range(12)], "groups": 6},
}


FEW = ("adamw", "balanced by gradients", "sam", "gsam, clipped", "momentum-sam")


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.name in FEW], ids=lambda case: case.name)
def test_launches_are_the_same_however_many_tensors_and_groups(case):
    found = set()
    for layout in LAYOUTS.values():
        with FakeGPU() as gpu:
            ascents, descents = steady(gpu, Training(case.make, torch.bfloat16, **{**case.kwargs, **layout}))
        found |= {(tuple(a.launches), tuple(d.launches)) for a, d in zip(ascents, descents, strict=True)}
    assert len(found) == 1


def test_gradients_in_new_places_cost_one_copy_of_a_table_for_each_half_of_a_step():
    with FakeGPU() as gpu:
        training = Training(FSAM, torch.float32)
        steady(gpu, training)
        before = training.gradients
        buffer = torch.empty(sum(p.numel() for _, p in training.named), device=DEVICE)
        parts = buffer.split([p.numel() for _, p in training.named])
        training.gradients = [[part.view_as(p) for part, (_, p) in zip(parts, training.named, strict=True)]] * 2
        ascents, descents = steady(gpu, training, warmup=0, steps=1)
        assert [trace.launches.count("upload") for trace in (*ascents, *descents)] == [1, 1]
        assert not faults(ascents, descents)
        ascents, descents = steady(gpu, training, warmup=0, steps=1)
        assert [trace.launches.count("upload") for trace in (*ascents, *descents)] == [0, 0]
        assert before is not training.gradients


def test_changed_hyper_parameters_cost_one_copy():
    with FakeGPU() as gpu:
        training = Training(AdamWL2SP, torch.float32)
        steady(gpu, training)
        training.optimizer.param_groups[0]["lr"] = 0.5
        _, (descent,) = steady(gpu, training, warmup=0, steps=1)
        assert descent.launches.count("upload") == 1
        assert not descent.faults


# -- GradScaler --------------------------------------------------------------------------------------------------------


# For SAM the host reads whether there was an overflow, unless the base takes scales, as torch's fused optimizers do.
OURS = [case for case in CASES if "around" not in case.name]


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.name)
def test_step_under_a_grad_scaler_never_waits(case, monkeypatch):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with FakeGPU() as gpu:
        scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
        scaler.scale(torch.empty((), device=DEVICE))
        training = Training(case.make, torch.float16, **case.kwargs)
        # The host looks for an overflow where a mask is due, which is not in every step.
        steady(gpu, training)
        for _ in range(3):
            with gpu.tracing() as trace:
                if getattr(training.optimizer, "is_sharp", False):
                    training.give(0)
                    training.optimizer.perturb(scaler)
                training.give(1)
                scaler.step(training.optimizer)
                scaler.update()
            assert not trace.faults


# -- the fake GPU itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: bool(x[0]),
        lambda x: torch.ops.aten.nonzero(x),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
    ],
)
def test_what_reads_from_the_device_is_found(wait):
    with FakeGPU() as gpu:
        x = torch.empty(3, device=DEVICE)
        with gpu.tracing() as trace, pytest.raises(READS):
            wait(x)
    assert trace.faults


@pytest.mark.parametrize(
    "send",
    [
        lambda x: torch.tensor([1.0, 2.0, 3.0]).to(DEVICE),
        lambda x: torch.tensor([1.0, 2.0, 3.0], device=DEVICE),
        lambda x: torch.tensor([1.0, 2.0, 3.0]).pin_memory().to(DEVICE),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x.cpu(),
        lambda x: x + torch.ones(()),
    ],
)
def test_what_is_copied_from_pageable_memory_or_in_haste_is_found(send):
    with FakeGPU() as gpu:
        x = torch.empty(3, device=DEVICE)
        with gpu.tracing() as trace:
            send(x)
    assert trace.faults


def test_what_is_sent_from_pinned_memory_without_waiting_is_fine():
    with FakeGPU() as gpu, gpu.tracing() as trace:
        torch.tensor([1.0, 2.0]).pin_memory().to(DEVICE, non_blocking=True)
    assert trace == Trace(["upload"], [])
