"""How much noise is predicted along an image's path to noise and how much that changes, against few references.

UFCOD (arXiv 2605.03410): the sums of eps^2 and of d^2 over the pixels and the 10 steps of DDIM inversion, see
`diffpath`; standardised, the soft minimum -T ln sum exp(-distance / T) of the distances to the 10 nearest of 100
references, T = 0.5.  As published, but for the times of the path, which are even in ln(a / b), and the references,
which are fitted images drawn at random.  Cost: 10 evaluations of the network.
"""

import functools

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

from basics import noise
from basics.console import UserError
from lmd.methods.densities import Density
from lmd.methods.diffpath import DiffPath, split_moments
from lmd.methods.fitted import DensityMethod


class UFCOD(DensityMethod):
    """The soft minimum of the distances to references.

    Args:
        references: how many at most.
        neighbours: the nearest of them that count.
        temperature: T, in standard deviations.
        reach, steps: as in `diffpath.DiffPath`.

    Raises:
        UserError: there are fewer references than neighbours.
    """

    name = "ufcod"
    limits = {"steps": 2}

    def __init__(self, references=100, neighbours=10, temperature=0.5, reach=3.0, steps=10):
        if references < neighbours:
            raise UserError(f"ufcod: references are {references}; they must be as many as the {neighbours} neighbours")
        super().__init__({self.name: SoftNeighbours(references, neighbours, temperature)})
        self.reasons = {
            self.name: (
                "texture: what is noise in it to the model is unlike the domain's (an unlikely path to noise)",
                "typicality: its path to noise is more usual than those of most images of the domain",
            )
        }
        self.settings = {
            "references": references,
            "neighbours": neighbours,
            "temperature": temperature,
            "reach": reach,
            "steps": steps,
        }

    def evaluations(self, model):
        return self.settings["steps"]

    @functools.cached_property
    def pieces(self):
        return DiffPath(reach=self.settings["reach"], steps=self.settings["steps"]).pieces

    def assembled(self, statistics):
        """Means over pixels of eps^2 and d^2 (N, 2), summed over the path."""
        eps, change = split_moments(statistics[0], self.settings["steps"])
        return np.stack([eps[:, 1].sum(axis=1), change[:, 1].sum(axis=1)], axis=1)

    def statistics(self, model, images, keys):
        return self.assembled([piece.statistics(model, images, keys) for piece in self.pieces])

    def features(self, statistics):
        return {self.name: statistics}


class SoftNeighbours(Density):
    """The soft minimum of the distances to the k nearest of some fitted points; of two numbers an image.

    Args:
        points: how many are kept at most.
        k: how many count.
        temperature: T of -T ln sum exp(-distance / T).
    """

    kind = "a set of references"
    shapes = {"points": ("N", "F")}

    def __init__(self, points, k, temperature):
        super().__init__(features=2)
        self._points, self._k, self._temperature = points, k, temperature

    @property
    def fewest(self):
        return max(super().fewest, self._k)

    def restore(self, arrays):
        super().restore(arrays)
        if len(self._arrays["points"]) < self._k:
            raise ValueError(f"{self.kind}: {self._k} points at least, not {len(self._arrays['points'])}")

    def _learn(self, values):
        order = np.random.default_rng(noise.key("references") & 0xFFFFFFFF).permutation(len(values))
        return {"points": values[np.sort(order[: self._points])]}

    def _score(self, values):
        nearest = np.partition(cdist(values, self._arrays["points"]), self._k - 1, axis=1)[:, : self._k]
        return -self._temperature * logsumexp(-nearest / self._temperature, axis=1)
