"""The AdamW kernel in the interpreter against the reference, to the bit, and what it promises about bad gradients."""

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


def coefficients(name: str) -> Tensor:
    return torch.tensor(COEFFICIENTS[name], dtype=torch.float64)


def tensors_of(n: int, dtype: torch.dtype, state: torch.dtype, *, keep="nothing", amsgrad=False, anchor=False) -> dict:
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
    }


def run(function, tensors: dict, coef: Tensor, stochastic=True, zero_grad=False) -> dict:
    """All tensors after the pass, by name; the arguments stay as they are."""
    after = {name: None if tensor is None else tensor.clone() for name, tensor in tensors.items()}
    function(*after.values(), coef, stochastic, zero_grad)
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
