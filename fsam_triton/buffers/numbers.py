"""Numbers about parameters and groups, for the coefficients of passes, on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import spec
from ..kernels.segments import upload
from .members import Member


class Numbers:
    """Rows of hyper-parameters on a device, sent again only when a value has changed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sent: tuple[tuple[float | None, ...], ...] = ()
        self._rows = torch.empty(0)

    def rows(self, values: Sequence[Sequence[float | Tensor]]) -> Tensor:
        """`values` as fp64 [rows, columns]. A tensor among them (a learning rate) is copied without a host sync."""
        plain = tuple(tuple(None if isinstance(v, Tensor) else float(v) for v in row) for row in values)
        if plain != self._sent:
            host = torch.tensor([[0.0 if v is None else v for v in row] for row in plain], dtype=torch.float64)
            sent, self._sent = upload(host, self._device), plain
            # In place, because a captured CUDA graph reads them where they are.
            self._rows = self._rows.copy_(sent) if self._rows.shape == sent.shape else sent
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if isinstance(value, Tensor):
                    self._rows[i, j].copy_(value.detach().squeeze(), non_blocking=True)
        return self._rows


def about_members(
    members: Sequence[Member], groups: Sequence[Mapping[str, Any]], starts: Sequence[int], device: torch.device
) -> Tensor:
    """What of parameters never changes, int64 [parameters, len(spec.MEMBER)] on the device.

    Args:
        members: the parameters.
        groups: their groups, in the order of the rows of hyper-parameters.
        starts: for each parameter how many of its weights other shards have before this one.
        device: where to.
    """
    order = {id(group): i for i, group in enumerate(groups)}
    columns = {
        "group": [order[id(member.group)] for member in members],
        "salt": [member.number * spec.SALT & 0xFFFFFFFF for member in members],
        "start": starts,
    }
    host = torch.tensor([columns[name] for name in spec.MEMBER], dtype=torch.int64).T.contiguous()
    return upload(host, device)
