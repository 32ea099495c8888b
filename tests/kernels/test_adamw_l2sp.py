"""The AdamW kernel in the interpreter against the reference, to the bit, and what it promises about bad gradients."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fsam_triton.kernels import adamw_l2sp, reference
from tests.kernel_cases import (
    FLOATS,
    LENGTHS,
    any_bits,
    assert_same_bits,
    label,
    ordinary,
    pairwise,
    special_values,
    with_specials,
)


@pytest.fixture(autouse=True)
def exact_square_root(monkeypatch):
    """PyTorch's own square root may be wrong in the last bit on CPU; the interpreter's, which is NumPy's, is not."""
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda tensor: torch.from_numpy(np.sqrt(tensor.numpy())))


NAN = float("nan")
COEFFICIENTS = {
    # factor, decay, 1 - beta1, beta2, 1 - beta2, step_size, inv_sqrt_bias2, eps, key
    "late": (1.0, 1e-3, 0.1, 0.999, 0.001, 1e-2, 1.3, 1e-8, 0x9ABCDEF0),
    "first": (0.37, 0.0, 0.1, 0.999, 0.001, 1e-2, 31.6, 1e-8, 1),
    "without_eps": (1.0, 1e-3, 0.1, 0.9, 0.1, 1e-2, 1.0, 0.0, 2**32 - 1),
    "skipped": (NAN, 1e-3, 0.1, 0.999, 0.001, 1e-2, 1.3, 1e-8, 7),
}
MORE = {
    # other, scale of the next perturbation, its key, rate of the average
    "some": (0.7, -0.3, 0x12345678, 0.1),
    "zero": (0.0, 0.0, 0, 0.0),
    "infinite": (math.inf, -math.inf, 1, math.inf),
    "nan": (NAN, NAN, 2**32 - 1, NAN),
}
MODES = {
    "other": {"other_grad": True},
    "keep": {"other_grad": True, "keep_orthogonal": True},
    "perturb": {"perturb": True},
    "other_and_perturb": {"other_grad": True, "perturb": True},
    "ema": {"ema": True},
    "ema_and_perturb": {"ema": True, "perturb": True},
}


def coefficients(name: str, *more: float) -> Tensor:
    return torch.tensor(COEFFICIENTS[name] + more, dtype=torch.float64)


def tensors_of(
    n: int,
    dtype: torch.dtype,
    state: torch.dtype,
    *,
    keep="nothing",
    amsgrad=False,
    anchor=False,
    other_grad=False,
    ema=False,
) -> dict:
    """What a pass works on; the first half of the moments is zero, as at a first step."""
    old = torch.arange(n) >= n // 2
    squares = [(ordinary(n, torch.float64, seed).square() * old).to(state) for seed in (n + 8, n + 10)]
    clean = with_specials(n, dtype, seed=n)
    # x + 0 is x but for -0 + 0.
    clean[clean == 0] = 0.0
    return {
        "weight": clean if keep == "nothing" else torch.full_like(clean, 7.0),
        "grad": with_specials(n, dtype, seed=n + 2, scale=0.1),
        "exp_avg": ordinary(n, state, seed=n + 4, scale=0.1) * old,
        "exp_avg_sq": squares[0],
        "max_exp_avg_sq": squares[1] if amsgrad else None,
        "backup": clean if keep == "backup" else None,
        "master": clean.float() * 1.001 if keep == "master" else None,
        "anchor": with_specials(n, dtype, seed=n + 6) if anchor else None,
        "other_grad": with_specials(n, dtype, seed=n + 12, scale=0.1) if other_grad else None,
        "ema": with_specials(n, reference.compute_dtype(dtype), seed=n + 14) if ema else None,
    }


