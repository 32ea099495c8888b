"""The launches that make coefficients: the kernels in the interpreter and the C++ against `formulas`."""

import itertools

import pytest
import torch
from torch import Tensor

from fsam_triton.kernels import cpu, formulas, spec

coefficients = pytest.importorskip("fsam_triton.kernels.coefficients")
# More than one program has.
N = coefficients.ROWS + 37
TYPES = [torch.float32, torch.float64]
# A power is a product of up to 48 factors (see `coefficients._power`); its difference to 1 may be a thousandth of it.
TOLERANCE = {torch.float32: 2.0**-23, torch.float64: 48e3 * 2.0**-53}


@pytest.fixture(params=["kernel", "C++"])
def made_by(request, interpret):
    """A function of `formulas` as the kernel or the C++ has it."""
    if request.param == "C++":
        return lambda name, *args: getattr(cpu, name)(*args)
    return lambda name, *args: interpret(getattr(coefficients, name), *args)


def members(groups: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    columns = {
        "group": torch.randint(groups, (N,), generator=generator),
        "salt": torch.randint(2**32, (N,), generator=generator),
        "start": torch.randint(2**40, (N,), generator=generator),
    }
    return torch.stack([columns[name] for name in spec.MEMBER], 1)


def steps() -> Tensor:
    """Of the first updates, and of as many as there can be."""
    generator = torch.Generator().manual_seed(2)
    few, many = torch.arange(40.0), torch.tensor([1e3, 99999.0, 2.0**24 - 2])
    return torch.cat([few, many, torch.randint(2000, (N - 43,), generator=generator).float()])


def scalar(value: float | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    return None if value is None else torch.tensor(value, dtype=dtype)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[expected.dtype], atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("norm_sq", [2.5, 0.0, float("inf"), float("nan")])
def test_coefficients_and_keys_of_a_perturbation(norm_sq, scale, dtype, made_by):
    numbers = torch.tensor([[0.05, 0.0], [-2.0, -0.25], [0.0, 0.5]], dtype=torch.float64)
    given = (numbers, members(3), steps(), 0xDEADBEEF, scalar(norm_sq, torch.float64), scalar(scale), dtype)
    (coef, key), (expected, expected_key) = made_by("climb_coefficients", *given), formulas.climb_coefficients(*given)
    assert torch.equal(key, expected_key)
    # One division and one product.
    assert torch.equal(coef, expected)


RULES = {
    "adamw": [(0.9, 0.999, 1e-8), (0.5, 0.95, 0.0), (0.0, 0.0, 1.0)],
    "sgd": [(0.9, 1.0, 1.0, 0.9), (0.5, 0.25, 0.0, 1.0), (0.0, 1.0, 0.0, 1.0)],
    "lion": [(0.9, 0.99), (0.0, 0.5), (0.8, 0.9)],
}


def numbers_of(rule: str, max_norm: float, average: float) -> Tensor:
    rows = []
    for i, own in enumerate(RULES[rule]):
        shared = {"lr": 0.01 * (i + 1), "rate": 0.1 * i, "sign": (1.0, -1.0, 1.0)[i], "alpha": 0.4}
        shared |= {"max_norm": max_norm, "average": average, "balance": (0.0, 0.5, -2.0)[i]}
        values = shared | dict(zip([name for name in spec.NUMBERS[rule] if name not in shared], own, strict=True))
        rows.append([values[name] for name in spec.NUMBERS[rule]])
    return torch.tensor(rows, dtype=torch.float64)


def compare(rule: str, combined: str, made_by, dtype: torch.dtype, *, measured=None, **options) -> None:
    given = {"active": None, "scale": None, "other_scale": None, "overflow": None, "max_norm": float("inf")}
    given |= {"average": 0.0, "squares": None, "pairs": None} | options
    numbers = numbers_of(rule, given["max_norm"], given["average"])
    counts = [steps(), steps()]
    results = []
    for count, function in zip(counts, (made_by, lambda name, *args: getattr(formulas, name)(*args)), strict=True):
        before = (rule, combined, numbers, members(3), count, given["active"], 77)
        scalars = (scalar(given[name]) for name in ("scale", "other_scale", "overflow"))
        after = (measured, *scalars, given["squares"], given["pairs"], dtype)
        results.append(function("descend_coefficients", *before, *after))
    (coef, key), (expected, expected_key) = results
    assert torch.equal(counts[0], counts[1])
    assert torch.equal(key, expected_key)
    for i, name in enumerate(spec.DESCEND[rule]):
        assert_close(coef[:, i], expected[:, i]), name


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rule", RULES)
def test_coefficients_of_every_rule(rule, dtype, made_by):
    compare(rule, "alone", made_by, dtype, average=0.001)


@pytest.mark.parametrize("rule", RULES)
def test_decay_of_segments_that_are_paired(rule, made_by):
    """Larger, smaller and equal norms, some that are not finite, and segments that are their own pair."""
    values = torch.tensor([0.0, 1.0, 2.0, 2.0, float("inf"), float("nan")], dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    squares = values[torch.randint(len(values), (N + 9,), generator=generator)]
    pairs = torch.randint(len(squares), (N, 2), generator=generator)
    pairs[::5, 1] = pairs[::5, 0]
    compare(rule, "alone", made_by, torch.float64, squares=squares, pairs=pairs)


@pytest.mark.parametrize("overflow", [None, 0.0, 1.0])
@pytest.mark.parametrize("active", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("norm_sq", [None, 0.25, 9.0, float("inf"), float("nan")])
def test_clipping_unscaling_and_skipping(norm_sq, active, overflow, made_by):
    some = torch.arange(N) % 3 != 0 if active else None
    options = {"max_norm": 1.0, "measured": scalar(norm_sq, torch.float64)}
    for scale in (None, 512.0):
        compare("adamw", "alone", made_by, torch.float32, active=some, overflow=overflow, scale=scale, **options)


# Products and squared norms: usable ones; of zeros; too large, or not numbers.
DOTS = [(0.5, 2.0, 3.0), (-1.5, 2.0, 3.0), (0.0, 0.0, 1.0), (0.0, 1.0, 0.0)]
DOTS += [(float("inf"), 1.0, 1.0), (1.0, float("inf"), 1.0), (1.0, 1.0, float("nan"))]


@pytest.mark.parametrize("dots", DOTS, ids=str)
@pytest.mark.parametrize("combined", spec.COMBINED[1:])
def test_directions_made_of_two_gradients(combined, dots, made_by):
    measured = torch.tensor(dots, dtype=torch.float64)
    scales = [(None, None), (256.0, 1024.0), (None, 1024.0)]
    for (scale, other_scale), max_norm in itertools.product(scales, (float("inf"), 0.5)):
        other = {"other_scale": other_scale} if combined == "decomposed" else {}
        compare("adamw", combined, made_by, torch.float64, measured=measured, max_norm=max_norm, scale=scale, **other)
