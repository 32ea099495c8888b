"""FSAM: sharpness-aware minimization with two backward passes (SAM, ASAM, ESAM, GSAM, LookSAM; masked), fused."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.nn import Parameter

from . import coefficients, ops, recipes
from .adamw_l2sp import Direction
from .ascent import Ascent
from .buffers import Bucket
from .errors import check
from .fish import FishMask
from .kernels.reference import compute_dtype
from .masks import FisherMask
from .samples import select_samples
from .schedule import Schedule
from .sharded import is_sharded


class FSAM(Ascent):
    r"""Sharpness-aware minimization with AdamW and L2-SP as its base, fused.

    A step climbs to ``w + eps``, takes the gradient there, and descends with it from ``w``:

    - SAM (arXiv 2010.01412): ``eps = rho * g / (norm(g) + 1e-12)``
    - ASAM (``adaptive=True``, arXiv 2102.11600): ``eps = rho * w^2 * g / (norm(abs(w) * g) + 1e-12)``
    - Fisher-SAM (``mask=FisherMask(...)``, arXiv 2210.05497): that eps on the mask and 0 elsewhere
    - ESAM (``beta < 1``, ``gamma < 1``, arXiv 2110.03141): that eps over beta on a random part of the weights or
      tensors; the second gradient from the samples whose loss rose most
    - GSAM (``alpha > 0``, arXiv 2203.08065): descends with ``g2 - alpha * (g1 - (<g1, g2> / norm(g2)^2) * g2)``, where
      g1 and g2 are the gradients at w and at w + eps
    - LookSAM (``schedule=Schedule(every=5, reuse=0.7)``, arXiv 2203.02714)

    Norms are over all parameter groups. `step` without a perturbation before it is plain AdamWL2SP, and so is a step
    whose ascent gradient is zero or not finite, or whose rho is zero.

    Args:
        params: as AdamWL2SP; a `FisherMask` wants ``model.named_parameters()``.
        lr: as AdamWL2SP (group; default: 1e-3).
        rho: radius of the perturbation, >= 0 (group; default: 0.05).
        adaptive: ASAM's scaling (group; default: False).
        mask: which weights to perturb (default: None, all).
        mask_norm: ``"all"``: norm over all coordinates, as published; ``"masked"``: over the perturbed ones, which
            makes eps as long as rho (default: ``"all"``).
        alpha: GSAM's weight of the surrogate gap, >= 0; needs memory for a second gradient (default: 0.0).
        beta: ESAM's part of the weights, drawn anew for each perturbation, in (0, 1]; rounded to a multiple of 2**-15
            (default: 1.0).
        beta_per: what beta draws: ``"element"``, every weight by itself, or ``"tensor"``, whole tensors, at least one,
            as the published code does. Gradients of the others are then not used in the ascent, and `ascent_pass` does
            not compute them (default: ``"element"``).
        gamma: ESAM's part of the batch for the second gradient, in (0, 1]; < 1 needs ``step(closure, batch)``, or
            `select_samples` in a loop of your own (default: 1.0).
        schedule: which steps are sharpness-aware, and with which rho (default: None, all of them with rho).
        **adamwl2sp: every other argument of AdamWL2SP.

    Raises:
        ValueError: an argument is out of its range, or contradicts another.

    Example:
        >>> import torch
        >>> from fsam_triton import FSAM
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = FSAM(model.parameters(), lr=1e-3, rho=0.05)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(1, 4)).square().sum()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """

    _ARGUMENTS = (*Ascent._ARGUMENTS, "mask", "mask_norm", "alpha", "beta", "beta_per", "gamma")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        mask: FisherMask | None = None,
        mask_norm: str = "all",
        alpha: float = 0.0,
        beta: float = 1.0,
        beta_per: str = "element",
        gamma: float = 1.0,
        schedule: Schedule | None = None,
        **adamwl2sp: Any,
    ) -> None:
        check(mask is None or isinstance(mask, FisherMask), "mask", mask, "must be a FisherMask or None")
        check(mask_norm in ("all", "masked"), "mask_norm", mask_norm, 'must be "all" or "masked"')
        check(0 <= alpha < float("inf"), "alpha", alpha, "must be >= 0 and finite")
        check(0 < beta <= 1, "beta", beta, "must be in (0, 1]")
        check(beta_per in ("element", "tensor"), "beta_per", beta_per, 'must be "element" or "tensor"')
        check(0 < gamma <= 1, "gamma", gamma, "must be in (0, 1]")
        self.mask = mask
        self.mask_norm = mask_norm
        self.alpha, self.beta, self.beta_per, self.gamma = alpha, beta, beta_per, gamma
        super().__init__(
            params,
            lr,
            rho=rho,
            schedule=schedule,
            _group_defaults={"adaptive": adaptive, "ascents": 0},
            **adamwl2sp,
        )
        if mask is not None:
            mask.count(self._selectable())
            self.mask = mask._used_by(self)

    @classmethod
    def from_sam_type(cls, sam_type: str, params: Iterable[Any], lr: float | Tensor = 1e-3, **arguments: Any) -> FSAM:
        """An optimizer by the names of the FSAM code (github.com/WHU-ZQH/FSAM4PLM), for its recipes.

        Args:
            sam_type: ``"sam"``, ``"esam"``, ``"gsam"``, ``"fisher-sam"``, ``"fisher-esam"`` or ``"fisher-gsam"``.
            params: as FSAM; the fisher types want ``model.named_parameters()``.
            lr: as FSAM.
            **arguments: the FSAM code's, see `fsam_triton.recipes.arguments_of`, and any other of FSAM's.

        Raises:
            ValueError: sam_type is unknown, an argument is out of its range or has no meaning for this type.

        Example:
            >>> import torch
            >>> from fsam_triton import FSAM
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
            >>> optimizer = FSAM.from_sam_type(
            ...     "fisher-gsam", model.named_parameters(), lr=1e-5, rho=0.05, mask_iter_e=100, keep_ratio=0.1
            ... )
        """
        return cls(params, lr, **recipes.arguments_of(sam_type, **arguments))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as AdamWL2SP."""
        super().add_param_group(param_group)
        self.param_groups[-1]["ascents"] = self.param_groups[0]["ascents"]

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        # Here, because a loaded state dict brings a schedule too.
        alpha, reuses = self.alpha, group["schedule"]["reuse"] > 0
        check(alpha == 0 or not reuses, "alpha", alpha, "must be 0 with Schedule(reuse=...): both combine gradients")
        whole = self.beta_per == "element" or (alpha == 0 and not reuses)
        allowed = 'must be "element" with alpha or Schedule(reuse=...): they need all of g1'
        check(whole, "beta_per", self.beta_per, allowed)

    def _check_trainable(self, trainable: FishMask | None) -> None:
        super()._check_trainable(trainable)
        allowed = "must be None with trainable: what is perturbed is what is trained"
        check(self.mask is None or trainable is None, "mask", self.mask, allowed)

    def _check_parameters(self, group: dict[str, Any]) -> None:
        super()._check_parameters(group)
        single = self.mask is None or self.mask.unit == "element" or not any(map(is_sharded, group["params"]))
        check(single, "mask.unit", single or self.mask.unit, 'must be "element" with sharded parameters')

    # -- the protocol --------------------------------------------------------------------------------------------------

    @property
    def is_sharp(self) -> bool:
        """Whether the schedule wants the coming step to be sharpness-aware."""
        return self.schedule.is_sharp(self.param_groups[0]["updates"])

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[..., Any] | None = None, batch: Any = None) -> Any:
        """Descend, with a closure after an ascent: the whole step; without one: the second half after `perturb`.

        Args:
            closure: without a batch: zeroes the gradients, evaluates the model, calls backward (for each micro-batch,
                if gradients are accumulated) and returns the loss. It is called at the weights and, where the schedule
                says so, again at the perturbed weights (only there if `perturb` was called before). With a batch:
                ``closure(batch)`` evaluates the model on a batch, which may be a part of the one given, and returns the
                losses of its samples, [n]; zeroing, mean and backward are done here. If it raises, the clean weights
                are put back.
            batch: what the closure is called with: tensors, dicts of tensors as transformers makes them, or any nesting
                (see `select_samples`).

        Returns:
            The loss, or the losses [n], at the clean weights; None without a closure.

        Raises:
            ValueError: gamma < 1 and no batch was given.
            RuntimeError: a GradScaler is in use and a closure was given; or the closure does not call backward.
        """
        self._check_under_scaler(closure)
        if closure is None:
            self._update()
            return None
        check(
            batch is not None or self.gamma == 1, "gamma", self.gamma, "must be 1 without a batch: step(closure, batch)"
        )
        loss = None
        try:
            perturbed = self.perturbed
            with contextlib.nullcontext() if perturbed else self.ascent_pass():
                loss = self._evaluate(closure, batch)
            if not perturbed and self.is_sharp and (collected := self._collect()):
                self._ascend(collected)
                if self.gamma < 1:
                    batch = select_samples(batch, loss, closure(batch), self.gamma)
                self._evaluate(closure, batch)
                if loss is None and all(p.grad is None for p in self._places):
                    raise RuntimeError("the closure left no gradients at w + eps: it must call backward() each time")
        except BaseException:
            self.restore()
            raise
        self._update()
        return loss

    def _check_under_scaler(self, closure: Callable[..., Any] | None) -> None:
        """Refuse or warn of what would go unnoticed where it is GradScaler.step that calls `step`."""
        if getattr(self, "found_inf", None) is None:
            return
        if closure is not None:
            raise RuntimeError(
                "GradScaler.step(optimizer, closure) checks no gradients: call backward(), perturb(scaler), backward() "
                "and scaler.step(optimizer) instead"
            )
        if self.is_sharp and not self.perturbed and self.param_groups[0]["ascents"] == 0:
            warnings.warn("a step under a GradScaler without perturb(scaler) before it is plain AdamW", stacklevel=3)

    def _evaluate(self, closure: Callable[..., Any], batch: Any) -> Any:
        with torch.enable_grad():
            if batch is None:
                return closure()
            self.zero_grad()
            losses = closure(batch)
            losses.mean().backward()
        return losses.detach()

    @torch._disable_dynamo
    @torch.no_grad()
    def perturb(self, scaler: GradScaler | None = None) -> None:
        """Climb: w -> w + eps(w) from the gradients there are, which are cleared. The schedule decides on rho alone.

        Args:
            scaler: the GradScaler by which the gradients are scaled. eps is that of the unscaled gradients; if they
                overflowed it is zero, and a mask that is due waits for the next ascent (default: None).

        Raises:
            RuntimeError: the parameters are perturbed already, or none has a gradient, or the scaler has unscaled them.
        """
        if self.perturbed:
            raise RuntimeError("perturb() was called twice: call step() or restore() in between")
        if scaler is not None and self._is_unscaled_by(scaler):
            raise RuntimeError("unscale_() before perturb(scaler): call it, if at all, after the second backward()")
        collected = self._collect()
        if not collected:
            raise RuntimeError("perturb() needs gradients: call backward() first")
        # Until the step anybody may save the model; within step(closure) only the closure could.
        self._show_clean()
        # Not get_scale(), which waits for the device.
        scale = None if scaler is None else scaler.scale(torch.ones((), device=self._buckets[0].device))
        try:
            self._ascend(collected, scale)
        except BaseException:
            self.restore()
            raise

    def _is_unscaled_by(self, scaler: GradScaler) -> bool:
        # A scaler that is switched off has no such attribute.
        state = getattr(scaler, "_per_optimizer_states", {}).get(id(self), {})
        return state.get("stage") is OptState.UNSCALED

    @contextlib.contextmanager
    def ascent_pass(self) -> Iterator[None]:
        """Around the first forward and backward pass: leaves out weight gradients that the perturbation does not need.

        Those are of the tensors that are not drawn (``beta_per="tensor"``), and of the unselected tensors of a
        ``FisherMask(unit="tensor")`` with ``mask_norm="masked"`` between two choices. Their ``requires_grad`` is off
        inside. Nothing is left out as long as none of the other tensors was ever updated: the loss might not depend on
        them. `step` with a closure does it by itself.
        """
        frozen = [p for p in self._unneeded() if p.requires_grad] if self.is_sharp and not self.perturbed else []
        for p in frozen:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in frozen:
                p.requires_grad_(True)

    @contextlib.contextmanager
    def perturbed_weights(self) -> Iterator[None]:
        """Perturb inside the block from the gradients there are (which are cleared), restore at its end in any case."""
        self.perturb()
        try:
            yield
        finally:
            self.restore()

    def first_step(self, zero_grad: bool = False) -> None:
        """`perturb`, by the name other SAM optimizers have for it. Gradients are cleared either way."""
        self.perturb()

    def second_step(self, zero_grad: bool = False) -> None:
        """`step`, by the name other SAM optimizers have for it, and `zero_grad` if asked."""
        self.step()
        if zero_grad:
            self.zero_grad()

    # -- the descent ---------------------------------------------------------------------------------------------------

    def _allocate(self, collected: list[tuple[Bucket, tuple[bool, ...]]]) -> None:
        super()._allocate(collected)
        for bucket, _ in collected:
            # torch.distributed.checkpoint loads those entries alone that a new optimizer's state has.
            if is_sharded(bucket.params[0]):
                if self.mask is not None and bucket.selectable:
                    bucket.lane("mask", torch.int32)
                    if self._adds_up:
                        bucket.lane("fisher", compute_dtype(bucket.dtype))
                if self.schedule.reuse > 0:
                    bucket.orthogonal()

    def _update(self) -> None:
        try:
            super()._update()
        except BaseException:
            self.restore()
            raise

    def _direction(self, collected: list[tuple[Bucket, tuple[bool, ...]]]) -> Direction:
        """SAM's direction is the gradient; GSAM and LookSAM combine it with one of before."""
        reuse = self.schedule.reuse
        combines = self.perturbed and (self.alpha > 0 or reuse > 0)
        if not collected or not (combines or (reuse > 0 and any("orthogonal" in b.lanes for b, _ in collected))):
            return super()._direction(collected)
        # Over the parameters that are updated: what the others' gradients were at w has no part in this step.
        dots = self._sum(
            (bucket, ops.surrogate_gap(bucket.ascent_grad[start:stop], bucket.grad[start:stop]))
            for bucket, active in collected
            for start, stop in bucket.stretches(active)
        )
        if self.alpha > 0:
            ratio = self._ascent_ratio()
            own, other, norm_sq = coefficients.decomposition(dots, self.alpha, ratio)
            return self._scaled(Direction(own, other), norm_sq)
        if not self.perturbed:
            other, norm_sq = coefficients.reuse(dots, reuse)
            return self._scaled(Direction(1.0, other), norm_sq)
        updated = {id(bucket): active for bucket, active in collected}
        for bucket in self._buckets:
            bucket.drop_ascent_grads(updated.get(id(bucket)))
        return self._scaled(Direction(1.0, coefficients.orthogonal_part(dots), keep=True), dots[2])

    def _ascent_ratio(self) -> Tensor | float:
        """What the gradients of the ascent are to be multiplied with, to have the scale of those at hand."""
        scale = getattr(self, "grad_scale", None)
        if self._ascent_scale is not None:
            return (1.0 if scale is None else scale.to(torch.float64)) / self._ascent_scale.to(torch.float64)
        if scale is None and getattr(self, "found_inf", None) is not None:
            raise RuntimeError(
                "alpha > 0 combines the gradients of both passes, and GradScaler.unscale_() has unscaled only one of "
                "them: call perturb(scaler)"
            )
        return 1.0

    # -- what others may look at ---------------------------------------------------------------------------------------

    def mask_of(self, p: Tensor) -> Tensor:
        """What `perturb` moves of a parameter, apart from what beta draws.

        Args:
            p: one of the optimizer's parameters.

        Returns:
            bool tensor in the parameter's shape. Before the first perturbation a `FisherMask` has chosen nothing.

        Raises:
            ValueError: p is not a parameter of this optimizer.
        """
        bucket, i = self._places.get(p, (None, 0))
        shape = tuple(p.shape)
        check(bucket is not None, "p", f"a tensor of shape {shape}", "must be a parameter of this optimizer")
        if self.mask is None or not bucket.selectable:
            return torch.full_like(p, self._moves(bucket), dtype=torch.bool)
        bucket.lane("mask", torch.int32)
        return bucket.chosen(i)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state, as AdamWL2SP; model weights that were loaded while perturbed are clean ones."""
        for bucket in self._buckets:
            bucket.adopt_clean_weights()
        super().load_state_dict(state_dict)

    def _load_entries(self, entries: Mapping[Parameter, Mapping[str, Any]]) -> None:
        for bucket in self._buckets:
            if not any("orthogonal" in entries.get(p, {}) for p in bucket.params):
                bucket.drop_ascent_grads()
                continue
            bucket.orthogonal()
            for i, p in enumerate(bucket.params):
                bucket.lane_view("orthogonal", i).copy_(entries.get(p, {}).get("orthogonal", torch.zeros(())))
        super()._load_entries(entries)
        self._unmoved = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.mask is not None:
            self.mask = self.mask._used_by(self)
