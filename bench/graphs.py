"""Print the time of whole SAM steps, launched one by one and replayed from a CUDA graph.

    python -m bench.graphs [--device cuda] [--layers 12] [--steps 20] [--write FILE]

A step is two forward and backward passes over a transformer of BERT's sizes and both halves of FSAM, on one batch that
is so small that launches take longer than the work. Both trainings begin with the same weights; their last losses are
printed. `pytest -m gpu -k "graph or replay"` checks numbers. On a CPU, which has no graphs, both are launched.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fsam_triton import FSAM

from .bandwidth import wall_seconds
from .baselines import LR, RHO
from .harness import short
from .render import table

WARM_UP = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[], Tensor]


def make_step(device: str, dtype: torch.dtype, layers: int) -> tuple[int, Step]:
    """The number of weights, and a step that returns the loss at the weights."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(768, 12, 3072, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).to(device, dtype).train()
    inputs, targets = torch.randn(2, 1, 8, 768, device=device).to(dtype)
    optimizer = FSAM(model.parameters(), lr=LR, rho=RHO)

    def backward() -> Tensor:
        optimizer.zero_grad()
        loss = (model(inputs) - targets).float().square().mean()
        loss.backward()
        return loss.detach()

    def step() -> Tensor:
        loss = backward()
        optimizer.perturb()
        backward()
        optimizer.step()
        return loss

    return sum(p.numel() for p in model.parameters()), step


def warm_up(step: Step, device: str) -> None:
    """Steps on a stream of their own, as a capture needs them."""
    if device == "cpu":
        for _ in range(WARM_UP):
            step()
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)


def captured(step: Step) -> Step:
    """The step as a graph that is replayed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def measure(device: str, precision: str, layers: int, steps: int) -> dict[str, object]:
    """Seconds of a step and the last loss, launched and replayed."""
    row: dict[str, object] = {"precision": precision, "seconds": {}, "loss": {}}
    for name in ("launched", "replayed"):
        row["weights"], step = make_step(device, DTYPES[precision], layers)
        warm_up(step, device)
        if name == "replayed" and device == "cuda":
            step = captured(step)
        row["seconds"][name] = short(statistics.median(wall_seconds(step, device) for _ in range(steps - 1)))
        row["loss"][name] = float(step())
    return row


def table_of(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = []
    for row in rows:
        launched, replayed = (row["seconds"][name] for name in ("launched", "replayed"))
        losses = [f"{row['loss'][name]:.6f}" for name in ("launched", "replayed")]
        title = f"{row['weights'] / 1e6:.0f} M weights, {row['precision']}"
        lines.append(
            [title, f"{launched * 1e3:.2f} ms", f"{replayed * 1e3:.2f} ms", f"{launched / replayed:.2f}x", *losses]
        )
    return table(["step", "launched", "replayed", "ratio", "last loss, launched", "last loss, replayed"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--write", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    rows = [measure(args.device, precision, args.layers, args.steps) for precision in DTYPES]
    print(table_of(rows))
    if args.write:
        args.write.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
