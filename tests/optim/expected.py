"""What a training program must have made of a model and its optimizer by now, by the fp64 reference."""

import math

import torch
from torch import Tensor

from fsam_triton.buffers.lanes import Lanes
from tests.optim import programs
from tests.optim.oracle import Oracle
from tests.optim.programs import Program
from tests.optim.run import Run


class Expected:
    """Watches a run, follows it with the oracle, and compares the two.

    Attributes:
        grads: what `p.grad` must be, by name.
        perturbed, training: what the optimizer must be.
        clean: the clean weights when they were last compared.
        updated: whether there was an update since then.
    """

    def __init__(self, program: Program, run: Run, trained: dict[str, Tensor] | None) -> None:
        self.run = run
        self.is_fsam, self.is_momentum = program.kind == "FSAM", program.kind == "MomentumSAM"
        named = [(name, p.detach().clone()) for name, p in run.model.named_parameters()]
        self.oracle = Oracle(program, named, trained)
        self.grads: dict[str, Tensor | None] = dict.fromkeys(name for name, _ in named)
        self.perturbed, self.training = False, True
        self.clean = self.clean_weights()
        self.updated = False
        # Without master weights nothing is exact about bf16; LookSAM's component can be rounding noise.
        self.exact = program.dtype != torch.bfloat16 or program.options["master_weights"]
        if "schedule" in program.options and program.options["schedule"].reuse > 0:
            self.exact = False

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
        if self.is_fsam and self.run.optimizer.perturbed and not self.perturbed:
            assert call == 1
            assert self.oracle.comes_sharp
            self._climb(1.0)

    def on_failure(self, call: int, action: programs.Step) -> None:
        assert action.fails[0] == call
        self.restored()

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
            self.restored()

    def restored(self) -> None:
        self.perturbed, self.oracle.eps = False, None

    def any_gradient(self) -> bool:
        return any(g is not None for g in self.oracle.gradients_of(self.grads))

    def _unscaled(self, scale: float) -> list[Tensor | None]:
        return [None if g is None else g / scale for g in self.oracle.gradients_of(self.grads)]

    def _note_frozen(self) -> None:
        self.oracle.frozen = {name for name, p in self.run.model.named_parameters() if not p.requires_grad}

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
        self.perturbed = self.run.optimizer.perturbed if self.oracle.draws_tensors else True
        self._compare_shown()

    def _descend(self, skip: bool, scale: float) -> None:
        self.oracle.descend(self._unscaled(scale), skip)
        self.perturbed = False
        self.updated = True

    # -- comparing -----------------------------------------------------------------------------------------------------

    def clean_weights(self) -> dict[str, Tensor]:
        out = {}
        for name, p in self.run.model.named_parameters():
            clean = self.run.optimizer.clean_weight(p)
            out[name] = (p if clean is None else clean).detach().clone()
        return out

    def compare(self) -> None:
        optimizer = self.run.optimizer
        assert optimizer.perturbed == self.perturbed
        clean = self.clean_weights()
        if not self.updated:
            assert_equal(clean, self.clean)
        self.clean = clean
        for name, p in self.run.model.named_parameters():
            assert p.isfinite().all(), name
            if not self.perturbed:
                assert torch.equal(p, clean[name]), name
            if (expected := self.grads[name]) is not None and not self._is_left_out(name):
                assert torch.allclose(p.grad, expected, rtol=0, atol=0, equal_nan=True), name
        for lanes in optimizer.ledger:
            assert_gaps_are_zero(lanes)
        self._compare_state()
        self._compare_shown()

    def _is_left_out(self, name: str) -> bool:
        """Whether no weight of a parameter is trained."""
        return self.oracle.trained is not None and not self.oracle.trained[name].any()

    def _compare_state(self) -> None:
        """Counts, moments, masters and clean weights are the oracle's."""
        for entry in self.oracle.entries:
            p = self.run.model.get_parameter(entry.name)
            state = self.run.optimizer.state.get(p, {})
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
                master = self._chosen(entry.name, self.master_weight(entry.name))
                assert torch.equal(master.to(p.dtype), clean)
                clean = master
            elif p.dtype == torch.bfloat16:
                continue
            assert_close(clean, exact, self.oracle.bound(), (entry.name, "weight"))

    def master_weight(self, name: str) -> Tensor:
        return self.run.optimizer.master_weight(self.run.model.get_parameter(name))

    def _chosen(self, name: str, values: Tensor) -> Tensor:
        return values if self.oracle.trained is None else values[self.oracle.trained[name]]

    def _compare_shown(self) -> None:
        """While perturbed, parameters are the oracle's weights plus eps, and the mask is its mask."""
        oracle = self.oracle
        if not (self.perturbed and self.exact and math.isfinite(oracle.eps_error)):
            return
        for entry, eps in zip(oracle.entries, oracle.eps, strict=True):
            p = self.run.model.get_parameter(entry.name)
            bound = oracle.bound() + oracle.eps_error
            if p.dtype == torch.bfloat16:
                # The weights round, and so does the sum, to one of its neighbours.
                bound = bound + 2.0**-6 * (entry.weight.abs() + eps.abs())
            assert_close(p, entry.weight + eps, bound, (entry.name, "perturbed weight"))
            # One that was frozen from the start has no mask, also if what the mask does not choose from is perturbed.
            if self.is_fsam and oracle.mask and not (entry.name in oracle.frozen and oracle.mask.is_excluded(entry)):
                assert torch.equal(self.run.optimizer.mask_of(p), entry.mask), (entry.name, "mask")


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
