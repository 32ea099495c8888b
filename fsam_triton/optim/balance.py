"""Balance: which LoRA adapters are pairs, and the norms by which one of a pair grows and the other one decays."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..buffers.lanes import Lanes
from ..buffers.ledger import Ledger
from ..buffers.members import name_of
from ..buffers.sharded import is_sharded
from ..errors import check
from ..kernels.segments import upload

if TYPE_CHECKING:
    from ..masks.trained import FishMask
    from .descent import Half

# The parts of the names that peft gives to the two matrices of a pair, in both directions.
_PARTNERS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}
_PARTNERS |= {second: first for first, second in _PARTNERS.items()}


def partner_of(name: str) -> str | None:
    """The name of the other matrix of a LoRA pair; None if it is not one of a pair's.

    Example:
        >>> from fsam_triton.optim.balance import partner_of
        >>> partner_of("model.layers.0.self_attn.q_proj.lora_A.default.weight")
        'model.layers.0.self_attn.q_proj.lora_B.default.weight'
    """
    parts = name.split(".")
    other = [_PARTNERS.get(part, part) for part in parts]
    return None if other == parts else ".".join(other)


class Balance:
    """Balancedness-aware regularisation (BAR, arXiv 2410.14802) of LoRA pairs, as a part of their decay.

    A pair is balanced where both of its matrices have a gradient, each with the learning rate and the ``balance`` of
    its group. Where the two norms are equal, neither changes, nor where they are not finite. (At equality the paper has
    one of them grow. Norms are equal where both are zero, as those of the gradients of an expert without tokens.)

    Args:
        by: "gradients" or "weights", of which norms are compared.

    Raises:
        ArgumentError: by is another.
    """

    def __init__(self, by: str) -> None:
        check(by in ("gradients", "weights"), "balance_by", by, 'must be "gradients" or "weights"')
        self.by = by
        # Of each lanes, by the ledger's count of how often they were made, where its norms and its pairs' are.
        self._generation = -1
        self._pairs: dict[int, Tensor] = {}

    @staticmethod
    def is_on(groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether any group wants it."""
        return any(group["balance"] > 0 for group in groups)

    def signed(self, group: Mapping[str, Any]) -> float:
        """How fast the one of a pair with the larger norm is to grow."""
        return group["balance"] if self.by == "gradients" else -group["balance"]

    def check(self, groups: Sequence[Mapping[str, Any]], trainable: FishMask | None) -> None:
        """Raise an ArgumentError where balance > 0 would be something else than what the paper has, or nothing."""
        if not self.is_on(groups):
            return
        check(trainable is None, "trainable", "a FishMask", "must be None with balance")
        names = set()
        for group in groups:
            on = group["balance"] > 0
            check(not on or "param_names" in group, "balance", group["balance"], "needs names: pass named_parameters()")
            check(not on or group["l2_sp"] == 0, "l2_sp", group["l2_sp"], "must be 0 with balance")
            # Of SGD, decay is a part of the gradient; a momentum would remember which way it went.
            momentum = group.get("momentum", 0)
            check(not on or momentum == 0, "momentum", momentum, "must be 0 with balance, or the rule another one")
            for i, p in enumerate(group["params"]):
                name = name_of(group, i) if "param_names" in group else None
                if name is not None and p.requires_grad and partner_of(name) is not None:
                    check(not (on and is_sharded(p)), "balance", group["balance"], f"must be 0: {name!r} is sharded")
                    names.add(name)
        pairs = [name for name in names if partner_of(name) in names]
        check(bool(pairs), "balance", "> 0", "needs LoRA adapters that are trained, lora_A and lora_B by name")

    def measure(self, ledger: Ledger, groups: Sequence[Mapping[str, Any]], work: Sequence[Half]) -> Tensor | None:
        """The squared norms of all parameters of the ledger, in its order, NaN where there is none.

        Returns:
            fp64 [parameters] on the home device; None where nothing is balanced.
        """
        if not work or not self.is_on(groups):
            return None
        if ledger.generation != self._generation:
            # Groups and what is in them may be others than when they were checked.
            self.check(groups, None)
            self._pairs = _places(ledger)
            self._generation = ledger.generation
        found: dict[int, Tensor] = {}
        for half in work:
            if self.by == "gradients":
                squares = half.squares = ops.norms_sq(half.segments)
            else:
                squares = _of_weights(half)
            if not all(half.active):
                squares = torch.where(half.lanes.flags(half.active), squares, float("nan"))
            found[id(half.lanes)] = squares.to(ledger.home, non_blocking=True)
        parts = [found[id(lanes)] if id(lanes) in found else _missing(lanes, ledger.home) for lanes in ledger]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def pairs(self, lanes: Lanes) -> Tensor:
        """Where in what `measure` gives a parameter's own norm is, and that of its pair, int64 [parameters, 2]."""
        return self._pairs[id(lanes)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Balance:
        return Balance(self.by)

    def __getstate__(self) -> dict[str, Any]:
        return vars(copy.deepcopy(self))


def _missing(lanes: Lanes, home: torch.device) -> Tensor:
    return torch.full((len(lanes),), float("nan"), dtype=torch.float64, device=home)


def _of_weights(half: Half) -> Tensor:
    """Squared norms of the clean weights that take part in an update."""
    check(half.steps is None, "balance_by", "weights", 'must be "gradients" with backup_format')
    taking_part = [weight if now else None for weight, now in zip(half.segments.clean, half.active, strict=True)]
    segments = half.lanes.segments(taking_part, weight=half.segments.weight, half="balance")
    return ops.norms_sq(segments)


def _places(ledger: Ledger) -> dict[int, Tensor]:
    """For each lanes, by its id, [parameters, 2]: the place of each of its parameters over all, and of its partner's.

    One without a partner is its own.
    """
    members = [member for lanes in ledger for member in lanes.members]
    places = {member.name: i for i, member in enumerate(members) if member.name is not None}
    own, start = {}, 0
    for lanes in ledger:
        rows = []
        for i, member in enumerate(lanes.members, start):
            other = None if member.name is None else partner_of(member.name)
            rows.append((i, i if other is None else places.get(other, i)))
        own[id(lanes)] = upload(torch.tensor(rows, dtype=torch.int64), lanes.device)
        start += len(rows)
    return own
