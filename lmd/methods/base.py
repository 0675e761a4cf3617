"""The contract of a detector: what every method measures of an image, fits to in-domain images, and says of others.

A method sees the network in `statistics` alone.  What follows, fitting and scoring, takes these numbers, so they can be
kept in a file and used again with other settings, and no data set need be in memory.
"""

import abc
import dataclasses

import numpy as np
import torch


@dataclasses.dataclass(frozen=True)
class Examined:
    """What a method found out about a batch of B images.

    Attributes:
        statistics: (B, F) float64.
        reconstructions: (B, C, H, W) float32 in [0, 1], one of each image, or None where the method makes none.
        distances: (B, H, W) float32, how far each pixel is from where it was mapped, by how sure the model is of it; or
            None.
        misfit: (B,) float64, how much farther the image is from where it was mapped than it could be if the model knew
            its domain, where it would be 1 on average; or None.
    """

    statistics: np.ndarray
    reconstructions: torch.Tensor | None = None
    distances: torch.Tensor | None = None
    misfit: np.ndarray | None = None


class Method(abc.ABC):
    """One detector on one trained model.

    Attributes:
        name: its key in `methods.METHODS`.
        parts: the names of the K parts of a score, which see different things.
        reasons: part -> (what a large score says of an image, what a small one says), in words.
        settings: what its statistics and scores depend on besides model and images: keyword arguments of its class,
            JSON types.
        limits: setting -> what it may be: of a whole number the least, by default 1; of another the two numbers that it
            must lie between, by default 0 and infinity.
        fewest_images: images that `fit_statistics` needs at least; 0 where it learns nothing.
    """

    name = None
    parts = ()
    reasons = {}
    settings = {}
    limits = {}
    fewest_images = 0

    @abc.abstractmethod
    def evaluations(self, model):
        """Evaluations of the network of a `trained_model.TrainedModel` for an image."""

    def compiled_evaluations(self, model):
        """Those of its `evaluations` that a compiled network makes: none that is differentiated or looked into."""
        return self.evaluations(model)

    def suits(self, model):
        """Whether its numbers would be right on a `trained_model.TrainedModel`; else `statistics` refuses it."""
        return True

    @abc.abstractmethod
    def statistics(self, model, images, keys):
        """What is measured of a batch.

        Args:
            model: a `trained_model.TrainedModel`.
            images: (B, C, H, W) uint8.
            keys: (B,) int64, of the images' noise (`noise.seed_keys`).

        Returns:
            (B, F) float64; a row depends on its image and key alone, up to rounding.
        """

    @property
    def pieces(self):
        """Methods of whose statistics its own are made, so that what several methods look at is measured once."""
        return (self,)

    def assembled(self, statistics):
        """Its statistics (N, F) from those of its `pieces`, a list of (N, F') in their order."""
        return statistics[0]

    def examine(self, model, images, keys):
        """`Examined`: the statistics with what shows where they come from.  Arguments as `statistics`."""
        return Examined(self.statistics(model, images, keys))

    def fit_statistics(self, statistics):
        """Learns what in-domain images are like from statistics (N, F) of images that the model was not trained on.

        Returns:
            itself; a method that learns nothing, as here, is left as it was.

        Raises:
            UserError: there are fewer of them than `fewest_images`, or their statistics are not finite.
        """
        return self

    @abc.abstractmethod
    def score_statistics(self, statistics):
        """Statistics (N, F) to scores (N, K), a column for each of `parts`; larger = further out of the domain."""

    def reason(self, part, large):
        """In words, what a large or a small score of a part says of an image."""
        return self.reasons[part][0 if large else 1] if part in self.reasons else f"unusual by {part}"

    def meaning(self, part):
        """In words, what an image may be where a part's p-value is small; '' where that is not known."""
        return "; or ".join(self.reasons.get(part, ()))

    def fit(self, model, images, keys):
        """`fit_statistics` of a batch.  Arguments as `statistics`."""
        return self.fit_statistics(self.statistics(model, images, keys))

    def score(self, model, images, keys):
        """Scores (B, K) of a batch, larger = further out of the domain.  Arguments as `statistics`."""
        return self.score_statistics(self.statistics(model, images, keys))

    def fitted(self):
        """What `fit_statistics` learned: arrays by name, empty where it learns nothing."""
        return {}

    def restore(self, arrays):
        """Takes what `fitted` gave.

        Raises:
            ValueError: the arrays are not those of this method: one is missing, has another shape or is not finite.
        """
        if arrays:
            raise ValueError(f"the method {self.name} keeps no arrays")
