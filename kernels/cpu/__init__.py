"""The passes on a CPU, in C++: the functions of `reference`, with its bits, at the speed of memory.

A pass is compiled for each combination of types and options, as the kernels are. Where nothing can be compiled, the
reference runs instead.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import build, reference
from ..jobs import jobs_of
from ..segments import Segments

_TYPES = {
    **{torch.float64: "double", torch.float32: "float", torch.bfloat16: "BF16", torch.float16: "FP16"},
    **{torch.int16: "int16_t", torch.int32: "int32_t", torch.int64: "int64_t"},
}
# Elements of a sparse tensor that a thread takes at a time.
_PART = 2048

_ADDRESS, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


def _or_reference(launch: Callable[..., Any]) -> Callable[..., Any]:
    """`launch`, or the reference's function of this name where C++ is not available."""
    slow = getattr(reference, launch.__name__)

    @functools.wraps(launch)
    def run(*args: Any) -> Any:
        try:
            return launch(*args)
        except build.Unavailable:
            return slow(*args)

    return run


@functools.cache
def _pass(name: str, types: tuple[torch.dtype | str, ...], options: str, addresses: int) -> Callable[..., Any]:
    """A pass over segments for these types and options, which takes so many addresses after the table."""
    parameters = ", ".join([*(_TYPES.get(t, t) for t in types), *([options] if options else [])])
    header = name.removesuffix("_sq")
    return build.function(header, f"{name}<{parameters}>", _ADDRESS, _LONG, _INT, *[_ADDRESS] * addresses)


def _options(kind: str, **options: int) -> str:
    """Options in C++, in the order in which they are declared there."""
    return f"{kind}{{{', '.join(f'.{name} = {int(value)}' for name, value in options.items())}}}"


def _run(function: Callable[..., Any], segments: Segments, *tensors: Tensor | None) -> None:
    table = segments.addresses()
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    function(table.ctypes.data, len(table), torch.get_num_threads(), *addresses)


@_or_reference
def norm_sq(segments: Segments, adaptive: bool, mask: Tensor | None) -> Tensor:
    """The same as `reference.norm_sq`, but for the order of additions."""
    result = torch.zeros((), dtype=torch.float64)
    if segments:
        grad = segments.dtype("grad")
        types = (segments.dtype(), grad, reference.compute_dtype(grad))
        function = _pass("norm_sq", types, _options("NormOptions", adaptive=adaptive, masked=mask is not None), 3)
        _run(function, segments, mask, torch.empty(segments.plan.chunks, dtype=torch.float64), result)
    return result


@_or_reference
def gap(segments: Segments) -> Tensor:
    """The same as `reference.gap`, but for the order of additions."""
    result = torch.zeros(3, dtype=torch.float64)
    if segments:
        grad = segments.dtype("grad")
        function = _pass("gap", (grad, reference.compute_dtype(grad)), "", 2)
        _run(function, segments, torch.empty(segments.plan.chunks, 3, dtype=torch.float64), result)
    return result


@_or_reference
def perturb_(
    segments: Segments,
    backup: Tensor,
    mask: Tensor | None,
    coef: Tensor,
    key: Tensor,
    adaptive: bool,
    stochastic: bool,
    random: bool,
) -> None:
    """The same as `reference.perturb_`."""
    if not segments:
        return
    weight = segments.dtype()
    options = _options(
        "PerturbOptions",
        adaptive=adaptive,
        masked=mask is not None,
        stochastic=stochastic and weight.itemsize == 2,
        random=random,
    )
    function = _pass("perturb", (weight, segments.dtype("grad"), reference.compute_dtype(weight)), options, 4)
    _run(function, segments, backup, mask, coef.contiguous(), key.contiguous())


