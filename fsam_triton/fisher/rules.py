"""Rules: how a parameter's per-sample gradients follow from those of the output of a function that uses it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import NotImplementedType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .gradients import Dense, Lookup, Part, Product, SharedLookup
from .objective import wide

if TYPE_CHECKING:
    from .hooked import HookedPasses

# What a rule returns: the output, or that it does not apply.
Output = Tensor | NotImplementedType


def _matrix(x: Tensor, grads: Tensor, by_sample: Callable[[Tensor], Tensor]) -> Product:
    # Under autocast the function has multiplied what it was given in the type of its result.
    return Product(by_sample(x.detach()).to(grads.dtype), grads)


def _bias(grads: Tensor) -> Dense:
    return Dense(wide(grads).sum(1))


def _linear(passes: HookedPasses, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Output:
    rows = input.dim() - 1
    if passes.special(input) or not passes.splits(input.shape[:rows]) or rows == 0:
        return NotImplemented
    output = F.linear(input, passes.constant(weight), passes.constant(bias))
    by_sample = functools.partial(passes.by_sample, row_dims=rows)
    return passes.record(output, rows, (weight, lambda d: _matrix(input, d, by_sample)), (bias, _bias))


def _addmm(
    passes: HookedPasses, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Output:
    """transformers' Conv1D: a linear layer whose weight is [in, out]."""
    if beta != 1 or alpha != 1 or input.dim() != 1 or passes.special(mat1) or not passes.splits(mat1.shape[:1]):
        return NotImplemented
    output = torch.addmm(passes.constant(input), mat1, passes.constant(mat2))

    def weight(grads: Tensor) -> Product:
        product = _matrix(mat1, grads, functools.partial(passes.by_sample, row_dims=1))
        return Product(product.grads, product.inputs)

    return passes.record(output, 1, (mat2, weight), (input, _bias))


