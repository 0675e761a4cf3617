"""Decisions with a guarantee: p-values, thresholds and bands from the scores of held-back in-domain images.

A new image's p-value is the share of calibration scores at least as large as its own, the new one counted too.  If the
image is exchangeable with the calibration images, p <= rate has at most the probability `rate` (split conformal
prediction; Bates et al., "Testing for outliers with conformal p-values", arXiv 2104.08279).  The calibration images
must be neither trained on nor used to fit the score.  Larger scores are further out of domain throughout; as in
scikit-learn's tests and unlike its outlier detectors.  NumPy and SciPy alone: deciding anew needs no network.
"""

import decimal
from fractions import Fraction

import numpy as np
from scipy import special

from basics.console import UserError, percent, some_are

LOWER = 0.05  # weight of scores that are too small; .02 to .1 detect equally well, see docs/results.md
_ROUNDING = 1e-12  # relative; what products of a few doubles may be off


# ------------------------------------------------------------------------------------------------- one image


def p_values(calibration, scores):
    """Conformal p-values: p = (1 + #{calibration >= s}) / (n + 1).

    Args:
        calibration: (n,) finite scores of in-domain images.
        scores: (N,) scores of the images to decide about; infinite ones are the furthest in or out.

    Returns:
        np.ndarray: (N,) float64, multiples of 1 / (n + 1) in (0, 1].

    Raises:
        UserError: there are no calibration scores, one of them is not finite, or a score is NaN.
    """
    calibration, scores = _ascending(calibration), as_scores(scores)
    at_least = len(calibration) - np.searchsorted(calibration, scores, "left")  # (N,)
    return (1 + at_least) / (len(calibration) + 1)


def smallest_rate(n):
    """The smallest false-alarm rate that n calibration scores allow, which is their smallest p-value: 1 / (n + 1)."""
    return 1 / (n + 1)


def smallest_percent(n):
    """`smallest_rate` as text, rounded up: what is read there can be asked for."""
    return percent(smallest_rate(n), rounding=decimal.ROUND_CEILING)


def threshold(calibration, rate):
    """The score from which on an image is flagged: score >= threshold exactly where `p_values` are <= rate.

    It is the number next to the k-th largest calibration score, with k as in `flagged_ranks`: an image that ties with
    that score is not flagged.

    Args:
        calibration: (n,) finite scores of in-domain images.
        rate: false-alarm rate, in (0, 1).

    Returns:
        np.float64: a float that float32 arrays are compared with in float64; a plain one is rounded to float32 first.

    Raises:
        UserError: the rate is out of range or too small for n, or as `p_values`.
    """
    calibration = _ascending(calibration)
    last_unflagged = calibration[len(calibration) - flagged_ranks(len(calibration), rate)]
    return np.nextafter(last_unflagged, np.inf)


def check_rate(rate):
    """Refuses what is no false-alarm rate, whatever the number of images.

    Raises:
        UserError: it is no number in (0, 1).
    """
    if not is_share(rate):
        raise UserError(f"a false-alarm rate lies between 0 and 1, not at {rate}; 0.01 means 1 %")


def is_share(value):
    """Whether something is a number in (0, 1)."""
    try:
        return bool(0 < value < 1)
    except (TypeError, ValueError, RuntimeError):  # text, nothing, a list; an array; a tensor
        return False


def flagged_ranks(n, rate):
    """k = floor(rate (n + 1)): an image is flagged if fewer than k calibration scores reach its own.

    It is the largest k whose p-value k / (n + 1) is <= rate as double-precision numbers: the product would be rounded
    (0.29 * 100 is 28.999...), the quotient k / (n + 1) is the very p-value that is compared with the rate.

    Raises:
        UserError: the rate is no number in (0, 1), or below 1 / (n + 1).
    """
    check_rate(rate)
    k = round(rate * (n + 1))  # the floor or one more
    while k / (n + 1) > rate:
        k -= 1
    if k < 1:
        raise UserError(f"n = {n:,} cannot give {percent(rate)}; calibrate with at least {_least(rate):,}")
    return k


def _least(rate):
    """The smallest n with 1 / (n + 1) <= rate."""
    n = round(1 / Fraction(rate)) - 1
    return n if smallest_rate(n) <= rate else n + 1


def band(n, rate, level=0.95):
    """Where the realised false-alarm rate lies, given that the calibration set is one draw of many.

    With k as in `flagged_ranks` the realised rate of continuous scores is distributed as Beta(k, n + 1 - k) over
    calibration sets; with tied scores it is smaller.

    Args:
        n: number of calibration scores.
        rate: false-alarm rate, in (0, 1).
        level: probability of the interval, in (0, 1), as much below it as above.

    Returns:
        tuple: (low, high).

    Raises:
        UserError: as `flagged_ranks`.
    """
    return band_of_rank(n, flagged_ranks(n, rate), level)


