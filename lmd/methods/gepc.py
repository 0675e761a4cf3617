"""How far the network is from giving a turned image the turned prediction.

"GEPC: Group-Equivariant Posterior Consistency" (arXiv 2602.00191): for symmetries h (flips, half a turn), noisy images
x_t and scores s, the mean over h of |h^-1 s(h x_t) - s(x_t)|^2 / |s(x_t)|^2 at each pixel; the average of the largest
30 %; -log of a kernel density.  A network learns these symmetries, as far as the domain has them, on its domain alone.
As published: two levels, one draw of the noise.  Ours: noise ratios 0.1 and 0.5; |s(x_t)|^2 averaged over the image;
the logarithms of the two levels' averages in one density.  Cost: 8 evaluations of the network.
"""

import math

import torch

from basics import noise
from lmd.methods import network
from lmd.methods.base import Examined
from lmd.methods.densities import KernelDensity, log
from lmd.methods.fitted import DensityMethod

SYMMETRIES = (3,), (2,), (2, 3)  # the axes of (B, C, H, W) to flip: left and right, up and down, half a turn


class GEPC(DensityMethod):
    """-log density of the log inconsistencies.

    Args:
        ratios: noise ratios of the levels.
        share: of the pixels, the most inconsistent ones, that count.
    """

    name = "gepc"
    limits = {"share": (0, 1)}

    def __init__(self, ratios=(0.1, 0.5), share=0.3):
        super().__init__({self.name: KernelDensity(len(ratios))})
        self.settings = {"ratios": list(ratios), "share": share}

    def evaluations(self, model):
        return len(self.settings["ratios"]) * (1 + len(SYMMETRIES))

    def statistics(self, model, images, keys):
        """The inconsistency at each level (B, L)."""
        return self._of_maps(self._maps(model, images, keys))

    def examine(self, model, images, keys):
        """Each pixel's distance is its inconsistency, averaged over the levels."""
        maps = self._maps(model, images, keys)
        return Examined(self._of_maps(maps), distances=maps.mean(dim=1))

    def features(self, statistics):
        return {self.name: log(statistics)}

    def _maps(self, model, images, keys):
        """(B, L, H, W) float32 on the CPU."""

        def inconsistency(at, x0, draw):
            x = at.noisy(x0, draw(0, "prior"))
            turned = torch.cat([x, *(x.flip(axes) for axes in SYMMETRIES)])  # (4 n, C, H, W)
            levels = at[torch.arange(len(at), device=x.device).repeat(1 + len(SYMMETRIES))]
            parts = torch.arange(len(turned), device=x.device).split(model.rows)
            eps = torch.cat([levels[rows].eps(model.score, turned[rows]) for rows in parts])
            straight, *others = eps.split(len(x))
            squares = sum(
                (other.flip(axes) - straight).square() for other, axes in zip(others, SYMMETRIES, strict=True)
            ).mean(dim=1)  # (n, H, W); each symmetry is its own inverse
            return squares / len(SYMMETRIES) / straight.square().mean(dim=(1, 2, 3))[:, None, None]

        levels = network.levels_at(model, self.settings["ratios"])
        keys = noise.seed_keys(self.name, keys)
        return network.measure(model, images, levels, inconsistency, keys, fold=1 + len(SYMMETRIES))

    def _of_maps(self, maps):
        pixels = maps.flatten(2).double()  # (B, L, H W)
        count = math.ceil(self.settings["share"] * pixels.shape[2])
        return pixels.topk(count, dim=2).values.mean(dim=2).numpy()
