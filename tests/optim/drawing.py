"""Draws training programs, by hypothesis."""

import functools

import torch
from hypothesis import strategies as st

from fsam_triton import FisherMask, Schedule
from tests.optim.programs import (
    LAYOUTS,
    AddGroup,
    Backward,
    ByHand,
    Change,
    Copy,
    Edit,
    Failed,
    Freeze,
    Halfway,
    Look,
    Modes,
    Pass,
    Perturb,
    Program,
    Restore,
    Resume,
    SetTrainable,
    Step,
    Stopped,
    Update,
    ZeroGrad,
)


@functools.cache
def _passes(count: int) -> st.SearchStrategy[Pass]:
    numbers = st.integers(0, count - 1)
    return st.builds(
        Pass,
        missing=st.one_of(st.just(frozenset()), st.frozensets(numbers, min_size=1, max_size=2)),
        bad=st.one_of(st.none(), st.none(), st.none(), st.tuples(numbers, st.sampled_from([torch.inf, torch.nan]))),
        assigned=st.booleans(),
    )


@functools.cache
def _groups(kind: str, eps: float) -> st.SearchStrategy[dict]:
    drawn = {
        "lr": st.sampled_from([0.01, 0.05]),
        "betas": st.sampled_from([(0.9, 0.999), (0.8, 0.95), (0.0, 0.9)]),
        "weight_decay": st.sampled_from([0.0, 0.5]),
        "l2_sp": st.sampled_from([0.0, 0.1]),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
    }
    if kind != "AdamWL2SP":
        drawn["rho"] = st.sampled_from([0.5, 0.05, 0.0])
    if kind == "FSAM":
        drawn["adaptive"] = st.booleans()
    return st.fixed_dictionaries({"eps": st.just(eps)}, optional=drawn)


_MASKS = st.builds(
    FisherMask,
    keep_ratio=st.sampled_from([0.6, 1.0]),
    interval=st.just(3),
    samples=st.sampled_from([1, 2]),
    excluded=st.sampled_from(["always", "never"]),
    unit=st.sampled_from(["element", "element", "element", "row"]),
) | st.builds(FisherMask, keep_ratio=st.sampled_from([0.34, 0.6]))

_SCHEDULES = {
    "FSAM": [
        Schedule(every=2),
        Schedule(rho_warmup=2),
        Schedule(rho_follows="cosine", total_steps=5, rho_min=0.01),
        Schedule(every=2, reuse=0.5),
    ],
    "MomentumSAM": [Schedule(rho_warmup=2), Schedule(last=0.5, total_steps=4)],
}


@st.composite
def _options(draw: st.DrawFn, kind: str) -> dict:
    options = {}

    def maybe(name: str, values: st.SearchStrategy) -> None:
        if draw(st.sampled_from([False, False, True])):
            options[name] = draw(values)

    maybe("max_grad_norm", st.just(1.0))
    maybe("flatten", st.just(True))
    if kind != "AdamWL2SP":
        maybe("schedule", st.sampled_from(_SCHEDULES[kind]))
    if kind == "FSAM":
        variant = draw(st.sampled_from(["sam", "sam", "alpha", "beta"]))
        reuses = "schedule" in options and options["schedule"].reuse > 0
        if variant == "alpha" and not reuses:
            options["alpha"] = 0.4
        elif variant == "beta":
            options["beta"] = 0.5
            options["beta_per"] = draw(st.sampled_from(["element", "element" if reuses else "tensor"]))
        maybe("mask", _MASKS)
        if "mask" in options:
            maybe("mask_norm", st.just("masked"))
    return options


@functools.cache
def _actions(kind: str, count: int, eps: float, can_choose: bool) -> st.SearchStrategy[list]:
    passes = st.tuples(_passes(count), _passes(count))
    fails = st.tuples(st.integers(0, 1), st.booleans(), st.sampled_from([Failed, Stopped]))
    steps = st.builds(Step, passes, st.one_of(st.none(), st.none(), fails))
    by_hand = st.builds(ByHand, passes, st.sampled_from([None, 1.0, 1024.0]))
    names = {"lr": [0.0, 0.002, 0.03], "weight_decay": [0.3]}
    if kind != "AdamWL2SP":
        names["rho"] = [0.0, 0.02, 0.7]
    changes = [Change(group, name, value) for group in (0, 1) for name in names for value in names[name]]
    others = [
        st.builds(Backward, _passes(count)),
        st.just(Update()),
        st.just(Restore()),
        st.builds(ZeroGrad, st.sampled_from(["none", "zeros", "model"])),
        st.sampled_from(changes),
        st.builds(AddGroup, st.sampled_from(["vector", "transposed", "scalar"]), _groups(kind, eps)),
        st.builds(Freeze, st.integers(1, max(count - 1, 1))),
        st.builds(
            Edit, st.integers(0, count - 1), st.sampled_from(["copy", "data", "replace", "load"]), st.integers(0, 3)
        ),
        st.just(Look()),
        st.just(Resume()),
        st.just(Copy()),
    ]
    if kind != "AdamWL2SP":
        others += [st.just(Perturb()), st.just(Perturb())]
    if kind == "MomentumSAM":
        others.append(st.builds(Modes, st.booleans()))
    if can_choose:
        others.append(st.builds(SetTrainable, st.sampled_from([None, 0.3, 0.6])))
    halfway = steps if kind == "AdamWL2SP" else st.builds(Halfway, _passes(count))
    action = st.one_of(steps, by_hand, halfway, halfway, *(st.one_of(others) for _ in range(4)))
    actions = st.lists(action, min_size=4, max_size=8)
    # Before a first step MomentumSAM has nothing to perturb along.
    return st.builds(lambda step, others: [step, *others], steps, actions) if kind == "MomentumSAM" else actions


@st.composite
def programs(draw: st.DrawFn, kind: str) -> Program:
    """Programs of four to eight actions with optimizers of this kind."""
    options = draw(_options(kind))
    can_choose = "mask" not in options
    keep = draw(st.sampled_from([None, None, 0.3, 0.6])) if can_choose else None
    layouts = [name for name in LAYOUTS if name != "gaps" or not can_choose]
    layouts = ("matrix", *draw(st.lists(st.sampled_from(layouts), min_size=1, max_size=4)))
    count = len(layouts)
    # What a combination of gradients leaves can be near zero: eps=1 keeps Adam's quotient well conditioned.
    eps = 1.0 if "alpha" in options else 1e-8
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    if dtype == torch.bfloat16:
        options["master_weights"] = draw(st.booleans())
    numbers = st.frozensets(st.integers(0, count - 1))
    return Program(
        kind,
        dtype,
        layouts,
        second_group=draw(st.sampled_from([count, *range(1, count)])),
        groups=draw(st.tuples(_groups(kind, eps), _groups(kind, eps))),
        options=options,
        anchored=draw(st.one_of(st.none(), numbers)),
        keep=keep,
        frozen=draw(st.one_of(st.just(frozenset()), numbers)) - {0},
        actions=tuple(draw(_actions(kind, count, eps, can_choose))),
    )
