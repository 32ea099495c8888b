"""Compares methods by the differences of paired runs: intervals, tests, and their correction for many comparisons."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

# With more pairs the permutations are drawn, not listed.
LISTED = 14


@dataclass(frozen=True)
class Comparison:
    """The differences of pairs: their mean, its 95 % interval by Student's t, and two-sided p of two tests.

    Args:
        count: of pairs.
        mean: of the differences.
        low, high: the interval; NaN for one pair, and so are the tests.
        t: p of the paired t-test.
        flips: p of the test that flips signs of differences.
    """

    count: int
    mean: float
    low: float = math.nan
    high: float = math.nan
    t: float = math.nan
    flips: float = math.nan


def compare(differences: Sequence[float]) -> Comparison:
    """The comparison by the differences of one or more pairs."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return Comparison(len(values), float(values.mean()))
    if np.ptp(values) == 0:
        # No spread: t is not defined, and the interval is the point.
        mean = float(values[0])
        return Comparison(len(values), mean, mean, mean, 1.0 if mean == 0 else 0.0, sign_flips(values))
    test = scipy.stats.ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(0.95)
    return Comparison(
        len(values), float(values.mean()), float(low), float(high), float(test.pvalue), sign_flips(values)
    )


def sign_flips(differences: Sequence[float], draws: int = 20_000) -> float:
    """Two-sided p of the mean difference among those of all ways to swap the members of pairs.

    No normal distribution is assumed. The least p of n pairs is 2**(1 - n): 0.06 of 5, 0.002 of 10.

    Args:
        differences: of the pairs.
        draws: random ways, where there are more than 2**14.
    """
    values = np.asarray(differences, dtype=float)
    listed = len(values) <= LISTED
    if listed:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(values))))
    else:
        signs = np.random.default_rng(0).choice((1.0, -1.0), size=(draws, len(values)))
    # Equal means may differ in the last bits.
    extreme = np.abs(signs @ values) >= np.abs(values.sum()) - 1e-9 * np.abs(values).sum()
    return float(extreme.mean()) if listed else float((extreme.sum() + 1) / (draws + 1))


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p of comparisons: that any of those below 0.05 is an error has a chance of at most 5 %.

    NaN stays NaN and does not count.
    """
    order = sorted((p, i) for i, p in enumerate(values) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(values), 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = largest
    return adjusted
