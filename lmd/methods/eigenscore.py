"""How uncertain the model is about the image behind a noisy one: the largest eigenvalues of the posterior covariance.

EigenScore, ICLR 2026 (arXiv 2510.07206): at noise ratio g = b / a the covariance of x0 given x_t is g^2 dD/dxbar, where
D is the predicted clean image and xbar = x_t / a.  Its largest eigenvalues come from subspace iteration with central
differences of D; their mean is standardised by in-domain images at each level, and summed over the levels.  As
published: 5 levels, 1 to 3 eigenvalues, 5 to 20 draws of the noise, some 400 evaluations.  Ours: 5 levels, the largest
eigenvalue by 4 iterations, 2 draws, the mean over the levels.  The network computes in float32 whatever the model's
precision: in bfloat16 its rounding is as large as the differences (on a small model of Fashion-MNIST they came out at a
quarter of what they are, some below 0).  Cost: 2 x levels x draws x eigenvalues x iterations, 80 evaluations.
"""

import torch

from basics import noise
from lmd.methods import network
from lmd.methods.densities import Average
from lmd.methods.fitted import DensityMethod
from sde_lib import per_image


class EigenScore(DensityMethod):
    """The mean over levels of the standardised mean of the largest eigenvalues.

    Args:
        largest, smallest: noise ratios of the first and the last level.
        levels: how many, even in the logarithm.
        eigenvalues: how many count.
        iterations: of the subspace iteration.
        draws: of the noise at each level.
        step: the norm of half a central difference, in standard deviations of a pixel's noise.  On a small model of
            Fashion-MNIST the eigenvalues with 0.1 are those with 0.03 within 0.6 %; with 1 they are 7 % too small at
            the first level.
    """

    name = "eigenscore"

    def __init__(self, largest=2.0, smallest=0.2, levels=5, eigenvalues=1, iterations=4, draws=2, step=0.1):
        super().__init__({self.name: Average(levels)})
        self.reasons = {
            self.name: (
                "uncertainty: the model is less sure than usual what is behind its noisy versions",
                "certainty: the model is surer than usual what is behind its noisy versions",
            )
        }
        self.settings = {
            "largest": largest,
            "smallest": smallest,
            "levels": levels,
            "eigenvalues": eigenvalues,
            "iterations": iterations,
            "draws": draws,
            "step": step,
        }
        self._ratios = network.even_ratios(largest, smallest, levels)

    def evaluations(self, model):
        options = self.settings
        return 2 * options["levels"] * options["draws"] * options["eigenvalues"] * options["iterations"]

    def compiled_evaluations(self, model):
        return self.evaluations(model) if model.score.net.precision == "fp32" else 0  # see `Network.in_float32`

    def statistics(self, model, images, keys):
        """The mean of the largest eigenvalues (B, L), in squares of the model's range, from the noisiest level on."""
        options = self.settings
        levels = network.levels_at(model, [ratio for ratio in self._ratios for _ in range(options["draws"])])
        score = model.score.in_float32()
        start = torch.randn(options["eigenvalues"], *images.shape[1:], generator=noise.generator(self.name))

        def eigenvalues(at, x0, draw):
            x = at.noisy(x0, draw(0, "prior"))
            return _largest(score, at, x, start.to(x.device), options["iterations"], options["step"]).mean(dim=1)

        found = network.measure(model, images, levels, eigenvalues, keys, fold=2 * options["eigenvalues"])  # (B, L n)
        return found.unflatten(1, (-1, options["draws"])).mean(dim=2).numpy()

    def features(self, statistics):
        return {self.name: statistics}


def _largest(score, at, x, start, iterations, step):
    """The K largest eigenvalues (n, K) float64 of g^2 dD/dxbar.

    Args:
        score: a `models.score.Score`.
        at: the rows' `network.Levels` (n,).
        x: (n, C, H, W), noisy images.
        start: (K, C, H, W), the vectors of the first iteration.
        iterations: at least 1.
        step: as in `EigenScore`.
    """
    count, rows = len(start), torch.arange(len(x), device=x.device).repeat_interleave(2 * len(start))
    ratio = (at.std.double() / at.alpha.double())[:, None]  # (n, 1)
    basis = start.flatten(1).double().T.expand(len(x), -1, -1)  # (n, D, K)
    for _ in range(iterations):
        basis = torch.linalg.qr(basis).Q
        moves = torch.stack([basis, -basis], dim=1).transpose(2, 3).reshape(len(rows), *x.shape[1:])  # (n 2 K, C, H, W)
        level = at[rows]
        seen = x[rows] + step * per_image(level.std) * moves.to(x.dtype)
        x0 = (seen - per_image(level.std) * level.eps(score, seen)) / per_image(level.alpha)
        ends = x0.double().view(len(x), 2, count, -1)  # (n, 2, K, D)
        image = ((ends[:, 0] - ends[:, 1]) / (2 * step * ratio[..., None])).transpose(1, 2)  # (n, D, K): dD/dxbar basis
        values, basis = (basis * image).sum(dim=1), image  # Rayleigh quotients (n, K)
    return ratio**2 * values
