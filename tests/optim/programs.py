"""Whole training programs, as data: a small model, an optimizer with its options, and what is done with them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fsam_triton import FishMask

# Shapes and strides by name. All of a program's parameters have at most 64 weights.
LAYOUTS = {
    "matrix": lambda: torch.empty(2, 3),
    "scalar": lambda: torch.empty(()),
    "single": lambda: torch.empty(1),
    "vector": lambda: torch.empty(5),
    "empty": lambda: torch.empty(0, 3),
    "transposed": lambda: torch.empty(4, 2).t(),
    "channels_last": lambda: torch.empty(1, 2, 2, 2).to(memory_format=torch.channels_last),
    "gaps": lambda: torch.empty(3, 4)[:, ::2],
    "tied": lambda: torch.empty(2, 2),
}
MOST_WEIGHTS = 64


# -- what is done ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """A backward pass.

    Attributes:
        missing: numbers of the parameters that get no gradient.
        bad: what the first coordinate of a parameter becomes: (number, inf or NaN).
        assigned: whether gradients are assigned by hand.
    """

    missing: frozenset[int] = frozenset()
    bad: tuple[int, float] | None = None
    assigned: bool = False


class Stopped(KeyboardInterrupt):
    """An interrupt that nobody typed."""


class Failed(Exception):
    """Raised by closures."""


@dataclass(frozen=True)
class Step:
    """step(closure); `fails`: in which of the closure's calls it raises, whether after backward, and what."""

    passes: tuple[Pass, Pass] = (Pass(), Pass())
    fails: tuple[int, bool, type[BaseException]] | None = None


@dataclass(frozen=True)
class ByHand:
    """Backward, perturb, backward, step, with gradients multiplied by `scale` as under a GradScaler."""

    passes: tuple[Pass, Pass] = (Pass(), Pass())
    scale: float | None = None


@dataclass(frozen=True)
class Halfway:
    """The first half of a step by hand, after which parameters are perturbed."""

    passed: Pass = Pass()


@dataclass(frozen=True)
class Backward:
    passed: Pass = Pass()


@dataclass(frozen=True)
class Perturb:
    """perturb() by hand."""


@dataclass(frozen=True)
class Update:
    """step() with the gradients there are."""


@dataclass(frozen=True)
class Restore:
    pass


@dataclass(frozen=True)
class ZeroGrad:
    """`how`: the optimizer's, setting "none" or "zeros", or the "model"'s, which stores zeros in place."""

    how: str = "none"


@dataclass(frozen=True)
class Change:
    """A hyper-parameter of a group."""

    group: int = 0
    name: str = "lr"
    value: float = 0.002


@dataclass(frozen=True)
class Edit:
    """Write other values into a parameter: `how` is "copy", "data", "replace" (its data) or "load" (a state dict)."""

    number: int = 0
    how: str = "copy"
    seed: int = 0


@dataclass(frozen=True)
class AddGroup:
    layout: str = "vector"
    options: dict = field(default_factory=dict)


@dataclass(frozen=True)
class SetTrainable:
    """Train this part of the weights, or (None) all."""

    keep: float | None = None


@dataclass(frozen=True)
class Freeze:
    """Switch a parameter's requires_grad (not that of the first)."""

    number: int = 1


@dataclass(frozen=True)
class Modes:
    """eval(), and with `back` train()."""

    back: bool = True


@dataclass(frozen=True)
class Look:
    """Take a state dict, also while perturbed."""


@dataclass(frozen=True)
class Resume:
    """Save to a file, and load into a new model and optimizer, which go on beside the old ones."""


@dataclass(frozen=True)
class Copy:
    """deepcopy of model and optimizer, which go on beside the old ones."""


