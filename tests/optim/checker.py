"""Does the actions of a training program, on a model and on copies of it, and compares with the fp64 reference."""

import copy
import math

import pytest
import torch
from torch import Tensor

import fsam_triton
from fsam_triton.buffers.lanes import Lanes
from tests.optim import programs
from tests.optim.oracle import Oracle
from tests.optim.programs import Model, Program, fish_mask
from tests.optim.run import Run, shown_by, state_of
from tests.training import round_trip


class Checker:
    """Does the actions of a program on a run and on copies of it, and compares with the oracle after each."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.options = program.options
        self.is_fsam, self.is_momentum = program.kind == "FSAM", program.kind == "MomentumSAM"
        self.layouts, self.added = program.layouts, []
        self.keep = program.keep
        model = Model(self.layouts, program.dtype)
        for i, p in enumerate(model.parameters()):
            p.requires_grad_(i not in program.frozen)
        self._note_build(model)
        self.main = Run(model, self._optimizer(model), self)
        self.copies: list[Run] = []
        self.grads: dict[str, Tensor | None] = dict.fromkeys(self.built)
        self.oracle = Oracle(program, self._named(), self._trained())
        self.perturbed, self.training = False, True
        self.clean = self._clean_weights()
        self.updated = False
        # Without master weights nothing is exact about bf16; LookSAM's component can be rounding noise.
        self.exact = program.dtype != torch.bfloat16 or self.options["master_weights"]
        if "schedule" in self.options and self.options["schedule"].reuse > 0:
            self.exact = False
        self.compare()

    # -- making --------------------------------------------------------------------------------------------------------

    def _note_build(self, model: Model) -> None:
        """What another optimizer must be made of to have the same buckets and anchors."""
        self.built = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}

    def _optimizer(self, model: Model):
        named = list(model.named_parameters())
        options = {**self.options, "trainable": fish_mask(model, self.keep)}
        first = named[: len(self.program.layouts)]
        if self.program.anchored is not None:
            initial = Model(self.program.layouts, self.program.dtype).named_parameters()
            options["anchors"] = {name: p for i, (name, p) in enumerate(initial) if i in self.program.anchored}
        optimizer = getattr(fsam_triton, self.program.kind)(self.program.groups_of(first), **options)
        for added, group in zip(named[len(first) :], self.added, strict=True):
            optimizer.add_param_group({"params": [added], **group})
        return optimizer

    def _named(self) -> list[tuple[str, Tensor]]:
        return [(name, p.detach().clone()) for name, p in self.main.model.named_parameters()]

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

    # -- what happens inside -------------------------------------------------------------------------------------------

    def on_zero_grad(self, how: str) -> None:
        for name, grad in self.grads.items():
            self.grads[name] = None if how == "none" or grad is None else torch.zeros_like(grad)

    def on_backward(self, terms: dict[str, Tensor], scale: float) -> None:
        for name, term in terms.items():
            before = self.grads[name]
            self.grads[name] = term * scale if before is None else before + term * scale

    def on_forward(self) -> None:
        if self.is_momentum and self.training:
            self._lean()

    def on_perturb(self, refused: bool, scale: float) -> None:
        if self.is_momentum:
            assert refused == (not self.training)
            self.on_forward()
            return
        assert refused == (self.perturbed or not self.any_gradient())
        if not refused:
            self._climb(scale)

    def on_closure(self, call: int) -> None:
        self.must_climb = self.is_fsam and not self.perturbed and self.oracle.comes_sharp
        if self.is_fsam and self.main.optimizer.perturbed and not self.perturbed:
            assert call == 1
            assert self.oracle.comes_sharp
            self._climb(1.0)

    def on_failure(self, call: int, action: programs.Step) -> None:
        assert action.fails[0] == call
        self._restored()

    def on_step(self, calls: int, action: programs.Step) -> None:
        assert action.fails is None or action.fails[0] >= calls
        assert not (calls == 1 and self.must_climb and self.any_gradient())
        self._descend(False, 1.0)

    def on_update(self, skipped: bool, scale: float) -> None:
        self._descend(skipped, scale)

    def on_refused_step(self) -> None:
        if self.is_momentum:
            assert not self.training
        else:
            # A closure that has computed no gradients.
            assert self.is_fsam
            assert not any(grad is not None for grad in self.grads.values())
            self._restored()

    def _restored(self) -> None:
        self.perturbed, self.oracle.eps = False, None

    def any_gradient(self) -> bool:
        return any(g is not None for g in self.oracle.gradients_of(self.grads))

    def _unscaled(self, scale: float) -> list[Tensor | None]:
        return [None if g is None else g / scale for g in self.oracle.gradients_of(self.grads)]

    def _note_frozen(self) -> None:
        self.oracle.frozen = {name for name, p in self.main.model.named_parameters() if not p.requires_grad}

    def _lean(self) -> None:
        self._note_frozen()
        if self.oracle.leans and not self.perturbed:
            self.oracle.lean()
            self.perturbed = True
        self._compare_shown()

    def _climb(self, scale: float) -> None:
        self._note_frozen()
        if any(self.grads[name] is not None for name in self.oracle.frozen):
            self.oracle.ambiguous |= self.oracle.mask is not None
        self.oracle.climb(self._unscaled(scale))
        self.grads = dict.fromkeys(self.grads)
        # Of the tensors that ESAM draws, none may have had a gradient.
        self.perturbed = self.main.optimizer.perturbed if self.oracle.draws_tensors else True
        self._compare_shown()

    def _descend(self, skip: bool, scale: float) -> None:
        self.oracle.descend(self._unscaled(scale), skip)
        self.perturbed = False
        self.updated = True

    # -- actions -------------------------------------------------------------------------------------------------------

    def do(self, number: int, action) -> None:
        self.updated = False
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
        if self.is_fsam:
            self.do_restore(None, seed)
        for run in self.runs:
            run.zero_grad("none")
            if self.is_fsam:
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
            if self.is_fsam:
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
        self._restored()

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
        clean = self._clean_weights()
        assert torch.equal(clean[name], values.to(clean[name].dtype))
        self.clean[name] = clean[name]
        state = self.main.optimizer.state.get(self.main.model.get_parameter(name), {})
        if action.how == "load":
            # The others are loaded with their own clean weights.
            self.oracle.unperturb()
        # A master keeps what was below the last digit of the parameter.
        self.oracle.edit(name, self._master_weight(name) if "remainder" in state else values)

    def _edit(self, model: Model, action: programs.Edit, p: torch.nn.Parameter, values: Tensor) -> None:
        if action.how == "replace":
            p.data = values
        elif action.how == "load":
            state = model.state_dict()
            names = [n for n, own in model.named_parameters(remove_duplicate=False) if own is p]
            model.load_state_dict(state | dict.fromkeys(names, values))
        elif action.how == "data" and not self.perturbed:
            p.data.copy_(values)
        else:
            with torch.no_grad():
                p.copy_(values)

    def do_change(self, action: programs.Change, seed: int) -> None:
        groups = [run.optimizer.param_groups for run in self.runs]
        if action.group < len(self.oracle.groups):
            for group in [self.oracle.groups, *groups]:
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
        self.grads[name], self.built[name] = None, (p.detach().clone(), True)
        self.clean[name] = p.detach().clone()
        self.oracle.add_group([(name, self.main.model.get_parameter(name).detach())], action.options)

    def do_settrainable(self, action: programs.SetTrainable, seed: int) -> None:
        self.keep = action.keep
        for run in self.runs:
            run.optimizer.set_trainable(fish_mask(run.model, self.keep))
        self.perturbed = False
        self.grads = dict.fromkeys(self.grads)
        self._note_build(self.main.model)
        self.oracle.set_trainable({name: values for name, (values, _) in self.built.items()}, self._trained())

    def _restore_under_a_mask(self) -> None:
        """A look at the mask of other parameters restores."""
        if self.oracle.mask is not None:
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
        self.training = action.back
        self._restored()

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
        if not self.training:
            own.eval()
        fresh.load_state_dict(saved["model"])
        own.load_state_dict(saved["optimizer"])
        self._adopt(fresh, own)

    def do_copy(self, action: programs.Copy, seed: int) -> None:
        for run in self.runs:
            run.zero_grad("none")
        if self.perturbed:
            with pytest.raises(RuntimeError, match="perturbed"):
                copy.deepcopy((self.main.model, self.main.optimizer))
            self.do_restore(None, seed)
        # A frozen parameter has a mask only where it had one before it was frozen.
        frozen = [name for name, p in self.main.model.named_parameters() if not p.requires_grad]
        if self.oracle.mask is None or not frozen:
            self._adopt(*copy.deepcopy((self.main.model, self.main.optimizer)))

    def _adopt(self, model: Model, optimizer) -> None:
        for p, own in zip(model.parameters(), self.main.model.parameters(), strict=True):
            p.requires_grad_(own.requires_grad)
        self.copies = [*self.copies[-1:], Run(model, optimizer)]

    # -- comparing -----------------------------------------------------------------------------------------------------

    def _clean_weights(self) -> dict[str, Tensor]:
        out = {}
        for name, p in self.main.model.named_parameters():
            clean = self.main.optimizer.clean_weight(p)
            out[name] = (p if clean is None else clean).detach().clone()
        return out

    def compare(self) -> None:
        optimizer = self.main.optimizer
        assert optimizer.perturbed == self.perturbed
        clean = self._clean_weights()
        if not self.updated:
            assert_equal(clean, self.clean)
        self.clean = clean
        for name, p in self.main.model.named_parameters():
            assert p.isfinite().all(), name
            if not self.perturbed:
                assert torch.equal(p, clean[name]), name
            if (expected := self.grads[name]) is not None and not self._is_left_out(name):
                assert torch.allclose(p.grad, expected, rtol=0, atol=0, equal_nan=True), name
        for lanes in optimizer.ledger:
            assert_gaps_are_zero(lanes)
        self._compare_state()
        self._compare_shown()
        for run in self.copies:
            assert_equal(run.model.state_dict(), self.main.model.state_dict())
            assert_equal(dict(run.model.named_parameters()), dict(self.main.model.named_parameters()))
            assert_equal(state_of(run), state_of(self.main))

    def _is_left_out(self, name: str) -> bool:
        """Whether no weight of a parameter is trained."""
        return self.oracle.trained is not None and not self.oracle.trained[name].any()

    def _compare_state(self) -> None:
        """Counts, moments, masters and clean weights are the oracle's."""
        for entry in self.oracle.entries:
            p = self.main.model.get_parameter(entry.name)
            state = self.main.optimizer.state.get(p, {})
            assert float(state.get("step", 0)) == entry.step, entry.name
            for name, value in state.items():
                # What an overflow leaves there is kept as it is: the component is not used, and a mask is chosen by it.
                assert name in ("orthogonal", "fisher") or value.isfinite().all(), (entry.name, name)
            if not self.exact:
                continue
            bounds = self.oracle.moment_bounds()
            for name, bound in zip(("exp_avg", "exp_avg_sq"), bounds, strict=True):
                exact = self._chosen(entry.name, getattr(entry, name))
                assert_close(state.get(name, torch.zeros(())).double(), exact, bound, (entry.name, name))
            exact = self._chosen(entry.name, entry.weight)
            clean = self._chosen(entry.name, self.clean[entry.name])
            if "remainder" in state:
                master = self._chosen(entry.name, self._master_weight(entry.name))
                assert torch.equal(master.to(p.dtype), clean)
                clean = master
            elif p.dtype == torch.bfloat16:
                continue
            assert_close(clean, exact, self.oracle.bound(), (entry.name, "weight"))

    def _master_weight(self, name: str) -> Tensor:
        return self.main.optimizer.master_weight(self.main.model.get_parameter(name))

    def _chosen(self, name: str, values: Tensor) -> Tensor:
        return values if self.oracle.trained is None else values[self.oracle.trained[name]]

    def _compare_shown(self) -> None:
        """While perturbed, parameters are the oracle's weights plus eps, and the mask is its mask."""
        oracle = self.oracle
        if not (self.perturbed and self.exact and math.isfinite(oracle.eps_error)):
            return
        for entry, eps in zip(oracle.entries, oracle.eps, strict=True):
            p = self.main.model.get_parameter(entry.name)
            bound = oracle.bound() + oracle.eps_error
            if p.dtype == torch.bfloat16:
                # The weights round, and so does the sum, to one of its neighbours.
                bound = bound + 2.0**-6 * (entry.weight.abs() + eps.abs())
            assert_close(p, entry.weight + eps, bound, (entry.name, "perturbed weight"))
            # One that was frozen from the start has no mask, also if what the mask does not choose from is perturbed.
            if self.is_fsam and oracle.mask and not (entry.name in oracle.frozen and oracle.mask.is_excluded(entry)):
                assert torch.equal(self.main.optimizer.mask_of(p), entry.mask), (entry.name, "mask")


def assert_equal(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0, equal_nan=True, msg=str(name))
        else:
            assert value == expected[name], name


def assert_close(actual: Tensor, exact: Tensor, bound: Tensor | float, what) -> None:
    excess = (actual.detach().double() - exact).abs() - bound
    assert not (excess > 0).any(), (what, actual, exact, bound)


def assert_gaps_are_zero(lanes: Lanes) -> None:
    """Nothing but zeros between the parameters' parts and after the last."""
    offsets, lengths = lanes.plan.offsets, lanes.plan.lengths
    stops = [offset + length for offset, length in zip(offsets, lengths, strict=True)]
    gaps = [slice(stop, start) for stop, start in zip(stops, [*offsets[1:], lanes.plan.size], strict=True)]
    for flat in (lane for name, lane in lanes.lanes.items() if name != "mask"):
        assert not any(flat[gap].any() for gap in gaps)
