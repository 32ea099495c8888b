"""Print the costs and savings of state in fewer bits: errors of codes, bytes per weight of steps, losses of a GPT.

    python -m bench.state_formats [codes] [memory] [gpt] [tasks --data "BBC news"]

- codes: how far an update m / (sqrt(v) + eps) is from the one with fp32 moments, for our 8-bit codes and for others',
  on the moments of MiniLM after 40 steps of AdamW (table 1).
- memory: the allocator's bytes at the peak of a SAM step of BERT-base on a batch of 8 tokens, including weights and
  gradients, next to other libraries' 8-bit AdamW under eager SAM (table 2).
- gpt: the validation loss of a small GPT trained from scratch on the packaged news for 2,000 steps (table 3).
- tasks: SAM of MiniLM on 100 texts of the tasks of bench.generalisation, five seeds: accuracy and loss (table 4).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from fsam_triton import FSAM, AdamWL2SP, MomentumSAM
from fsam_triton.finetune.options import Arguments
from fsam_triton.finetune.texts import read_bbc_news
from fsam_triton.kernels import formats

from .baselines import LR, RHO, EagerSAM
from .fidelity import FineTuning
from .generalisation import EPOCHS, SEEDS, Task, TimedTrainer, load_task, stratified
from .memory import build_and_measure

SMALL = {"state_format": "8bit", "master_weights": "24bit"}
BF16, FP32 = torch.bfloat16, torch.float32
GROUP, BLOCK = 32, 256


# -- codes -------------------------------------------------------------------------------------------------------------


def moments_of_minilm(steps: int = 40) -> tuple[Tensor, Tensor]:
    """First and second moments of the weights of whole groups, after bias correction."""
    task = FineTuning(steps=0)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-4, fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        task.model(**task.draw()).loss.backward()
        optimizer.step()
    parts = []
    for name, p in task.model.named_parameters():
        # Of the words of a batch only: the others' moments are zeros.
        if p.dim() > 1 and p.numel() % BLOCK == 0 and "embeddings" not in name:
            entry = optimizer.state[p]
            parts.append((entry["exp_avg"].flatten() / (1 - 0.9**steps), entry["exp_avg_sq"].flatten()))
    first, second = (torch.cat(moment) for moment in zip(*parts, strict=True))
    return first, second / (1 - 0.999**steps)


def companded(
    x: Tensor, compress: Callable[[Tensor], Tensor], expand: Callable[[Tensor], Tensor], levels: int
) -> Tensor:
    """x through codes of equal steps of a function of what is left of a group's largest magnitude."""
    groups = x.view(-1, GROUP)
    scale = groups.abs().amax(1, keepdim=True).clamp(min=1e-38)
    code = torch.round(compress(groups.abs() / scale) * levels)
    return (groups.sign() * expand(code / levels) * scale).flatten()


def softsign(x: Tensor) -> Tensor:
    """flashoptim's first moments, arXiv 2602.23349."""
    return companded(x, lambda y: 2 * y / (1 + y), lambda z: z / (2 - z), 127)


def square_root(x: Tensor) -> Tensor:
    """flashoptim's second moments."""
    return companded(x, torch.sqrt, torch.square, 255)


def dynamic(x: Tensor, block: int = BLOCK) -> Tensor:
    """torchao's and bitsandbytes' codes, arXiv 2110.02861."""
    from torchao.optim.quant_utils import create_dynamic_map, dequant_with_qmap, quantize_8bit_with_qmap

    codes = torch.tensor(create_dynamic_map(signed=bool((x < 0).any())))
    scale = x.view(-1, block).abs().amax(1).clamp(min=1e-38)
    return dequant_with_qmap(
        quantize_8bit_with_qmap((x.view(-1, block) / scale[:, None]).flatten(), codes), codes, scale
    )


def e4m3(x: Tensor) -> Tensor:
    """fp8 with a scale for each group."""
    groups = x.view(-1, GROUP)
    scale = groups.abs().amax(1, keepdim=True).clamp(min=1e-38) / 448
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten()


def ours(x: Tensor, rounds_randomly: bool = False) -> Tensor:
    random = torch.randint(0, 256, x.shape, dtype=torch.int32) if rounds_randomly else None
    return formats.decode(*formats.encode(x, bool((x < 0).any()), random))


def update(m: Tensor, v: Tensor) -> Tensor:
    return m / (v.sqrt() + 1e-8)


def distance(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).norm() / exact.norm())


