"""An optimizer's arguments as one string, as transformers' ``--optim_args`` and YAML files have it."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

from ..errors import check
from ..masks.perturbed import FisherMask
from ..optim.adamw_l2sp import AdamWL2SP
from ..optim.fsam import FSAM
from ..optim.momentum_sam import MomentumSAM
from ..optim.schedule import Schedule

OPTIMIZERS = {"fsam": FSAM, "momentum-sam": MomentumSAM, "adamw-l2sp": AdamWL2SP}
_PARTS = {"mask": FisherMask, "schedule": Schedule}
_WORDS = {"true": True, "false": False, "none": None, "null": None}


def parse_optim_args(text: str) -> dict[str, Any]:
    """Arguments of `create_optimizer`, from a string.

    Args:
        text: ``name=value`` with commas between: ``"rho=0.02,sigma=1"``. Values are Python's numbers and words, or
            strings without quotes. ``optimizer_cls`` is ``fsam``, ``momentum-sam`` or ``adamw-l2sp``; arguments of a
            mask or a schedule have its name before theirs: ``"mask.keep_ratio=0.1,schedule.last=decay"``.

    Returns:
        The arguments by name, with optimizer class, mask and schedule made.

    Raises:
        ArgumentError: a piece is no ``name=value``, a name is there twice, or a part has no such argument.

    Example:
        >>> from fsam_triton.integrations.optim_args import parse_optim_args
        >>> parse_optim_args("optimizer_cls=momentum-sam, rho=0.1, backup_format=8bit")
        {'optimizer_cls': <class 'fsam_triton.optim.momentum_sam.MomentumSAM'>, 'rho': 0.1, 'backup_format': '8bit'}
        >>> parse_optim_args("rho=0.02,schedule.last=decay")["schedule"].last
        'decay'
    """
    out: dict[str, Any] = {}
    of_parts: dict[str, dict[str, Any]] = {}
    for piece in filter(None, map(str.strip, text.split(","))):
        name, equals, value = (part.strip() for part in piece.partition("="))
        check(bool(name and equals and value), "optim_args", piece, "must be name=value, with commas between")
        owner, _, argument = name.rpartition(".")
        target = of_parts.setdefault(owner, {}) if owner else out
        check(argument not in target and name not in of_parts, "optim_args", name, "must be there once")
        target[argument] = _value(value)
    if "optimizer_cls" in out:
        known = out["optimizer_cls"] in OPTIMIZERS
        check(known, "optimizer_cls", out["optimizer_cls"], f"must be one of {', '.join(OPTIMIZERS)}")
        out["optimizer_cls"] = OPTIMIZERS[out["optimizer_cls"]]
    return out | {name: _made(name, arguments) for name, arguments in of_parts.items()}


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _made(name: str, arguments: dict[str, Any]) -> Any:
    check(name in _PARTS, "optim_args", f"{name}.{next(iter(arguments))}", f"must be of {' or '.join(_PARTS)}")
    part = _PARTS[name]
    names = [field.name for field in dataclasses.fields(part)]
    for argument in arguments:
        check(argument in names, "optim_args", f"{name}.{argument}", f"must be one of {', '.join(names)}")
    return part(**arguments)
