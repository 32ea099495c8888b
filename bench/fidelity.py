"""Print how much of SAM's perturbation reaches 16-bit weights, and how this affects the loss of a real model.

python -m bench.fidelity

Tables 1 to 3 compare the actual perturbation with the intended one, rho * g / norm(g). They give its norm divided by
rho, its cosine to the intended perturbation, and the product of the two, which is its projection divided by rho. The
product is 1 if the weights move as far along the intended direction as they should, however much noise is added.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence

import torch
import transformers
from torch import Tensor
from torch.nn import Parameter

from fsam_triton import FSAM, FisherMask
from fsam_triton.finetune.models import encode, load_model, load_tokenizer, model_path
from fsam_triton.finetune.options import Arguments
from fsam_triton.finetune.texts import label_names, read_bbc_news
from fsam_triton.kernels import formats

from .workloads import bert_base_shapes, make_parameters

Tensors = dict[str, Tensor]
Figures = tuple[float, float, float]
Rows = Iterator[tuple[str, Figures]]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RHO = 0.05


def dot(a: Tensors, b: Tensors) -> float:
    return sum((a[name] * b[name]).sum(dtype=torch.float64).item() for name in a)


def norm(a: Tensors) -> float:
    return math.sqrt(dot(a, a))


def add(a: Tensors, b: Tensors, sign: int = 1) -> Tensors:
    return {name: a[name] + sign * b[name] for name in a}


def compare(realised: Tensors, intended: Tensors, rho: float) -> Figures:
    """Norm over rho, cosine, and projection over rho of the realised perturbation."""
    length, along = norm(realised), dot(realised, intended) / norm(intended)
    return length / rho, along / length if length else 0.0, along / rho


def intend(grads: Tensors, rho: float) -> Tensors:
    """SAM's perturbation in fp32, before it is added to anything."""
    scale = rho / norm(grads)
    return {name: scale * g for name, g in grads.items()}


def perturb(
    weights: Tensors, grads: Tensors, rho: float, dtype: torch.dtype, mask: FisherMask | None = None, **arguments
) -> tuple[Tensors, Tensors]:
    """What FSAM adds to the weights if they are stored as `dtype`, and what it should add, both in fp32."""
    params = {name: Parameter(w.to(dtype, copy=True)) for name, w in weights.items()}
    for name, p in params.items():
        p.grad = grads[name].to(dtype)
    before = {name: p.detach().float().clone() for name, p in params.items()}
    # mask_norm="masked" makes the perturbation as long as rho with a mask too.
    optimizer = FSAM(params.items(), rho=rho, mask=mask, mask_norm="masked", **arguments)
    optimizer.perturb()
    realised = {name: p.detach() - before[name] for name, p in params.items()}
    if mask is not None:
        grads = {name: grads[name] * optimizer.mask_of(p) for name, p in params.items()}
    return realised, intend(grads, rho)


def cast(weights: Tensors, eps: Tensors, dtype: torch.dtype, names: set[str]) -> Tensors:
    """What a model sees of eps added to fp32 weights if those of some names are cast: cast(w + eps) - cast(w)."""

    def seen(name: str, w: Tensor) -> Tensor:
        return w.to(dtype).float() if name in names else w

    return {name: seen(name, w + eps[name]) - seen(name, w) for name, w in weights.items()}


def rounded(weights: Tensors, dtype: torch.dtype) -> Tensors:
    """fp32 weights as they come from a checkpoint of `dtype`."""
    return {name: w.to(dtype).float() for name, w in weights.items()}


def dithered(weights: Tensors) -> Tensors:
    """Weights of a bf16 checkpoint with random low bits, which a cast to bf16 removes again."""
    generator = torch.Generator().manual_seed(1)
    out = {}
    for name, w in weights.items():
        spacing = torch.exp2(torch.frexp(w).exponent - 8.0)
        noisy = w + (torch.rand(w.shape, generator=generator) - 0.5) * spacing
        # Below a power of two the spacing is half of that above.
        out[name] = torch.where(noisy.bfloat16() == w, noisy, w)
    return out


