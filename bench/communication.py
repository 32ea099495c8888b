"""Print how many bytes SparseMerger and DistributedDataParallel send for given numbers of workers and parameters.

python -m bench.communication [--keep_ratio 0.005] [--local_steps 10] [--bytes 4] [--workers 2 8 64 1024]
    [--parameters 1e8 1e9 1e10 1e11]

The figures are computed, not measured: each worker's bytes in `local_steps` steps, with all collectives as rings.
"""

from __future__ import annotations

import argparse

# In the compact buffers, each fp32 weight, gradient and both moments; its position.
_STATE = 4 * 4 + 4


def ddp(n: int, parameters: float, width: int, local_steps: int) -> float:
    """Bytes that a worker sends in so many steps: a ring all-reduce of all gradients for each."""
    return local_steps * 2 * (n - 1) / n * parameters * width


def same_masks(n: int, selected: float, width: int) -> float:
    """Bytes that a worker sends in a merge: a share to each, and the result of its own share to all."""
    return 2 * (n - 1) / n * selected * width


def disjoint_masks(n: int, selected: float, width: int) -> float:
    """Bytes that a worker sends, or hands on, in a merge: all parts go round the ring once."""
    return (n - 1) / n * selected * width


def mask(selected: float, keep_ratio: float) -> float:
    """Bytes of a mask: gaps of one byte, and another for each time that 255 weights in a row are not selected."""
    return selected / (1 - (1 - keep_ratio) ** 255)


def text(count: float) -> str:
    """A number of bytes as text."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 1000 else f"{count:,.0f} TB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep_ratio", type=float, default=0.005)
    parser.add_argument("--local_steps", type=int, default=10)
    parser.add_argument("--bytes", type=int, default=4)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 8, 64, 1024])
    parser.add_argument("--parameters", type=float, nargs="+", default=[1e8, 1e9, 1e10, 1e11])
    options = parser.parse_args()
    heads = ("parameters", "workers", "DDP", "same", "disjoint", "share of one", "mask", "state, same", "disjoint")
    rows = [heads, ["---:"] * len(heads)]
    for parameters in options.parameters:
        selected = options.keep_ratio * parameters
        for n in options.workers:
            sent = (
                ddp(n, parameters, options.bytes, options.local_steps),
                same_masks(n, selected, options.bytes),
                disjoint_masks(n, selected, options.bytes),
                selected / n * options.bytes,
                mask(selected, options.keep_ratio),
                # The mask's positions stand in the CPU's memory too; of disjoint masks, all are needed on the device.
                selected * (_STATE + 4),
                selected * (_STATE / n + 8),
            )
            rows.append((f"{parameters:.0e}".replace("e+", "e"), str(n), *map(text, sent)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |")


if __name__ == "__main__":
    main()
