"""FSAM in Lightning's Trainer, where Lightning's own loop would not take whole sharpness-aware steps."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from ..batches.samples import first_samples
from ..optim.optimizer import FusedOptimizer
from ..optim.two_pass import TwoPass

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
    except ImportError:
        from pytorch_lightning import Callback, LightningModule, Trainer


class SharpnessAware(Callback):
    """Makes every step of automatic optimization a whole sharpness-aware step, as in fp32 and bf16 without it.

    - ``accumulate_grad_batches > 1``: Lightning evaluates only the last micro-batch a second time; this callback
      evaluates the other micro-batches again too.
    - ``precision="16-mixed"``: Lightning evaluates once, which is plain AdamW; this callback calls ``perturb(scaler)``
      and evaluates all micro-batches again.
    - ``precision="bf16-mixed"`` with ``gradient_clip_val``: Lightning refuses this; with the callback it clips.
    - an optimizer with ``ascent_fraction < 1``: the first pass sees that part of each micro-batch.

    The micro-batches of a step are kept until the next step. The second pass calls ``training_step`` and
    ``on_after_backward`` again.

    Example:
        >>> from fsam_triton.integrations.lightning import SharpnessAware
        >>> from pytorch_lightning import Trainer  # or: from lightning import Trainer
        >>> trainer = Trainer(callbacks=[SharpnessAware()], accumulate_grad_batches=4, logger=False)
    """

    def __init__(self) -> None:
        self._batches: list[tuple[Any, int]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning refuses to clip the gradients of an optimizer that unscales them, also where there is no scaler.
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            for optimizer in trainer.optimizers:
                if isinstance(optimizer, TwoPass | FusedOptimizer):
                    optimizer._step_supports_amp_scaling = False
        own = [one for one in trainer.optimizers if isinstance(one, TwoPass) and one.ascent_fraction < 1]
        if own and pl_module.automatic_optimization:
            for optimizer in own:
                optimizer.splits_batches = True
            # Both passes get the batch from Lightning's loop, which has no hook between it and training_step.
            trainer.strategy.training_step = _in_part(trainer.strategy.training_step, own[0])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _leave_whole(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._batches.clear()
        self._batches.append((batch, batch_idx))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, TwoPass) or not pl_module.automatic_optimization:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None and optimizer.perturbed:
            # FSAM.step has had the last micro-batch evaluated again.
            self._pass_again(trainer, pl_module, optimizer, self._batches[:-1])
        # There are no gradients if training_step returned None.
        elif scaler is not None and optimizer.is_sharp and _has_gradients(optimizer):
            optimizer.perturb(scaler)
            self._pass_again(trainer, pl_module, optimizer, self._batches)

    @staticmethod
    def _pass_again(
        trainer: Trainer, pl_module: LightningModule, optimizer: TwoPass, batches: list[tuple[Any, int]]
    ) -> None:
        # training_step may do without batch_idx.
        count = len(inspect.signature(pl_module.training_step).parameters)
        for arguments in batches:
            output = trainer.strategy.training_step(*arguments[:count])
            loss = output["loss"] if isinstance(output, Mapping) else output
            if loss is not None:
                trainer.strategy.backward(loss / trainer.accumulate_grad_batches, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning leaves out the step if training_step returned None for the last micro-batch.
        _restore(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        _leave_whole(trainer)
        _restore(trainer)


def _in_part(training_step: Callable[..., Any], optimizer: TwoPass) -> Callable[..., Any]:
    """`training_step` with part of the batch in the first pass of a sharpness-aware step."""

    @functools.wraps(training_step)
    def step(batch: Any, *args: Any, **kwargs: Any) -> Any:
        if optimizer.is_sharp and not optimizer.perturbed:
            batch = first_samples(batch, optimizer.ascent_fraction)
        return training_step(batch, *args, **kwargs)

    return step


def _leave_whole(trainer: Trainer) -> None:
    vars(trainer.strategy).pop("training_step", None)
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, TwoPass):
            optimizer.splits_batches = False


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _restore(trainer: Trainer) -> None:
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, TwoPass):
            optimizer.restore()
