"""FSAM: sharpness-aware minimization with two backward passes (SAM, ASAM, ESAM, GSAM, LookSAM; masked), fused."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import ops
from ..buffers.lanes import Gradients, Lanes
from ..buffers.ledger import Found
from ..buffers.members import Member
from ..buffers.sharded import OtherParts, local
from ..errors import check
from ..masks.perturbed import FisherMask
from ..masks.trained import FishMask
from . import recipes
from . import rho as radii
from .ascent import Ascent
from .clean import CleanView
from .descent import Direction, Half
from .optimizer import FusedOptimizer
from .schedule import Schedule
from .two_pass import TwoPass


class FSAM(TwoPass, FusedOptimizer):
    r"""Sharpness-aware minimization, fused with AdamW with L2-SP, SGD or Lion.

    A step climbs to ``w + eps``, computes the gradient there, and uses it to descend from ``w``:

    - SAM (arXiv 2010.01412): ``eps = rho * g / (norm(g) + 1e-12)``
    - ASAM (``adaptive=True``, arXiv 2102.11600): ``eps = rho * w^2 * g / (norm(abs(w) * g) + 1e-12)``
    - Fisher-SAM (``mask=FisherMask(...)``, arXiv 2210.05497): SAM's eps on the mask and 0 elsewhere
    - ESAM (``beta < 1``, ``gamma < 1``, arXiv 2110.03141): SAM's eps divided by beta on a random part of the weights or
      tensors; the second gradient comes from the samples whose loss rose most
    - GSAM (``alpha > 0``, arXiv 2203.08065): descends with ``g2 - alpha * (g1 - (<g1, g2> / norm(g2)^2) * g2)``, where
      g1 and g2 are the gradients at w and at w + eps
    - LookSAM (``schedule=Schedule(every=5, reuse=0.7)``, arXiv 2203.02714)
    - FriendlySAM (``sigma=1``, arXiv 2403.12350): SAM's eps along ``g - sigma * a``, where a is the average of
      gradients
    - preconditioned SAM (``preconditioned=True``): SAM's eps along ``g / (sqrt(v) + adam_eps)``, where v includes this
      g

    Norms are over all parameter groups. `step` without a preceding perturbation is a plain update, and so is a step
    whose ascent gradient is zero or not finite, or whose rho is zero.

    Args:
        params: as for FusedOptimizer; a `FisherMask` needs ``model.named_parameters()``.
        lr: learning rate, a float or a tensor of one element (group; default: 1e-3).
        rule: the update made with the gradient: ``"adamw"``, ``"sgd"`` or ``"lion"`` (default: ``"adamw"``).
        rho: radius of the perturbation, >= 0 (group; default: 0.05, the SAM paper's, found with SGD; with AdamW 0.01 to
            0.02 did better, see `find_rho`).
        adaptive: ASAM's scaling (group; default: False).
        mask: selects the weights to perturb (default: None, all).
        mask_norm: ``"all"``: the norm is over all coordinates, as published; ``"masked"``: over the perturbed ones,
            which makes eps as long as rho (default: ``"all"``).
        alpha: GSAM's weight of the surrogate gap, >= 0; needs memory for a second gradient (default: 0.0).
        beta: ESAM's fraction of the weights, drawn again for each perturbation, in (0, 1]; rounded to a multiple of
            2**-15 (default: 1.0).
        sigma: how much of the average of gradients FriendlySAM subtracts from the direction of the perturbation, >= 0;
            1 in the paper. Needs memory for the average, in bf16 for bf16 parameters (default: 0.0).
        lmbda: decay of that average, ``a = lmbda * a + (1 - lmbda) * g`` at each perturbation, starting from 0; in [0,
            1) (default: 0.9, as in the authors' code).
        preconditioned: perturb along the gradient divided by the root of AdamW's second moment, updated with this
            gradient, plus AdamW's eps. The perturbation still has length rho. Needs ``rule="adamw"``, and excludes
            ``adaptive`` (default: False).
        beta_per: the units that beta draws: ``"element"``, every weight by itself, or ``"tensor"``, whole tensors, at
            least one, as in the published code. The ascent then does not use the gradients of the other tensors, and
            `ascent_pass` does not compute them (default: ``"element"``).
        gamma: ESAM's fraction of the batch for the second gradient, in (0, 1]; < 1 needs ``step(closure, batch)``, or
            `select_samples` in a loop of your own (default: 1.0).
        ascent_fraction: the fraction of the batch, its first samples, used for the first gradient, in (0, 1]; the
            second gradient uses the whole batch. A step then costs ``1 + ascent_fraction`` times a plain step's passes.
            < 1 needs ``step(closure, batch)``, `SAMTrainer` or Lightning's `SharpnessAware`, and ``gamma=1``; in a loop
            of your own, pass a part of the batch before `perturb` yourself (default: 1.0).
        schedule: which steps are sharpness-aware, and with which rho (default: None, all of them, with rho).
        backup_format: how perturbed 16-bit weights are restored, to the bit in either case: None, from a copy of the
            clean weights; ``"8bit"``, from a one-byte count of steps from one number of their type to the next, so that
            a weight moves by at most 127 such steps (default: None).
        **options: the rule's own arguments, and weight_decay, l2_sp, anchors, maximize, balance, balance_by,
            max_grad_norm, master_weights, ema_decay, trainable, stochastic_rounding, flatten and seed, all as for
            `FusedOptimizer`.

    Raises:
        ArgumentError: an argument is out of its range, or contradicts another.

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

    _ARGUMENTS = FusedOptimizer._ARGUMENTS | {"ascent", "alpha", "gamma", "ascent_fraction"}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        rho: float = 0.05,
        rule: str = "adamw",
        adaptive: bool = False,
        mask: FisherMask | None = None,
        mask_norm: str = "all",
        alpha: float = 0.0,
        beta: float = 1.0,
        beta_per: str = "element",
        gamma: float = 1.0,
        sigma: float = 0.0,
        lmbda: float = 0.9,
        preconditioned: bool = False,
        ascent_fraction: float = 1.0,
        schedule: Schedule | None = None,
        backup_format: str | None = None,
        **options: Any,
    ) -> None:
        check(0 <= alpha < float("inf"), "alpha", alpha, "must be >= 0 and finite")
        self.alpha = alpha
        self._set_parts(gamma, ascent_fraction)
        seed, rounds = options.get("seed", 0), options.get("stochastic_rounding", True)
        others = OtherParts(options.get("norm_group"))
        check(not preconditioned or rule == "adamw", "preconditioned", preconditioned, 'needs rule="adamw"')
        self.ascent: Ascent = Ascent(
            *(mask, mask_norm, beta, beta_per, seed, rounds, others),
            backup_format=backup_format,
            sigma=sigma,
            lmbda=lmbda,
            preconditioned=preconditioned,
        )
        self._begin()
        of_group = {**radii.group_defaults(rho, schedule), "adaptive": adaptive, "ascents": 0}
        super().__init__(params, rule, lr, _of_group=of_group, **options)
        self.ascent.check_count(self.param_groups)
        self.clean_view.find(p for group in self.param_groups for p in group["params"])

    def _begin(self) -> None:
        """Create the parts that a copy does not take over."""
        self.clean_view: CleanView = CleanView()
        # The gradients of the ascent, where the descent needs them.
        self._first: dict[Parameter, Tensor] = {}
        self._carried = {}

    @classmethod
    def from_sam_type(cls, sam_type: str, params: Iterable[Any], lr: float | Tensor = 1e-3, **arguments: Any) -> FSAM:
        """An optimizer described by the names of the FSAM code (github.com/WHU-ZQH/FSAM4PLM), for its recipes.

        Args:
            sam_type: ``"sam"``, ``"esam"``, ``"gsam"``, ``"fisher-sam"``, ``"fisher-esam"`` or ``"fisher-gsam"``.
            params: as for FSAM; the fisher types need ``model.named_parameters()``.
            lr: as for FSAM.
            **arguments: the FSAM code's, see `fsam_triton.recipes.arguments_of`, and any others of FSAM.

        Raises:
            ValueError: sam_type is unknown, or an argument is out of its range or has no meaning for this type.

        Example:
            >>> import torch
            >>> from fsam_triton import FSAM
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
            >>> optimizer = FSAM.from_sam_type(
            ...     "fisher-gsam", model.named_parameters(), lr=1e-5, rho=0.05, mask_iter_e=100, keep_ratio=0.1
            ... )
        """
        return cls(params, lr, **recipes.arguments_of(sam_type, **arguments))

    # -- groups --------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group`."""
        super().add_param_group(param_group)
        first, group = self.param_groups[0], self.param_groups[-1]
        group["ascents"] = first["ascents"]
        radii.join(group, first)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        radii.check_group(group)
        # Here, because a loaded state dict brings a schedule too.
        single = not (self.ascent.preconditioned and group["adaptive"])
        check(single, "adaptive", group["adaptive"], "must be False with preconditioned")
        alpha, reuses = self.alpha, group["schedule"]["reuse"] > 0
        check(alpha == 0 or not reuses, "alpha", alpha, "must be 0 with Schedule(reuse=...): both combine gradients")
        beta_per = self.ascent.beta_per
        whole = beta_per == "element" or (alpha == 0 and not reuses)
        check(whole, "beta_per", beta_per, 'must be "element" with alpha or Schedule(reuse=...): they need all of g1')

    def _check_trainable(self, trainable: FishMask | None) -> None:
        super()._check_trainable(trainable)
        allowed = "must be None with trainable: what is perturbed is what is trained"
        check(self.mask is None or trainable is None, "mask", self.mask, allowed)

    def _check_parameters(self, group: dict[str, Any]) -> None:
        super()._check_parameters(group)
        self.ascent.check_parameters(group)

    def _structure(self, group: Mapping[str, Any], i: int | None) -> Hashable:
        return super()._structure(group, i), group["adaptive"]

    def _prepare(self, lanes: Lanes, entries: list[Mapping[str, Any]]) -> None:
        super()._prepare(lanes, entries)
        names = {name for entry in entries for name in entry}
        if lanes.groups[0]["ascents"] > 0:
            names.add("mask")
        self.ascent.make_lanes(lanes, names)
        if "orthogonal" in names:
            lanes.lane("orthogonal", lanes.dtype)

    def _allocate(self, lanes: Lanes, fill: bool = True) -> None:
        super()._allocate(lanes, fill)
        # torch.distributed.checkpoint loads those entries alone that a new optimizer's state has.
        if lanes.shard_groups:
            self.ascent.make_lanes(lanes)
            if self.schedule.reuse > 0:
                lanes.lane("orthogonal", lanes.dtype)

    # -- the descent ---------------------------------------------------------------------------------------------------

    def _collect_first(self) -> Found:
        found = super()._collect_first()
        if self.ascent.preconditioned:
            for lanes, _ in found:
                self._allocate(lanes)
        return found

    @property
    def _combines(self) -> bool:
        return self.alpha > 0 or self.schedule.reuse > 0

    def _check_idle(self) -> None:
        self.average.refuse("a step")

    def _descend_all(self) -> None:
        try:
            self._update()
        finally:
            self._first.clear()

    def restore(self) -> None:
        """Put back the clean weights, to the bit, if the parameters are perturbed."""
        super().restore()
        # The next step is a plain one.
        self._first.clear()

    def _keep_first_gradients(self, found: Found) -> None:
        self._first.clear()
        if self._combines:
            for lanes, grads in found:
                self._first.update(
                    (p, _kept(grad, p)) for p, grad in zip(lanes.params, grads, strict=True) if grad is not None
                )

    def _second_gradients(self, lanes: Lanes, grads: Gradients) -> Gradients | None:
        if self._first:
            firsts = list(map(self._first.get, lanes.params))
            if lanes.are_usable(firsts) and lanes.are_usable(grads):
                addresses = set(map(Tensor.data_ptr, firsts))
                if addresses.isdisjoint(map(Tensor.data_ptr, grads)):
                    return firsts
            pairs = zip(lanes.members, grads, strict=True)
            return [None if grad is None else self._first_of(member, grad) for member, grad in pairs]
        if self.schedule.reuse > 0 and any("orthogonal" in own.lanes for own in self.ledger):
            lanes.lane("orthogonal", lanes.dtype)
            return lanes.views("orthogonal")
        return None

    def _first_of(self, member: Member, grad: Tensor) -> Tensor:
        first = self._first.get(member.p)
        if first is None:
            return torch.zeros_like(grad)
        if first.data_ptr() == grad.data_ptr() and grad.numel():
            raise RuntimeError(
                f"the second gradient of parameter {member} lies where the first one was, which is needed with it: "
                "give each pass a gradient of its own (p.grad is None after perturb())"
            )
        here = grad.shape, grad.stride(), grad.dtype, grad.device
        if (first.shape, first.stride(), first.dtype, first.device) == here:
            return first
        # The parameter was moved between the passes.
        return torch.empty_like(grad).copy_(first)

    def _direction(self, work: list[Half]) -> Direction:
        """SAM's direction is the gradient; GSAM and LookSAM combine it with an earlier one."""
        if not any(half.segments.tensors["other"] is not None for half in work):
            return super()._direction(work)
        # Over the parameters that are updated: what the others' gradients were at w has no part in this step.
        dots = self._sum(work, ops.gap)
        if self.alpha > 0:
            return Direction("decomposed", self.alpha, dots, self._ascent_scale())
        if not self._first:
            return Direction("reused", self.schedule.reuse, dots)
        for lanes in self.ledger:
            lanes.lane("orthogonal", lanes.dtype).zero_()
        return Direction("kept", self.schedule.reuse, dots)

    def _ascent_scale(self) -> Tensor | None:
        """The GradScaler's factor in the ascent's gradients; None if it is the same as in the current gradients."""
        before = self.ascent.scale
        if (
            before is None
            and getattr(self, "grad_scale", None) is None
            and getattr(self, "found_inf", None) is not None
        ):
            raise RuntimeError(
                "alpha > 0 combines the gradients of both passes, and GradScaler.unscale_() has unscaled only one of "
                "them: call perturb(scaler)"
            )
        return before

    # -- state ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The state in torch.optim's form: per parameter `step` and the rule's state.

        `remainder` (of master weights), `anchor`, `ema`, `mask`, `fisher`, `ascent_avg` and `orthogonal` are included
        if they are in use. Tensors are views of the live lanes, as with torch.optim; none of them shows a perturbation.
        """
        for lanes in self.ledger:
            # They are kept also of parameters that were never updated.
            if not lanes.lanes.keys().isdisjoint(("mask", "ascent_avg")):
                lanes.show(self.state)
        return super().state_dict()

    def _unused(self) -> set[str]:
        return super()._unused() | (set() if self.ascent.sigma > 0 else {"ascent_avg"})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()


def _kept(grad: Tensor, p: Parameter) -> Tensor:
    """A gradient to keep: itself, or a copy if its memory is part of what others write again (DDP's buckets)."""
    is_part = p.grad is not None and grad is local(p.grad)
    is_part = is_part and (grad._is_view() or grad.untyped_storage().nbytes() > grad.nbytes)
    return grad.clone(memory_format=torch.preserve_format) if is_part else grad
