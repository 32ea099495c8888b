"""The passes on a CPU, in C++: the functions of `reference`, with its bits, at the speed of memory.

A pass is compiled for each combination of types and options, as the kernels are. Where nothing can be compiled, the
reference runs instead.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from .. import build, reference, spec
from ..directions import Along
from ..jobs import jobs_of
from ..segments import Segments

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_TYPES = {
    **{torch.float64: "double", torch.float32: "float", torch.bfloat16: "BF16", torch.float16: "FP16"},
    **{
        torch.int8: "int8_t",
        torch.uint8: "uint8_t",
        torch.int16: "int16_t",
        torch.int32: "int32_t",
        torch.int64: "int64_t",
    },
}
# From so many bytes on a backup has left the caches before it is read again.
_STREAMED = 4 << 20
# Elements of a sparse tensor that a thread takes at a time.
_PART = 2048

_ADDRESS, _LONG, _INT, _WORD = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_uint32


def _or_reference(launch: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`launch`, or the reference's function of this name where C++ is not available."""
    fast, slow = cast("Callable[..., Any]", launch), getattr(reference, launch.__name__)

    @functools.wraps(launch)
    def run(*args: Any) -> Any:
        try:
            return fast(*args)
        except build.Unavailable:
            return slow(*args)

    return cast("Callable[Arguments, Result]", run)


def _pass(name: str, types: Sequence[torch.dtype | str], addresses: int, **options: int) -> Callable[..., Any]:
    """A pass over segments, compiled.

    Args:
        name: a function template of cpu/.
        types: its parameters that are types.
        addresses: how many it takes after the table.
        options: the fields of its last parameter, in the order in which they are declared.
    """
    parameters = [t if isinstance(t, str) else _TYPES[t] for t in types]
    if options:
        kind = f"{name.removesuffix('_sq').capitalize()}Options"
        parameters.append(f"{kind}{{{', '.join(f'.{field} = {int(value)}' for field, value in options.items())}}}")
    arguments = (_ADDRESS, _LONG, _INT, *[_ADDRESS] * addresses)
    return build.function(name.removesuffix("_sq"), f"{name}<{', '.join(parameters)}>", *arguments)


def _run(function: Callable[..., Any], segments: Segments, *tensors: Tensor | None) -> None:
    table = segments.addresses()
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    function(table.ctypes.data, len(table), torch.get_num_threads(), *addresses)


@functools.cache
def _norm_sq(weight: torch.dtype, grad: torch.dtype, average: torch.dtype, **options: int) -> Callable[..., Any]:
    return _pass("norm_sq", (weight, grad, average, reference.compute_dtype(grad)), 8, **options)


@_or_reference
def norm_sq(
    segments: Segments,
    adaptive: bool,
    mask: Tensor | None,
    scale: Tensor | None = None,
    along: Along | None = None,
) -> Tensor:
    """The same as `reference.norm_sq`, except for the order of additions."""
    return _sums(segments, adaptive, mask, scale, along)[1]


@_or_reference
def norms_sq(segments: Segments) -> Tensor:
    """The same as `reference.norms_sq`, except for the order of additions."""
    return segments.plan.sums(_sums(segments)[0])


