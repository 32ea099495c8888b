"""What bench/experiments is made of is right: its statistics, its steps."""

import functools
import itertools

import numpy as np
import pytest
import scipy.stats
import torch

from tests.analysis.cases import TiedHead

pytest.importorskip("transformers")
pytest.importorskip("peft")

from bench.experiments import comparisons
from bench.experiments.methods import METHODS, ON_ALL_WEIGHTS
from bench.experiments.training import epochs, rate, train
from fsam_triton.analysis import find_rho

NORMAL = np.random.default_rng(0).normal(0.3, 1.0, size=(2, 8))


# -- statistics --------------------------------------------------------------------------------------------------------


def test_interval_and_p_are_those_of_scipys_paired_t_test():
    found, expected = comparisons.compare(NORMAL[0] - NORMAL[1]), scipy.stats.ttest_rel(*NORMAL)
    interval = expected.confidence_interval(0.95)
    assert (found.count, found.mean) == (8, pytest.approx(NORMAL[0].mean() - NORMAL[1].mean()))
    assert (found.low, found.high, found.t) == pytest.approx((interval.low, interval.high, expected.pvalue))


@pytest.mark.parametrize("values", [NORMAL[0], NORMAL[1], np.arange(5.0) - 1, np.array([1.0, 1, 1, 1, 1])])
def test_sign_flips_are_scipys_permutation_test_of_samples(values):
    expected = scipy.stats.permutation_test(
        (values, np.zeros_like(values)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    assert comparisons.sign_flips(values) == pytest.approx(expected.pvalue)


def test_drawn_sign_flips_estimate_the_listed_ones(monkeypatch):
    values = np.random.default_rng(1).normal(0.4, 1.0, size=14)
    listed = comparisons.sign_flips(values)
    monkeypatch.setattr(comparisons, "LISTED", 13)
    # Five standard deviations of 20,000 draws, and the one that is added.
    assert comparisons.sign_flips(values) == pytest.approx(listed, abs=5 * (listed * (1 - listed) / 2e4) ** 0.5 + 5e-5)


def test_holm_is_closed_testing_with_bonferroni():
    """An adjusted p is the largest Bonferroni p of all families that the comparison belongs to."""
    values = [0.04, 0.001, 0.6, 0.01, 0.02]
    families = [f for size in range(1, 6) for f in itertools.combinations(range(5), size)]
    p_of = {family: min(1.0, len(family) * min(values[i] for i in family)) for family in families}
    expected = [max(p for family, p in p_of.items() if i in family) for i in range(5)]
    assert comparisons.holm(values) == pytest.approx(expected)


def test_holm_does_not_count_comparisons_without_p():
    adjusted = comparisons.holm([0.02, float("nan"), 0.03])
    assert (adjusted[0], adjusted[2]) == (0.04, 0.04)
    assert np.isnan(adjusted[1])


def test_one_pair_has_a_difference_and_no_test():
    one = comparisons.compare([0.5])
    assert (one.count, one.mean) == (1, 0.5)
    assert np.isnan([one.low, one.high, one.t, one.flips]).all()


# -- batches, steps ----------------------------------------------------------------------------------------------------


def test_twice_the_epochs_begin_with_the_same_batches():
    once, twice = (epochs(10, 4, times, seed=3) for times in (1, 2))
    assert twice[:3] == once
    assert sorted(i for batch in once for i in batch) == sorted(i for batch in twice[3:] for i in batch) == [*range(10)]
    assert twice[3:] != once


@pytest.mark.parametrize(("decay", "falls_from"), [("linear", 10), ("wsd", 70), ("none", 100)])
def test_learning_rate_rises_in_a_tenth_and_falls_from_where_it_should(decay, falls_from):
    rates = [rate(decay, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert [one == 1.0 for one in rates[9:]] == [step < falls_from for step in range(9, 100)]
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[falls_from:]))


def cross_entropy(model, numbers):
    return torch.nn.functional.cross_entropy(model(numbers), numbers)


@pytest.mark.parametrize("method", ON_ALL_WEIGHTS)
def test_each_method_trains_with_the_passes_of_its_price(method):
    model, numbers = TiedHead(), torch.arange(6)
    own = METHODS[method]
    loss = functools.partial(cross_entropy, model)
    before = loss(numbers).item()
    cost = train(model, own, [numbers] * 20, loss, 1e-2, own.start, seed=0)
    sharp = {"SAM": 20, "SAM, find_rho": 20, "FSAM, 0.1": 20, "FriendlySAM": 20, "tail-SAM, WSD": 6}
    assert (cost.steps, cost.passes) == (20, 20 + sharp.get(method, 0))
    assert loss(numbers).item() < before / 2
    assert not model.training


def test_sam_with_find_rho_is_sam_with_the_rho_that_find_rho_suggests_on_the_first_batches():
    batches, trained = [torch.tensor([i % 6, 2 * i % 6, 3]) for i in range(8)], []
    for method in ("SAM, find_rho", "SAM"):
        model = TiedHead()
        search = find_rho(model, cross_entropy, batches[:2])
        assert 0 < search.rho < search.rhos[-1]
        found = METHODS[method].found
        loss = functools.partial(cross_entropy, model)
        cost = train(model, METHODS[method], batches, loss, 1e-2, 0.0 if found else search.rho, seed=0)
        assert cost.rho == (search.rho if found else None)
        trained.append(list(model.parameters()))
    assert all(a.equal(b) for a, b in zip(*trained, strict=True))


def test_l2_sp_does_not_pull_a_new_head():
    optimizer = METHODS["AdamW-L2SP"].build(TiedHead(), 1e-3, 10.0, novel=["linear.weight"])
    assert optimizer.param_groups[0]["l2_sp"] == 10.0
    model = TiedHead()
    optimizer = METHODS["AdamW-L2SP"].build(model, 1e-3, 100.0, novel=["linear.weight"])
    start = [model.linear.weight.detach().clone(), model.embedding.weight.detach().clone()]
    with torch.no_grad():
        model.linear.weight.add_(1.0)
        model.embedding.weight.add_(1.0)
    sum((p * 0).sum() for p in model.parameters()).backward()
    optimizer.step()
    assert (model.embedding.weight - start[1]).mean().item() == pytest.approx(0.9, abs=1e-4)
    assert (model.linear.weight - start[0]).mean().item() == pytest.approx(1.0, abs=1e-4)
