"""FusedOptimizer: parameter groups, lanes and one fused update of all parameters by a rule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from .. import ops
from ..buffers.flatten import flatten
from ..buffers.lanes import Gradients, Lanes
from ..buffers.ledger import Found, Ledger
from ..buffers.sharded import OtherParts, is_sharded, sum_over_shards
from ..errors import ArgumentError, check
from ..kernels import spec
from ..kernels.reference import compute_dtype
from ..kernels.segments import Segments
from ..masks.trained import FishMask
from . import average, coefficients, state_formats
from .anchors import Anchors
from .average import Average
from .balance import Balance
from .checkpoint import checked_groups, checked_state, with_floats
from .descent import Direction, Half, descend, prepared
from .groups import check_options, check_parameters, trained_positions
from .perturbable import Perturbable
from .release import GradientRelease
from .rules import RULES, Rule
from .uncompiled import add_param_group, state_dict, uncompiled, zero_grad

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_UPDATE = 0x51ED270B


class FusedOptimizer(Perturbable):
    """A rule over parameters that stay where they are, in one pass over all of them; the base of our optimizers.

    Args:
        params: ``model.parameters()``, ``model.named_parameters()`` or parameter groups (dicts), which may also contain
            every argument marked (group). Trained parameters must be floating-point, strided, plain tensors or
            DTensors; frozen parameters of any kind are left alone.
        rule: ``"adamw"``, ``"sgd"`` or ``"lion"``.
        lr: learning rate, a float or a tensor of one element (group).
        weight_decay: decay to zero for parameters without an anchor, >= 0 (group; default: the rule's).
        l2_sp: decay towards the anchor, >= 0 (group; default: 0, no anchors are kept).
        anchors: ``"initial"``, the weights before the first update, or a mapping of parameter names to tensors of their
            shapes, copied at the first update, for which ``params`` must carry names; parameters that it does not name
            are novel. It may be a whole ``state_dict()``; a name that differs from a parameter's only in a prefix or a
            wrapper's part is refused (default: ``"initial"``).
        maximize: maximize the objective (group; default: False).
        balance: the strength alpha >= 0 of BAR, balancedness-aware regularisation of LoRA adapters (arXiv 2410.14802,
            which uses 0.2 to 2). In each step, before the update, one matrix of a pair grows,
            ``w *= 1 + lr * balance``, and the other decays by the same rate. Pairs are recognised by their names in
            peft (``lora_A`` and ``lora_B``, ``lora_embedding_A`` and ``_B``), so ``params`` must carry names (group;
            default: 0).
        balance_by: decides which matrix grows: with ``"gradients"`` the one with the larger gradient (the paper's
            nBAR), with ``"weights"`` the smaller one (oBAR), both by Frobenius norm (default: ``"gradients"``).
        max_grad_norm: clip the global gradient norm to this value, > 0, as ``clip_grad_norm_`` does; a step whose norm
            is not finite is skipped altogether (default: None, no clipping).
        state_format: how the rule's state is kept (group): ``"fp32"``; ``"bf16"``; ``"8bit"``, in codes of one byte
            with a scale for 32 elements, for parameters of at least two dimensions whose rows (the elements of one
            index of the first dimension) are whole groups of 32, whatever their shards; all other parameters keep the
            default. None: bf16 for bf16 parameters without master weights, fp64 for fp64 parameters, otherwise fp32
            (default: None).
        master_weights: keep the part of 16-bit parameters that rounding loses, and fp32 moments: the update is that of
            fp32 weights, and the parameters are their rounded values. ``"32bit"``, which is also True; or ``"24bit"``,
            for bf16 parameters, whose last bit is rounded stochastically (default: False).
        ema_decay: keep an exponential moving average of the clean weights, ``ema += (1 - ema_decay) * (w - ema)`` after
            each update, in [0, 1), for `ema_weights`. It begins at the weights before the first update, without bias
            correction, which is right for fine-tuning, where these are pre-trained. It is kept in fp32 for 16-bit
            parameters, which would lose its small changes (default: None, no average is kept).
        trainable: train only these weights; all others stay as they are, to the bit, without weight decay, and take no
            memory here. Needs ``model.named_parameters()`` (default: None, all).
        stochastic_rounding: without master weights, round 16-bit weights and second moments stochastically; rounding to
            nearest would lose small updates (default: True).
        flatten: move the parameters of a device and type into one buffer when the group is added (group; default:
            False, they stay where they are).
        seed: seed of the stochastic rounding (default: 0).
        norm_group: the processes that have the other parts of the model, each with its own optimizer (the stages of a
            pipeline): norms and dot products are summed over this group, too. All of them must step together, with
            gradients. Not for replicas, nor for FSDP2's shards, over which sums are always taken (default: None).
        foreach, capturable, fused, differentiable: accepted because torch.optim's optimizers take them; every step is
            fused and capturable, and none is differentiable.
        **hyper: the rule's own arguments (group): ``betas``, ``eps``, ``amsgrad``; ``momentum``, ``dampening``,
            ``nesterov``; or ``betas``.

    Raises:
        ArgumentError: an argument is out of its range, a trained parameter is complex or sparse, or an anchor does not
            fit.
        TypeError: the rule does not take an argument.
    """

    # torch.amp.GradScaler then always calls `step` and passes `grad_scale` and `found_inf`, so that a step with an
    # overflow is skipped on the device, after the restore.
    _step_supports_amp_scaling = True
    # Whether modules' parameters were ever in a group.
    _has_parameters = False

    def __init__(
        self,
        params: Iterable[Any],
        rule: str,
        lr: float | Tensor,
        *,
        weight_decay: float | None = None,
        l2_sp: float = 0.0,
        anchors: str | Mapping[str, Tensor] = "initial",
        maximize: bool = False,
        balance: float = 0.0,
        balance_by: str = "gradients",
        max_grad_norm: float | None = None,
        state_format: str | None = None,
        master_weights: bool | str = False,
        ema_decay: float | None = None,
        trainable: FishMask | None = None,
        stochastic_rounding: bool = True,
        flatten: bool = False,
        seed: int = 0,
        norm_group: ProcessGroup | None = None,
        foreach: bool | None = None,
        capturable: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        _of_group: Mapping[str, Any] | None = None,
        **hyper: Any,
    ) -> None:
        check(rule in RULES, "rule", rule, f"must be one of {', '.join(RULES)}")
        self.anchors: Anchors = Anchors(anchors)
        check(max_grad_norm is None or max_grad_norm > 0, "max_grad_norm", max_grad_norm, "must be > 0 or None")
        check(ema_decay is None or 0 <= ema_decay < 1, "ema_decay", ema_decay, "must be in [0, 1) or None")
        state_formats.check_master_weights(master_weights)
        check(not differentiable, "differentiable", differentiable, "must be False")
        self.rule: Rule = RULES[rule]
        unknown = hyper.keys() - self.rule.defaults.keys()
        if unknown:
            allowed = ", ".join(self.rule.defaults)
            raise TypeError(f"unexpected argument {min(unknown)!r}; those of the rule {rule!r} are {allowed}")
        self.max_grad_norm = max_grad_norm
        self.master_weights = master_weights
        self.ema_decay = ema_decay
        self.stochastic_rounding = stochastic_rounding
        self.seed = seed
        self.others: OtherParts = OtherParts(norm_group)
        self._check_trainable(trainable)
        self.trainable = trainable
        self.balance: Balance = Balance(balance_by)
        self.average: Average = Average()
        self.ledger: Ledger = self._new_ledger()
        defaults = {
            "lr": lr,
            **self.rule.defaults,
            **hyper,
            "weight_decay": self.rule.weight_decay if weight_decay is None else weight_decay,
            "l2_sp": l2_sp,
            "state_format": state_format,
            "maximize": maximize,
            "balance": balance,
            "flatten": flatten,
            **(_of_group or {}),
        }
        self._check_group(defaults)
        super().__init__(params, defaults)
        self.anchors.check(self.param_groups)
        self.balance.check(self.param_groups, self.trainable)

    def _new_ledger(self) -> Ledger:
        return Ledger(self._structure, self._trained, self._prepare)

    # -- groups --------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group`."""
        add_param_group(self, param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            self._check_parameters(group)
            for i in range(len(group["params"])):
                self._structure(group, i)
                self._trained(group, i)
        except BaseException:
            self.param_groups.pop()
            raise
        self._has_parameters |= any(isinstance(p, Parameter) for p in group["params"])
        if group["flatten"] and self.trainable is None:
            flatten([p for p in group["params"] if p.requires_grad and not is_sharded(p)])

    def _check_group(self, group: Mapping[str, Any]) -> None:
        check_options(group, self.rule, self.trainable)

    def _check_parameters(self, group: dict[str, Any]) -> None:
        check_parameters(group, self.master_weights)

    def _check_trainable(self, trainable: FishMask | None) -> None:
        fits = trainable is None or isinstance(trainable, FishMask)
        check(fits, "trainable", trainable, "must be a FishMask or None")

    def set_trainable(self, trainable: FishMask | None) -> None:
        """Train other weights from now on, as a new optimizer with the same parameter groups would.

        Groups, hyper-parameters, learning rate schedulers and step counts are kept. Moments start at zero; an average
        of the weights starts at the current weights, and so do anchors with ``anchors="initial"``. Gradients are
        cleared.

        Args:
            trainable: the weights to train; None for all.

        Raises:
            ArgumentError: the mask does not fit; nothing has then been changed.
        """
        self.average.refuse("set_trainable()")
        self._check_trainable(trainable)
        before, self.trainable = self.trainable, trainable
        try:
            for group in self.param_groups:
                for i in range(len(group["params"])):
                    self._trained(group, i)
        except BaseException:
            self.trainable = before
            raise
        self.zero_grad()
        self.restore()
        self.state.clear()
        self.ledger.forget()

    def _trained(self, group: Mapping[str, Any], i: int) -> Tensor | None:
        return trained_positions(self.trainable, group, i)

    def _structure(self, group: Mapping[str, Any], i: int | None) -> Hashable:
        state_format = group["state_format"] if i is None else state_formats.format_of(group, i)
        return self.rule.lanes(group), self.anchors.has(group, i), state_format

    def _prepare(self, lanes: Lanes, entries: list[Mapping[str, Any]]) -> None:
        """Make the lanes that new lanes need for the existing state."""
        self.anchors.prepare(lanes, self.state)
        if any(name in entry for entry in entries for name in (*spec.STATE[self.rule.name], "step")):
            self._allocate(lanes, fill=False)

    # -- one step ------------------------------------------------------------------------------------------------------

    # It is compiled code already, a pass at a time; dynamo would trace what finds and checks the tensors.
    @uncompiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: evaluates the model again and returns the loss, as in torch.optim.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: inside `ema_weights`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def _update(self) -> None:
        """Restore, if perturbed, and apply the rule."""
        found = self._collect()
        self.ledger.settle()
        if self.ledger.shares:
            # A weight that two parameters share is updated twice, each time from where the last update left it.
            self.ledger.restore()
        work = [self._prepared(lanes, grads) for lanes, grads in found]
        squares = self.balance.measure(self.ledger, self.param_groups, work)
        direction = self._direction(work)
        direction.squares = squares
        for half in work:
            if self.ledger.shares:
                half.lanes.stage()
            self._descend(half, direction)
        updated = {id(half.lanes) for half in work}
        for lanes in self.ledger:
            if lanes.perturbed is not None and id(lanes) not in updated:
                lanes.perturbed.put_back()
            lanes.perturbed = None

    def _prepared(self, lanes: Lanes, grads: Gradients, only: int | None = None) -> Half:
        """The launches of an update, of one parameter or of all; see `descent.prepared`."""
        self._allocate(lanes)
        # Those that are updated for the first time have the state of the beginning.
        lanes.entries.begin([grad is not None for grad in grads], self.state)
        return prepared(lanes, grads, self._second_gradients(lanes, grads), only)

    def release_gradients(self) -> GradientRelease:
        """Update each parameter in the backward pass, as soon as its gradient is there, and free the gradient.

        No more than a few gradients are in memory at once. The result is bit-identical to that of `step`, which must
        still be called after each backward pass but then has nothing left to do. The learning rates used are those at
        the time of the backward pass.

        Returns:
            A handle; its `remove` leaves gradients to `step` again.

        Raises:
            ArgumentError: with ``max_grad_norm`` or ``trainable``, which need all gradients at once.
            RuntimeError: the optimizer has two passes, or another process has part of the gradients (DDP); and, in a
                backward pass, when a parameter gets a second gradient before a step, as in gradient accumulation. A
                GradScaler finds no gradients, and says so.
        """
        return GradientRelease(self)

    def update_one(self, p: Tensor, follow: bool) -> None:
        """Apply the rule to one parameter that has a gradient.

        Args:
            p: the parameter.
            follow: whether groups and state may have been edited since the last update.
        """
        self.average.refuse("a step")
        if follow:
            self.ledger.refresh(self.param_groups, self.state)
            self.ledger.settle()
            if self.ledger.shares:
                raise RuntimeError(
                    "parameters that share memory cannot be updated one by one: leave gradients to step()"
                )
        if (place := self.ledger.place(p)) is None:
            return
        lanes, i = place
        grads: list[Tensor | None] = [None] * len(lanes)
        grads[i] = lanes.gradient(i)
        half = self._prepared(lanes, grads, only=i)
        self._descend(half, Direction())
        if lanes.perturbed is not None:
            lanes.perturbed.release(i)

    def _collect(self) -> Found:
        """All lanes in which a parameter has a gradient, with the gradients."""
        self.average.refuse("a step")
        return self.ledger.collect(self.param_groups, self.state)

    def _sum(self, work: list[Half], measure: Callable[[Segments], Tensor]) -> Tensor:
        """The sum of a pass's measurements over all segments, their shards and other parts, fp64 on the home device."""
        parts = ((half.lanes, measure(half.segments)) for half in work)
        return self.others.sum(sum_over_shards(parts, self.ledger.home))

    def _direction(self, work: list[Half]) -> Direction:
        """How to combine the gradients; unscaling and clipping are added."""
        if self.max_grad_norm is None or not work:
            return Direction()
        if self._has_parameters and not any(isinstance(p, Parameter) for half in work for p in half.lanes.params):
            raise RuntimeError(
                "max_grad_norm: the parameters in the optimizer's groups were replaced by tensors that are none (as "
                "DeepSpeed does), of which this process may have a part: have the wrapper clip (gradient_clipping)"
            )
        norms = ((half.lanes, half.norm_sq()) for half in work)
        return Direction(measured=self.others.sum(sum_over_shards(norms, self.ledger.home)))

    def _allocate(self, lanes: Lanes, fill: bool = True) -> None:
        state_formats.allocate(lanes, self.rule.lanes(lanes.groups[0]), self.master_weights)
        if self.ema_decay is not None:
            average.allocate(lanes, fill)

    def _second_gradients(self, lanes: Lanes, grads: Gradients) -> Gradients | None:
        """The second gradients of `Direction`, if the coming update has them."""
        return None

    def _descend(self, half: Half, direction: Direction) -> None:
        coef, key = self._coefficients(half.lanes, half.active, direction)
        descend(half, self.rule, coef, key, self.stochastic_rounding, keep=direction.combined == "kept")

    def _coefficients(self, lanes: Lanes, active: list[bool], direction: Direction) -> tuple[Tensor, Tensor]:
        """Coefficients and keys of an update, a row per parameter; the step is counted, unless the device skips it."""
        decay = "l2_sp" if "anchor" in lanes.lanes else "weight_decay"
        max_norm = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        rate = 0.0 if self.ema_decay is None else 1 - self.ema_decay
        rows = [
            (
                *(group["lr"], group[decay], -1.0 if group["maximize"] else 1.0),
                *(direction.alpha, max_norm, rate, self.balance.signed(group), *self.rule.hyper(group)),
            )
            for group in lanes.groups
        ]
        # GradScaler gives the number 0 where there was no gradient to check.
        overflow = found if isinstance(found := getattr(self, "found_inf", None), Tensor) else None
        scalars = (direction.measured, getattr(self, "grad_scale", None), direction.other_scale, overflow)
        measured, scale, other_scale, overflow, squares = (
            None if t is None else t.to(lanes.device, non_blocking=True) for t in (*scalars, direction.squares)
        )
        return ops.descend_coefficients(
            self.rule.name,
            direction.combined,
            lanes.numbers("descend", rows),
            lanes.about_members(),
            lanes.steps,
            None if all(active) else lanes.flags(active),
            coefficients.purpose(self.seed, _UPDATE),
            *(measured, scale, other_scale, overflow, squares),
            None if direction.squares is None else self.balance.pairs(lanes),
            compute_dtype(lanes.dtype),
        )

    # -- weights -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def master_weight(self, p: Parameter) -> Tensor:
        """A copy of a parameter's clean weights; with ``master_weights``, the fp32 weights from which p is rounded.

        Raises:
            ArgumentError: p is not a parameter of this optimizer that has been updated.
        """
        if (place := self.ledger.place(p)) is None:
            raise ArgumentError("p", f"a tensor of shape {tuple(p.shape)}", "must be a parameter that is trained")
        lanes, i = place
        return lanes.like_parameter(i, lanes.exact(i))

    @torch.no_grad()
    def trained_weights(self) -> list[Tensor]:
        """Copies of the clean trained weights of each parameter (with a `FishMask`, the selected weights, flat).

        They are fp32 if there are master weights.
        """
        self.ledger.refresh(self.param_groups, self.state)
        return [lanes.exact(i) for lanes in self.ledger for i in range(len(lanes))]

    @torch.no_grad()
    def set_trained_weights(self, weights: Iterable[Tensor]) -> None:
        """Write weights like those of `trained_weights` into parameters and master weights while not perturbed."""
        values = iter(weights)
        for lanes in self.ledger:
            lanes.set_exact([next(values) for _ in range(len(lanes))])

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside the block, the parameters hold the average of the weights; at its end, always the clean weights.

        Use it to evaluate the average, and to save it with the model. The average is rounded to the parameters' type; a
        parameter that was never updated keeps its weights. The block takes the memory of one copy of the weights.
        Inside it, the optimizer cannot take a step, perturb, load a state or be copied.

        Raises:
            RuntimeError: no ``ema_decay`` was given, FSAM's weights are perturbed, or the block is inside another such
                block.
        """
        if self.ema_decay is None:
            raise RuntimeError("ema_weights() needs an optimizer with ema_decay")
        self.average.refuse("ema_weights()")
        if self.perturbed:
            raise RuntimeError("ema_weights() of perturbed weights: call step() or restore() first")
        with torch.no_grad():
            self.ledger.refresh(self.param_groups, self.state)
        with self.average.shown(self.ledger):
            yield

    # -- state ---------------------------------------------------------------------------------------------------------

    @uncompiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as `torch.optim.Optimizer.zero_grad`."""
        zero_grad(self, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state, as `torch.optim.Optimizer.state_dict`."""
        return state_dict(self)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer of this kind, or of torch.optim's of the same rule; values are copied.

        Load the model's own weights first. If the state has no average of the weights, the average starts from them.

        Raises:
            ArgumentError: the state is another optimizer's, or groups or shapes do not fit; nothing has then been
                changed.
            RuntimeError: inside `ema_weights`.
        """
        self.average.refuse("load_state_dict()")
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict.copy()) or state_dict
        groups = checked_groups(state_dict, self.param_groups)
        for group in groups:
            self._check_group(group)
        self.ledger.refresh(self.param_groups, self.state)
        state = checked_state(state_dict, self.param_groups, self.ledger, self.rule, self._unused())
        self.restore()
        for own, new in zip(self.param_groups, groups, strict=True):
            own.update(new)
        self.state.clear()
        self.state.update(state)
        self.anchors.keep(self.param_groups, self.state)
        self.ledger.renew()
        self.ledger.refresh(self.param_groups, self.state)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _unused(self) -> set[str]:
        """The entries of a loaded state that this optimizer does not use."""
        names = {"ema"} if self.ema_decay is None else set()
        return names if self.master_weights else names | {"remainder"}

    @torch.no_grad()
    def float_state_dict(self) -> dict[str, Any]:
        """`state_dict` with the state of ``state_format="8bit"`` as fp32, which torch.optim's optimizers load.

        When loaded again, the codes are the same only to within their rounding; `state_dict` resumes to the bit.
        """
        return with_floats(self.state_dict(), self.param_groups, self.ledger)

    def __getstate__(self) -> dict[str, Any]:
        self.average.refuse("copying or pickling the optimizer")
        self._refuse_copies_while_perturbed()
        own = {name: value for name, value in vars(self).items() if name in self._ARGUMENTS}
        return {**super().__getstate__(), **own}

    # Attributes that a copy takes over as they are.
    _ARGUMENTS = frozenset(
        (
            *("rule", "anchors", "max_grad_norm", "master_weights", "ema_decay", "balance"),
            *("stochastic_rounding", "seed", "others", "trainable"),
        )
    )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Lanes of its own, which are made of the copied state.
        self.average, self.ledger = Average(), self._new_ledger()
