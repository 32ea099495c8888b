"""The workloads of the benchmarks: whole optimizer steps over real models' parameters, ours and the alternatives."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import Parameter

from fsam_triton import FSAM, AdamWL2SP, FisherMask, MomentumSAM

from .baselines import LR, RHO, CompiledSAM, EagerSAM, MasterAdamW
from .traffic import ALL, BF16, FP32, PRECISIONS, Precision

Shapes = list[tuple[int, ...]]
Step = Callable[[], object]


def bert_shapes(layers: int, hidden: int, vocab: int = 30522, positions: int = 512, types: int = 2) -> Shapes:
    """Shapes of the parameters of a BERT with its pooler."""
    inner = 4 * hidden
    shapes: Shapes = [(vocab, hidden), (positions, hidden), (types, hidden), (hidden,), (hidden,)]
    for _ in range(layers):
        shapes += [(hidden, hidden), (hidden,)] * 4 + [(hidden,)] * 2
        shapes += [(inner, hidden), (inner,), (hidden, inner), (hidden,)] + [(hidden,)] * 2
    return [*shapes, (hidden, hidden), (hidden,)]


def bert_base_shapes() -> Shapes:
    """Shapes of the 199 parameter tensors of bert-base-uncased, 109,482,240 weights."""
    return bert_shapes(12, 768)


def tiny_llama_shapes() -> Shapes:
    """Shapes of the 201 parameter tensors of TinyLlama-1.1B, 1,100,048,384 weights."""
    vocab, hidden, inner, keys = 32000, 2048, 5632, 256
    layer: Shapes = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]
    return [(vocab, hidden), *layer * 22, (hidden,), (vocab, hidden)]


MODELS: dict[str, Callable[[], Shapes]] = {
    "MiniLM": lambda: bert_shapes(6, 384),
    "BERT-base": bert_base_shapes,
    "RoBERTa-large": lambda: bert_shapes(24, 1024, vocab=50265, positions=514, types=1),
    "TinyLlama-1.1B": tiny_llama_shapes,
}


def make_parameters(
    shapes: Iterable[tuple[int, ...]],
    dtype: torch.dtype,
    seed: int = 0,
    device: str = "cpu",
    period: int | None = None,
) -> list[Parameter]:
    """Parameters of a fine-tuned model's magnitude with a gradient each, the same for the same seed.

    Args:
        shapes: their shapes.
        dtype: their type.
        seed: of the random numbers (default: 0).
        device: where they are (default: "cpu").
        period: let the numbers begin anew after so many, which takes a fraction of the time to make (default: None,
            all are drawn).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], size: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * size).to(dtype).to(device)

    def repeated(shape: tuple[int, ...], numbers: Tensor) -> Tensor:
        flat = torch.empty(math.prod(shape), dtype=dtype, device=device)
        for part in flat.split(len(numbers)):
            part.copy_(numbers[: len(part)])
        return flat.view(shape)

    sizes = (0.02, 1e-3)
    if period is not None:
        both = [normal((period,), size) for size in sizes]
    params = []
    for shape in shapes:
        weight, grad = (
            normal(shape, size) if period is None else repeated(shape, both[i]) for i, size in enumerate(sizes)
        )
        p = Parameter(weight)
        p.grad = grad
        params.append(p)
    return params


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _fsam(params: Sequence[Parameter], precision: Precision, **arguments: object) -> Step:
    """Both halves of FSAM's step, whose second gradients are the first ones again, where a backward pass puts them."""
    optimizer = FSAM(params, lr=LR, rho=RHO, **precision.options, **precision.backup_options, **arguments)
    given = [p.grad for p in params]
    # GSAM keeps the first gradients, so the second ones need memory of their own.
    second = [grad.clone() for grad in given] if "alpha" in arguments else given

    def step() -> None:
        for p, grad in zip(params, given, strict=True):
            p.grad = grad
        optimizer.perturb()
        for p, grad in zip(params, second, strict=True):
            p.grad = grad
        optimizer.step()

    return step


