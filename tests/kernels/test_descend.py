"""The update: its kernel in the interpreter against the reference, to the bit, and what both do with bad gradients."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fsam_triton.kernels import reference, spec
from fsam_triton.kernels.segments import Plan, Segments
from tests.kernels.cases import FLOATS, any_bits, assert_same_bits, bits, label, ordinary, special_values, with_specials
from tests.kernels.launches import (
    DESCEND,
    REMAINDERS,
    assert_as_the_reference,
    descend,
    descend_launch,
    exact_square_root,
    flat_weights,
)
from tests.kernels.one_tensor import TYPES, descended, tensors_of

NAN, INF = math.nan, math.inf
# Whole blocks and a tail, at an aligned address and at others; one element, none, whole blocks at an odd address.
SHAPES = [(2 * spec.BLOCK + 77,), (1,), (0,), (spec.BLOCK + 5,), (7,), (32,), (2 * spec.BLOCK,), (129, 33)]
every_type = pytest.mark.parametrize("types", TYPES)
every_rule = pytest.mark.parametrize("rule", spec.DESCEND)


@pytest.fixture(params=["kernel", "reference"])
def module(request, kernels):
    return kernels if request.param == "kernel" else reference


@pytest.fixture(autouse=True)
def square_root(monkeypatch):
    """PyTorch's own square root may be wrong in the last bit on CPU; the interpreter's, which is NumPy's, is not."""
    monkeypatch.setattr(Tensor, "sqrt", exact_square_root)


