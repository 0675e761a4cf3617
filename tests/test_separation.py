"""ROC-AUC, AUPR, FPR95 and paired tests: definitions one by one, scikit-learn, pytorch-ood, and simulation."""

import itertools

import numpy as np
import pytest
import torch
from sklearn import metrics

from basics.console import UserError
from lmd import separation


def tables(count=60):
    """Scores of both sides: all sides of one or two images with scores 0 to 2, continuous ones, ones full of ties."""
    tiny = [side for size in (1, 2) for side in itertools.product([0.0, 1.0, 2.0], repeat=size)]
    yield from itertools.product(map(np.array, tiny), repeat=2)
    rng = np.random.default_rng(7)
    for number in range(count):
        n, m = (int(rng.integers(1, 80)) for _ in range(2))
        shift = rng.uniform(-1, 4)
        scores = rng.normal(size=n), rng.normal(shift, 1, m)
        yield tuple(np.round(side) for side in scores) if number % 2 else scores


def labelled(in_domain, out_of_domain):
    """Labels, 1 for out of domain, and scores of both sides together."""
    return np.repeat([0, 1], [len(in_domain), len(out_of_domain)]), np.concatenate([in_domain, out_of_domain])


# ------------------------------------------------------------------------------------------------------- rates


def test_rates_by_hand():
    in_domain, out_of_domain = [1, 2, 4], [3, 5]
    assert separation.aupr_out(in_domain, out_of_domain) == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert separation.aupr_in(in_domain, out_of_domain) == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert separation.fpr95(in_domain, out_of_domain) == pytest.approx(1 / 3)


def test_rates_of_extremes():
    perfect, useless = ([1, 2], [3, 4, 5]), ([1, 1], [1, 1, 1])
    rates = separation.aupr_out, separation.aupr_in, separation.fpr95
    assert [rate(*perfect) for rate in rates] == [1, 1, 0]
    assert [rate(*useless) for rate in rates] == pytest.approx([3 / 5, 2 / 5, 1])


def fpr_at_95(labels, scores):
    """The first point of scikit-learn's ROC curve at which 95 % are caught."""
    alarms, caught, _ = metrics.roc_curve(labels, scores, drop_intermediate=False)
    return alarms[caught >= 0.95][0]


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (separation.roc_auc, metrics.roc_auc_score),
        (separation.aupr_out, metrics.average_precision_score),
        (separation.aupr_in, lambda labels, scores: metrics.average_precision_score(1 - labels, -scores)),
        (separation.fpr95, fpr_at_95),
    ],
)
def test_rates_are_scikit_learns(rate, expected):
    for sides in tables():
        assert rate(*sides) == pytest.approx(expected(*labelled(*sides)), rel=1e-12), sides


@pytest.mark.parametrize("count", [1, 19, 20, 21, 39, 40, 59, 60, 100])
def test_fpr95_catches_95_percent_in_whole_numbers(count):
    """Out-of-domain scores 1..m and in-domain scores between them: the rate tells how many were caught."""
    out_of_domain = np.arange(1, count + 1)
    caught = separation.fpr95(out_of_domain + 0.5, out_of_domain) * count
    assert 100 * round(caught) >= 95 * count
    assert 100 * (round(caught) - 1) < 95 * count


def test_pytorch_ood_agrees():
    """Its FPR95 and the precision-recall curve that average precision sums up; its own area is by trapezoids."""
    functional = pytest.importorskip(
        "pytorch_ood.metrics.functional", reason="pytorch-ood, the oracle, is not installed", exc_type=ImportError
    )
    for sides in tables():
        labels, scores = (torch.from_numpy(part) for part in labelled(*sides))
        labels = -labels  # out of domain is negative
        expected = functional.fpr_at_tpr(scores, labels).item()
        assert separation.fpr95(*sides) == pytest.approx(expected, rel=1e-12)
        for rate, positive in ((separation.aupr_out, "ood"), (separation.aupr_in, "id")):
            precision, recall, _ = functional.pr_curve(scores, labels, positive=positive)
            assert rate(*sides) == pytest.approx(-(recall.diff() * precision[:-1]).sum().item(), rel=1e-12)
            trapezoids = functional.aupr(scores, labels, positive=positive).item()
            expected = -(recall.diff() * (precision[1:] - precision[:-1])).sum().item() / 2
            assert trapezoids - rate(*sides) == pytest.approx(expected, abs=1e-12)


# ------------------------------------------------------------------------------------------------- two detectors


def detectors(rng, n=60, m=50, second=1.0):
    """Two detectors' scores of the same images: they share half of their noise."""
    shared = rng.normal(size=n), rng.normal(size=m)
    return [
        (shared[0] + rng.normal(size=n), shared[1] + rng.normal(size=m) + shift * np.sqrt(2)) for shift in (1.0, second)
    ]


