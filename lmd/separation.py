"""How well scores tell two sets of images apart: ROC-AUC, AUPR, FPR95; and whether one ROC-AUC beats another.

Scores are larger further out of domain, and out of domain is the positive class unless a name says otherwise, as in
OpenOOD and pytorch-ood.
"""

import dataclasses

import numpy as np
from scipy import special

from basics.console import UserError
from lmd.calibration import as_scores


def roc_auc(in_domain, out_of_domain):
    """ROC-AUC: the share of pairs in which the out-of-domain image has the larger score, ties counting half.

    Args:
        in_domain: (n,) scores.
        out_of_domain: (m,) scores.

    Returns:
        float: in [0, 1].

    Raises:
        UserError: a side has no scores, or one is NaN.
    """
    in_domain, out_of_domain = _sides(in_domain, out_of_domain)
    return float(_below(in_domain, out_of_domain).mean())


def aupr_out(in_domain, out_of_domain):
    """AUPR with out of domain as the positive class, larger scores first: average precision, as in scikit-learn.

    Average precision is the mean, over the positive images, of the precision at each one's own score.  (The area by
    trapezoids, which pytorch-ood takes, lies above it for most scores: it draws lines between points of the curve that
    no threshold reaches.)

    Args:
        in_domain: (n,) scores.
        out_of_domain: (m,) scores.

    Returns:
        float: in (0, 1]; m / (n + m) for scores that tell nothing.

    Raises:
        UserError: a side has no scores, or one is NaN.
    """
    in_domain, out_of_domain = _sides(in_domain, out_of_domain)
    caught, alarms = _at_least(out_of_domain, out_of_domain), _at_least(in_domain, out_of_domain)  # (m,) both
    return float((caught / (caught + alarms)).mean())


def aupr_in(in_domain, out_of_domain):
    """AUPR with in domain as the positive class, smaller scores first; else as `aupr_out`."""
    in_domain, out_of_domain = _sides(in_domain, out_of_domain)
    return aupr_out(-out_of_domain, -in_domain)


def fpr95(in_domain, out_of_domain):
    """FPR95: the false-alarm rate of in-domain images at the threshold that catches 95 % of the out-of-domain images.

    Out of domain is the positive class, as in OpenOOD and pytorch-ood: TPR is the share of foreign images that are
    flagged, FPR that of in-domain ones.  (Papers whose positive class is in domain report another number under the same
    name: the share of foreign images passed at the threshold that passes 95 % of the in-domain ones.)  The threshold is
    the largest score from which on at least 95 % of the out-of-domain images are flagged, a score at the threshold
    being flagged: the first point of the ROC curve with a TPR of 0.95 or more, nothing interpolated.

    Returns:
        float: in [0, 1], smaller is better.

    Raises:
        UserError: as `aupr_out`.
    """
    in_domain, out_of_domain = _sides(in_domain, out_of_domain)
    missed = len(out_of_domain) // 20  # of m images at most, in whole numbers: m - ceil(0.95 m)
    return float((in_domain >= np.sort(out_of_domain)[missed]).mean())


# ---------------------------------------------------------------------------------------------------- two detectors


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first detector's ROC-AUC less the second's, on the same images.

    Attributes:
        value: in [-1, 1].
        low, high: its confidence interval.
        p_value: two-sided, of the hypothesis that both ROC-AUCs are equal.
    """

    value: float
    low: float
    high: float
    p_value: float


def compare(first, second, level=0.95):
    """Whether one detector separates better than another on the same images, by DeLong's variance.

    An image's placement is the share of the other side's images that it is on the right side of, ties counting half;
    the ROC-AUC is the mean placement.  The difference of two ROC-AUCs is then a mean over each side's images, with the
    variance of such means (DeLong, DeLong and Clarke-Pearson, "Comparing the areas under two or more correlated
    receiver operating characteristic curves", Biometrics 1988) and normally distributed for some 20 images a side.

    Args:
        first: the scores of one detector, a pair: in-domain (n,), out-of-domain (m,).
        second: the other's of the same images in the same order.
        level: coverage of the interval, in (0, 1).

    Returns:
        Difference: of p-value 1 where the ROC-AUCs are equal; of p-value 0 and no width where they differ by as much
        for every image.

    Raises:
        ValueError: the two detectors scored different numbers of images.
        UserError: a side has fewer than two images, or as `aupr_out`.
    """
    first, second = _sides(*first), _sides(*second)
    sizes = [len(side) for side in first]
    if sizes != [len(side) for side in second]:
        raise ValueError("the detectors to be compared scored different numbers of images")
    if min(sizes) < 2:
        raise UserError("two detectors are compared on at least two images a side, better twenty")
    parts = [one - other for one, other in zip(_placements(*first), _placements(*second), strict=True)]
    value = parts[0].mean()
    error = np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts))
    p_value = 2 * special.ndtr(-abs(value) / error) if error else value == 0
    reach = special.ndtri((1 + level) / 2) * error
    return Difference(float(value), float(value - reach), float(value + reach), float(p_value))


def holm(p):
    """Holm's adjustment of a table's p-values: rows where it is <= a hold together with at most the error a.

    Adjusted in ascending order, the i-th of M is the largest of (M - j + 1) p_(j) over j <= i, 1 at most (Holm, "A
    simple sequentially rejective multiple test procedure", 1979).  The tests may depend on each other.

    Args:
        p: (M,) p-values in [0, 1].

    Returns:
        np.ndarray: (M,) adjusted p-values, in the order of `p`.
    """
    p = np.asarray(p, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p-values lie between 0 and 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


# -------------------------------------------------------------------------------------------------------- helpers


def _sides(in_domain, out_of_domain):
    """Both sides' scores as float64, without NaN."""
    sides = as_scores(in_domain), as_scores(out_of_domain)
    for side, name in zip(sides, ("in-domain", "out-of-domain"), strict=True):
        if not len(side):
            raise UserError(f"there are no {name} scores; both sides need images")
    return sides


def _at_least(scores, thresholds):
    """How many scores (N,) reach each of (M,) thresholds: (M,)."""
    return len(scores) - np.searchsorted(np.sort(scores), thresholds, "left")


def _placements(in_domain, out_of_domain):
    """Each image's share of the other side's images that it is on the right side of: (m,) out-of-domain, (n,) in."""
    below = _below(in_domain, out_of_domain)
    above = 1 - _below(out_of_domain, in_domain)
    return below, above


def _below(scores, of):
    """The share of scores (N,) below each of (M,), ties counting half: (M,)."""
    scores = np.sort(scores)
    return (np.searchsorted(scores, of, "left") + np.searchsorted(scores, of, "right")) / (2 * len(scores))
