"""Print how long estimate_fisher takes for MiniLM on BBC news, next to a loop over samples.

python -m bench.fisher [--batch_size 16] [--batches 4] [--lengths 16 32 64 128] [--rounds 2]

Both ways take the same flops for the layers. On a CPU, the savings are therefore the loop's overheads: small matrices,
the dense gradient of the embedding, storing gradients, and positions without any. They are small once texts are long.
"""

from __future__ import annotations

import argparse
import time

import torch
import transformers
from torch import Tensor

from fsam_triton.finetune.models import encode, load_model, load_tokenizer, model_path
from fsam_triton.finetune.options import Arguments
from fsam_triton.finetune.texts import label_names, read_bbc_news
from fsam_triton.fisher import estimate_fisher


def loop(model: torch.nn.Module, batches: list[dict[str, Tensor]], num_samples: int) -> dict[str, Tensor]:
    """What one writes without this package: a backward pass and a square for each sample."""
    fisher = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        for i in range(len(batch["labels"])):
            model.zero_grad()
            model(**{key: value[i : i + 1] for key, value in batch.items()}).loss.backward()
            for name, p in model.named_parameters():
                fisher[name] += p.grad.square()
    return {name: total / num_samples for name, total in fisher.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    path = model_path(Arguments())
    train, _ = read_bbc_news()
    names, tokenizer = label_names(train), load_tokenizer(path)
    model = load_model(path, names)[0].eval()
    collate = transformers.DataCollatorWithPadding(tokenizer)
    size, samples = options.batch_size, options.batch_size * options.batches
    print(f"{'tokens':>8}{'estimate_fisher':>18}{'loop':>10}{'ratio':>8}{'  largest difference':>22}")
    for length in options.lengths:
        encoded = encode(tokenizer, train, length, names)
        batches = [dict(collate(encoded[i :: options.batches][:size])) for i in range(options.batches)]
        ways = {
            "fast": lambda batches=batches: estimate_fisher(model, batches, samples, progress=False),
            "loop": lambda batches=batches: loop(model, batches, samples),
        }
        best, results = dict.fromkeys(ways, float("inf")), {}
        for _ in range(options.rounds):
            for name, estimate in ways.items():
                start = time.perf_counter()
                results[name] = estimate()
                best[name] = min(best[name], time.perf_counter() - start)
        # Of each tensor's norm; those of key biases are rounding errors of zero.
        apart = max(
            float((results["fast"][name] - exact).norm() / exact.norm())
            for name, exact in results["loop"].items()
            if "key.bias" not in name
        )
        print(f"{length:8}{best['fast']:17.3f}s{best['loop']:9.3f}s{best['loop'] / best['fast']:8.2f}{apart:22.1e}")


if __name__ == "__main__":
    main()
