"""Does the actions of a training program, on a model and on copies of it, and compares with the fp64 reference."""

import copy

import pytest
import torch
from torch import Tensor

import fsam_triton
from tests.optim import programs
from tests.optim.expected import Expected, assert_equal
from tests.optim.programs import Model, Program, fish_mask
from tests.optim.run import Run, shown_by, state_of
from tests.training import round_trip


class Checker:
    """Does the actions of a program on a run and on copies of it, and compares after each."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.layouts, self.added = program.layouts, []
        self.keep = program.keep
        model = Model(self.layouts, program.dtype)
        for i, p in enumerate(model.parameters()):
            p.requires_grad_(i not in program.frozen)
        self._note_build(model)
        self.main = Run(model, self._optimizer(model))
        self.copies: list[Run] = []
        self.main.watcher = self.expected = Expected(program, self.main, self._trained())
        self.compare()

    # -- making --------------------------------------------------------------------------------------------------------

    def _note_build(self, model: Model) -> None:
        """What another optimizer must be made of to have the same buckets and anchors."""
        self.built = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}

    def _optimizer(self, model: Model):
        named = list(model.named_parameters())
        options = {**self.program.options, "trainable": fish_mask(model, self.keep)}
        first = named[: len(self.program.layouts)]
        if self.program.anchored is not None:
            initial = Model(self.program.layouts, self.program.dtype).named_parameters()
            options["anchors"] = {name: p for i, (name, p) in enumerate(initial) if i in self.program.anchored}
        optimizer = getattr(fsam_triton, self.program.kind)(self.program.groups_of(first), **options)
        for added, group in zip(named[len(first) :], self.added, strict=True):
            optimizer.add_param_group({"params": [added], **group})
        return optimizer

    def _trained(self) -> dict[str, Tensor] | None:
        """Which weights are trained, as booleans."""
        if (mask := fish_mask(self.main.model, self.keep)) is None:
            return None
        out = {}
        for name, p in self.main.model.named_parameters():
            flags = torch.zeros(p.numel(), dtype=torch.bool)
            flags[mask.indices(name).long()] = True
            out[name] = flags.view(p.shape)
        return out

    # -- actions -------------------------------------------------------------------------------------------------------

    def do(self, number: int, action) -> None:
        self.expected.updated = False
        getattr(self, f"do_{type(action).__name__.lower()}")(action, 4 * number)
        self.compare()

    @property
    def runs(self) -> list[Run]:
        return [self.main, *self.copies]

    def do_step(self, action: programs.Step, seed: int) -> None:
        for run in self.runs:
            run.step(action, seed)

    def do_byhand(self, action: programs.ByHand, seed: int) -> None:
        scale = action.scale or 1.0
        if self.expected.is_fsam:
            self.do_restore(None, seed)
        for run in self.runs:
            run.zero_grad("none")
            if self.expected.is_fsam:
                run.backward(action.passes[0], seed, scale)
                run.perturb(scale)
                run.zero_grad("none")
            run.backward(action.passes[1], seed + 1, scale)
            run.update(action.scale)

    def do_halfway(self, action: programs.Halfway, seed: int) -> None:
        self.do_restore(None, seed)
        for run in self.runs:
            run.zero_grad("none")
            run.backward(action.passed, seed)
            if self.expected.is_fsam:
                run.perturb()

    def do_backward(self, action: programs.Backward, seed: int) -> None:
        for run in self.runs:
            run.backward(action.passed, seed)

    def do_perturb(self, action: programs.Perturb, seed: int) -> None:
        for run in self.runs:
            run.perturb()

    def do_update(self, action: programs.Update, seed: int) -> None:
        for run in self.runs:
            run.update()

    def do_restore(self, action: programs.Restore | None, seed: int) -> None:
        for run in self.runs:
            run.optimizer.restore()
        self.expected.restored()

    def do_zerograd(self, action: programs.ZeroGrad, seed: int) -> None:
        for run in self.runs:
            run.zero_grad(action.how)

    def do_edit(self, action: programs.Edit, seed: int) -> None:
        for run in self.runs:
            p = list(run.model.parameters())[action.number]
            generator = torch.Generator().manual_seed(action.seed)
            values = torch.randint(-64, 65, p.shape, generator=generator) / 64
            self._edit(run.model, action, p, torch.empty_like(p).copy_(values).detach())
        name = [name for name, _ in self.main.model.named_parameters()][action.number]
        clean = self.expected.clean_weights()
        assert torch.equal(clean[name], values.to(clean[name].dtype))
        self.expected.clean[name] = clean[name]
        state = self.main.optimizer.state.get(self.main.model.get_parameter(name), {})
        if action.how == "load":
            # The others are loaded with their own clean weights.
            self.expected.oracle.unperturb()
        # A master keeps what was below the last digit of the parameter.
        self.expected.oracle.edit(name, self.expected.master_weight(name) if "remainder" in state else values)

    def _edit(self, model: Model, action: programs.Edit, p: torch.nn.Parameter, values: Tensor) -> None:
        if action.how == "replace":
            p.data = values
        elif action.how == "load":
            state = model.state_dict()
            names = [n for n, own in model.named_parameters(remove_duplicate=False) if own is p]
            model.load_state_dict(state | dict.fromkeys(names, values))
        elif action.how == "data" and not self.expected.perturbed:
            p.data.copy_(values)
        else:
            with torch.no_grad():
                p.copy_(values)

    def do_change(self, action: programs.Change, seed: int) -> None:
        groups = [run.optimizer.param_groups for run in self.runs]
        if action.group < len(self.expected.oracle.groups):
            for group in [self.expected.oracle.groups, *groups]:
                group[action.group][action.name] = action.value

    def do_addgroup(self, action: programs.AddGroup, seed: int) -> None:
        if self.keep is not None or len(self.added) == 2:
            return
        self._restore_under_a_mask()
        for run in self.runs:
            added = run.model.add(action.layout)
            run.optimizer.add_param_group({"params": [added], **action.options})
        self.added.append(action.options)
        self.layouts = (*self.layouts, action.layout)
        name, p = added
        self.expected.grads[name], self.built[name] = None, (p.detach().clone(), True)
        self.expected.clean[name] = p.detach().clone()
        self.expected.oracle.add_group([(name, self.main.model.get_parameter(name).detach())], action.options)

    def do_settrainable(self, action: programs.SetTrainable, seed: int) -> None:
        self.keep = action.keep
        for run in self.runs:
            run.optimizer.set_trainable(fish_mask(run.model, self.keep))
        self.expected.perturbed = False
        self.expected.grads = dict.fromkeys(self.expected.grads)
        self._note_build(self.main.model)
        self.expected.oracle.set_trainable({name: values for name, (values, _) in self.built.items()}, self._trained())

    def _restore_under_a_mask(self) -> None:
        """A look at the mask of other parameters restores."""
        if self.expected.oracle.mask is not None:
            self.do_restore(None, 0)

    def do_freeze(self, action: programs.Freeze, seed: int) -> None:
        self._restore_under_a_mask()
        for run in self.runs:
            p = list(run.model.parameters())[action.number % len(self.layouts)]
            p.requires_grad_(action.number % len(self.layouts) == 0 or not p.requires_grad)

    def do_modes(self, action: programs.Modes, seed: int) -> None:
        for run in self.runs:
            run.optimizer.eval()
            if action.back:
                run.optimizer.train()
        self.expected.training = action.back
        self.expected.restored()

    def do_look(self, action: programs.Look, seed: int) -> None:
        before = state_of(self.main) | shown_by(self.main)
        self.do_restore(None, seed)
        assert_equal(state_of(self.main) | shown_by(self.main), before)
        for name, p in self.main.model.named_parameters():
            assert torch.equal(p, before[name]), name

    def do_resume(self, action: programs.Resume, seed: int) -> None:
        model, optimizer = self.main.model, self.main.optimizer
        saved = round_trip({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        self.do_restore(None, seed)
        for run in self.runs:
            run.zero_grad("none")
        fresh = Model(self.layouts, self.program.dtype)
        for name, p in fresh.named_parameters():
            values, requires_grad = self.built[name]
            p.data.copy_(values)
            p.requires_grad_(requires_grad)
        own = self._optimizer(fresh)
        if not self.expected.training:
            own.eval()
        fresh.load_state_dict(saved["model"])
        own.load_state_dict(saved["optimizer"])
        self._adopt(fresh, own)

    def do_copy(self, action: programs.Copy, seed: int) -> None:
        for run in self.runs:
            run.zero_grad("none")
        if self.expected.perturbed:
            with pytest.raises(RuntimeError, match="perturbed"):
                copy.deepcopy((self.main.model, self.main.optimizer))
            self.do_restore(None, seed)
        # A frozen parameter has a mask only where it had one before it was frozen.
        frozen = [name for name, p in self.main.model.named_parameters() if not p.requires_grad]
        if self.expected.oracle.mask is None or not frozen:
            self._adopt(*copy.deepcopy((self.main.model, self.main.optimizer)))

    def _adopt(self, model: Model, optimizer) -> None:
        for p, own in zip(model.parameters(), self.main.model.parameters(), strict=True):
            p.requires_grad_(own.requires_grad)
        self.copies = [*self.copies[-1:], Run(model, optimizer)]

    def compare(self) -> None:
        """The run with what is expected, the copies with the run."""
        self.expected.compare()
        for run in self.copies:
            assert_equal(run.model.state_dict(), self.main.model.state_dict())
            assert_equal(dict(run.model.named_parameters()), dict(self.main.model.named_parameters()))
            assert_equal(state_of(run), state_of(self.main))