def kernel(in_domain, out_of_domain):
    """(m, n): 1 where the out-of-domain image has the larger score, 1/2 where the two are tied."""
    rows, columns = np.asarray(out_of_domain)[:, None], np.asarray(in_domain)[None]
    return (rows > columns) + 0.5 * (rows == columns)


@pytest.mark.parametrize("rounded", [False, True])
def test_compare_is_delongs_covariance(rounded):
    """All pairs of images, and the covariance matrix of both detectors as the paper has it."""
    rng = np.random.default_rng(8)
    for _ in range(20):
        both = detectors(rng, int(rng.integers(5, 40)), int(rng.integers(5, 40)), second=0.5)
        both = [tuple(np.round(side) if rounded else side for side in one) for one in both]
        pairs = [kernel(*one) for one in both]
        m, n = pairs[0].shape
        covariance = (
            np.cov([part.mean(axis=1) for part in pairs]) / m + np.cov([part.mean(axis=0) for part in pairs]) / n
        )
        contrast = np.array([1, -1])
        value, error = pairs[0].mean() - pairs[1].mean(), np.sqrt(contrast @ covariance @ contrast)
        found = separation.compare(*both)
        assert found.value == pytest.approx(value, abs=1e-12)
        assert (found.low, found.high) == pytest.approx((value - 1.959964 * error, value + 1.959964 * error), abs=1e-6)
        aucs = [metrics.roc_auc_score(*labelled(*one)) for one in both]
        assert found.value == pytest.approx(aucs[0] - aucs[1], abs=1e-12)
        outside = found.low > 0 or found.high < 0
        assert outside == (found.p_value < 0.05)
        mirrored = separation.compare(*both[::-1])
        assert (mirrored.value, mirrored.low, mirrored.high) == (-found.value, -found.high, -found.low)
        assert mirrored.p_value == found.p_value


def test_equal_detectors_are_found_different_at_the_level():
    """2,000 pairs of detectors as good as each other, at 60 and 50 images.

    4 standard errors of a share of 5 % are .02; the normal approximation may add a little.
    """
    rng = np.random.default_rng(9)
    p = np.array([separation.compare(*detectors(rng)).p_value for _ in range(2000)])
    assert (p < 0.05).mean() == pytest.approx(0.05, abs=0.02)
    assert (p < 0.5).mean() == pytest.approx(0.5, abs=0.05)


def test_better_detectors_are_found():
    """True ROC-AUCs: Phi(shift / sqrt 2) with shift and noise in units of a detector's own spread."""
    rng, truth = np.random.default_rng(10), 0.7602 - 0.5  # Phi(1 / sqrt 2) less chance
    found = [separation.compare(*detectors(rng, 200, 200, second=0.0)) for _ in range(400)]
    inside = np.mean([one.low <= truth <= one.high for one in found])
    assert inside == pytest.approx(0.95, abs=4 * (0.95 * 0.05 / 400) ** 0.5)
    assert np.mean([one.p_value < 0.001 for one in found]) > 0.95


def test_compare_where_nothing_varies():
    good, same, bad = ([1, 2, 3], [4, 5]), ([10, 20, 30], [40, 50]), ([4, 5, 6], [1, 2])
    assert separation.compare(good, good) == separation.compare(good, same) == separation.Difference(0, 0, 0, 1)
    assert separation.compare(good, bad) == separation.Difference(1, 1, 1, 0)


def test_holm_is_its_definition():
    """The adjusted p-value is the smallest level at which the step-down procedure rejects the row."""
    assert separation.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert separation.holm([0.9, 0.8]).tolist() == [1, 1]
    assert separation.holm([]).shape == (0,)
    rng = np.random.default_rng(11)
    for _ in range(50):
        p = np.round(rng.random(rng.integers(1, 9)) ** 3, 2)
        adjusted = separation.holm(p)
        for level in rng.random(20):
            rejected = np.zeros(len(p), bool)
            for step, row in enumerate(np.argsort(p, kind="stable")):
                if p[row] * (len(p) - step) > level:
                    break
                rejected[row] = True
            assert ((adjusted <= level) == rejected).all()


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("rate", [separation.aupr_out, separation.aupr_in, separation.fpr95])
def test_bad_scores(rate):
    with pytest.raises(UserError, match="1 of 2 scores is not a number"):
        rate([1.0, np.nan], [1.0])
    with pytest.raises(UserError, match="no in-domain scores"):
        rate([], [1.0])
    with pytest.raises(UserError, match="no out-of-domain scores"):
        rate([1.0], [])


def test_detectors_that_cannot_be_compared():
    with pytest.raises(ValueError, match="different numbers"):
        separation.compare(([1, 2], [3, 4]), ([1, 2, 3], [3, 4]))
    with pytest.raises(UserError, match="at least two"):
        separation.compare(([1, 2], [3]), ([1, 2], [3]))
    with pytest.raises(ValueError, match="between 0 and 1"):
        separation.holm([0.5, np.nan])
