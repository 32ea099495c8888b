"""Launches for tests of passes: tensors at awkward places, lanes, and what the reference makes of them."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from fsam_triton.kernels import reference, spec
from fsam_triton.kernels.segments import Plan, Segments
from tests.kernels.cases import FLOATS, assert_same_bits, ordinary, pairwise, random_mask

# Ragged ends, nothing, one element, several chunks and threads; the last one is transposed in memory.
SHAPES = [(3, 5), (1,), (0,), (2 * spec.CHUNK + 77,), (7,), (32,), (3 * spec.CHUNK,), (129, 33)]
ABSENT = 4
GUARD = 64


class Guarded:
    """Tensors of a user: each somewhere in a buffer of its own, at a place that only its type's size divides.

    Args:
        shapes: of the tensors; the last one's is transposed.
        make: makes the numbers, of a length, a type and a seed.
    """

    def __init__(self, shapes: Sequence[tuple], dtype: torch.dtype, seed: int, make: Callable = ordinary) -> None:
        lengths = [torch.Size(shape).numel() for shape in shapes]
        self.places = [slice(GUARD + i, GUARD + i + n) for i, n in enumerate(lengths)]
        self.buffers = []
        for i, (place, n) in enumerate(zip(self.places, lengths, strict=True)):
            self.buffers.append(torch.full((n + 3 * GUARD + i,), 3.0, dtype=dtype))
            self.buffers[-1][place] = make(n, dtype, seed + i)
        self.shapes = shapes

    def tensors(self, without: int | None = None) -> list[Tensor | None]:
        parts = [buffer[place] for buffer, place in zip(self.buffers, self.places, strict=True)]
        views = [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        views[-1] = views[-1].T
        return [None if i == without else view for i, view in enumerate(views)]

    def check(self, name: str) -> None:
        for buffer, place in zip(self.buffers, self.places, strict=True):
            outside = torch.cat((buffer[: place.start], buffer[place.stop :]))
            assert (outside == 3.0).all(), f"{name}: written outside of a tensor"


@dataclass
class Launch:
    """What a pass works on: tensors by column, lanes, and everything else."""

    plan: Plan
    columns: dict[str, Guarded]
    lanes: dict[str, Tensor | None] = field(default_factory=dict)
    rest: dict[str, object] = field(default_factory=dict)

    def segments(self) -> Segments:
        lists = {name: guarded.tensors() for name, guarded in self.columns.items()}
        # A gradient that is not there.
        grads = self.columns["grad"].tensors(without=ABSENT)
        return Segments(self.plan, **{**lists, "grad": grads})

    def lane(self, name: str, dtype: torch.dtype, seed: int, make: Callable = ordinary) -> None:
        """A new lane with zeros in its gaps."""
        self.lanes[name] = torch.zeros(self.plan.size, dtype=dtype)
        for i, n in enumerate(self.plan.lengths):
            self.plan.part(self.lanes[name], i).copy_(make(n, dtype, seed + i))

    def gaps(self, lane: Tensor) -> Tensor:
        used = torch.zeros(self.plan.size, dtype=torch.bool)
        for i in range(len(self.plan.lengths)):
            self.plan.part(used, i).fill_(True)
        return lane[~used]


def launch_of(dtype: str, columns: Sequence[str], grad: str | None = None, seed: int = 0, make=ordinary, shapes=SHAPES):
    types = dict.fromkeys(columns, FLOATS[dtype])
    makers = dict.fromkeys(columns, make)
    for name in {"grad", "other"} & types.keys():
        types[name] = torch.int8 if grad == "codes" else FLOATS[grad or dtype]
        makers[name] = any_integer if grad == "codes" else make
    tensors = {name: Guarded(shapes, types[name], seed + 100 * i, makers[name]) for i, name in enumerate(columns)}
    plan = Plan([torch.Size(shape).numel() for shape in shapes], torch.device("cpu"))
    return Launch(plan, tensors)


def keys(n: int, seed: int = 7) -> Tensor:
    return torch.randint(-(2**31), 2**31, (n,), generator=torch.Generator().manual_seed(seed)).to(torch.int32)


def exact_square_root(tensor: Tensor) -> Tensor:
    return torch.from_numpy(np.sqrt(tensor.numpy()))


def assert_as_the_reference(run: Callable, launch: Launch, module) -> Launch:
    """`run(module, launch)` leaves the bits that `run(reference, launch)` leaves, and writes nothing else.

    Both do the same IEEE operations, none of them fused; only eager PyTorch's square root may be wrong in the last bit.

    Returns:
        The launch after the module's pass.
    """
    compiled, eager = copy.deepcopy(launch), copy.deepcopy(launch)
    run(module, compiled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "sqrt", exact_square_root)
        run(reference, eager)
    for name, guarded in compiled.columns.items():
        guarded.check(name)
        for i, (actual, expected) in enumerate(zip(guarded.buffers, eager.columns[name].buffers, strict=True)):
            assert_same_bits(actual, expected, f"{name} {i}")
    for name, lane in compiled.lanes.items():
        if lane is None or name == "mask":
            continue
        actual, expected = lane, eager.lanes[name]
        if name == "remainder":
            # A master weight that is NaN has no remainder that means anything.
            for i, weight in enumerate(flat_weights(compiled)):
                parts = [compiled.plan.part(whole, i)[~weight.isnan()] for whole in (actual, expected)]
                assert torch.equal(*parts), f"{name} {i}"
        else:
            assert_same_bits(actual, expected, name)
        if len(lane) == compiled.plan.size:
            assert not compiled.gaps(lane).any(), f"{name}: a gap is written"
    return compiled


def flat_weights(launch: Launch) -> list[Tensor]:
    segments = launch.segments()
    return [segments.flat("weight", i) for i in range(len(launch.plan.lengths))]


# -- perturbation ------------------------------------------------------------------------------------------------------


def can_perturb(dtype: str, grad: str, steps: bool, **_) -> bool:
    if steps and dtype not in REMAINDERS:
        return False
    return grad == dtype or (dtype != "fp64" and grad in ("fp32", "codes"))


REMAINDERS = {"bf16": torch.int16, "fp16": torch.int32}
PERTURB = pairwise(
    can_perturb,
    dtype=list(FLOATS),
    grad=[*FLOATS, "codes"],
    steps=[False, True],
    adaptive=[False, True],
    masked=[False, True],
    stochastic=[False, True],
    random=[False, True],
)


def perturb(module, launch: Launch) -> None:
    rest = launch.rest
    row = {"scale": rest["scale"], "chance": -0.25}
    coef = torch.tensor([[row[name] for name in spec.PERTURB]] * len(launch.plan.lengths), dtype=rest["compute"])
    coef[:, spec.PERTURB.index("scale")] *= 1 + torch.arange(len(coef))
    flags = (rest["adaptive"], rest["stochastic"], rest["random"])
    flags = (*flags, launch.lanes.get("scale"))
    module.perturb_(launch.segments(), launch.lanes["backup"], launch.lanes["mask"], coef, keys(len(coef)), *flags)


def perturb_launch(
    dtype, grad=None, steps=False, masked=False, adaptive=False, stochastic=True, random=False, **more
) -> Launch:
    launch = launch_of(dtype, ("weight", "grad"), grad, **more)
    launch.lanes["backup"] = torch.zeros(launch.plan.size, dtype=torch.int8 if steps else FLOATS[dtype])
    if grad == "codes":
        launch.lanes["scale"] = scales(launch.plan.size, seed=6)
    launch.lanes["mask"] = random_mask(launch.plan.size, seed=5) if masked else None
    compute = reference.compute_dtype(FLOATS[dtype])
    launch.rest = {"adaptive": adaptive, "stochastic": stochastic, "random": random, "compute": compute}
    launch.rest["scale"] = 0.03
    return launch


# -- update ------------------------------------------------------------------------------------------------------------


def possible(dtype, state, rule, lanes, remainder, moved, **_) -> bool:
    if state != dtype and (state not in ("fp32", "bf16", "codes") or dtype == "fp64"):
        return False
    # Its momentum is all that it has.
    if rule == "lion" and lanes != "all":
        return False
    if moved == "steps" and dtype not in REMAINDERS:
        return False
    return remainder == "none" or dtype == "bf16" or (dtype == "fp16" and remainder == "32bit")


DESCEND = pairwise(
    possible,
    rule=list(spec.DESCEND),
    dtype=list(FLOATS),
    state=[*FLOATS, "codes"],
    lanes=["all", "last missing"],
    second=["none", "added", "orthogonal"],
    anchor=[False, True],
    ema=[False, True],
    stochastic=[False, True],
    remainder=["none", "32bit", "24bit"],
    moved=["no", "copied", "steps"],
)
HYPER = {"factor": 0.7, "other": -0.4, "rate": 0.1, "decay": 1e-3, "new1": 0.1, "beta1": 0.9, "beta2": 0.99}
HYPER |= {"new2": 0.01, "step_size": 1e-2, "inv_sqrt_bias2": 1.3, "eps": 1e-8, "momentum": 0.9, "new": 0.5}
HYPER |= {"of_grad": 0.3, "of_buffer": 0.6, "lr": 1e-2}


def descend(module, launch: Launch) -> None:
    rest, lanes = launch.rest, launch.lanes
    columns = spec.DESCEND[rest["rule"]]
    rows = [[rest["hyper"][name] for name in columns]] * len(launch.plan.lengths)
    coef = torch.tensor(rows, dtype=rest["compute"])
    coef[:, columns.index("factor")] *= 1 + torch.arange(len(coef)) / 10
    # Of one segment the update is skipped, of another one the average stays.
    coef[1, columns.index("factor")] = coef[5, columns.index("rate")] = float("nan")
    state = [lane for name, lane in lanes.items() if name in spec.STATE[rest["rule"]]]
    others = (lanes.get(name) for name in ("remainder", "anchor", "ema", "orthogonal"))
    more = (keys(len(coef)), rest["rule"], rest["stochastic"], scales_of(launch), lanes.get("steps"))
    module.descend_(launch.segments(), state, *others, coef, *more)


def scales_of(launch: Launch) -> list[Tensor]:
    return [lane for name, lane in launch.lanes.items() if name.endswith("_scale")]


def descend_launch(
    rule="adamw",
    dtype="fp32",
    state=None,
    lanes="last missing",
    second="none",
    anchor=False,
    ema=False,
    stochastic=True,
    remainder="none",
    moved="no",
    make=ordinary,
    hyper=HYPER,
    seed=0,
    shapes=SHAPES,
) -> Launch:
    columns = ["weight", "grad", *(["clean"] if moved == "copied" else []), *(["other"] if second != "none" else [])]
    launch = launch_of(dtype, columns, make=make, seed=seed, shapes=shapes)
    names = spec.STATE[rule] if lanes == "all" else spec.STATE[rule][:-1]
    compute = reference.compute_dtype(FLOATS[dtype])
    for i, name in enumerate(names):
        own = 1000 * (i + 1) + seed
        if state == "codes":
            launch.lane(name, torch.uint8 if name.endswith("_sq") else torch.int8, own, any_integer)
            launch.lanes[f"{name}_scale"] = scales(launch.plan.size, own)
            continue
        launch.lane(name, FLOATS[state or dtype], own, make)
        if name.endswith("_sq"):
            launch.lanes[name].abs_()
    if remainder != "none":
        launch.lane("remainder", torch.int8 if remainder == "24bit" else REMAINDERS[dtype], 5000, any_integer)
    if moved == "steps":
        launch.lane("steps", torch.int8, 5500, any_integer)
    for name, dtype_of, wanted in (
        ("anchor", FLOATS[dtype], anchor),
        ("ema", compute, ema),
        ("orthogonal", FLOATS[dtype], second == "orthogonal"),
    ):
        if wanted:
            launch.lane(name, dtype_of, 6000 + len(name), make)
    launch.rest = {"rule": rule, "stochastic": stochastic, "compute": compute, "hyper": hyper}
    return launch


def any_integer(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    # What 32 bits keep of a master weight does not need more than 16 of them.
    info = torch.iinfo(torch.int16 if dtype == torch.int32 else dtype)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(info.min, info.max + 1, (n,), generator=generator, dtype=torch.int64).to(dtype)


def scales(size: int, seed: int) -> Tensor:
    """Of groups of codes in a lane: of all magnitudes, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-40, 20, (size // spec.GROUP,), generator=generator)
    return torch.where(exponents < -36, 0.0, 1.37 * torch.exp2(exponents.float())).bfloat16()
