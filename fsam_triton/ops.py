"""The passes as `torch.library` operators: Triton on CUDA and ROCm tensors, the compiled reference on CPU tensors.

Under TRITON_INTERPRET=1 CPU tensors go through the Triton kernels too, so that their numbers can be tested anywhere.
Arguments and results are described in `fsam_triton.kernels.reference`, which has a function for each operator.
"""

import functools
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .kernels import reference, sparse_cpu

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


@functools.cache
def _compiled(function: Callable[..., Any], variant: tuple) -> Callable[..., Any]:
    """`function` compiled for one combination of dtypes and flags.

    Each combination gets a code object of its own, because torch.compile gives up on a code object that was compiled
    for too many of them.
    """
    if not _can_compile():
        return function
    name = f"{function.__name__}_{abs(hash(variant)):x}"
    own = types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    return torch.compile(own, dynamic=True)


def _run_compiled(function: Callable[..., Any], *args: Any) -> Any:
    variant = tuple((a.dtype, a.shape[1:]) if isinstance(a, Tensor) else a for a in args)
    with torch.no_grad():
        return _compiled(function, variant)(*(_plain(a) if isinstance(a, Tensor) else a for a in args))


def _plain(tensor: Tensor) -> Tensor:
    """The same tensor in a form in which only its number of rows can ask for another compilation."""
    if tensor._base is not None:
        # torch.compile would compile again for each way in which views lie in their bases.
        size, start = tensor.element_size(), tensor.storage_offset()
        own = tensor.untyped_storage()[start * size : (start + tensor.numel()) * size]
        tensor = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(own, 0, tensor.shape, tensor.stride())
    for dim in range(1, tensor.dim()):
        torch._dynamo.mark_static(tensor, dim)
    return tensor


