"""The FSAM code's names for optimizers: the arguments they make, that they train, and what is refused by which name."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, ArgumentError, FisherMask, Schedule
from fsam_triton.optim.recipes import SAM_TYPES, arguments_of
from tests.problem import small_model
from tests.training import assert_same_bits, train

pytestmark = pytest.mark.usefixtures("one_thread")

NAN, INF = float("nan"), float("inf")
ESAM = {"beta": 0.5, "beta_per": "tensor", "gamma": 0.5}
EXPECTED = {
    "sam": {"rho": 0.05},
    "esam": {"rho": 0.05, **ESAM},
    "gsam": {"rho": 0.05, "alpha": 0.4},
    "fisher-sam": {"rho": 0.05, "mask": FisherMask(0.1, interval=100)},
    "fisher-esam": {"rho": 0.05, **ESAM, "mask": FisherMask(0.1, interval=100)},
    "fisher-gsam": {"rho": 0.05, "alpha": 0.4, "mask": FisherMask(0.1, interval=100)},
}
every_type = pytest.mark.parametrize("sam_type", SAM_TYPES)
GSAM_TYPES = [sam_type for sam_type in SAM_TYPES if "gsam" in sam_type]
OTHER_TYPES = [sam_type for sam_type in SAM_TYPES if "gsam" not in sam_type]


@every_type
def test_arguments_by_default(sam_type):
    assert arguments_of(sam_type) == EXPECTED[sam_type]
    assert set(EXPECTED) == set(SAM_TYPES)


@every_type
def test_every_type_takes_what_the_scripts_pass_to_all_of_them(sam_type):
    given = {"rho": 0.2, "beta": 0.6, "gamma": 0.7, "keep_ratio": 0.3, "mask_iter_e": 7}
    used = {"rho": 0.2, "beta": 0.6, "gamma": 0.7, "mask": FisherMask(0.3, interval=7)}
    expected = {name: used.get(name, value) for name, value in EXPECTED[sam_type].items()}
    assert arguments_of(sam_type, **given) == expected


@pytest.mark.parametrize("sam_type", GSAM_TYPES)
@pytest.mark.parametrize(("given", "lowest"), [({}, 0.02), ({"rho_min": 0.0}, 0.0), ({"rho_min": 0.1}, 0.1)])
def test_gsam_types_take_a_schedule_of_rho(sam_type, given, lowest):
    out = arguments_of(sam_type, rho=0.2, alpha=0.1, max_updates_gsam=50, warmup_updates_gsam=5, **given)
    schedule = Schedule(rho_follows="cosine", total_steps=50, rho_warmup=5, rho_min=lowest)
    assert dataclasses.replace(out["schedule"], rho_min=lowest) == schedule
    assert out["schedule"].rho_min == pytest.approx(lowest)
    assert out["alpha"] == 0.1


@every_type
def test_any_other_argument_of_fsam_goes_before_what_the_type_makes(sam_type):
    mask = FisherMask(0.5)
    out = arguments_of(sam_type, adaptive=True, mask=mask, weight_decay=0.3)
    assert out == {**EXPECTED[sam_type], "adaptive": True, "mask": mask, "weight_decay": 0.3}


@every_type
def test_from_sam_type_is_fsam_with_those_arguments_to_the_bit(sam_type):
    model, twin = small_model(), small_model()
    shared = {"rho": 0.5, "keep_ratio": 0.3, "mask_iter_e": 3, "gamma": 1.0}
    train(model, FSAM.from_sam_type(sam_type, model.named_parameters(), 0.01, **shared, l2_sp=0.1), 5)
    train(twin, FSAM(twin.named_parameters(), 0.01, **arguments_of(sam_type, **shared), l2_sp=0.1), 5)
    assert_same_bits(model, twin)


def classification() -> tuple[nn.Module, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 4)
    inputs = torch.randn(30, 8, generator=generator)
    return model, {"inputs": inputs, "labels": inputs[:, :3].argmax(1)}


@every_type
def test_twenty_steps_lower_the_loss(sam_type):
    model, batch = classification()

    def closure(batch):
        return nn.functional.cross_entropy(model(batch["inputs"]), batch["labels"], reduction="none")

    optimizer = FSAM.from_sam_type(sam_type, model.named_parameters(), 0.02, mask_iter_e=5)
    losses = [float(optimizer.step(closure, batch).mean()) for _ in range(20)]
    # Adam moves every weight by about 0.02 a step at first: 0.4 in all, as much as the weights themselves are.
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.isfinite().all() for p in model.parameters())


# -- refused -----------------------------------------------------------------------------------------------------------


def assert_refused(sam_type: str, name: str, value, **others) -> str:
    model = small_model()
    with pytest.raises(ArgumentError) as error:
        FSAM.from_sam_type(sam_type, model.named_parameters(), **{name: value, **others})
    assert (error.value.name, repr(error.value.value)) == (name, repr(value))
    return error.value.allowed


@pytest.mark.parametrize("sam_type", ["SAM", "asam", "", "fisher_sam", None])
def test_unknown_type_is_refused_with_those_there_are(sam_type):
    with pytest.raises(ArgumentError, match=r"one of sam, esam, .*fisher-gsam") as error:
        FSAM.from_sam_type(sam_type, small_model().named_parameters())
    assert (error.value.name, error.value.value) == ("sam_type", sam_type)


@every_type
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("rho", value) for value in (-0.1, NAN)),
        *((name, value) for name in ("beta", "gamma", "keep_ratio") for value in (0, 0.0, 1.5, -0.5, NAN)),
        *(("mask_iter_e", value) for value in (0, -1, 0.5, NAN)),
        *(("max_updates_gsam", value) for value in (-1, NAN)),
    ],
)
def test_every_type_checks_every_argument_that_it_takes(sam_type, name, value):
    assert_refused(sam_type, name, value)


@pytest.mark.parametrize("sam_type", OTHER_TYPES)
@pytest.mark.parametrize(("name", "value"), [("alpha", 0.4), ("alpha", 0.0), ("alpha", NAN), ("max_updates_gsam", 10)])
def test_argument_of_the_gsam_types_is_refused_by_the_others(sam_type, name, value):
    assert f"sam_type={sam_type!r}" in assert_refused(sam_type, name, value)


@pytest.mark.parametrize("sam_type", OTHER_TYPES)
@pytest.mark.parametrize(("name", "value"), [("warmup_updates_gsam", 3), ("rho_min", 0.01), ("rho_min", NAN)])
def test_schedule_of_the_gsam_types_is_refused_by_the_others(sam_type, name, value):
    assert f"sam_type={sam_type!r}" in assert_refused(sam_type, name, value)


@pytest.mark.parametrize("sam_type", GSAM_TYPES)
@pytest.mark.parametrize(
    ("name", "value", "others"),
    [
        ("alpha", -0.1, {}),
        ("alpha", NAN, {}),
        ("max_updates_gsam", 2.5, {}),
        ("max_updates_gsam", True, {}),
        ("warmup_updates_gsam", 3, {}),
        ("warmup_updates_gsam", -1, {"max_updates_gsam": 10}),
        ("warmup_updates_gsam", 11, {"max_updates_gsam": 10}),
        ("warmup_updates_gsam", 2.5, {"max_updates_gsam": 10}),
        ("warmup_updates_gsam", NAN, {"max_updates_gsam": 10}),
        ("rho_min", 0.01, {}),
        ("rho_min", NAN, {}),
        ("rho_min", NAN, {"max_updates_gsam": 10}),
        ("rho_min", -0.1, {"max_updates_gsam": 10}),
        ("rho_min", 0.3, {"max_updates_gsam": 10, "rho": 0.2}),
        ("rho", -0.1, {"max_updates_gsam": 10}),
        ("rho", NAN, {"max_updates_gsam": 10}),
    ],
)
def test_bad_argument_of_a_gsam_type_is_refused_by_the_name_it_was_given(sam_type, name, value, others):
    assert_refused(sam_type, name, value, **others)


@pytest.mark.parametrize("sam_type", ["fisher-sam", "fisher-esam", "fisher-gsam"])
def test_keep_ratio_that_selects_nothing_is_refused(sam_type):
    # 512 of the weights are in matrices.
    assert "of 512 weights" in assert_refused(sam_type, "keep_ratio", 1 / 513)
    FSAM.from_sam_type(sam_type, small_model().named_parameters(), keep_ratio=1 / 512)
