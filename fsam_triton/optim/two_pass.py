"""TwoPass: the protocol of a sharpness-aware step: climb to w + eps, compute the gradient there, descend from w."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.nn import Parameter

from ..batches.samples import first_samples, select_samples
from ..buffers.entries import State
from ..buffers.ledger import Found
from ..buffers.members import name_of
from ..errors import check, warn
from ..masks.perturbed import FisherMask
from . import rho
from .ascent import Ascent
from .clean import CleanView
from .perturbable import Perturbable
from .schedule import Schedule
from .uncompiled import uncompiled

# After so many steps that were to be sharpness-aware and were not, somebody must have forgotten the ascent.
_FORGOTTEN = 5


class TwoPass(Perturbable):
    """The protocol shared by `FSAM` and `SAM`, which have the attributes below and implement the descent.

    Attributes:
        gamma: ESAM's fraction of the batch for the second gradient.
        ascent_fraction: the fraction of the batch for the first gradient.
        splits_batches: whether other code (Lightning's callback) takes that part of the batch.
    """

    ascent: Ascent
    clean_view: CleanView
    gamma: float
    ascent_fraction: float
    splits_batches: bool = False
    _step_supports_amp_scaling: bool
    _unperturbed_steps = 0
    # Gradients that have no part in the ascent.
    _carried: dict[Parameter, Tensor]

    # -- what the two provide ------------------------------------------------------------------------------------------

    def _descend_all(self) -> None:
        """Restore, if perturbed, and update."""
        raise NotImplementedError

    def _check_idle(self) -> None:
        """Raise a RuntimeError if no step may begin now."""

    def _keep_first_gradients(self, found: Found) -> None:
        """Keep the gradients of the ascent, which are cleared next, if the descent needs them."""

    @property
    def _shown(self) -> State:
        """The state in which the lanes are shown."""
        return self.state

    @property
    def _combines(self) -> bool:
        """Whether the descent needs all of the first gradient."""
        return False

    def _set_parts(self, gamma: float, ascent_fraction: float) -> None:
        """Note the parts of the batch for both gradients."""
        check(0 < gamma <= 1, "gamma", gamma, "must be in (0, 1]")
        check(0 < ascent_fraction <= 1, "ascent_fraction", ascent_fraction, "must be in (0, 1]")
        whole = gamma == 1 or ascent_fraction == 1
        check(whole, "ascent_fraction", ascent_fraction, "must be 1 with gamma < 1, which needs the losses of all")
        self.gamma, self.ascent_fraction = gamma, ascent_fraction

    # -- the protocol --------------------------------------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule:
        """The schedule in the parameter groups, where a loaded state dict can have changed it."""
        return rho.schedule_of(self.param_groups)

    @property
    def is_sharp(self) -> bool:
        """Whether the schedule wants the coming step to be sharpness-aware."""
        return rho.is_sharp(self.param_groups)

    @uncompiled
    @torch.no_grad()
    def step(self, closure: Callable[..., Any] | None = None, batch: Any = None) -> Any:
        """Take a step: with a closure, the ascent and the descent; without one, only the descent after `perturb`.

        Args:
            closure: without a batch: it zeroes the gradients, evaluates the model, calls backward (for each
                micro-batch, if gradients are accumulated) and returns the loss. It is called at the weights and, if the
                schedule says so, again at the perturbed weights (only there if `perturb` was called before). Existing
                gradients count only if it does not zero them. With a batch: ``closure(batch)`` evaluates the model on a
                batch, which may be a part of the one given, and returns its per-sample losses, [n]; zeroing, mean and
                backward are done here. If it raises, the clean weights are put back.
            batch: the closure's argument: tensors, dicts of tensors as in transformers, or any nesting (see
                `select_samples`).

        Returns:
            The loss, or the losses [n], at the clean weights (with ``ascent_fraction < 1``, those of that part of the
            batch); None without a closure.

        Raises:
            ArgumentError: gamma or ascent_fraction < 1 and no batch was given.
            RuntimeError: a GradScaler is in use and a closure was given; or the closure returned a loss without
                computing gradients.
        """
        self._check_under_scaler(closure)
        if closure is None:
            self._finish()
            return None
        can_split = batch is not None or self.splits_batches
        for name, part in (("gamma", self.gamma), ("ascent_fraction", self.ascent_fraction)):
            check(part == 1 or can_split, name, part, "must be 1 without a batch: step(closure, batch)")
        loss = None
        try:
            perturbed = self.perturbed
            with contextlib.nullcontext() if perturbed else self.ascent_pass():
                in_part = batch is not None and self.ascent_fraction < 1 and self.is_sharp and not perturbed
                loss = self._evaluate(closure, first_samples(batch, self.ascent_fraction) if in_part else batch)
            if not perturbed and self.is_sharp and (found := self._collect_first()):
                self._ascend(found)
                if self.gamma < 1:
                    batch = select_samples(batch, loss, closure(batch), self.gamma)
                self._evaluate(closure, batch)
                if loss is None and all(p.grad is None for group in self.param_groups for p in group["params"]):
                    raise RuntimeError("the closure left no gradients at w + eps: it must call backward() each time")
        except BaseException:
            self.restore()
            raise
        self._finish()
        return loss

    def _finish(self) -> None:
        if self._carried:
            raise RuntimeError("carry_gradients() without perturb(): zero_grad() drops the gradients set aside")
        self._warn_if_forgotten()
        try:
            self._descend_all()
        except BaseException:
            self.restore()
            raise
        finally:
            self.clean_view.close()
        rho.count(self.param_groups)

    def _warn_if_forgotten(self) -> None:
        wanted = self.is_sharp and any(group["rho"] > 0 for group in self.param_groups)
        if not wanted or self.perturbed:
            self._unperturbed_steps = -1 if self.perturbed else self._unperturbed_steps
            return
        self.ledger.refresh(self.param_groups, self._shown, with_state=False)
        self.clean_view.check_seen(self.ledger, self.param_groups)
        if self._unperturbed_steps >= 0:
            self._unperturbed_steps += 1
        if self._unperturbed_steps == _FORGOTTEN:
            warn(
                f"{type(self).__name__} has taken {_FORGOTTEN} steps and none was sharpness-aware: they are plain "
                "updates without perturb() and a second backward() before step(), or step(closure), or SAMTrainer"
            )

    def _check_under_scaler(self, closure: Callable[..., Any] | None) -> None:
        if getattr(self, "found_inf", None) is not None and closure is not None:
            raise RuntimeError(
                "GradScaler.step(optimizer, closure) checks no gradients: call backward(), perturb(scaler), backward() "
                "and scaler.step(optimizer) instead"
            )

    def _evaluate(self, closure: Callable[..., Any], batch: Any) -> Any:
        with torch.enable_grad():
            if batch is None:
                before = self._gradients()
                loss = closure()
                if loss is not None and not self._have_changed(before):
                    raise RuntimeError("the closure has computed no gradients: it must call backward() each time")
                return loss
            self.zero_grad()
            losses = closure(batch)
            losses.mean().backward()
        return losses.detach()

    def _gradients(self) -> list[tuple[weakref.ref[Tensor], int] | None]:
        """A record that shows whether gradients have been computed since, without keeping the present ones alive."""
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        return [None if grad is None else (weakref.ref(grad), grad._version) for grad in grads]

    def _have_changed(self, before: list[tuple[weakref.ref[Tensor], int] | None]) -> bool:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        return any(
            grad is not None and (then is None or then[0]() is not grad or then[1] != grad._version)
            for grad, then in zip(grads, before, strict=True)
        )

    def _collect_first(self) -> Found:
        """The lanes with the gradients of the first pass."""
        self._check_idle()
        found = self.ledger.collect(self.param_groups, self._shown, with_state=self.ascent.reads_state)
        self.clean_view.check_seen(self.ledger, self.param_groups)
        return found

    @uncompiled
    @torch.no_grad()
    def perturb(self, scaler: GradScaler | None = None) -> None:
        """Climb: w -> w + eps(w) along the existing gradients, which are then cleared. The schedule only sets rho.

        Until `step` or `restore`, the model's `state_dict()` shows clean weights.

        Args:
            scaler: the GradScaler by which the gradients are scaled. eps is computed from the unscaled gradients; if
                they overflowed, eps is zero, and a mask that is due waits for the next ascent (default: None).

        Raises:
            RuntimeError: the parameters are already perturbed, or none has a gradient, or the scaler has unscaled the
                gradients.
        """
        if self.perturbed:
            raise RuntimeError("perturb() was called twice: call step() or restore() in between")
        if scaler is not None and self._is_unscaled_by(scaler):
            raise RuntimeError("unscale_() before perturb(scaler): call it, if at all, after the second backward()")
        found = self._collect_first()
        if not found:
            raise RuntimeError("perturb() needs gradients: call backward() first")
        # Not get_scale(), which waits for the device.
        scale = None if scaler is None else scaler.scale(torch.ones((), dtype=torch.float32, device=self.ledger.home))
        try:
            self._ascend(found, scale)
            # Until the step anybody may save the model; within step(closure) only the closure could.
            self.clean_view.open(self.ledger)
        except BaseException:
            self.restore()
            raise

    def _ascend(self, found: Found, scale: Tensor | None = None) -> None:
        schedule = self.schedule
        radii = {
            id(group): (-1.0 if group.get("maximize") else 1.0) * rho.rho_of(group, schedule)
            for group in self.param_groups
        }
        self.ascent.climb(self.ledger, found, self.param_groups, radii, scale)
        self._keep_first_gradients(found)
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = self._carried.get(p)
        self._carried.clear()

    def carry_gradients(self) -> None:
        """Keep the existing gradients out of the coming ascent: the update will descend with them, too.

        Use this for a loss of two terms, only one of which is to be flat, such as unlearning that is to last (arXiv
        2502.05374). The gradient of the other term, at the weights, is set aside here. `perturb` climbs along the
        gradient that comes after it, and then puts the gradient set aside into ``p.grad``, to which the second backward
        pass adds. In a step that is not sharpness-aware this method does nothing, because backward passes add up
        anyway.

        Example:
            >>> import torch
            >>> from fsam_triton import FSAM
            >>> model = torch.nn.Linear(4, 2)
            >>> optimizer = FSAM(model.parameters(), lr=1e-3)
            >>> def retain():
            ...     return model(torch.ones(1, 4)).square().sum()
            >>> def forget():
            ...     return model(-torch.ones(1, 4)).square().sum()
            >>> for _ in range(2):
            ...     optimizer.zero_grad()
            ...     retain().backward()
            ...     optimizer.carry_gradients()
            ...     forget().backward()
            ...     if optimizer.is_sharp:
            ...         optimizer.perturb()
            ...         forget().backward()
            ...     optimizer.step()

        Raises:
            RuntimeError: the parameters are already perturbed, or gradients have already been set aside.
        """
        if self.perturbed or self._carried:
            raise RuntimeError("carry_gradients() is for the gradients before perturb(), once per step")
        if not self.is_sharp:
            return
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._carried[p] = p.grad
                    p.grad = None

    @uncompiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as `torch.optim.Optimizer.zero_grad`, and those that `carry_gradients` has set aside."""
        self._carried.clear()
        super().zero_grad(set_to_none)

    def _is_unscaled_by(self, scaler: GradScaler) -> bool:
        # A scaler that is switched off has no such attribute.
        state = getattr(scaler, "_per_optimizer_states", {}).get(id(self), {})
        return state.get("stage") is OptState.UNSCALED

    @contextlib.contextmanager
    def ascent_pass(self) -> Iterator[None]:
        """Use around the first forward and backward pass: skips weight gradients that the perturbation does not need.

        These are the gradients of tensors that are not drawn (``beta_per="tensor"``), and of the unselected tensors of
        a ``FisherMask(unit="tensor")`` with ``mask_norm="masked"`` between two selections. Their ``requires_grad`` is
        off inside the block. Nothing is skipped as long as none of the other tensors has ever been updated, because the
        loss might not depend on them. `step` with a closure does this by itself.
        """
        frozen: list[Parameter] = []
        if self.is_sharp and not self.perturbed:
            known = [p for lanes in self.ledger for p in lanes.params if self.state.get(p)]
            out = self.ascent.unneeded(self.ledger, self.param_groups[0]["ascents"], self._combines, known)
            frozen = [p for p in out if p.requires_grad]
        for p in frozen:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in frozen:
                p.requires_grad_(True)

    @contextlib.contextmanager
    def perturbed_weights(self) -> Iterator[None]:
        """Perturb inside the block along the existing gradients, which are cleared; restore at its end in any case."""
        self.perturb()
        try:
            yield
        finally:
            self.restore()

    def first_step(self, zero_grad: bool = False) -> None:
        """`perturb`, under the name that other SAM optimizers use. Gradients are cleared either way."""
        self.perturb()

    def second_step(self, zero_grad: bool = False) -> None:
        """`step`, under the name that other SAM optimizers use, and `zero_grad` if asked for."""
        self.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def restore(self) -> None:
        """Put back the clean weights, to the bit, if the parameters are perturbed."""
        super().restore()
        self.clean_view.close()

    # -- masks ---------------------------------------------------------------------------------------------------------

    @property
    def mask(self) -> FisherMask | None:
        """The `FisherMask`, or None."""
        return self.ascent.mask

    @torch.no_grad()
    def mask_of(self, p: Tensor) -> Tensor:
        """The weights of a parameter that `perturb` moves, apart from beta's random choice.

        Args:
            p: one of the optimizer's parameters.

        Returns:
            A bool tensor in the parameter's shape. Before the first perturbation, a `FisherMask` has selected nothing.

        Raises:
            ArgumentError: p is not a parameter of this optimizer.
        """
        self.ledger.refresh(self.param_groups, self._shown)
        if (place := self.ledger.place(p)) is not None:
            return self.ascent.mask_of(*place)
        known = any(p is own for group in self.param_groups for own in group["params"])
        check(known, "p", f"a tensor of shape {tuple(p.shape)}", "must be a parameter of this optimizer")
        # It is not trained.
        return torch.zeros_like(p, dtype=torch.bool)

    @torch.no_grad()
    def mask_density(self) -> dict[str, float]:
        """The share of each parameter that `perturb` moves under the mask; waits for the device.

        Returns:
            For each parameter, by name or, if the optimizer was given no names, by position over all groups as a
            string, the fraction of its weights: 1.0 or 0.0 for a parameter that the mask does not select from, 0.0 for
            a frozen parameter, and 0.0 for any other before the first perturbation.

        Raises:
            RuntimeError: the optimizer has no mask.
        """
        if self.mask is None:
            raise RuntimeError("mask_density() needs an optimizer with a FisherMask")
        self.ledger.refresh(self.param_groups, self._shown)
        density = self.ascent.density(self.ledger)
        out: dict[str, float] = {}
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                # One that has no lanes is frozen.
                out[name_of(group, i) or str(len(out))] = density.get(p, 0.0)
        return out
