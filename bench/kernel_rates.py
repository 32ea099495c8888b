"""Print the time of each pass over flat tensors as a share of what the memory's bandwidth allows.

    python -m bench.kernel_rates [--device cuda] [--elements 67108864] [--write FILE]

The passes and the bytes they need are those of `bench/test_kernels.py`, which also times alternatives. The bandwidth is
measured before each pass (`bench/bandwidth.py`). On a GPU both times are the GPU's own, without the host's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from fsam_triton import ops

from . import bandwidth
from .bandwidth import least_seconds, measure_rates
from .harness import short
from .render import digits, table
from .test_kernels import PASSES, make_tensors
from .traffic import ALL

# Seven lanes of fp32 take 1.9 GB; the shortest pass takes 30 microseconds at 5 TB/s.
ELEMENTS = 1 << 26


@torch.no_grad()
def measure(device: str, elements: int) -> list[dict[str, object]]:
    """A row for each precision and pass."""
    rows = []
    buffer = torch.ones(min(bandwidth.ELEMENTS, elements), device=device)
    for precision in ALL:
        tensors = make_tensors(device, precision, elements)
        for name, one in PASSES.items():
            if precision not in one.precisions:
                continue
            traffic = one.traffic(precision)
            rates = measure_rates(buffer)
            seconds = least_seconds(lambda one=one, tensors=tensors: one.run(ops, tensors), device)
            rows.append(
                {
                    "pass": name,
                    "precision": precision.name,
                    "weights": elements,
                    "bytes_per_weight": round(traffic.total, 3),
                    "seconds": short(seconds),
                    "rates": [short(rate) for rate in (rates.read, rates.updated, rates.written)],
                    "fraction": short(rates.seconds(traffic, elements) / seconds),
                }
            )
    return rows


def table_of(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = []
    for row in rows:
        moved = row["bytes_per_weight"] * row["weights"]
        nanoseconds = row["seconds"] / row["weights"] * 1e9
        figures = [digits(nanoseconds), f"{moved / row['seconds'] / 1e9:.1f}", f"{row['fraction']:.0%}"]
        lines.append([f"{row['pass']}, {row['precision']}", f"{row['bytes_per_weight']:.4g}", *figures])
    return table(["pass", "bytes per weight", "ns per weight", "GB/s", "share of the bandwidth"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--elements", type=int, default=ELEMENTS, help="weights of the flat tensor")
    parser.add_argument("--write", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    rows = measure(args.device, args.elements)
    print(table_of(rows))
    if args.write:
        args.write.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
