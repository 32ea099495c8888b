"""The perturb kernel in the interpreter against the reference, to the bit, and what it promises about bad gradients."""

import pytest
import torch
from torch import Tensor

from fsam_triton.kernels import perturb, reference
from tests.kernel_cases import (
    FLOATS,
    LENGTHS,
    any_bits,
    assert_same_bits,
    label,
    ordinary,
    pairwise,
    random_mask,
    with_specials,
)


def coefficients(scale: float, key: int = 0x9ABCDEF0) -> Tensor:
    return torch.tensor([scale, key], dtype=torch.float64)


def run(function, weight, grad, *, backup=True, mask=None, coef, adaptive=False, stochastic=True, zero_grad=False):
    """All tensors after the pass, by name; the arguments stay as they are."""
    tensors = {"weight": weight.clone(), "grad": grad.clone(), "backup": torch.full_like(weight, 7.0)}
    if not backup:
        tensors["backup"] = None
    function(*tensors.values(), mask, coef, adaptive, stochastic, zero_grad)
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


CASES = pairwise(
    lambda dtype, stochastic, **_: FLOATS[dtype].itemsize == 2 or not stochastic,
    dtype=list(FLOATS),
    n=LENGTHS,
    backup=[True, False],
    masked=[False, True],
    adaptive=[False, True],
    stochastic=[False, True],
    zero_grad=[False, True],
)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_kernel_equals_the_reference_to_the_bit(interpret, case):
    """Both do the same IEEE operations in the same order, none of them fused: there is nothing to tolerate."""
    n, dtype = case["n"], FLOATS[case["dtype"]]
    arguments = {
        "weight": with_specials(n, dtype, seed=n),
        "grad": with_specials(n, dtype, seed=n + 2),
        "mask": random_mask(n, seed=n + 4) if case["masked"] else None,
        "coef": coefficients(3e-3),
        **{name: case[name] for name in ("backup", "adaptive", "stochastic", "zero_grad")},
    }
    actual = run(lambda *args: interpret(perturb.perturb_, *args), **arguments)
    for name, expected in run(reference.perturb_, **arguments).items():
        assert_same_bits(actual[name], expected, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stochastic", [False, True])
def test_kernel_equals_the_reference_for_any_bit_pattern(interpret, dtype, stochastic):
    arguments = {
        "weight": any_bits(1 << 16, dtype, seed=1),
        "grad": any_bits(1 << 16, dtype, seed=2),
        "coef": coefficients(1.0),
        "stochastic": stochastic,
    }
    actual = run(lambda *args: interpret(perturb.perturb_, *args), **arguments)
    assert_same_bits(actual["weight"], run(reference.perturb_, **arguments)["weight"])


def implementations(interpret):
    return [reference.perturb_, lambda *args: interpret(perturb.perturb_, *args)]


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
def test_zero_scale_leaves_the_weights_alone_whatever_the_gradient_holds(interpret, dtype):
    weight, grad = with_specials(1000, dtype, seed=1), with_specials(1000, dtype, seed=2)
    # x + 0 is x but for -0 + 0.
    weight[weight == 0] = 0.0
    for function in implementations(interpret):
        assert_same_bits(run(function, weight, grad, coef=coefficients(0.0))["weight"], weight)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
def test_coordinate_with_a_non_finite_gradient_does_not_move(interpret, dtype):
    weight, grad = ordinary(1000, dtype, seed=1), with_specials(1000, dtype, seed=2)
    for function in implementations(interpret):
        after = run(function, weight, grad, coef=coefficients(0.5))["weight"]
        assert_same_bits(after[~grad.isfinite()], weight[~grad.isfinite()])
        assert after.isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
def test_coordinates_outside_the_mask_keep_their_bits(interpret, dtype):
    weight, grad = with_specials(4999, dtype, seed=1), ordinary(4999, dtype, seed=2)
    weight[weight == 0] = 0.0
    mask = random_mask(4999, seed=3)
    outside = ~reference.unpack_mask(mask, weight)
    for function in implementations(interpret):
        after = run(function, weight, grad, mask=mask, coef=coefficients(0.5))["weight"]
        assert_same_bits(after[outside], weight[outside])


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
def test_backup_is_the_clean_weights_to_the_bit(interpret, dtype):
    weight, grad = with_specials(4999, dtype, seed=1), ordinary(4999, dtype, seed=2)
    for function in implementations(interpret):
        assert_same_bits(run(function, weight, grad, coef=coefficients(0.5))["backup"], weight)


@pytest.mark.parametrize("zero_grad", [False, True])
def test_gradient_is_cleared_if_and_only_if_asked(interpret, zero_grad):
    weight, grad = ordinary(4999, torch.bfloat16, seed=1), with_specials(4999, torch.bfloat16, seed=2)
    for function in implementations(interpret):
        after = run(function, weight, grad, coef=coefficients(0.5), zero_grad=zero_grad)["grad"]
        assert_same_bits(after, torch.zeros_like(grad) if zero_grad else grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_random_numbers_depend_on_the_key_alone(interpret, dtype):
    weight, grad = ordinary(4999, dtype, seed=1), ordinary(4999, dtype, seed=2)
    for function in implementations(interpret):
        first, again, other = (
            run(function, weight, grad, coef=coefficients(1e-3, key))["weight"] for key in (1, 1, 2**32 - 1)
        )
        assert_same_bits(first, again)
        assert not torch.equal(first, other)


def test_elements_past_a_ragged_end_are_not_touched(interpret):
    whole = [ordinary(2048, torch.float32, seed) for seed in range(3)]
    before = [tensor.clone() for tensor in whole]
    weight, grad, backup = (tensor[:1100] for tensor in whole)
    interpret(perturb.perturb_, weight, grad, backup, None, coefficients(0.5), False, False, True)
    for after, tensor in zip(whole, before, strict=True):
        assert_same_bits(after[1100:], tensor[1100:])
        assert not torch.equal(after[:1100], tensor[:1100])


def test_no_elements_are_no_work(interpret):
    empty = torch.empty(0)
    interpret(perturb.perturb_, empty, empty, empty, None, coefficients(0.5), False, False, True)
