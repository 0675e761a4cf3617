"""How far an image is from itself after it was noised to several levels and denoised.

Graham, Pinaya, Tudosiu, Nachev, Ourselin and Cardoso, "Denoising diffusion models for out-of-distribution detection",
CVPR workshops 2023 (arXiv 2211.07740), section 3.  As published: a grid of 100 times of PLMS, every k-th of which is a
start; MSE and LPIPS at each, standardised by in-domain images, and their mean.  Ours: 5 levels of noise, each denoised
in 5 steps of DDIM, MSE and SSIM, which need no other network.  Cost: levels times steps, 25 evaluations.
"""

import math

import numpy as np

from basics import noise
from basics.pixels import to_model_range
from lmd.methods import network
from lmd.methods.densities import Average
from lmd.methods.fitted import DensityMethod
from lmd.methods.projection import END, Distances, Projection
from metrics import canonical


class DDPMOOD(DensityMethod):
    """The mean over levels and metrics of the standardised distances.

    Args:
        metrics: names in `metrics.METRICS`.
        smallest, largest: noise ratios b / a of the first and the last level.
        levels: how many, even in the logarithm.
        steps: evaluations of the network at each.

    Raises:
        UserError: an unknown metric.
    """

    name = "ddpm_ood"
    limits = {"smallest": (END, math.inf), "largest": (END, math.inf)}

    def __init__(self, metrics=("MSE", "SSIM"), smallest=0.25, largest=4.0, levels=5, steps=5):
        metrics = [canonical(name) for name in metrics]
        super().__init__({self.name: Average(len(metrics) * levels)})
        self.reasons = {
            self.name: (
                "structure: its parts do not fit together as the domain's do (far from itself once denoised)",
                "smoothness: it is plainer than the domain's images (close to itself once denoised)",
            )
        }
        self.settings = {
            "metrics": metrics,
            "smallest": smallest,
            "largest": largest,
            "levels": levels,
            "steps": steps,
        }
        self._ratios, self._distances = network.even_ratios(smallest, largest, levels), Distances(metrics)

    def evaluations(self, model):
        self._distances.metrics_on(model.device)  # fetched before anything is measured
        return len(self._ratios) * self.settings["steps"]

    def statistics(self, model, images, keys):
        """The distances (B, M L): by each of M metrics after each of L levels."""
        denoised = [
            Projection(model, ratio, self.settings["steps"])(images, noise.repetition_keys(keys, [level]))
            for level, ratio in enumerate(self._ratios)
        ]
        found = self._distances(to_model_range(images, centered=False), denoised, model.device)
        return np.ascontiguousarray(found.reshape(-1, len(images)).T)

    def features(self, statistics):
        return {self.name: statistics}
