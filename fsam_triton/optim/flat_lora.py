"""FlatLoRA: training of LoRA adapters with noise on the merged weights, made on the fly and never written anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import ops
from ..errors import check
from ..kernels import formulas, spec
from ..kernels.reference import compute_dtype
from . import coefficients
from .rules import is_finite
from .uncompiled import uncompiled

if TYPE_CHECKING:

    class _BaseLayer(nn.Module):
        """A linear layer: torch's, transformers' Conv1D or, with the last two attributes, bitsandbytes' Linear4bit."""

        weight: nn.Parameter
        bias: nn.Parameter | None
        compute_dtype: torch.dtype | None
        compute_type_is_set: bool

        def set_compute_type(self, x: Tensor) -> None: ...

    class _Lora(nn.Module):
        """peft's module around a linear layer."""

        base_layer: _BaseLayer
        lora_A: Mapping[str, nn.Linear]
        lora_B: Mapping[str, nn.Linear]
        scaling: Mapping[str, float]
        active_adapters: list[str]
        disable_adapters: bool
        merged: bool


_NOISE = 0x2B992DDF


class FlatLoRA:
    """Flat-LoRA (arXiv 2409.14396): trains a peft model's adapters towards regions that are flat in all weights.

    In training, each linear layer with an adapter computes with ``W + noise`` instead of its frozen weight W, in the
    forward and in the backward pass. The noise of a weight is nearly Gaussian (`kernels.reference.normals`) with a
    standard deviation of ``strength * norm(row) / sqrt(n)``, where the row is the weight's row (one output) of the
    merged weight W + s B A, and n the number of inputs (equation 7). All micro-batches of a step have the same noise,
    and so has a layer that gradient checkpointing computes again; the next step has other noise.

    The noise is computed from a counter when it is needed, in a temporary of the size of one layer. W is never written,
    and may have 4 bits (bitsandbytes). There is no noise in eval mode, under ``no_grad``, for merged or disabled
    adapters, or after `close`. State dicts, copies and saved models do not contain it.

    Args:
        model: a model with LoRA layers of peft. The linear layers among them get noise, as in the paper's code.
        optimizer: the optimizer whose ``step`` ends a step; None to call `advance` yourself (default: None).
        sigma: the strength of the noise at the end, >= 0 (default: 0.05, the paper's).
        total_steps: number of optimizer steps over which the strength rises from 0 to sigma,
            ``sigma * (1 - cos(pi * step / total_steps)) / 2``; None for sigma from the beginning.
        seed: seed of the noise (default: 0). It is the same on all ranks of DDP, which then have the same objective.
        step: number of steps taken before, if training is resumed (default: 0).

    Attributes:
        step: number of optimizer steps so far.
        strength: strength of the noise at this step.

    Raises:
        ArgumentError: an argument is out of its range; the model has no LoRA layers; one of them has an adapter that is
            more than LoRA (DoRA), or a base layer that is trained, sharded, hooked by accelerate to be on several
            devices, or quantised by another library; or gradient checkpointing is re-entrant, whose first pass is under
            no_grad.

    Example:
        >>> import peft, torch
        >>> from fsam_triton import AdamWL2SP, FlatLoRA
        >>> model = peft.get_peft_model(
        ...     torch.nn.Sequential(torch.nn.Linear(4, 4)), peft.LoraConfig(r=2, target_modules=["0"])
        ... )
        >>> optimizer = AdamWL2SP(model.parameters(), lr=1e-3)
        >>> with FlatLoRA(model, optimizer, total_steps=10) as flat:
        ...     for _ in range(10):
        ...         model(torch.ones(1, 4)).sum().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> flat.step
        10
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        sigma: float = 0.05,
        total_steps: int | None,
        seed: int = 0,
        step: int = 0,
    ) -> None:
        check(is_finite(sigma) and sigma >= 0, "sigma", sigma, "must be a finite number >= 0")
        check(total_steps is None or total_steps >= 1, "total_steps", total_steps, "must be >= 1 or None")
        check(step >= 0, "step", step, "must be >= 0")
        _check_checkpoints(model)
        self.sigma = sigma
        self.total_steps = total_steps
        self.seed = seed
        self.step: int = step
        found = [(name, module) for name, module in model.named_modules() if _is_lora(module)]
        check(bool(found), "model", type(model).__name__, "must have LoRA layers of peft")
        for name, module in found:
            _check_layer(name, module)
        self._layers = [_NoisyForward(self, module, number) for number, (_, module) in enumerate(found)]
        for layer in self._layers:
            layer.base.forward = layer
        # accelerate's wrapper has a step of its own.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self._hook = None if optimizer is None else optimizer.register_step_post_hook(lambda *_: self.advance())
        self._keys: tuple[int, list[int]] = -1, []

    @property
    def strength(self) -> float:
        """The strength of the noise at this step."""
        if self.total_steps is None:
            return self.sigma
        return self.sigma * 0.5 * (1 - math.cos(math.pi * min(self.step / self.total_steps, 1.0)))

    def advance(self) -> None:
        """End a step: the next forward passes have other noise."""
        self.step += 1

    def key(self, number: int) -> int:
        """The key of the random numbers of a layer at this step."""
        if self._keys[0] != self.step:
            n = len(self._layers)
            salts = torch.arange(n) * spec.SALT + coefficients.purpose(self.seed, _NOISE)
            keys = formulas.keys(torch.tensor(self.step), salts, torch.zeros(n, dtype=torch.int64))
            self._keys = self.step, [key & 0xFFFFFFFF for key in keys.tolist()]
        return self._keys[1][number]

    def close(self) -> None:
        """Take the noise off the model, without leaving a trace."""
        if self._hook is not None:
            self._hook.remove()
        for layer in self._layers:
            if vars(layer.base).get("forward") is layer:
                del layer.base.forward
        self._layers = []

    def __enter__(self) -> FlatLoRA:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _NoisyForward:
    """The forward pass of a base layer, in training with noise on its weight.

    Args:
        flat: which says how much, and with which key.
        lora: the module of peft around the layer.
        number: of the layer in the model.
    """

    def __init__(self, flat: FlatLoRA, lora: _Lora, number: int) -> None:
        self.flat, self.lora, self.base, self.number = flat, lora, lora.base_layer, number
        self.by_column = _is_transposed(self.base)
        # Squared norms of the rows of W, and what tells whether these are still its numbers.
        self._rows_sq: tuple[tuple[int, int, torch.device], Tensor] | None = None
        # The standard deviations of a step's noise, and which step's.
        self._scale: tuple[tuple[int, torch.device], Tensor] | None = None

    @property
    def _is_on(self) -> bool:
        lora = self.lora
        training = self.base.training and torch.is_grad_enabled() and not (lora.disable_adapters or lora.merged)
        return training and self.flat.strength > 0

    @uncompiled
    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base
        if not self._is_on:
            return type(base).forward(base, x, *args, **kwargs)
        is_cast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if is_cast else self._dtype(x)
        noisy = _NoisyWeight(self, self.flat.key(self.number), dtype, base.weight._version)
        bias = None if base.bias is None else base.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            y = _Linear.apply(x.to(dtype), bias, noisy)
        # As bitsandbytes' layers, whose results have the type of what they are given.
        return y.to(x.dtype) if _is_4bit(base) else y

    def _dtype(self, x: Tensor) -> torch.dtype:
        base = self.base
        if not _is_4bit(base):
            return base.weight.dtype
        if not base.compute_type_is_set:
            base.set_compute_type(x)
            base.compute_type_is_set = True
        return x.dtype if base.compute_dtype is None else base.compute_dtype

    def deviations(self, w: Tensor) -> Tensor:
        """The standard deviation of the noise of each output at this step, [outputs]; w: the weight, dense."""
        flat, now = self.flat, (self.flat.step, w.device)
        if self._scale is None or self._scale[0] != now:
            inputs = w.shape[0] if self.by_column else w.shape[1]
            norms = self._merged_rows_sq(w.T if self.by_column else w).clamp(min=0).sqrt()
            self._scale = now, (flat.strength / math.sqrt(inputs) * norms).contiguous()
        return self._scale[1]

    def _merged_rows_sq(self, w: Tensor) -> Tensor:
        """Squared norms of the rows of W + s B A, [outputs], without that sum: of |w + b A|^2 only b changes."""
        compute = compute_dtype(w.dtype)
        weight = self.base.weight
        now = weight.data_ptr(), weight._version, w.device
        if self._rows_sq is None or self._rows_sq[0] != now:
            self._rows_sq = now, torch.linalg.vector_norm(w, dim=1, dtype=compute).square()
        total, lora = self._rows_sq[1], self.lora
        active = [name for name in lora.active_adapters if name in lora.lora_A]
        if not active:
            return total
        _check_adapters("model", lora)
        a = torch.cat([lora.lora_A[name].weight for name in active])
        b = torch.cat([lora.lora_B[name].weight * lora.scaling[name] for name in active], 1).to(compute)
        # In the weight's type, in which it is read without a copy.
        both = (w @ a.to(w.dtype).T).to(compute)
        a = a.to(compute)
        return total + (b * (2 * both + b @ (a @ a.T))).sum(1)

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodType:
        # A copy of the layer is one without noise.
        base = memo.get(id(self.base), self.base)
        return MethodType(type(base).forward, base)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (self.base, "forward")


@dataclass
class _NoisyWeight:
    """What it takes to make a noisy weight in the forward pass, and the same in the backward pass.

    Attributes:
        layer: whose.
        key: of the noise.
        dtype: of the result.
        version: how often the weight had been written, as autograd counts.
        scale: standard deviations of the noise, once they are known.
    """

    layer: _NoisyForward
    key: int
    dtype: torch.dtype
    version: int
    scale: Tensor | None = None

    @torch.no_grad()
    def make(self) -> Tensor:
        """W + noise, in new memory."""
        weight = self.layer.base.weight
        if weight._version != self.version:
            raise RuntimeError("the weight of a layer with noise was written between its forward and backward pass")
        is_4bit = _is_4bit(self.layer.base)
        w = _dequantised(weight) if is_4bit else weight.detach().contiguous()
        if self.scale is None:
            self.scale = self.layer.deviations(w)
        out = w if is_4bit and w.dtype == self.dtype else torch.empty_like(w, dtype=self.dtype)
        ops.add_noise_(out, w, self.scale, self.key, self.layer.by_column)
        return out


class _Linear(torch.autograd.Function):
    """x W^T + b with a noisy W, which is not kept for the backward pass but computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, noisy: _NoisyWeight) -> Tensor:
        ctx.noisy = noisy
        w = noisy.make()
        return nn.functional.linear(x, w.T if noisy.layer.by_column else w, bias)

    # The decorator hides the names of the parameters.
    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            w = ctx.noisy.make()
            of_x = grad @ (w.T if ctx.noisy.layer.by_column else w)
        if ctx.needs_input_grad[1]:
            of_bias = grad.flatten(0, -2).sum(0)
        return of_x, of_bias, None


