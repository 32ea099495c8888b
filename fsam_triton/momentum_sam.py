"""MomentumSAM: sharpness-aware minimization along the momentum, with one backward pass and one fused update a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from . import coefficients, ops
from .adamw_l2sp import Direction, Run
from .buffers import Bucket
from .errors import check
from .rho import ScheduledRho
from .schedule import Schedule

_PERTURBATION = 0x6A09E667


class MomentumSAM(ScheduledRho):
    r"""Momentum-SAM with AdamW and L2-SP as its base (arXiv 2401.12033, its AdamW version), fused.

    The gradient is taken at ``w - rho * m / (norm(m) + 1e-12)``, where m is AdamW's first moment and the norm is over
    all parameters: a step has one backward pass. Restore, update and the next perturbation are one pass over the
    weights; the norm of the new moment follows from the old one and the gradient, so it is known before that pass.

    Between two steps the parameters hold *perturbed* weights, ready for the next forward pass. The clean ones are kept
    exactly, in the fp32 master weights or else in a copy. `eval` brings them into the parameters and `train` goes back
    to the perturbed ones, to the bit; transformers' Trainer, accelerate and other loops that know schedule-free
    optimizers call both. ``state_dict()`` of the model and of this optimizer show clean weights at any time. Anything
    else that reads the parameters themselves (a copy of the model, an evaluation in a loop of your own) wants `eval`
    first.

    Args:
        params: as AdamWL2SP.
        lr: as AdamWL2SP (group; default: 1e-3).
        rho: length of the perturbation, >= 0 (group; default: 0.05).
        schedule: when to perturb and how far; with ``every=1`` (default: None, always by rho).
        **adamwl2sp: every other argument of AdamWL2SP.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import torch
        >>> from fsam_triton import MomentumSAM
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = MomentumSAM(model.parameters(), lr=1e-3, rho=0.05)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1, 4)).square().sum().backward()
        ...     optimizer.step()
        >>> optimizer.eval()  # clean weights, to evaluate or to save
    """

    _ARGUMENTS = (*ScheduledRho._ARGUMENTS, "_training")
    _stays_perturbed = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        rho: float = 0.05,
        schedule: Schedule | None = None,
        **adamwl2sp: Any,
    ) -> None:
        self._training = True
        # The scale of the perturbation at hand is saved, because the moment's norm was predicted, not measured.
        super().__init__(params, lr, rho=rho, schedule=schedule, _group_defaults={"scale": 0.0}, **adamwl2sp)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        every = group["schedule"]["every"]
        check(every == 1, "schedule.every", every, "must be 1: the perturbation costs no backward pass to leave out")

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the clean weights with the gradients taken at the perturbed ones, and perturb for the next step.

        Args:
            closure: evaluates the model again and returns the loss, as in torch.optim; called once.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: the optimizer is in eval mode, or inside `ema_weights`.
        """
        self._refuse_inside_ema("a step")
        if not self._training:
            raise RuntimeError("step() in eval mode: call optimizer.train() before the forward pass")
        # Not by way of the inherited step, around which torch.optim would call the hooks of a step once more.
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._show_clean()
        self._update()
        return loss

    @torch.no_grad()
    def train(self) -> None:
        """Put the perturbed weights into the parameters, the same as before `eval`. Does nothing in train mode.

        Raises:
            RuntimeError: inside `ema_weights`.
        """
        self._refuse_inside_ema("train()")
        if self._training:
            return
        self._training = True
        self._perturb_again()

    def eval(self) -> None:
        """Put the clean weights into the parameters."""
        self.restore()
        self._training = False

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """As AdamWL2SP, also while perturbed; at the end the parameters hold what they held before, to the bit."""
        self._refuse_inside_ema("ema_weights()")
        training = self._training
        self.eval()
        try:
            with super().ema_weights():
                yield
        finally:
            if training:
                self.train()

    def restore(self) -> None:
        """Put back the clean weights, to the bit, until the next step perturbs them again."""
        for bucket in self._buckets:
            bucket.adopt_clean_weights()
            for p in bucket.params:
                if self._was_moved(bucket, p) and (clean := self.clean_weight(p)) is not None:
                    with torch.no_grad():
                        p.copy_(clean)
            # Not to write a buffer that no parameter is in: another optimizer may have them, and would notice.
            bucket.perturbed = bucket.perturbed and self._is_in_use(bucket)
        super().restore()

    @staticmethod
    def _is_in_use(bucket: Bucket) -> bool:
        """Whether any parameter still lies in the bucket's buffer."""
        return any(map(bucket.is_in_place, range(len(bucket.params))))

    def state_dict(self) -> dict[str, Any]:
        for bucket in self._buckets:
            bucket.adopt_clean_weights()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if "scale" not in saved:
                # Moments of another optimizer: the scale at hand does not fit them.
                group["scale"] = 0.0
        if self._training:
            self._perturb_again()

    def _perturb_again(self) -> None:
        """Perturb the clean weights by the last step's scale."""
        buckets = [bucket for bucket in self._buckets if "exp_avg" in bucket.lanes and self._is_in_use(bucket)]
        if buckets:
            self._show_clean()
        for bucket in buckets:
            bucket.adopt_changed_weights()
        self._keep_clean(buckets)
        runs = [(bucket, *run) for bucket in buckets for run in bucket.runs((False,) * len(bucket.params))]
        for coef, run in zip(self._coefficients(runs, Direction()), runs, strict=True):
            self._update_run(run, coef, Direction(), zero_grad=False)
        for bucket in buckets:
            bucket.perturbed = True
            bucket.written()

    def _collect(self) -> list[tuple[Bucket, tuple[bool, ...]]]:
        # Parameters without a gradient are perturbed anew too, by the new scale.
        for bucket in self._buckets:
            bucket.adopt_clean_weights()
        active = [(bucket, bucket.collect()) for bucket in self._buckets]
        return [(bucket, now) for bucket, now in active if any(now) or "exp_avg" in bucket.lanes]

    def _allocate(self, collected: list[tuple[Bucket, tuple[bool, ...]]]) -> None:
        super()._allocate(collected)
        self._keep_clean([bucket for bucket, _ in collected])

    @staticmethod
    def _keep_clean(buckets: list[Bucket]) -> None:
        """Make sure that the backup, where there is no master, holds the clean weights."""
        for bucket in buckets:
            if "master" not in bucket.lanes and not bucket.perturbed:
                if bucket.backup is None:
                    bucket.backup = torch.empty_like(bucket.weight)
                bucket.backup.copy_(bucket.weight)

    def _direction(self, collected: list[tuple[Bucket, tuple[bool, ...]]]) -> Direction:
        """Unscaling and clipping, and the scale of the next perturbation from the norm of the next moment."""
        home = self._buckets[0].device
        dots = []
        for bucket, active in collected:
            # Not run by run: how runs are cut depends on the past, and a resumed training must find the same norm.
            for now in (True, False):
                for start, stop in bucket.stretches(tuple(is_active == now for is_active in active)):
                    exp_avg, grad = bucket.lanes["exp_avg"][start:stop], bucket.grad[start:stop]
                    dots.append((bucket, now, ops.surrogate_gap(exp_avg, grad).to(home, non_blocking=True)))
        direction = self._scaled(Direction(), self._sum((bucket, dot[2]) for bucket, now, dot in dots if now))
        norm_sq = self._sum(
            (bucket, self._next_moment_sq(bucket.group, dot, direction) if now else dot[1]) for bucket, now, dot in dots
        )
        if direction.skip is not None:
            norm_sq = torch.where(direction.skip, self._sum((bucket, dot[1]) for bucket, _, dot in dots), norm_sq)
        for group in self.param_groups:
            following = {**group, "updates": group["updates"] + 1}
            rho = self._rho(following) if self.schedule.is_sharp(following["updates"]) else 0.0
            group["scale"] = -coefficients.radius(rho, norm_sq)
        return direction

    def _next_moment_sq(self, group: Mapping[str, Any], dots: Tensor, direction: Direction) -> Tensor:
        return coefficients.next_moment_sq(dots, group["betas"][0], self._sign(group) * direction.factor)

    def _coefficients(self, runs: list[Run], direction: Direction) -> list[Tensor]:
        out = []
        for coef, (bucket, start, _, _, active) in zip(super()._coefficients(runs, direction), runs, strict=True):
            scale = torch.as_tensor(bucket.group["scale"], dtype=torch.float64).to(bucket.device, non_blocking=True)
            # The largest count, which is the same for all runs, so that numbers do not depend on how they are cut.
            key = self._keys([bucket], [bucket.steps], _PERTURBATION, [start])
            coef = torch.cat((coef[:9], torch.zeros_like(key), scale.view(1), key, coef[12:]))
            if not active:
                # Restored and perturbed anew, not updated, nor their average.
                coef[0] = coef[12:] = float("nan")
            out.append(coef)
        return out

    def __getstate__(self) -> dict[str, Any]:
        if self.perturbed:
            raise RuntimeError("the weights are perturbed: call eval() before copying or pickling the optimizer")
        return super().__getstate__()
