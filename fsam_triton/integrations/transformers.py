"""Sharpness-aware steps for transformers' Trainer, and optimizers created from its TrainingArguments."""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..batches.samples import first_samples
from ..errors import check
from ..optim.flat_lora import FlatLoRA
from ..optim.fsam import FSAM
from ..optim.optimizer import FusedOptimizer
from ..optim.two_pass import TwoPass
from .optim_args import parse_optim_args


def create_optimizer(
    model: nn.Module,
    args: TrainingArguments,
    optimizer_cls: type[FusedOptimizer] = FSAM,
    *,
    novel: Collection[str] = (),
    decays: Collection[str] | None = None,
    **kwargs: Any,
) -> FusedOptimizer:
    """An optimizer with Trainer's groups, parameter names, and the TrainingArguments' settings for AdamW.

    Args:
        model: the model whose trainable parameters the optimizer gets.
        args: learning_rate, adam_beta1, adam_beta2, adam_epsilon, weight_decay and seed are read. ``optim`` and
            max_grad_norm are not: Trainer itself clips.
        optimizer_cls: FSAM, MomentumSAM or AdamWL2SP (default: FSAM).
        novel: names of parameters that have no pre-trained value, such as the ``missing_keys`` of
            ``from_pretrained(..., output_loading_info=True)``: with ``l2_sp`` they decay to zero, and all others
            towards their current values (default: none).
        decays: names of the parameters with weight decay (default: Trainer's choice, all except biases and norm
            layers).
        **kwargs: all other arguments of the optimizer; they take precedence over ``args``.

    Raises:
        ValueError: novel and anchors are both given, or the optimizer raises it.

    Example:
        >>> import transformers
        >>> from fsam_triton.integrations.transformers import create_optimizer
        >>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> args = transformers.TrainingArguments(learning_rate=2e-5, weight_decay=0.1, use_cpu=True)
        >>> optimizer = create_optimizer(model, args, rho=0.1)
        >>> [(group["lr"], group["rho"], group["weight_decay"]) for group in optimizer.param_groups]
        [(2e-05, 0.1, 0.1), (2e-05, 0.1, 0.0)]
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if novel:
        check("anchors" not in kwargs, "novel", novel, "must be empty with anchors, which leave out what is novel")
        kwargs["anchors"] = {name: p for name, p in named if name not in set(novel)}
    if decays is None:
        # It is a method, but of the model alone.
        decays = Trainer.get_decay_parameter_names(cast("Trainer", None), model)
    decays = set(decays)
    groups = [
        {"params": [(name, p) for name, p in named if name in decays]},
        {"params": [(name, p) for name, p in named if name not in decays], "weight_decay": 0.0},
    ]
    from_args = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        "seed": args.seed,
    }
    return optimizer_cls([group for group in groups if group["params"]], **{**from_args, **kwargs})


@dataclass
class _Pass:
    """The first pass of a micro-batch, as the second one needs it.

    Attributes:
        inputs: the inputs of `training_step`.
        num_items_in_batch: the number of items in all micro-batches.
        random: the random state before the pass, if dropout masks are to be the same.
        prepared: the result of `_prepare_inputs`; for TRL's online trainers this includes generating completions.
        fraction: the fraction of the samples that this pass sees.
    """

    inputs: dict[str, Any]
    num_items_in_batch: Tensor | int | None
    random: list[Tensor] | None
    prepared: Any = None
    fraction: float = 1.0


# The class below, whichever it is.
if TYPE_CHECKING:
    _Below = Trainer
else:
    _Below = object


class SharpnessAwareMixin(_Below):
    """Gives each step of transformers' Trainer, or of a class derived from it, two passes; put it before that class.

    The gradients of all micro-batches of a step determine the perturbation; then the same micro-batches are passed
    again at the perturbed weights, by the ``training_step`` of the class below, with the result of its
    ``_prepare_inputs`` from the first pass. Trainer logs the loss at the weights, and the norm of the gradient at the
    perturbed weights, which ``args.max_grad_norm`` clips. The schedule of the `FSAM` decides which steps have a second
    pass, and its ``ascent_fraction`` which part of each micro-batch the first pass sees (see `ascent_inputs`). Running
    statistics (BatchNorm), and the class's counts in private attributes (TRL's metrics, tokens, steps), are those of
    the first passes. The model's state dicts show clean weights at any time, and an exception leaves clean weights in
    the parameters.

    Args:
        *args, **kwargs: arguments of the class below; ``optimizers`` and ``optimizer_cls_and_kwargs`` can give an FSAM.
        optimizer_kwargs: arguments of `create_optimizer` (default: None, an FSAM from the TrainingArguments). They take
            precedence over those in ``args.optim_args``, a string such as ``"rho=0.02,schedule.last=decay"`` or
            ``"optimizer_cls=momentum-sam"`` (see `optim_args.parse_optim_args`).
        same_dropout: repeat the dropout masks of the first pass in the second, using PyTorch's random numbers of the
            CPU and the training device; after the step these are as after one pass (default: False, each pass has its
            own masks).

    Raises:
        ValueError: the optimizer is not of this package, or needs single samples (gamma < 1); optimizer_kwargs are
            given together with an optimizer; ``args.optim`` asks for another one; ``args.optim_args`` cannot be read;
            or DeepSpeed or the first version of FSDP is used.

    Example:
        >>> import transformers
        >>> from fsam_triton.integrations.transformers import SharpnessAwareMixin
        >>> class SAMSeq2SeqTrainer(SharpnessAwareMixin, transformers.Seq2SeqTrainer):
        ...     pass
    """

    def __init__(
        self, *args: Any, optimizer_kwargs: Mapping[str, Any] | None = None, same_dropout: bool = False, **kwargs: Any
    ) -> None:
        self.optimizer_kwargs: dict[str, Any] = dict(optimizer_kwargs or {})
        self.same_dropout = same_dropout
        # The micro-batches of the step so far, and the one whose pass is under way.
        self._passed: list[_Pass] = []
        self._current: _Pass | None = None
        super().__init__(*args, **kwargs)
        unused = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        allowed = "must be None with optimizers or optimizer_cls_and_kwargs"
        check(not (optimizer_kwargs and unused), "optimizer_kwargs", optimizer_kwargs, allowed)
        if not unused:
            # It would be left unread.
            names = ("adamw_torch", "adamw_torch_fused")
            allowed = f"must be one of {', '.join(names)}: an FSAM is made, by optimizer_kwargs"
            check(self.args.optim in names, "args.optim", str(self.args.optim), allowed)
            self.optimizer_kwargs = parse_optim_args(self.args.optim_args or "") | self.optimizer_kwargs
        allowed = "must be None: use FSDP with fsdp_version 2 or, in DeepSpeed, AdamWL2SP with transformers' Trainer"
        check(not self.is_deepspeed_enabled, "args.deepspeed", self.args.deepspeed, allowed)
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            version = None if plugin is None else plugin.fsdp_version
            check(version == 2, "args.fsdp_config", f"fsdp_version {version}", "must be fsdp_version 2")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the FSAM, unless there is one, as `transformers.Trainer.create_optimizer`."""
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            model = cast("nn.Module", self.model) if model is None else model
            decays = self.get_decay_parameter_names(model)
            self.optimizer: torch.optim.Optimizer | None = create_optimizer(
                model, self.args, **{"decays": decays, **self.optimizer_kwargs}
            )
        optimizer = super().create_optimizer(model)
        own = self._sam
        allowed = "must be an FSAM, a SAM, a MomentumSAM or an AdamWL2SP"
        check(isinstance(own, TwoPass | FusedOptimizer), "optimizer", type(own).__name__, allowed)
        gamma = getattr(own, "gamma", 1)
        check(gamma == 1, "gamma", gamma, "must be 1 with a Trainer: it has no losses of single samples")
        return optimizer

    @property
    def _sam(self) -> torch.optim.Optimizer:
        """The optimizer under accelerate's wrapper."""
        outermost: Any = self.optimizer
        return getattr(outermost, "optimizer", outermost)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as `transformers.Trainer.train`."""
        self._passed.clear()
        try:
            return super().train(*args, **kwargs)
        except BaseException:
            # Between the second pass and the step Trainer clips gradients and calls callbacks.
            if isinstance(self._sam, TwoPass | FusedOptimizer):
                self._sam.restore()
            raise

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Pass a micro-batch, as `transformers.Trainer.training_step`; after the last one of a step, pass all of them
        again.

        Returns:
            The loss at the clean weights.
        """
        optimizer = self._sam
        if not (isinstance(optimizer, TwoPass) and optimizer.is_sharp):
            return super().training_step(model, inputs, num_items_in_batch)
        random = _random_state(self.args.device) if self.same_dropout else None
        self._passed.append(_Pass(inputs, num_items_in_batch, random, fraction=optimizer.ascent_fraction))
        try:
            with optimizer.ascent_pass():
                loss = self._pass(model, self._passed[-1])
            if self.accelerator.sync_gradients:
                optimizer.perturb(self.accelerator.scaler)
                with _statistics_kept(model), _tallies_kept(self):
                    self._pass_again(model)
        except BaseException:
            # Trainer catches some itself (auto_find_batch_size) and continues.
            self._passed.clear()
            optimizer.restore()
            raise
        return loss

    def _pass(self, model: nn.Module, which: _Pass) -> Tensor:
        self._current = which
        items = which.num_items_in_batch
        if which.fraction < 1 and items is not None:
            # Of which the loss is a sum, over as many items as the step has.
            whole, part = map(self._count_items, (which.inputs, self.ascent_inputs(which.inputs)))
            items = items * (part / whole).to(items.device if isinstance(items, Tensor) else whole.device)
        try:
            return super().training_step(model, which.inputs, items)
        finally:
            self._current = None

    def _count_items(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The labels that count, at least 1, as Trainer counts them for `num_items_in_batch`; nothing waits for it."""
        labels = inputs.get("shift_labels", inputs["labels"])
        if "shift_labels" not in inputs and getattr(self, "_loss_shifts_labels", False):
            labels = labels[..., 1:]
        return labels.ne(-100).sum().clamp(min=1)

    def ascent_inputs(self, inputs: Any) -> Any:
        """The part of a micro-batch that the first pass sees with ``ascent_fraction < 1``; override it for other
        inputs.

        Args:
            inputs: those of a micro-batch, before or after Trainer has sent them to the device.

        Returns:
            The first samples, rounded up to whole samples, if inputs are a mapping with ``"labels"`` that has a row per
            sample. A single row of packed texts stays whole.

        Raises:
            ArgumentError: inputs have no labels: rows can depend on each other, as pairs of preferences do.
        """
        fraction = cast("TwoPass", self._sam).ascent_fraction
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        fits = isinstance(labels, Tensor) and labels.dim() > 0
        allowed = f"must be 1 with inputs without labels in {type(self).__name__}, or override ascent_inputs"
        check(fits, "ascent_fraction", fraction, allowed)
        return first_samples(inputs, fraction)

    def _prepare_inputs(self, inputs: Any) -> Any:
        if (current := self._current) is None:
            return super()._prepare_inputs(inputs)
        if current.prepared is None:
            current.prepared = super()._prepare_inputs(inputs)
        # What is made of the inputs may take entries out of them.
        return copy.copy(self.ascent_inputs(current.prepared) if current.fraction < 1 else current.prepared)

    def _pass_again(self, model: nn.Module) -> None:
        while self._passed:
            which = self._passed.pop(0)
            which.fraction = 1.0
            if which.random is not None:
                _set_random_state(self.args.device, which.random)
            with self.accelerator.no_sync(model) if self._passed else contextlib.nullcontext():
                self._pass(model, which)


class SAMTrainer(SharpnessAwareMixin, Trainer):
    """transformers' Trainer with sharpness-aware steps; see `SharpnessAwareMixin`."""


@contextlib.contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """At its end, restores the running statistics of BatchNorm and similar layers."""
    layers = [module for module in model.modules() if getattr(module, "track_running_stats", False)]
    buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
    values = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)


