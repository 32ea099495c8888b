"""Ascent: the first half of FSAM's step, which weights move and how far."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import coefficients, ops
from .buffers import Bucket
from .kernels.reference import compute_dtype
from .masks import FisherMask
from .rho import ScheduledRho
from .selection import choose, tensors_chosen

_ASCENT = 0x3C6EF372
_NEXT_ASCENT = 0x165667B2
_MASK = 0xA54FF53A


class Ascent(ScheduledRho):
    """The part of FSAM that perturbs: masks over time, random draws, norms; of no use by itself.

    `FSAM` sets the attributes and documents them.
    """

    mask: FisherMask | None
    mask_norm: str
    alpha: float
    beta: float
    beta_per: str
    # What a GradScaler had multiplied the gradients of the last ascent with, if `perturb` was told.
    _ascent_scale: Tensor | None = None
    # The parameters that a tensor-level mask does not move, once the host has read it.
    _unmoved: list[Parameter] | None = None

    def _is_selectable(self, group: dict[str, Any], i: int) -> bool:
        if self.mask is None:
            return True
        names = group.get("param_names")
        return self.mask.selects_from(names[i] if names else None, group["params"][i])

    def _selectable(self) -> list[torch.Size]:
        return [p.shape for b in self._buckets if b.selectable for p in b.params if p.requires_grad]

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
            steps = [buckets[i].steps for i in here]
            # Both counts: an ascent can be repeated without a step, and in a CUDA graph only the device's goes on.
            purpose = _ASCENT + self.param_groups[0]["ascents"] * _NEXT_ASCENT
            key = self._keys([buckets[i] for i in here], steps, purpose, [0] * len(here))
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
