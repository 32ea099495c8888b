"""Perturbations as arguments of FSAM and of the fp64 reference, and what tests of them share."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, AdamWL2SP, FisherMask
from tests.fp64_optimizers import Entry, ReferenceFSAM, ReferenceMask
from tests.problem import Problem, small_model

WIDE = [torch.float32, torch.float64]
NON_FINITE = [float("nan"), float("inf"), -float("inf")]
PRECISIONS = {
    "fp64": (torch.float64, {}),
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "fp16": (torch.float16, {}),
    "bf16_master": (torch.bfloat16, {"master_weights": True}),
    "fp16_master": (torch.float16, {"master_weights": True}),
}
every_precision = pytest.mark.parametrize(("dtype", "kwargs"), PRECISIONS.values(), ids=PRECISIONS.keys())


def bias_or_norm(entry: Entry) -> bool:
    return "bias" in entry.name or "norm" in entry.name


def norm(entry: Entry) -> bool:
    return "norm" in entry.name


@dataclass(frozen=True)
class Variant:
    """A perturbation, as FSAM's arguments and as the reference's; masks are built anew for every optimizer."""

    name: str
    kwargs: dict = field(default_factory=dict)
    mask: Callable[[], FisherMask | None] = lambda: None
    mask_norm: str = "all"
    expected: ReferenceMask | None = None

    def optimizer(self, params, **kwargs) -> FSAM:
        return FSAM(params, mask=self.mask(), mask_norm=self.mask_norm, **self.kwargs, **kwargs)

    def reference(self, params, **kwargs) -> ReferenceFSAM:
        return ReferenceFSAM(params, mask=self.expected, **self.kwargs, **kwargs)


VARIANTS = [
    Variant("sam"),
    Variant("sam_of_large_rho", {"rho": 2.0}),
    Variant("asam", {"adaptive": True, "rho": 0.5}),
    Variant(
        "fisher_sam",
        {"rho": 0.5},
        lambda: FisherMask(0.3, interval=5),
        expected=ReferenceMask(0.3, interval=5, is_excluded=bias_or_norm),
    ),
    Variant(
        "fisher_sam_norm_over_the_mask_excluded_never",
        {"rho": 0.5},
        lambda: FisherMask(0.1, interval=5, excluded="never"),
        "masked",
        ReferenceMask(0.1, interval=5, excluded="never", norm="masked", is_excluded=bias_or_norm),
    ),
    Variant(
        "fisher_asam_norm_over_the_mask",
        {"adaptive": True, "rho": 0.5},
        lambda: FisherMask(0.3, interval=5),
        "masked",
        ReferenceMask(0.3, interval=5, norm="masked", is_excluded=bias_or_norm),
    ),
    Variant(
        "fisher_sam_of_two_samples",
        {"rho": 0.5},
        lambda: FisherMask(0.3, interval=5, samples=2),
        expected=ReferenceMask(0.3, interval=5, samples=2, is_excluded=bias_or_norm),
    ),
    Variant(
        "fisher_sam_of_tensors",
        {"rho": 0.5},
        lambda: FisherMask(0.75, interval=5, unit="tensor", exclude=["norm"], excluded="never"),
        "masked",
        ReferenceMask(0.75, 5, excluded="never", norm="masked", unit="tensor", is_excluded=norm),
    ),
    Variant(
        "fisher_sam_of_rows",
        {"rho": 0.5},
        lambda: FisherMask(0.3, interval=5, unit="row"),
        "masked",
        ReferenceMask(0.3, interval=5, norm="masked", unit="row", is_excluded=bias_or_norm),
    ),
    Variant(
        "fisher_asam_of_32_neighbours_of_two_samples",
        {"adaptive": True, "rho": 0.5},
        lambda: FisherMask(0.3, interval=5, samples=2, unit=32),
        expected=ReferenceMask(0.3, interval=5, samples=2, unit=32, is_excluded=bias_or_norm),
    ),
]
by_name = functools.partial(pytest.mark.parametrize, ids=lambda variant: variant.name)
every_variant = by_name("variant", VARIANTS)
MASKED = VARIANTS[3]
FISHER_ASAM = VARIANTS[5]


def pair(dtype: torch.dtype, variant: Variant, **kwargs):
    """A model under FSAM and its twin under AdamWL2SP, with the same arguments."""
    model, twin = small_model(dtype), small_model(dtype)
    shared = {"lr": 0.01, "l2_sp": 0.1, **kwargs}
    plain = AdamWL2SP(twin.named_parameters(), **shared)
    return model, variant.optimizer(model.named_parameters(), **shared), twin, plain


def spoil(model: nn.Module, value: float) -> None:
    """Zero makes the whole gradient zero; a value that is not finite goes to one coordinate."""
    if value == 0:
        for parameter in model.parameters():
            parameter.grad.zero_()
    else:
        model["dense"].weight.grad[3, 5] = value


def assert_same_states(model: nn.Module, optimizer, other: nn.Module, other_optimizer) -> None:
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        for name, value in other_optimizer.state[twin].items():
            assert torch.equal(optimizer.state[parameter][name], value), name


def loss_of(problem: Problem, optimizer, parameters, step: int) -> Tensor:
    optimizer.zero_grad()
    loss = problem.loss(parameters, step)
    loss.backward()
    return loss
