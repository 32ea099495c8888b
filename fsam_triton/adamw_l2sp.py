"""AdamWL2SP: AdamW whose decay pulls towards the pre-trained weights, one fused pass per flat buffer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from . import coefficients, ops
from .buffers import Bucket
from .errors import check
from .fish import FishMask
from .kernels.reference import compute_dtype
from .sharded import ShardedBucket, check_placements, is_sharded, local, owners_of, sum_over_shards
from .sparse import SparseBucket
from .state import FlatState

_UPDATE = 0x51ED270B


# A bucket, start and stop of a stretch of it, a parameter in that stretch, and whether it is updated.
Run = tuple[Bucket, int, int, int, bool]


@dataclass
class Direction:
    """What the gradients of an update are multiplied with; tensors are on the first bucket's device.

    Attributes:
        factor: of the gradient: unscaling, clipping; NaN skips the update.
        other: of `Bucket.ascent_grad`, which is added; None if it is not read.
        keep: instead of adding it, store the gradient minus `other` times the ascent gradient over the latter.
        skip: bool, whether the device skips the update, or None if it never does.
    """

    factor: Tensor | float = 1.0
    other: Tensor | float | None = None
    keep: bool = False
    skip: Tensor | None = None


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


class AdamWL2SP(FlatState):
    r"""AdamW (arXiv 1711.05101) with the decoupled L2-SP penalty (arXiv 1802.01483), fused over flat buffers.

    In a parameter group with ``l2_sp > 0`` a parameter with an anchor is pulled to it,
    ``w -= lr * l2_sp * (w - anchor)``; one without (a novel one, a new classifier say) and every parameter of other
    groups decays to zero, ``w -= lr * weight_decay * w``. Then Adam, exactly as `torch.optim.AdamW`, whose state
    dicts it reads and writes.

    The parameters become views of flat buffers (``p.data`` is re-pointed), so move and cast the model first. A
    coordinate whose gradient is not finite keeps its weight and moments.

    Args:
        params: ``model.parameters()``, ``model.named_parameters()`` or parameter groups (dicts), in which every
            argument marked (group) may stand too. Floating point, dense.
        lr: learning rate, a float or a tensor of one element (group; default: 1e-3).
        betas: decay rates of the first and second moment, each in [0, 1) (group; default: (0.9, 0.999)).
        eps: added to the denominator, >= 0 (group; default: 1e-8).
        weight_decay: decay to zero where there is no anchor, >= 0 (group; default: 1e-2).
        amsgrad: use the maximum of the second moments (group; default: False).
        l2_sp: decay to the anchor, >= 0 (group; default: 0, no anchors are kept).
        anchors: ``"initial"``, the values at construction, or a mapping of parameter names to tensors of their shapes,
            for which ``params`` must carry names; parameters it does not name are novel (default: ``"initial"``).
        maximize: maximize the objective (group; default: False).
        max_grad_norm: clip the global gradient norm to this, > 0, as ``clip_grad_norm_`` does; a step whose norm is not
            finite is skipped altogether (default: None, no clipping).
        master_weights: keep fp32 copies of fp16 and bf16 parameters, and fp32 moments (default: False).
        ema_decay: keep an exponential moving average of the clean weights, ``ema += (1 - ema_decay) * (w - ema)`` after
            each update, in [0, 1), for `ema_weights`. It begins at the weights before the first update, without bias
            correction: right for fine-tuning, where these are pre-trained weights. fp32 for 16-bit parameters, which
            would lose its small changes (default: None, no average is kept).
        trainable: train these weights alone; all others stay as they are, to the bit, without weight decay, and take no
            memory here. Needs ``model.named_parameters()`` (default: None, all).
        stochastic_rounding: without master weights, round 16-bit weights and second moments stochastically; to nearest,
            small updates would be lost (default: True).
        flatten: move parameters into one buffer; False leaves them in place, at a launch for each (group; default:
            True).
        static_grads: keep ``p.grad`` the same tensors for ever (CUDA graphs): consumed gradients are zeroed by the
            kernel that reads them, and `zero_grad` never sets None (default: False).
        seed: of the stochastic rounding (default: 0).
        foreach, capturable, fused: accepted because torch.optim.AdamW takes them; every step is fused and capturable.

    Raises:
        ValueError: an argument is out of its range, a parameter is complex, integer or sparse, an anchor does not fit.

    Example:
        >>> import torch
        >>> from fsam_triton import AdamWL2SP
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = AdamWL2SP(model.parameters(), lr=1e-3, l2_sp=0.01)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    # Attributes that a copy takes over as they are.
    _ARGUMENTS = (
        "anchors",
        "max_grad_norm",
        "master_weights",
        "ema_decay",
        "trainable",
        "stochastic_rounding",
        "static_grads",
        "seed",
    )

    # torch.amp.GradScaler then always calls `step` and passes `grad_scale` and `found_inf`, so that a step with an
    # overflow is skipped on the device, after the restore.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        l2_sp: float = 0.0,
        anchors: str | Mapping[str, Tensor] = "initial",
        maximize: bool = False,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        ema_decay: float | None = None,
        trainable: FishMask | None = None,
        stochastic_rounding: bool = True,
        flatten: bool = True,
        static_grads: bool = False,
        seed: int = 0,
        foreach: bool | None = None,
        capturable: bool | None = None,
        fused: bool | None = None,
        _group_defaults: Mapping[str, Any] | None = None,
    ) -> None:
        check(
            anchors == "initial" or isinstance(anchors, Mapping), "anchors", anchors, 'must be "initial" or a mapping'
        )
        check(max_grad_norm is None or max_grad_norm > 0, "max_grad_norm", max_grad_norm, "must be > 0 or None")
        check(ema_decay is None or 0 <= ema_decay < 1, "ema_decay", ema_decay, "must be in [0, 1) or None")
        self.anchors = anchors
        self.max_grad_norm = max_grad_norm
        self.master_weights = master_weights
        self.ema_decay = ema_decay
        self.stochastic_rounding = stochastic_rounding
        self.static_grads = static_grads
        self._check_trainable(trainable)
        self.trainable = trainable
        self.seed = seed
        self._buckets: list[Bucket] = []
        # Where each parameter is: its bucket and its number there.
        self._places: dict[Tensor, tuple[Bucket, int]] = {}
        self._hyper = defaultdict(coefficients.HyperParameters)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "l2_sp": l2_sp,
            "maximize": maximize,
            "flatten": flatten,
            **(_group_defaults or {}),
        }
        self._check_group(defaults)
        super().__init__(params, defaults)

    # -- groups and buffers --------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group`; its parameters are moved into new buffers."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            self._check_parameters(group)
            self._add_buckets(group)
        except BaseException:
            self.param_groups.pop()
            raise

    def set_trainable(self, trainable: FishMask | None) -> None:
        """Train other weights from now on, as a new optimizer with the same parameter groups would.

        Groups, hyper-parameters, learning rate schedulers and counts of steps stay. Moments start anew, master weights
        and an average of the weights from the present ones, and with ``anchors="initial"`` so do anchors. Gradients are
        cleared.

        Args:
            trainable: which weights; None for all.

        Raises:
            ValueError: the mask does not fit; nothing has been changed then.
        """
        self._refuse_inside_ema("set_trainable()")
        self._check_trainable(trainable)
        before, self.trainable = self.trainable, trainable
        try:
            for group in self.param_groups:
                for i in range(len(group["params"]) if trainable is not None else 0):
                    self._trained(group, i)
        except BaseException:
            self.trainable = before
            raise
        # Also of parameters without a trained weight, which no bucket has.
        super().zero_grad()
        self.restore()
        self._start_anew()

    def _check_trainable(self, trainable: FishMask | None) -> None:
        fits = trainable is None or isinstance(trainable, FishMask)
        check(fits, "trainable", trainable, "must be a FishMask or None")
        check(trainable is None or not self.static_grads, "static_grads", True, "must be False with trainable")

    def _start_anew(self) -> None:
        """Make the buffers again, from the parameters as they are."""
        self._hyper = defaultdict(coefficients.HyperParameters)
        self._buckets, self._places, self.state = [], {}, defaultdict(dict)
        for group in self.param_groups:
            self._add_buckets(group)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        lr, betas = group["lr"], group["betas"]
        if isinstance(lr, Tensor):
            check(lr.numel() == 1, "learning rate", lr, "a tensor must have one element")
        else:
            check(_is_finite(lr) and lr >= 0, "learning rate", lr, "must be a finite number >= 0")
        check(isinstance(betas, tuple | list) and len(betas) == 2, "betas", betas, "must be two numbers")
        for i, beta in enumerate(betas):
            fits = isinstance(beta, Tensor) or (_is_finite(beta) and 0 <= beta < 1)
            check(fits, f"beta parameter at index {i}", beta, "must be in [0, 1)")
        for name in ("eps", "weight_decay", "l2_sp"):
            value = group[name]
            check(_is_finite(value) and value >= 0, f"{name} value", value, "must be a finite number >= 0")

    def _check_parameters(self, group: dict[str, Any]) -> None:
        extents = {}
        for i, p in enumerate(group["params"]):
            label = repr(group["param_names"][i]) if "param_names" in group else f"number {i}"
            check(not is_lazy(p), f"parameter {label}", "uninitialized", "run the model once before")
            # A quantised weight, say, whose numbers are not in its own memory.
            plain = is_sharded(p) or type(p.data) is Tensor
            check(plain, f"parameter {label}", type(p.data).__name__, "must be a plain tensor")
            fits = p.is_floating_point() and p.layout == torch.strided and not p.is_meta
            check(fits, f"parameter {label}", f"{p.dtype}, {p.layout}, {p.device}", "must be dense fp16/bf16/fp32/fp64")
            check(p.element_size() >= 2, f"parameter {label}", p.dtype, "must be fp16, bf16, fp32 or fp64")
            if is_sharded(p):
                check_placements(label, p)
                check(not self.static_grads, "static_grads", True, "must be False with sharded parameters")
            if local(p).numel():
                other = extents.setdefault((p.device, local(p).data_ptr()), label)
                check(
                    other == label,
                    f"parameter {label}",
                    f"shares its memory with parameter {other}",
                    "to tie them, make them one Parameter object",
                )

    def _add_buckets(self, group: dict[str, Any]) -> None:
        buckets = self._make_buckets(group)
        self._buckets += buckets
        self._places |= {p: (bucket, i) for bucket in buckets for i, p in enumerate(bucket.params)}

    def _make_buckets(self, group: dict[str, Any]) -> list[Bucket]:
        """The buckets of a group: one for each device, dtype and whatever else the passes must tell apart."""
        members: dict[tuple, list[int]] = {}
        for i, p in enumerate(group["params"]):
            key = (
                p.device,
                p.dtype,
                p.requires_grad,
                self._anchor(group, i) is not None,
                self._is_selectable(group, i),
            )
            if self.trainable is None and (is_sharded(p) or not group["flatten"]):
                key = (*key, i)
            if self.trainable is None or len(self._trained(group, i)):
                members.setdefault(key, []).append(i)
        buckets = []
        owners = owners_of(filter(is_sharded, group["params"]))
        for key, indices in members.items():
            params = [group["params"][i] for i in indices]
            if is_sharded(params[0]):
                bucket = ShardedBucket(params[0], group, selectable=key[4], owner=owners.get(params[0]))
            elif self.trainable is None:
                bucket = Bucket(params, group, flatten=group["flatten"], selectable=key[4])
            else:
                bucket = SparseBucket(params, group, [self._trained(group, i) for i in indices])
            if key[3]:
                lane = bucket.lane("anchor", bucket.dtype)
                for j, i in enumerate(indices):
                    bucket.read(self._anchor(group, i), j, lane)
            if self.master_weights and bucket.weight.element_size() == 2:
                bucket.lane("master", torch.float32).copy_(bucket.weight)
            buckets.append(bucket)
        return buckets

    def _anchor(self, group: dict[str, Any], i: int) -> Tensor | None:
        if group["l2_sp"] == 0:
            return None
        p = group["params"][i]
        if self.anchors == "initial":
            return p
        check("param_names" in group, "anchors", "a mapping", "needs parameter names: pass model.named_parameters()")
        name = group["param_names"][i]
        anchor = self.anchors.get(name)
        if anchor is not None:
            check(
                anchor.shape == p.shape, f"anchors[{name!r}]", tuple(anchor.shape), f"must have shape {tuple(p.shape)}"
            )
        return anchor

    def _trained(self, group: dict[str, Any], i: int) -> Tensor:
        """The weights of a parameter that are trained, as positions in row-major order."""
        check("param_names" in group, "trainable", "a FishMask", "needs parameter names: pass model.named_parameters()")
        name, p = group["param_names"][i], group["params"][i]
        check(not is_sharded(p), "trainable", "a FishMask", f"must be None: parameter {name!r} is sharded")
        shape = self.trainable.shapes.get(name)
        check(shape == p.shape, "trainable", f"a FishMask with {name!r} of shape {shape}", f"must be {tuple(p.shape)}")
        is_dense = p.stride() == torch.empty_like(p, device="meta").stride()
        check(is_dense, f"parameter {name!r}", f"strides {p.stride()}", "must be dense in memory with trainable")
        return self.trainable.indices(name).to(p.device)

    def _is_selectable(self, group: dict[str, Any], i: int) -> bool:
        return True

    # -- one step ------------------------------------------------------------------------------------------------------

    # It is compiled code already, a pass at a time; dynamo would trace what finds and checks the buffers.
    @torch._disable_dynamo
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

    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients.

        Args:
            set_to_none: set them to None, which is fastest; if False they stay the same tensors and become zero. Either
                way a parameter that gets no gradient afterwards is left alone by `step`. With `static_grads` this is
                always False.
        """
        for bucket in self._buckets:
            bucket.drop_grads(keep_views=self.static_grads or not set_to_none)
        if self.trainable is not None:
            # What has no trained weight is in no bucket.
            for p in (p for group in self.param_groups for p in group["params"] if p not in self._places):
                if set_to_none:
                    p.grad = None
                elif p.grad is not None:
                    p.grad = torch.zeros_like(p.grad)

    def _collect(self) -> list[tuple[Bucket, tuple[bool, ...]]]:
        """All buckets in which a parameter has a gradient, with which of them have."""
        self._refuse_inside_ema("a step")
        active = [(bucket, bucket.collect()) for bucket in self._buckets]
        return [(bucket, now) for bucket, now in active if any(now)]

    def _sum(self, parts: Iterable[tuple[Bucket, Tensor]]) -> Tensor:
        """Sum of fp64 tensors over buckets and their shards, on the first one's device."""
        return sum_over_shards(parts, self._buckets[0].device).double()

    def _update(self) -> None:
        """Restore, if perturbed, and apply AdamW with L2-SP."""
        collected = self._collect()
        self._allocate(collected)
        direction = self._direction(collected)
        updating = {id(bucket) for bucket, _ in collected}
        for bucket in self._buckets:
            if id(bucket) not in updating:
                bucket.restore()
        for bucket, active in collected:
            bucket.advance(active, may_skip=direction.skip is not None)
            if direction.skip is None and all(active):
                bucket.steps += 1
                continue
            now = torch.tensor(active).to(bucket.device, non_blocking=True)
            bucket.steps += now if direction.skip is None else now & ~direction.skip.to(bucket.device)
        runs = [(bucket, *run) for bucket, active in collected for run in bucket.runs(active)]
        for coef, run in zip(self._coefficients(runs, direction), runs, strict=True):
            self._update_run(run, coef, direction, zero_grad=self.static_grads)
        for bucket, active in collected:
            bucket.perturbed = self._stays_perturbed
            bucket.written()
            if self.static_grads:
                bucket.mark_grads_zeroed()
            if all(bucket.known):
                continue
            known = [before or now for before, now in zip(bucket.known, active, strict=True)]
            if known != bucket.known:
                bucket.known = known
                self._publish(bucket)

    # Whether passes need random numbers, also where nothing is rounded.
    _draws_elements = False
    # Whether an update leaves the weights perturbed, with the clean ones in the backup or the master.
    _stays_perturbed = False

    def _direction(self, collected: list[tuple[Bucket, tuple[bool, ...]]]) -> Direction:
        """What to multiply gradients with (unscaling, clipping), and on the device whether to skip the step."""
        norm_sq = None
        if self.max_grad_norm is not None and collected:
            norm_sq = self._sum((bucket, ops.grad_norm_sq(bucket.grad, None, None)) for bucket, _ in collected)
        return self._scaled(Direction(), norm_sq)

    def _scaled(self, direction: Direction, norm_sq: Tensor | None) -> Direction:
        """`direction` with unscaling and, given the squared norm of what it makes of the gradients, clipping."""
        factor: Tensor | float = 1.0
        skip = None
        if (scale := getattr(self, "grad_scale", None)) is not None:
            factor = 1.0 / scale.to(torch.float64)
        # GradScaler gives the number 0 where there was no gradient to check.
        if isinstance(found_inf := getattr(self, "found_inf", None), Tensor):
            skip = found_inf.squeeze() != 0
        if self.max_grad_norm is not None and norm_sq is not None:
            clip, overflow = coefficients.clip_factor(norm_sq, factor, self.max_grad_norm)
            factor = factor * clip
            skip = overflow if skip is None else skip | overflow
        other = direction.other
        if other is not None and not direction.keep:
            other = other * factor
        own = direction.factor * factor
        if skip is not None:
            own = torch.where(skip, float("nan"), own)
        return Direction(own, other, direction.keep, skip)

    def _allocate(self, collected: list[tuple[Bucket, tuple[bool, ...]]]) -> None:
        for bucket, _ in collected:
            narrow = bucket.dtype == torch.bfloat16 and "master" not in bucket.lanes
            # fp16 cannot hold squares of gradients: its moments are fp32 always.
            dtype = torch.bfloat16 if narrow else compute_dtype(bucket.dtype)
            for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if bucket.group["amsgrad"] else 2]:
                bucket.lane(name, dtype)
            if self.ema_decay is not None and "ema" not in bucket.lanes:
                clean = bucket.lanes.get("master", bucket.clean())
                bucket.lane("ema", compute_dtype(bucket.dtype)).copy_(clean)

    def _hyper_parameters(self, bucket: Bucket) -> tuple[float | Tensor, ...]:
        group = bucket.group
        if group["l2_sp"] != 0 and self.anchors == "initial" and "anchor" not in bucket.lanes:
            raise ValueError(
                "l2_sp was 0 when the optimizer was made, so no anchors were kept; "
                f"it cannot become {group['l2_sp']!r} later"
            )
        rate = group["l2_sp"] if "anchor" in bucket.lanes else group["weight_decay"]
        return (group["lr"], *group["betas"], group["eps"], rate, self._sign(group))

    @staticmethod
    def _sign(group: Mapping[str, Any]) -> float:
        return -1.0 if group["maximize"] else 1.0

    def _coefficients(self, runs: list[Run], direction: Direction) -> list[Tensor]:
        """Coefficients of each run of parameters that are updated together, on its device."""
        out: list[Tensor] = [torch.empty(0)] * len(runs)
        for device in {run[0].device for run in runs}:
            here = [i for i, run in enumerate(runs) if run[0].device == device]
            hyper = self._hyper["descent", device].rows([self._hyper_parameters(runs[i][0]) for i in here], device)
            steps = [runs[i][0].steps[runs[i][3]] for i in here]
            key = self._keys([runs[i][0] for i in here], steps, _UPDATE, [runs[i][1] for i in here])
            own, other = (
                value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for value in (direction.factor, direction.other)
            )
            if direction.keep:
                # The stored component is a gradient of the objective, whatever its sign in the update.
                other = other * hyper[:, 5]
            coefs = coefficients.descent(hyper, torch.stack(steps), own, key, other, self.ema_decay)
            for i, coef in zip(here, coefs, strict=True):
                out[i] = coef
        return out

    def _keys(self, buckets: list[Bucket], steps: Sequence[Tensor], purpose: int, offsets: Sequence[int]) -> Tensor:
        """Keys of the random numbers of a pass over each bucket, from one of its counts of steps or the largest."""
        device = steps[0].device
        rounds = self.stochastic_rounding and any(bucket.weight.element_size() == 2 for bucket in buckets)
        if not (rounds or self._draws_elements):
            return torch.zeros(len(buckets), dtype=torch.float64, device=device)
        order = {id(bucket): i for i, bucket in enumerate(self._buckets)}
        salt = [(self.seed * 0x9E3779B1 + order[id(b)] * 0xC2B2AE35 + purpose) & 0xFFFFFFFF for b in buckets]
        starts = [offset + bucket.shard_start for offset, bucket in zip(offsets, buckets, strict=True)]
        numbers = torch.tensor([salt, starts]).to(device, non_blocking=True)
        return coefficients.keys(torch.stack([step.max() for step in steps]), *numbers)

    def _update_run(self, run: Run, coef: Tensor, direction: Direction, zero_grad: bool) -> None:
        bucket, start, stop, _, active = run

        def part(flat: Tensor | None) -> Tensor | None:
            return flat if flat is None or (start == 0 and stop == bucket.size) else flat[start:stop]

        lanes = bucket.lanes
        other = None
        if direction.other is not None:
            other = bucket.orthogonal() if direction.keep else bucket.ascent_grad
        if not active and not self._stays_perturbed:
            if bucket.perturbed:
                part(bucket.weight).copy_(part(bucket.clean()))
            if direction.keep:
                part(other).mul_(-coef[9])
            return
        ops.adamw_l2sp_(
            part(bucket.weight),
            part(bucket.grad),
            part(lanes["exp_avg"]),
            part(lanes["exp_avg_sq"]),
            part(lanes["max_exp_avg_sq"]) if bucket.group["amsgrad"] else None,
            part(bucket.backup) if (bucket.perturbed or self._stays_perturbed) and "master" not in lanes else None,
            part(lanes.get("master")),
            part(lanes.get("anchor")),
            coef,
            self.stochastic_rounding,
            zero_grad,
            part(other),
            direction.keep,
            self._stays_perturbed,
            part(lanes.get("ema")),
        )