def _sums(
    segments: Segments,
    adaptive: bool = False,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    along: Along | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of squares of each chunk, and of all."""
    sums, result = torch.zeros(segments.plan.chunks, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    if segments:
        options = {"adaptive": adaptive, "masked": mask is not None, "coded": scale is not None, "along": _kind(along)}
        grad = segments.dtype("grad")
        function = _norm_sq(segments.dtype(), grad, grad if along is None else along.lane.dtype, **options)
        _run(function, segments, mask, scale, *_steering(along), sums, result)
    return sums, result


def _kind(along: Along | None) -> int:
    return spec.ALONG.index("gradient" if along is None else along.kind)


def _steering(along: Along | None) -> tuple[Tensor | None, ...]:
    if along is None:
        return None, None, None, None
    return along.lane, along.scale, along.coef.contiguous(), along.grad_scale


@functools.cache
def _gap(grad: torch.dtype) -> Callable[..., Any]:
    return _pass("gap", (grad, reference.compute_dtype(grad)), 2)


@_or_reference
def gap(segments: Segments) -> Tensor:
    """The same as `reference.gap`, except for the order of additions."""
    result = torch.zeros(3, dtype=torch.float64)
    if segments:
        function = _gap(segments.dtype("grad"))
        _run(function, segments, torch.empty(segments.plan.chunks, 3, dtype=torch.float64), result)
    return result


@functools.cache
def _perturb(
    weight: torch.dtype, grad: torch.dtype, backup: torch.dtype, average: torch.dtype, **options: int
) -> Callable[..., Any]:
    return _pass("perturb", (weight, grad, backup, average, reference.compute_dtype(weight)), 9, **options)


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
    scale: Tensor | None = None,
    along: Along | None = None,
) -> None:
    """The same as `reference.perturb_`."""
    if not segments:
        return
    weight = segments.dtype()
    function = _perturb(
        weight,
        segments.dtype("grad"),
        backup.dtype,
        weight if along is None else along.lane.dtype,
        adaptive=adaptive,
        masked=mask is not None,
        coded=scale is not None,
        stochastic=stochastic and weight.itemsize == 2,
        random=random,
        # Passes over 16-bit numbers wait for the processor, not for memory.
        streamed=weight.itemsize > 2 and segments.plan.size * weight.itemsize >= _STREAMED,
        along=_kind(along),
    )
    _run(function, segments, backup, mask, scale, *_steering(along), coef.contiguous(), key.contiguous())


@functools.cache
def _descend(
    rule: str,
    weight: torch.dtype,
    grad: torch.dtype,
    state: tuple[torch.dtype, ...],
    lost: torch.dtype | None,
    **options: bool,
) -> Callable[..., Any]:
    # Of lanes that are not there the type does not matter.
    first, others = (state[0], state[-1]) if state else (weight, weight)
    types = (f"rules::{rule}", weight, grad, first, others, lost or torch.int32)
    return _pass("descend", (*types, reference.compute_dtype(weight)), 13, lanes=len(state), **options)


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
    scales: Sequence[Tensor] = (),
    steps: Tensor | None = None,
) -> None:
    """The same as `reference.descend_`."""
    if not segments:
        return
    weight = segments.dtype()
    rounds = any(lane.itemsize < 4 for lane in state)
    rounds |= weight.itemsize == 2 and (remainder is None or remainder.itemsize == 1)
    function = _descend(
        *(rule, weight, segments.dtype("grad"), tuple(lane.dtype for lane in state)),
        None if remainder is None else remainder.dtype,
        coded=bool(scales),
        steps=steps is not None,
        remainder=remainder is not None,
        anchor=anchor is not None,
        ema=ema is not None,
        other=segments.tensors["other"] is not None,
        orthogonal=orthogonal is not None,
        stochastic=stochastic and rounds,
    )
    none = [None] * (3 - len(state))
    lanes = (*state, *none, *(scales or [None] * len(state)), *none, steps, remainder, anchor, ema, orthogonal)
    _run(function, segments, *lanes, coef.contiguous(), key.contiguous())


def _address_of(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _coefficients(segments: int, columns: Sequence[str], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty(segments, len(columns), dtype=dtype), torch.empty(segments, dtype=torch.int32)


@functools.cache
def _climb_coefficients(dtype: torch.dtype) -> Callable[..., Any]:
    types = (*[_ADDRESS] * 2, _LONG, _ADDRESS, _WORD, *[_ADDRESS] * 4)
    return build.function("coefficients", f"climb_coefficients<{_TYPES[dtype]}>", *types)


@_or_reference
def climb_coefficients(
    numbers: Tensor,
    members: Tensor,
    steps: Tensor,
    purpose: int,
    norm_sq: Tensor,
    scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The same as `reference.climb_coefficients`."""
    coef, key = _coefficients(len(members), spec.PERTURB, dtype)
    given = (numbers.data_ptr(), members.data_ptr(), len(members), steps.data_ptr(), purpose)
    made = (coef.data_ptr(), key.data_ptr())
    _climb_coefficients(dtype)(*given, norm_sq.data_ptr(), _address_of(scale), *made)
    return coef, key


@functools.cache
def _descend_coefficients(rule: str, dtype: torch.dtype) -> Callable[..., Any]:
    types = (*[_ADDRESS] * 2, _LONG, *[_ADDRESS] * 2, _INT, _WORD, *[_ADDRESS] * 8)
    return build.function("coefficients", f"descend_coefficients<rules::{rule}, {_TYPES[dtype]}>", *types)


@_or_reference
def descend_coefficients(
    rule: str,
    combined: str,
    numbers: Tensor,
    members: Tensor,
    steps: Tensor,
    active: Tensor | None,
    purpose: int,
    measured: Tensor | None,
    scale: Tensor | None,
    other_scale: Tensor | None,
    overflow: Tensor | None,
    squares: Tensor | None,
    pairs: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The same as `reference.descend_coefficients`, except for the last bit of a power."""
    coef, key = _coefficients(len(members), spec.DESCEND[rule], dtype)
    given = (numbers.data_ptr(), members.data_ptr(), len(members), steps.data_ptr(), _address_of(active))
    more = map(_address_of, (measured, scale, other_scale, overflow, squares, pairs, coef, key))
    _descend_coefficients(rule, dtype)(*given, spec.COMBINED.index(combined), purpose, *more)
    return coef, key


@functools.cache
def _add_noise(weight: torch.dtype, out: torch.dtype, by_column: bool) -> Callable[..., Any]:
    parameters = (_TYPES[weight], _TYPES[out], _TYPES[reference.compute_dtype(weight)], str(by_column).lower())
    types = (_LONG, _LONG, _INT, _ADDRESS, _ADDRESS, _WORD, _ADDRESS)
    return build.function("noise", f"add_noise<{', '.join(parameters)}>", *types)


@_or_reference
def add_noise_(out: Tensor, weight: Tensor, scale: Tensor, key: int, by_column: bool) -> None:
    """The same as `reference.add_noise_`."""
    function = _add_noise(weight.dtype, out.dtype, by_column)
    threads, scale = torch.get_num_threads(), scale.contiguous()
    function(*weight.shape, threads, weight.data_ptr(), scale.data_ptr(), key, out.data_ptr())


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


def _move(
    scatter: bool,
    tensors: Sequence[Tensor],
    index: Tensor,
    compact: Tensor,
    offsets: Sequence[int],
    counts: Sequence[int],
) -> None:
    function = _mover(compact.element_size(), index.dtype, scatter)
    jobs = torch.from_numpy(jobs_of(tuple(offsets), tuple(counts), _PART))
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