def run(function, tensors: dict, coef: Tensor, stochastic=True, zero_grad=False, **modes: bool) -> dict:
    """All tensors after the pass, by name; the arguments stay as they are."""
    after = {name: None if tensor is None else tensor.clone() for name, tensor in tensors.items()}
    other_grad, ema = after.pop("other_grad", None), after.pop("ema", None)
    switches = (modes.get("keep_orthogonal", False), modes.get("perturb", False))
    function(*after.values(), coef, stochastic, zero_grad, other_grad, *switches, ema)
    after |= {"other_grad": other_grad, "ema": ema}
    return {name: tensor for name, tensor in after.items() if tensor is not None}


def implementations(interpret) -> list:
    return [reference.adamw_l2sp_, lambda *args: interpret(adamw_l2sp.adamw_l2sp_, *args)]


# The optimizer's types: 16-bit weights with a master have fp32 moments; without, bf16 has its own and fp16 fp32.
TYPES = {
    "fp32": (torch.float32, torch.float32, "backup"),
    "bf16": (torch.bfloat16, torch.bfloat16, "backup"),
    "bf16_master": (torch.bfloat16, torch.float32, "master"),
    "fp16": (torch.float16, torch.float32, "backup"),
    "fp16_master": (torch.float16, torch.float32, "master"),
    "fp64": (torch.float64, torch.float64, "backup"),
}
CASES = pairwise(
    lambda types, kept, **_: kept or not types.endswith("master"),
    types=list(TYPES),
    n=LENGTHS,
    coef=list(COEFFICIENTS),
    kept=[True, False],
    amsgrad=[False, True],
    anchor=[False, True],
    stochastic=[False, True],
    zero_grad=[False, True],
)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_kernel_equals_the_reference_to_the_bit(interpret, case):
    """Both do the same IEEE operations in the same order, none of them fused: there is nothing to tolerate."""
    dtype, state, keep = TYPES[case["types"]]
    keep = keep if case["kept"] else "nothing"
    tensors = tensors_of(case["n"], dtype, state, keep=keep, amsgrad=case["amsgrad"], anchor=case["anchor"])
    expected, actual = (
        run(function, tensors, coefficients(case["coef"]), case["stochastic"], case["zero_grad"])
        for function in implementations(interpret)
    )
    for name, tensor in expected.items():
        assert_same_bits(actual[name], tensor, name)


