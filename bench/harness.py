"""Times a step and records what makes the time comparable: bytes, the bandwidth just measured, peak memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .bandwidth import Rates, measure_rates
from .memory import available, build_and_measure
from .traffic import Precision, Traffic


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        suite: the table that shows it.
        subject: the pass or the algorithm; implementations of one subject are compared.
        implementation: who does it.
        model: what its parameters are, as the table says it.
        precision: of the weights.
        weights: how many there are.
        traffic: bytes a weight that it needs, or None where time is not about memory.
        tensors: how many parameters the weights are in (default: 1).
    """

    suite: str
    subject: str
    implementation: str
    model: str
    precision: Precision
    weights: int
    traffic: Traffic | None
    tensors: int = 1


def record(
    benchmark: BenchmarkFixture,
    case: Case,
    build: Callable[[], Callable[[], object]],
    *,
    buffer: torch.Tensor,
    inputs: int = 0,
    room: int = 0,
    rounds: int = 5,
) -> None:
    """Time a step, whose every figure then stands in `benchmark.extra_info` (see `Case`, and the page performance.md).

    Args:
        benchmark: pytest-benchmark's fixture.
        case: what is timed.
        build: makes the step; it is warmed up here.
        buffer: a large tensor on the device, by which bandwidth is measured.
        inputs: bytes that `build` makes and that are not counted: parameters and gradients (default: 0).
        room: bytes it takes; the test is skipped where they are not free (default: 0, not known).
        rounds: how often it is timed; the least time counts, and the highest rates (default: 5).
    """
    device = buffer.device.type
    gc.collect()
    free = available(device)
    if room > free:
        pytest.skip(f"needs {room / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    step, memory = build_and_measure(build, device, inputs)
    # The fixture lives as long as the session, the step should not.
    steps = [step]
    del step

    def timed() -> None:
        steps[0]()
        if device == "cuda":
            torch.cuda.synchronize()

    # Once a round, so that the step and the bandwidth meet the same moments of a machine that others use, too.
    is_about_memory = case.traffic is not None
    measured = [] if is_about_memory else [measure_rates(buffer)]
    setup = (lambda: measured.append(measure_rates(buffer, rounds=1))) if is_about_memory else None
    benchmark.group = f"{case.suite}: {case.subject}, {case.model}, {case.precision.name}, {device}"
    benchmark.pedantic(timed, setup=setup, rounds=rounds)
    steps.clear()
    rates = Rates.best(measured)
    benchmark.extra_info.update(
        suite=case.suite,
        subject=case.subject,
        implementation=case.implementation,
        model=case.model,
        precision=case.precision.name,
        device=device,
        weights=case.weights,
        tensors=case.tensors,
        held_bytes=memory.held,
        peak_bytes=memory.peak,
        rates=[short(rate) for rate in (rates.read, rates.updated, rates.written)],
    )
    if is_about_memory and benchmark.stats is not None:
        limit = rates.seconds(case.traffic, case.weights)
        benchmark.extra_info.update(
            bytes_per_weight=round(case.traffic.total, 3),
            bandwidth=short(case.traffic.total * case.weights / limit),
            fraction=short(limit / benchmark.stats["min"]),
        )


def short(number: float) -> float:
    """Four digits: more would differ from run to run."""
    return float(f"{number:.4g}")
