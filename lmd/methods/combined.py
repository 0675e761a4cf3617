"""Lift, Map, Detect beside what one path to noise shows: each sees what the other is blind to.

Inpainting tells whether the parts of an image fit together, and is blind to what is smooth, simple or faint, which it
maps back better than the domain's own images.  The path norms (see `diffpath`) are the other way round.  The parts stay
apart here; one decision is made of them by their p-values among in-domain images, see `lmd.combination`.
Cost: 30 evaluations of the network, 20 of them for LMD.
"""

import dataclasses

import numpy as np

from lmd.methods.base import Method
from lmd.methods.diffpath import DiffPath
from lmd.methods.lmd import LMD


class Combined(Method):
    """LMD's distances and the path norms, each with its usual settings.

    Args:
        sampler: of LMD, see `lmd.LMD`.
    """

    name = "combined"
    learns = True

    def __init__(self, sampler="fast"):
        self.settings = {"sampler": sampler}
        self._lmd, self._path = LMD(sampler=sampler), DiffPath()
        self.parts = self._lmd.parts + self._path.parts
        self.reasons = {**self._lmd.reasons, **self._path.reasons}

    @property
    def fewest_images(self):
        return self._path.fewest_images

    def evaluations(self, model):
        return self._lmd.evaluations(model) + self._path.evaluations(model)

    def statistics(self, model, images, keys):
        """The path's means, then LMD's distances (B, F)."""
        return self._beside(model, images, keys, self._lmd.statistics(model, images, keys))

    def examine(self, model, images, keys):
        """Reconstructions and distances are LMD's."""
        examined = self._lmd.examine(model, images, keys)
        return dataclasses.replace(examined, statistics=self._beside(model, images, keys, examined.statistics))

    def fit_statistics(self, statistics):
        self._path.fit_statistics(self._split(statistics)[0])
        return self

    def score_statistics(self, statistics):
        path, distances = self._split(statistics)
        return np.concatenate([self._lmd.score_statistics(distances), self._path.score_statistics(path)], axis=1)

    def fitted(self):
        return self._path.fitted()

    def restore(self, arrays):
        self._path.restore(arrays)

    def _beside(self, model, images, keys, distances):
        return np.concatenate([self._path.statistics(model, images, keys), distances], axis=1)

    def _split(self, statistics):
        return np.split(statistics, [self._path.width], axis=1)
