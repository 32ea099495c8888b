"""Members of lanes: parameters, and what their optimizer calls them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.nn import Parameter

from ..errors import ArgumentError, check


@dataclass(frozen=True, eq=False)
class Member:
    """A parameter and what its optimizer calls it.

    Args:
        p: the parameter.
        group: its parameter group.
        position: in that group.
        number: its position over all groups, which makes its random numbers.
    """

    p: Parameter
    group: dict[str, Any]
    position: int
    number: int

    @property
    def name(self) -> str | None:
        """Its name; see `name_of`."""
        return name_of(self.group, self.position)

    def __str__(self) -> str:
        with contextlib.suppress(ArgumentError):
            if self.name is not None:
                return repr(self.name)
        return f"number {self.position} of its group (shape {tuple(self.p.shape)})"


def name_of(group: Mapping[str, Any], position: int) -> str | None:
    """The name of a group's parameter; None without names, and for one that was appended later.

    Raises:
        ArgumentError: parameters were taken out, and their names were not.
    """
    names, params = group.get("param_names"), group["params"]
    if names is None:
        return None
    check(len(names) <= len(params), "param_names", names, f"must be those of the group's {len(params)} parameters")
    return names[position] if position < len(names) else None
