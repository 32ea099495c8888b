"""Makes the optimizers and the mixup that the options ask for."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from .. import FSAM, AdamWL2SP, FisherMask, FishMask, Mixup, MomentumSAM, Schedule
from ..errors import ArgumentError
from ..optim.optimizer import FusedOptimizer
from .errors import InputError
from .options import FISHER, MEANINGS, Arguments

# The option behind each name that an error of the library begins with.
OPTION_OF = {meaning.argument: meaning.option for meaning in MEANINGS} | {
    "learning rate": "learning_rate",
    "beta parameter at index 0": "adam_beta1",
    "beta parameter at index 1": "adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
    "l2_sp": "l2_sp",
    "ema_decay": "ema_decay",
    "max_grad_norm": "max_grad_norm",
    "state_format": "state_format",
    "master_weights": "master_weights",
}
# The same for `Mixup`.
MIXUP_OPTION_OF = {
    "alpha": "mixup_alpha",
    "lam": "mixup_lambda",
    "where": "mixup_where",
    "start": "mixup_start",
}


@contextlib.contextmanager
def naming_options(option_of: Mapping[str, str] = OPTION_OF) -> Iterator[None]:
    """Turn the library's ArgumentErrors into InputErrors that name the option instead of the argument."""
    try:
        yield
    except ArgumentError as error:
        name = option_of.get(error.name)
        text = f"Invalid --{name}: {error.value!r}; {error.allowed}" if name else str(error)
        raise InputError(text) from error


def build_optimizer(
    arguments: Arguments,
    sam_type: str,
    model: nn.Module,
    novel: Collection[str],
    total_steps: int,
    trainable: FishMask | None = None,
) -> FusedOptimizer:
    """Return the optimizer of a run.

    Args:
        arguments: the options.
        sam_type: one of `SAM_TYPES`.
        model: its parameters that require gradients are moved into the optimizer's buffers.
        novel: names of the parameters that have no pretrained value.
        total_steps: steps of the run.
        trainable: the FishMask of the weights to train (default: None, all).

    Raises:
        InputError: an option is out of its range.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) for n, p in named if p.ndim > 1], "weight_decay": arguments.weight_decay},
        {"params": [(n, p) for n, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    keywords: dict[str, Any] = {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
        "max_grad_norm": arguments.max_grad_norm or None,
        "l2_sp": arguments.l2_sp,
        "seed": arguments.seed,
        "ema_decay": arguments.ema_decay,
        "trainable": trainable,
        "state_format": arguments.state_format,
        "master_weights": arguments.master_weights or False,
    }
    if arguments.l2_sp:
        keywords["anchors"] = {n: p.detach().clone() for n, p in named if n not in novel}
    with naming_options():
        optimizer = _optimizer_of(arguments, sam_type, groups, total_steps, keywords)
        if arguments.release_gradients:
            optimizer.release_gradients()
    return optimizer


def _optimizer_of(
    arguments: Arguments, sam_type: str, groups: list[dict[str, Any]], total_steps: int, keywords: dict[str, Any]
) -> FusedOptimizer:
    if sam_type == "none":
        return AdamWL2SP(groups, **keywords)
    keywords |= arguments.of(FSAM, sam_type)
    keywords["schedule"] = build_schedule(arguments, sam_type, total_steps)
    if sam_type == "momentum-sam":
        return MomentumSAM(groups, **keywords)
    if sam_type == "asam":
        return FSAM(groups, adaptive=True, **keywords)
    if sam_type in ("friendly-sam", "preconditioned-sam"):
        return FSAM(groups, preconditioned=sam_type == "preconditioned-sam", **keywords)
    if sam_type in FISHER:
        keywords["mask"] = FisherMask(**arguments.of(FisherMask, sam_type))
    return FSAM.from_sam_type(sam_type, groups, **keywords)


def build_mixup(arguments: Arguments, total_steps: int, rank: int = 0) -> Mixup | None:
    """Return the `Mixup` of a run of so many steps, for a worker of this rank; None if the options ask for none.

    Raises:
        InputError: an option is out of its range.
    """
    if not arguments.mixes:
        return None
    given = {argument: getattr(arguments, name) for argument, name in MIXUP_OPTION_OF.items()}
    with naming_options(MIXUP_OPTION_OF):
        given = {argument: value for argument, value in given.items() if value is not None}
        return Mixup(total_steps, seed=arguments.seed + rank, **given)


def build_schedule(arguments: Arguments, sam_type: str, total_steps: int) -> Schedule:
    """Return the `Schedule` of a run of so many steps."""
    keywords = arguments.of(Schedule, sam_type)
    warmup_ratio = keywords.pop("rho_warmup")
    schedule = Schedule(total_steps=total_steps, **keywords)
    warmup = math.ceil(warmup_ratio * (total_steps - schedule.first))
    return dataclasses.replace(schedule, rho_warmup=warmup)
