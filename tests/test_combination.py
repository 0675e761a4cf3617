"""One score from several parts: by hand, against distributions whose tails are known, and where empirical ranks end."""

import numpy as np
import pytest
from scipy import stats

from basics.console import UserError
from lmd.calibration import LOWER, two_sided
from lmd.combination import combined


def test_a_single_part_is_the_score():
    scores = np.random.default_rng(0).normal(size=(5, 1))
    np.testing.assert_array_equal(combined(np.zeros((0, 1)), scores), scores[:, 0])


def test_fishers_sum_of_two_sided_p_values_where_the_reference_reaches():
    rng = np.random.default_rng(1)
    reference = rng.normal(size=(200, 3))
    scores = rng.uniform(-0.9, 0.9, size=(50, 3))  # within the inner 80 %
    p = np.stack([two_sided(reference[:, part], scores[:, part]) for part in range(3)])
    np.testing.assert_allclose(combined(reference, scores), -2 * np.log(p).sum(axis=0), rtol=1e-12)
    assert not np.signbit(combined(reference, np.zeros((1, 3)))).any()


def test_the_tails_of_exponential_scores_are_exact():
    """ln P(S >= s) of Laplace scores is linear in both tails; a reference of 10^5 knows the slope within a percent."""
    reference = stats.laplace.rvs(size=100_000, random_state=2)
    scores = np.array([6.0, 12.0, 24.0, -6.0, -12.0])
    expected = -stats.laplace.logsf(np.abs(scores)) + np.log([1 - LOWER, 1 - LOWER, 1 - LOWER, LOWER, LOWER])
    found = combined(np.stack([reference, 0 * reference], axis=1), np.stack([scores, 0 * scores], axis=1)) / 2
    np.testing.assert_allclose(found, expected, rtol=0.02)


def test_ranks_go_over_into_the_tail_without_a_jump():
    reference = np.sort(np.random.default_rng(3).normal(size=1000))
    scores = np.sort(np.append(np.linspace(-6, 6, 5001), reference))
    found = combined(np.stack([reference, reference], axis=1), np.stack([scores, scores], axis=1))
    middle = np.searchsorted(scores, np.median(reference))
    assert (np.diff(found[middle:]) >= 0).all(), "larger scores are not further in"
    assert np.abs(np.diff(found[middle:])).max() < 0.1
    assert np.unique(found[scores > reference[-1]]).size == (scores > reference[-1]).sum(), "nothing is saturated"


def test_a_part_that_sees_nothing_does_not_hide_another():
    """One clearly foreign part among three blind ones; with ranks alone an in-domain image can be as far out."""
    rng = np.random.default_rng(4)
    reference, inside, foreign = (rng.normal(size=(n, 4)) for n in (50, 2000, 2000))
    foreign[:, 0] += 20
    assert combined(reference, foreign).min() > combined(reference, inside).max()


def test_rare_scores_of_independent_parts_are_as_rare_as_fishers_sum_says():
    """Above the 99th percentile of its chi-square distribution; 30,000 draws know the share within .2 %."""
    rng = np.random.default_rng(5)
    found = combined(rng.exponential(size=(100_000, 3)), rng.exponential(size=(30_000, 3)))
    assert np.mean(found > stats.chi2(6).ppf(0.99)) == pytest.approx(0.01, abs=0.002)


def test_ties_and_infinite_scores():
    tied = np.stack([np.zeros(20), np.arange(20.0)], axis=1)
    found = combined(tied, np.array([[0, 10], [1e-3, 10], [np.inf, 10], [-np.inf, 10]]))
    assert found[0] < 2
    assert np.isfinite(found[1])
    assert found[0] < found[1] < found[2]
    assert np.isposinf(found[2:]).all()
    with pytest.raises(UserError, match="NaN"):
        combined(tied, np.array([[0, np.nan]]))
