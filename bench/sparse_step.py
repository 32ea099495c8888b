"""Print the time per step and memory of training half a percent of BERT-base's weights, next to training all.

    python -m bench.sparse_step [--dtype float32] [--keep_ratio 0.005] [--rounds 25]

The FISH mask is that of a BERT-base with random weights and texts: its weights lie in rows and columns, as a linear
layer's gradients do. A random mask is the worst case, because each weight has its own cache line. The steps take turns,
so that drifts in the machine's speed affect them equally and none finds its data in the cache; the least time counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from fsam_triton import FSAM, AdamWL2SP, FishMask, estimate_fisher


def bert_base(dtype: torch.dtype) -> nn.Module:
    """A classifier with a gradient of every weight."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig()).to(dtype)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    return model


def fish_mask(model: nn.Module, keep_ratio: float) -> FishMask:
    """The mask of 32 random texts of 16 tokens."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(model.config.vocab_size, (32, 16), generator=generator)
    batch = {"input_ids": texts, "labels": torch.randint(2, (32,), generator=generator)}
    return FishMask.from_scores(estimate_fisher(model, [batch], num_samples=32, progress=False), keep_ratio)


def held(optimizer: AdamWL2SP) -> int:
    """Bytes that a sparse optimizer keeps: moments, positions, clean weights, counts of steps."""
    return sum(buffer.nbytes for lanes in optimizer.ledger for buffer in (lanes.steps, *lanes.lanes.values()))


def dense_state(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of a torch optimizer's state."""
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())


def sharp_step(optimizer: FSAM, model: nn.Module) -> Callable[[], None]:
    """Both halves of SAM's step; its second gradients are the first ones again."""
    grads = [p.grad for p in model.parameters()]

    def step() -> None:
        optimizer.perturb()
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.grad = grad
        optimizer.step()

    return step


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Least seconds of each step."""
    best = dict.fromkeys(steps, float("inf"))
    for i in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= 2:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--keep_ratio", type=float, default=0.005)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    models = [bert_base(dtype) for _ in range(5)]
    masks = {
        "FISH mask": fish_mask(models[0], args.keep_ratio),
        "random mask": FishMask.random(models[0], args.keep_ratio),
    }
    first = "torch.optim.AdamW, fused"
    dense = torch.optim.AdamW(models[0].parameters(), lr=1e-5, fused=True)
    ours = AdamWL2SP(models[1].named_parameters(), lr=1e-5)
    sparse = {
        f"AdamWL2SP, {name}": AdamWL2SP(model.named_parameters(), lr=1e-5, trainable=mask)
        for (name, mask), model in zip(masks.items(), models[2:], strict=False)
    }
    sharp = FSAM(models[4].named_parameters(), lr=1e-5, trainable=masks["FISH mask"])
    mask = masks["FISH mask"]
    print(f"{mask}, {args.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    steps = {first: dense.step, "AdamWL2SP": ours.step}
    steps |= {name: optimizer.step for name, optimizer in sparse.items()}
    steps["FSAM, FISH mask, both halves"] = sharp_step(sharp, models[4])
    best = measure(steps, args.rounds)
    print(f"{'':32}{'ms':>8}{'AdamW over it':>16}")
    for name, seconds in best.items():
        print(f"{name:32}{seconds * 1e3:8.2f}{best[first] / seconds:15.1f}x")
    sizes = {first: dense_state(dense), "FSAM, FISH mask": held(sharp)}
    sizes |= {name: held(optimizer) for name, optimizer in sparse.items()}
    print(f"\n{'':32}{'MB':>8}{'of AdamW':>16}")
    for name, size in sizes.items():
        print(f"{name:32}{size / 1e6:8.1f}{size / sizes[first]:16.2%}")


if __name__ == "__main__":
    main()
