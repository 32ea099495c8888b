"""Refuses options that cannot be used, or that contradict each other, before any training."""

from __future__ import annotations

import dataclasses
import math

from torch import nn

from .. import FisherMask, FishMask
from .errors import InputError
from .optimizers import MIXUP_OPTION_OF, build_mixup, build_optimizer, naming_options
from .options import (
    AUTO,
    AUTO_RHO,
    DECAY,
    ESAM,
    FISHER,
    MEANINGS,
    SAM_TYPES,
    TASK_OF,
    TRAINABLE,
    WARMUP_STABLE_DECAY,
    Arguments,
)


def check_arguments(arguments: Arguments) -> None:
    """Raise InputError for a value that would only fail, or mislead, once training is under way."""
    _check_task(arguments)
    for name in (
        "save_steps",
        "gradient_accumulation_steps",
        "max_train_samples",
        "max_eval_samples",
        "max_seq_length",
        "num_train_epochs",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "num_fisher_samples",
        "local_steps",
        "lora_r",
        "lora_alpha",
    ):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"Invalid --{name}: {value}; must be > 0")
    for name in ("warmup_ratio", "rho_warmup_ratio"):
        if not 0 <= getattr(arguments, name) <= 1:
            raise InputError(f"Invalid --{name}: {getattr(arguments, name)}; must be between 0 and 1")
    if not 0 <= arguments.label_smoothing_factor < 1:
        raise InputError(f"Invalid --label_smoothing_factor: {arguments.label_smoothing_factor}; must be in [0, 1)")
    if arguments.label_noise is not None and not 0 <= arguments.label_noise < 1:
        raise InputError(f"Invalid --label_noise: {arguments.label_noise}; must be in [0, 1)")
    if not arguments.max_grad_norm >= 0:
        raise InputError(f"Invalid --max_grad_norm: {arguments.max_grad_norm}; must be >= 0")
    if arguments.task_name and arguments.train_file:
        raise InputError("--task_name and --train_file exclude each other")
    if (arguments.validation_file or arguments.text_column_names) and not arguments.train_file:
        raise InputError("--validation_file and --text_column_names need --train_file")
    if arguments.text_columns and len(arguments.text_columns) > 2:
        raise InputError(f"Invalid --text_column_names: {arguments.text_column_names}; must be one column or two")
    _check_meaning(arguments)
    _check_together(arguments)
    _check_auto_rho(arguments)
    build_mixup(arguments, total_steps=100)
    with naming_options():
        FisherMask(**arguments.of(FisherMask, "fisher-sam"))
    # A throw-away model, because the optimizers themselves know best which values they accept. The mask takes all
    # of it: `check_mask` looks whether it would take anything of the real one.
    whole = dataclasses.replace(arguments, keep_ratio=1.0, rho=0.0 if arguments.rho == AUTO else arguments.rho)
    for sam_type in arguments.sam_type:
        model = nn.Linear(8, 8)
        trainable = None if arguments.trains_all else FishMask.magnitude(model, keep_ratio=1.0)
        build_optimizer(whole, sam_type, model, novel=(), total_steps=100, trainable=trainable)


def _check_task(arguments: Arguments) -> None:
    """Raise InputError for an option of another task, or of LoRA where there is none."""
    tracked = {meaning.option for meaning in MEANINGS}
    for field in dataclasses.fields(arguments):
        name, value = field.name, getattr(arguments, field.name)
        given = name in arguments.given if name in tracked else value != field.default
        if given and TASK_OF.get(name, arguments.task) != arguments.task:
            raise InputError(f"--{name} has no meaning for --task {arguments.task}, only for {TASK_OF[name]}")
        if given and name.startswith("lora_") and not arguments.lora:
            raise InputError(f"--{name} needs --lora")
    if arguments.lora_dropout is not None and not 0 <= arguments.lora_dropout < 1:
        raise InputError(f"Invalid --lora_dropout: {arguments.lora_dropout}; must be in [0, 1)")


