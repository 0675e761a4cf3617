"""Calibrated decisions: closed forms, ties, the guarantee over many calibration sets, and independent libraries."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from basics.console import UserError
from lmd import calibration
from lmd.combination import combined

RATES = [0.001, 0.01, 0.02, 0.05, 0.07, 0.1, 0.29, 1 / 3, 0.5, 0.57, 0.58, 0.99]


def tables(count, most=40):
    """Calibration scores and new scores with many ties, and scores far outside."""
    rng = np.random.default_rng(1)
    for _ in range(count):
        n, new, levels = rng.integers(1, most), rng.integers(1, 12), rng.integers(1, 30)
        values = rng.normal(size=levels) * 10.0 ** rng.integers(-6, 7)
        scores = np.concatenate([rng.choice(values, new), [values.max() + 1, -np.inf, np.inf]])
        yield rng.choice(values, n), scores


# ------------------------------------------------------------------------------------------------------ p-values


def test_p_values_by_hand():
    calibration_scores = [3.0, 1.0, 2.0, 2.0]
    expected = {0.5: 5, 1.0: 5, 1.5: 4, 2.0: 4, 2.5: 2, 3.0: 2, 3.5: 1, np.inf: 1, -np.inf: 5}
    found = calibration.p_values(calibration_scores, list(expected))
    assert (found == np.array(list(expected.values())) / 5).all()
    assert calibration.smallest_rate(4) == found.min()
    assert calibration.p_values(calibration_scores, []).shape == (0,)


def test_p_values_are_their_definition():
    for known, scores in tables(300):
        direct = [(1 + sum(c >= s for c in known)) / (len(known) + 1) for s in scores]
        assert calibration.p_values(known, scores).tolist() == direct


def test_float32_scores_are_compared_exactly():
    """A score a little above a calibration score is above it, whatever type each comes in."""
    known = np.array([0.1, 0.2], np.float32)
    assert calibration.p_values(known, known).tolist() == [1, 2 / 3]
    assert calibration.p_values(known, np.float64(known) + 1e-12).tolist() == [2 / 3, 1 / 3]
    limit = calibration.threshold(known, 0.5)  # k = 1
    assert (known >= limit).tolist() == [False, False]
    assert isinstance(limit, float)
    assert np.nextafter(known[1], np.float32(1)) >= limit


# --------------------------------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize("rate", RATES)
def test_threshold_is_where_p_values_meet_the_rate(rate):
    """In tables full of ties, at the scores themselves and next to them, and at rates that are p-values."""
    compared = 0
    for known, scores in tables(200):
        near = np.concatenate([scores, known, np.nextafter(known, np.inf), np.nextafter(known, -np.inf)])
        for each in (rate, round(rate * (len(known) + 1)) / (len(known) + 1)):
            if not calibration.smallest_rate(len(known)) <= each < 1:
                continue
            flagged = calibration.p_values(known, near) <= each
            assert (flagged == (near >= calibration.threshold(known, each))).all()
            compared += 1
    assert compared or rate < 1 / 40


@pytest.mark.parametrize(("rate", "text"), [(0.05, "1/20"), (0.29, "29/100"), (0.57, "57/100"), (0.07, "7/100")])
def test_ranks_are_the_floor_of_the_exact_product(rate, text):
    for n in range(20, 3000):
        assert calibration.flagged_ranks(n, rate) == Fraction(text) * (n + 1) // 1


@pytest.mark.parametrize(
    ("n", "rate", "message"),
    [
        (200, 0.001, "n = 200 cannot give 0.1 %; calibrate with at least 999"),
        (1998, 0.0005, "n = 1,998 cannot give 0.05 %; calibrate with at least 1,999"),
        (1, 1e-6, "n = 1 cannot give 0.0001 %; calibrate with at least 999,999"),
        (98, 0.01, "n = 98 cannot give 1 %; calibrate with at least 99"),
    ],
)
def test_too_small_a_rate(n, rate, message):
    for call in (lambda: calibration.band(n, rate), lambda: calibration.threshold(np.arange(n), rate)):
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value) == message


def test_the_least_number_named_is_the_least():
    for rate in RATES:
        least = calibration._least(rate)
        assert calibration.flagged_ranks(least, rate) >= 1
        if least > 1:
            with pytest.raises(UserError, match=f"at least {least:,}$"):
                calibration.flagged_ranks(least - 1, rate)
    with pytest.raises(UserError, match="at least"):
        calibration.flagged_ranks(10, 5e-324)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 5, float("nan"), float("inf"), "0.1", None])
def test_rates_out_of_range(rate):
    calls = [
        lambda: calibration.threshold([1.0], rate),
        lambda: calibration.band(100, rate),
        lambda: calibration.discoveries([0.5], rate),
    ]
    for call in calls:
        with pytest.raises(UserError, match="between 0 and 1"):
            call()


# ------------------------------------------------------------------------------------------------ the guarantee


@pytest.mark.parametrize(
    ("n", "rate", "low", "high"),
    [(200, 0.05, 2.4, 8.4), (1000, 0.05, 3.7, 6.4), (1000, 0.01, 0.5, 1.7), (5000, 0.01, 0.7, 1.3)],
)
def test_published_bands(n, rate, low, high):
    """In percent, as published in one digit."""
    assert np.round(np.multiply(100, calibration.band(n, rate)), 1).tolist() == [low, high]


def test_band_in_closed_form():
    """k = 1: the rate is Beta(1, n), whose quantiles are 1 - (1 - q)^(1/n); k = n: Beta(n, 1), q^(1/n)."""
    low, high = calibration.band(99, 0.01, level=0.9)
    assert (low, high) == pytest.approx((1 - 0.95 ** (1 / 99), 1 - 0.05 ** (1 / 99)), rel=1e-9)
    assert calibration.band(99, 0.99, level=0.9) == pytest.approx((0.05 ** (1 / 99), 0.95 ** (1 / 99)), rel=1e-9)


@pytest.mark.parametrize(("n", "rate"), [(200, 0.05), (99, 0.01), (500, 0.1), (50, 0.05)])
def test_realised_rates_fit_the_formula(n, rate):
    """Over 4,000 calibration sets of uniform scores, whose realised rate is exactly 1 - threshold.

    The tolerances are 4 standard errors: of the mean, and of the share inside the 95 % band.  Kolmogorov and
    Smirnov's test compares the whole distribution.
    """
    sets, k = 4000, calibration.flagged_ranks(n, rate)
    rng = np.random.default_rng(n)
    realised = np.array([1 - calibration.threshold(rng.random(n), rate) for _ in range(sets)])
    beta = stats.beta(k, n + 1 - k)
    assert realised.mean() == pytest.approx(k / (n + 1), abs=4 * beta.std() / sets**0.5)
    assert k / (n + 1) <= rate
    low, high = calibration.band(n, rate)
    inside = ((realised >= low) & (realised <= high)).mean()
    assert inside == pytest.approx(0.95, abs=4 * (0.95 * 0.05 / sets) ** 0.5)
    assert stats.kstest(realised, beta.cdf).pvalue > 1e-3


def by_two_parts(known, scores):
    """p-values of the score that combines a score with a coarser one of itself."""
    parts = lambda values: np.stack([values, np.round(values / 2)], axis=1)
    reference = parts(known[::2])
    return calibration.p_values(combined(reference, parts(known[1::2])), combined(reference, parts(scores)))


@pytest.mark.parametrize("decide", [calibration.p_values, calibration.two_sided, by_two_parts])
@pytest.mark.parametrize("levels", [None, 7])
def test_false_alarms_of_exchangeable_scores(decide, levels):
    """The mean over calibration sets of the share flagged is the rate, or below it where scores are tied.

    1,000 sets of n = 100 with 50 new images each; the share flagged has mean k/(n + 1) and the beta-binomial's spread.
    """
    n, new, sets, rng = 100, 50, 1000, np.random.default_rng(5)
    draw = (lambda size: rng.normal(size=size)) if levels is None else lambda size: rng.integers(levels, size=size)
    p = np.array([decide(draw(n), draw(new)) for _ in range(sets)])
    for rate in (0.05, 0.1, 0.3):
        shares = (p <= rate).mean(axis=1)
        expected = calibration.flagged_ranks(n, rate) / (n + 1)
        if decide is calibration.two_sided:  # each tail has its own whole number of ranks
            tails = rate * (1 - calibration.LOWER), rate * calibration.LOWER
            expected = sum(calibration.flagged_ranks(n, tail) if tail > 1 / 101 else 0 for tail in tails) / (n + 1)
        error = 4 * shares.std() / sets**0.5
        assert shares.mean() <= min(rate, expected) + error
        if levels is None and decide is not by_two_parts:  # whose sums of p-values are tied
            assert shares.mean() >= expected - error
            if decide is calibration.p_values:
                spread = stats.betabinom(new, expected * (n + 1), n + 1 - expected * (n + 1)).std() / new
                assert shares.std() == pytest.approx(spread, rel=0.11)  # 4 standard errors at a kurtosis of 4


# -------------------------------------------------------------------------------------------------- many images


def benjamini_hochberg(p, rate):
    """The definition, in exact arithmetic of the decimals."""
    exact = [Fraction(str(value)) if value < 1 else Fraction(1) for value in p]
    ordered = sorted(exact)
    last = max((i for i, value in enumerate(ordered, 1) if value * len(p) <= Fraction(str(rate)) * i), default=0)
    return [last > 0 and value <= ordered[last - 1] for value in exact]


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2, 0.3])
def test_discoveries_are_their_definition(rate):
    """p-values of n = 999, and continuous ones."""
    rng, found = np.random.default_rng(2), 0
    for _ in range(200):
        count = int(rng.choice([1, 5, 20, 50]))
        p = np.where(rng.random(count) < 0.5, rng.integers(1, 40, count), rng.integers(1, 1001, count)) / 1000
        flags = calibration.discoveries(p, rate)
        assert flags.tolist() == benjamini_hochberg(p, rate)
        found += flags.any()
        continuous = rng.random(count) ** 3
        assert (calibration.discoveries(continuous, rate) == (stats.false_discovery_control(continuous) <= rate)).all()
    assert found > 20
    assert calibration.discoveries([], rate).shape == (0,)


@pytest.mark.parametrize("rate", ["0.05", "0.07", "0.29", "0.3", "0.7"])
def test_discoveries_at_the_bound(rate):
    """i p-values that equal rate i / N as decimals are flagged, which products of doubles miss; just above it none."""
    for count in range(1, 60):
        for i in range(1, count):
            bound = float(Fraction(rate) * i / count)
            p = np.append(np.full(i, bound), np.ones(count - i))
            assert calibration.discoveries(p, float(rate)).sum() == i
            assert not calibration.discoveries(np.minimum(1, p * (1 + 1e-9)), float(rate)).any()


def test_false_discoveries_stay_below_the_rate():
    """450 in-domain and 50 foreign images against n = 1,000: the false share is at most q times the in-domain share."""
    rng, rate, shares, caught = np.random.default_rng(3), 0.1, [], []
    for _ in range(300):
        scores = np.concatenate([rng.normal(size=450), rng.normal(3.5, 1, 50)])
        flags = calibration.discoveries(calibration.p_values(rng.normal(size=1000), scores), rate)
        shares.append(flags[:450].sum() / max(1, flags.sum()))
        caught.append(flags[450:].mean())
    assert np.mean(shares) == pytest.approx(0.9 * rate, abs=4 * np.std(shares) / 300**0.5)
    assert np.mean(caught) > 0.7


def test_folder_test_is_mann_and_whitneys():
    rng = np.random.default_rng(4)
    for n, count in ((30, 5), (40, 20), (500, 100)):
        known, scores = rng.normal(size=n), rng.normal(0.3, 1, count)
        expected = stats.mannwhitneyu(scores, known, alternative="greater").pvalue
        assert calibration.folder_test(known, scores) == pytest.approx(expected, rel=1e-12)
        assert calibration.folder_test(known.tolist(), scores + 10) < 1e-3 < calibration.folder_test(known, scores)
        assert calibration.folder_test(known, scores - 10) > 0.999


def test_folder_test_counts_all_orders():
    """3 of 7 scores are the folder's: of all 35 choices those with as large a sum of ranks."""
    values = np.arange(7.0)
    choices = list(itertools.combinations(range(7), 3))
    for chosen in choices:
        p = calibration.folder_test(np.delete(values, chosen), values[list(chosen)])
        assert p == pytest.approx(sum(sum(other) >= sum(chosen) for other in choices) / 35, rel=1e-12)


