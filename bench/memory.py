"""Measures the allocator's bytes at the peak of a step and between steps."""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]

# Left to others on a shared machine.
SPARE = 4 << 30


@dataclass(frozen=True)
class Memory:
    """Bytes beyond the inputs: held between two steps, and at the peak of a step."""

    held: int
    peak: int


def build_and_measure(build: Callable[[], Step], device: str = "cpu", inputs: int = 0) -> tuple[Step, Memory]:
    """Make what is to be timed, warm it up with two steps and measure the third.

    Args:
        build: makes parameters, gradients and optimizer, and returns the step.
        device: "cpu", where the profiler reports each allocation, or "cuda".
        inputs: bytes that `build` makes and that do not count: parameters and gradients (default: 0).

    Returns:
        The step and its memory. An input that the step has replaced counts for the one that was there.
    """
    measured = _on_cuda if device == "cuda" else _on_cpu
    step, memory = measured(build)
    return step, Memory(memory.held - inputs, memory.peak - inputs)


def _on_cpu(build: Callable[[], Step]) -> tuple[Step, Memory]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as building:
        step = build()
        step()
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as stepping:
        step()
    held = sum(_allocations(building))
    return step, Memory(held, held + max(itertools.accumulate(_allocations(stepping)), default=0))


def _allocations(recorded: profile) -> list[int]:
    """Bytes of each allocation, negative ones of what is freed, in the order of time."""
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def _on_cuda(build: Callable[[], Step]) -> tuple[Step, Memory]:
    before = torch.cuda.memory_allocated()
    step = build()
    step()
    step()
    held = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    step()
    return step, Memory(held, torch.cuda.max_memory_allocated() - before)


def available(device: str = "cpu") -> int:
    """Bytes that a benchmark may take."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if sys.platform == "linux":
        # What was freed in small pieces stays with the process otherwise.
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.virtual_memory().available - SPARE