def show_codes() -> None:
    torch.manual_seed(0)
    m, v = moments_of_minilm()
    pairs: dict[str, tuple[Callable, Callable]] = {
        "ours, to nearest": (ours, ours),
        "ours, stochastically": (lambda x: ours(x, True), lambda x: ours(x, True)),
        "softsign and square root, groups of 32 (flashoptim)": (softsign, square_root),
        "fp8 e4m3, groups of 32": (e4m3, e4m3),
        "bf16": (lambda x: x.bfloat16().float(), lambda x: x.bfloat16().float()),
    }
    if importlib.util.find_spec("torchao"):
        pairs["dynamic, blocks of 256 (torchao, bitsandbytes)"] = (dynamic, dynamic)
    print(f"1. {m.numel() / 1e6:.1f} M moments of MiniLM: relative distance of the update from that with fp32 moments")
    print(f"{'':53}{'of m':>9}{'of v':>9}{'of both':>9}")
    exact = update(m, v)
    for name, (first, second) in pairs.items():
        figures = (update(first(m), v), update(m, second(v)), update(first(m), second(v)))
        print(f"{name:53}" + "".join(f"{distance(u, exact):9.4f}" for u in figures), flush=True)
    print()


# -- memory ------------------------------------------------------------------------------------------------------------


def sam_step(model: nn.Module, optimizer: FSAM | EagerSAM, halves: tuple[Callable, Callable]) -> Callable[[], None]:
    tokens = torch.zeros(1, 8, dtype=torch.long)

    def step() -> None:
        for half in halves:
            model.zero_grad()
            model(input_ids=tokens).last_hidden_state.float().square().mean().backward()
            half()
        model.zero_grad()

    return step


def loops() -> Iterator[tuple[str, Callable[[nn.Module], Callable[[], None]]]]:
    """Name and maker of the step of each way to take SAM steps of a bf16 model."""

    def fused(**arguments) -> Callable[[nn.Module], Callable[[], None]]:
        def make(model: nn.Module) -> Callable[[], None]:
            optimizer = FSAM(model.parameters(), lr=LR, rho=RHO, **arguments)
            return sam_step(model, optimizer, (optimizer.perturb, optimizer.step))

        return make

    def eager(base: Callable) -> Callable[[nn.Module], Callable[[], None]]:
        def make(model: nn.Module) -> Callable[[], None]:
            params = list(model.parameters())
            optimizer = EagerSAM(params, base(params))
            return sam_step(model, optimizer, (optimizer.first_step, optimizer.second_step))

        return make

    def one_pass(kind: type, **arguments) -> Callable[[nn.Module], Callable[[], None]]:
        def make(model: nn.Module) -> Callable[[], None]:
            optimizer = kind(model.parameters(), lr=LR, **arguments)
            optimizer.release_gradients()
            return sam_step(model, optimizer, (optimizer.step,))

        return make

    yield "FSAM", fused()
    yield "FSAM, 32-bit masters", fused(master_weights="32bit")
    yield "FSAM, 8-bit state, 24-bit masters", fused(**SMALL)
    yield "FSAM, the same, one-byte backup", fused(**SMALL, backup_format="8bit")
    yield "MomentumSAM, the same, gradients released", one_pass(MomentumSAM, **SMALL, backup_format="8bit")
    yield "AdamWL2SP, the same, gradients released", one_pass(AdamWL2SP, **SMALL)
    yield "eager SAM over torch's fused AdamW", eager(lambda params: torch.optim.AdamW(params, lr=LR, fused=True))
    if importlib.util.find_spec("torchao"):
        from torchao.optim import AdamW8bit

        yield "eager SAM over torchao's AdamW8bit", eager(lambda params: AdamW8bit(params, lr=LR))
    if importlib.util.find_spec("bitsandbytes"):
        from bitsandbytes.optim import AdamW8bit as BnbAdamW8bit

        yield "eager SAM over bitsandbytes' AdamW8bit", eager(lambda params: BnbAdamW8bit(params, lr=LR))


def show_memory() -> None:
    print("2. A SAM step of BERT-base in bf16 on 8 tokens: bytes per weight, of weights, gradients and all else")
    print(f"{'':45}{'peak':>8}{'between steps':>15}")
    for name, make in loops():

        def build(make: Callable = make) -> Callable[[], None]:
            torch.manual_seed(0)
            return make(BertModel(BertConfig(), add_pooling_layer=False).to(BF16))

        weights = sum(p.numel() for p in BertModel(BertConfig(), add_pooling_layer=False).parameters())
        try:
            memory = build_and_measure(build)[1]
        except Exception as error:
            print(f"{name:45}  does not run here: {str(error).splitlines()[0][:90]}", flush=True)
            continue
        print(f"{name:45}{memory.peak / weights:8.2f}{memory.held / weights:15.2f}", flush=True)
    print()


# -- a GPT -------------------------------------------------------------------------------------------------------------

CONTEXT, BATCH = 128, 8


def bytes_of_news() -> tuple[Tensor, Tensor]:
    """The packaged news as bytes, to train on and to validate with."""
    train, test = (" ".join(row[0] for row in texts.rows) for texts in read_bbc_news())
    return tuple(torch.tensor(list(text.encode()), dtype=torch.long) for text in (train, test))


