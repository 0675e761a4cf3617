"""The score's norm over its curvature.

"SCOPED: Score-Curvature Out-of-distribution Proximity Evaluator for Diffusion" (arXiv 2510.01456): at a time t,
r = |s|^2 / v'(ds/dx)v for the score s(x_t, t) and one random probe v; -log of a kernel density of r; the largest over
the times.  Over the domain the mean of |s|^2 is that of -tr(ds/dx), so r is about -1 there.  As published: t = 1 and
300 of DDPM's 1000.  Ours: the same times as noise ratios 0.0148 and 1.23; one draw of the noise, and a probe of +-1,
for each.  Cost: 2 evaluations of the network and 2 vector-Jacobian products.
"""

import torch

from basics import noise
from lmd.likelihood import hutchinson
from lmd.methods import network
from lmd.methods.densities import KernelDensity
from lmd.methods.fitted import DensityMethod


class Scoped(DensityMethod):
    """The largest -log density of the ratio over the levels.

    Args:
        ratios: noise ratios of the levels.
    """

    name = "scoped"

    def __init__(self, ratios=(0.0148, 1.23)):
        super().__init__({f"level{i}": KernelDensity(1) for i in range(len(ratios))})
        self.parts = (self.name,)
        self.settings = {"ratios": list(ratios)}

    def evaluations(self, model):
        return len(self.densities)

    def compiled_evaluations(self, model):
        return 0  # all are differentiated

    def statistics(self, model, images, keys):
        """|s|^2 and v'(ds/dx)v at each level in turn (B, 2 L)."""
        keys = noise.seed_keys(self.name, keys)

        def ratio_parts(at, x0, draw):
            x, probe = at.noisy(x0, draw(0, "prior")), draw(1, "prior").sign()
            score, curvature = hutchinson(model.score, x, at.t, probe)
            return torch.stack([score.flatten(1).double().square().sum(dim=1), curvature.double()], dim=1)  # (n, 2)

        levels = network.levels_at(model, self.settings["ratios"])
        return network.measure(model, images, levels, ratio_parts, keys).flatten(1).numpy()

    def features(self, statistics):
        norms, curvatures = statistics[:, ::2], statistics[:, 1::2]  # (N, L)
        ratios = norms / curvatures
        return {part: ratios[:, [i]] for i, part in enumerate(self.densities)}

    def score_statistics(self, statistics):
        return super().score_statistics(statistics).max(axis=1, keepdims=True)
