"""The passes as `torch.library` operators: Triton on CUDA and ROCm tensors, C++ on CPU tensors.

Under TRITON_INTERPRET=1 CPU tensors go through the Triton kernels too, so that their numbers can be tested anywhere.
Arguments and results are described in `fsam_triton.kernels.reference`, which has a function for each operator.
"""

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .kernels import passes_cpu, reference, sparse_cpu, topk_mask_cpu

_library = torch.library.Library("fsam_triton", "DEF")

_library.define("grad_norm_sq(Tensor grad, Tensor? weight, Tensor? mask) -> Tensor")
_library.define("surrogate_gap(Tensor first, Tensor second) -> Tensor")
_library.define(
    "perturb_(Tensor(a!) weight, Tensor(b!) grad, Tensor(c!)? backup, Tensor? mask, Tensor coef, "
    "bool adaptive, bool stochastic, bool zero_grad, bool random=False) -> ()"
)
_library.define(
    "adamw_l2sp_(Tensor(a!) weight, Tensor(b!) grad, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, "
    "Tensor(e!)? max_exp_avg_sq, Tensor(f!)? backup, Tensor(g!)? master, Tensor? anchor, Tensor coef, "
    "bool stochastic, bool zero_grad, Tensor(h!)? other_grad=None, bool keep_orthogonal=False, bool perturb=False, "
    "Tensor(i!)? ema=None) -> ()"
)
_library.define("digit_histogram(Tensor values, Tensor prefix, int shift, int bits, bool wide) -> Tensor")
_library.define("write_mask_(Tensor(a!) mask, Tensor values, Tensor threshold, Tensor quota, bool wide) -> Tensor")
_library.define("gather_(Tensor(a!) out, Tensor[] sources, Tensor index, int[] offsets, int[] counts) -> ()")
_library.define("scatter_(Tensor(a!)[] targets, Tensor index, Tensor source, int[] offsets, int[] counts) -> ()")
_library.define("linear_fisher_(Tensor(a!) fisher, Tensor inputs, Tensor output_grads, bool absolute) -> ()")

grad_norm_sq = torch.ops.fsam_triton.grad_norm_sq.default
surrogate_gap = torch.ops.fsam_triton.surrogate_gap.default
perturb_ = torch.ops.fsam_triton.perturb_.default
adamw_l2sp_ = torch.ops.fsam_triton.adamw_l2sp_.default
digit_histogram = torch.ops.fsam_triton.digit_histogram.default
write_mask_ = torch.ops.fsam_triton.write_mask_.default
gather_ = torch.ops.fsam_triton.gather_.default
scatter_ = torch.ops.fsam_triton.scatter_.default
linear_fisher_ = torch.ops.fsam_triton.linear_fisher_.default


@functools.cache
def _triton() -> types.SimpleNamespace:
    """The Triton launchers, imported on first use: a machine without a GPU need not have Triton."""
    from .kernels import adamw_l2sp, fisher, grad_norm, perturb, sparse, surrogate_gap, topk_mask

    return types.SimpleNamespace(
        grad_norm_sq=grad_norm.grad_norm_sq,
        surrogate_gap=surrogate_gap.surrogate_gap,
        perturb_=perturb.perturb_,
        adamw_l2sp_=adamw_l2sp.adamw_l2sp_,
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


@functools.cache
def _can_compile() -> bool:
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:
        warnings.warn(
            f"fsam_triton: no working C++ compiler ({error}); CPU passes run as eager PyTorch, several times slower. "
            "Install g++ or clang++, or set CXX.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _on_cpu(in_cpp: Callable[..., Any]) -> Callable[..., Any]:
    name = in_cpp.__name__

    def call(*args: Any) -> Any:
        if interpreting():
            return getattr(_triton(), name)(*args)
        return in_cpp(*args) if _can_compile() else getattr(reference, name)(*args)

    return call


def _cpu_linear_fisher_(fisher: Tensor, inputs: Tensor, output_grads: Tensor, absolute: bool) -> None:
    if interpreting():
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


def _on_gpu(name: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        # A kernel runs on the current device, which need not be the tensors'.
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        with torch.cuda.device(first.device):
            return getattr(_triton(), name)(*args)

    return launch


for _name, _cpu in {
    "grad_norm_sq": _on_cpu(passes_cpu.grad_norm_sq),
    "surrogate_gap": _on_cpu(passes_cpu.surrogate_gap),
    "perturb_": _on_cpu(passes_cpu.perturb_),
    "adamw_l2sp_": _on_cpu(passes_cpu.adamw_l2sp_),
    "digit_histogram": _on_cpu(topk_mask_cpu.digit_histogram),
    "write_mask_": _on_cpu(topk_mask_cpu.write_mask_),
    "gather_": _on_cpu(sparse_cpu.gather_),
    "scatter_": _on_cpu(sparse_cpu.scatter_),
    "linear_fisher_": _cpu_linear_fisher_,
}.items():
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _on_gpu(_name), "CUDA")


@torch.library.register_fake("fsam_triton::grad_norm_sq")
def _(grad, weight, mask):
    return grad.new_empty((), dtype=torch.float64)


@torch.library.register_fake("fsam_triton::surrogate_gap")
def _(first, second):
    return first.new_empty(3, dtype=torch.float64)


@torch.library.register_fake("fsam_triton::perturb_")
@torch.library.register_fake("fsam_triton::adamw_l2sp_")
@torch.library.register_fake("fsam_triton::gather_")
@torch.library.register_fake("fsam_triton::scatter_")
@torch.library.register_fake("fsam_triton::linear_fisher_")
def _(*args):
    return None


@torch.library.register_fake("fsam_triton::digit_histogram")
def _(values, prefix, shift, bits, wide):
    return values.new_empty(1 << bits, dtype=torch.int64)


@torch.library.register_fake("fsam_triton::write_mask_")
def _(mask, values, threshold, quota, wide):
    return torch.empty_like(quota)