def _dequantised(weight: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        raise RuntimeError("bitsandbytes has packed a 4-bit weight for inference on the CPU: it cannot be trained with")
    return dequantize_4bit(weight.detach(), weight.quant_state)


def _is_4bit(layer: _BaseLayer) -> bool:
    return hasattr(layer.weight, "quant_state") and hasattr(layer, "compute_type_is_set")


def _is_transposed(layer: nn.Module) -> bool:
    """Whether it is a Conv1D of transformers, GPT-2's linear layer, whose weight is [inputs, outputs]."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"


def _is_lora(module: nn.Module) -> TypeGuard[_Lora]:
    """Whether it is a LoRA layer around a linear one."""
    base = getattr(module, "base_layer", None)
    return hasattr(module, "lora_A") and (isinstance(base, nn.Linear) or (base is not None and _is_transposed(base)))


def _check_layer(name: str, module: _Lora) -> None:
    base, label = module.base_layer, f"layer {name!r}"
    own = vars(base).get("forward")
    is_plain = own is None or getattr(own, "__func__", None) is type(base).forward
    allowed = "must have no other FlatLoRA, nor accelerate's hooks: a model on one device"
    check(is_plain, label, "a forward of its own", allowed)
    weight = base.weight
    check(not weight.requires_grad, label, "a base weight that is trained", "must be frozen")
    dense = type(weight.detach()) is Tensor and weight.is_floating_point()
    dense = dense and (_is_transposed(base) or type(base).forward is nn.Linear.forward)
    allowed = "must be a dense Linear or Conv1D, or bitsandbytes' Linear4bit, whole on this rank"
    check(dense or _is_4bit(base), label, f"{type(base).__name__} of {type(weight).__name__}", allowed)
    _check_adapters(label, module)


def _check_adapters(label: str, module: _Lora) -> None:
    variants = sorted(name for name in module.active_adapters if name in getattr(module, "lora_variant", {}))
    check(
        not variants, label, f"adapters {variants}", "must be plain LoRA, whose sum with the base is the merged weight"
    )


def _check_checkpoints(model: nn.Module) -> None:
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        is_on = getattr(module, "gradient_checkpointing", False)
        reentrant = is_on and getattr(function, "keywords", {}).get("use_reentrant", False)
        allowed = "must be False: the first pass would be under no_grad, without noise"
        check(not reentrant, "use_reentrant", True, allowed)
