"""Schedule: which steps are sharpness-aware, the radius at each, and what is refused."""

import dataclasses
import io
import math
import re

import numpy as np
import pytest
import torch

from fsam_triton import ArgumentError, Schedule


def sharp(schedule: Schedule, steps: int) -> list[int]:
    return [step for step in range(steps) if schedule.is_sharp(step)]


def radii(schedule: Schedule, steps: int, rho: float = 0.5, lr=0.1, lr_max=0.1) -> list:
    return [schedule.rho(step, rho, lr, lr_max) for step in range(steps)]


# -- when --------------------------------------------------------------------------------------------------------------


def test_every_step_is_sharp_by_default_with_the_rho_of_the_group():
    assert sharp(Schedule(), 5) == [0, 1, 2, 3, 4]
    assert radii(Schedule(), 3) == [0.5, 0.5, 0.5]


def test_every_third_step_begins_with_the_first():
    assert sharp(Schedule(every=3), 8) == [0, 3, 6]


def test_only_the_last_fraction_is_sharp():
    assert sharp(Schedule(last=0.3, total_steps=10), 10) == [7, 8, 9]


def test_every_second_step_of_the_last_part_begins_with_its_first():
    assert sharp(Schedule(every=2, last=0.5, total_steps=10), 10) == [5, 7, 9]


@pytest.mark.parametrize(
    ("last", "total", "first"), [(1.0, 10, 0), (0.5, 10, 5), (0.26, 10, 7), (0.001, 10, 9), (0.001, 1, 0)]
)
def test_range_is_rounded_and_has_at_least_one_step(last, total, first):
    schedule = Schedule(last=last, total_steps=total)
    assert schedule.first == first
    assert sharp(schedule, total) == list(range(first, total))


def test_range_begins_at_zero_when_the_total_is_unknown():
    assert Schedule(every=2).first == 0


def test_steps_beyond_the_total_are_like_those_at_the_end():
    assert sharp(Schedule(every=2, last=0.5, total_steps=6), 12) == [3, 5, 7, 9, 11]


# -- with which rho ----------------------------------------------------------------------------------------------------


def test_warmup_rises_linearly_from_zero_to_the_full_rho():
    assert radii(Schedule(rho_warmup=4), 6) == [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]


def test_warmup_counts_from_the_first_step_in_range():
    assert radii(Schedule(last=0.5, total_steps=8, rho_warmup=2), 8)[4:] == [0.0, 0.25, 0.5, 0.5]


def test_rho_before_the_range_is_never_negative():
    assert radii(Schedule(last=0.5, total_steps=8, rho_warmup=2), 4) == [0.0] * 4


@pytest.mark.parametrize("lr", [0.0, 0.01, 0.05, 0.1])
def test_rho_is_proportional_to_the_learning_rate(lr):
    (rho,) = radii(Schedule(rho_follows="lr", rho_min=0.1), 1, lr=lr)
    assert rho == pytest.approx(0.1 + (0.5 - 0.1) * lr / 0.1)


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["float", "tensor"])
@pytest.mark.parametrize("rho_min", [0.0, 0.1])
def test_learning_rate_above_its_maximum_takes_rho_no_higher(rho_min, kind):
    assert radii(Schedule(rho_follows="lr", rho_min=rho_min), 1, lr=kind(0.2)) == [0.5]
    assert radii(Schedule(rho_follows="lr", rho_min=rho_min, lr_max=0.15), 1, lr=kind(10.0)) == [0.5]


def test_rho_follows_a_tensor_learning_rate_without_reading_it():
    schedule = Schedule(rho_follows="lr", rho_min=0.1)
    rho = schedule.rho(0, 0.5, torch.tensor(0.05, dtype=torch.float64), 0.1)
    assert isinstance(rho, torch.Tensor)
    assert rho.item() == pytest.approx(0.3)
    # A meta tensor has no value: anything that read one would raise.
    assert schedule.rho(0, 0.5, torch.tensor(0.05, device="meta"), torch.tensor(0.1, device="meta")).is_meta


def test_learning_rate_is_ignored_unless_rho_follows_it():
    assert Schedule(rho_warmup=2).rho(5, 0.5, torch.tensor(0.0, device="meta"), 0.0) == 0.5


def test_lr_max_of_the_schedule_goes_before_that_of_the_group():
    assert radii(Schedule(rho_follows="lr", lr_max=0.4), 1, lr=0.1, lr_max=0.1) == [0.125]


def test_learning_rate_of_zero_as_its_own_maximum_is_refused():
    with pytest.raises(ArgumentError, match=r"Schedule\(lr_max=") as error:
        Schedule(rho_follows="lr").rho(0, 0.5, 0.0, 0.0)
    assert (error.value.name, error.value.value) == ("lr_max", 0.0)


