"""Mixup for text classifiers: the rows of a batch are mixed in the model, and their labels in the loss."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from ..errors import check

if TYPE_CHECKING:

    class _Classifier(nn.Module):
        """What is used of a transformers sequence classifier, if it has it."""

        base_model: nn.Module
        classifier: nn.Module

        def get_input_embeddings(self) -> nn.Module: ...


@dataclass(frozen=True)
class Mixup:
    """When and how rows are mixed: row i becomes ``lam * row i + (1 - lam) * row j``, with j from a permutation.

    Lambda and permutation are drawn for each step from `seed` and the step number, so resumed training draws the same
    ones.

    Args:
        total_steps: number of training steps, >= 1.
        alpha: draw lambda from Beta(alpha, alpha), > 0 (default: None, lambda is `lam`).
        lam: a fixed lambda for all steps, in [0, 1]; not together with alpha (default: None, 0.5).
        where: ``"pooled"``, the input of the classifier, as in Mixup-Transformer (arXiv 2010.02394), or
            ``"embeddings"``, the input of the first layer, as in wordMixup (arXiv 1905.08941) (default: ``"pooled"``).
        start: fraction of the training before the first mixed step, in [0, 1]; Mixup-Transformer mixes in the second
            half (default: 0.5).
        seed: seed of the draws (default: 0).

    Raises:
        ValueError: an argument is out of its range, or both alpha and lam are given.

    Example:
        >>> import torch, transformers
        >>> from fsam_triton import FSAM, Mixup
        >>> config = transformers.BertConfig(
        ...     vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        ... )
        >>> model = transformers.BertForSequenceClassification(config)
        >>> optimizer = FSAM(model.parameters(), lr=1e-3)
        >>> mixup = Mixup(total_steps=4, alpha=1.0)
        >>> ids, labels = torch.randint(32, (8, 5)), torch.randint(2, (8,))
        >>> for step in range(4):
        ...     draw = mixup.draw(len(ids), step)  # once per step: both passes of SAM mix alike
        ...     def closure():
        ...         optimizer.zero_grad()
        ...         with draw.applied(model):
        ...             logits = model(input_ids=ids).logits
        ...         loss = draw.loss(logits, labels, label_smoothing=0.1)
        ...         loss.backward()
        ...         return loss
        ...     loss = optimizer.step(closure)
    """

    total_steps: int
    alpha: float | None = None
    lam: float | None = None
    where: str = "pooled"
    start: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.total_steps >= 1, "total_steps", self.total_steps, "must be >= 1")
        check(self.alpha is None or 0 < self.alpha < math.inf, "alpha", self.alpha, "must be > 0 and finite, or None")
        check(self.lam is None or 0 <= self.lam <= 1, "lam", self.lam, "must be in [0, 1] or None")
        check(self.alpha is None or self.lam is None, "lam", self.lam, "must be None with alpha, which draws it")
        check(self.where in ("pooled", "embeddings"), "where", self.where, 'must be "pooled" or "embeddings"')
        check(0 <= self.start <= 1, "start", self.start, "must be in [0, 1]")

    def draw(self, batch_size: int, step: int) -> MixupDraw:
        """Draw what is mixed in a step, for all its passes.

        Args:
            batch_size: rows of the batch.
            step: number of the step, from 0.

        Returns:
            A draw that does nothing if the step is one of the first ``start * total_steps``.
        """
        if step < self.start * self.total_steps:
            return MixupDraw()
        source = random.Random(f"{self.seed} {step}")
        generator = torch.Generator().manual_seed(source.getrandbits(63))
        if self.alpha is not None:
            lam = source.betavariate(self.alpha, self.alpha)
        else:
            lam = 0.5 if self.lam is None else self.lam
        return MixupDraw(lam, torch.randperm(batch_size, generator=generator), self.where)


@dataclass(frozen=True, eq=False)
class MixupDraw:
    """Lambda and permutation of one step, made by `Mixup.draw`; without a permutation, nothing is mixed.

    Attributes:
        lam: weight of the row itself, in [0, 1].
        permutation: int64 [batch], the row with which each row is mixed, or None.
        where: ``"pooled"`` or ``"embeddings"``.
    """

    lam: float = 1.0
    permutation: Tensor | None = None
    where: str = "pooled"

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Mix in the forward passes inside the block; backward passes may follow after it.

        With ``"embeddings"``, the output of the model's module `embeddings` is mixed (words, positions and types), or
        the word embeddings if there is no such module (GPT-2). Each row attends to every position that is a token in
        the row itself or in its partner: `attention_mask` becomes the larger of the two.

        With ``"pooled"``, the input of `classifier` is mixed (BERT, DistilBERT, DeBERTa: the pooled output; RoBERTa:
        the last hidden states, of which its head takes the first). If the classifier is `score` (GPT-2, Llama), which
        is linear and applied before the last token is looked up, the logits are mixed, which is equivalent.

        Args:
            model: a transformers sequence classifier, not wrapped (``ddp.module``), that is called with keyword
                arguments. Call it without ``labels``, whose loss would not be the mixed loss: see `loss`.

        Raises:
            ValueError: the model has no such module; or, in its forward pass, a batch has another size.
        """
        handles = [] if self.permutation is None else self._hooks(model)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, model: nn.Module) -> list[RemovableHandle]:
        own = cast("_Classifier", model)
        if self.where == "embeddings":
            embeddings = getattr(own.base_model, "embeddings", None) or own.get_input_embeddings()
            return [
                model.register_forward_pre_hook(self._join_masks, with_kwargs=True),
                embeddings.register_forward_hook(lambda module, args, output: self._mix(output)),
            ]
        if hasattr(model, "classifier"):
            return [own.classifier.register_forward_pre_hook(lambda module, args: (self._mix(args[0]), *args[1:]))]
        allowed = 'must be "embeddings" for a model that has neither `classifier` nor `score`'
        check(hasattr(model, "score"), "where", self.where, allowed)
        return [model.register_forward_hook(self._mix_logits)]

    def _join_masks(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        check(len(args) <= 1, "model", f"called with {len(args)} arguments by position", "name all but the first")
        mask = kwargs.get("attention_mask")
        if mask is not None:
            kwargs = {**kwargs, "attention_mask": torch.maximum(mask, self._partners(mask))}
        return args, kwargs

    def _mix_logits(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        output.logits = self._mix(output.logits)
        return output

    def _mix(self, rows: Tensor) -> Tensor:
        return self.lam * rows + (1 - self.lam) * self._partners(rows)

    def _partners(self, rows: Tensor) -> Tensor:
        permutation = self.permutation
        assert permutation is not None
        n = len(permutation)
        check(len(rows) == n, "batch_size", n, f"must be that of the batch, which has {len(rows)} rows")
        return rows[permutation.to(rows.device)]

    def loss(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """``lam * cross_entropy(logits, labels) + (1 - lam) * cross_entropy(logits, labels of the partners)``.

        Args:
            logits: [batch, classes].
            labels: int64 [batch], class numbers.
            label_smoothing: as in `torch.nn.functional.cross_entropy`, in [0, 1] (default: 0.0).

        Returns:
            The mean over the batch, a scalar.
        """
        own = functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        if self.permutation is None:
            return own
        others = functional.cross_entropy(logits, self._partners(labels), label_smoothing=label_smoothing)
        return self.lam * own + (1 - self.lam) * others
