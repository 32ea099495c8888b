"""Gradient accumulation: a step over micro-batches equals one over the whole batch, in both passes."""

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from fsam_triton import FSAM, FisherMask, MomentumSAM
from tests.problem import small_model
from tests.training import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")

# Adam's quotient of a gradient near zero is of no use for comparisons: with eps = 1 it is as exact as the gradient.
COMMON = {"lr": 0.01, "rho": 0.5, "eps": 1.0}
VARIANTS = {
    "sam": {},
    "asam": {"adaptive": True},
    "gsam": {"alpha": 0.4},
    "fsam": {"mask": FisherMask(0.3, interval=2)},
    "clipped": {"max_grad_norm": 0.1},
}
every_variant = pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
# Relative to the largest weight, and measured in the size of the rounding errors of one gradient.
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12}
STEPS = 5


def batch_of(dtype: torch.dtype, step: int) -> tuple[Tensor, Tensor]:
    """Sixteen samples."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(16, 24, dtype=torch.float64, generator=generator)
    return inputs.to(dtype), torch.randint(8, (16,), generator=generator)


def loss_of(model: nn.ModuleDict, inputs: Tensor, labels: Tensor) -> Tensor:
    hidden = model["norm"](model["dense"](inputs)).tanh()
    return nn.functional.cross_entropy(model["head"](hidden), labels)


def micro_batches(dtype: torch.dtype, step: int, parts: int) -> list[tuple[Tensor, Tensor]]:
    inputs, labels = batch_of(dtype, step)
    return list(zip(inputs.chunk(parts), labels.chunk(parts), strict=True))


def accumulate(model: nn.ModuleDict, parts: list[tuple[Tensor, Tensor]], scaler: GradScaler | None = None) -> Tensor:
    """Forward and backward over micro-batches; returns the mean loss."""
    total = torch.zeros(())
    for inputs, labels in parts:
        loss = loss_of(model, inputs, labels) / len(parts)
        (loss if scaler is None else scaler.scale(loss)).backward()
        total = total + loss.detach()
    return total


def by_closure(model: nn.ModuleDict, optimizer, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    def closure() -> Tensor:
        optimizer.zero_grad()
        return accumulate(model, parts)

    return optimizer.step(closure)


def by_hand(model: nn.ModuleDict, optimizer: FSAM, parts: list[tuple[Tensor, Tensor]]) -> None:
    optimizer.zero_grad()
    accumulate(model, parts)
    optimizer.perturb()
    accumulate(model, parts)
    optimizer.step()


def by_scaler(model: nn.ModuleDict, optimizer: FSAM, parts: list[tuple[Tensor, Tensor]], scaler: GradScaler) -> None:
    optimizer.zero_grad()
    accumulate(model, parts, scaler)
    optimizer.perturb(scaler)
    accumulate(model, parts, scaler)
    scaler.step(optimizer)
    scaler.update()


def assert_close(model: nn.Module, twin: nn.Module) -> None:
    dtype = next(model.parameters()).dtype
    largest = max(float(p.detach().abs().max()) for p in twin.parameters())
    for (name, actual), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        worst = float((actual.detach() - expected.detach()).abs().max())
        assert worst <= TOLERANCES[dtype] * largest, name


def pair(dtype: torch.dtype, **kwargs) -> tuple[nn.ModuleDict, FSAM]:
    model = small_model(dtype)
    return model, FSAM(model.named_parameters(), **{**COMMON, **kwargs})


@every_variant
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_four_times_four_samples_in_a_closure_are_sixteen(kwargs, dtype):
    (model, optimizer), (twin, whole) = pair(dtype, **kwargs), pair(dtype, **kwargs)
    for step in range(STEPS):
        loss = by_closure(model, optimizer, micro_batches(dtype, step, 4))
        expected = by_closure(twin, whole, micro_batches(dtype, step, 1))
        assert float(loss) == pytest.approx(float(expected), rel=TOLERANCES[torch.float32])
    assert_close(model, twin)


def test_four_times_four_samples_under_momentum_sam_are_sixteen():
    model, twin = small_model(torch.float64), small_model(torch.float64)
    optimizer, whole = MomentumSAM(model.parameters(), **COMMON), MomentumSAM(twin.parameters(), **COMMON)
    for step in range(STEPS):
        by_closure(model, optimizer, micro_batches(torch.float64, step, 4))
        by_closure(twin, whole, micro_batches(torch.float64, step, 1))
    assert_close(model, twin)


def test_perturbation_is_by_the_accumulated_gradient_not_the_last_micro_batchs():
    (model, optimizer), (twin, last) = pair(torch.float64), pair(torch.float64)
    parts = micro_batches(torch.float64, 0, 4)
    accumulate(model, parts)
    optimizer.perturb()
    accumulate(twin, parts[-1:])
    last.perturb()
    moved, moved_by_last = (
        torch.cat([(p - w).detach().flatten() for p, w in zip(m.parameters(), small_model().parameters(), strict=True)])
        for m in (model, twin)
    )
    assert float(nn.functional.cosine_similarity(moved, moved_by_last, dim=0)) < 0.9


@every_variant
def test_two_passes_by_hand_equal_the_closure_to_the_bit(kwargs):
    (model, optimizer), (twin, closured) = pair(torch.float32, **kwargs), pair(torch.float32, **kwargs)
    for step in range(STEPS):
        by_hand(model, optimizer, micro_batches(torch.float32, step, 4))
        by_closure(twin, closured, micro_batches(torch.float32, step, 4))
    assert_same_bits(model, twin)


@every_variant
def test_two_passes_with_a_scaler_equal_those_without_to_the_bit(kwargs):
    (model, optimizer), (twin, straight) = pair(torch.float32, **kwargs), pair(torch.float32, **kwargs)
    scaler = GradScaler("cpu", init_scale=1024.0)
    for step in range(STEPS):
        by_scaler(model, optimizer, micro_batches(torch.float32, step, 4), scaler)
        by_hand(twin, straight, micro_batches(torch.float32, step, 4))
    assert_same_bits(model, twin)


def test_overflow_in_one_micro_batch_of_the_first_pass_perturbs_nothing():
    model, optimizer = pair(torch.float32)
    scaler = GradScaler("cpu", init_scale=1024.0)
    parts = micro_batches(torch.float32, 0, 4)
    parts[1][0][0, 0] = float("inf")
    accumulate(model, parts, scaler)
    optimizer.perturb(scaler)
    assert_same_bits(model, small_model())


def test_closure_that_does_nothing_is_refused_and_the_weights_are_restored():
    """As Lightning's manual optimization passes one where none is given: the step would lose the gradients."""
    model, optimizer = pair(torch.float32)
    accumulate(model, micro_batches(torch.float32, 0, 4))
    with pytest.raises(RuntimeError, match="backward"):
        optimizer.step(lambda: None)
    assert_same_bits(model, small_model())


def test_second_pass_that_leaves_out_the_backward_is_refused_and_the_weights_are_restored():
    model, optimizer = pair(torch.float32)
    parts = micro_batches(torch.float32, 0, 4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        return loss_of(model, *parts[0]).detach() if optimizer.perturbed else accumulate(model, parts)

    with pytest.raises(RuntimeError, match="backward"):
        optimizer.step(closure)
    assert_same_bits(model, small_model())