def all_ways(weights: Tensors, grads: Tensors, rho: float, linear: set[str], mask: FisherMask | None = None) -> Rows:
    """Name and figures of each way to hold the weights; autocast casts those named `linear`."""
    realised, intended = perturb(weights, grads, rho, FP32, mask)
    yield "fp32 weights", compare(realised, intended, rho)

    def stored(dtype: torch.dtype, **arguments) -> Figures:
        return compare(*perturb(weights, grads, rho, dtype, mask, **arguments), rho)

    def seen(start: Tensors, dtype: torch.dtype, names: set[str]) -> Figures:
        return compare(cast(start, intended, dtype, names), intended, rho)

    yield "bf16 weights, to nearest", stored(BF16, stochastic_rounding=False)
    yield "bf16 weights, stochastically", stored(BF16)
    yield "bf16 weights, FSAM(master_weights=True)", stored(BF16, master_weights=True)
    yield "bf16 weights, FSAM(backup_format='8bit')", stored(BF16, backup_format="8bit")
    yield "bf16 weights, nearest(fp32 master + eps)", seen(weights, BF16, set(weights))
    yield "autocast to bf16, weights trained in fp32", seen(weights, BF16, linear)
    yield "autocast to bf16, bf16 checkpoint", seen(rounded(weights, BF16), BF16, linear)
    yield "autocast to bf16, the same, dithered", seen(dithered(rounded(weights, BF16)), BF16, linear)
    yield "fp16 weights, to nearest", stored(FP16, stochastic_rounding=False)
    yield "fp16 weights, stochastically", stored(FP16)
    yield "fp16 weights, FSAM(backup_format='8bit')", stored(FP16, backup_format="8bit")
    yield "autocast to fp16, weights trained in fp32", seen(weights, FP16, linear)
    yield "autocast to fp16, fp16 checkpoint", seen(rounded(weights, FP16), FP16, linear)


def cut_off(weights: Tensors, grads: Tensors, rho: float, dtype: torch.dtype) -> float:
    """The fraction of 16-bit weights that a one-byte backup keeps from moving as far as SAM would move them."""
    intended, count, cut = intend(grads, rho), 0, 0
    for name, w in weights.items():
        before = w.to(dtype)
        target = (before.float() + intended[name]).to(dtype)
        distance = formats.ordered(target.flatten()) - formats.ordered(before.flatten())
        count, cut = count + distance.numel(), cut + int((distance.abs() > 127).sum())
    return cut / count


def print_cut_off(weights: Tensors, grads: Tensors, radii: Sequence[float]) -> None:
    for name, dtype in (("bf16", BF16), ("fp16", FP16)):
        parts = (f"{cut_off(weights, grads, rho, dtype):.3%} at rho {rho}" for rho in radii)
        print(f"{name} weights that a one-byte backup keeps from moving as far: {', '.join(parts)}")
    print()


def print_table(title: str, columns: dict[str, Rows]) -> None:
    """Columns of figures side by side, whose rows have the same names."""
    print(f"{title}\n{'':41}" + "".join(f"{heading:>25}" for heading in columns))
    print(" " * 41 + f"{'norm':>9}{'cosine':>8}{'proj.':>8}" * len(columns))
    for row in zip(*columns.values(), strict=True):
        print(f"{row[0][0]:41}" + "".join(f"{a:9.3f}{b:8.3f}{c:8.3f}" for _, (a, b, c) in row), flush=True)
    print()