@pytest.mark.parametrize("make", [ordinary, with_specials], ids=["ordinary", "special"])
@pytest.mark.parametrize("case", DESCEND, ids=label)
def test_kernel_equals_the_reference_to_the_bit(kernels, case, make):
    """Both do the same IEEE operations in the same order, none of them fused: there is nothing to tolerate."""
    assert_as_the_reference(descend, descend_launch(**case, make=make, shapes=SHAPES), kernels)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("second", ["added", "orthogonal"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_kernel_equals_the_reference_for_any_bit_pattern(kernels, dtype, second, stochastic):
    state = "bf16" if dtype == "bf16" else "fp32"
    more = {"second": second, "anchor": True, "stochastic": stochastic, "lanes": "all", "moved": True}
    shapes = [(1 << 14,), *[(1,)] * 5, (3, 5)]
    assert_as_the_reference(
        descend, descend_launch("adamw", dtype, state, **more, make=any_bits, shapes=shapes), kernels
    )


# -- one tensor --------------------------------------------------------------------------------------------------------


def assert_same(actual: dict, expected: dict, names=None, part=slice(None)) -> None:
    for name in expected.keys() if names is None else names:
        assert_same_bits(actual[name][part], expected[name][part], name)


def state_of(tensors: dict) -> list[str]:
    return [name for names in spec.STATE.values() for name in names if tensors.get(name) is not None]


@every_rule
@every_type
def test_coordinate_with_a_non_finite_gradient_is_only_restored(module, types, rule):
    tensors = tensors_of(types, rule=rule, all_lanes=True, anchor=True)
    bad = ~tensors["grad"].isfinite()
    assert bad.any()
    after = descended(module, tensors, rule)
    assert_same_bits(after["weight"][bad], tensors["clean"][bad], "weight")
    assert_same(after, tensors, state_of(tensors), bad)


@every_rule
@every_type
def test_factor_of_nan_only_restores(module, types, rule):
    tensors = tensors_of(types, rule=rule, all_lanes=True, anchor=True)
    after = descended(module, tensors, rule, factor=NAN)
    assert_same_bits(after["weight"], tensors["clean"], "weight")
    assert_same(after, tensors, state_of(tensors))


@pytest.mark.parametrize("types", ["fp32", "fp64"])
def test_zero_moments_gradient_and_eps_give_no_nan(module, types):
    """Dead units: 0 / 0 is taken as 0, as a limit of ever smaller gradients it would be."""
    tensors = tensors_of(types, 100, make=ordinary)
    tensors |= {name: torch.zeros_like(tensors[name]) for name in ("grad", "exp_avg", "exp_avg_sq")}
    assert_same_bits(descended(module, tensors, eps=0.0, decay=0.0)["weight"], tensors["clean"])


def test_a_nan_in_the_largest_second_moment_stays(module):
    """As with torch.maximum, which torch.optim's amsgrad uses."""
    tensors = tensors_of("fp32", all_lanes=True, make=ordinary)
    tensors["max_exp_avg_sq"][::5] = NAN
    after = descended(module, tensors)
    assert after["max_exp_avg_sq"][::5].isnan().all()
    assert not after["max_exp_avg_sq"][1::5].isnan().any()
    assert after["weight"].isfinite().all()


@every_rule
@every_type
def test_zeros_stay_zeros(module, types, rule):
    wanted = {"all_lanes": True, "anchor": True, "keep": True, "ema": True}
    tensors = tensors_of(types, rule=rule, **wanted)
    tensors = {name: None if tensor is None else torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for name, after in descended(module, tensors, rule).items():
        assert not after.any(), name


@every_type
def test_what_is_only_read_keeps_its_bits(module, types):
    tensors = tensors_of(types, anchor=True, other=True)
    assert_same(descended(module, tensors), tensors, ["clean", "grad", "other", "anchor"])


@pytest.mark.parametrize("dtype", FLOATS)
def test_special_values_of_the_weights_are_kept_where_the_update_is_zero(module, dtype):
    clean = special_values(FLOATS[dtype])
    clean[clean == 0] = 0.0
    tensors = tensors_of(dtype, len(clean)) | {"clean": clean, "grad": torch.zeros_like(clean)}
    tensors |= {"exp_avg": torch.zeros_like(tensors["exp_avg"]), "exp_avg_sq": torch.ones_like(tensors["exp_avg_sq"])}
    assert_same_bits(descended(module, tensors, decay=0.0)["weight"], clean)


def test_sgd_without_momentum_is_the_plain_step(module):
    tensors = tensors_of("fp64", rule="sgd", make=ordinary) | {"momentum_buffer": None}
    after = descended(module, tensors, "sgd", factor=1.0, decay=0.0, lr=0.5)
    assert_same_bits(after["weight"], tensors["clean"] - 0.5 * tensors["grad"])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_random_numbers_depend_on_the_key_alone(module, dtype):
    tensors = tensors_of(dtype, make=ordinary)
    first, again, other = (descended(module, tensors, key=key)["weight"] for key in (1, 1, 2))
    assert_same_bits(first, again)
    assert not torch.equal(first, other)


# -- master weights ----------------------------------------------------------------------------------------------------


def combined(tensors: dict, weight="weight") -> Tensor:
    return reference.combine(tensors[weight], tensors["remainder"])


@pytest.mark.parametrize("remainder", [None, -32768, -1, 0, 1, 32767], ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_number_is_combined_with_a_remainder_and_split_as_in_the_reference(kernels, dtype, remainder):
    """All 16-bit numbers, in a step of length zero; None: each with a remainder of its own, over all of 16 bits."""
    n = 1 << 16
    tensors = tensors_of(f"{dtype}_master", n, "sgd", make=ordinary) | {"momentum_buffer": None}
    tensors["clean"] = torch.arange(n).to(torch.int16).view(FLOATS[dtype])
    own = torch.randperm(n, generator=torch.Generator().manual_seed(1)) - n // 2
    tensors["remainder"] = (own if remainder is None else torch.full((n,), remainder)).to(REMAINDERS[dtype])
    actual, expected = (descended(module, tensors, "sgd", lr=0.0, decay=0.0) for module in (kernels, reference))
    assert_same_bits(actual["weight"], expected["weight"])
    assert_same_bits(combined(actual), combined(expected))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_master_weights_survive_a_step_of_length_zero(module, dtype):
    """But for half a step upwards, of which bf16 keeps one fp32 step less."""
    tensors = tensors_of(f"{dtype}_master", 1 << 14, "sgd", make=ordinary) | {"momentum_buffer": None}
    master = ordinary(1 << 14, torch.float32, seed=3)
    reference.split(master, tensors["clean"], tensors["remainder"])
    before = combined(tensors, "clean")
    after = combined(descended(module, tensors, "sgd", lr=0.0, decay=0.0))
    assert_same_bits(after, before)
    assert int((bits(after) != bits(master)).sum()) <= len(master) / 2**14


@every_rule
@pytest.mark.parametrize("types", ["bf16_master", "fp16_master"])
def test_weight_is_its_master_rounded_to_nearest(module, types, rule):
    after = descended(module, tensors_of(types, rule=rule, make=ordinary), rule)
    assert_same_bits(after["weight"], combined(after).to(after["weight"].dtype))


# -- a second gradient -------------------------------------------------------------------------------------------------


@every_type
def test_other_gradient_is_added_times_its_factor(module, types):
    """Small integers: every way of adding them up is exact."""
    tensors = tensors_of(types, 1000)
    first, second = (torch.arange(1000) % m - m // 2 for m in (7, 9))
    dtype = tensors["grad"].dtype
    apart = {**tensors, "grad": first.to(dtype), "other": second.to(dtype)}
    together = {**tensors, "grad": (4 * first - 2 * second).to(dtype)}
    actual, expected = descended(module, apart, factor=4.0, other=-2.0), descended(module, together, factor=1.0)
    assert_same(actual, expected, expected.keys() - {"grad"})


@every_type
def test_coordinate_whose_other_gradient_is_not_finite_gets_its_own_alone(module, types):
    tensors = tensors_of(types, other=True)
    bad = ~tensors["other"].isfinite()
    assert (bad & tensors["grad"].isfinite()).any()
    assert_same(descended(module, tensors), descended(module, {**tensors, "other": None}), part=bad)


@pytest.mark.parametrize("factor", [INF, -INF, NAN])
@pytest.mark.parametrize("types", ["fp32", "bf16"])
def test_other_factor_that_is_not_finite_adds_nothing(module, types, factor):
    tensors = tensors_of(types, other=True)
    assert_same(descended(module, tensors, other=factor), descended(module, {**tensors, "other": None}))


@every_type
def test_keeping_the_orthogonal_part_updates_with_the_gradient_alone(module, types):
    tensors = tensors_of(types, keep=True)
    assert_same(descended(module, tensors), descended(module, {**tensors, "other": None, "orthogonal": None}))


@pytest.mark.parametrize("factor", [0.3, NAN])
@every_type
def test_kept_orthogonal_part_is_the_difference_of_the_gradients_as_they_are(module, types, factor):
    """Neither unscaled nor clipped, and rounded to nearest."""
    tensors = tensors_of(types, keep=True)
    compute = reference.compute_dtype(tensors["grad"].dtype)
    grad, other = tensors["grad"].to(compute), tensors["other"].to(compute)
    expected = (grad - torch.tensor(0.7, dtype=torch.float64).to(compute) * other).to(tensors["grad"].dtype)
    assert_same_bits(descended(module, tensors, other=0.7, factor=factor)["orthogonal"], expected)


# -- the average of the weights ----------------------------------------------------------------------------------------


def average_of(tensors: dict, stored: dict, weight: str, rate: float) -> Tensor:
    """What the formula says, from the stored clean weights."""
    ema = tensors["ema"]
    clean = combined(stored, weight) if "remainder" in stored else stored[weight].to(ema.dtype)
    change = torch.tensor(rate, dtype=torch.float64).to(ema.dtype) * (clean - ema)
    return torch.where(change.isfinite(), ema + change, ema)


@every_type
def test_average_follows_the_clean_weights_as_they_are_stored(module, types):
    tensors = tensors_of(types, ema=True, make=ordinary)
    after = descended(module, tensors, rate=0.1)
    expected = average_of(tensors, after, "weight", 0.1)
    if types == "bf16_master":
        # Half a step upwards is kept as a little less.
        at_the_end = after["remainder"] == 32767
        assert at_the_end.sum() < 10
        assert_same_bits(after["ema"][~at_the_end], expected[~at_the_end])
    else:
        assert_same_bits(after["ema"], expected)


@every_type
def test_averaging_changes_nothing_else(module, types):
    tensors = tensors_of(types, all_lanes=True, anchor=True, ema=True)
    assert_same(descended(module, tensors), descended(module, {**tensors, "ema": None}))


@every_type
def test_rate_of_nan_leaves_the_average(module, types):
    tensors = tensors_of(types, ema=True)
    assert_same_bits(descended(module, tensors, rate=NAN)["ema"], tensors["ema"])


@every_type
def test_average_of_a_coordinate_with_a_non_finite_gradient_follows_its_old_weight(module, types):
    tensors = tensors_of(types, ema=True)
    bad = ~tensors["grad"].isfinite()
    stored = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    expected = average_of(tensors, stored, "clean", 0.1)
    assert_same_bits(descended(module, tensors, rate=0.1)["ema"][bad], expected[bad])


# -- several tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_many_small_tensors_are_updated_once_each(kernels):
    sizes = np.random.default_rng(1).integers(0, 200, 100).tolist()
    launch = descend_launch("adamw", "bf16", shapes=[*[(n,) for n in sizes], (4, 3)], anchor=True)
    after = assert_as_the_reference(descend, launch, kernels)
    assert len(flat_weights(after)) == 101


def test_nothing_that_takes_part_is_no_work(module):
    weight = ordinary(100, torch.float32, seed=1)
    for lengths, tensors, grads in (([100], [weight], [None]), ([0], [weight[:0]], [weight[:0]]), ([], [], [])):
        plan, count = Plan(lengths, weight.device), len(lengths)
        coef, key = torch.ones(count, len(spec.DESCEND["lion"])), torch.zeros(count, dtype=torch.int32)
        lanes = (None,) * 4
        module.descend_(Segments(plan, tensors, grads), [torch.zeros(plan.size)], *lanes, coef, key, "lion", True)
    assert_same_bits(weight, ordinary(100, torch.float32, seed=1))