def _check_meaning(arguments: Arguments) -> None:
    """Raise InputError for an option that nothing asked for has a use for."""
    for name in arguments.given:
        meanings = [meaning for meaning in MEANINGS if meaning.option == name]
        if not any(map(arguments.uses, meanings)):
            users = set().union(*(meaning.users for meaning in meanings))
            choices = {
                f"--sam_type {' '.join(arguments.sam_type)}": SAM_TYPES,
                f"--trainable {arguments.trainable}": TRAINABLE,
            }
            asked = " ".join(choice for choice, values in choices.items() if not users.isdisjoint(values))
            only = ", ".join(user for user in (*SAM_TYPES, *TRAINABLE) if user in users)
            raise InputError(f"--{name} has no meaning for {asked}, only for {only}")


def _check_together(arguments: Arguments) -> None:
    """Raise InputError for options that contradict each other."""
    by_tensor = arguments.beta_per == "tensor" and not ESAM.isdisjoint(arguments.sam_type)
    selects = arguments.gamma < 1 and not ESAM.isdisjoint(arguments.sam_type)
    is_part = arguments.ascent_fraction < 1
    decays = arguments.lr_scheduler_type == WARMUP_STABLE_DECAY
    masked = [sam_type for sam_type in arguments.sam_type if sam_type in FISHER]
    for wrong, message in (
        (
            masked and not arguments.trains_all,
            f"--trainable {arguments.trainable} and --sam_type {' '.join(masked)} exclude each other: "
            "what is perturbed is what is trained",
        ),
        (
            arguments.lora and arguments.from_scratch,
            "--lora needs --model_name_or_path: an adapter is of a pretrained model",
        ),
        (
            arguments.l2_sp and (arguments.lora or arguments.from_scratch),
            "--l2_sp needs pretrained weights that are trained: --model_name_or_path without --lora",
        ),
        (
            arguments.lora and (arguments.master_weights or arguments.backup_format),
            "--master_weights and --backup_format exclude --lora: PEFT keeps an adapter in float32",
        ),
        (arguments.packing_strategy and not arguments.packing, "--packing_strategy needs --packing"),
        (arguments.save_delta and arguments.trains_all, "--save_delta needs --trainable fish, random or bitfit"),
        (arguments.local_steps and arguments.trains_all, "--local_steps needs --trainable fish, random or bitfit"),
        (
            arguments.mask_interval >= 1 and not 1 <= arguments.mask_samples <= arguments.mask_interval,
            f"Invalid --mask_samples: {arguments.mask_samples}; "
            f"must be from 1 to --mask_interval {arguments.mask_interval}",
        ),
        (
            arguments.local_steps and arguments.ema_decay is not None,
            "--ema_decay and --local_steps exclude each other: workers merge weights, not averages of them",
        ),
        (
            arguments.gradient_accumulation_steps > 1 and selects,
            "--gradient_accumulation_steps with an esam type needs --gamma 1: samples are chosen from the whole batch",
        ),
        (
            is_part and arguments.gradient_accumulation_steps > 1 and arguments.task != "causal-lm",
            "--ascent_fraction needs --gradient_accumulation_steps 1: it is a part of the whole batch",
        ),
        (is_part and arguments.mixes, "--ascent_fraction excludes mixup: rows are mixed with rows of the whole batch"),
        (
            decays and not 0 < arguments.lr_decay_ratio <= 1 - arguments.warmup_ratio,
            f"Invalid --lr_decay_ratio: {arguments.lr_decay_ratio}; must be > 0 and leave room for --warmup_ratio",
        ),
        (
            arguments.sam_last == DECAY and arguments.rho_warmup_ratio > 0,
            "--rho_warmup_ratio and --sam_last decay exclude each other: the number of steps is the scheduler's",
        ),
        (
            (arguments.save_steps or arguments.resume_from_checkpoint) and arguments.local_steps,
            "--save_steps and --resume_from_checkpoint exclude --local_steps: a checkpoint is of one process",
        ),
        (
            arguments.overwrite_output_dir and arguments.resume_from_checkpoint,
            "--overwrite_output_dir and --resume_from_checkpoint exclude each other",
        ),
        (
            (arguments.mixup_where or arguments.mixup_start is not None) and not arguments.mixes,
            "--mixup_where and --mixup_start need --mixup_alpha or --mixup_lambda",
        ),
        (
            arguments.mixes and selects,
            "mixup with an esam type needs --gamma 1: rows are mixed with rows of the whole batch",
        ),
        (
            arguments.release_gradients and not {"none", "momentum-sam"}.issuperset(arguments.sam_type),
            "--release_gradients needs --sam_type none or momentum-sam: two passes need their gradients",
        ),
        (
            arguments.release_gradients and (arguments.max_grad_norm or arguments.gradient_accumulation_steps > 1),
            "--release_gradients needs --max_grad_norm 0 and --gradient_accumulation_steps 1: gradients are not kept",
        ),
        (
            arguments.master_weights and arguments.dtype == "float32",
            "--master_weights needs --dtype bfloat16: float32 weights lose nothing",
        ),
        (
            arguments.save_delta and arguments.dtype != "float32",
            "--save_delta needs --dtype float32: the weights that are not trained would be rounded",
        ),
        (arguments.backup_format and arguments.dtype == "float32", "--backup_format needs --dtype bfloat16"),
        (
            arguments.state_format == "8bit" and not arguments.trains_all,
            "--state_format 8bit and --trainable exclude each other: the state of few weights is small",
        ),
        (arguments.sam_reuse > 0 and arguments.sam_every == 1, "--sam_reuse needs --sam_every > 1"),
        (arguments.sam_reuse > 0 and by_tensor, "--sam_reuse with an esam type needs --beta_per element"),
        (arguments.rho_min > 0 and not arguments.rho_follows, "--rho_min needs --rho_follows"),
        (
            arguments.rho != AUTO and 0 <= arguments.rho < arguments.rho_min,
            f"Invalid --rho_min: {arguments.rho_min}; must be at most --rho {arguments.rho}",
        ),
        (
            arguments.rho_warmup_ratio > 0 and arguments.rho_follows == "lr",
            "--rho_warmup_ratio and --rho_follows lr exclude each other: the learning rate has its own warm-up",
        ),
        (
            arguments.rho_follows == "lr" and arguments.learning_rate == 0,
            "--rho_follows lr needs --learning_rate > 0",
        ),
    ):
        if wrong:
            raise InputError(message)


