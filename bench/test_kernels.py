"""pytest-benchmark of each pass over flat tensors: ours, the reference run eagerly, and under torch.compile.

pytest bench/test_kernels.py --benchmark-only [-k "AdamW and fp32"]
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fsam_triton import AdamWL2SP, ops
from fsam_triton.kernels import reference

from . import traffic
from .baselines import BETAS, EPS, LR, WEIGHT_DECAY
from .harness import Case
from .memory import build_and_measure
from .traffic import BF16, FP32, PRECISIONS, Precision, Traffic
from .workloads import is_installed

ELEMENTS = 1 << 25
ASCENT = [1e-5, 12345.0]
RANDOM_ASCENT = [*ASCENT, 0.0]
DESCENT = [1.0, 0.0, 0.1, 0.999, 0.001, 1e-5, 1.2, 1e-8, 54321.0]
# With what to multiply a second gradient with, the scale of the next perturbation and its key.
LONG_DESCENT = [*DESCENT, -0.3, -1e-3, 67890.0]

Tensors = dict[str, Tensor | None]


def norm(passes, t: Tensors, masked: bool = False) -> None:
    passes.grad_norm_sq(t["grad"], None, t["mask"] if masked else None)


def gap(passes, t: Tensors) -> None:
    passes.surrogate_gap(t["other_grad"], t["grad"])


def perturb(passes, t: Tensors, masked: bool = False, random: bool = False) -> None:
    mask = t["mask"] if masked else None
    coef = t["random_ascent"] if random else t["ascent"]
    passes.perturb_(t["weight"], t["grad"], t["backup"], mask, coef, False, t["rounds"], False, random)


def adamw(passes, t: Tensors, coef: str = "descent", anchored: bool = False, other: bool = False, again: bool = False):
    passes.adamw_l2sp_(
        *(t[name] for name in ("weight", "grad", "m", "v")),
        *(None, t["backup"], t["master"], t["anchor"] if anchored else None),
        *(t[coef], t["rounds"], False, t["other_grad"] if other else None, False, again),
    )


@dataclass(frozen=True)
class Pass:
    """A pass, the bytes a weight it needs, and the weights for which it is timed."""

    run: Callable[..., None]
    traffic: Callable[[Precision], Traffic]
    precisions: tuple[Precision, ...] = (FP32, BF16)


PASSES = {
    "norm": Pass(norm, traffic.norm),
    "norm on a mask": Pass(lambda *a: norm(*a, masked=True), lambda p: traffic.norm(p) + traffic.mask_words()),
    "three dot products": Pass(gap, lambda p: traffic.dots(p.bytes, p.bytes)),
    "perturb": Pass(perturb, traffic.perturb, PRECISIONS),
    "perturb on a mask": Pass(lambda *a: perturb(*a, masked=True), lambda p: traffic.perturb(p) + traffic.mask_words()),
    "perturb a random half": Pass(lambda *a: perturb(*a, random=True), traffic.perturb),
    "restore and AdamW": Pass(adamw, traffic.descend, PRECISIONS),
    "with L2-SP": Pass(lambda *a: adamw(*a, anchored=True), lambda p: traffic.descend(p) + Traffic(read=p.bytes)),
    "with GSAM's second gradient": Pass(
        lambda *a: adamw(*a, "long_descent", other=True),
        lambda p: traffic.descend(p) + traffic.second_gradient(p),
        PRECISIONS,
    ),
    "with momentum-SAM's perturbation": Pass(
        lambda *a: adamw(*a, "long_descent", again=True), traffic.descend_and_perturb, PRECISIONS
    ),
}


CASES = [
    pytest.param(precision, name, id=f"{precision.name}-{name}")
    for precision in PRECISIONS
    for name in PASSES
    if precision in PASSES[name].precisions
]


@pytest.fixture(scope="module")
def precision(request):
    return request.param


@pytest.fixture(scope="module")
def tensors(device, precision, tiny):
    n = 1 << 12 if tiny else ELEMENTS
    names = ("weight", "grad", "other_grad", "anchor")
    flat = {name: torch.randn(n, device=device).mul_(0.01).to(precision.dtype) for name in names}
    moments = torch.float32 if precision.master else precision.dtype
    flat["m"], flat["v"] = flat["grad"].to(moments, copy=True), flat["grad"].to(moments).square()
    flat["backup"] = None if precision.master else flat["weight"].clone()
    flat["master"] = flat["weight"].float() if precision.master else None
    flat["mask"] = torch.randint(-(1 << 31), 1 << 31, (n // 32,), device=device).to(torch.int32)
    lists = {"ascent": ASCENT, "random_ascent": RANDOM_ASCENT, "descent": DESCENT, "long_descent": LONG_DESCENT}
    coefs = {name: torch.tensor(numbers, dtype=torch.float64, device=device) for name, numbers in lists.items()}
    return {**flat, **coefs, "rounds": precision.bytes == 2 and not precision.master}


def compiled():
    """What a user would do: each function of the reference under torch.compile."""
    names = ("grad_norm_sq", "surrogate_gap", "perturb_", "adamw_l2sp_")
    return SimpleNamespace(**{name: torch.compile(getattr(reference, name)) for name in names})


IMPLEMENTATIONS = {"fsam_triton": lambda: ops, "eager": lambda: reference, "torch.compile": compiled}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("precision", "name"), CASES, indirect=["precision"])
def test_pass(record, tensors, precision, name, implementation):
    one = PASSES[name]
    n = tensors["weight"].numel()

    def build():
        passes = IMPLEMENTATIONS[implementation]()

        @torch.no_grad()
        def run():
            one.run(passes, tensors)

        return run

    record(Case("passes", name, implementation, "flat", precision, n, one.traffic(precision)), build)


def ours(p):
    return AdamWL2SP([p], lr=LR)


def torch_fused(p):
    return torch.optim.AdamW([p], lr=LR, fused=True)


def optimi(p):
    from optimi import AdamW

    return AdamW([p], lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, triton=True)


def flashoptim(p):
    from flashoptim import FlashAdamW

    return FlashAdamW([p], lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)


# Which keep Kahan sums or 8-bit moments: time is to be compared by the byte, not by the weight.
UPDATES = {
    "AdamWL2SP": ours,
    "torch.optim.AdamW, fused": torch_fused,
    "torch-optimi": optimi,
    "flashoptim": flashoptim,
}
PACKAGES = {"torch-optimi": "optimi", "flashoptim": "flashoptim"}


@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"], indirect=True)
@pytest.mark.parametrize("implementation", UPDATES)
def test_update_alone(record, device, tiny, precision, implementation):
    if not is_installed(PACKAGES.get(implementation, "torch")):
        pytest.skip(f"{implementation} is not installed")
    if device == "cpu" and implementation in PACKAGES:
        pytest.skip("its kernels are for GPUs")
    n = 1 << 12 if tiny else ELEMENTS

    def build():
        p = Parameter(torch.randn(n, device=device).mul_(0.01).to(precision.dtype))
        p.grad = p.detach().clone()
        return UPDATES[implementation](p).step

    inputs = 2 * n * precision.bytes
    state = build_and_measure(build, device, inputs)[1].held / n
    needed = Traffic(read=precision.bytes, updated=precision.bytes + state)
    record(Case("updates", "AdamW", implementation, "flat", precision, n, needed), build, inputs=inputs)