@dataclass(frozen=True)
class Program:
    """A program.

    Attributes:
        kind: name of the optimizer's class.
        layouts: of the parameters, in order.
        second_group: number of the first parameter of the second group, if there is one.
        groups: hyper-parameters of the groups.
        options: arguments of the optimizer.
        anchored: numbers of the parameters with an anchor, or None for "initial".
        keep: part of the weights that are trained, or None.
        frozen: numbers of the parameters without requires_grad.
    """

    kind: str
    dtype: torch.dtype
    layouts: tuple[str, ...]
    second_group: int
    groups: tuple[dict, dict]
    options: dict
    anchored: frozenset[int] | None
    keep: float | None
    frozen: frozenset[int]
    actions: tuple

    def groups_of(self, named: list[tuple[str, Tensor]]) -> list[dict]:
        """Parameter groups of the initial parameters."""
        parts = [named[: self.second_group], named[self.second_group :]]
        return [{"params": part, **group} for part, group in zip(parts, self.groups, strict=True) if part]


# -- the model ---------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """The parameters of a program, with values that are multiples of 1/64; `tied` has some of them a second time.

    Called with the gradients that are wanted, it returns the loss that has them.
    """

    def __init__(self, layouts: tuple[str, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.tied = nn.Module()
        for layout in layouts:
            self.add(layout)

    def add(self, layout: str) -> tuple[str, nn.Parameter]:
        """One parameter more, and its name: a FisherMask leaves out vectors."""
        number = len(self._parameters)
        like = LAYOUTS[layout]()
        generator = torch.Generator().manual_seed(number)
        values = torch.randint(-64, 65, like.shape, generator=generator) / 64
        weight = nn.Parameter(torch.empty_strided(like.shape, like.stride(), dtype=self.dtype).copy_(values))
        name = f"{layout}{number}" if like.dim() > 1 else f"{layout}{number}_bias"
        self.register_parameter(name, weight)
        if layout == "tied":
            self.tied.register_parameter(name, weight)
        return name, weight

    def terms(self, passed: Pass, seed: int) -> dict[str, Tensor]:
        """The gradients of a pass: different multiples of 1/64 from 1/2 to 3/2, random signs; exact in any dtype."""
        generator = torch.Generator().manual_seed(seed)
        magnitudes = (torch.randperm(MOST_WEIGHTS + 1, generator=generator) + 32) / 64
        values = magnitudes * (torch.randint(0, 2, magnitudes.shape, generator=generator) * 2 - 1)
        named = list(self.named_parameters())
        parts = values.split([p.numel() for _, p in named] + [MOST_WEIGHTS + 1 - sum(p.numel() for _, p in named)])
        bad, value = passed.bad or (None, 0.0)
        out = {}
        for i, ((name, p), part) in enumerate(zip(named, parts[:-1], strict=True)):
            term = part.to(p.dtype).reshape(p.shape).clone()
            if i == bad and p.numel():
                term.view(-1)[0] = value
            if p.requires_grad and i not in passed.missing:
                out[name] = term
        return out

    def forward(self, terms: dict[str, Tensor]) -> Tensor:
        loss = torch.zeros((), dtype=self.dtype)
        for name, term in terms.items():
            p = self.get_parameter(name)
            if name in self.tied._parameters:
                loss = loss + (term * p / 2).sum() + (term * self.tied.get_parameter(name) / 2).sum()
            else:
                loss = loss + (term * p).sum()
        return loss

    def assign(self, terms: dict[str, Tensor], scale: float) -> None:
        """Add to the gradients by hand what a backward pass would."""
        for name, term in terms.items():
            p = self.get_parameter(name)
            p.grad = term * scale if p.grad is None else p.grad + term * scale


def fish_mask(model: nn.Module, keep: float | None) -> FishMask | None:
    """About this part of the weights, with one of the first parameter's."""
    if keep is None:
        return None
    generator = torch.Generator().manual_seed(round(100 * keep))
    indices, shapes = {}, {}
    for i, (name, p) in enumerate(model.named_parameters()):
        chosen = torch.rand(p.numel(), generator=generator) < keep
        if i == 0:
            chosen[2] = True
        indices[name], shapes[name] = chosen.nonzero().flatten(), p.shape
    return FishMask(indices, shapes)
