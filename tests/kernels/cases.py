"""Data for tests of kernels: awkward floats, combinations of options; comparison to the bit, and of random numbers."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fsam_triton.kernels import formulas

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Multiples of a block and of a chunk, and everything around them.
LENGTHS = [1, 31, 1000, 1024, 4096, 4999, 16384, 2 * 16384 + 5]


def bits(values: Tensor) -> Tensor:
    """Bit patterns as integers."""
    return values.view(INTEGERS[values.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor, name: str = "") -> None:
    """Equal to the bit, signs of zeros too; any NaN equals any NaN."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), name
    same = (bits(actual) == bits(expected)) | (actual.isnan() & expected.isnan())
    wrong = (~same).nonzero().flatten().tolist()
    assert not wrong, (
        f"{name}: {len(wrong)} of {same.numel()} differ, the first at {wrong[0]}: "
        f"{actual[wrong[0]].item()!r} instead of {expected[wrong[0]].item()!r}"
    )


def assert_uncorrelated(a: Tensor, b: Tensor) -> None:
    """The correlation of n independent pairs has a standard deviation of 1 / sqrt(n)."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    correlation = float((a * b).sum() / (a.norm() * b.norm()))
    assert abs(correlation) < 5 / math.sqrt(a.numel())


def used_keys(n: int) -> list[int]:
    """Keys of consecutive steps of one parameter, as the optimizer makes them, signed."""
    step, zero = torch.arange(n, dtype=torch.float32), torch.zeros(n, dtype=torch.int64)
    return formulas.keys(step, zero + 0x3C6EF372, zero).to(torch.int64).tolist()


def special_values(dtype: torch.dtype) -> Tensor:
    """Zeros, subnormals, the ends of the normal range, infinities and NaN, of both signs."""
    info = torch.finfo(dtype)
    subnormal = [info.tiny * info.eps, info.tiny * (1 - info.eps)]
    positive = [0.0, *subnormal, info.tiny, 1.0, info.max, float("inf"), float("nan")]
    return torch.tensor([sign * value for value in positive for sign in (1, -1)], dtype=torch.float64).to(dtype)


def ordinary(n: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    """Normal random numbers."""
    return (torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def with_specials(n: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    """Normal random numbers with every special value at places of its own, as far as there is room."""
    values, special = ordinary(n, dtype, seed, scale), special_values(dtype)
    places = torch.randperm(n, generator=torch.Generator().manual_seed(seed + 1))[: special.numel()]
    values[places] = special[: places.numel()]
    return values


def any_bits(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random bit patterns: all binades are equally frequent."""
    info = torch.iinfo(INTEGERS[dtype.itemsize])
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randint(info.min, info.max, (n,), generator=generator, dtype=INTEGERS[dtype.itemsize])
    return patterns.view(dtype)


def random_mask(n: int, seed: int) -> Tensor:
    """A mask of random words; bits past the end are random too, and must not matter."""
    return any_bits((n + 31) // 32, torch.float32, seed).view(torch.int32)


def pairwise(allowed: Callable[..., bool] = lambda **case: True, **axes: Sequence) -> list[dict]:
    """Few combinations in which every two values of different axes meet, as far as `allowed` lets them."""
    names = list(axes)
    everything = [dict(zip(names, values, strict=True)) for values in itertools.product(*axes.values())]
    everything = [case for case in everything if allowed(**case)]

    # Sets as integers, one bit for each pair.
    number: dict[tuple, int] = {}

    def pairs(case: dict) -> int:
        found = itertools.combinations([(name, str(case[name])) for name in names], 2)
        return sum(1 << number.setdefault(pair, len(number)) for pair in found)

    covers = [pairs(case) for case in everything]
    left = (1 << len(number)) - 1
    chosen = []
    while left:
        best = max(range(len(everything)), key=lambda i: (covers[i] & left).bit_count())
        chosen.append(everything[best])
        left &= ~covers[best]
    return chosen


def label(case: dict) -> str:
    """A readable id: what is on, what is off, values of everything else."""
    switches = {True: "{}", False: "no_{}"}
    return "-".join(
        switches[value].format(name) if isinstance(value, bool) else f"{name}={value}" if name == "n" else str(value)
        for name, value in case.items()
    )