def test_cosine_falls_from_rho_to_rho_min_at_the_total_and_stays_there():
    schedule = Schedule(rho_follows="cosine", rho_min=0.1, total_steps=8)
    expected = [0.1 + 0.4 * (math.cos(math.pi * t / 8) + 1) / 2 for t in range(8)]
    assert radii(schedule, 11) == pytest.approx([*expected, 0.1, 0.1, 0.1])
    assert radii(schedule, 11)[0] == 0.5
    assert radii(schedule, 11)[8:] == [0.1, 0.1, 0.1]


def test_cosine_begins_after_the_warmup():
    """phase = (t - warmup) / (total - warmup) * pi, factor = (cos(phase) + 1) / 2; before it t / warmup."""
    schedule = Schedule(rho_follows="cosine", rho_warmup=2, total_steps=6)
    half = [(math.cos(math.pi * t / 4) + 1) / 4 for t in range(4)]
    assert radii(schedule, 7) == pytest.approx([0.0, 0.25, *half, 0.0])


def test_cosine_spans_the_steps_in_range():
    late = Schedule(rho_follows="cosine", rho_warmup=1, last=0.5, total_steps=8)
    whole = Schedule(rho_follows="cosine", rho_warmup=1, total_steps=4)
    assert radii(late, 8)[4:] == radii(whole, 4)


def test_warmup_may_fill_the_range():
    assert radii(Schedule(rho_follows="cosine", rho_min=0.1, rho_warmup=4, total_steps=4), 6) == [
        *(0.0, 0.125, 0.25, 0.375),
        *(0.1, 0.1),
    ]


@pytest.mark.parametrize("arguments", [{"rho_follows": "lr"}, {"rho_follows": "cosine", "total_steps": 4}])
@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_rho_below_rho_min_is_never_raised(arguments, rho):
    assert radii(Schedule(**arguments, rho_min=0.1), 6, rho, lr=0.02) == [rho] * 6


# -- as plain values ---------------------------------------------------------------------------------------------------

FULL = {"every": 5, "reuse": 0.7, "last": 0.3, "total_steps": 100, "rho_warmup": 3, "rho_follows": "cosine"}


@pytest.mark.parametrize("schedule", [Schedule(), Schedule(**FULL), Schedule(rho_follows="lr", lr_max=0.1)])
def test_as_dict_makes_an_equal_schedule(schedule):
    assert Schedule(**schedule.as_dict()) == schedule


def test_as_dict_has_every_field_and_survives_a_safe_load():
    schedule = Schedule(every=2, reuse=np.float64(0.5))
    values = schedule.as_dict()
    assert set(values) == {field.name for field in dataclasses.fields(Schedule)}
    assert {type(value) for value in values.values()} <= {int, float, str, type(None)}
    buffer = io.BytesIO()
    torch.save(values, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == values


def test_schedule_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Schedule().every = 2


# -- refused -----------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value", "others", "allowed"),
    [
        *(("every", value, {}, "an int >= 1") for value in (0, -1, 1.0, 2.5, True, "2", None)),
        *(("total_steps", value, {}, "an int >= 1 or None") for value in (0, 10.0, True)),
        *(("rho_warmup", value, {}, "an int >= 0") for value in (-1, 1.0, False, None)),
        *(("reuse", value, {"every": 2}, "finite number >= 0") for value in (-0.1, NAN, INF, True, "1", None)),
        ("reuse", 0.5, {}, "every > 1"),
        *(("last", value, {"total_steps": 10}, r"in \(0, 1\]") for value in (0.0, -0.5, 1.5, NAN, True, None)),
        ("last", 0.5, {}, "total_steps"),
        ("rho_follows", "loss", {}, '"lr", "cosine" or None'),
        ("rho_follows", "cosine", {}, "total_steps"),
        ("rho_warmup", 11, {"total_steps": 10}, "at most 10"),
        ("rho_warmup", 6, {"total_steps": 10, "last": 0.5}, "at most 5"),
        ("rho_warmup", 1, {"rho_follows": "lr"}, "learning rate has its own"),
        *(("rho_min", value, {"rho_follows": "lr"}, "finite number >= 0") for value in (-0.1, NAN, INF, False)),
        ("rho_min", 0.1, {}, "rho_follows"),
        *(("lr_max", value, {"rho_follows": "lr"}, "> 0") for value in (0.0, -1.0, NAN, INF, True)),
        ("lr_max", 0.1, {}, 'rho_follows="lr"'),
        ("lr_max", 0.1, {"rho_follows": "cosine", "total_steps": 10}, 'rho_follows="lr"'),
    ],
)
def test_bad_argument_is_named_with_its_value_and_what_is_allowed(name, value, others, allowed):
    with pytest.raises(ArgumentError) as error:
        Schedule(**{name: value, **others})
    assert (error.value.name, repr(error.value.value)) == (name, repr(value))
    assert re.search(allowed, error.value.allowed)


def test_smallest_arguments_are_accepted():
    schedule = Schedule(every=1, reuse=0, last=1, total_steps=1, rho_warmup=0, rho_follows="lr", rho_min=0, lr_max=1)
    assert sharp(schedule, 2) == [0, 1]
