"""The passes on whatever device the tensors are: Triton on CUDA and ROCm, C++ on CPU, PyTorch where neither is there.

Arguments and results are described in `fsam_triton.kernels.reference`, which has a function for each pass. Under
TRITON_INTERPRET=1 CPU tensors go through the Triton kernels, so that their numbers can be tested anywhere.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from .kernels import build, reference
from .kernels.segments import Segments

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


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
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


def _pass(
    slow: Callable[Arguments, Result], device_of: Callable[[Any], torch.device], place: int = 0
) -> Callable[Arguments, Result]:
    name = slow.__name__

    @functools.wraps(slow)
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

    return cast("Callable[Arguments, Result]", call)


def _of_segments(segments: Segments) -> torch.device:
    return segments.plan.device


def _of_tensor(tensor: Tensor) -> torch.device:
    return tensor.device


def _of_tensors(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device


norm_sq = _pass(reference.norm_sq, _of_segments)
norms_sq = _pass(reference.norms_sq, _of_segments)
gap = _pass(reference.gap, _of_segments)
perturb_ = _pass(reference.perturb_, _of_segments)
descend_ = _pass(reference.descend_, _of_segments)
digit_histogram = _pass(reference.digit_histogram, _of_tensor)
write_mask_ = _pass(reference.write_mask_, _of_tensor)
gather_ = _pass(reference.gather_, _of_tensor)
add_noise_ = _pass(reference.add_noise_, _of_tensor)
scatter_ = _pass(reference.scatter_, _of_tensors)
climb_coefficients = _pass(reference.climb_coefficients, _of_tensor)
descend_coefficients = _pass(reference.descend_coefficients, _of_tensor, 2)


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
