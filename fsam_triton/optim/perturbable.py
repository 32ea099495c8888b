"""Perturbable: an optimizer whose parameters can hold perturbed weights for a while."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..buffers.ledger import Ledger


class Perturbable(Optimizer):
    """Knows the clean weights of its parameters, and puts them back.

    Attributes:
        ledger: the lanes of the parameters, and their backups.
    """

    ledger: Ledger

    @property
    def perturbed(self) -> bool:
        """Whether the parameters currently hold perturbed weights."""
        return self.ledger.perturbed

    @torch.no_grad()
    def restore(self) -> None:
        """Put back the clean weights, to the bit, if the parameters are perturbed."""
        self.ledger.restore()

    @torch.no_grad()
    def clean_weight(self, p: Tensor) -> Tensor | None:
        """The clean weights of a parameter that is currently perturbed, as a tensor like it.

        Args:
            p: any tensor.

        Returns:
            The weights that `restore` would put back, or None if p is not perturbed, or is not a parameter of this
            optimizer.
        """
        return self.ledger.clean_weight(p)

    def _refuse_copies_while_perturbed(self) -> None:
        if self.perturbed:
            raise RuntimeError(
                "the weights are perturbed: call restore() or step() before copying or pickling the optimizer"
            )

    def __del__(self) -> None:
        # Nobody could restore the weights any more.
        with contextlib.suppress(Exception):
            # Not self.ledger, which a SAM that could not be made would look for in its base.
            if vars(self)["ledger"].perturbed:
                self.restore()
