"""Trains a model by a method on given batches."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fsam_triton.analysis import find_rho

from .methods import Method

WARM_UP, DECAY = 0.1, 0.3


@dataclass
class Cost:
    """Steps of a run, passes over the model, processor seconds of the steps, and the rho that was found, if any.

    The first step counts as the mean of the others, because it may compile. What `find_rho` takes does not count.
    """

    steps: int
    passes: int
    seconds: float
    rho: float | None


def rate(decay: str, step: int, total: int) -> float:
    """The learning rate of a step, from 0 on, over its peak.

    Args:
        decay: `"linear"`, `"wsd"` (warm-up, stable, decay) or `"none"`: constant after the warm-up.
        step: its number.
        total: steps of the run.
    """
    warm_up = max(1, round(WARM_UP * total))
    if step < warm_up:
        return (step + 1) / warm_up
    begin = {"linear": warm_up, "wsd": max(warm_up, total - round(DECAY * total)), "none": total}[decay]
    return 1.0 if step < begin else (total - step) / (total - begin + 1)


def train(
    model: torch.nn.Module,
    method: Method,
    batches: Sequence[Any],
    loss: Callable[[Any], Tensor],
    learning_rate: float,
    strength: float,
    seed: int,
    novel: Iterable[str] = (),
) -> Cost:
    """Make a step on each batch.

    Args:
        model: what is trained; left in eval mode.
        method: how.
        batches: one a step.
        loss: the mean loss of a batch.
        learning_rate: the peak.
        strength: of the method's tuned argument, unless that is found in the first batches.
        seed: of the optimizer.
        novel: names of the parameters that are not pretrained.
    """
    rho = find_rho(model, lambda _, batch: loss(batch), batches).rho if method.found else None
    optimizer = method.build(model, learning_rate, strength if rho is None else rho, seed, novel)
    total, passes, seconds = len(batches), 0, []
    noise = method.noise(model, optimizer, sigma=strength, total_steps=total, seed=seed) if method.noise else None
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(method.decay, step, total))
    model.train()
    with noise or contextlib.nullcontext():
        for batch in batches:

            def closure(batch: Any = batch) -> Tensor:
                nonlocal passes
                passes += 1
                optimizer.zero_grad()
                value = loss(batch)
                value.backward()
                return value

            start = time.process_time()
            optimizer.step(closure)
            seconds.append(time.process_time() - start)
            scheduler.step()
    model.eval()
    others = seconds[1:] or seconds
    return Cost(total, passes, round(total * sum(others) / len(others), 3), rho)


def epochs(count: int, size: int, times: int, seed: int) -> list[list[int]]:
    """Indices of the batches of so many passes over `count` samples: more passes begin with the same batches."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(count, generator=generator).tolist() for _ in range(times)]
    return [order[i : i + size] for order in orders for i in range(0, count, size)]
