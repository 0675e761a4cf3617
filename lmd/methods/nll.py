"""The likelihood of an image, its distance from what is typical, and less the image's complexity.

Three parts, in bits per dimension:

- `nll`: -log2 p(x) by the probability-flow ODE (Score-SDE, arXiv 2011.13456, section 4.3), divergences by one probe of
  Skilling and Hutchinson's; as `lmd.likelihood` has it, but for the solver (below).
- `typicality`: |nll - its mean over the fitted images| (Nalisnick et al., arXiv 1906.02994, for single images).
- `input_complexity`: nll less the bits of the shortest lossless file, of PNG and JPEG-2000 (Serra et al., ICLR 2020,
  arXiv 1909.11480, equation 3).

As published: RK45 with error tolerances of 1e-5, see `lmd.likelihood`.  Ours: a sixth of its evaluations, and their
number known beforehand.  In y = x/a every SDE's ODE is dy/dg = eps, g = b/a; noise has a constant eps, so eps and not
the slope is extrapolated, by the third-order Adams-Bashforth method in even steps of u = ln g (as DEIS does, Zhang and
Chen, ICLR 2023, arXiv 2204.13902); the divergence d(g eps)/dy, for Gaussian data between 0 and 1 at every level, is
integrated over u by Simpson's rule.  On the shipped model that was within 0.003 bits of RK45 between the same levels
for each of ten images, clothes, digits, photographs and white noise, and 0.06 off for one of a single grey, of 2.9
bits; bfloat16 moves them by up to 0.03.  The path begins at the time of `likelihood.EPS`, or where g = 0.001 if that
is later: sub-VP begins at 1e-6, of which its network knows little (RK45 from there: up to 0.03 bits less).  Networks of
discrete times are refused: they know nothing below their first level (0.01 of DDPM's), nor between levels.

Cost: 41 evaluations of the network and as many vector-Jacobian products.
"""

import math

import numpy as np
import torch
from scipy.integrate import simpson

from basics import noise
from basics.console import UserError
from basics.pixels import to_model_range
from lmd import likelihood
from lmd.methods import network
from lmd.methods.base import Method
from lmd.methods.complexity import lossless_bits
from sde_lib import per_image

SMALLEST = 1e-3  # noise ratio
ORDER = 3  # of the extrapolation


class NLL(Method):
    """Bits per dimension, their distance from the mean, and less the file's.

    Args:
        steps: from level to level, see the module.
    """

    name = "nll"
    parts = "nll", "typicality", "input_complexity"
    reasons = {
        "nll": (
            "likelihood: the model finds its pixels less likely than those of the domain's images",
            "smoothness: the model finds its pixels likelier than those of the domain's images, as in plain ones",
        ),
        "typicality": (
            "typicality: its likelihood is far from that of the domain's usual images",
            "typicality: its likelihood is closer to the domain's mean than those of most images",
        ),
        "input_complexity": (
            "likelihood: the model finds it less likely than its complexity, the size of its file, lets expect",
            "smoothness: the model finds it likelier than its complexity, the size of its file, lets expect",
        ),
    }
    fewest_images = 1

    def __init__(self, steps=40):
        self.settings = {"steps": steps}
        self._mean = np.zeros(0)

    def evaluations(self, model):
        return self.settings["steps"] + 1

    def compiled_evaluations(self, model):
        return 0  # all are differentiated

    def statistics(self, model, images, keys):
        """Bits per dimension by the model and of the shortest lossless file (B, 2).

        Raises:
            UserError: the checkpoint was trained at discrete levels alone.
        """
        if not model.score.continuous:
            raise UserError(
                "nll follows the image through continuous times, but this checkpoint was trained at "
                f"{model.score.sde.N} discrete levels; use another checkpoint or another method"
            )
        dimensions, keys = images[0].numel(), noise.seed_keys(self.name, keys)
        centered = model.config.data.centered
        log_density = network.in_chunks(
            model, len(images), lambda rows: self._log_density(model, images[rows], keys[rows])
        )
        bits = likelihood.bits_per_dimension(log_density, dimensions, centered).numpy()
        return np.stack([bits, lossless_bits(images).min(axis=1) / dimensions], axis=1)

    def fit_statistics(self, statistics):
        if not len(statistics) or not np.isfinite(statistics).all():
            raise UserError("typicality needs in-domain images whose likelihoods are finite; use another checkpoint")
        self._mean = statistics[:, 0].mean(keepdims=True)
        return self

    def score_statistics(self, statistics):
        bits, file_bits = statistics.T
        return np.stack([bits, np.abs(bits - self._mean), bits - file_bits], axis=1)

    def fitted(self):
        return {"mean": self._mean}

    def restore(self, arrays):
        mean = np.asarray(arrays.get("mean", np.nan), np.float64)
        if arrays.keys() != {"mean"} or mean.shape != (1,) or not np.isfinite(mean).all():
            raise ValueError(f"the method {self.name} keeps one finite number, mean")
        self._mean = mean

    def _log_density(self, model, images, keys):
        """(n, C, H, W) uint8 to log densities in nats in the model's range (n,) float64."""
        draw = noise.KeyedNoise(keys, images.shape[1:], model.device)
        uniform = torch.special.ndtr(draw(0, "prior"))  # (n, C, H, W)
        x = to_model_range((images.to(model.device) + uniform) / 256, model.config.data.centered)
        return log_likelihood(model.score, x, draw(1, "prior").sign(), self.settings["steps"])


