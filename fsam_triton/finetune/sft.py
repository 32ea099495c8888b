"""Trains a causal language model: TRL's SFTTrainer with the optimizers of this package."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
import transformers
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]  (trl exports them lazily)

from .. import FSAM
from ..analysis import mask_density, rounded_weights
from ..integrations.transformers import SharpnessAwareMixin
from ..optim.optimizer import FusedOptimizer
from .errors import InputError, writing
from .language_models import Task, adapter_config, quiet
from .optimizers import build_optimizer
from .options import DTYPES, SAM_TYPES, Arguments
from .progress import Progress
from .report import ROUNDED_BITS, PeakMemory, Run
from .results import TRAINER_CHECKPOINTS

ONE_PASS = {"none", "momentum-sam"}


class Trainer:
    """One training run: TRL's trainer of a freshly loaded model, and what is noted of it.

    Two runs with the same seed start from the same weights, see the same batches in the same order, and start dropout
    from the same state. The first one has its texts tokenized (and packed), and leaves them to the task.

    Args:
        arguments: the options.
        sam_type: one of `SAM_TYPES`.
        task: the `language_models.Task`.

    Raises:
        InputError: the model is not causal, or no text is left.
    """

    def __init__(self, arguments: Arguments, sam_type: str, task: Task) -> None:
        datasets.disable_progress_bars()
        self.arguments = arguments
        self.run: Run = Run(SAM_TYPES[sam_type], metric="perplexity")
        self.checkpoint: str | None = None
        transformers.set_seed(arguments.seed)
        model, novel = task.load_model(DTYPES[arguments.dtype])
        cls = OnePassTrainer if sam_type in ONE_PASS else TwoPassTrainer
        with quiet():
            self.sft: OnePassTrainer | TwoPassTrainer = cls(
                run=self.run,
                make_optimizer=lambda model, steps: build_optimizer(arguments, sam_type, model, novel, steps),
                model=model,
                args=training_arguments(arguments, sam_type, task),
                train_dataset=task.train,
                eval_dataset=task.validation,
                processing_class=task.tokenizer,
                peft_config=adapter_config(arguments) if arguments.lora else None,
            )
        if task.collator is None:
            keep_tokens(self.sft, task, arguments)
        self.run.total_steps = arguments.total_steps(len(self.sft.train_dataset))
        self.sft.args.warmup_steps = math.ceil(self.run.total_steps * arguments.warmup_ratio)
        self.sft.args.lr_scheduler_kwargs = arguments.scheduler_kwargs(self.run.total_steps)

    @property
    def model(self) -> Any:
        """The model, with its adapter if there is one."""
        return self.sft.model

    def final_weights(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the model has the weights to evaluate and to save: clean ones, or their average."""
        return self.sft.final_weights()

    def train(self, train: object, validation: object, checkpoint: Callable[[Trainer], object] | None = None) -> None:
        """Train on the task's texts; evaluate after each pass over them and at the end.

        Args:
            train, validation: the texts of the task, which the trainer has.
            checkpoint: called with this trainer after every ``--save_steps`` steps.
        """
        if checkpoint:
            self.sft.notes.saved = lambda: checkpoint(self)
        transformers.set_seed(self.arguments.seed)
        peak = PeakMemory(self.arguments.device)
        try:
            with peak:
                self.sft.train(resume_from_checkpoint=self.checkpoint)
        finally:
            self.sft.notes.progress.close()
            self.run.peak_memory_bytes = max(self.run.peak_memory_bytes, peak.bytes)
        optimizer = self.sft.own_optimizer
        if isinstance(optimizer, FSAM) and optimizer.mask:
            trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
            densities = mask_density(optimizer, self.model)
            self.run.mask_density = {name: density for name, density in densities.items() if name in trained}

    def evaluate_rounded(self, validation: object) -> None:
        """Note perplexity and loss with the linear layers rounded to `ROUNDED_BITS`; not of an adapter.

        Args:
            validation: the texts of the task, which the trainer has.
        """
        if self.arguments.lora:
            return
        with self.final_weights(), rounded_weights(self.model, ROUNDED_BITS):
            self.run.rounded = self.sft.score(f"evaluating with {ROUNDED_BITS}-bit weights")

    def state_dict(self) -> dict[str, Any]:
        """Return what is noted, and the step at which the Trainer has written a checkpoint of all else."""
        return {"run": dataclasses.asdict(self.run), "step": self.sft.state.global_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue, in `train`, after the step at which the state was taken.

        Raises:
            InputError: the Trainer's checkpoint is gone.
        """
        folder = Path(str(self.sft.args.output_dir), f"checkpoint-{state['step']}")
        if not (folder / "trainer_state.json").exists():
            raise InputError(f"--resume_from_checkpoint: {folder} is missing or damaged")
        self.run = self.sft.run = Run(**state["run"])
        self.checkpoint = str(folder)


def training_arguments(arguments: Arguments, sam_type: str, task: Task) -> SFTConfig:
    """Return TRL's arguments for the options; what the optimizer does by itself is off."""
    folder = Path(arguments.output_dir)
    if arguments.save_steps or arguments.resume_from_checkpoint:
        folder = folder / TRAINER_CHECKPOINTS / sam_type
    prepared = task.collator is not None
    return SFTConfig(
        str(folder),
        max_length=task.length,
        packing=arguments.packing,
        packing_strategy=arguments.packing_strategy or "bfd",
        eval_packing=False,
        dataset_kwargs={"skip_prepare_dataset": True} if prepared else None,
        num_train_epochs=arguments.num_train_epochs,
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.per_device_train_batch_size,
        per_device_eval_batch_size=arguments.per_device_eval_batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        gradient_checkpointing=arguments.gradient_checkpointing,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type=arguments.lr_scheduler_type,
        max_grad_norm=0.0,
        bf16=arguments.bf16,
        seed=arguments.seed,
        use_cpu=arguments.use_cpu,
        eval_strategy="epoch",
        save_strategy="steps" if arguments.save_steps else "no",
        save_steps=arguments.save_steps or 500,
        # The last one is whole, and the one before is what is referred to until then.
        save_total_limit=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=arguments.device.type == "cuda",
    )


def keep_tokens(sft: Noted, task: Task, arguments: Arguments) -> None:
    """Leave the prepared texts to the runs that follow; raise InputError if there are none."""
    for which, before, after in (
        ("training", task.train, sft.train_dataset),
        ("validation", task.validation, sft.eval_dataset),
    ):
        if not any(label != -100 for labels in after["labels"] for label in labels[1:]):
            raise InputError(f"no {which} text has a token to predict within --max_seq_length {task.length}")
        if len(after) < len(before) and not (arguments.packing and which == "training"):
            print(f"{which} texts without a token to predict, left out: {len(before) - len(after)}", flush=True)
    task.train, task.validation, task.collator = sft.train_dataset, sft.eval_dataset, sft.data_collator


# The class below.
if TYPE_CHECKING:
    _Below = SFTTrainer
else:
    _Below = object


class Noted(_Below):
    """Goes before TRL's trainer: the optimizer of the options, the perplexity of all tokens, and notes of each step."""

    # The class below allows None and other kinds of data sets, too.
    model: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self, *, run: Run, make_optimizer: Callable[[nn.Module, int], FusedOptimizer], **keywords: Any
    ) -> None:
        self.run = run
        self.make_optimizer = make_optimizer
        self.step_loss: Tensor | float = 0.0
        self.step_tokens: Tensor | int = 0
        super().__init__(**keywords)
        self.notes: Notes = Notes(self)
        self.remove_callback(transformers.PrinterCallback)
        self.add_callback(self.notes)

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def _save_checkpoint(self, *arguments: Any, **keywords: Any) -> None:
        with writing(self.args.output_dir):
            super()._save_checkpoint(*arguments, **keywords)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Make the optimizer of the options, unless there is one."""
        if self.optimizer is None:
            self.optimizer: Optimizer | None = self.make_optimizer(self.model, self.run.total_steps)
        return super().create_optimizer(model)

    @property
    def own_optimizer(self) -> FusedOptimizer:
        """The optimizer under accelerate's wrapper."""
        outermost: Any = self.optimizer
        return getattr(outermost, "optimizer", outermost)

    def final_weights(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the model has the weights to evaluate and to save."""
        self.model.eval()
        optimizer = self.own_optimizer
        return optimizer.ema_weights() if optimizer.ema_decay is not None else contextlib.nullcontext()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Pass a micro-batch; note the sum of its tokens' losses, and how many these are."""
        tokens = (inputs["labels"][:, 1:] != -100).sum()
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Trainer's number of items is one too many for each text of GPT-2, so its loss is too small there.
        items = num_items_in_batch
        if items is None:
            items = tokens * self.current_gradient_accumulation_steps
        self.step_loss, self.step_tokens = self.step_loss + loss * items, self.step_tokens + tokens
        return loss

    @torch.no_grad()
    def score(self, doing: str) -> tuple[float, float]:
        """Return perplexity and loss, inside `final_weights`: means over all tokens, not over batches."""
        total, tokens, batches = 0.0, 0, self.get_eval_dataloader()
        # A data loader draws from the generator of dropout.
        unchanged, bar = torch.random.fork_rng(devices=[]), self.notes.progress.waiting(doing, len(batches))
        with self.compute_loss_context_manager(), unchanged, bar as passed:
            for batch in batches:
                output = self.model(**self._prepare_inputs(batch), fused_lm_head=True)
                total -= output.log_probs.double().sum().item()
                tokens += output.label_mask.sum().item()
                passed()
        loss = total / tokens
        return math.exp(loss) if not loss > 700 else math.inf, loss

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        """Note perplexity and loss."""
        with self.final_weights():
            perplexity, loss = self.score("evaluating")
        self.run.evaluations.append((self.state.global_step, perplexity, loss))
        self.notes.progress.note(f"perplexity={perplexity:.2f}")
        return {"eval_loss": loss, "eval_perplexity": perplexity}


class Notes(transformers.TrainerCallback):
    """Shows the progress of a run, and notes loss and time of each step."""

    def __init__(self, trainer: Noted) -> None:
        self.trainer = trainer
        self.saved: Callable[[], object] = lambda: None
        self.progress: Progress = Progress(trainer.run.name, 0, shown=False)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Show the bar."""
        done = state.global_step
        self.progress = Progress(self.trainer.run.name, state.max_steps, done)
        texts_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        ends_epoch = done and done % math.ceil(len(self.trainer.train_dataset) / texts_per_step) == 0
        if ends_epoch and done not in [step for step, *_ in self.trainer.run.evaluations]:
            # Trainer saves before the evaluation of that step, and does not come back to it.
            self.trainer.evaluate()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Start the clock."""
        self.start: float = time.perf_counter()
        self.trainer.step_loss, self.trainer.step_tokens = 0.0, 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Note the step."""
        run, loss = self.trainer.run, float(self.trainer.step_loss / self.trainer.step_tokens)
        run.step_seconds.append(time.perf_counter() - self.start)
        run.losses.append(loss)
        self.progress.step(state.global_step, loss)
        # Continued after its last step, a Trainer would make one more.
        control.should_save = control.should_save and state.global_step < state.max_steps

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any) -> None:
        """Refer to what the Trainer has written."""
        self.saved()


class OnePassTrainer(Noted, SFTTrainer):
    """For optimizers whose step is one pass."""


# Type checkers see two base classes that are transformers' Trainer, of which TRL has changed a method's arguments.
class TwoPassTrainer(Noted, SharpnessAwareMixin, SFTTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """For optimizers whose step is two passes."""
