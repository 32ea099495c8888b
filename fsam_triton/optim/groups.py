"""Groups: what the options and parameters of a parameter group must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..buffers.members import name_of
from ..buffers.sharded import check_placements, check_shards_of_codes, is_sharded
from ..errors import ArgumentError, check
from ..masks.trained import FishMask
from .rules import Rule, is_finite
from .state_formats import check_state_format, format_of


def check_options(group: Mapping[str, Any], rule: Rule, trainable: FishMask | None) -> None:
    """Raise an ArgumentError if an option of a group is out of its range, or does not go with a `FishMask`."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        check(lr.numel() == 1, "learning rate", lr, "a tensor must have one element")
    else:
        check(is_finite(lr) and lr >= 0, "learning rate", lr, "must be a finite number >= 0")
    rule.check(group)
    state_format = group["state_format"]
    check_state_format(state_format)
    unmasked = trainable is None or state_format != "8bit"
    check(unmasked, "state_format", state_format, "must be another one with trainable, whose state is small")
    for name in ("weight_decay", "l2_sp", "balance"):
        value = group[name]
        check(is_finite(value) and value >= 0, name, value, "must be a finite number >= 0")


def check_parameters(group: Mapping[str, Any], master_weights: bool | str) -> None:
    """Raise an ArgumentError if a trained parameter of a group cannot be trained as its options say."""
    first: dict[int, int] = {}
    for i, p in enumerate(group["params"]):
        label = f"parameter {group['param_names'][i]!r}" if "param_names" in group else f"parameter number {i}"
        check(not is_lazy(p), label, "uninitialized", "run the model once before")
        check(first.setdefault(id(p), i) == i, label, "twice", "must be in the groups once")
        if not p.requires_grad:
            continue
        # A quantised weight, say, whose numbers are not in its own memory.
        plain = is_sharded(p) or type(p.data) is Tensor
        check(plain, label, type(p.data).__name__, "must be a plain tensor")
        fits = p.is_floating_point() and p.element_size() >= 2 and p.layout == torch.strided and not p.is_meta
        check(fits, label, f"{p.dtype}, {p.layout}, {p.device}", "must be dense fp16, bf16, fp32 or fp64")
        fits = p.dtype != torch.float64 or group["state_format"] is None
        check(fits, "state_format", group["state_format"], f"must be None: {label} is fp64")
        fits = p.dtype != torch.float16 or master_weights != "24bit"
        check(fits, "master_weights", master_weights, f'must be "32bit": {label} is fp16')
        if is_sharded(p):
            check_placements(label, p)
            if format_of(group, i) == "8bit":
                check_shards_of_codes(label, p)


def trained_positions(trainable: FishMask | None, group: Mapping[str, Any], i: int) -> Tensor | None:
    """The weights of a group's parameter that a mask trains, as positions in row-major order; None for all.

    Raises:
        ArgumentError: the mask does not fit the parameter.
    """
    if trainable is None:
        return None
    check("param_names" in group, "trainable", "a FishMask", "needs parameter names: pass model.named_parameters()")
    name, p = name_of(group, i), group["params"][i]
    check(not is_sharded(p), "trainable", "a FishMask", f"must be None: parameter {name!r} is sharded")
    shape = None if name is None else trainable.shapes.get(name)
    if name is None or shape != p.shape:
        value = f"a FishMask with {name!r} of shape {shape}"
        raise ArgumentError("trainable", value, f"must be {tuple(p.shape)}")
    is_dense = p.stride() == torch.empty_like(p, device="meta").stride()
    check(is_dense, f"parameter {name!r}", f"strides {p.stride()}", "must be dense in memory with trainable")
    return trainable.indices(name).to(p.device)