@contextlib.contextmanager
def _tallies_kept(trainer: Trainer) -> Iterator[None]:
    """At its end, restores the numbers, and collections of numbers, in a trainer's state and private attributes.

    TRL's trainers keep their metrics in the latter, and count tokens, micro-batches and seconds there; axolotl's counts
    tokens in the former.
    """
    own = {name: value for name, value in vars(trainer).items() if name.startswith("_")}
    holders = ((trainer, own), (trainer.state, vars(trainer.state)))
    kept = [(holder, {n: copy.deepcopy(v) for n, v in values.items() if _is_tally(v)}) for holder, values in holders]
    try:
        yield
    finally:
        for holder, values in kept:
            vars(holder).update(values)


def _is_tally(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_tally, value.values()))
    return all(map(_is_number, value if isinstance(value, list | deque) else [value]))


def _is_number(value: Any) -> bool:
    # To copy a tensor on a GPU would be a launch for each.
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1 and value.is_cpu)


def _random_state(device: torch.device) -> list[Tensor]:
    """States of PyTorch's generators of the CPU and of the device."""
    own = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state()]
    return [torch.get_rng_state(), *own]


def _set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state)


class FlatLoRACallback(TrainerCallback):
    """`FlatLoRA` in transformers' Trainer and classes derived from it, such as TRL's, for a model with LoRA adapters.

    The noise begins and ends with training; a resumed run has the same noise as an uninterrupted one. The strength
    rises over the steps of the run.

    Args:
        sigma: the strength of the noise at the end (default: 0.05).
        seed: seed of the noise (default: None, that of the TrainingArguments).

    Attributes:
        flat: the `FlatLoRA` of the current training, or None.

    Raises:
        ArgumentError: when training begins; see `FlatLoRA`.

    Example:
        >>> from fsam_triton.integrations.transformers import FlatLoRACallback
        >>> callbacks = [FlatLoRACallback(sigma=0.05)]  # of any Trainer whose model has LoRA adapters
    """

    def __init__(self, sigma: float = 0.05, seed: int | None = None) -> None:
        self.sigma = sigma
        self.seed = seed
        self.flat: FlatLoRA | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the noise on the model."""
        # Where a training has ended in an exception, nobody was told.
        self.close()
        seed, steps = args.seed if self.seed is None else self.seed, max(state.max_steps, 1)
        model = kwargs["model"]
        self.flat = FlatLoRA(model, sigma=self.sigma, total_steps=steps, seed=seed, step=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Change the noise for the next step."""
        if self.flat is not None:
            self.flat.step = state.global_step

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the noise off the model."""
        self.close()

    def close(self) -> None:
        """Take the noise off the model, if it is there, for example after an exception ended training."""
        if self.flat is not None:
            self.flat.close()
        self.flat = None
