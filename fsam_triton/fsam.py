"""FSAM: sharpness-aware minimization with two backward passes (SAM, ASAM, ESAM, GSAM, LookSAM; masked), fused."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.nn import Parameter

from . import coefficients, ops, recipes
from .adamw_l2sp import Direction
from .buffers import Bucket
from .errors import check
from .fish import FishMask
from .kernels.reference import compute_dtype
from .masks import FisherMask
from .rho import ScheduledRho
from .samples import select_samples
from .schedule import Schedule
from .selection import choose, tensors_chosen
from .sharded import is_sharded

_ASCENT = 0x3C6EF372
_NEXT_ASCENT = 0x165667B2
_MASK = 0xA54FF53A


class FSAM(ScheduledRho):
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

    _ARGUMENTS = (*ScheduledRho._ARGUMENTS, "mask", "mask_norm", "alpha", "beta", "beta_per", "gamma")

    # What a GradScaler had multiplied the gradients of the last ascent with, if `perturb` was told.
    _ascent_scale: Tensor | None = None

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
        self._unmoved: list[Parameter] | None = None
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

    def _is_selectable(self, group: dict[str, Any], i: int) -> bool:
        if self.mask is None:
            return True
        names = group.get("param_names")
        return self.mask.selects_from(names[i] if names else None, group["params"][i])

    def _selectable(self) -> list[torch.Size]:
        return [p.shape for b in self._buckets if b.selectable for p in b.params if p.requires_grad]

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

    # -- the ascent ----------------------------------------------------------------------------------------------------

    def _ascend(self, collected: list[tuple[Bucket, tuple[bool, ...]]], scale: Tensor | None = None) -> None:
        self._ascent_scale = scale
        undrawn = self._undrawn()
        if not self._mask_must_wait():
            self._refresh_mask()
            for group in self.param_groups:
                group["ascents"] += 1
        self._leave_out(undrawn)
        buckets = [bucket for bucket, _ in collected if self._moves(bucket)]
        norm_sq = self._sum(
            (
                bucket,
                ops.grad_norm_sq(
                    bucket.grad, bucket.weight if bucket.group["adaptive"] else None, self._mask(bucket, self.mask_norm)
                ),
            )
            for bucket, _ in collected
            if self.mask_norm == "all" or self._moves(bucket)
        )
        keeps = self.alpha > 0 or self.schedule.reuse > 0
        for bucket, coef in zip(buckets, self._ascent_coefficients(buckets, norm_sq), strict=True):
            self._perturb_bucket(bucket, coef, zero_grad=self.static_grads and not keeps)
        ascending = {id(bucket) for bucket, _ in collected}
        for bucket in self._buckets if keeps else ():
            if id(bucket) in ascending:
                bucket.keep_ascent_grad(self.static_grads)
            else:
                bucket.drop_ascent_grads()
        for bucket, _ in collected:
            if self.static_grads and bucket.perturbed and not keeps:
                bucket.mark_grads_zeroed()
            bucket.drop_grads(keep_views=self.static_grads)

    def _moves(self, bucket: Bucket) -> bool:
        return self.mask is None or bucket.selectable or self.mask.excluded == "always"

    def _mask(self, bucket: Bucket, use: str = "masked") -> Tensor | None:
        chosen = use == "masked" and self.mask is not None and bucket.selectable
        return bucket.lane("mask", torch.int32) if chosen else None

    def _undrawn(self) -> list[Parameter]:
        """The tensors that are not drawn for this ascent."""
        if self.beta_per != "tensor" or self.beta == 1:
            return []
        draw = random.Random(f"{self.seed} {self.param_groups[0]['ascents']}")
        params = [p for bucket in self._buckets for p in bucket.params if p.numel()]
        # Frozen ones have a draw too, so that within `ascent_pass` the others' are the same.
        pairs = [(p, draw.random() < self.beta) for p in params]
        pairs = [(p, is_drawn) for p, is_drawn in pairs if p.requires_grad]
        if pairs and not any(is_drawn for _, is_drawn in pairs):
            one = draw.randrange(len(pairs))
            pairs[one] = (pairs[one][0], True)
        return [p for p, is_drawn in pairs if not is_drawn]

    def _unneeded(self) -> list[Parameter]:
        """The parameters whose gradients the coming ascent does not need."""
        if self._mask_wants_gradients():
            return []
        out = self._undrawn()
        by_tensor = self.mask is not None and self.mask.unit == "tensor" and self.mask_norm == "masked"
        if by_tensor and self.alpha == 0 and self.schedule.reuse == 0:
            if self._unmoved is None:
                chosen = iter(tensors_chosen([bucket for bucket in self._buckets if bucket.selectable]))
                moved = [next(chosen) if b.selectable else [self._moves(b)] * len(b.params) for b in self._buckets]
                pairs = zip(self._buckets, moved, strict=True)
                self._unmoved = [p for b, now in pairs for p, moves in zip(b.params, now, strict=True) if not moves]
            out += self._unmoved
        left_out = set(out)
        updated = (p for b in self._buckets for p, known in zip(b.params, b.known, strict=True) if known)
        return out if any(p.requires_grad and p not in left_out for p in updated) else []

    def _leave_out(self, params: list[Parameter]) -> None:
        """Treat the gradients that these parameters have as zero."""
        places = self._places
        for p in params:
            bucket, i = places[p]
            bucket.grads.zero(i)

    def _ascent_coefficients(self, buckets: list[Bucket], norm_sq: Tensor) -> list[Tensor]:
        out: list[Tensor] = [torch.empty(0)] * len(buckets)
        probability = coefficients.representable(self.beta) if self._draws_elements else None
        beta = probability or self.beta
        for device in {bucket.device for bucket in buckets}:
            here = [i for i, bucket in enumerate(buckets) if bucket.device == device]
            radii = [(self._sign(buckets[i].group) * self._rho(buckets[i].group) / beta,) for i in here]
            rho = self._hyper["ascent", device].rows(radii, device)[:, 0]
            step = torch.stack([buckets[i].steps.max() for i in here])
            # Both counts: an ascent can be repeated without a step, and in a CUDA graph only the device's goes on.
            purpose = _ASCENT + self.param_groups[0]["ascents"] * _NEXT_ASCENT
            key = self._keys([buckets[i] for i in here], step, purpose, torch.zeros_like(step, dtype=torch.int64))
            norm = norm_sq.to(device, non_blocking=True)
            scale = None if self._ascent_scale is None else self._ascent_scale.to(device, non_blocking=True)
            for i, coef in zip(here, coefficients.ascent(rho, norm, key, probability, scale), strict=True):
                out[i] = coef
        return out

    @property
    def _draws_elements(self) -> bool:
        return self.beta_per == "element" and self.beta < 1

    def _perturb_bucket(self, bucket: Bucket, coef: Tensor, zero_grad: bool) -> None:
        if "master" not in bucket.lanes and bucket.backup is None:
            bucket.backup = torch.empty_like(bucket.weight)
        ops.perturb_(
            bucket.weight,
            bucket.grad,
            bucket.backup,
            self._mask(bucket),
            coef,
            bucket.group["adaptive"],
            self.stochastic_rounding,
            zero_grad,
            self._draws_elements,
        )
        bucket.perturbed = True
        bucket.written()

    def _mask_wants_gradients(self) -> bool:
        """Whether the mask is chosen in the coming ascent, or its gradients count for the next choice."""
        if self.mask is None:
            return False
        position, samples = self.param_groups[0]["ascents"] % self.mask.interval, self.mask.samples
        return position == 0 or (self._adds_up and position > self.mask.interval - samples)

    @property
    def _adds_up(self) -> bool:
        """Whether squares of gradients are added up between two choices of the mask."""
        return self.mask.samples > 1 and self.mask.scores == "fisher"

    def _mask_must_wait(self) -> bool:
        """Whether a mask is due and a GradScaler's gradients, which it would be chosen by, have overflowed.

        The host reads this, but only where a mask is due and is to last: it would be a mask of infinities and zeros.
        """
        mask = self.mask
        if self._ascent_scale is None or mask is None or mask.scores != "fisher" or mask.interval == 1:
            return False
        due = self.param_groups[0]["ascents"] % mask.interval == 0
        return due and bool(self._selectable_overflowed())

    def _selects_from(self) -> list[Bucket]:
        return [b for b in self._buckets if b.selectable and any(p.requires_grad for p in b.params)]

    def _selectable_overflowed(self) -> Tensor:
        """Whether a gradient that the mask would be chosen by is not finite."""
        norm_sq = self._sum((bucket, ops.grad_norm_sq(bucket.grad, None, None)) for bucket in self._selects_from())
        return ~torch.isfinite(norm_sq)

    def _add_up(self) -> None:
        """Add the squares of the gradients, unscaled, to what the next choice of the mask goes by."""
        scale = self._ascent_scale
        overflowed = None if scale is None else self._selectable_overflowed()
        for bucket in self._selects_from():
            fisher = bucket.lane("fisher", compute_dtype(bucket.dtype))
            grad = bucket.grad
            if scale is not None:
                here = overflowed.to(bucket.device, non_blocking=True)
                grad = (grad.to(fisher.dtype) / scale.to(bucket.device, non_blocking=True)).masked_fill_(here, 0.0)
            fisher.addcmul_(grad, grad)

    def _refresh_mask(self) -> None:
        """Choose the mask anew where it is due, from the present gradients or the squares added up before."""
        ascents = self.param_groups[0]["ascents"]
        if self.mask is None:
            return
        if self._adds_up and self._mask_wants_gradients():
            self._add_up()
        if ascents % self.mask.interval == 0:
            buckets, values = self._selects_from(), None
            if self.mask.scores == "fisher":
                values = [bucket.lanes["fisher"] if self._adds_up else bucket.grad for bucket in buckets]
            key = self.seed + (_MASK + ascents << 32)
            choose(self.mask, buckets, values, self.mask.count(self._selectable()), key, squared=self._adds_up)
            self._unmoved = None
            for bucket in buckets:
                bucket.lanes.pop("fisher", None)

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
