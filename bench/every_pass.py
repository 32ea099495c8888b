"""Run every pass once, for compute-sanitizer: on small tensors of ragged lengths that are not aligned.

    compute-sanitizer --tool memcheck python -m bench.every_pass [--device cuda] [--dtypes fp32 bf16]

Prints how often each pass of `fsam_triton.ops` was called. Numbers are the tests' business.
"""

from __future__ import annotations

import argparse
import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fsam_triton import FSAM, AdamWL2SP, FisherMask, FishMask, MomentumSAM, ops
from fsam_triton.kernels import spec

PASSES = (
    *("norm_sq", "norms_sq", "gap", "climb_coefficients", "perturb_", "descend_coefficients", "descend_"),
    *("add_noise_", "digit_histogram", "write_mask_", "gather_", "scatter_", "linear_fisher_"),
)
SHORT = {"master_weights": "24bit", "state_format": "8bit"}
VARIANTS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (FSAM, {"max_grad_norm": 1.0, "l2_sp": 0.1, "ema_decay": 0.9}),
    (FSAM, {"adaptive": True, "mask": FisherMask(0.3)}),
    (FSAM, {"alpha": 0.3, "beta": 0.5}),
    (FSAM, {"sigma": 1.0}),
    (FSAM, {"rule": "sgd", "momentum": 0.9}),
    (FSAM, {"rule": "lion"}),
    (MomentumSAM, {}),
    (AdamWL2SP, {"balance": 0.5}),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def make_model(device: str, dtype: torch.dtype) -> nn.ParameterDict:
    """Two adapters for `balance`, an odd length, one element, nothing, and a tensor of several chunks."""
    shapes = {"one": (3, 35), "two": (1,), "none": (0,), "long": (spec.CHUNK + 77,)}
    shapes |= {"layer_lora_A": (4, 33), "layer_lora_B": (17, 4)}
    weights = {}
    for name, shape in shapes.items():
        # One element into a buffer: aligned to no vector.
        flat = torch.randn(torch.Size(shape).numel() + 1, device=device).to(dtype)[1:]
        weights[name] = nn.Parameter(flat.view(shape))
    return nn.ParameterDict(weights)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        for half in ("perturb", "step"):
            if half == "perturb" and isinstance(optimizer, AdamWL2SP):
                continue
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            getattr(optimizer, half)()


def optimizers(device: str, dtypes: Iterable[torch.dtype]) -> None:
    """The passes of an optimizer's step."""
    for dtype in dtypes:
        for kind, arguments in VARIANTS:
            formats = [{}, SHORT] if dtype == torch.bfloat16 else [{}]
            for more in formats:
                if more and kind is FSAM:
                    more = {**more, "backup_format": "8bit"}
                model = make_model(device, dtype)
                named = [(name.replace("_lora", ".lora"), p) for name, p in model.named_parameters()]
                train(model, kind(named, lr=1e-2, **arguments, **more))
        model = make_model(device, dtype)
        train(model, FSAM(model.named_parameters(), lr=1e-2, trainable=FishMask.random(model, 0.1)))


def others(device: str, dtypes: Iterable[torch.dtype]) -> None:
    """Noise of Flat-LoRA, and the Fisher information of a linear layer."""
    for dtype in dtypes:
        weight = torch.randn(33, 65, device=device).to(dtype)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        for by_column in (False, True):
            scale = torch.rand(65 if by_column else 33, device=device, dtype=compute)
            ops.add_noise_(torch.empty_like(weight), weight, scale, 12345, by_column)
        for positions in (1, 19):
            inputs, grads = (torch.randn(3, positions, n, device=device).to(dtype) for n in (65, 33))
            ops.linear_fisher_(torch.zeros(33, 65, device=device, dtype=compute), inputs, grads, False)


@contextmanager
def counted() -> Iterator[collections.Counter[str]]:
    """Counts the calls of each pass."""
    calls: collections.Counter[str] = collections.Counter(dict.fromkeys(PASSES, 0))
    originals = {name: getattr(ops, name) for name in PASSES}

    def counting(name: str) -> Callable[..., Any]:
        @functools.wraps(originals[name])
        def call(*args: Any) -> Any:
            calls[name] += 1
            return originals[name](*args)

        return call

    try:
        for name in PASSES:
            setattr(ops, name, counting(name))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(ops, name, original)


def run(device: str, dtypes: Sequence[torch.dtype]) -> collections.Counter[str]:
    """How often each pass was called."""
    torch.manual_seed(0)
    with counted() as calls:
        optimizers(device, dtypes)
        others(device, dtypes)
    if device == "cuda":
        torch.cuda.synchronize()
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    args = parser.parse_args()
    calls = run(args.device, [DTYPES[name] for name in args.dtypes])
    for name, count in calls.items():
        print(f"{name:22}{count:6}")
    if missing := [name for name, count in calls.items() if not count]:
        raise SystemExit(f"never called: {', '.join(missing)}")


if __name__ == "__main__":
    main()
