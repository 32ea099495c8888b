"""The passes on whatever device the tensors are: Triton on CUDA and ROCm, C++ on CPU, PyTorch where neither is there.

Arguments and results are described in `fsam_triton.kernels.reference`, which has a function for each pass. Under
TRITON_INTERPRET=1 CPU tensors go through the Triton kernels, so that their numbers can be tested anywhere.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .kernels import build, reference


@functools.cache
def _triton() -> types.SimpleNamespace:
    """The Triton launchers, imported on first use: a machine without a GPU need not have Triton."""
    from .kernels import coefficients, descend, fisher, gap, noise, norm, perturb, sparse, topk_mask

    return types.SimpleNamespace(
        norm_sq=norm.norm_sq,
        norms_sq=norm.norms_sq,
        gap=gap.gap,
        climb_coefficients=coefficients.climb_coefficients,
        perturb_=perturb.perturb_,
        descend_coefficients=coefficients.descend_coefficients,
        descend_=descend.descend_,
        add_noise_=noise.add_noise_,
        digit_histogram=topk_mask.digit_histogram,
        write_mask_=topk_mask.write_mask_,
        gather_=sparse.gather_,
        scatter_=sparse.scatter_,
        linear_fisher_=fisher.linear_fisher_,
    )


@functools.cache
def interpreting() -> bool:
    """Whether Triton's interpreter is on (TRITON_INTERPRET=1 at the first call), so that kernels run on CPU tensors."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


def _pass(name: str, device_of: Callable[..., torch.device], place: int = 0) -> Callable[..., Any]:
    @functools.wraps(getattr(reference, name))
    def call(*args: Any) -> Any:
        device = device_of(args[place])
        if device.type == "cuda":
            # A kernel runs on the current device, which need not be the tensors'.
            with torch.cuda.device(device):
                return getattr(_triton(), name)(*args)
        if device.type == "cpu" and interpreting():
            return getattr(_triton(), name)(*args)
        if device.type == "cpu" and build.available():
            from .kernels import cpu

            return getattr(cpu, name)(*args)
        return getattr(reference, name)(*args)

    return call


norm_sq, norms_sq, gap, perturb_, descend_ = (
    _pass(name, lambda segments: segments.plan.device)
    for name in ("norm_sq", "norms_sq", "gap", "perturb_", "descend_")
)
digit_histogram, write_mask_, gather_, add_noise_ = (
    _pass(name, lambda tensor: tensor.device) for name in ("digit_histogram", "write_mask_", "gather_", "add_noise_")
)
scatter_ = _pass("scatter_", lambda tensors: tensors[0].device)
climb_coefficients = _pass("climb_coefficients", lambda numbers: numbers.device)
descend_coefficients = _pass("descend_coefficients", lambda numbers: numbers.device, 2)


def linear_fisher_(fisher: Tensor, inputs: Tensor, output_grads: Tensor, absolute: bool) -> None:
    """As `reference.linear_fisher_`."""
    if fisher.is_cuda:
        with torch.cuda.device(fisher.device):
            return _triton().linear_fisher_(fisher, inputs, output_grads, absolute)
    if fisher.device.type == "cpu" and interpreting():
        return _triton().linear_fisher_(fisher, inputs, output_grads, absolute)
    # Padding has no gradient, nor has most of the last layer if the classifier looks at one token: to leave these
    # positions out saves flops. (A GPU would have to be waited for to know which they are.)
    used = output_grads.any(-1)
    common = used.any(0)
    if not common.all():
        inputs, output_grads, used = inputs[:, common], output_grads[:, common], used[:, common]
    if used.all() or used.shape[1] == 1:
        return reference.linear_fisher_(fisher, inputs, output_grads, absolute)
    for a, d, rows in zip(inputs, output_grads, used, strict=True):
        reference.linear_fisher_(fisher, a[None, rows], d[None, rows], absolute)
    return None
