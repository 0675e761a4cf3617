"""How the predicted noise changes along an image's path to noise.

Heng, Thiery and Soh, "Out-of-Distribution Detection with a Single Unconditional Diffusion Model", NeurIPS 2024 (arXiv
2405.11881), equations 9 to 11.  The path is DDIM inversion, eps_i the predicted noise at its i-th time, and d_i = eps_i
- eps_(i-1).  As published: 10 steps of DDIM; '1d' is a kernel density of the root of the sum of d^2 over pixels and
steps, '6d' a Gaussian mixture of the sums of eps, eps^2, eps^3, d, d^2 and d^3, of 50 or 100 components, their number
and kind of covariance by cross-validation.  (Published d are divided by the step in time, 1/10, which densities of
standardised numbers do not see.)  Ours by default, 'norms': times even in ln(a / b), b / a being the noise ratio, and a
mixture of at most 5 Gaussians of the logarithms of the means of eps^2 at each time and of d^2 between them, which the
sums hide from each other.  The published two take these times and, '6d', at most 5 components too.
Cost: 10 evaluations of the network.
"""

import functools
import math

import numpy as np
import torch

import sampling
from basics.console import UserError, choose
from basics.pixels import to_model_range
from lmd.methods import network
from lmd.methods.densities import GaussianMixture, KernelDensity, log
from lmd.methods.fitted import DensityMethod

POWERS = 1, 2, 3


class DiffPath(DensityMethod):
    """-log density of what a path is like.

    Args:
        form: a key of `FORMS`.
        reach: the path goes from ln(a / b) = `reach`, near the image, to -`reach`, near noise.
        steps: its times, at least 2.
        components: of a mixture at most.
    """

    name = "diffpath"
    limits = {"steps": 2}

    def __init__(self, form="norms", reach=3.0, steps=10, components=5):
        part, self._features, density = choose(form, FORMS, "form of diffpath")
        super().__init__({part: density(steps, components)})
        self.numbers = self.densities[part].features  # of an image, that the density sees
        self.reasons = {
            part: (
                "texture: what is noise in it to the model is unlike the domain's (an unlikely path to noise)",
                "typicality: its path to noise is more usual than those of most images of the domain",
            )
        }
        self.settings = {"form": form, "reach": reach, "steps": steps, "components": components}

    @property
    def width(self):
        """Statistics of an image."""
        return 2 * len(POWERS) * self.settings["steps"] - len(POWERS)

    def evaluations(self, model):
        return self.settings["steps"]

    @functools.cached_property
    def pieces(self):
        """All forms look at the same path."""
        return (DiffPath(reach=self.settings["reach"], steps=self.settings["steps"]),)

    def suits(self, model):
        """Whether the network was trained near all times of the path."""
        try:
            path_levels(model, self.settings["reach"], self.settings["steps"])
        except UserError:
            return False
        return True

    def statistics(self, model, images, keys):
        """`path_moments`."""
        return path_moments(model, images, self.settings["reach"], self.settings["steps"])

    def features(self, statistics):
        return {self.parts[0]: self._features(*split_moments(statistics, self.settings["steps"]))}


def path_levels(model, reach, steps):
    """The `network.Levels` (S,) of a path; arguments and errors as `path_moments`."""
    return network.levels_at(model, network.even_ratios(math.exp(-reach), math.exp(reach), steps))


def path_moments(model, images, reach, steps):
    """What the predicted noise is like along the paths of images to noise.

    Args:
        model: a `trained_model.TrainedModel`.
        images: (B, C, H, W) uint8.
        reach, steps: as in `DiffPath`.

    Returns:
        (B, 6 S - 3) float64, means over the pixels: of eps, eps^2 and eps^3, each at S times, then of d, d^2 and d^3,
        each between them.

    Raises:
        UserError: see `network.levels_at`.
    """
    levels = path_levels(model, reach, steps)
    x0 = to_model_range(images.to(model.device), model.config.data.centered)  # (B, C, H, W)
    score = network.stepping(model.score)

    def moments(rows):
        predicted = []
        x = levels.alpha[0] * x0[rows.to(model.device)]  # (n, C, H, W)
        sampling.invert(score, x, levels.t.cpu(), lambda t, x, eps, x0: predicted.append(eps))
        eps = torch.stack(predicted, dim=1).flatten(2).double()  # (n, S, D)
        both = eps, eps.diff(dim=1)
        return torch.cat([values.pow(power).mean(dim=2) for values in both for power in POWERS], dim=1)

    return network.in_chunks(model, len(images), moments).numpy()


def split_moments(statistics, steps):
    """`path_moments` (N, 6 S - 3) of S steps as those of eps (N, 3, S) and those of d (N, 3, S - 1)."""
    parts = np.split(statistics, [len(POWERS) * steps], axis=1)
    return [part.reshape(len(part), len(POWERS), -1) for part in parts]


def _norms(eps, change):
    return log(np.concatenate([eps[:, 1], change[:, 1]], axis=1))


def _one(eps, change):
    return np.sqrt(change[:, 1].sum(axis=1, keepdims=True))


def _six(eps, change):
    return np.concatenate([eps.sum(axis=2), change.sum(axis=2)], axis=1)


FORMS = {  # name: part, (N, 3, S) and (N, 3, S - 1) to what its density sees, the density of S times and components
    "norms": ("path_norms", _norms, lambda steps, components: GaussianMixture(2 * steps - 1, components)),
    "1d": ("diffpath_1d", _one, lambda steps, components: KernelDensity(1)),
    "6d": ("diffpath_6d", _six, lambda steps, components: GaussianMixture(6, components)),
}
