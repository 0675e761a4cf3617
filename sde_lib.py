"""The stochastic differential equations of Score-SDE (arXiv 2011.13456): VP, sub-VP and VE.

Conventions: time t is in (0, T], T = 1, and large t is noise; x is (B, C, H, W); t is (B,), or (1,) when all images
share one time.  beta(t) = beta_min + t (beta_max - beta_min), L(t) = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2.
"""

import abc
import copy
import math

import torch
import torch.nn.functional as F

from basics.console import choose


def per_image(values):
    """(B,) -> (B, 1, 1, 1), to be multiplied with images."""
    return values[:, None, None, None]


class SDE(abc.ABC):
    """dx = f(x, t) dt + g(t) dw on (0, T].

    Attributes:
        N: number of discretisation steps.
        T: end time, 1.
        eps: the smallest time at which sampling stops.
        prior_std: standard deviation of the prior N(0, prior_std^2 I).
    """

    T = 1.0
    eps = 1e-3
    prior_std = 1.0

    def __init__(self, N):
        self._discretise(N)

    @abc.abstractmethod
    def sde(self, x, t):
        """Drift f(x, t) (B, C, H, W) and diffusion g(t) (B,)."""

    @abc.abstractmethod
    def marginal(self, t):
        """Mean coefficient alpha(t) and standard deviation std(t) of x_t given x_0, each (B,)."""

    @abc.abstractmethod
    def time_at(self, log_snr):
        """The time at which ln(alpha(t) / std(t)) has these values: the inverse of `log_snr`, (B,)."""

    def log_snr(self, t):
        """lambda(t) = ln(alpha(t) / std(t)), half the logarithm of the signal-to-noise ratio; falls with t: (B,)."""
        alpha, std = self.marginal(t)
        return alpha.log() - std.log()

    def with_steps(self, N):
        """The same SDE, discretised in N steps."""
        other = copy.copy(self)
        other._discretise(N)
        return other

    def _discretise(self, N):
        self.N = N

    def table_on(self, name, device):
        """A table (N,) of the discrete process, such as 'sigmas', on a device, where it is sent once."""
        values = getattr(self, name)
        if values.device != device:
            values = values.to(device)
            setattr(self, name, values)
        return values

    def discretize(self, x, t):
        """f (B, C, H, W) and G (B,) of x_{i+1} = x_i + f + G z: Euler with dt = 1/N unless the SDE has its own."""
        drift, diffusion = self.sde(x, t)
        return drift / self.N, diffusion * math.sqrt(1 / self.N)

    def timestep(self, t):
        """The index k = floor(t (N - 1) / T) into the tables of the discrete process: (B,) int64."""
        return (t * (self.N - 1) / self.T).long()

    def prior_logp(self, z):
        """Log density of the prior at z (B, C, H, W), summed over C, H, W: (B,)."""
        count = z[0].numel()
        log_normaliser = count * (math.log(2 * math.pi) / 2 + math.log(self.prior_std))
        return -log_normaliser - z.square().sum(dim=(1, 2, 3)) / (2 * self.prior_std**2)

    def reverse_sde(self, score, x, t, probability_flow=False):
        """Drift and diffusion of the reverse-time SDE (or of the probability flow ODE) given score (B, C, H, W)."""
        drift, diffusion = self.sde(x, t)
        return _reverse(drift, diffusion, score, probability_flow)

    def reverse_discretize(self, score, x, t, probability_flow=False):
        """f and G of the reverse of `discretize`: x_{i-1} = x_i - f + G z."""
        f, g = self.discretize(x, t)
        return _reverse(f, g, score, probability_flow)


def _reverse(drift, diffusion, score, probability_flow):
    half = 0.5 if probability_flow else 1.0
    reversed_drift = drift - per_image(diffusion.square()) * score * half
    return reversed_drift, torch.zeros_like(diffusion) if probability_flow else diffusion


