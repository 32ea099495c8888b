"""Print the cost of several ways to train LoRA adapters, next to plain LoRA with AdamW: time per step and peak memory.

    python -m bench.lora [--models MiniLM Llama] [--batch 16 96] [--rounds 9]

In each round, the ways take turns: each takes one step on the same batch, over a copy of the model with adapters on all
linear layers. The table shows the median over the rounds of the time, and of its ratio to plain LoRA's in the same
round. The time is the processor time of one thread, so other programs on the machine hardly affect it. Memory is the
allocator's at the peak of a step, including the model, followed by its excess over plain LoRA's. The last lines tell
how many weights of a bf16 base differ after training with noise.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn

from fsam_triton import FSAM, SAM, AdamWL2SP, FisherMask, FlatLoRA, MomentumSAM

from .baselines import RHO
from .conftest import processor
from .memory import build_and_measure
from .real_loop import packaged_minilm

# What the command has printed, committed.
RESULTS = Path(__file__).parent / "results" / "lora.txt"
LR, SIGMA, ALPHA, STEPS = 1e-4, 0.05, 0.5, 1000
PLAIN, FLAT, WRITTEN = "AdamW of torch, fused", "Flat-LoRA", "Flat-LoRA as its code has it"


def small_llama() -> nn.Module:
    """A decoder of 12 million weights, most of them in its linear layers."""
    sizes = {"hidden_size": 384, "intermediate_size": 1056, "num_hidden_layers": 6, "num_attention_heads": 6}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=3, vocab_size=4096, max_position_embeddings=512)
    return transformers.LlamaModel(config)


MODELS: dict[str, Callable[[], nn.Module]] = {"MiniLM": packaged_minilm, "Llama": small_llama}


def adapted(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with adapters of rank 8 on all linear layers."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    return peft.get_peft_model(make().to(dtype), config).train()


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def backward(model: nn.Module, tokens: Tensor) -> None:
    model.zero_grad()
    model(input_ids=tokens).last_hidden_state.float().square().mean().backward()


Step = Callable[[Tensor], None]


def one_pass(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(tokens: Tensor) -> None:
        backward(model, tokens)
        optimizer.step()

    return step


def two_passes(model: nn.Module, optimizer: FSAM | SAM) -> Step:
    def step(tokens: Tensor) -> None:
        backward(model, tokens)
        optimizer.perturb()
        backward(model, tokens)
        optimizer.step()

    return step


def plain(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for _, p in trained(model)], lr=LR, fused=True)


def own(model: nn.Module, **options: object) -> Step:
    return one_pass(model, AdamWL2SP(trained(model), lr=LR, **options))


def flat(model: nn.Module) -> Step:
    optimizer = AdamWL2SP(trained(model), lr=LR)
    # From the middle on: at first there is no noise to make.
    FlatLoRA(model, optimizer, sigma=SIGMA, total_steps=STEPS, step=STEPS // 2)
    return one_pass(model, optimizer)


def layers(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer"))


@torch.no_grad()
def add_noise(model: nn.Module, seed: int, sign: int, norms: list[Tensor]) -> None:
    """What the paper's code does before and after the passes: noise added to the weights, and taken off again."""
    torch.manual_seed(seed)
    for number, layer in enumerate(layers(model)):
        w = layer.base_layer.weight
        if sign > 0:
            delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            norms.append(SIGMA / 2 / math.sqrt(w.shape[1]) * (w + delta).norm(dim=1, keepdim=True))
        w += sign * torch.normal(0, norms[number].repeat(1, w.shape[1])).to(w.dtype)


def written(model: nn.Module) -> Step:
    optimizer, count = plain(model), iter(range(1 << 30))

    def step(tokens: Tensor) -> None:
        seed, norms = next(count), []
        add_noise(model, seed, 1, norms)
        backward(model, tokens)
        add_noise(model, seed, -1, norms)
        optimizer.step()

    return step


WAYS: dict[str, Callable[[nn.Module], Step]] = {
    PLAIN: lambda model: one_pass(model, plain(model)),
    "AdamWL2SP": own,
    "AdamWL2SP, clipped": partial(own, max_grad_norm=1.0),
    "BAR, by gradients": partial(own, balance=ALPHA),
    "BAR, by weights": partial(own, balance=ALPHA, balance_by="weights"),
    FLAT: flat,
    WRITTEN: written,
    "MomentumSAM": lambda model: one_pass(model, MomentumSAM(trained(model), lr=LR, rho=RHO)),
    "FSAM (SAM)": lambda model: two_passes(model, FSAM(trained(model), lr=LR, rho=RHO)),
    "FSAM, FisherMask": lambda model: two_passes(
        model, FSAM(trained(model), lr=LR, rho=RHO, mask=FisherMask(0.5, interval=100))
    ),
    "SAM around torch's AdamW": lambda model: two_passes(model, SAM(plain(model), rho=RHO)),
}