def train_gpt(dtype: torch.dtype, steps: int, seed: int, kind: type = AdamWL2SP, **arguments) -> float:
    """The validation loss after so many steps."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=256, n_positions=CONTEXT, n_embd=128, n_layer=3, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = GPT2LMHeadModel(config).to(dtype)
    optimizer = kind(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, max_grad_norm=1.0, **arguments)
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    train, test = bytes_of_news()
    generator = torch.Generator().manual_seed(seed)

    def loss_of(text: Tensor, starts: Tensor) -> Tensor:
        tokens = torch.stack([text[start : start + CONTEXT + 1] for start in starts])
        logits = model(input_ids=tokens[:, :-1]).logits.float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(train, torch.randint(len(train) - CONTEXT - 1, (BATCH,), generator=generator)).backward()
        optimizer.step()
        rates.step()
    with torch.no_grad():
        starts = torch.arange(0, min(len(test), 400 * CONTEXT) - CONTEXT - 1, CONTEXT)
        return math.fsum(float(loss_of(test, part)) * len(part) for part in starts.split(32)) / len(starts)


def show_gpt(steps: int, seeds: int) -> None:
    ways = {
        "fp32, fp32 state": (FP32, {}),
        "fp32, 8-bit state": (FP32, {"state_format": "8bit"}),
        "bf16, fp32 state, 32-bit masters": (BF16, {"master_weights": "32bit"}),
        "bf16, 8-bit state, 24-bit masters": (BF16, SMALL),
    }
    print(f"3. GPT of 0.6 M weights, {steps} steps on the packaged news: validation loss per byte, seeds: {seeds}")
    print(f"{'':40}{'mean':>8}{'less than the first':>21}  seeds")
    first: list[float] = []
    for name, (dtype, arguments) in ways.items():
        losses = [train_gpt(dtype, steps, seed, **arguments) for seed in range(seeds)]
        first = first or losses
        change = sum(a - b for a, b in zip(first, losses, strict=True)) / seeds
        shown = " ".join(f"{loss:.4f}" for loss in losses)
        print(f"{name:40}{sum(losses) / seeds:8.4f}{change:21.4f}  {shown}", flush=True)
    print()


# -- tasks -------------------------------------------------------------------------------------------------------------


def accuracies(task: Task, data: str, options: dict[str, object]) -> list[tuple[float, float]]:
    """Accuracy and loss on the test texts of SAM at each seed, with what evidence.md has chosen for 100 texts."""
    found = []
    for seed in SEEDS:
        train = task.encode(stratified(task.pool, 100, seed)[0])
        arguments = Arguments(
            sam_type=["sam"],
            rho=0.02,
            learning_rate=2e-4,
            num_train_epochs=EPOCHS[data][100],
            seed=seed,
            use_cpu=True,
            **options,
        )
        steps = arguments.total_steps(len(train))
        trainer = TimedTrainer(arguments, "sam", task.path, task.names, task.tokenizer, steps)
        trainer.train(train, train[:1])
        found.append(trainer.judge(task.judges["test"]))
    return found


def show_tasks(data: str, film_reviews: Path | None) -> None:
    ways: dict[str, dict[str, object]] = {
        "fp32, fp32 state": {},
        "fp32, 8-bit state": {"state_format": "8bit"},
        "bf16, fp32 state, 32-bit masters": {"dtype": "bfloat16", "master_weights": "32bit"},
        "bf16, 8-bit state, 24-bit masters": {"dtype": "bfloat16", **SMALL},
        "the same, one-byte backup": {"dtype": "bfloat16", **SMALL, "backup_format": "8bit"},
    }
    task = load_task(data, film_reviews)
    print(
        f"4. SAM of MiniLM on 100 texts of {data}, {len(SEEDS)} seeds: test accuracy, and how it differs from the first"
    )
    print(f"{'':40}{'accuracy':>9}{'change':>12}{'standard error':>16}{'loss':>8}")
    first: list[float] = []
    for name, options in ways.items():
        figures = accuracies(task, data, options)
        own = [100 * accuracy for accuracy, _ in figures]
        first = first or own
        change = [a - b for a, b in zip(own, first, strict=True)]
        error = statistics.stdev(change) / len(change) ** 0.5
        loss = statistics.mean(loss for _, loss in figures)
        shown = f"{statistics.mean(own):9.2f}{statistics.mean(change):12.2f}{error:16.2f}{loss:8.4f}"
        print(f"{name:40}{shown}", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "tables", nargs="*", default=["codes", "memory", "gpt", "tasks"], help="codes, memory, gpt, tasks"
    )
    parser.add_argument("--steps", type=int, default=2000, help="of the GPT")
    parser.add_argument("--seeds", type=int, default=1, help="of the GPT")
    parser.add_argument("--data", choices=list(EPOCHS), default="BBC news", help="of the tasks")
    parser.add_argument("--film_reviews", type=Path, help="the file of that task, as bench.generalisation has it")
    args = parser.parse_args()
    if args.data == "film reviews" and args.film_reviews is None:
        parser.error("--film_reviews is needed for that task")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tables = {"codes": show_codes, "memory": show_memory, "gpt": lambda: show_gpt(args.steps, args.seeds)}
    tables["tasks"] = lambda: show_tasks(args.data, args.film_reviews)
    for name in args.tables:
        tables[name]()


if __name__ == "__main__":
    main()
