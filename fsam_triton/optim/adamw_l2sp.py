"""AdamWL2SP: AdamW whose decay pulls towards the pre-trained weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .optimizer import FusedOptimizer


class AdamWL2SP(FusedOptimizer):
    r"""AdamW (arXiv 1711.05101) with the decoupled L2-SP penalty (arXiv 1802.01483), in one pass over all parameters.

    In a parameter group with ``l2_sp > 0``, a parameter with an anchor is pulled towards it,
    ``w -= lr * l2_sp * (w - anchor)``. A parameter without an anchor (a novel one, such as a new classifier) and every
    parameter of other groups decays to zero, ``w -= lr * weight_decay * w``. Then Adam follows, exactly as in
    `torch.optim.AdamW`. The optimizer reads and writes the state dicts of `torch.optim.AdamW` and can replace it
    anywhere: parameters and gradients are read wherever they are at the time of the step, and ``state`` and
    ``param_groups`` may be edited.

    A coordinate whose gradient is not finite keeps its weight and moments.

    Args:
        params: as for FusedOptimizer.
        lr: learning rate, a float or a tensor of one element (group; default: 1e-3).
        betas: decay rates of the first and second moment, each in [0, 1) (group; default: (0.9, 0.999)).
        eps: added to the denominator, >= 0 (group; default: 1e-8).
        weight_decay: decay to zero for parameters without an anchor, >= 0 (group; default: 1e-2).
        amsgrad: use the maximum of the second moments (group; default: False).
        **options: l2_sp, anchors, maximize, balance, balance_by, max_grad_norm, master_weights, ema_decay, trainable,
            stochastic_rounding, flatten and seed of `FusedOptimizer`.

    Raises:
        ArgumentError: an argument is out of its range, a trained parameter is complex or sparse, or an anchor does not
            fit.

    Example:
        >>> import torch
        >>> from fsam_triton import AdamWL2SP
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = AdamWL2SP(model.parameters(), lr=1e-3, l2_sp=0.01)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        own = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, "adamw", lr, **own, **options)
