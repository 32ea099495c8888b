"""torch.amp.GradScaler: both passes scaled, `perturb(scaler)` between them, overflows in either.

Scales are powers of two, so scaled gradients have the digits of the unscaled ones, and results can be compared to the
bit.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode

from fsam_triton import FSAM, AdamWL2SP, FisherMask, FishMask, MomentumSAM, Schedule
from tests.reference import Problem, small_model
from tests.training import assert_same_bits, assert_unchanged, closure_of, passes_of, several_groups, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS = {
    "sam": {},
    "adaptive": {"adaptive": True},
    "fisher": {"mask": FisherMask(0.3)},
    "fisher_interval": {"mask": FisherMask(0.3, interval=2)},
    "fisher_samples": {"mask": FisherMask(0.3, interval=4, samples=3, excluded="never"), "mask_norm": "masked"},
    "gsam": {"alpha": 0.4},
    "fisher_gsam": {"alpha": 0.4, "mask": FisherMask(0.3, interval=3), "max_grad_norm": 3.0},
    "esam": {"beta": 0.5},
    "esam_tensors": {"beta": 0.5, "beta_per": "tensor"},
    "looksam": {"schedule": Schedule(every=2, reuse=0.7)},
    "warm_up": {"schedule": Schedule(rho_warmup=4), "l2_sp": 0.1},
    "clipped": {"max_grad_norm": 3.0},
    "static_grads": {"static_grads": True, "alpha": 0.4},
}
every_variant = pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())

PRECISIONS = {
    "fp64": (torch.float64, {}),
    "fp32": (torch.float32, {}),
    "fp16": (torch.float16, {}),
    "fp16_master": (torch.float16, {"master_weights": True}),
}
every_precision = pytest.mark.parametrize(("dtype", "kwargs"), PRECISIONS.values(), ids=PRECISIONS.keys())

# How either pass can overflow: a coordinate becomes this.
NON_FINITE = [float("inf"), float("nan")]


def pair(dtype=torch.float32, **kwargs) -> tuple[nn.ModuleDict, FSAM]:
    model = small_model(dtype)
    return model, FSAM(model.named_parameters(), **{"lr": 0.01, "rho": 0.5, **kwargs})


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 3.0)


def nothing(model: nn.Module) -> None:
    pass


def scaled_step(
    model: nn.Module,
    optimizer: FSAM,
    scaler: GradScaler,
    step: int,
    *,
    first: Callable[[nn.Module], None] = nothing,
    second: Callable[[nn.Module], None] = nothing,
    unscale: bool = False,
) -> None:
    """A step with passes as in `train_apart`; `first` and `second` may change the gradients of the two passes."""
    optimizer.zero_grad()
    at, again = passes_of(step)
    scaler.scale(Problem().loss(model.parameters(), at)).backward()
    first(model)
    if optimizer.is_sharp:
        optimizer.perturb(scaler)
        scaler.scale(Problem().loss(model.parameters(), again)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    second(model)
    scaler.step(optimizer)
    scaler.update()


def plain_step(model: nn.Module, optimizer: FSAM, step: int, second: Callable[[nn.Module], None] = nothing) -> None:
    """The same without a scaler."""
    scaled_step(model, optimizer, GradScaler("cpu", enabled=False), step, second=second)


def spoil_with(value: float) -> Callable[[nn.Module], None]:
    def spoil(model: nn.Module) -> None:
        model["dense"].weight.grad[3, 5] = value

    return spoil


def moments_of(optimizer) -> list[Tensor]:
    """Copies of everything in the state but masks: moments, counts, anchors, master weights."""
    state = optimizer.state_dict()["state"]
    return [v.clone() for entry in state.values() for name, v in entry.items() if name != "mask"]


def assert_same_moments(optimizer, expected: list[Tensor]) -> None:
    for actual, wanted in zip(moments_of(optimizer), expected, strict=True):
        assert torch.equal(actual, wanted)


def assert_finite(model: nn.Module, optimizer) -> None:
    assert all(value.isfinite().all() for value in [*model.parameters(), *moments_of(optimizer)])


# -- no overflow -------------------------------------------------------------------------------------------------------


@every_variant
def test_steps_under_a_growing_scale_equal_unscaled_ones_to_the_bit(kwargs):
    (model, optimizer), (twin, straight) = pair(**kwargs), pair(**kwargs)
    scaler = GradScaler("cpu", init_scale=256.0, growth_interval=2)
    for step in range(8):
        scaled_step(model, optimizer, scaler, step)
        plain_step(twin, straight, step)
    assert scaler.get_scale() == 256.0 * 2**4
    assert_same_bits(model, twin)


@every_precision
@pytest.mark.parametrize("variant", ["sam", "gsam", "fisher"])
def test_steps_in_every_precision_equal_unscaled_ones_to_the_bit(variant, dtype, kwargs):
    """Gradients are at least 0.5 and at most 1.5, and so their multiples by 256 are normal numbers of fp16."""
    kwargs = {**kwargs, **VARIANTS[variant]}
    (model, optimizer), (twin, straight) = pair(dtype, **kwargs), pair(dtype, **kwargs)
    scaler = GradScaler("cpu", init_scale=256.0)
    for step in range(5):
        scaled_step(model, optimizer, scaler, step)
        plain_step(twin, straight, step)
    assert_same_bits(model, twin)


def test_groups_with_radii_of_their_own_equal_unscaled_ones_to_the_bit():
    model, twin = small_model(), small_model()
    optimizer, straight = FSAM(several_groups(model)), FSAM(several_groups(twin))
    scaler = GradScaler("cpu", init_scale=1024.0)
    for step in range(5):
        scaled_step(model, optimizer, scaler, step)
        plain_step(twin, straight, step)
    assert_same_bits(model, twin)


def test_steps_of_selected_weights_equal_unscaled_ones_to_the_bit():
    scores = {name: p.detach().abs() for name, p in small_model().named_parameters()}
    trainable = FishMask.from_scores(scores, keep_ratio=0.3)
    (model, optimizer), (twin, straight) = pair(trainable=trainable), pair(trainable=trainable)
    scaler = GradScaler("cpu", init_scale=256.0, growth_interval=2)
    for step in range(5):
        scaled_step(model, optimizer, scaler, step)
        plain_step(twin, straight, step)
    assert_same_bits(model, twin)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**40])
def test_perturbation_is_that_of_the_unscaled_gradients_however_small_they_are(scale):
    """Gradients of norm 1e-12 or so, which counts beside the 1e-12 in eps = rho * g / (norm(g) + 1e-12)."""
    (model, optimizer), (twin, straight) = pair(torch.float64), pair(torch.float64)
    scaler = GradScaler("cpu", init_scale=scale)
    scaler.scale(2.0**-44 * Problem().loss(model.parameters(), 0)).backward()
    optimizer.perturb(scaler)
    (2.0**-44 * Problem().loss(twin.parameters(), 0)).backward()
    straight.perturb()
    assert_same_bits(model, twin)
    moved = torch.cat([(p - w).flatten() for p, w in zip(model.parameters(), small_model().parameters(), strict=True)])
    assert 0.1 < float(moved.detach().norm()) / 0.5 < 0.9


@every_variant
def test_users_clipping_of_unscaled_gradients_equals_that_without_a_scaler_to_the_bit(kwargs):
    (model, optimizer), (twin, straight) = pair(**kwargs), pair(**kwargs)
    scaler = GradScaler("cpu", init_scale=256.0, growth_interval=2)
    for step in range(6):
        scaled_step(model, optimizer, scaler, step, unscale=True, second=clip)
        plain_step(twin, straight, step, second=clip)
    assert_same_bits(model, twin)


def test_switched_off_scaler_is_none():
    (model, optimizer), (twin, straight) = pair(alpha=0.4), pair(alpha=0.4)
    scaler = GradScaler("cpu", enabled=False)
    scaled_step(model, optimizer, scaler, 0, unscale=True)
    Problem().loss(twin.parameters(), 0).backward()
    straight.perturb()
    Problem().loss(twin.parameters(), 1).backward()
    straight.step()
    assert_same_bits(model, twin)


# -- overflow in the first pass ----------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("value", NON_FINITE)
def test_overflow_in_the_first_pass_perturbs_nothing(kwargs, value):
    model, optimizer = pair(**kwargs)
    scaler = GradScaler("cpu")
    scaler.scale(Problem().loss(model.parameters(), 0)).backward()
    spoil_with(value)(model)
    optimizer.perturb(scaler)
    assert_same_bits(model, small_model())


@every_precision
def test_overflow_in_the_first_pass_perturbs_nothing_in_any_precision(dtype, kwargs):
    model, optimizer = pair(dtype, adaptive=True, **kwargs)
    scaler = GradScaler("cpu", init_scale=16.0)
    scaler.scale(Problem().loss(model.parameters(), 0)).backward()
    spoil_with(float("inf"))(model)
    optimizer.perturb(scaler)
    assert_same_bits(model, small_model(dtype))


@pytest.mark.parametrize("variant", ["sam", "adaptive", "fisher", "gsam", "esam", "clipped"])
@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled"])
def test_second_gradient_that_is_finite_after_an_overflow_in_the_first_makes_a_step_of_adamw(variant, value, unscale):
    kwargs = VARIANTS[variant]
    model, optimizer = pair(**kwargs)
    twin = small_model()
    plain = AdamWL2SP(twin.parameters(), lr=0.01, max_grad_norm=kwargs.get("max_grad_norm"))
    scaler = GradScaler("cpu", init_scale=256.0)
    scaled_step(model, optimizer, scaler, 0, first=spoil_with(value), unscale=unscale)
    _, second = passes_of(0)
    plain.step(closure_of(twin, plain, second))
    assert_same_bits(model, twin)
    assert scaler.get_scale() == 256.0


def cast_loss(model: nn.Module, step: int) -> Tensor:
    """A `Problem` whose gradients go through fp16 on their way, as under autocast: above 65504 they overflow."""
    return Problem().loss([p.half().float() for p in model.parameters()], step)


def cast_step(model: nn.Module, optimizer: FSAM, scaler: GradScaler, step: int) -> None:
    """Both passes with the same loss."""
    optimizer.zero_grad()
    scaler.scale(cast_loss(model, step)).backward()
    optimizer.perturb(scaler)
    scaler.scale(cast_loss(model, step)).backward()
    scaler.step(optimizer)
    scaler.update()


@every_variant
def test_scale_that_overflows_in_both_passes_skips_the_step_and_is_halved(kwargs):
    kwargs = {name: value for name, value in kwargs.items() if name != "schedule"}
    model, optimizer = pair(**kwargs)
    scaler = GradScaler("cpu", init_scale=256.0)
    cast_step(model, optimizer, scaler, 0)
    before, moments = weights_of(model), moments_of(optimizer)
    scaler.update(2.0**20)
    cast_step(model, optimizer, scaler, 1)
    assert_unchanged(model, before)
    assert scaler.get_scale() == 2.0**19
    assert_same_moments(optimizer, moments)
    assert_finite(model, optimizer)


# -- overflow in the second pass ---------------------------------------------------------------------------------------


@every_precision
@pytest.mark.parametrize("variant", ["sam", "adaptive", "gsam", "clipped", "static_grads"])
@pytest.mark.parametrize("value", NON_FINITE)
def test_overflow_in_the_second_pass_restores_weights_and_leaves_moments_to_the_bit(variant, value, dtype, kwargs):
    model, optimizer = pair(dtype, **kwargs, **VARIANTS[variant])
    scaler = GradScaler("cpu", init_scale=256.0)
    scaled_step(model, optimizer, scaler, 0)
    before, moments = weights_of(model), moments_of(optimizer)
    scaled_step(model, optimizer, scaler, 1, second=spoil_with(value))
    assert not optimizer.perturbed
    assert scaler.get_scale() == 128.0
    assert_unchanged(model, before)
    assert_same_moments(optimizer, moments)


def test_overflow_in_the_second_pass_is_seen_by_unscale_too():
    model, optimizer = pair(alpha=0.4)
    scaler = GradScaler("cpu", init_scale=256.0)
    scaled_step(model, optimizer, scaler, 0)
    before, moments = weights_of(model), moments_of(optimizer)
    optimizer.zero_grad()
    scaler.scale(Problem().loss(model.parameters(), 0)).backward()
    optimizer.perturb(scaler)
    scaler.scale(Problem().loss(model.parameters(), 1)).backward()
    spoil_with(float("inf"))(model)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 128.0
    assert_unchanged(model, before)
    assert_same_moments(optimizer, moments)


def test_looksams_component_of_an_overflow_is_not_used():
    model, optimizer = pair(**VARIANTS["looksam"])
    twin = small_model()
    plain = AdamWL2SP(twin.parameters(), lr=0.01)
    scaler = GradScaler("cpu", init_scale=256.0)
    scaled_step(model, optimizer, scaler, 0, second=spoil_with(float("inf")))
    scaled_step(model, optimizer, scaler, 1)
    first, _ = passes_of(1)
    plain.step(closure_of(twin, plain, first))
    assert_same_bits(model, twin)


# -- masks -------------------------------------------------------------------------------------------------------------


def masks_of(model: nn.Module, optimizer: FSAM) -> list[Tensor]:
    return [optimizer.mask_of(p) for p in model.parameters()]


def assert_same_masks(first, second) -> None:
    for actual, expected in zip(masks_of(*first), masks_of(*second), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("samples", [1, 2])
def test_mask_that_is_due_in_a_pass_that_overflows_is_chosen_in_the_next_one(samples):
    mask = FisherMask(0.3, interval=10, samples=samples)
    (model, optimizer), (twin, straight) = pair(mask=mask), pair(mask=mask)
    scaler = GradScaler("cpu", init_scale=256.0)
    spoil = spoil_with(float("nan"))
    scaled_step(model, optimizer, scaler, 0, first=spoil, second=spoil)
    assert not optimizer.mask_of(model["dense"].weight).any()
    for step in range(3):
        scaled_step(model, optimizer, scaler, step)
        plain_step(twin, straight, step)
        assert_same_masks((model, optimizer), (twin, straight))
    assert_same_bits(model, twin)


def test_squares_of_an_overflow_do_not_count_for_the_mask():
    mask = FisherMask(0.3, interval=4, samples=3)
    (model, optimizer), (twin, straight) = pair(mask=mask, lr=0.0), pair(mask=mask, lr=0.0)
    scaler = GradScaler("cpu", init_scale=256.0)
    spoil = spoil_with(float("inf"))
    for step in range(5):
        overflows = step == 2
        scaled_step(model, optimizer, scaler, step, **({"first": spoil, "second": spoil} if overflows else {}))
        if overflows:
            # An ascent with gradients of zero: its squares add nothing either.
            straight.zero_grad()
            (0.0 * Problem().loss(twin.parameters(), 0)).backward()
            straight.perturb()
            straight.restore()
        else:
            plain_step(twin, straight, step)
    assert_same_masks((model, optimizer), (twin, straight))


# -- a scale that starts far too high ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"alpha": 0.4}, {"max_grad_norm": 3.0}], ids=["sam", "gsam", "clipped"])
def test_training_whose_scale_starts_absurdly_high_settles_and_then_equals_unscaled_training_to_the_bit(kwargs):
    """Thirty steps from 2**40: with a factor of 1/4, gradients below 2 are finite in fp16 after 13 of them."""
    (model, optimizer), (twin, straight) = pair(**kwargs), pair(**kwargs)
    scaler = GradScaler("cpu", init_scale=2.0**40, backoff_factor=0.25)
    skipped = 0
    for step in range(30):
        scale = scaler.get_scale()
        cast_step(model, optimizer, scaler, step)
        if scaler.get_scale() < scale:
            skipped += 1
            assert step < 13
        else:
            cast_step(twin, straight, GradScaler("cpu", enabled=False), step)
    assert skipped >= 12
    assert_finite(model, optimizer)
    assert_same_bits(model, twin)


@pytest.mark.parametrize("kwargs", [{}, {"alpha": 0.4}, {"adaptive": True}], ids=["sam", "gsam", "adaptive"])
def test_scaled_gradients_whose_squares_overflow_fp32_make_a_step_of_adamw(kwargs):
    (model, optimizer), twin = pair(**kwargs), small_model()
    plain = AdamWL2SP(twin.parameters(), lr=0.01)
    scaler = GradScaler("cpu", init_scale=2.0**80)
    scaled_step(model, optimizer, scaler, 0)
    _, second = passes_of(0)
    plain.step(closure_of(twin, plain, second))
    assert_same_bits(model, twin)


@pytest.mark.parametrize("momentum", [False, True], ids=["fsam", "momentum_sam"])
def test_fp16_autocast_from_an_absurd_scale_settles_and_the_loss_decreases(momentum):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    inputs = torch.randn(32, 8)
    labels = (inputs[:, 0] > 0).long()
    optimizer = (MomentumSAM if momentum else FSAM)(model.parameters(), lr=0.02, rho=0.05)
    scaler = GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-4)

    def loss_of() -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return nn.functional.cross_entropy(model(inputs), labels)

    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(loss_of())
        scaler.scale(losses[-1]).backward()
        if not momentum:
            optimizer.perturb(scaler)
            scaler.scale(loss_of()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() < 2.0**40
    assert_finite(model, optimizer)
    assert losses[-1] < losses[0] / 2


# -- the scaler's own protocol -----------------------------------------------------------------------------------------


class NoReading(TorchDispatchMode):
    """Fails where the host would wait for a number of the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a tensor"
        return func(*args, **(kwargs or {}))


