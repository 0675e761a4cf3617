"""Methods whose parts are densities of what they measure; a subclass says which numbers each density sees."""

import abc

import numpy as np

from lmd.methods.base import Method


class DensityMethod(Method):
    """A score by one density for each of `parts`; a subclass may make its parts of the densities' scores otherwise.

    Args:
        densities: name of a part -> its `densities.Density`, in the order of the parts.
    """

    def __init__(self, densities):
        self.parts, self.densities = tuple(densities), densities

    @property
    def fewest_images(self):
        return max(density.fewest for density in self.densities.values())

    @abc.abstractmethod
    def features(self, statistics):
        """Statistics (N, F) to what the densities see: (N, F') for each part, by its name."""

    def fit_statistics(self, statistics):
        for part, values in self.features(statistics).items():
            self.densities[part].fit(values)
        return self

    def score_statistics(self, statistics):
        features = self.features(statistics)
        return np.stack([density.score(features[part]) for part, density in self.densities.items()], axis=1)

    def fitted(self):
        return {
            f"{part}.{name}": value
            for part, density in self.densities.items()
            for name, value in density.arrays().items()
        }

    def restore(self, arrays):
        own = {part: {} for part in self.densities}
        for name, value in arrays.items():
            part, _, key = name.rpartition(".")
            if part not in own:
                raise ValueError(f"the method {self.name} keeps nothing called {name}")
            own[part][key] = value
        for part, values in own.items():
            self.densities[part].restore(values)