def _single(kind: type[AdamWL2SP | MomentumSAM]) -> Callable[[Sequence[Parameter], Precision], Step]:
    def build(params: Sequence[Parameter], precision: Precision) -> Step:
        if kind is AdamWL2SP:
            return kind(params, lr=LR, **precision.options).step
        optimizer = kind(params, lr=LR, **precision.options, **precision.backup_options)
        # There is no module whose forward pass would begin.
        return lambda: (optimizer.perturb(), optimizer.step())

    return build


def _adamw(params: Sequence[Parameter], precision: Precision, **arguments: object) -> MasterAdamW | torch.optim.AdamW:
    return MasterAdamW(params, **arguments) if precision.master else torch.optim.AdamW(params, lr=LR, **arguments)


def _eager(params: Sequence[Parameter], precision: Precision, **arguments: object) -> Step:
    optimizer = EagerSAM(params, _adamw(params, precision, **arguments))
    return lambda: (optimizer.first_step(), optimizer.second_step())


def _published_sam(params: Sequence[Parameter], precision: Precision) -> Step:
    from pytorch_optimizer import SAM

    optimizer = SAM(params, base_optimizer=torch.optim.AdamW, rho=RHO, lr=LR, fused=True)
    return lambda: (optimizer.first_step(), optimizer.second_step())


def _published_gsam(params: Sequence[Parameter], precision: Precision) -> Step:
    from pytorch_optimizer import GSAM

    base = torch.optim.AdamW(params, lr=LR, fused=True)
    optimizer = GSAM(params, base, torch.nn.Module(), SimpleNamespace(step=lambda: RHO), alpha=0.4)
    return lambda: optimizer.step(lambda: (None, None))


@dataclass(frozen=True)
class Implementation:
    """A way to make a step.

    Attributes:
        name: what the tables call it.
        algorithm: which step it makes, a key of `traffic.STEPS`.
        build: takes parameters with gradients and the precision, and returns the step, gradients being in place.
        copies: how many tensors of the weights' size and type it takes at most, beyond weights and gradients, if there
            are no masters.
        precisions: what it can do.
        package: which package it needs besides torch.
    """

    name: str
    algorithm: str
    build: Callable[[Sequence[Parameter], Precision], Step]
    copies: int
    precisions: tuple[Precision, ...] = PRECISIONS
    package: str = "torch"

    def room(self, weights: int, precision: Precision) -> int:
        """Bytes that it takes at most, parameters and gradients included."""
        masters = 16 if precision.master else 0
        return weights * ((2 + self.copies) * precision.bytes + masters)


_PLAIN = (FP32, BF16)
IMPLEMENTATIONS = (
    Implementation("FSAM", "SAM", _fsam, 4, ALL),
    Implementation(
        "FSAM, rounding to nearest", "SAM", lambda *args: _fsam(*args, stochastic_rounding=False), 4, (BF16,)
    ),
    Implementation("eager SAM over fused AdamW", "SAM", lambda *args: _eager(*args, fused=True), 4),
    Implementation("eager SAM over foreach AdamW", "SAM", lambda *args: _eager(*args, foreach=True), 6),
    Implementation("compiled SAM and AdamW", "SAM", lambda params, _: CompiledSAM(params).step, 4, _PLAIN),
    Implementation("pytorch_optimizer SAM over fused AdamW", "SAM", _published_sam, 4, _PLAIN, "pytorch_optimizer"),
    Implementation(
        "FSAM with a Fisher mask", "Fisher-SAM", lambda *args: _fsam(*args, mask=FisherMask(0.1, interval=10**6)), 5
    ),
    Implementation("FSAM with alpha", "GSAM", lambda *args: _fsam(*args, alpha=0.4), 5),
    Implementation("pytorch_optimizer GSAM over fused AdamW", "GSAM", _published_gsam, 5, _PLAIN, "pytorch_optimizer"),
    Implementation("MomentumSAM", "momentum-SAM", _single(MomentumSAM), 4, ALL),
    Implementation("AdamWL2SP", "AdamW", _single(AdamWL2SP), 3, ALL),
    Implementation("torch.optim.AdamW, fused", "AdamW", lambda *args: _adamw(*args, fused=True).step, 3),
)
