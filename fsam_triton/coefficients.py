"""The few numbers a pass needs, computed on the device: no pass waits for the host, no value recompiles a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels.reference import key_at

_WORD = 0xFFFFFFFF


class HyperParameters:
    """Rows of hyper-parameters on one device, sent again only when a value has changed."""

    def __init__(self) -> None:
        self._sent: tuple = ()
        self._rows = torch.empty(0)

    def rows(self, values: Sequence[Sequence[float | Tensor]], device: torch.device) -> Tensor:
        """`values` as fp64 [rows, columns]. A tensor among them (a learning rate) is copied without a host sync."""
        plain = tuple(tuple(None if isinstance(v, Tensor) else float(v) for v in row) for row in values)
        if plain != self._sent:
            numbers = [[0.0 if v is None else v for v in row] for row in plain]
            host = torch.tensor(numbers, dtype=torch.float64, pin_memory=device.type == "cuda")
            self._sent, self._rows = plain, host.to(device, non_blocking=True)
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if isinstance(value, Tensor):
                    self._rows[i, j].copy_(value.detach().squeeze(), non_blocking=True)
        return self._rows


def keys(step: Tensor, salt: Tensor, offset: Tensor) -> Tensor:
    """Keys of the random numbers: another for every step and salt, with the counter starting at `offset`.

    Args:
        step: float [n], updates so far.
        salt: int64 [n], made of seed, bucket and pass.
        offset: int64 [n], first element of the launch in its bucket.

    Returns:
        fp64 [n] of integers in [0, 2**32).
    """
    key = (step.to(torch.int64) * 0x85EBCA6B + salt) & _WORD
    for factor in (0x7FEB352D, 0x846CA68B):
        key = ((key ^ (key >> 15)) * factor) & _WORD
    return key_at(key ^ (key >> 16), offset).to(torch.float64)


def ascent(rho: Tensor, norm_sq: Tensor, key: Tensor) -> Tensor:
    """Coefficients of `perturb_`, [n, 2]: rho / (norm + 1e-12), or 0 where the norm is not finite; the keys."""
    norm = norm_sq.sqrt()
    scale = torch.where(torch.isfinite(norm), rho / (norm + 1e-12), 0.0)
    return torch.stack((scale, key), 1)


def clip_factor(norm_sq: Tensor, inv_scale: Tensor | float, max_norm: float) -> tuple[Tensor, Tensor]:
    """What to multiply gradients with to make their norm at most max_norm (as `clip_grad_norm_`); whether to skip."""
    norm = norm_sq.sqrt() * inv_scale
    return (max_norm / (norm + 1e-6)).clamp(max=1.0), ~torch.isfinite(norm)


def descent(hyper: Tensor, step: Tensor, factor: Tensor | float, key: Tensor) -> Tensor:
    """Coefficients of `adamw_l2sp_`, [n, 9]; arXiv 1711.05101, algorithm 2.

    Args:
        hyper: fp64 [n, 6]: lr, beta1, beta2, eps, decay rate (weight_decay or l2_sp), 1 or -1 to maximize.
        step: [n], updates including this one.
        factor: unscaling times clipping; NaN skips the update.
        key: fp64 [n].
    """
    lr, beta1, beta2, eps, rate, sign = hyper.unbind(1)
    step = step.to(torch.float64)
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step
    return torch.stack((sign * factor, lr * rate, 1 - beta1, beta2, 1 - beta2, lr / bias1, bias2.rsqrt(), eps, key), 1)