def _check_auto_rho(arguments: Arguments) -> None:
    """Raise InputError if ``--rho auto`` is asked for where a search would find another thing than rho."""
    if arguments.rho != AUTO:
        return
    if AUTO_RHO.isdisjoint(arguments.sam_type):
        only = ", ".join(name for name in SAM_TYPES if name in AUTO_RHO)
        asked = " ".join(arguments.sam_type)
        raise InputError(f"--rho auto has no meaning for --sam_type {asked}, only for {only}")
    if arguments.why_no_search:
        raise InputError(arguments.why_no_search)


def check_mask(arguments: Arguments, model: nn.Module) -> None:
    """Raise InputError if a mask would choose nothing of a model, which may be on the meta device."""
    if not FISHER.isdisjoint(arguments.sam_type):
        with naming_options():
            mask = FisherMask(**arguments.of(FisherMask, "fisher-sam"))
            mask.count([p.shape for name, p in model.named_parameters() if mask.selects_from(name, p)])


def check_mixup(arguments: Arguments, model: nn.Module) -> None:
    """Raise InputError if nothing of a model, which may be on the meta device, can be mixed."""
    mixup = build_mixup(arguments, total_steps=1)
    if mixup is not None:
        with naming_options(MIXUP_OPTION_OF), dataclasses.replace(mixup, start=0.0).draw(1, 0).applied(model):
            pass
