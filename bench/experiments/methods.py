"""The ways to train that are compared; a new one is a row of `METHODS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from fsam_triton import FSAM, AdamWL2SP, FisherMask, FlatLoRA, MomentumSAM, Schedule

ADAMW, TWICE, STABLE = "AdamW", "AdamW, 2x epochs", "AdamW, WSD"


@dataclass(frozen=True)
class Method:
    """An optimizer and a schedule of the learning rate.

    Args:
        optimizer: its class.
        tuned: name of the argument that is tuned besides the learning rate, or None.
        start: where the search for its value begins.
        factor: of neighbouring values in that search.
        epochs: factor on the epochs.
        decay: of the learning rate: `"linear"`, `"wsd"` or `"none"`, see `training.rate`.
        rival: the method of about the same price that it is compared with besides AdamW, or None.
        found: before each run `find_rho` finds the value of the tuned argument, which is then not searched for.
        noise: `FlatLoRA`, whose sigma is tuned then instead of an argument of the optimizer, or None.
        options: other arguments of the optimizer.
    """

    optimizer: Callable[..., torch.optim.Optimizer]
    tuned: str | None = None
    start: float = 0.0
    factor: float = 2.0
    epochs: int = 1
    decay: str = "linear"
    rival: str | None = None
    found: bool = False
    noise: Callable[..., FlatLoRA] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def build(
        self,
        model: torch.nn.Module,
        learning_rate: float,
        strength: float,
        seed: int = 0,
        novel: Iterable[str] = (),
    ) -> torch.optim.Optimizer:
        """The optimizer of a model's trained parameters.

        Args:
            model: what is trained.
            learning_rate: the peak.
            strength: value of the tuned argument.
            seed: of the optimizer's random numbers.
            novel: names of the parameters that are not pretrained, which L2-SP pulls nowhere.
        """
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [(n, p) for n, p in named if p.ndim > 1], "weight_decay": 0.01},
            {"params": [(n, p) for n, p in named if p.ndim <= 1], "weight_decay": 0.0},
        ]
        options = {"lr": learning_rate, "max_grad_norm": 1.0, "seed": seed} | self.options
        if self.tuned and not self.noise:
            options[self.tuned] = strength
        if self.tuned == "l2_sp":
            options["anchors"] = {n: p.detach().clone() for n, p in named if n not in set(novel)}
        return self.optimizer(groups, **options)


def _sharp(rival: str = TWICE, decay: str = "linear", **options: Any) -> Method:
    return Method(FSAM, "rho", 0.02, decay=decay, rival=rival, options=options)


METHODS = {
    ADAMW: Method(AdamWL2SP),
    TWICE: Method(AdamWL2SP, epochs=2),
    STABLE: Method(AdamWL2SP, decay="wsd"),
    "AdamW-L2SP": Method(AdamWL2SP, "l2_sp", 10.0, factor=10.0),
    "SAM": _sharp(),
    "FSAM, 0.1": _sharp(mask=FisherMask(0.1, interval=10)),
    "momentum-SAM": Method(MomentumSAM, "rho", 0.1),
    "tail-SAM, WSD": _sharp(STABLE, "wsd", schedule=Schedule(last="decay")),
    "FriendlySAM": _sharp(sigma=1.0),
    "SAM, find_rho": Method(FSAM, "rho", found=True, rival="SAM"),
    "BAR": Method(AdamWL2SP, "balance", 1.0, factor=4.0),
    "Flat-LoRA": Method(AdamWL2SP, "sigma", 0.05, noise=FlatLoRA),
}
ON_ADAPTERS = (ADAMW, TWICE, "SAM", "BAR", "Flat-LoRA")
ON_ALL_WEIGHTS = tuple(name for name in METHODS if name not in ("BAR", "Flat-LoRA"))
# The rule of find_rho was calibrated for classifiers.
ON_LANGUAGE_MODELS = tuple(name for name in ON_ALL_WEIGHTS if name != "SAM, find_rho")