def _words_as_rows(mask: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """With a mask, flat tensors as [n / 32, 32]: compiled code then reads one word a row instead of gathering bits."""
    if mask is None or tensors[0].numel() % 32:
        return tensors
    return tuple(None if t is None else t.view(-1, 32) for t in tensors)


def _cpu_grad_norm_sq(grad: Tensor, weight: Tensor | None, mask: Tensor | None) -> Tensor:
    if interpreting():
        return _triton().grad_norm_sq(grad, weight, mask)
    whole = grad.numel() // reference.CHUNK * reference.CHUNK
    total = torch.zeros((), dtype=torch.float64)
    if whole:
        chunks = reference.chunk_views(grad, weight, mask, 0, whole)
        total += _run_compiled(reference.chunk_sums, *chunks).sum(dtype=torch.float64)
    if whole < grad.numel():
        total += reference.chunk_sums(*reference.chunk_views(grad, weight, mask, whole, grad.numel())).sum()
    return total


# Elements whose noise is made, or which are widened, at a time, so that they are in the cache when a pass reads them.
_PART = 1 << 20
_scratch = threading.local()


def _reused(row: int) -> Tensor:
    """fp32 [rows, COLUMNS] memory for _PART elements, the same for each call with this row."""
    if not hasattr(_scratch, "rows"):
        _scratch.rows = torch.empty(2, _PART // reference.COLUMNS, reference.COLUMNS)
    return _scratch.rows[row]


def _noise(n: int, start: int, key: Tensor, *dtypes: torch.dtype | None) -> list[Tensor | None]:
    """Noise for the dtypes (None: not made) of n elements from `start` on, in memory that is used again."""
    if not hasattr(_scratch, "columns"):
        _scratch.columns = reference.counters(reference.COLUMNS)
    used = -(-n // reference.COLUMNS)
    both = [None if dtype is None else _reused(i)[:used] for i, dtype in enumerate(dtypes)]
    if any(dtype is not None for dtype in dtypes):
        _run_compiled(reference.noise_, *both, reference.key_at(key, start), _scratch.columns, dtypes)
    return [None if noise is None else noise.view(-1)[:n] for noise in both]


def _slices(start: int, stop: int, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t[start:stop] for t in tensors]


def _cpu_surrogate_gap(first: Tensor, second: Tensor) -> Tensor:
    if interpreting():
        return _triton().surrogate_gap(first, second)
    n = first.numel()
    whole = n // reference.CHUNK * reference.CHUNK
    total = torch.zeros(3, dtype=torch.float64)
    # Of two types, one is widened first, a part at a time: compiled code for both at once is not vectorised.
    mixed = first.dtype != second.dtype and torch.float64 not in (first.dtype, second.dtype)
    step = _PART if mixed else max(whole, 1)
    for start in range(0, whole, step):
        parts = _slices(start, min(start + step, whole), first, second)
        if mixed:
            parts = [_widened(part, row) for row, part in enumerate(parts)]
        rows = [part.view(-1, reference.CHUNK) for part in parts]
        total += torch.stack([part.sum(dtype=torch.float64) for part in _run_compiled(reference.dot_sums, *rows)])
    return total + reference.surrogate_gap(first[whole:], second[whole:])


def _widened(part: Tensor, row: int) -> Tensor:
    if part.dtype == torch.float32:
        return part
    return _reused(row).view(-1)[: part.numel()].copy_(part)


def _cpu_perturb_(weight, grad, backup, mask, coef, adaptive, stochastic, zero_grad, random=False) -> None:
    if interpreting():
        return _triton().perturb_(weight, grad, backup, mask, coef, adaptive, stochastic, zero_grad, random)
    n = weight.numel()
    rounding = weight.dtype if stochastic and weight.element_size() == 2 else None
    choosing = torch.float32 if random else None
    noisy = (rounding or choosing) is not None and _can_compile()
    for start in range(0, n, _PART if noisy else max(n, 1)):
        stop = min(start + _PART, n) if noisy else n
        noise = _noise(stop - start, start, coef[1], rounding, choosing) if noisy else (None, None)
        words = None if mask is None else mask[start // 32 : (stop + 31) // 32]
        flat = _slices(start, stop, weight, grad, backup)
        *flat, rounds, chooses = _words_as_rows(words, *flat, *noise)
        _run_compiled(reference.perturb_, *flat, words, coef, adaptive, stochastic, zero_grad, random, rounds, chooses)


def _cpu_adamw_l2sp_(
    weight,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    backup,
    master,
    anchor,
    coef,
    stochastic,
    zero_grad,
    other_grad=None,
    keep_orthogonal=False,
    perturb=False,
    ema=None,
) -> None:
    tensors = (weight, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, backup, master, anchor)
    if interpreting():
        return _triton().adamw_l2sp_(*tensors, coef, stochastic, zero_grad, other_grad, keep_orthogonal, perturb, ema)
    n, dtype = weight.numel(), weight.dtype
    narrow = master is None and weight.element_size() == 2
    noisy = narrow and stochastic and _can_compile()
    # In several passes over what is in the cache: see `reference.shift_`.
    twice = narrow and perturb
    averaged = narrow and ema is not None
    if twice:
        tensors = (backup, *tensors[1:5], None, *tensors[6:])
    v_dtype = exp_avg_sq.dtype if exp_avg_sq.element_size() == 2 else None
    chunk = _PART if (noisy or twice or averaged) and _can_compile() else max(n, 1)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        noise = _noise(stop - start, start, coef[8], dtype, v_dtype) if noisy else (None, None)
        *flat, other, average = _slices(start, stop, *tensors, other_grad, ema)
        flags = (stochastic, zero_grad, other, keep_orthogonal, perturb and not twice, None if averaged else average)
        _run_compiled(reference.adamw_l2sp_, *flat, coef, *flags, *noise)
        if twice:
            flat = _slices(start, stop, weight, backup, exp_avg)
            eps_noise = _noise(stop - start, start, coef[11], dtype, None)[0] if noisy else None
            _run_compiled(reference.shift_, *flat, coef, stochastic, eps_noise)
        if averaged:
            clean = (backup if twice else weight)[start:stop]
            _run_compiled(reference.average_, average, clean, coef)


def _cpu_digit_histogram(*args) -> Tensor:
    return (_triton() if interpreting() else reference).digit_histogram(*args)


def _cpu_write_mask_(*args) -> Tensor:
    return (_triton() if interpreting() else reference).write_mask_(*args)


def _cpu_gather_(*args) -> None:
    (_triton() if interpreting() else sparse_cpu if _can_compile() else reference).gather_(*args)


def _cpu_scatter_(*args) -> None:
    (_triton() if interpreting() else sparse_cpu if _can_compile() else reference).scatter_(*args)


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
    "grad_norm_sq": _cpu_grad_norm_sq,
    "surrogate_gap": _cpu_surrogate_gap,
    "perturb_": _cpu_perturb_,
    "adamw_l2sp_": _cpu_adamw_l2sp_,
    "digit_histogram": _cpu_digit_histogram,
    "write_mask_": _cpu_write_mask_,
    "gather_": _cpu_gather_,
    "scatter_": _cpu_scatter_,
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