def test_folder_test_of_one_image_is_its_p_value():
    for known, scores in tables(50):
        found = [calibration.folder_test(known, [score]) for score in scores]
        assert found == pytest.approx(calibration.p_values(known, scores).tolist(), rel=1e-12)


def test_folder_test_where_all_are_tied():
    assert calibration.folder_test(np.zeros(100), np.zeros(30)) > 0.999


# ------------------------------------------------------------------------------------------------ several scores


def test_two_sided_by_hand():
    """n = 9, a weight of .2 below: a score above all has p = .1 / .8, one below all .1 / .2."""
    known = np.arange(1.0, 10.0)
    found = calibration.two_sided(known, [10, 0, 9, 1, 5.5], lower=0.2)
    assert found == pytest.approx([0.125, 0.5, 0.25, 1, 0.625])
    assert calibration.two_sided(known, [0], lower=0.5) == pytest.approx([0.2])
    tied = calibration.two_sided(np.zeros(9), [0, 1, -1], lower=0.2)
    assert tied == pytest.approx([1, 0.125, 0.5])  # ties are in neither tail


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("call", [calibration.p_values, calibration.two_sided, calibration.folder_test])
@pytest.mark.parametrize(
    ("known", "scores", "message"),
    [
        ([1.0, np.nan, 3.0], [1.0], "1 of 3 scores is not a number"),
        ([1.0, 2.0], [np.nan, 1.0, np.nan], "2 of 3 scores are not a number"),
        ([1.0, np.inf], [1.0], "1 of 2 calibration scores is infinite"),
        ([], [1.0], "no calibration scores"),
    ],
)
def test_bad_scores(call, known, scores, message):
    with pytest.raises(UserError, match=message):
        call(known, scores)


def test_other_bad_input():
    with pytest.raises(UserError, match="without images"):
        calibration.folder_test([1.0], [])
    with pytest.raises(ValueError, match="scores are"):
        calibration.p_values([1.0], [[1.0]])
    for lower in (0, 1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            calibration.two_sided([1.0], [1.0], lower)
    for p in (0, 1.5, np.nan):
        with pytest.raises(ValueError, match="above 0"):
            calibration.discoveries([p], 0.1)