@_or_reference
def descend_(
    segments: Segments,
    state: Sequence[Tensor],
    remainder: Tensor | None,
    anchor: Tensor | None,
    ema: Tensor | None,
    orthogonal: Tensor | None,
    coef: Tensor,
    key: Tensor,
    rule: str,
    stochastic: bool,
) -> None:
    """The same as `reference.descend_`."""
    if not segments:
        return
    weight = segments.dtype()
    options = _options(
        "DescendOptions",
        lanes=len(state),
        remainder=remainder is not None,
        anchor=anchor is not None,
        ema=ema is not None,
        other=segments.tensors["other"] is not None,
        orthogonal=orthogonal is not None,
        stochastic=stochastic and remainder is None and weight.itemsize == 2,
    )
    kept = state[0].dtype if state else torch.float32
    lost = torch.int32 if remainder is None else remainder.dtype
    types = (f"rules::{rule}", weight, segments.dtype("grad"), kept, lost, reference.compute_dtype(weight))
    lanes = (*state, *[None] * (3 - len(state)), remainder, anchor, ema, orthogonal)
    _run(_pass("descend", types, options, 9), segments, *lanes, coef.contiguous(), key.contiguous())


@functools.cache
def _digit_histogram(dtype: torch.dtype, wide: bool) -> Callable[..., Any]:
    instance = f"digit_histogram<{_TYPES[dtype]}, int{64 if wide else 32}_t>"
    return build.function("topk_mask", instance, _ADDRESS, _LONG, _LONG, _INT, _INT, _ADDRESS, _INT)


@_or_reference
def digit_histogram(values: Tensor, prefix: Tensor, shift: int, bits: int, wide: bool) -> Tensor:
    """The same as `reference.digit_histogram`, for digits of up to 8 bits."""
    hist, n = torch.zeros(1 << bits, dtype=torch.int64), values.numel()
    function = _digit_histogram(values.dtype, wide)
    function(values.data_ptr(), n, int(prefix), shift, bits, hist.data_ptr(), torch.get_num_threads())
    return hist


@functools.cache
def _write_mask(dtype: torch.dtype, wide: bool) -> Callable[..., Any]:
    instance = f"write_mask<{_TYPES[dtype]}, int{64 if wide else 32}_t>"
    types = (_ADDRESS, _ADDRESS, _LONG, _LONG, _LONG, _INT)
    return build.function("topk_mask", instance, *types, returns=_LONG)


@_or_reference
def write_mask_(mask: Tensor, values: Tensor, threshold: Tensor, quota: Tensor, wide: bool) -> Tensor:
    """The same as `reference.write_mask_`."""
    n, function = values.numel(), _write_mask(values.dtype, wide)
    left = function(mask.data_ptr(), values.data_ptr(), n, int(threshold), int(quota), torch.get_num_threads())
    return torch.tensor(left, dtype=torch.int64)


@functools.cache
def _mover(size: int, index: torch.dtype, scatter: bool) -> Callable[..., Any]:
    instance = f"move<int{8 * size}_t, {_TYPES[index]}, {str(scatter).lower()}>"
    return build.function("sparse", instance, _ADDRESS, _ADDRESS, _LONG, _ADDRESS, _ADDRESS, _INT)


def _move(scatter: bool, tensors: Sequence[Tensor], index: Tensor, compact: Tensor, offsets, counts) -> None:
    function = _mover(compact.element_size(), index.dtype, scatter)
    jobs = jobs_of(tuple(offsets), tuple(counts), _PART, compact.device)
    addresses = (ctypes.c_int64 * len(tensors))(*[tensor.data_ptr() for tensor in tensors])
    pointers = (ctypes.addressof(addresses), jobs.data_ptr(), len(jobs), index.data_ptr(), compact.data_ptr())
    function(*pointers, torch.get_num_threads())


@_or_reference
def gather_(
    out: Tensor, sources: Sequence[Tensor], index: Tensor, offsets: Sequence[int], counts: Sequence[int]
) -> None:
    """The same as `reference.gather_`."""
    _move(False, sources, index, out, offsets, counts)


@_or_reference
def scatter_(
    targets: Sequence[Tensor], index: Tensor, source: Tensor, offsets: Sequence[int], counts: Sequence[int]
) -> None:
    """The same as `reference.scatter_`."""
    _move(True, targets, index, source, offsets, counts)
