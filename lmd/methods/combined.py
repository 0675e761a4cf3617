"""Lift, Map, Detect beside what one path to noise shows: each sees what the other is blind to.

Inpainting tells whether the parts of an image fit together, and is blind to what is smooth, simple or faint, which it
maps back better than the domain's own images.  The path norms (see `diffpath`) are the other way round.  Two more parts
see them together, with the bits of the image's PNG file (see `complexity`): a mixture of Gaussians of all these numbers
in logarithms, and by how much LMD's distance is above what the other numbers let expect.  The parts stay apart here;
one decision is made of them by their p-values among in-domain images, see `lmd.combination`.
The combination is ours, from no paper.  Cost: 30 evaluations of the network, 20 of them for LMD.
"""

import dataclasses
import functools

import numpy as np

from lmd.methods.complexity import Complexity
from lmd.methods.densities import Density, GaussianMixture, log
from lmd.methods.diffpath import DiffPath
from lmd.methods.fitted import DensityMethod
from lmd.methods.lmd import LMD

_RIDGE = 0.01  # of the regression, as a share of the images: the path norms depend on each other


class Combined(DensityMethod):
    """LMD's distances by MSE and SSIM, the path norms, and both together.

    Args:
        sampler: of LMD, see `lmd.LMD`.
        components: of the mixtures at most.
    """

    name = "combined"

    def __init__(self, sampler="fast", components=5):
        self._lmd, self._path, self._size = LMD(sampler=sampler), DiffPath(components=components), Complexity()
        together = len(self._lmd.parts) + self._path.numbers + 1
        densities = {
            **self._path.densities,
            "joint": GaussianMixture(together, components),
            "lmd_excess": Excess(together - 1),
        }
        super().__init__(densities)
        self.parts = self._lmd.parts + tuple(densities)
        self.reasons = {**self._lmd.reasons, **self._path.reasons, **_REASONS}
        self.settings = {"sampler": sampler, "components": components}

    def evaluations(self, model):
        return self._lmd.evaluations(model) + self._path.evaluations(model)

    def suits(self, model):
        """Whether the path suits it; LMD does always."""
        return self._path.suits(model)

    @functools.cached_property
    def pieces(self):
        return *self._path.pieces, self._size, self._lmd

    def assembled(self, statistics):
        """The path's means, the bits of the PNG file and LMD's distances (N, F)."""
        path, bits, distances = statistics
        return np.concatenate([path, bits[:, :1], distances], axis=1)

    def statistics(self, model, images, keys):
        return self.assembled([piece.statistics(model, images, keys) for piece in self.pieces])

    def examine(self, model, images, keys):
        """Reconstructions and distances are LMD's."""
        examined = self._lmd.examine(model, images, keys)
        beside = [method.statistics(model, images, keys) for method in (self._path, self._size)]
        return dataclasses.replace(examined, statistics=self.assembled([*beside, examined.statistics]))

    def features(self, statistics):
        path, bits, distances = self._split(statistics)
        seen = self._path.features(path)  # (N, 19) by the name of its part
        others = np.concatenate([*seen.values(), log(bits)], axis=1)  # (N, 20)
        distances = log(self._lmd.score_statistics(distances))  # (N, 2)
        return {
            **seen,
            "joint": np.concatenate([distances, others], axis=1),
            "lmd_excess": np.concatenate([distances[:, :1], others], axis=1),
        }

    def score_statistics(self, statistics):
        distances = self._split(statistics)[2]
        own = self._lmd.score_statistics(distances)
        return np.concatenate([own, super().score_statistics(statistics)], axis=1)

    def _split(self, statistics):
        return np.split(statistics, [self._path.width, self._path.width + 1], axis=1)


class Excess(Density):
    """By how much the first number is above what a linear regression on the others lets expect."""

    kind = "a regression"
    shapes = {"weights": ("F",)}

    def _learn(self, values):
        own, others = values[:, 0], values[:, 1:]
        ridge = _RIDGE * len(values) * np.eye(others.shape[1])
        return {"weights": np.append(1.0, -np.linalg.solve(others.T @ others + ridge, others.T @ own))}

    def _score(self, values):
        return values @ self._arrays["weights"]


_REASONS = {
    "joint": (
        "combination: its structure, texture and plainness do not go together as in the domain's images",
        "typicality: its structure, texture and plainness are more usual than those of most images of the domain",
    ),
    "lmd_excess": (
        "structure: it is farther from its reconstruction than images of its texture and plainness are",
        "structure: it is closer to its reconstruction than images of its texture and plainness are",
    ),
}
