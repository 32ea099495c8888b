"""Per-sample losses for models that are not classifiers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..errors import check

# What transformers' labels have where there is nothing to predict: in padding, or in a prompt.
_IGNORED = -100


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of each sequence under a causal language model, for ``estimate_fisher(..., loss_fn=causal_lm_loss)``.

    Logits at a position predict the label at the next position, as in transformers: labels are the input ids, with -100
    where there is nothing to predict (padding, a prompt). The terms are summed, because -log p of a sequence is the sum
    over its tokens; a mean, as used in training, would give the tokens of longer sequences less weight.

    Args:
        logits: floats [batch, length, vocabulary].
        labels: int64 [batch, length].

    Returns:
        [batch], in the logits' type.

    Raises:
        ArgumentError: the shapes are not as described.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 4, 8)  # every token is as likely as any other
        >>> labels = torch.tensor([[1, 2, 3, 4], [-100, -100, 3, -100]])
        >>> causal_lm_loss(logits, labels) / torch.tensor(8.0).log()
        tensor([3., 1.])
    """
    check(logits.dim() == 3, "logits", tuple(logits.shape), "must have shape [batch, length, vocabulary]")
    shape = tuple(logits.shape[:2])
    check(labels.shape == shape, "labels", tuple(labels.shape), f"must have the shape {shape} of the logits' positions")
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=_IGNORED, reduction="none")
    return losses.sum(1)
