"""One score from the parts of a method: how unusual an image is among in-domain images, all parts together.

Each part becomes a p-value among reference images, in-domain ones that were not trained on; Fisher's sum of these,
-2 sum ln p, is the score.  It is a fixed function once the reference is, so calibrating it on other images gives valid
p-values whatever the dependence of the parts.  Both tails count, the lower with a twentieth of the weight: smooth and
faint images are mapped back better than the domain's own.

m reference images cannot tell apart what is further out than all of them: every p-value there would be 1/(m + 1), and a
part that sees nothing would hide what another sees clearly.  So the tails go on exponentially.
"""

import numpy as np

from lmd.calibration import LOWER, as_scores

FEWEST = 3  # reference images: a tail begins below the two that are furthest out
_TAIL = 0.1  # share of the reference images from which on a tail is exponential; .05 to .2 detect equally well


def combined(reference, scores):
    """The score of images whose parts were scored.

    Args:
        reference: (m, K) parts of reference images, finite, `FEWEST` at least; of a single part nothing is read.
        scores: (N, K) parts of the images; infinite ones are the furthest in or out.

    Returns:
        (N,) float64, larger = further out: Fisher's sum, or the score itself of a single part.

    Raises:
        UserError: a score is NaN.
    """
    if scores.shape[1] == 1:
        return scores[:, 0]
    return 2 * sum(_surprise(reference[:, part], as_scores(scores[:, part])) for part in range(scores.shape[1]))


def _surprise(reference, scores):
    """-ln p (N,) of scores that may be too large or too small, p as `calibration.two_sided` but for the tails."""
    upper = _log_p(reference, scores) - np.log(1 - LOWER)
    below = _log_p(-reference, -scores) - np.log(LOWER)
    return -np.minimum(0, np.minimum(upper, below)) + 0.0  # no -0.0


def _log_p(reference, scores):
    """ln of the p-values (N,) of large scores, exponential beyond `start`: the excess over it by its mean."""
    known, count = np.sort(reference), len(reference)
    tail = max(2, round(_TAIL * count))
    start = known[-tail - 1]
    mean_excess = max((known[-tail:] - start).mean(), np.finfo(float).eps * max(1, abs(start)))  # of ties it is 0
    at_least = count - np.searchsorted(known, scores, "left")
    empirical = np.log((1 + at_least) / (count + 1))
    beyond = np.log((1 + tail) / (count + 1)) - (scores - start) / mean_excess
    return np.where(scores > start, beyond, empirical)
