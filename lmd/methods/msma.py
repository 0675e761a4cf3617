"""Multiscale score matching analysis: the norms of the scores at several levels of noise.

Mahmood, Oliva and Styner, "Multiscale Score Matching for Out-of-Distribution Detection", ICLR 2021 (arXiv 2010.13132),
equations 5 and 6: v_i = sigma_i |score(x, sigma_i)|, which is the norm of the predicted noise.  The image itself is not
noised: the network sees a x.  As published: 10 levels from sigma 1 to 0.01, a geometric sequence; the negative log
density of v under a Gaussian mixture of 2 to 20 components by cross-validation, or the distance to the 5th nearest
fitted v.  Ours: the mixture, the same levels as noise ratios b/a, the logarithms of the norms, at most 5 components.
Cost: 10 evaluations of the network.
"""

from lmd.methods import network
from lmd.methods.densities import GaussianMixture, log
from lmd.methods.fitted import DensityMethod


class MSMA(DensityMethod):
    """-log density of the log norms of the predicted noise.

    Args:
        largest, smallest: noise ratios of the first and the last level.
        levels: how many, even in the logarithm.
        components: of the mixture at most.
    """

    name = "msma"

    def __init__(self, largest=1.0, smallest=0.01, levels=10, components=5):
        super().__init__({self.name: GaussianMixture(levels, components)})
        self.settings = {"largest": largest, "smallest": smallest, "levels": levels, "components": components}
        self._ratios = network.even_ratios(largest, smallest, levels)

    def evaluations(self, model):
        return len(self._ratios)

    def statistics(self, model, images, keys):
        """The norms of the predicted noise (B, L), from the noisiest level on."""

        def norms(at, x0, draw):
            return at.eps(model.score, at.noisy(x0, 0)).flatten(1).double().norm(dim=1)  # (n,)

        return network.measure(model, images, network.levels_at(model, self._ratios), norms).numpy()

    def features(self, statistics):
        return {self.name: log(statistics)}
