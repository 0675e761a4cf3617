"""One score from the parts of a method: how unusual an image is among in-domain images, all parts together.

Each part becomes a p-value among reference images, in-domain ones that were not trained on; Fisher's sum of these is
the score.  It is a fixed function once the reference is, so calibrating it on other images gives valid p-values
whatever the dependence of the parts.  Both tails count, the lower with a fifth of the weight: smooth and faint images
are mapped back better than the domain's own.
"""

import numpy as np

from lmd.calibration import fisher, two_sided


def combined(reference, scores):
    """The score of images whose parts were scored.

    Args:
        reference: (n, K) parts of reference images; of a single part nothing is read.
        scores: (N, K) parts of the images.

    Returns:
        (N,) float64, larger = further out: Fisher's sum, or the score itself of a single part.
    """
    if scores.shape[1] == 1:
        return scores[:, 0]
    columns = [two_sided(reference[:, part], scores[:, part]) for part in range(scores.shape[1])]
    return fisher(np.stack(columns, axis=1))