@pytest.mark.parametrize("coef", COEFFICIENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernel_equals_the_reference_for_any_bit_pattern(interpret, dtype, coef):
    state = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    n = 1 << 16
    tensors = {name: any_bits(n, dtype, seed) for seed, name in enumerate(["weight", "grad"])}
    for seed, name in enumerate(["exp_avg", "exp_avg_sq", "max_exp_avg_sq"], start=2):
        # An update whose result is not finite is not made, so the moments always are.
        tensors[name] = any_bits(n, state, seed).nan_to_num()
        if name != "exp_avg":
            tensors[name] = tensors[name].abs()
    tensors |= {"backup": None, "master": None, "anchor": any_bits(n, dtype, seed=9)}
    expected, actual = (run(function, tensors, coefficients(coef)) for function in implementations(interpret))
    for name, tensor in expected.items():
        assert_same_bits(actual[name], tensor, name)


@pytest.mark.parametrize("types", TYPES)
def test_coordinate_with_a_non_finite_gradient_is_only_restored(interpret, types):
    dtype, state, keep = TYPES[types]
    tensors = tensors_of(1000, dtype, state, keep=keep, amsgrad=True, anchor=True)
    bad = ~tensors["grad"].isfinite()
    assert bad.any()
    for function in implementations(interpret):
        after = run(function, tensors, coefficients("late"))
        assert_same_bits(after["weight"][bad], tensors[keep].to(dtype)[bad], "weight")
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", keep):
            assert_same_bits(after[name][bad], tensors[name][bad], name)


@pytest.mark.parametrize("types", TYPES)
def test_factor_of_nan_only_restores(interpret, types):
    dtype, state, keep = TYPES[types]
    tensors = tensors_of(1000, dtype, state, keep=keep, amsgrad=True, anchor=True)
    for function in implementations(interpret):
        after = run(function, tensors, coefficients("skipped"))
        assert_same_bits(after["weight"], tensors[keep].to(dtype), "weight")
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", keep):
            assert_same_bits(after[name], tensors[name], name)


@pytest.mark.parametrize("types", ["fp32", "fp64"])
def test_zero_moments_gradient_and_eps_give_no_nan(interpret, types):
    """Padding and dead units: 0 / 0 is taken as 0, as a limit of ever smaller gradients it would be."""
    dtype, state, _ = TYPES[types]
    tensors = {"weight": ordinary(100, dtype, seed=1), "grad": torch.zeros(100, dtype=dtype)}
    tensors |= {name: torch.zeros(100, dtype=state) for name in ("exp_avg", "exp_avg_sq")}
    tensors |= dict.fromkeys(("max_exp_avg_sq", "backup", "master", "anchor"))
    coef = coefficients("without_eps")
    coef[1] = 0.0
    for function in implementations(interpret):
        assert_same_bits(run(function, tensors, coef)["weight"], tensors["weight"])


@pytest.mark.parametrize("types", TYPES)
def test_zeros_stay_zeros(interpret, types):
    """Gaps and tails of the flat buffers hold zeros for ever."""
    dtype, state, keep = TYPES[types]
    kinds = {"backup": dtype, "master": torch.float32, "anchor": dtype, "weight": dtype, "grad": dtype}
    names = ("weight", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "backup", "master", "anchor")
    unused = {"backup", "master"} - {keep}
    tensors = {name: None if name in unused else torch.zeros(4096, dtype=kinds.get(name, state)) for name in names}
    for function in implementations(interpret):
        for name, after in run(function, tensors, coefficients("late")).items():
            assert not after.any(), name


@pytest.mark.parametrize("zero_grad", [False, True])
def test_gradient_is_cleared_if_and_only_if_asked(interpret, zero_grad):
    tensors = tensors_of(4999, torch.bfloat16, torch.bfloat16)
    for function in implementations(interpret):
        after = run(function, tensors, coefficients("late"), zero_grad=zero_grad)["grad"]
        assert_same_bits(after, torch.zeros_like(after) if zero_grad else tensors["grad"])


@pytest.mark.parametrize("name", ["backup", "anchor"])
def test_what_is_only_read_keeps_its_bits(interpret, name):
    tensors = tensors_of(4999, torch.float16, torch.float32, keep="backup", anchor=True)
    for function in implementations(interpret):
        assert_same_bits(run(function, tensors, coefficients("late"))[name], tensors[name])


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
def test_special_values_of_the_weights_are_kept_where_the_update_is_zero(interpret, dtype):
    weight = special_values(dtype)
    # x + 0 is x but for -0 + 0.
    weight[weight == 0] = 0.0
    state = torch.float32 if dtype == torch.float16 else dtype
    tensors = {"weight": weight, "grad": torch.zeros_like(weight)}
    tensors |= {"exp_avg": torch.zeros_like(weight, dtype=state), "exp_avg_sq": torch.ones_like(weight, dtype=state)}
    tensors |= dict.fromkeys(("max_exp_avg_sq", "backup", "master", "anchor"))
    for function in implementations(interpret):
        assert_same_bits(run(function, tensors, coefficients("first"))["weight"], weight)


def test_elements_past_a_ragged_end_are_not_touched(interpret):
    whole = [ordinary(2048, torch.float32, seed).abs() for seed in range(4)]
    before = [tensor.clone() for tensor in whole]
    parts = [tensor[:1100] for tensor in whole]
    interpret(adamw_l2sp.adamw_l2sp_, *parts, None, None, None, None, coefficients("late"), False, True)
    for after, tensor in zip(whole, before, strict=True):
        assert_same_bits(after[1100:], tensor[1100:])
        assert not torch.equal(after[:1100], tensor[:1100])


def test_no_elements_are_no_work(interpret):
    empty = [torch.empty(0)] * 4
    interpret(adamw_l2sp.adamw_l2sp_, *empty, None, None, None, None, coefficients("late"), False, True)


# -- a second gradient and the next perturbation -----------------------------------------------------------------------


def arguments(types: str, n=1100, kept=True, amsgrad=False, anchor=False, mode="perturb") -> tuple[dict, dict]:
    """Tensors, and what else `run` wants, for a mode."""
    dtype, state, keep = TYPES[types]
    modes = dict(MODES[mode])
    more = {name: modes.pop(name, False) for name in ("other_grad", "ema")}
    keep = keep if kept else "nothing"
    return tensors_of(n, dtype, state, keep=keep, amsgrad=amsgrad, anchor=anchor, **more), modes


def comparable(after: dict) -> Tensor:
    """Where the pass went on with no subnormal bf16 number, which the interpreter gets wrong."""
    out = torch.ones_like(after["weight"], dtype=torch.bool)
    for tensor in (after["backup"], after["exp_avg"]) if "backup" in after else (after["weight"],):
        if tensor.dtype == torch.bfloat16:
            out &= ~((tensor != 0) & (tensor.float().abs() < 2.0**-126))
    return out


def assert_same_passes(interpret, tensors: dict, *args, **modes) -> None:
    expected, actual = (run(function, tensors, *args, **modes) for function in implementations(interpret))
    for name, tensor in expected.items():
        part = comparable(expected) if name == "ema" or (name == "weight" and modes.get("perturb")) else slice(None)
        assert_same_bits(actual[name][part], tensor[part], name)


MODE_CASES = pairwise(
    lambda types, mode, kept, **_: kept or not (types.endswith("master") or mode.endswith("perturb")),
    types=list(TYPES),
    n=LENGTHS,
    coef=list(COEFFICIENTS),
    more=list(MORE),
    mode=list(MODES),
    kept=[True, False],
    amsgrad=[False, True],
    anchor=[False, True],
    stochastic=[False, True],
    zero_grad=[False, True],
)


@pytest.mark.parametrize("case", MODE_CASES, ids=label)
def test_kernel_equals_the_reference_to_the_bit_in_every_mode(interpret, case):
    tensors, modes = arguments(*(case[name] for name in ("types", "n", "kept", "amsgrad", "anchor", "mode")))
    coef = coefficients(case["coef"], *MORE[case["more"]])
    assert_same_passes(interpret, tensors, coef, case["stochastic"], case["zero_grad"], **modes)


@pytest.mark.parametrize("mode", ["keep", "other_and_perturb"])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernel_equals_the_reference_for_any_bit_pattern_in_every_mode(interpret, dtype, stochastic, mode):
    state = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    n = 1 << 14
    tensors = {name: any_bits(n, dtype, seed) for seed, name in enumerate(["weight", "grad"])}
    tensors |= {"exp_avg": any_bits(n, state, 2).nan_to_num(), "exp_avg_sq": any_bits(n, state, 3).nan_to_num().abs()}
    tensors |= {"max_exp_avg_sq": None, "backup": any_bits(n, dtype, 4), "master": None, "anchor": None}
    tensors["other_grad"] = any_bits(n, dtype, 5)
    modes = {name: value for name, value in MODES[mode].items() if name != "other_grad"}
    assert_same_passes(interpret, tensors, coefficients("late", *MORE["some"]), stochastic, **modes)


# -- a second gradient


@pytest.mark.parametrize("types", TYPES)
def test_other_gradient_is_added_times_its_factor(interpret, types):
    """Small integers: every way of adding them up is exact."""
    tensors, _ = arguments(types, n=1000)
    first, second = (torch.arange(1000) % m - m // 2 for m in (7, 9))
    apart = {**tensors, "grad": first.to(tensors["grad"]), "other_grad": second.to(tensors["grad"])}
    together = {**tensors, "grad": (4 * first - 2 * second).to(tensors["grad"])}
    scaled, plain = coefficients("late", -2.0, 0.0, 0.0), coefficients("late")
    scaled[0] = 4.0
    for function in implementations(interpret):
        actual, expected = run(function, apart, scaled), run(function, together, plain)
        for name in expected.keys() - {"grad"}:
            assert_same_bits(actual[name], expected[name], name)


@pytest.mark.parametrize("types", TYPES)
def test_coordinate_whose_other_gradient_is_not_finite_gets_its_own_alone(interpret, types):
    tensors, _ = arguments(types, mode="other")
    bad = ~tensors["other_grad"].isfinite()
    assert (bad & tensors["grad"].isfinite()).any()
    for function in implementations(interpret):
        actual = run(function, tensors, coefficients("late", *MORE["some"]))
        expected = run(function, {**tensors, "other_grad": None}, coefficients("late"))
        for name, tensor in expected.items():
            assert_same_bits(actual[name][bad], tensor[bad], name)


@pytest.mark.parametrize("factor", [math.inf, -math.inf, NAN])
@pytest.mark.parametrize("types", ["fp32", "bf16"])
def test_other_factor_that_is_not_finite_adds_nothing(interpret, types, factor):
    tensors, _ = arguments(types, mode="other")
    for function in implementations(interpret):
        actual = run(function, tensors, coefficients("late", factor, 0.0, 0.0))
        expected = run(function, {**tensors, "other_grad": None}, coefficients("late"))
        for name, tensor in expected.items():
            assert_same_bits(actual[name], tensor, name)


@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("types", TYPES)
def test_other_gradient_is_only_read_when_it_is_added(interpret, types, zero_grad):
    tensors, _ = arguments(types, mode="other")
    for function in implementations(interpret):
        after = run(function, tensors, coefficients("late", *MORE["some"]), zero_grad=zero_grad)["other_grad"]
        assert_same_bits(after, tensors["other_grad"])


@pytest.mark.parametrize("types", TYPES)
def test_keeping_the_orthogonal_part_updates_with_the_gradient_alone(interpret, types):
    tensors, modes = arguments(types, mode="keep")
    for function in implementations(interpret):
        actual = run(function, tensors, coefficients("first", *MORE["some"]), **modes)
        expected = run(function, {**tensors, "other_grad": None}, coefficients("first"))
        for name, tensor in expected.items():
            assert_same_bits(actual[name], tensor, name)


@pytest.mark.parametrize("coef", ["first", "skipped"])
@pytest.mark.parametrize("types", TYPES)
def test_kept_orthogonal_part_is_the_difference_of_the_gradients_as_they_are(interpret, types, coef):
    """Neither unscaled nor clipped, and rounded to nearest."""
    tensors, modes = arguments(types, mode="keep")
    grad, other = (tensors[name].to(reference.compute_dtype(tensors[name].dtype)) for name in ("grad", "other_grad"))
    expected = (grad - torch.tensor(0.7, dtype=torch.float64).to(grad.dtype) * other).to(tensors["grad"].dtype)
    for function in implementations(interpret):
        after = run(function, tensors, coefficients(coef, *MORE["some"]), zero_grad=True, **modes)
        assert_same_bits(after["other_grad"], expected)


# -- the next perturbation


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("types", TYPES)
def test_perturbing_pass_keeps_the_clean_weights_that_the_other_pass_makes(interpret, types, more):
    tensors, modes = arguments(types, amsgrad=True, anchor=True)
    for function in implementations(interpret):
        plain = run(function, tensors, coefficients("late"))
        perturbing = run(function, tensors, coefficients("late", *MORE[more]), **modes)
        clean = "master" if "master" in plain else "weight"
        assert_same_bits(perturbing[TYPES[types][2]], plain[clean], clean)
        for name in ("grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert_same_bits(perturbing[name], plain[name], name)


@pytest.mark.parametrize("more", ["zero", "infinite", "nan"])
@pytest.mark.parametrize("types", TYPES)
def test_scale_that_is_zero_or_not_finite_leaves_the_clean_weights(interpret, types, more):
    tensors, modes = arguments(types)
    for function in implementations(interpret):
        after = run(function, tensors, coefficients("late", *MORE[more]), **modes)
        clean = after[TYPES[types][2]]
        # x + 0 is x but for -0 + 0.
        clean[clean == 0] = 0.0
        assert_same_bits(after["weight"], clean.to(after["weight"].dtype))


def test_coordinate_whose_shift_overflows_is_clean(interpret):
    tensors, modes = arguments("fp32")
    tensors["exp_avg"][::2] = 1e30
    for function in implementations(interpret):
        after = run(function, tensors, coefficients("skipped", 0.0, 1e9, 0.0), **modes)
        assert_same_bits(after["weight"][::2], tensors["backup"][::2])
        assert not torch.equal(after["weight"][1::2], tensors["backup"][1::2])


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("types", ["fp32", "bf16", "fp64"])
def test_perturbation_is_the_one_that_perturb_makes_of_the_stored_moment(interpret, types, stochastic):
    tensors, modes = arguments(types)
    coef = coefficients("late", *MORE["some"])
    for function in implementations(interpret):
        after = run(function, tensors, coef, stochastic, **modes)
        expected = after["backup"].clone()
        reference.perturb_(expected, after["exp_avg"], None, None, coef[10:], False, stochastic, False)
        usable = comparable(after)
        assert_same_bits(after["weight"][usable], expected[usable])


@pytest.mark.parametrize("types", ["fp16", "bf16_master", "fp16_master"])
def test_perturbation_of_fp32_moments_is_rounded_once(interpret, types):
    """Weights perturbed from the master are rounded to nearest, from it and not from its rounding."""
    tensors, modes = arguments(types)
    scale = torch.tensor(MORE["some"][1], dtype=torch.float64).float()
    for function in implementations(interpret):
        after = run(function, tensors, coefficients("late", *MORE["some"]), stochastic=False, **modes)
        perturbed = after[TYPES[types][2]].float() + scale * after["exp_avg"]
        assert_same_bits(after["weight"], perturbed.to(after["weight"].dtype))


@pytest.mark.parametrize("types", TYPES)
def test_factor_of_nan_restores_and_perturbs_anew_along_the_old_moment(interpret, types):
    """So a step that is skipped, or one that repeats the perturbation, makes the same weights as the step before."""
    tensors, modes = arguments(types, amsgrad=True, anchor=True)
    more = MORE["some"]
    for function in implementations(interpret):
        before = run(function, tensors, coefficients("late", *more), **modes)
        again = {**dict.fromkeys(tensors), **before, "weight": torch.full_like(before["weight"], 7.0)}
        after = run(function, again, coefficients("skipped", *more), **modes)
        usable = comparable(before)
        for name, tensor in before.items():
            assert_same_bits(after[name][usable], tensor[usable], name)


@pytest.mark.parametrize("types", TYPES)
def test_coordinate_with_a_non_finite_gradient_is_restored_and_perturbed_along_its_old_moment(interpret, types):
    tensors, modes = arguments(types)
    bad = ~tensors["grad"].isfinite()
    assert bad.any()
    more = MORE["some"]
    for function in implementations(interpret):
        actual, skipped = (run(function, tensors, coefficients(name, *more), **modes) for name in ("late", "skipped"))
        usable = bad & comparable(skipped)
        for name in actual:
            assert_same_bits(actual[name][usable], skipped[name][usable], name)


@pytest.mark.parametrize("types", ["bf16", "fp16"])
def test_perturbation_has_a_key_of_its_own(interpret, types):
    tensors, modes = arguments(types)
    for function in implementations(interpret):
        first, again, other = (
            run(function, tensors, coefficients("late", 0.0, -0.3, key), **modes) for key in (1, 1, 2**32 - 1)
        )
        assert_same_bits(first["weight"], again["weight"])
        assert not torch.equal(first["weight"], other["weight"])
        for name in ("backup", "exp_avg", "exp_avg_sq"):
            assert_same_bits(first[name], other[name], name)


# -- the average of the weights


def average_of(tensors: dict, after: dict, clean: str, rate: float) -> Tensor:
    """What the formula says, from the stored clean weights after the pass."""
    ema, rate = tensors["ema"], torch.tensor(rate, dtype=torch.float64).to(tensors["ema"].dtype)
    change = rate * (after[clean].to(ema.dtype) - ema)
    return torch.where(change.isfinite(), ema + change, ema)


@pytest.mark.parametrize("mode", ["ema", "ema_and_perturb"])
@pytest.mark.parametrize("types", TYPES)
def test_average_follows_the_clean_weights_as_they_are_stored(interpret, types, mode):
    tensors, modes = arguments(types, mode=mode)
    keep = TYPES[types][2]
    clean = keep if keep == "master" or mode == "ema_and_perturb" else "weight"
    for function in implementations(interpret):
        after = run(function, tensors, coefficients("late", *MORE["some"]), **modes)
        usable = comparable(after)
        assert_same_bits(after["ema"][usable], average_of(tensors, after, clean, 0.1)[usable])


@pytest.mark.parametrize("mode", ["ema", "ema_and_perturb"])
@pytest.mark.parametrize("types", TYPES)
def test_averaging_changes_nothing_else(interpret, types, mode):
    tensors, modes = arguments(types, amsgrad=True, anchor=True, mode=mode)
    coef = coefficients("late", *MORE["some"])
    for function in implementations(interpret):
        averaging = run(function, tensors, coef, **modes)
        for name, tensor in run(function, {**tensors, "ema": None}, coef, **modes).items():
            assert_same_bits(averaging[name], tensor, name)


@pytest.mark.parametrize("types", TYPES)
def test_rate_of_nan_leaves_the_average(interpret, types):
    tensors, modes = arguments(types, mode="ema")
    for function in implementations(interpret):
        after = run(function, tensors, coefficients("skipped", *MORE["nan"]), **modes)
        assert_same_bits(after["ema"], tensors["ema"])


@pytest.mark.parametrize("types", TYPES)
def test_average_of_a_coordinate_with_a_non_finite_gradient_follows_its_old_weight(interpret, types):
    tensors, modes = arguments(types, mode="ema")
    bad = ~tensors["grad"].isfinite()
    assert bad.any()
    keep = TYPES[types][2]
    for function in implementations(interpret):
        after = run(function, tensors, coefficients("late", *MORE["some"]), **modes)
        usable = bad & comparable(after)
        assert_same_bits(after["ema"][usable], average_of(tensors, tensors, keep, 0.1)[usable])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("types", TYPES)
def test_zeros_stay_zeros_in_every_mode(interpret, types, mode):
    tensors, modes = arguments(types, n=4096, amsgrad=True, anchor=True, mode=mode)
    tensors = {name: None if tensor is None else torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for function in implementations(interpret):
        for name, after in run(function, tensors, coefficients("late", *MORE["some"]), **modes).items():
            assert not after.any(), name


def test_elements_past_a_ragged_end_are_not_touched_in_any_mode(interpret):
    whole = [ordinary(2048, torch.float32, seed).abs() for seed in range(7)]
    before = [tensor.clone() for tensor in whole]
    weight, grad, exp_avg, exp_avg_sq, backup, other_grad, ema = (tensor[:1100] for tensor in whole)
    flat, coef = (weight, grad, exp_avg, exp_avg_sq, None, backup, None, None), coefficients("late", *MORE["some"])
    interpret(adamw_l2sp.adamw_l2sp_, *flat, coef, False, True, other_grad, True, True, ema)
    for after, tensor in zip(whole, before, strict=True):
        assert_same_bits(after[1100:], tensor[1100:])
        assert not torch.equal(after[:1100], tensor[:1100])
