"""pytest-benchmark of each pass over flat tensors: ours, the reference run eagerly, and under torch.compile.

pytest bench/test_kernels.py --benchmark-only [-k "AdamW and fp32"]
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch.nn import Parameter

from fsam_triton import AdamWL2SP, ops
from fsam_triton.kernels import formats, reference, spec
from fsam_triton.kernels.segments import Plan, Segments

from . import traffic
from .baselines import BETAS, EPS, LR, WEIGHT_DECAY
from .harness import Case
from .memory import build_and_measure
from .traffic import ALL, BF16, FP32, PRECISIONS, SHORT, Precision, Traffic
from .workloads import is_installed

ELEMENTS = 1 << 25
ASCENT = {"scale": 1e-5, "chance": 0.0}
DESCENT = {
    **{"factor": 1.0, "other": -0.3, "rate": 0.0, "decay": 0.0},
    **{"new1": 0.1, "beta2": 0.999, "new2": 0.001, "step_size": 1e-5, "inv_sqrt_bias2": 1.2, "eps": 1e-8},
}


def norm(passes, t: SimpleNamespace, masked: bool = False) -> None:
    passes.norm_sq(t.segments, False, t.mask if masked else None)


def norm_of_moments(passes, t: SimpleNamespace) -> None:
    passes.norm_sq(t.along_moments, False, None, t.scales[0])


def gap(passes, t: SimpleNamespace) -> None:
    passes.gap(t.combining)


def perturb(passes, t: SimpleNamespace, masked: bool = False, random: bool = False) -> None:
    mask = t.mask if masked else None
    passes.perturb_(t.segments, t.backup, mask, t.ascent, t.key, False, t.rounds, random)


def adamw(passes, t: SimpleNamespace, anchored: bool = False, combining: bool = False) -> None:
    segments, anchor = t.combining if combining else t.perturbed, t.anchor if anchored else None
    lanes = (t.state, t.remainder, anchor, None, None)
    passes.descend_(segments, *lanes, t.descent, t.key, "adamw", t.rounds, t.scales, t.steps)


@dataclass(frozen=True)
class Pass:
    """A pass, the bytes a weight it needs, and the weights for which it is timed."""

    run: Callable[..., None]
    traffic: Callable[[Precision], Traffic]
    precisions: tuple[Precision, ...] = (FP32, BF16)


PASSES = {
    "norm": Pass(norm, traffic.norm),
    "norm of moments": Pass(norm_of_moments, lambda p: Traffic(read=p.moment_bytes), (SHORT,)),
    "norm on a mask": Pass(lambda *a: norm(*a, masked=True), lambda p: traffic.norm(p) + traffic.mask_words()),
    "three dot products": Pass(gap, lambda p: traffic.dots(p.bytes, p.bytes)),
    "perturb": Pass(perturb, traffic.perturb, (FP32, BF16, SHORT)),
    "perturb on a mask": Pass(lambda *a: perturb(*a, masked=True), lambda p: traffic.perturb(p) + traffic.mask_words()),
    "perturb a random half": Pass(lambda *a: perturb(*a, random=True), traffic.perturb),
    "restore and AdamW": Pass(adamw, traffic.descend, ALL),
    "with L2-SP": Pass(lambda *a: adamw(*a, anchored=True), lambda p: traffic.descend(p) + Traffic(read=p.bytes)),
    "with GSAM's second gradient": Pass(
        lambda *a: adamw(*a, combining=True),
        lambda p: traffic.descend(p) + traffic.second_gradient(p),
        PRECISIONS,
    ),
}


CASES = [
    pytest.param(precision, name, id=f"{precision.name}-{name}")
    for precision in ALL
    for name in PASSES
    if precision in PASSES[name].precisions
]


@pytest.fixture(scope="module")
def precision(request):
    return request.param


@pytest.fixture(scope="module")
def tensors(device, precision, tiny):
    return make_tensors(device, precision, 1 << 12 if tiny else ELEMENTS)


def make_tensors(device: str, precision: Precision, n: int) -> SimpleNamespace:
    """What the passes take, n weights as one tensor."""
    plan = Plan([n], torch.device(device))
    weight, grad, other, anchor = (torch.randn(n, device=device).mul_(0.01).to(precision.dtype) for _ in range(4))
    backup, steps, scales = weight.clone(), None, ()
    moments = torch.float32 if precision.master else precision.dtype
    state = [grad.to(moments, copy=True), grad.to(moments).square()]
    if precision.is_short:
        backup = steps = torch.zeros(n, dtype=torch.int8, device=device)
        state, scales = zip(*(formats.encode(lane, i == 0) for i, lane in enumerate(state)), strict=True)
    remainder = {0: None, 1: torch.int8, 2: torch.int16}[precision.remainder_bytes]
    # Else they are the weights themselves, from which steps are counted.
    clean = None if precision.is_short else [backup]
    coefs = {
        name: torch.tensor([[numbers[column] for column in columns]], device=device)
        for name, numbers, columns in (
            ("ascent", ASCENT, spec.PERTURB),
            ("descent", DESCENT, spec.DESCEND["adamw"]),
        )
    }
    return SimpleNamespace(
        segments=Segments(plan, [weight], [grad]),
        along_moments=Segments(plan, [weight], [state[0]]),
        perturbed=Segments(plan, [weight], [grad], clean=clean),
        combining=Segments(plan, [weight], [grad], clean=clean, other=[other]),
        backup=backup,
        anchor=anchor,
        state=state,
        scales=scales,
        steps=steps,
        remainder=None if remainder is None else torch.zeros(n, dtype=remainder, device=device),
        mask=torch.randint(-(1 << 31), 1 << 31, (n // 32,), device=device).to(torch.int32),
        key=torch.tensor([12345], dtype=torch.int32, device=device),
        rounds=precision.bytes == 2 and precision.remainder_bytes < 2,
        n=n,
        **coefs,
    )


def compiled():
    """What a user would do: each function of the reference under torch.compile."""
    names = ("norm_sq", "gap", "perturb_", "descend_")
    return SimpleNamespace(**{name: torch.compile(getattr(reference, name)) for name in names})


IMPLEMENTATIONS = {"fsam_triton": lambda: ops, "eager": lambda: reference, "torch.compile": compiled}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("precision", "name"), CASES, indirect=["precision"], scope="module")
def test_pass(record, tensors, precision, name, implementation):
    one = PASSES[name]
    n = tensors.n
    if implementation == "torch.compile" and one.run is adamw and precision.is_short:
        pytest.skip("torch.compile takes no weights that are read as clean ones and written")

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


@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"], indirect=True, scope="module")
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
