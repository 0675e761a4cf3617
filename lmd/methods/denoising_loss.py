"""How well the network tells an image's noise, at several levels.

The losses are E_z |eps(a x + b z) - z|^2 / D (DDPM, arXiv 2006.11239, equation 14), for one image.  Two parts:

- `denoising_loss`: the distance of the ten log losses to the fifth nearest fitted image's, in units of their standard
  deviations.  Ours: the losses are DDPM's, this score of them is from no paper.
- `cclr`, the complexity-corrected loss ratio of Goodier and Campbell, "Likelihood-based Out-of-Distribution Detection
  with Denoising Diffusion Probabilistic Models" (arXiv 2310.17432): the loss over t <= f T divided by that over all t.
  As published: f = 0.5 and 100 draws of t and z for each of the two.  Ours: f = 0.5 and an integral by trapezoids over
  the levels below, t being the time at which the published VP SDE has their noise.

Levels: ten, even in ln(a/b) from 3 to -3; two draws of the noise at each.  Cost: 20 evaluations of the network.
"""

import math

import numpy as np
import torch

from basics import noise
from lmd.methods import network
from lmd.methods.densities import Neighbours, log
from lmd.methods.fitted import DensityMethod
from sde_lib import VPSDE


class DenoisingLoss(DensityMethod):
    """The losses' distance to fitted ones, and the share of the early times in them.

    Args:
        levels: how many, even in ln(a/b).
        draws: of the noise at each level.
        fraction: f, in (0, 1).
        k: of the k-th nearest neighbour.
    """

    name = "denoising_loss"
    limits = {"fraction": (0, 1), "levels": 2}
    reasons = {
        "denoising_loss": (
            "texture: the model tells its noise better or worse than that of the domain's images",
            "typicality: the model tells its noise as it does that of the domain's most usual images",
        ),
        "cclr": (
            "detail: the model tells little noise in it worse, beside much noise, than in the domain's images",
            "detail: the model tells little noise in it better, beside much noise, than in the domain's images",
        ),
    }

    def __init__(self, levels=10, draws=2, fraction=0.5, k=5):
        super().__init__({self.name: Neighbours(levels, k)})
        self.parts = self.name, "cclr"
        self.settings = {"levels": levels, "draws": draws, "fraction": fraction, "k": k}
        self._ratios = network.even_ratios(math.exp(-3), math.exp(3), levels)

    def evaluations(self, model):
        return self.settings["levels"] * self.settings["draws"]

    def statistics(self, model, images, keys):
        """The losses (B, L), from the least noise on."""

        def losses(at, x0, draw):
            z = draw(0, "prior")
            return (at.eps(model.score, at.noisy(x0, z)) - z).flatten(1).double().square().mean(dim=1)  # (n,)

        draws = self.settings["draws"]
        levels = network.levels_at(model, np.repeat(self._ratios, draws).tolist())
        found = network.measure(model, images, levels, losses, noise.seed_keys(self.name, keys))  # (B, L draws)
        return found.unflatten(1, (-1, draws)).mean(dim=2).numpy()

    def features(self, statistics):
        return {self.name: log(statistics)}

    def score_statistics(self, statistics):
        times = VPSDE().time_at(-torch.tensor(self._ratios, dtype=torch.float64).log()).numpy()  # (L,) rising
        steps = np.diff(times) / 2
        weighted = statistics * (np.append(steps, 0) + np.append(0, steps))  # by trapezoids
        early = times <= self.settings["fraction"]
        ratio = weighted[:, early].sum(axis=1) / weighted.sum(axis=1)
        return np.stack([super().score_statistics(statistics)[:, 0], ratio], axis=1)
