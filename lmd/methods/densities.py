"""What in-domain numbers are like: densities fitted to them, each kept as plain arrays from which alone it scores.

Every density standardises its F numbers first, so their units do not matter.  A score is a negative log density (in the
standardised units) or a distance: larger = further from what was fitted.  scikit-learn fits the mixture and is not
needed to score.
"""

import abc

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

from basics import noise
from basics.console import UserError, some_are

IMAGES_A_NUMBER = 5  # that a density needs at least: a full covariance of fewer is mostly chance
_ROWS = 1024  # scored at a time against all fitted points, which bounds the memory


def log(values):
    """ln of numbers from 0 on, finite at 0; of norms and losses, which densities see so."""
    return np.log(np.maximum(values, 1e-30))


class Density(abc.ABC):
    """A density of F numbers.

    Args:
        features: F.

    Attributes:
        kind: what it is called in messages.
        shapes: the names of its arrays and their shapes; equal names are equal lengths, F is given.
        fewest: images that it needs at least.
    """

    kind = None
    shapes = {}

    def __init__(self, features):
        self.features = features
        self._arrays = {}

    @property
    def fewest(self):
        return IMAGES_A_NUMBER * self.features

    def fit(self, values):
        """Learns from the numbers of in-domain images.

        Args:
            values: (N, F), finite.

        Returns:
            itself.

        Raises:
            UserError: there are too few images, or numbers that are not finite.
        """
        values = np.asarray(values, np.float64)
        if len(values) < self.fewest:
            raise UserError(
                f"{self.kind} of {values.shape[1]} numbers an image needs at least {self.fewest} in-domain images, not "
                f"{len(values)}; give more images to fit"
            )
        if bad := int((~np.isfinite(values)).any(axis=1).sum()):
            raise UserError(
                f"{some_are(bad, len(values), 'in-domain image', 'has', 'have')} numbers that are not finite: the "
                "network's output is NaN or infinite; use another checkpoint"
            )
        spread = values.std(axis=0)
        scale = np.where(spread > 1e-12 * np.abs(values).max(axis=0), spread, 1.0)  # 1 for a number that is constant
        self._arrays = {"centre": values.mean(axis=0), "scale": scale}
        self._arrays |= self._learn(self._standardised(values))
        return self

    def score(self, values):
        """(N, F) to (N,) float64; NaN where a number is NaN."""
        values = self._standardised(np.asarray(values, np.float64))
        parts = [self._score(values[i : i + _ROWS]) for i in range(0, len(values), _ROWS)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def arrays(self):
        """What was learned: float64 arrays by name, empty before `fit`."""
        return dict(self._arrays)

    def restore(self, arrays):
        """Takes what `arrays` gave.

        Raises:
            ValueError: an array is missing or unknown, has another shape, or is not finite.
        """
        shapes = {"centre": ("F",), "scale": ("F",), **self.shapes}
        if arrays.keys() != shapes.keys():
            raise ValueError(f"{self.kind} is kept as {', '.join(shapes)}, not {', '.join(arrays) or 'nothing'}")
        lengths = {} if self.features is None else {"F": self.features}
        arrays = {name: np.asarray(arrays[name], np.float64) for name in shapes}
        for name, letters in shapes.items():
            value = arrays[name]
            same = value.ndim == len(letters) and all(
                lengths.setdefault(letter, length) == length
                for letter, length in zip(letters, value.shape, strict=True)
            )
            if not same or not value.size or not np.isfinite(value).all():
                raise ValueError(f"{self.kind}: {name} has the shape {value.shape}, or is not finite")
        if not (arrays["scale"] > 0).all():
            raise ValueError(f"{self.kind}: scale is not above 0")
        self._arrays = arrays

    def _standardised(self, values):
        return (values - self._arrays["centre"]) / self._arrays["scale"]

    @abc.abstractmethod
    def _learn(self, values):
        """The arrays of `shapes`, from standardised (N, F)."""

    @abc.abstractmethod
    def _score(self, values):
        """Standardised (N, F) to (N,)."""


class Independent(Density):
    """The sum of squared standardised numbers, which independent Gaussians have as -2 ln density up to a constant.

    Args:
        features: F, or None for any.
        fewest: images that it needs at least; each number has its own mean and variance, so few are enough.
    """

    kind = "a mean and a variance"

    def __init__(self, features=None, fewest=10):
        super().__init__(features)
        self._fewest = fewest

    @property
    def fewest(self):
        return self._fewest

    def _learn(self, values):
        return {}

    def _score(self, values):
        return np.square(values).sum(axis=1)


class Average(Independent):
    """The mean of the standardised numbers: how far they lie above the domain's, all together."""

    def _score(self, values):
        return values.mean(axis=1)


class GaussianMixture(Density):
    """The negative log density under a mixture of Gaussians with full covariances.

    It has as many components as there are images for, `IMAGES_A_NUMBER` F each, and no more than `components`.

    Args:
        features: F.
        components: at most.
    """

    kind = "a Gaussian mixture"
    shapes = {"weights": ("K",), "means": ("K", "F"), "whitening": ("K", "F", "F")}

    def __init__(self, features, components=5):
        super().__init__(features)
        self.components = components

    def _learn(self, values):
        from sklearn import mixture  # here, as it takes seconds and scores do not need it

        components = min(self.components, len(values) // self.fewest)
        seed = noise.key("Gaussian mixture") & 0xFFFFFFFF
        fitted = mixture.GaussianMixture(components, max_iter=500, random_state=seed).fit(values)
        return {"weights": fitted.weights_, "means": fitted.means_, "whitening": fitted.precisions_cholesky_}

    def _score(self, values):
        weights, means, whitening = (self._arrays[name] for name in self.shapes)
        white = np.einsum("nkf,kfg->nkg", values[:, None] - means, whitening)  # (N, K, F)
        log_volume = np.log(np.diagonal(whitening, axis1=1, axis2=2)).sum(axis=1)  # (K,)
        constant = np.log(weights) + log_volume - self.features / 2 * np.log(2 * np.pi)
        return -logsumexp(constant - np.square(white).sum(axis=2) / 2, axis=1)


class KernelDensity(Density):
    """The negative log density under Gaussian kernels at the fitted points, of Scott's width N^(-1/(F+4))."""

    kind = "a kernel density"
    shapes = {"points": ("N", "F")}

    def _learn(self, values):
        return {"points": values}

    def _score(self, values):
        points = self._arrays["points"]
        width = len(points) ** (-1 / (self.features + 4))
        squares = cdist(values, points, "sqeuclidean") / width**2  # (N, M)
        constant = np.log(len(points)) + self.features * np.log(width * np.sqrt(2 * np.pi))
        return constant - logsumexp(-squares / 2, axis=1)


class Neighbours(Density):
    """The distance to the k-th nearest of the fitted points.

    Args:
        features: F.
        k: 1 for the nearest; of a fitted image itself that is 0.
    """

    kind = "a set of neighbours"
    shapes = {"points": ("N", "F")}

    def __init__(self, features, k=5):
        super().__init__(features)
        self.k = k

    @property
    def fewest(self):
        return max(super().fewest, self.k)

    def restore(self, arrays):
        super().restore(arrays)
        if len(self._arrays["points"]) < self.k:
            raise ValueError(f"{self.kind}: {self.k} points at least, not {len(self._arrays['points'])}")

    def _learn(self, values):
        return {"points": values}

    def _score(self, values):
        return np.partition(cdist(values, self._arrays["points"]), self.k - 1, axis=1)[:, self.k - 1]