class FineTuning:
    """The packaged MiniLM on BBC news, after some steps of AdamW, so that the gradient is not the new head's alone."""

    def __init__(self, steps: int = 20) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        transformers.set_seed(0)
        texts, _ = read_bbc_news()
        labels, path = label_names(texts), model_path(Arguments())
        tokenizer = load_tokenizer(path)
        self.features = encode(tokenizer, texts, 32, labels)
        self.collate = transformers.DataCollatorWithPadding(tokenizer)
        # Not in training mode: dropout would make the loss random.
        self.model = load_model(path, labels)[0].eval()
        self.linear = {
            f"{name}.{part}"
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear)
            for part in ("weight", "bias")
        }
        for _ in self.train(steps, lr=2e-4):
            pass
        self.batch = self.draw()

    def draw(self) -> transformers.BatchEncoding:
        """A random batch."""
        return self.collate([self.features[i] for i in torch.randint(len(self.features), (8,))])

    def train(self, steps: int, lr: float) -> Iterator[int]:
        """Update the model with AdamW; yields the number of updates made, beginning with 0."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, fused=True)
        for step in range(steps):
            yield step
            optimizer.zero_grad()
            self.model(**self.draw()).loss.backward()
            optimizer.step()
        yield steps

    @property
    def weights(self) -> Tensors:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def loss_and_grads(self, weights: Tensors, autocast: bool = False) -> tuple[float, Tensors]:
        """Loss and gradients of the batch at given weights."""
        weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
        with torch.autocast("cpu", BF16, enabled=autocast):
            loss = torch.func.functional_call(self.model, weights, kwargs=dict(self.batch)).loss
        return loss.item(), dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def synthetic() -> None:
    params = make_parameters(bert_base_shapes()[5:53], FP32)
    weights = {str(i): p.detach() for i, p in enumerate(params)}
    grads = {str(i): p.grad for i, p in enumerate(params)}
    print_table(
        "1. Three layers of BERT-base, normally distributed: weights with standard deviation 0.02, and gradients",
        {f"rho {rho}": all_ways(weights, grads, rho, set(weights)) for rho in (0.02, RHO, 0.5)},
    )
    print_cut_off(weights, grads, (0.02, RHO, 0.5))


def real(task: FineTuning) -> None:
    weights = task.weights
    _, grads = task.loss_and_grads(weights)
    print_table(
        f"2. MiniLM on BBC news, rho {RHO}",
        {
            "all weights": all_ways(weights, grads, RHO, task.linear),
            "FisherMask(0.1)": all_ways(weights, grads, RHO, task.linear, FisherMask(0.1)),
        },
    )
    print_cut_off(weights, grads, (0.02, RHO, 0.5))


def losses(task: FineTuning) -> None:
    print(f"3. The loss of MiniLM, rho {RHO}: its change by the perturbation, the same over that in fp32, and the")
    print("cosine of the gradient at the perturbed weights to that in fp32")
    loss_table(task, "weights trained in fp32", task.weights)
    loss_table(task, "bf16 checkpoint", rounded(task.weights, BF16), checkpoint=True)
    print()


def loss_table(task: FineTuning, title: str, weights: Tensors, checkpoint: bool = False) -> None:
    start, grads = task.loss_and_grads(weights)
    intended = intend(grads, RHO)
    loss, target = task.loss_and_grads(add(weights, intended))
    full = loss - start

    def show(name: str, start: float, *results: tuple[float, Tensors]) -> None:
        changes = torch.tensor([loss - start for loss, _ in results], dtype=torch.float64)
        change = changes.mean()
        spread = f"  +-{changes.std():.4f}" if len(results) > 1 else ""
        cosine = sum(dot(grads, target) / norm(grads) / norm(target) for _, grads in results) / len(results)
        print(f"  {name:39}{change:9.4f}{spread:11}{change / full:6.3f}{cosine:8.3f}", flush=True)

    def autocast(name: str, weights: Tensors) -> None:
        start, _ = task.loss_and_grads(weights, autocast=True)
        show(name, start, task.loss_and_grads(add(weights, intended), autocast=True))

    print(f"{title:41}{'change':>9}{'':11}{'ratio':>6}{'cosine':>8}")
    show("fp32, not perturbed", start, (start, grads))
    show("fp32", start, (loss, target))
    autocast("autocast to bf16", weights)
    at = {name: w.to(BF16).float() if name in task.linear else w for name, w in weights.items()}
    seen = cast(weights, intended, BF16, task.linear)
    show("fp32, from cast(w) to cast(w + eps)", task.loss_and_grads(at)[0], task.loss_and_grads(add(at, seen)))
    if not checkpoint:
        return
    autocast("autocast to bf16, dithered", dithered(weights))
    nearest, _ = perturb(weights, grads, RHO, BF16, stochastic_rounding=False)
    show("bf16 weights, to nearest", start, task.loss_and_grads(add(weights, nearest)))
    random = [perturb(weights, grads, RHO, BF16, seed=seed)[0] for seed in range(4)]
    show("bf16 weights, stochastically, 4 seeds", start, *(task.loss_and_grads(add(weights, eps)) for eps in random))
    noise = [add(eps, intended, -1) for eps in random]
    show("their rounding noise alone", start, *(task.loss_and_grads(add(weights, eps)) for eps in noise))


def training(task: FineTuning) -> None:
    def rows() -> Rows:
        for updates in task.train(100, lr=2e-5):
            if updates in (0, 1, 10, 100):
                weights = task.weights
                intended = intend(task.loss_and_grads(weights)[1], RHO)
                seen = cast(weights, intended, BF16, task.linear)
                yield f"updates: {updates}", compare(seen, intended, RHO)

    task.model.load_state_dict(rounded(task.weights, BF16), strict=False)
    print_table(
        f"4. Autocast to bf16, MiniLM trained on from a bf16 checkpoint, lr 2e-5, rho {RHO}", {"all weights": rows()}
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    # More threads sum in another order, which shows in the last digits.
    torch.set_num_threads(1)
    synthetic()
    task = FineTuning()
    real(task)
    losses(task)
    training(task)


if __name__ == "__main__":
    main()
