"""Images noised to a level and denoised again in a few deterministic steps, and how far that takes them."""

import functools

import numpy as np

import metrics
import sampling
from basics import noise
from basics.pixels import to_data_range, to_model_range
from lmd.distances import distances_of
from lmd.methods import network

END = 0.05  # the noise ratio b / a of the last evaluation, whose predicted clean image is the result


class Projection:
    """Noise to a level and denoise by DDIM (arXiv 2010.02502), at times even in ln(b / a).

    Args:
        model: a `trained_model.TrainedModel`.
        ratio: b / a of the level, above `END`.
        steps: evaluations of the network, at least 1.

    Raises:
        UserError: see `network.levels_at`.
    """

    def __init__(self, model, ratio, steps):
        self._model, self._levels = model, network.levels_at(model, network.even_ratios(ratio, END, steps))
        self._score = network.stepping(model.score)
        predictor = sampling.ExponentialIntegrator(self._score.sde, eta=0.0)
        self._scheme = sampling.Scheme(predictor, self._levels.t.cpu())

    def __call__(self, images, keys):
        """The projected images.

        Args:
            images: (B, C, H, W) uint8, or float in [0, 1].
            keys: (B,) int64, of the noise.

        Returns:
            (B, C, H, W) float32 in [0, 1], on the CPU.
        """
        model, centered = self._model, self._model.config.data.centered

        def some(rows):
            x0 = to_model_range(images[rows].to(model.device), centered)
            z = noise.KeyedNoise(keys[rows], x0.shape[1:], model.device)(0, "prior")
            x = self._levels.alpha[0] * x0 + self._levels.std[0] * z
            return to_data_range(sampling.integrate(self._score, x, self._scheme, None), centered).clamp(0, 1)

        return network.in_chunks(model, len(images), some)


class Distances:
    """Distances between images by some metrics, which are made once: some read large files.

    Args:
        names: of M metrics of `metrics.METRICS`.
    """

    def __init__(self, names):
        self.metrics_on = functools.lru_cache(maxsize=1)(lambda device: [metrics.create(n, device) for n in names])

    def __call__(self, images, others, device):
        """Of images (B, C, H, W) in [0, 1] from R others of each: (M, R, B) float64."""
        return distances_of(self.metrics_on(device), images, others, device).astype(np.float64)