class VPSDE(SDE):
    """Variance preserving: the continuous limit of DDPM (arXiv 2006.11239).

    Args:
        beta_min, beta_max: of the linear schedule.
        N: number of discretisation steps.
    """

    def __init__(self, beta_min=0.1, beta_max=20.0, N=1000):
        self.beta_min, self.beta_max = beta_min, beta_max
        super().__init__(N)

    def _discretise(self, N):
        super()._discretise(N)
        self.betas = torch.linspace(self.beta_min / N, self.beta_max / N, N)  # (N,) of the discrete process
        self.alphas = 1 - self.betas
        self.alphas_bar = torch.cumprod(self.alphas, dim=0)

    def beta(self, t):
        """The noise rate beta(t): (B,)."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def log_alpha(self, t):
        """L(t), the logarithm of the mean coefficient: (B,)."""
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def sde(self, x, t):
        beta = self.beta(t)
        return -0.5 * per_image(beta) * x, beta.sqrt()

    def marginal(self, t):
        log_alpha = self.log_alpha(t)
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def time_at(self, log_snr):
        return self._time_of(-0.5 * F.softplus(-2 * log_snr))  # alpha^2 = 1 / (1 + exp(-2 lambda))

    def _time_of(self, log_alpha):
        """The time at which L(t) has these values: the positive root of a quadratic, written without cancellation."""
        slope, half = self.beta_max - self.beta_min, 0.5 * self.beta_min
        return -2 * log_alpha / (half + (half**2 - slope * log_alpha).sqrt())

    def discretize(self, x, t):
        """DDPM's discretisation: f = sqrt(1 - beta_k) x - x, G = sqrt(beta_k)."""
        beta = self.table("betas", t)
        return per_image((1 - beta).sqrt()) * x - x, beta.sqrt()

    def table(self, name, t):
        """The entry at time t of 'betas', 'alphas' or 'alphas_bar': (B,)."""
        return self.table_on(name, t.device)[self.timestep(t)]


class SubVPSDE(VPSDE):
    """Sub-variance preserving: std(t) = 1 - exp(2 L(t)), never above VP's."""

    def sde(self, x, t):
        drift, g_vp = super().sde(x, t)
        # 1 - exp(4 L): -expm1 keeps the digits that the difference loses in float32 at small t
        return drift, g_vp * (-torch.expm1(4 * self.log_alpha(t))).sqrt()

    def marginal(self, t):
        log_alpha = self.log_alpha(t)
        return log_alpha.exp(), -torch.expm1(2 * log_alpha)

    def time_at(self, log_snr):
        # alpha / (1 - alpha^2) = exp(lambda): with exp(-lambda) = 2 sinh(y), alpha = exp(-y)
        return self._time_of(-torch.asinh(0.5 * torch.exp(-log_snr)))

    def discretize(self, x, t):
        return SDE.discretize(self, x, t)


class VESDE(SDE):
    """Variance exploding: the continuous limit of SMLD (arXiv 1907.05600); sigma(t) = s_min (s_max / s_min)^t.

    Args:
        sigma_min, sigma_max: the range of noise levels.
        N: number of discretisation steps.
    """

    eps = 1e-5

    def __init__(self, sigma_min=0.01, sigma_max=50.0, N=1000):
        self.sigma_min, self.sigma_max, self.prior_std = sigma_min, sigma_max, sigma_max
        super().__init__(N)

    def _discretise(self, N):
        super()._discretise(N)
        sigma_min, sigma_max = self.sigma_min, self.sigma_max
        self.sigmas = torch.exp(torch.linspace(math.log(sigma_min), math.log(sigma_max), N))  # (N,) ascending

    def sigma(self, t):
        """The noise level at time t: (B,)."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def sde(self, x, t):
        return torch.zeros_like(x), self.sigma(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))

    def marginal(self, t):
        sigma = self.sigma(t)
        return torch.ones_like(sigma), sigma

    def time_at(self, log_snr):
        return (-log_snr - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)

    def discretize(self, x, t):
        """SMLD's discretisation: f = 0, G = sqrt(sigma_k^2 - sigma_{k-1}^2) with sigma_{-1} = 0."""
        sigma, previous = self.adjacent_sigmas(t)
        return torch.zeros_like(x), (sigma**2 - previous**2).sqrt()

    def adjacent_sigmas(self, t):
        """sigma_k and sigma_{k-1} at time t, each (B,)."""
        sigmas, k = self.table_on("sigmas", t.device), self.timestep(t)
        return sigmas[k], torch.where(k > 0, sigmas[(k - 1).clamp_min(0)], torch.zeros_like(sigmas[k]))


SDES = {
    "vpsde": lambda model: VPSDE(model.beta_min, model.beta_max, model.num_scales),
    "subvpsde": lambda model: SubVPSDE(model.beta_min, model.beta_max, model.num_scales),
    "vesde": lambda model: VESDE(model.sigma_min, model.sigma_max, model.num_scales),
}


def create_sde(config):
    """The SDE that `config.training.sde` names, with the constants of `config.model`.

    Raises:
        UserError: if there is none of this name.
    """
    return choose(config.training.sde.lower(), SDES, "SDE (config.training.sde)")(config.model)