@dataclass(frozen=True)
class Cost:
    """Of a step: seconds, how often plain LoRA's, bytes at the peak, and how many of these plain LoRA does not take."""

    seconds: float
    ratio: float
    peak: int
    more: int


def measure(make: Callable[[], nn.Module], tokens: Tensor, rounds: int) -> dict[str, Cost]:
    """The cost of each way."""
    model = adapted(make)
    steps = {name: way(copy.deepcopy(model)) for name, way in WAYS.items()}
    for step in steps.values():
        step(tokens)
        step(tokens)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.process_time()
            steps[name](tokens)
            seconds[name].append(time.process_time() - start)
        gc.collect()
    del steps, model
    peaks = {name: peak(make, way, tokens) for name, way in WAYS.items()}
    return {
        name: Cost(
            statistics.median(own),
            statistics.median(a / b for a, b in zip(own, seconds[PLAIN], strict=True)),
            peaks[name],
            peaks[name] - peaks[PLAIN],
        )
        for name, own in seconds.items()
    }


def peak(make: Callable[[], nn.Module], way: Callable[[nn.Module], Step], tokens: Tensor) -> int:
    """Bytes at the peak of a step."""

    def build() -> Callable[[], None]:
        step = way(adapted(make))
        return lambda: step(tokens)

    found = build_and_measure(build)[1].peak
    gc.collect()
    return found


def changed(make: Callable[[], nn.Module], way: Callable[[nn.Module], Step], tokens: Tensor, steps: int) -> float:
    """The share of the weights of a bf16 base that are others after some steps."""
    model = adapted(make, torch.bfloat16)
    before = [layer.base_layer.weight.clone() for layer in layers(model)]
    step = way(model)
    for _ in range(steps):
        step(tokens)
    pairs = [(old, layer.base_layer.weight) for old, layer in zip(before, layers(model), strict=True)]
    return sum(int((old != new).sum()) for old, new in pairs) / sum(old.numel() for old, _ in pairs)


def format_table(costs: dict[str, Cost]) -> str:
    """Milliseconds, ratio to plain LoRA, MB at the peak, and how many of them are more than plain LoRA's."""
    lines = [f"{'':30}{'ms':>9}{'over plain':>12}{'peak, MB':>10}{'more, MB':>10}"]
    for name, cost in costs.items():
        times = f"{1e3 * cost.seconds:>9.1f}{f'{cost.ratio:.3f}x':>12}"
        lines.append(f"{name:30}{times}{cost.peak / 1e6:>10.1f}{cost.more / 1e6:>+10.1f}")
    return "\n".join(lines)


def describe(model: nn.Module) -> str:
    sizes = [layer.base_layer.weight.numel() for layer in layers(model)]
    adapters = sum(p.numel() for _, p in trained(model))
    total = sum(p.numel() for p in model.parameters()) - adapters
    largest = 4 * max(sizes) / 1e6
    return (
        f"{total / 1e6:.1f} M weights, {sum(sizes) / 1e6:.1f} M of them in {len(sizes)} layers with adapters of "
        f"{adapters / 1e6:.2f} M (the largest takes {largest:.1f} MB)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batch", type=int, nargs=2, default=(16, 96), help="texts, and tokens of each")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20, help="after which the bf16 base is looked at")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    texts, length = options.batch
    tokens = torch.randint(0, 3000, (texts, length), generator=torch.Generator().manual_seed(0))
    print(
        f"{processor()}, one thread, torch {torch.__version__}, peft {peft.__version__}; fp32, adapters of rank 8, "
        f"{texts} texts of {length} tokens"
    )
    for name in options.models:
        make = MODELS[name]
        table = format_table(measure(make, tokens, options.rounds))
        print(f"\n{name}: {describe(adapted(make))}\n\n{table}", flush=True)
        shares = [changed(make, WAYS[way], tokens[:2, :8], options.steps) for way in (FLAT, WRITTEN)]
        print(
            f"\nof a bf16 base, weights that are others after {options.steps} steps: {FLAT} {shares[0]:.2%}, "
            f"as its code has it {shares[1]:.2%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