def _embedding(
    passes: HookedPasses,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Output:
    if max_norm is not None or scale_grad_by_freq or id(weight) not in passes.params or input.numel() == 0:
        return NotImplemented
    output = F.embedding(input, weight.detach())
    padding = None if padding_idx is None else padding_idx % len(weight)

    def lookup(indices: Tensor, grads: Tensor) -> Lookup:
        grads = wide(grads)
        if padding is not None:
            grads = grads.masked_fill((indices == padding)[..., None], 0.0)
        return Lookup(indices, grads)

    # There can be as many positions as samples; the first three samples will have told which they are.
    if input.dim() and len(input) == passes.size and id(weight) not in passes.positional:
        own = input.reshape(passes.size, -1)
        return passes.record(output, input.dim(), (weight, lambda d: lookup(own, d)))
    if id(weight) not in passes.slow:
        passes.positional.add(id(weight))
        output = output.requires_grad_().clone()
        passes.shared[id(output)] = SharedLookup(id(weight), output, input, lookup)
    return output


def _affine(
    normalise: Callable[[Tensor], Tensor],
    passes: HookedPasses,
    output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    channels: bool,
) -> Tensor:
    """For a normalised input; the parameters span the last dimensions, or the channels, followed by others."""
    shape = next(p.shape for p in (weight, bias) if p is not None)
    rows = 1 if channels else input.dim() - len(shape)

    def total(grads: Tensor) -> Dense:
        # [batch, rows of a sample, *shape, pixels].
        return Dense(grads.reshape(*grads.shape[:2], *shape, -1).sum((1, -1)))

    def scale(grads: Tensor) -> Dense:
        return total(wide(grads) * passes.by_sample(normalise(wide(input.detach())), rows))

    return passes.record(output, rows, (weight, scale), (bias, lambda d: total(wide(d))))


def _layer_norm(
    passes: HookedPasses,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Output:
    if passes.special(input) or not passes.splits(input.shape[: input.dim() - len(normalized_shape)]):
        return NotImplemented
    output = F.layer_norm(input, normalized_shape, passes.constant(weight), passes.constant(bias), eps)
    normalise = functools.partial(F.layer_norm, normalized_shape=normalized_shape, eps=eps)
    return _affine(normalise, passes, output, input, weight, bias, channels=False)


def _rms_norm(
    passes: HookedPasses,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Output:
    if passes.special(input) or not passes.splits(input.shape[: input.dim() - len(normalized_shape)]):
        return NotImplemented
    output = F.rms_norm(input, normalized_shape, passes.constant(weight), eps)
    normalise = functools.partial(F.rms_norm, normalized_shape=normalized_shape, eps=eps)
    return _affine(normalise, passes, output, input, weight, None, channels=False)


def _group_norm(
    passes: HookedPasses,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Output:
    if passes.special(input) or not passes.splits(input.shape[:1]):
        return NotImplemented
    output = F.group_norm(input, num_groups, passes.constant(weight), passes.constant(bias), eps)
    normalise = functools.partial(F.group_norm, num_groups=num_groups, eps=eps)
    return _affine(normalise, passes, output, input, weight, bias, channels=True)


def _batch_norm(
    passes: HookedPasses,
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Output:
    """In eval mode. With batch statistics, samples would depend on each other."""
    if training or passes.special(input) or not passes.splits(input.shape[:1]):
        return NotImplemented
    constants = (passes.constant(weight), passes.constant(bias))
    output = F.batch_norm(input, running_mean, running_var, *constants, False, momentum, eps)

    def normalise(x: Tensor) -> Tensor:
        return F.batch_norm(x, running_mean.to(x.dtype), running_var.to(x.dtype), eps=eps)

    return _affine(normalise, passes, output, input, weight, bias, channels=True)


def _conv2d(
    passes: HookedPasses,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Output:
    if input.dim() != 4 or passes.special(input) or not passes.splits(input.shape[:1]):
        return NotImplemented
    output = F.conv2d(input, passes.constant(weight), passes.constant(bias), stride, padding, dilation, groups)
    height, width = weight.shape[2:]

    def patches(dtype: torch.dtype) -> Tensor:
        """[images, pixels of a patch, patches]."""
        x, zeros = input.detach(), padding
        if padding == "same":
            down, across = (dilation, dilation) if isinstance(dilation, int) else dilation
            total = (across * (width - 1), down * (height - 1))
            x = F.pad(x, [side for t in total for side in (t // 2, t - t // 2)])
        if isinstance(padding, str):
            zeros = 0
        return F.unfold(x.to(dtype), (height, width), dilation, zeros, stride)

    def product(grads: Tensor) -> Part:
        columns = patches(grads.dtype)
        if groups == 1:
            a = columns.transpose(1, 2).reshape(passes.size, -1, columns.shape[1])
            return Product(a, grads.flatten(3).transpose(2, 3).flatten(1, 2))
        d = wide(grads).reshape(len(columns), groups, -1, columns.shape[2])
        a = wide(columns).reshape(len(columns), groups, -1, columns.shape[2])
        return Dense((d @ a.mT).reshape(passes.size, -1, *weight.shape).sum(1))

    def total(grads: Tensor) -> Dense:
        return Dense(wide(grads).sum((1, 3, 4)))

    return passes.record(output, 1, (weight, product), (bias, total))


def _broadcast(
    func: Callable[..., Tensor], passes: HookedPasses, *args: Any, in_place: bool = False, **kwargs: Any
) -> Output:
    """Sums, products and expand: one copy of the parameter per sample, without memory, receives the gradients."""
    if any(map(passes.special, kwargs.values())) or (in_place and passes.special(args[0])):
        return NotImplemented
    if func is torch.Tensor.expand:
        shape = args[0].detach().expand(*args[1:], **kwargs).shape
    else:
        shape = torch.broadcast_shapes(*(x.shape for x in args if isinstance(x, Tensor)))
    if shape[:1] != (passes.size,):
        return NotImplemented
    copies = []
    for x in args:
        if passes.special(x):
            one = (1,) * (len(shape) - x.dim()) + x.shape
            if one[0] != 1:
                return NotImplemented
            x = _copies(passes, x, one)
        copies.append(x)
    return func(*copies, **kwargs)


def _copies(passes: HookedPasses, x: Tensor, one: tuple[int, ...]) -> Tensor:
    """x, a parameter or a shared embedding, as [samples, *one[1:]]."""
    make: Callable[[Tensor], Part]
    if (shared := passes.shared.get(id(x))) is None:
        key = id(x)
        make = functools.partial(_copied, shape=(passes.size, *x.shape))
    else:
        key, indices = shared.key, shared.indices.reshape(1, -1).expand(passes.size, -1)
        make = functools.partial(_looked_up, shared, indices)
    copies = x.detach().view(one).expand(passes.size, *one[1:])
    # Nothing changes an operand in place, so it can be a leaf.
    return passes.record(copies if key in passes.slow else copies.requires_grad_(), 1, (passes.params[key], make))


def _copied(grads: Tensor, shape: tuple[int, ...]) -> Dense:
    return Dense(wide(grads).reshape(shape))


def _looked_up(shared: SharedLookup, indices: Tensor, grads: Tensor) -> Lookup:
    return shared.lookup(indices, grads.reshape(*indices.shape, -1))


ELEMENTWISE = ("add", "sub", "mul", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__")
IN_PLACE = ("add_", "sub_", "mul_", "__iadd__", "__isub__", "__imul__")
RULES: dict[Callable[..., Any], Callable[..., Output]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.conv2d: _conv2d,
    **{
        func: functools.partial(_broadcast, func)
        for func in (
            torch.add,
            torch.sub,
            torch.mul,
            torch.Tensor.expand,
            *(getattr(torch.Tensor, name) for name in ELEMENTWISE),
        )
    },
    **{
        func: functools.partial(_broadcast, func, in_place=True)
        for func in (getattr(torch.Tensor, name) for name in IN_PLACE)
    },
}