def log_likelihood(score, x, probe, steps):
    """The log density of images, each by itself.

    Args:
        score: a `models.score.Score` of continuous times.
        x: (B, C, H, W) in the model's range, dequantised.
        probe: (B, C, H, W) for `likelihood.hutchinson`.
        steps: from level to level, even in the log of the noise ratio.

    Returns:
        (B,) float64, in nats in the model's range.
    """
    sde, dimensions = score.sde, x[0].numel()
    ends = torch.tensor([likelihood.EPS, sde.T], dtype=torch.float64)
    first, last = (-sde.log_snr(ends)).tolist()
    levels, step = np.linspace(max(first, math.log(SMALLEST)), last, steps + 1, retstep=True)
    shares = simpson(np.eye(steps + 1), dx=step)  # of each level in the integral of the divergence
    y, gained, latest = x, torch.zeros(len(x), dtype=torch.float64, device=x.device), []
    for i, (level, share) in enumerate(zip(levels.tolist(), shares.tolist(), strict=True)):
        eps, divergence = _eps(score, y, level, probe)
        gained += share * divergence
        latest = [eps, *latest[: ORDER - 1]]
        if i < steps:
            y = y + math.exp(level) * sum(w * e for w, e in zip(_weights(step, len(latest)), latest, strict=True))
    alpha = sde.marginal(ends[1:])[0].item()
    return sde.prior_logp(alpha * y).double() + dimensions * math.log(alpha) + gained


def _weights(step, count):
    """Of the latest `count` values, the newest first, in the integral of exp(u) times their polynomial over a step.

    The values are at u = 0, -step, -2 step, ...; the weights are those that are right for 1, u, u^2, ...
    """
    moments = [math.expm1(step)]  # of exp(u) u^k, by parts
    for k in range(1, count):
        moments.append(math.exp(step) * step**k - k * moments[-1])
    powers = np.vander(-step * np.arange(count), increasing=True).T
    return np.linalg.solve(powers, moments).tolist()


def _eps(score, y, level, probe):
    """eps (B, C, H, W) at u = `level`, and the divergence of g eps (B,) float64."""
    sde = score.sde
    t = sde.time_at(-torch.tensor([level], dtype=torch.float64)).clamp(likelihood.EPS, sde.T).to(y)
    alpha, ratio = per_image(sde.marginal(t)[0]), math.exp(level)
    eps, divergence = likelihood.hutchinson(lambda y, t: score.eps(alpha * y, t), y, t, probe)
    return eps, ratio * divergence.double()
