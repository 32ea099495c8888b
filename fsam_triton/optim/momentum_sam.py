"""MomentumSAM: sharpness-aware minimization along the momentum, with one backward pass per step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..buffers.lanes import Lanes
from ..buffers.sharded import sum_over_shards
from ..errors import check, warn
from ..kernels.reference import compute_dtype
from . import coefficients
from . import rho as radii
from .ascent import check_backup_format, move
from .clean import CleanView
from .forward import ForwardWatch
from .optimizer import FusedOptimizer
from .schedule import Schedule
from .uncompiled import uncompiled

_PERTURBATION = 0x6A09E667
# After so many steps without a perturbation nobody can be calling the model as a module.
_FORGOTTEN = 5


class MomentumSAM(FusedOptimizer):
    r"""Momentum-SAM (arXiv 2401.12033), fused with AdamW with L2-SP, or with another rule that has momentum.

    The gradient is taken at ``w - rho * m / (norm(m) + 1e-12)``, where m is the rule's first moment and the norm is
    over all parameters, so a step has one backward pass.

    The parameters are perturbed when a forward pass in training mode begins, and clean again after `step`. Between
    steps, and when training ends, they hold the clean weights, so any code that then reads or writes them works on the
    clean weights. A forward pass in eval mode, or without gradients, sees clean weights at any time, and so does the
    model's ``state_dict()``. If no `step` follows a forward pass in training mode (as for a GAN's discriminator in the
    generator's step, unless it is frozen meanwhile), `restore` or `eval` puts the clean weights back.

    The optimizer notices the forward pass when a module is called, compiled or not. If the model is not made of
    modules, or is called inside a function compiled with ``fullgraph=True``, call `perturb` before it.

    Args:
        params: as for FusedOptimizer.
        lr: learning rate, a float or a tensor of one element (group; default: 1e-3).
        rho: length of the perturbation, >= 0 (group; default: 0.05).
        rule: ``"adamw"``, ``"lion"`` or ``"sgd"``; the last with ``momentum`` > 0 (default: ``"adamw"``).
        schedule: when to perturb and how far; must have ``every=1`` (default: None, always by rho).
        backup_format: as for FSAM.
        **options: the rule's own arguments, and weight_decay, l2_sp, anchors, maximize, balance, balance_by,
            max_grad_norm, master_weights, ema_decay, trainable, stochastic_rounding, flatten and seed, all as for
            `FusedOptimizer`.

    Raises:
        ArgumentError: an argument is out of its range.

    Example:
        >>> import torch
        >>> from fsam_triton import MomentumSAM
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = MomentumSAM(model.parameters(), lr=1e-3, rho=0.05)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1, 4)).square().sum().backward()
        ...     optimizer.step()
        >>> optimizer.perturbed
        False
    """

    _ARGUMENTS = FusedOptimizer._ARGUMENTS | {"_training", "backup_format"}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        rho: float = 0.05,
        rule: str = "adamw",
        schedule: Schedule | None = None,
        backup_format: str | None = None,
        **options: Any,
    ) -> None:
        check_backup_format(backup_format)
        self.backup_format = backup_format
        allowed = "must be None: a stage of a pipeline would wait in its first forward pass for those that follow it"
        check(options.get("norm_group") is None, "norm_group", options.get("norm_group"), allowed)
        self._training = True
        self._watch = ForwardWatch(self, MomentumSAM._before_forward)
        super().__init__(params, rule, lr, _of_group=radii.group_defaults(rho, schedule), **options)
        self._begin()

    def _begin(self) -> None:
        self._unperturbed_steps, self._was_perturbed = 0, False
        self.clean_view: CleanView = CleanView()
        self.clean_view.find(p for group in self.param_groups for p in group["params"])
        self._expect()
        if self._training:
            self._watch.start()

    def _expect(self) -> None:
        self._watch.expect(self.param_groups)
        self._expected = self.ledger.generation

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group`."""
        super().add_param_group(param_group)
        radii.join(self.param_groups[-1], self.param_groups[0])
        self._expect()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as `FusedOptimizer.load_state_dict` does."""
        super().load_state_dict(state_dict)
        # The parameters may have been replaced since the optimizer was made, and have a momentum now.
        self._expect()

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        radii.check_group(group)
        every = group["schedule"]["every"]
        check(every == 1, "schedule.every", every, "must be 1: the perturbation costs no backward pass to leave out")
        check(bool(self.rule.lanes(group)), "momentum", group.get("momentum"), "must be > 0")

    @property
    def schedule(self) -> Schedule:
        """The schedule in the parameter groups, where a loaded state dict can have changed it."""
        return radii.schedule_of(self.param_groups)

    @uncompiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the clean weights with the gradients computed at the perturbed weights.

        Args:
            closure: evaluates the model again and returns the loss, as in torch.optim; called once.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: the optimizer is in eval mode, or inside `ema_weights`.
        """
        if not self._training:
            raise RuntimeError("step() in eval mode: call optimizer.train() before the forward pass")
        # Not by way of the inherited step, around which torch.optim would call the hooks of a step once more.
        loss = None
        try:
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._warn_if_forgotten()
            self._update()
        except BaseException:
            self.restore()
            raise
        self.clean_view.close()
        self._watch.start()
        if self.ledger.generation != self._expected:
            self._expect()
        radii.count(self.param_groups)
        return loss

    def _warn_if_forgotten(self) -> None:
        wanted = not self._was_perturbed and self._wants_perturbation()
        if wanted:
            self.ledger.refresh(self.param_groups, self.state)
            self.clean_view.check_seen(self.ledger, self.param_groups)
        if not wanted or not any(map(self._directions, self.ledger)):
            self._unperturbed_steps, self._was_perturbed = 0, False
            return
        self._unperturbed_steps += 1
        if self._unperturbed_steps == _FORGOTTEN:
            warn(
                f"MomentumSAM has taken {_FORGOTTEN} steps at clean weights: it perturbs when a module with its "
                "parameters is called in training mode; call perturb() before the forward pass"
            )

    def _wants_perturbation(self) -> bool:
        return radii.is_sharp(self.param_groups) and any(group["rho"] > 0 for group in self.param_groups)

    # -- the perturbation ----------------------------------------------------------------------------------------------

    def _directions(self, lanes: Lanes) -> list[Tensor | None]:
        """The momentum of each parameter that is trained and has one; an empty list if there is none."""
        name = self.rule.lanes(lanes.groups[0])[0]
        if name not in lanes.lanes:
            return []
        views = lanes.views(name)
        out = [views[i] if p.requires_grad and self.state.get(p) else None for i, p in enumerate(lanes.params)]
        return out if any(view is not None for view in out) else []

    def _scale(self, lanes: Lanes) -> Tensor | None:
        """The scale of the momentum's codes, if it is kept in codes."""
        return lanes.lanes.get(f"{self.rule.lanes(lanes.groups[0])[0]}_scale")

    @uncompiled
    def perturb(self) -> None:
        """Perturb the parameters by hand, for the forward passes until `step`; does nothing if they are perturbed.

        Until `step` or `restore`, forward passes are not watched: even in eval mode they see perturbed weights.

        Raises:
            RuntimeError: the optimizer is in eval mode, or inside `ema_weights`.
        """
        self.average.refuse("perturb()")
        if not self._training:
            raise RuntimeError("perturb() in eval mode: call optimizer.train() before")
        self._watch.stop()
        self._perturb()

    @torch.no_grad()
    def _perturb(self) -> None:
        if self.perturbed or not self._wants_perturbation():
            return
        self.ledger.refresh(self.param_groups, self.state)
        work = [
            (lanes, lanes.segments(own, half="ascent")) for lanes in self.ledger if (own := self._directions(lanes))
        ]
        if not work:
            return
        norms = ((lanes, ops.norm_sq(segments, False, None, self._scale(lanes))) for lanes, segments in work)
        norm_sq = sum_over_shards(norms, self.ledger.home).double()
        schedule = self.schedule
        for lanes, segments in work:
            if self.ledger.shares:
                lanes.stage()
            rows = lanes.numbers("ascent", [(-radii.rho_of(group, schedule), 0.0) for group in lanes.groups])
            purpose, dtype = coefficients.purpose(self.seed, _PERTURBATION), compute_dtype(lanes.dtype)
            own_norm_sq = norm_sq.to(lanes.device, non_blocking=True)
            about = lanes.about_members()
            coef, keys = ops.climb_coefficients(rows, about, lanes.steps, purpose, own_norm_sq, None, dtype)
            move(
                *(lanes, segments, coef, keys),
                stochastic=self.stochastic_rounding,
                backup_format=self.backup_format,
                scale=self._scale(lanes),
            )
        self.ledger.seal()
        self._was_perturbed = True
        self.clean_view.open(self.ledger)

    @staticmethod
    def _before_forward(optimizer: MomentumSAM, module: nn.Module, will_train: bool) -> Callable[[], None] | None:
        if optimizer.average.is_shown or not (will_train or optimizer.perturbed):
            return None
        with torch.inference_mode(False):
            if not will_train:
                return optimizer._step_aside()
            optimizer.clean_view.learn(module)
            optimizer._perturb()
        return None

    def _step_aside(self) -> Callable[[], None]:
        """Put back the clean weights for a while; the returned function perturbs them again, to the same bits.

        A graph that autograd has recorded before stays valid.
        """
        perturbed = [(lanes, lanes.versions()) for lanes in self.ledger if lanes.perturbed is not None]
        self.restore()
        clean = [lanes.versions() for lanes, _ in perturbed]

        def put_back() -> None:
            unwritten = [lanes.versions() for lanes, _ in perturbed] == clean
            with torch.inference_mode(False):
                self._perturb()
            for lanes, versions in perturbed:
                if unwritten and lanes.perturbed is not None:
                    lanes.perturbed.rewind(versions)

        return put_back

    def train(self) -> None:
        """Perturb from the next forward pass on, as after the optimizer was created."""
        self._training = True
        self._watch.start()

    def eval(self) -> None:
        """Put the clean weights into the parameters, and leave them there in all forward passes until `train`."""
        self._training = False
        self._watch.stop()
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Put back the clean weights, to the bit, if the parameters are perturbed."""
        super().restore()
        self.clean_view.close()
        if self._training:
            self._watch.start()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch = ForwardWatch(self, MomentumSAM._before_forward)
        self._begin()
