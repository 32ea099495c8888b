"""Measures how fast plain PyTorch moves memory on a device, which is the upper limit for a pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .traffic import Traffic

# fp32, 256 MB: far larger than the caches.
ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Rates:
    """Bytes a second, read and written ones both counted: `sum()`, `mul_()` in place, `fill_()`.

    Three, because on a CPU they differ by a factor of two: memory that is written without being read is read all the
    same, line by line, and memory that is only read leaves the way back unused. Copies and sums of tensors take as long
    as their streams do at these rates, to a few percent.
    """

    read: float
    updated: float
    written: float

    @classmethod
    def best(cls, measured: Sequence[Rates]) -> Rates:
        """The highest of each."""
        return cls(*(max(getattr(one, name) for one in measured) for name in ("read", "updated", "written")))

    def seconds(self, traffic: Traffic, weights: int) -> float:
        """The least time for so many weights: each stream at its rate, one after another."""
        streams = (traffic.read / self.read, 2 * traffic.updated / self.updated, traffic.written / self.written)
        return weights * sum(streams)


def wall_seconds(run: Callable[[], object], device: str) -> float:
    """The time until the device has finished a run, launches included."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def device_seconds(run: Callable[[], object], device: str) -> float:
    """The time of a run; on a GPU without the host's, whose launch takes as long as a pass takes a fast GPU."""
    if device != "cuda":
        return wall_seconds(run, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The GPU waits for about a millisecond, in which the host launches the run.
    torch.cuda._sleep(2_000_000)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def least_seconds(run: Callable[[], object], device: str, rounds: int = 5) -> float:
    """The least time of several runs after one to warm up."""
    return min([device_seconds(run, device) for _ in range(rounds + 1)][1:])


def measure_rates(buffer: torch.Tensor, rounds: int = 5) -> Rates:
    """The rates now, for a flat tensor, whose numbers are lost."""
    device, n = buffer.device.type, buffer.nbytes
    return Rates(
        read=n / least_seconds(buffer.sum, device, rounds),
        updated=2 * n / least_seconds(lambda: buffer.mul_(0.5), device, rounds),
        written=n / least_seconds(lambda: buffer.fill_(1.0), device, rounds),
    )
