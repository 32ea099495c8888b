"""The actions of a training program on one model and its optimizer."""

import itertools
from typing import Any

import torch
from torch import Tensor

from tests.optim import programs
from tests.optim.programs import Failed, Model, Pass, Stopped


class Run:
    """A model and its optimizer, and the actions of a program on them; a watcher is told what happens inside."""

    def __init__(self, model: Model, optimizer, watcher: Any = None) -> None:
        self.model, self.optimizer, self.watcher = model, optimizer, watcher

    def tell(self, event: str, *args) -> None:
        if self.watcher is not None:
            getattr(self.watcher, f"on_{event}")(*args)

    def zero_grad(self, how: str) -> None:
        if how == "model":
            self.model.zero_grad(set_to_none=False)
        else:
            self.optimizer.zero_grad(set_to_none=how == "none")
        self.tell("zero_grad", how)

    def backward(self, passed: Pass, seed: int, scale: float = 1.0) -> None:
        terms = self.model.terms(passed, seed)
        if passed.assigned:
            self.model.assign(terms, scale)
        else:
            loss = self.model(terms)
            self.tell("forward")
            if loss.requires_grad:
                (loss * scale).backward()
        self.tell("backward", terms, scale)

    def perturb(self, scale: float = 1.0) -> None:
        try:
            self.optimizer.perturb()
        except RuntimeError:
            self.tell("perturb", True, scale)
        else:
            self.tell("perturb", False, scale)

    def update(self, scale: float | None = None) -> None:
        """step(), as a GradScaler calls it if there is a scale."""
        found = False
        if scale is not None:
            found = any(p.grad is not None and not p.grad.isfinite().all() for p in self.model.parameters())
            self.optimizer.grad_scale, self.optimizer.found_inf = torch.tensor(scale), torch.tensor(float(found))
        try:
            self.optimizer.step()
        except RuntimeError:
            self.tell("refused_step")
            return
        finally:
            if scale is not None:
                del self.optimizer.grad_scale, self.optimizer.found_inf
        self.tell("update", found, scale or 1.0)

    def step(self, action: programs.Step, seed: int) -> None:
        calls = itertools.count()

        def closure():
            call = next(calls)
            self.tell("closure", call)
            fails = action.fails if action.fails is not None and action.fails[0] == call else None
            if fails and not fails[1]:
                raise fails[2]
            self.zero_grad("none")
            self.backward(action.passes[call], seed + call)
            if fails:
                raise fails[2]
            return torch.ones(())

        try:
            self.optimizer.step(closure)
        except (Failed, Stopped):
            self.tell("failure", next(calls) - 1, action)
        except RuntimeError:
            self.tell("refused_step")
        else:
            self.tell("step", next(calls), action)


def state_of(run: Run) -> dict:
    """The optimizer's state dict as copies by name; without the zeros of parameters whose every step was skipped."""
    saved = run.optimizer.state_dict()
    updated = {i: entry for i, entry in saved["state"].items() if entry["step"] > 0}
    entries = {(i, name): value.clone() for i, entry in updated.items() for name, value in entry.items()}
    groups = {(i, name): value for i, group in enumerate(saved["param_groups"]) for name, value in group.items()}
    # torch.optim adds a default when it copies.
    return {name: value for name, value in (entries | groups).items() if name[1] != "differentiable"}


def shown_by(run: Run) -> dict[str, Tensor]:
    return {name: values.clone() for name, values in run.model.state_dict().items()}
