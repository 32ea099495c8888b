"""Ascent: the first half of a sharpness-aware step: which weights move and how far."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import ops
from ..buffers.lanes import Gradients, Lanes
from ..buffers.ledger import Found, Ledger
from ..buffers.members import name_of
from ..buffers.perturbed import Perturbed
from ..buffers.sharded import OtherParts, is_sharded, sum_over_shards
from ..errors import check
from ..kernels import spec
from ..kernels.directions import Along
from ..kernels.reference import compute_dtype
from ..kernels.segments import Segments
from ..masks.perturbed import FisherMask
from ..masks.selection import choose, tensors_chosen, weights_chosen
from . import coefficients

_ASCENT = 0x3C6EF372
_NEXT_ASCENT = 0x165667B2
_MASK = 0xA54FF53A


def move(
    lanes: Lanes,
    segments: Segments,
    coef: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    adaptive: bool = False,
    stochastic: bool,
    random: bool = False,
    backup_format: str | None = None,
    scale: Tensor | None = None,
    along: Along | None = None,
) -> None:
    """Perturb the parameters that have a direction; see `kernels.reference.perturb_`."""
    counts = backup_format == "8bit" and lanes.dtype.itemsize == 2
    if counts != lanes.counts_steps:
        lanes.drop("backup")
    backup = lanes.lane("backup", torch.int8 if counts else lanes.dtype)
    ops.perturb_(segments, backup, mask, coef, key, adaptive, stochastic, random, scale, along)
    if counts and not segments.all_active:
        for i, active in enumerate(segments.active):
            if not active:
                lanes.views("backup")[i].zero_()
    lanes.written(segments.active)
    lanes.perturbed = Perturbed(lanes, segments.active)


def check_backup_format(backup_format: str | None) -> None:
    """Raise an ArgumentError unless it is None or "8bit"."""
    check(backup_format in (None, "8bit"), "backup_format", backup_format, 'must be None or "8bit"')


class Ascent:
    """Which weights a perturbation moves, where to, and how far: masks over time, random draws, directions, norms.

    Counts of ascents and radii stand in the parameter groups, so that state dicts have them.

    Args:
        mask, mask_norm, beta, beta_per, backup_format, sigma, lmbda, preconditioned: see `FSAM`.
        seed, stochastic_rounding: see `FusedOptimizer`.
        others: the processes that norms are summed over.
    """

    def __init__(
        self,
        mask: FisherMask | None,
        mask_norm: str,
        beta: float,
        beta_per: str,
        seed: int,
        stochastic_rounding: bool,
        others: OtherParts,
        *,
        backup_format: str | None = None,
        sigma: float = 0.0,
        lmbda: float = 0.9,
        preconditioned: bool = False,
    ) -> None:
        check_backup_format(backup_format)
        check(mask is None or isinstance(mask, FisherMask), "mask", mask, "must be a FisherMask or None")
        check(mask_norm in ("all", "masked"), "mask_norm", mask_norm, 'must be "all" or "masked"')
        check(0 < beta <= 1, "beta", beta, "must be in (0, 1]")
        check(beta_per in ("element", "tensor"), "beta_per", beta_per, 'must be "element" or "tensor"')
        self.mask = mask
        self.mask_norm = mask_norm
        self.beta = beta
        self.beta_per = beta_per
        check(
            mask is None or others.group is None,
            "mask",
            mask,
            "must be None with norm_group: it is chosen over a whole model",
        )
        check(0 <= sigma < float("inf"), "sigma", sigma, "must be >= 0 and finite")
        check(0 <= lmbda < 1, "lmbda", lmbda, "must be in [0, 1)")
        single = sigma == 0 or not preconditioned
        check(single, "sigma", sigma, "must be 0 with preconditioned: each makes a direction of its own")
        whole = sigma == 0 or beta == 1 or beta_per == "element"
        check(whole, "beta_per", beta_per, 'must be "element" with sigma: an average needs all gradients')
        self.sigma = sigma
        self.lmbda = lmbda
        self.preconditioned = preconditioned
        self.seed = seed
        self.stochastic_rounding = stochastic_rounding
        self.others = others
        self.backup_format = backup_format
        # What a GradScaler had multiplied the gradients of the last ascent with, if it was told.
        self.scale: Tensor | None = None
        # The parameters that a tensor-level mask does not move, once the host has read it.
        self._unmoved: list[Parameter] | None = None

    @property
    def draws_elements(self) -> bool:
        """Whether every weight is drawn by itself."""
        return self.beta_per == "element" and self.beta < 1

    @property
    def reads_state(self) -> bool:
        """Whether it has lanes that `state` shows, or reads such."""
        return self.mask is not None or self.sigma > 0 or self.preconditioned

    def make_lanes(self, lanes: Lanes, names: Iterable[str] = ("mask", "fisher", "ascent_avg")) -> None:
        """Make those of its own lanes that have one of these names and that it will need."""
        if "mask" in names and self.mask is not None:
            self.words(lanes)
        if "fisher" in names and self.adds_up:
            lanes.lane("fisher", compute_dtype(lanes.dtype))
        if "ascent_avg" in names and self.sigma > 0:
            self._average(lanes)

    def check_parameters(self, group: Mapping[str, Any]) -> None:
        """Refuse a group whose parameters the mask cannot be chosen over."""
        if self.mask is not None and self.mask.unit != "element":
            sharded = any(map(is_sharded, group["params"]))
            check(not sharded, "mask.unit", self.mask.unit, 'must be "element" with sharded parameters')

    # -- masks ---------------------------------------------------------------------------------------------------------

    def _selects_from(self, lanes: Lanes, frozen: bool = False) -> list[int]:
        """The parameters that the mask chooses from, or would choose from if they were not frozen, by their numbers."""
        if (mask := self.mask) is None:
            return []
        return [
            i
            for i, member in enumerate(lanes.members)
            if member.p.requires_grad is not frozen and mask.selects_from(member.name, member.p)
        ]

    def check_count(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Raise an ArgumentError if the mask may keep too few weights to keep any unit."""
        if self.mask is not None:
            _count(self.mask, groups)

    def moves_excluded(self) -> bool:
        """Whether tensors that the mask does not choose from are perturbed."""
        return self.mask is None or self.mask.excluded == "always"

    def words(self, lanes: Lanes) -> Tensor | None:
        """The mask of a pass over lanes: what was chosen, and all or nothing of what is not chosen from."""
        if self.mask is None:
            return None
        is_new = "mask" not in lanes.lanes
        for group in lanes.groups if is_new else ():
            # Somebody may have replaced its parameters by shards.
            self.check_parameters(group)
        words = lanes.lane("mask", torch.int32)
        if is_new and self.moves_excluded():
            for i in set(range(len(lanes))).difference(self._selects_from(lanes)):
                lanes.plan.words(words, i).fill_(-1)
        return words

    def wants_gradients(self, ascents: int) -> bool:
        """Whether the mask is chosen in the coming ascent, or its gradients count for the next choice."""
        if self.mask is None:
            return False
        position, samples = ascents % self.mask.interval, self.mask.samples
        return position == 0 or (self.adds_up and position > self.mask.interval - samples)

    @property
    def adds_up(self) -> bool:
        """Whether squares of gradients are added up between two choices of the mask."""
        return self.mask is not None and self.mask.samples > 1 and self.mask.scores == "fisher"

    def _must_wait(self, found: Found, ascents: int) -> bool:
        """Whether a mask is due and a GradScaler's gradients, which it would be chosen by, have overflowed.

        The host reads this, but only where a mask is due and is to last: it would be a mask of infinities and zeros.
        """
        mask = self.mask
        if self.scale is None or mask is None or mask.scores != "fisher" or mask.interval == 1:
            return False
        return ascents % mask.interval == 0 and bool(self._overflowed(found))

    def _overflowed(self, found: Found) -> Tensor:
        """Whether a gradient that the mask would be chosen by is not finite."""
        parts = []
        for lanes, grads in found:
            own = set(self._selects_from(lanes))
            selected = [grad if i in own else None for i, grad in enumerate(grads)]
            # Nothing of the weights is read.
            parts.append((lanes, ops.norm_sq(Segments(lanes.plan, grads, selected), False, None)))
        return ~torch.isfinite(sum_over_shards(parts, found[0][0].device))

    def _add_up(self, found: Found) -> None:
        """Add the squares of the gradients, unscaled, to what the next choice of the mask goes by."""
        scaled = None if self.scale is None else (self._overflowed(found), self.scale)
        for lanes, grads in found:
            dtype = lanes.lane("fisher", compute_dtype(lanes.dtype)).dtype
            own = {i: grad for i in self._selects_from(lanes) if (grad := grads[i]) is not None}
            squares = [lanes.views("fisher")[i] for i in own]
            here = [grad.to(dtype) for grad in own.values()]
            if scaled is not None and own:
                skip, scale = (t.to(lanes.device, non_blocking=True) for t in scaled)
                here = [(grad / scale).masked_fill_(skip, 0.0) for grad in here]
            if own:
                # torch has it without saying so.
                torch._foreach_addcmul_(squares, here, here)  # pyright: ignore[reportPrivateImportUsage]

    def _refresh(self, ledger: Ledger, found: Found, groups: list[dict[str, Any]], ascents: int) -> None:
        """Choose the mask again where it is due, from the present gradients or the squares added up before."""
        if self.mask is None:
            return
        if self.adds_up and self.wants_gradients(ascents):
            self._add_up(found)
        if ascents % self.mask.interval == 0:
            for lanes in ledger:
                self.words(lanes)
                # Nothing of them is chosen.
                for i in self._selects_from(lanes, frozen=True):
                    lanes.plan.words(lanes.lanes["mask"], i).zero_()
            selectable = [(lanes, own) for lanes in ledger if (own := self._selects_from(lanes))]
            scores = None
            if self.mask.scores == "fisher":
                by_lanes = {id(lanes): grads for lanes, grads in found}
                scores = [self._scores(lanes, own, by_lanes.get(id(lanes), ())) for lanes, own in selectable]
            key = self.seed + (_MASK + ascents << 32)
            choose(self.mask, selectable, scores, _count(self.mask, groups), key, squared=self.adds_up)
            self._unmoved = None
            for lanes in ledger:
                lanes.drop("fisher")
                lanes.drop("scores")

    def _scores(self, lanes: Lanes, selectable: list[int], grads: Gradients) -> Tensor:
        """What the mask is chosen by, in the layout of the lanes."""
        if self.adds_up:
            return lanes.lane("fisher", compute_dtype(lanes.dtype))
        # Nothing is in a backup before the perturbation, and it takes no memory that is not needed anyway.
        flat = lanes.lane("scores" if lanes.counts_steps or self.backup_format else "backup", lanes.dtype).zero_()
        own = {i: grad.detach() for i in selectable if grads and (grad := grads[i]) is not None}
        if own:
            parts = [lanes.plan.shaped(flat, i) for i in own]
            # torch has it without saying so.
            torch._foreach_copy_(parts, list(own.values()))  # pyright: ignore[reportPrivateImportUsage]
        return flat

    # -- draws ---------------------------------------------------------------------------------------------------------

    def _undrawn(self, ledger: Ledger, ascents: int) -> list[Parameter]:
        """The tensors that are not drawn for this ascent."""
        if self.beta_per != "tensor" or self.beta == 1:
            return []
        draw = random.Random(f"{self.seed} {ascents}")
        members = sorted((member for lanes in ledger for member in lanes.members), key=lambda member: member.number)
        # Frozen ones have a draw too, so that within `ascent_pass` the others' are the same.
        pairs = [(member.p, draw.random() < self.beta) for member in members if member.p.numel()]
        pairs = [(p, is_drawn) for p, is_drawn in pairs if p.requires_grad]
        if pairs and not any(is_drawn for _, is_drawn in pairs):
            one = draw.randrange(len(pairs))
            pairs[one] = (pairs[one][0], True)
        return [p for p, is_drawn in pairs if not is_drawn]

    def unneeded(self, ledger: Ledger, ascents: int, combines: bool, is_known: Iterable[Parameter]) -> list[Parameter]:
        """The parameters whose gradients the coming ascent does not need.

        Args:
            ledger: of the parameters.
            ascents: how many there were.
            combines: whether the descent needs all of the first gradient.
            is_known: the parameters that were ever updated.
        """
        if self.wants_gradients(ascents) or self.sigma > 0:
            return []
        out = self._undrawn(ledger, ascents)
        by_tensor = self.mask is not None and self.mask.unit == "tensor" and self.mask_norm == "masked"
        if by_tensor and not combines:
            if self._unmoved is None:
                moved = tensors_chosen(list(ledger))
                pairs = [zip(lanes.params, own, strict=True) for lanes, own in zip(ledger, moved, strict=True)]
                self._unmoved = [p for own in pairs for p, now in own if not now]
            out += self._unmoved
        left_out = set(out)
        return out if any(p.requires_grad and p not in left_out for p in is_known) else []

    # -- the perturbation ----------------------------------------------------------------------------------------------

    def climb(
        self,
        ledger: Ledger,
        found: Found,
        groups: list[dict[str, Any]],
        rho: Mapping[int, float | Tensor],
        scale: Tensor | None = None,
    ) -> None:
        """Perturb the parameters by their gradients.

        Args:
            ledger: of the parameters.
            found: the lanes with gradients, and these.
            groups: the parameter groups.
            rho: the radius of each group, by its id, negative to maximize.
            scale: what a GradScaler has multiplied the gradients with.
        """
        self.scale = scale
        ascents = groups[0]["ascents"]
        undrawn = set(self._undrawn(ledger, ascents))
        if not self._must_wait(found, ascents):
            self._refresh(ledger, found, groups, ascents)
            for group in groups:
                group["ascents"] += 1
        work = []
        for lanes, grads in found:
            if undrawn:
                grads = [None if p in undrawn else grad for p, grad in zip(lanes.params, grads, strict=True)]
            if any(grad is not None for grad in grads):
                work.append((lanes, lanes.segments(grads, half="ascent"), self._along(lanes)))
        norms = ((lanes, self._norm_sq(lanes, segments, along)) for lanes, segments, along in work)
        norm_sq = self.others.sum(sum_over_shards(norms, ledger.home))
        # Of both counts: an ascent can be repeated without a step, and in a CUDA graph only the device's changes.
        purpose = coefficients.purpose(self.seed, _ASCENT + ascents * _NEXT_ASCENT)
        for lanes, segments, along in work:
            if ledger.shares:
                lanes.stage()
            move(
                lanes,
                segments,
                *self._coefficients(lanes, norm_sq, rho, purpose),
                mask=self.words(lanes),
                adaptive=self._is_adaptive(lanes),
                stochastic=self.stochastic_rounding,
                random=self.draws_elements,
                backup_format=self.backup_format,
                along=along,
            )
        ledger.seal()

    def _along(self, lanes: Lanes) -> Along | None:
        """What the perturbation goes along; None for the gradient."""
        if self.sigma > 0:
            kind, average, codes = "less_average", self._average(lanes), None
            rows = [(1 - self.lmbda, self.sigma) for _ in lanes.groups]
        elif self.preconditioned:
            kind, average, codes = "over_root", lanes.lanes["exp_avg_sq"], lanes.lanes.get("exp_avg_sq_scale")
            rows = [(1 - group["betas"][1], group["eps"]) for group in lanes.groups]
        else:
            return None
        group_of = lanes.about_members()[:, spec.MEMBER.index("group")]
        coef = lanes.numbers("direction", rows)[group_of].to(compute_dtype(lanes.dtype))
        scale = None if self.scale is None else self.scale.to(lanes.device, non_blocking=True)
        return Along(kind, average, coef, codes, scale)

    @staticmethod
    def _average(lanes: Lanes) -> Tensor:
        # It moves by a tenth of a gradient at once: 16 bits are enough, but fp16 would lose small unscaled gradients.
        return lanes.lane("ascent_avg", torch.bfloat16 if lanes.dtype == torch.bfloat16 else compute_dtype(lanes.dtype))

    def _norm_sq(self, lanes: Lanes, segments: Segments, along: Along | None) -> Tensor:
        mask = self.words(lanes) if self.mask_norm == "masked" else None
        return ops.norm_sq(segments, self._is_adaptive(lanes), mask, None, along)

    @staticmethod
    def _is_adaptive(lanes: Lanes) -> bool:
        return lanes.groups[0]["adaptive"]

    def _coefficients(
        self, lanes: Lanes, norm_sq: Tensor, rho: Mapping[int, float | Tensor], purpose: int
    ) -> tuple[Tensor, Tensor]:
        beta = coefficients.representable(self.beta) if self.draws_elements else self.beta
        rows = [(rho[id(group)] / beta, beta - 0.5) for group in lanes.groups]
        # A direction that is made of more than the gradient has been unscaled.
        scale = None if self.sigma > 0 or self.preconditioned else self.scale
        norm_sq = norm_sq.to(lanes.device, non_blocking=True)
        scale = None if scale is None else scale.to(lanes.device, non_blocking=True)
        about, dtype = lanes.about_members(), compute_dtype(lanes.dtype)
        return ops.climb_coefficients(lanes.numbers("ascent", rows), about, lanes.steps, purpose, norm_sq, scale, dtype)

    # -- what others may look at ---------------------------------------------------------------------------------------

    def mask_of(self, lanes: Lanes, i: int) -> Tensor:
        """What the mask lets a perturbation move of a parameter, bool in its shape."""
        return lanes.trained(i) if self.words(lanes) is None else lanes.chosen(i)

    def density(self, ledger: Ledger) -> dict[Parameter, float]:
        """The fraction of each parameter's weights that the mask lets a perturbation move."""
        for lanes in ledger:
            self.words(lanes)
        counts = weights_chosen(list(ledger))
        out = {}
        for lanes, own in zip(ledger, counts, strict=True):
            selectable = set(self._selects_from(lanes))
            for i, (p, count) in enumerate(zip(lanes.params, own, strict=True)):
                out[p] = count / max(p.numel(), 1) if i in selectable else float(self.moves_excluded())
        return out


def _count(mask: FisherMask, groups: Iterable[Mapping[str, Any]]) -> int:
    """How many weights of these groups the mask may keep."""
    shapes = []
    for group in groups:
        pairs = [(name_of(group, i), p) for i, p in enumerate(group["params"])]
        shapes += [p.shape for name, p in pairs if p.requires_grad and mask.selects_from(name, p)]
    return mask.count(shapes)