@every_variant
def test_step_with_a_scaler_reads_nothing_from_the_device(kwargs):
    model, optimizer = pair(**kwargs)
    scaler = GradScaler("cpu", init_scale=256.0)
    scaled_step(model, optimizer, scaler, 0)
    with NoReading():
        scaler.scale(Problem().loss(model.parameters(), 0)).backward()
        if optimizer.is_sharp:
            optimizer.perturb(scaler)
            scaler.scale(Problem().loss(model.parameters(), 1)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)


def test_gradients_unscaled_before_the_perturbation_are_refused():
    """The scaler would take the second gradients for unscaled ones too."""
    model, optimizer = pair()
    scaler = GradScaler("cpu")
    scaler.scale(Problem().loss(model.parameters(), 0)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) before perturb"):
        optimizer.perturb(scaler)


def test_closure_given_to_the_scaler_is_refused_with_what_to_do():
    model, optimizer = pair()
    scaler = GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match=r"perturb\(scaler\)"):
        scaler.step(optimizer, closure_of(model, optimizer, 0))
    assert_same_bits(model, small_model())


def test_step_of_a_scaler_without_any_perturbation_before_warns():
    model, optimizer = pair()
    scaler = GradScaler("cpu")
    scaler.scale(Problem().loss(model.parameters(), 0)).backward()
    with pytest.warns(UserWarning, match=r"perturb\(scaler\)"):
        scaler.step(optimizer)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("schedule", [None, Schedule(every=2)], ids=["own", "scheduled"])
def test_plain_steps_between_perturbed_ones_do_not_warn(schedule):
    model, optimizer = pair(schedule=schedule)
    scaler = GradScaler("cpu", init_scale=256.0)
    scaled_step(model, optimizer, scaler, 0)
    scaler.scale(Problem().loss(model.parameters(), 1)).backward()
    scaler.step(optimizer)


def test_second_pass_without_gradients_restores_the_weights():
    model, optimizer = pair()
    scaler = GradScaler("cpu")
    scaler.scale(Problem().loss(model.parameters(), 0)).backward()
    optimizer.perturb(scaler)
    scaler.step(optimizer)
    assert_same_bits(model, small_model())