def band_of_rank(n, k, level=0.95):
    """`band` for k flagged ranks, 1 <= k <= n."""
    low, high = special.betaincinv(k, n + 1 - k, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# -------------------------------------------------------------------------------------------------- many images


def discoveries(p, rate):
    """Flags by Benjamini and Hochberg (1995): at most the share `rate` of the flagged images is in domain, on average.

    All images up to the largest i with p_(i) <= rate i / N are flagged, p_(1) <= p_(2) <= ... being the sorted
    p-values.  Conformal p-values often meet the bound exactly, so rounding is allowed for.

    Args:
        p: (N,) p-values of all images of the folder.
        rate: false discovery rate, in (0, 1).

    Returns:
        np.ndarray: (N,) bool.

    Raises:
        UserError: the rate is out of range.
    """
    if not is_share(rate):
        raise UserError(f"a false discovery rate lies between 0 and 1, not at {rate}; 0.1 means 10 %")
    p = _shares(p)
    ascending = np.sort(p)
    bounds = rate * (1 + _ROUNDING) * np.arange(1, len(p) + 1) / max(1, len(p))
    met = ascending[ascending <= bounds]
    return p <= (met[-1] if len(met) else -1)


def folder_test(calibration, scores):
    """Whether a folder's images as a whole are further out than the calibration images: Mann and Whitney's test.

    A new score that ties with a calibration score counts as the smaller one, as in `p_values`: the test stays valid
    (no smaller p-value by the tie), and of a single image it is its p-value.  Exact for up to 8 images, else by the
    normal approximation.

    Args:
        calibration: (n,) finite scores of in-domain images.
        scores: (N,) scores of the folder's images, N >= 1.

    Returns:
        float: one-sided p-value of the hypothesis that all n + N images are exchangeable.

    Raises:
        UserError: the folder has no images, or as `p_values`.
    """
    from scipy import stats  # takes most of a second, which deciding anew need not wait for

    calibration, scores = _ascending(calibration), as_scores(scores)
    if not len(scores):
        raise UserError("a folder without images cannot be compared; name one with images")
    values = np.concatenate([scores, calibration])
    new = np.arange(len(values)) < len(scores)
    ranks = np.empty(len(values))
    ranks[np.lexsort((~new, values))] = np.arange(len(values))  # of tied scores the new ones come first
    return float(stats.mannwhitneyu(ranks[new], ranks[~new], alternative="greater").pvalue)


# ---------------------------------------------------------------------------------------------- several scores


def two_sided(calibration, scores, lower=LOWER):
    """p-values that see scores that are too small as well: p = min(1, upper / (1 - lower), below / lower).

    `upper` is the one-sided p-value, `below` the same for small scores, (1 + #{calibration <= s}) / (n + 1).  The
    false alarms allowed are shared out, the part `lower` of them to small scores: P(p <= a) <= P(upper <= (1 - lower)
    a) + P(below <= lower a) <= a, so these are valid p-values (Bonferroni's bound with weights, which is reached, as
    no score is in both tails).  Smooth and faint images inpaint better than the domain's own, for example.

    Args:
        calibration: (n,) finite scores of in-domain images.
        scores: (N,) scores.
        lower: weight of the lower tail, in (0, 1).

    Returns:
        np.ndarray: (N,) float64 in (0, 1]; the smallest are 1 / ((1 - lower) (n + 1)) and 1 / (lower (n + 1)).

    Raises:
        ValueError: the weight is out of range.
        UserError: as `p_values`.
    """
    if not 0 < lower < 1:
        raise ValueError(f"the weight of the lower tail lies between 0 and 1, not at {lower}")
    calibration, scores = _ascending(calibration), as_scores(scores)
    upper, below = p_values(calibration, scores), p_values(-calibration, -scores)
    return np.minimum(1, np.minimum(upper / (1 - lower), below / lower))


# ------------------------------------------------------------------------------------------------------- checks


def _ascending(calibration):
    """Calibration scores, sorted, float64."""
    calibration = as_scores(calibration)
    if not len(calibration):
        raise UserError("there are no calibration scores; calibrate with in-domain images that were held back")
    if infinite := int(np.isinf(calibration).sum()):
        raise UserError(f"{some_are(infinite, len(calibration), 'calibration score')} infinite; {_REMEDY}")
    return np.sort(calibration)


def as_scores(scores):
    """Scores (N,) as float64 without NaN."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1:
        raise ValueError(f"scores are (N,), not of shape {scores.shape}")
    if missing := int(np.isnan(scores).sum()):
        raise UserError(f"{some_are(missing, len(scores), 'score')} not a number (NaN); {_REMEDY}")
    return scores


def _shares(p):
    """p-values as float64, all in (0, 1]."""
    p = np.asarray(p, dtype=np.float64)
    if not ((p > 0) & (p <= 1)).all():
        raise ValueError("p-values lie above 0 and at 1 at most")
    return p


_REMEDY = "the model's weights are broken or its training diverged; choose another checkpoint"
