"""FSAM: sharpness-aware minimization (SAM, ASAM, Fisher-SAM) over AdamW with L2-SP, in three fused passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from . import coefficients, ops
from .adamw_l2sp import AdamWL2SP, check
from .buffers import Bucket
from .kernels.reference import compute_dtype, unpack_mask
from .masks import FisherMask, select_top_k

_ASCENT = 0x3C6EF372


class FSAM(AdamWL2SP):
    r"""Sharpness-aware minimization with AdamW and L2-SP as its base, fused.

    A step climbs to ``w + eps``, takes the gradient there, and descends with it from ``w``:

    - SAM (arXiv 2010.01412): ``eps = rho * g / (norm(g) + 1e-12)``
    - ASAM (``adaptive=True``, arXiv 2102.11600): ``eps = rho * w^2 * g / (norm(abs(w) * g) + 1e-12)``
    - Fisher-SAM (``mask=FisherMask(...)``, arXiv 2210.05497): that eps on the mask and 0 elsewhere

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
        **adamwl2sp: every other argument of AdamWL2SP.

    Raises:
        ValueError: an argument is out of its range.

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

    _ARGUMENTS = (*AdamWL2SP._ARGUMENTS, "mask", "mask_norm")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        mask: FisherMask | None = None,
        mask_norm: str = "all",
        **adamwl2sp: Any,
    ) -> None:
        check(mask is None or isinstance(mask, FisherMask), "mask", mask, "must be a FisherMask or None")
        check(mask_norm in ("all", "masked"), "mask_norm", mask_norm, 'must be "all" or "masked"')
        self.mask = mask
        self.mask_norm = mask_norm
        super().__init__(params, lr, _group_defaults={"rho": rho, "adaptive": adaptive, "ascents": 0}, **adamwl2sp)
        if mask is not None:
            mask.count(self._selectable())

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        check(group["rho"] >= 0, "rho", group["rho"], "must be >= 0")

    def _is_selectable(self, group: dict[str, Any], i: int) -> bool:
        if self.mask is None:
            return True
        names = group.get("param_names")
        return self.mask.selects_from(names[i] if names else None, group["params"][i])

    def _selectable(self) -> int:
        return sum(p.numel() for b in self._buckets if b.selectable for p in b.params if p.requires_grad)

    @property
    def perturbed(self) -> bool:
        """Whether the parameters hold perturbed weights at this moment."""
        return any(bucket.perturbed for bucket in self._buckets)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Descend, with a closure after an ascent: the whole step; without one: the second half after `perturb`.

        Args:
            closure: zeroes the gradients, evaluates the model, calls backward and returns the loss. It is called twice,
                at the weights and at the perturbed weights (once if `perturb` was called before). If it raises, the
                clean weights are put back.

        Returns:
            The loss at the clean weights, or None without a closure.
        """
        if closure is None:
            self._update()
            return None
        loss = None
        try:
            with torch.enable_grad():
                loss = closure()
            if not self.perturbed and (collected := self._collect()):
                self._ascend(collected)
                with torch.enable_grad():
                    closure()
        except BaseException:
            self.restore()
            raise
        self._update()
        return loss

    @torch.no_grad()
    def perturb(self) -> None:
        """Climb: w -> w + eps(w) from the gradients there are, which are cleared.

        Raises:
            RuntimeError: the parameters are perturbed already, or none has a gradient.
        """
        if self.perturbed:
            raise RuntimeError("perturb() was called twice: call step() or restore() in between")
        collected = self._collect()
        if not collected:
            raise RuntimeError("perturb() needs gradients: call backward() first")
        try:
            self._ascend(collected)
        except BaseException:
            self.restore()
            raise

    def _ascend(self, collected: list[tuple[Bucket, tuple[bool, ...]]]) -> None:
        self._refresh_mask()
        buckets = [bucket for bucket, _ in collected if self._moves(bucket)]
        norm_sq = self._norm_sq(
            ops.grad_norm_sq(
                bucket.grad, bucket.weight if bucket.group["adaptive"] else None, self._mask(bucket, self.mask_norm)
            )
            for bucket, _ in collected
            if self.mask_norm == "all" or self._moves(bucket)
        )
        for bucket, coef in zip(buckets, self._ascent_coefficients(buckets, norm_sq), strict=True):
            self._perturb_bucket(bucket, coef)
        for bucket, _ in collected:
            if self.static_grads and bucket.perturbed:
                bucket.mark_grads_zeroed()
            bucket.drop_grads(keep_views=self.static_grads)

    def _update(self) -> None:
        try:
            super()._update()
        except BaseException:
            self.restore()
            raise

    def _moves(self, bucket: Bucket) -> bool:
        return self.mask is None or bucket.selectable or self.mask.excluded == "always"

    def _mask(self, bucket: Bucket, use: str = "masked") -> Tensor | None:
        chosen = use == "masked" and self.mask is not None and bucket.selectable
        return bucket.lane("mask", torch.int32) if chosen else None

    def _ascent_coefficients(self, buckets: list[Bucket], norm_sq: Tensor) -> list[Tensor]:
        out: list[Tensor] = [torch.empty(0)] * len(buckets)
        for device in {bucket.device for bucket in buckets}:
            here = [i for i, bucket in enumerate(buckets) if bucket.device == device]
            groups = [buckets[i].group for i in here]
            radii = [(-group["rho"] if group["maximize"] else group["rho"],) for group in groups]
            rho = self._hyper["ascent", device].rows(radii, device)[:, 0]
            step = torch.stack([buckets[i].steps.max() for i in here])
            key = self._keys([buckets[i] for i in here], step, _ASCENT, torch.zeros_like(step, dtype=torch.int64))
            for i, coef in zip(here, coefficients.ascent(rho, norm_sq.to(device, non_blocking=True), key), strict=True):
                out[i] = coef
        return out

    def _perturb_bucket(self, bucket: Bucket, coef: Tensor) -> None:
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
            self.static_grads,
        )
        bucket.perturbed = True
        bucket.written()

    def _refresh_mask(self) -> None:
        """Choose the mask anew where it is due, from the present gradients or the squares added up before."""
        ascents = self.param_groups[0]["ascents"]
        for group in self.param_groups:
            group["ascents"] = ascents + 1
        if self.mask is None:
            return
        buckets = [
            bucket for bucket in self._buckets if bucket.selectable and any(p.requires_grad for p in bucket.params)
        ]
        position, samples = ascents % self.mask.interval, self.mask.samples
        if samples > 1 and (position == 0 or position > self.mask.interval - samples):
            for bucket in buckets:
                fisher = bucket.lane("fisher", compute_dtype(bucket.dtype))
                fisher.addcmul_(bucket.grad, bucket.grad)
        if position == 0:
            values = [bucket.lanes.get("fisher", bucket.grad) for bucket in buckets]
            select_top_k(buckets, values, self.mask.count(self._selectable()))
            for bucket in buckets:
                bucket.lanes.pop("fisher", None)

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

    def mask_of(self, p: Tensor) -> Tensor:
        """What `perturb` moves of a parameter.

        Args:
            p: one of the optimizer's parameters.

        Returns:
            bool tensor in the parameter's shape. Before the first perturbation a `FisherMask` has chosen nothing.

        Raises:
            ValueError: p is not a parameter of this optimizer.
        """
        for bucket in self._buckets:
            for i, own in enumerate(bucket.params):
                if own is not p:
                    continue
                if self.mask is None or not bucket.selectable:
                    return torch.full_like(p, self._moves(bucket), dtype=torch.bool)
                bucket.lane("mask", torch.int32)
                out = torch.empty(bucket.shapes[i], dtype=torch.bool, device=p.device)
                flat = unpack_mask(bucket.mask_words(i), torch.empty(p.numel(), device="meta"))
                return flat.as_strided(out.shape, bucket.strides[i]).clone()
        raise ValueError(f"Invalid p: a tensor of shape {tuple(p.shape)}; must be a parameter of this optimizer")
