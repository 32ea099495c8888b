"""The small problem on which optimizers are compared, and how far rounding may take them apart on it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def small_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.ModuleDict:
    """568 weights in six tensors; the values are multiples of 1/64 in [-1, 1], hence exact in every dtype."""
    model = nn.ModuleDict({"dense": nn.Linear(24, 16), "norm": nn.LayerNorm(16), "head": nn.Linear(16, 8)})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-64, 65, parameter.shape, generator=generator) / 64)
    return model.to(dtype)


@dataclass(frozen=True)
class Problem:
    """A loss with another linear term at every step: sum(c_t * w) + curvature * sum(sin w).

    |c_t| is a multiple of 1/64 in [0.75, 1.25] with a random sign, exact in every dtype, and |curvature| <= 0.25 keeps
    every gradient within [0.5, 1.5] in magnitude: Adam's quotient is well conditioned and rounding errors have a bound.
    With `sparse`, the parameters 1, 2 and 4 have no part in the loss at some steps (4 first has one at the third).
    """

    curvature: float = 0.25
    sparse: bool = False
    seed: int = 0

    def present(self, step: int, index: int) -> bool:
        if not self.sparse:
            return True
        return {1: step % 3 != 1, 2: step % 4 == 0, 4: step % 5 >= 2}.get(index, True)

    def linear_term(self, step: int, index: int, like: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1009 + step) * 1009 + index)
        magnitude = torch.randint(48, 81, like.shape, generator=generator) / 64
        sign = torch.randint(0, 2, like.shape, generator=generator) * 2 - 1
        return (magnitude * sign).to(like.dtype)

    def loss(self, weights: Iterable[Tensor], step: int) -> Tensor:
        total = 0.0
        for index, weight in enumerate(weights):
            if self.present(step, index):
                total = total + (self.linear_term(step, index, weight) * weight).sum()
                if self.curvature:
                    total = total + self.curvature * weight.sin().sum()
        return total

    def gradients(self, weights: Iterable[Tensor], step: int) -> list[Tensor | None]:
        leaves = [weight.detach().clone().requires_grad_() for weight in weights]
        return list(torch.autograd.grad(self.loss(leaves, step), leaves, allow_unused=True))


def rounding_bound(steps: int, lr: float, weight: Tensor, curvature: float = 0.25) -> float:
    """How far `steps` AdamW steps on a `Problem`, in the dtype of `weight`, may be from exact arithmetic, at the worst.

    With |g| in [0.5, 1.5], u = eps / 2 and |m| / sqrt(v) <= 3, at step t:
      gradient: 4 roundings of terms <= 1.5, over sqrt(v) >= 0.5                                 ->  12 u
      exp_avg: 3 roundings of at most 1.5 a step, forgotten at rate 1 - beta1 >= 0.1, over 0.5    ->  90 u
      exp_avg_sq: 3 roundings a step, never forgotten here; the square root halves, the factor 3  ->  4.5 t u
      quotient, bias corrections, lr: 10 roundings of at most 3                                   ->  30 u
    so lr * (132 t + 2.25 t^2) u in all, plus two roundings of the weight at each step (decay, update). A gradient that
    depends on the weight feeds an error back by at most lr * curvature / 0.5 * (1 + 3) a step.
    """
    u = torch.finfo(weight.dtype).eps / 2
    magnitude = 1 + float(weight.detach().abs().max()) if weight.numel() else 1.0
    local = lr * (132 * steps + 2.25 * steps**2) * u + 2 * steps * magnitude * u
    return local * math.exp(8 * curvature * lr * steps)


def combination_bound(steps: int, lr: float, weight: Tensor, factor: float, n: int, curvature: float = 0.25) -> float:
    """What comes on top of `rounding_bound` where a multiple of a second gradient is added: GSAM's, LookSAM's factor.

    With Adam's eps = 1 and |g + x v| <= 3 (3 over a denominator of at least 1 is 1.5 over 0.5, so that `rounding_bound`
    holds), and gradients a, b of n weights in all with |a|, |b| in [0.5, 1.5], as a `Problem` has them. A sum of n
    products is off by n u times the sum of their magnitudes, which is at most norm(a) norm(b):
      c = <a, b> / norm(b)^2, |c| <= 1/3: off by (3 + 3) n u
      v = a - c b, |v| <= 2: off by 1.5 * 6 n u = 9 n u
      x = factor * norm(a) / norm(v) <= 3 factor, norm(v) >= sqrt(n) / 2: relatively off by n u + n u + 2 * 9 n u
      x v: off by 3 * 2 * 20 n u + 3 * 9 n u <= 150 n u, times the factor
    and an error of the gradient counts (1 + 3) times in Adam's quotient.
    """
    u = torch.finfo(weight.dtype).eps / 2
    return 4 * lr * steps * 150 * n * u * factor * math.exp(8 * curvature * lr * steps)


def assert_weights_close(
    actual: Iterable[Tensor], expected: Iterable[Tensor], steps: int, lr: float, *, curvature=0.25, extra=0.0
) -> None:
    """Weights after `steps` steps equal the reference's to the rounding errors of their dtype (twice: two programs)."""
    for index, (weight, exact) in enumerate(zip(actual, expected, strict=True)):
        bound = 2 * rounding_bound(steps, lr, weight, curvature) + extra
        difference = (weight.detach().double() - exact.detach().double()).abs()
        assert weight.isfinite().all(), f"parameter {index} is not finite"
        worst = float(difference.max()) if difference.numel() else 0.0
        assert worst <= bound, f"parameter {index} is off by {worst:.3g}, rounding explains {bound:.3g}"
