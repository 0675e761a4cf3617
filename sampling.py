"""Solvers of the reverse-time SDE, one integration loop, and what it is used for: sampling and inpainting.

Everything here works in the model's range on (B, C, H, W) tensors.  Noise comes from a source called as
`noise(step, purpose)` (see `noise.KeyedNoise`), never from the global generator.

Two families of solvers: the published ones, whose step has the width 1/N that their network was trained with, and
those for few steps, which take the time of the next step into account and end at the predicted clean image.

Notation: alpha(t), std(t) from `SDE.marginal`; lambda = ln(alpha / std) (`SDE.log_snr`), which rises as t falls.

Sources: Score-SDE (arXiv 2011.13456) algorithms 1 to 5; Lift, Map, Detect (arXiv 2302.10326) for the inpainting;
DDIM (arXiv 2010.02502), DPM-Solver++ (arXiv 2211.01095), DDNM (arXiv 2212.00490), RePaint (arXiv 2201.09865).
"""

import dataclasses
import math

import torch
import torch.nn.functional as F

from basics.console import UserError, choose
from models.score import Score
from sde_lib import VESDE, VPSDE, SubVPSDE, create_sde, per_image

# --------------------------------------------------------------------------------------------------- predictors
# A solver is a frozen object: `init(x) -> state` and
# `step(model, x, t, t_next, state, noise) -> (x, x_mean, state)`, t (1,) or (B,), noise a function of no arguments.


@dataclasses.dataclass(frozen=True)
class Solver:
    """A predictor of the reverse process without a state of its own.

    Args:
        sde: the SDE.
        probability_flow: follow the ODE of the same marginals instead of the SDE.
    """

    sde: object
    probability_flow: bool = False

    ends_clean = False  # whether the step without a next time gives the predicted clean image

    def init(self, x):
        return None


class EulerMaruyama(Solver):
    """x_mean = x - reverse drift / N; the width 1/N is the published one and equals the grid's at N = 1000."""

    def step(self, model, x, t, t_next, state, noise):
        drift, diffusion = self.sde.reverse_sde(model(x, t), x, t, self.probability_flow)
        mean = x - drift / self.sde.N
        return mean + per_image(diffusion) * self.sde.N**-0.5 * noise(), mean, state


class ReverseDiffusion(Solver):
    """x_mean = x - f, the reverse of the SDE's own discretisation (Score-SDE appendix E)."""

    def step(self, model, x, t, t_next, state, noise):
        f, g = self.sde.reverse_discretize(model(x, t), x, t, self.probability_flow)
        mean = x - f
        return mean + per_image(g) * noise(), mean, state


@dataclasses.dataclass(frozen=True)
class AncestralSampling(Solver):
    """The reverse of the discrete process: DDPM's ancestral sampling for VP, SMLD's for VE.

    Raises:
        UserError: for sub-VP, which has no discrete process, and with the probability flow.
    """

    def __post_init__(self):
        if isinstance(self.sde, SubVPSDE):
            raise UserError("ancestral_sampling is not defined for sub-VP; use euler_maruyama or reverse_diffusion")
        if self.probability_flow:
            raise UserError("ancestral_sampling has no probability flow; use euler_maruyama or reverse_diffusion")

    def step(self, model, x, t, t_next, state, noise):
        score = model(x, t)
        if isinstance(self.sde, VESDE):
            sigma, previous = self.sde.adjacent_sigmas(t)
            variance = sigma**2 - previous**2
            mean = x + per_image(variance) * score
            std = (previous**2 * variance / sigma**2).sqrt()
        else:
            beta = self.sde.table("betas", t)
            mean = (x + per_image(beta) * score) / per_image((1 - beta).sqrt())
            std = beta.sqrt()
        return mean + per_image(std) * noise(), mean, state


class NoPredictor(Solver):
    """Leaves x alone and draws nothing."""

    def step(self, model, x, t, t_next, state, noise):
        return x, x, state


# ------------------------------------------------------------------------------------------- solvers of few steps


class Euler(Solver):
    """Euler-Maruyama whose width is that of the grid."""

    ends_clean = True

    def step(self, model, x, t, t_next, state, noise):
        if not len(t_next):
            x0 = model.x0(x, t)
            return x0, x0, None
        width = per_image(t - t_next)
        drift, diffusion = self.sde.reverse_sde(model(x, t), x, t, self.probability_flow)
        mean = x - drift * width
        return (mean if self.probability_flow else mean + per_image(diffusion) * width.sqrt() * noise()), mean, None


@dataclasses.dataclass(frozen=True)
class ExponentialIntegrator(Solver):
    """DDIM and DPM-Solver++(2M): exact where the predicted clean image D is constant (order 1) or linear in lambda.

    With h = lambda(t_next) - lambda(t), v = eta std(t_next) sqrt(1 - exp(-2 h)) the noise that is drawn anew, and
    c = sqrt(std(t_next)^2 - v^2) / std(t):   x_next = c x + (alpha(t_next) - c alpha(t)) D + v z.

    Order 1 is DDIM (arXiv 2010.02502, equation 12), for eta = 1 ancestral sampling with the grid's own widths.  Order 2
    is DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2) for eta = 0 and its SDE form for eta = 1.  All hold for VP,
    sub-VP and VE, since only alpha and std enter.

    Args:
        eta: share of fresh noise, from 0 (deterministic) to 1.
        order: 1, or 2 for D extrapolated from the last two predictions.
    """

    eta: float = 1.0
    order: int = 1

    ends_clean = True

    def step(self, model, x, t, t_next, state, noise):
        x0 = model.x0(x, t)  # (B, C, H, W)
        if not len(t_next):
            return x0, x0, None
        # the coefficients, each (1,), in float64: differences of lambda lose digits on fine grids
        t, t_next = t.double(), t_next.double()
        (alpha, std), (alpha_next, std_next) = self.sde.marginal(t), self.sde.marginal(t_next)
        log_snr = alpha.log() - std.log()
        h = alpha_next.log() - std_next.log() - log_snr
        fresh = -(self.eta**2) * torch.expm1(-2 * h)  # v^2 / std_next^2
        keep = std_next / std * (1 - fresh).sqrt()
        denoised = x0
        if self.order == 2 and state is not None:
            previous, previous_log_snr = state
            denoised = x0 + _as(x, h / (2 * (log_snr - previous_log_snr))) * (x0 - previous)
        mean = _as(x, keep) * x + _as(x, alpha_next - keep * alpha) * denoised
        x = mean + _as(x, std_next * fresh.sqrt()) * noise() if self.eta else mean
        return x, mean, (x0, log_snr)


def _as(x, value):
    """A coefficient (1,) float64 to be multiplied with images of x's type."""
    return per_image(value.to(x.dtype))


PREDICTORS = {
    "euler_maruyama": EulerMaruyama,
    "reverse_diffusion": ReverseDiffusion,
    "ancestral_sampling": AncestralSampling,
    "none": NoPredictor,
}

# --------------------------------------------------------------------------------------------------- correctors


@dataclasses.dataclass(frozen=True)
class Langevin:
    """Langevin dynamics at a fixed time with a step from the signal-to-noise ratio (Score-SDE algorithms 4 and 5).

    The published step size takes the mean of the norms over a batch, which ties the images of a batch together.

    Args:
        sde: the SDE.
        snr: the signal-to-noise ratio r.
        n_steps: corrector steps per predictor step.
        group: number of successive images whose norms are averaged (a published batch); None for all.
    """

    sde: object
    snr: float
    n_steps: int = 1
    group: int | None = None

    def correct(self, model, x, t, noise):
        """x and its mean after `n_steps` steps; `noise(j)` is the draw of step j."""
        mean = x
        for j in range(self.n_steps):
            score, z = model(x, t), noise(j)
            step = self.step_size(score, z, t)  # (B or 1,)
            mean = x + per_image(step) * score
            x = mean + per_image((2 * step).sqrt()) * z
        return x, mean

    def step_size(self, score, z, t):
        """2 alpha (snr |z| / |score|)^2, the norms averaged over each group: (B,)."""
        return 2 * self._alpha(t) * (self.snr * self._group_norm(z) / self._group_norm(score)) ** 2

    def _group_norm(self, x):
        norms = x.flatten(1).norm(dim=1)  # (B,)
        groups = norms.view(-1, self.group or len(norms))
        return groups.mean(dim=1, keepdim=True).expand_as(groups).reshape(-1)

    def _alpha(self, t):
        return self.sde.table("alphas", t) if isinstance(self.sde, VPSDE) else torch.ones_like(t)


class AnnealedLangevin(Langevin):
    """Annealed Langevin dynamics (arXiv 1907.05600): step = 2 alpha (snr std(t))^2."""

    def step_size(self, score, z, t):
        return 2 * self._alpha(t) * (self.snr * self.sde.marginal(t)[1]) ** 2


CORRECTORS = {"langevin": Langevin, "ald": AnnealedLangevin, "none": lambda *args: None}


# `config.sampling.sampler` besides the published one, whose predictor is `config.sampling.predictor`.
SAMPLERS = {
    "euler": lambda sde, options: Euler(sde, options.probability_flow),
    "ddim": lambda sde, options: ExponentialIntegrator(sde, eta=options.eta),
    "dpmpp_2m": lambda sde, options: ExponentialIntegrator(sde, eta=0.0, order=2),
    "sde_dpmpp_2m": lambda sde, options: ExponentialIntegrator(sde, eta=1.0, order=2),
}
PUBLISHED = "published"

# Named settings for Lift, Map, Detect (recon.py's --sampler): values of config.sampling, and repetitions of each image.
# benchmarks/quality_vs_cost.py measured them: fresh noise and replacement, few steps where they matter, from a smooth
# fill of the known pixels.
_FEW_STEPS = {
    "method": "pc",
    "sampler": "ddim",
    "probability_flow": False,
    "time_grid": "uniform",
    "returns": 0,
    "lift": "mask",
    "eta": 1.0,
    "constraint": "replace",
    "corrector": "none",
    "t_start": 0.6,
    "t_end": 0.1,
}
PRESETS = {"fast": ({**_FEW_STEPS, "steps": 5}, 4), "best": ({**_FEW_STEPS, "steps": 10}, 10)}


def preset(name, config):
    """A named setting for the SDE of a config.

    The times are those of the sub-VP SDE of images in [-1, 1], on which the settings were measured; for another SDE, or
    images in [0, 1], they become the times of the same noise relative to the images.

    Args:
        name: a key of `PRESETS`.
        config: the config tree.

    Returns:
        values of `config.sampling`, and the repetitions of each image.
    """
    values, reps = choose(name, PRESETS, "preset")
    sde, measured = create_sde(config), SubVPSDE()
    shift = 0.0 if config.data.centered else math.log(2)
    times = torch.tensor([values["t_start"], values["t_end"]], dtype=torch.float64)
    start, end = sde.time_at(measured.log_snr(times) + shift).clamp(sde.eps, sde.T).tolist()
    return {**values, "t_start": round(start, 4), "t_end": round(end, 4)}, reps


def create_solvers(config, sde, group=None):
    """The predictor and the corrector (None for none) of a config.

    Args:
        config: `config.sampling` is read.
        sde: the SDE.
        group: images per published batch, for Langevin's step size.

    Raises:
        UserError: for an unknown name, or a predictor that the SDE does not have.
    """
    options = config.sampling
    corrector = choose(options.corrector.lower(), CORRECTORS, "corrector (config.sampling.corrector)")
    if options.sampler == PUBLISHED:
        predictor = choose(options.predictor.lower(), PREDICTORS, "predictor (config.sampling.predictor)")
        predictor = predictor(sde, options.probability_flow)
    else:
        sampler = choose(options.sampler, {PUBLISHED: None, **SAMPLERS}, "sampler (config.sampling.sampler)")
        predictor = sampler(sde, options)
    return predictor, corrector(sde, options.snr, options.n_steps_each, group)


# ------------------------------------------------------------------------------------------------------ time grids


def time_grid(sde, steps, eps, device="cpu", start=None, spacing="uniform"):
    """`steps` falling times from `start` to `eps`: (steps,) float32; by default the published ones.

    Args:
        sde: the SDE.
        steps: at least 1.
        eps: the last time.
        device: where they are to be.
        start: the first time, by default T.
        spacing: a name in `TIME_GRIDS`.
    """
    start = sde.T if start is None else start
    return choose(spacing, TIME_GRIDS, "time grid (config.sampling.time_grid)")(sde, start, eps, steps).to(device)


def _uniform(sde, start, end, steps):
    return torch.linspace(start, end, steps)


def _uniform_in_log_snr(sde, start, end, steps):
    ends = torch.tensor([start, end], dtype=torch.float64)
    first, last = sde.log_snr(ends).tolist()
    times = sde.time_at(torch.linspace(first, last, steps, dtype=torch.float64))
    times[:1], times[1:][-1:] = ends[0], ends[1]  # exactly
    return times.float()


def _quadratic(sde, start, end, steps):
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square().float()


TIME_GRIDS = {
    "uniform": _uniform,
    "lambda": _uniform_in_log_snr,  # even in the logarithm of the signal-to-noise ratio (DPM-Solver)
    "quadratic": _quadratic,  # even in sqrt(t): finer near the data
}


def with_returns(times, returns):
    """A grid that goes back `returns` times at every step (RePaint's resampling, arXiv 2201.09865, algorithm 1).

    Args:
        times: (N,) falling.
        returns: how often; each costs another evaluation of the network.

    Returns:
        (N + 2 returns (N - 1),): t0, [t1, t0] * returns, t1, [t2, t1] * returns, ...
    """
    if not returns or len(times) == 1:
        return times
    pieces = [times[:1]]
    for i in range(1, len(times)):
        pieces += [torch.stack([times[i], times[i - 1]]).repeat(returns), times[i : i + 1]]
    return torch.cat(pieces)


def _rises(times):
    """For every position whether the step from it goes back to an earlier, noisier time: a list of bool."""
    return [*(times[1:] > times[:-1]).tolist(), False]


# --------------------------------------------------------------------------------------------------- the one loop


@torch.no_grad()
def integrate(model, x, times, predictor, noise, corrector=None, constrain=None, denoise=True, on_step=None):
    """Runs the reverse process along `times`.

    With a constraint this is the published corrector, constrain, predictor, constrain.  Where the corrector is none,
    two constraints follow each other and the first has no effect on anything that is read, so it is left out.

    Args:
        model: score(x, t).
        x: (B, C, H, W), the state at the first time.
        times: (N,) falling; a rise goes back by adding noise, without the network.
        predictor, corrector: solvers; the corrector may be None.
        noise: called as noise(step, purpose), gives (B, C, H, W).
        constrain: called as constrain(x, t, z), gives (x, mean), or None.
        denoise: return the mean of the last step instead of its noisy x.
        on_step: called without arguments after each step.

    Returns:
        (B, C, H, W)
    """
    state, last, rises = predictor.init(x), len(times) - 1, _rises(times)
    times = times.to(x.device)
    mean = x
    for i, rise in enumerate(rises):
        t, t_next = times[i : i + 1], times[i + 1 : i + 2]
        if rise:
            x, state = diffuse(predictor.sde, x, t, t_next, noise(i, "return")), predictor.init(x)
            continue
        if corrector is not None:
            x, mean = corrector.correct(model, x, t, lambda j, i=i: noise(i * corrector.n_steps + j, "corrector"))
        if constrain is not None:
            x, mean = constrain(x, t, noise(i, "constrain"))
        x, mean, state = predictor.step(model, x, t, t_next, state, lambda i=i: noise(i, "predictor"))
        if constrain is not None and (corrector is not None or i == last) and not predictor.ends_clean:
            x, mean = constrain(x, t, noise(i, "reconstrain"))
        if on_step is not None:
            on_step()
    return mean if denoise else x


def diffuse(sde, x, t, later, z):
    """x_later given x_t: (alpha'/alpha) x + sqrt(std'^2 - (alpha'/alpha)^2 std^2) z.

    Args:
        sde: the SDE.
        x: (B, C, H, W) at time t (1,).
        later: (1,), a larger time.
        z: (B, C, H, W), standard normal.
    """
    (alpha, std), (alpha_later, std_later) = sde.marginal(t.double()), sde.marginal(later.double())
    ratio = alpha_later / alpha
    return _as(x, ratio) * x + _as(x, (std_later**2 - ratio**2 * std**2).clamp_min(0).sqrt()) * z


# ------------------------------------------------------------------------------------------ sampling, inpainting


def sample(model, sde, noise, *, predictor, corrector=None, times=None, denoise=True, on_step=None):
    """Predictor-corrector sampling from the prior; everything else comes from the noise source and the solvers.

    Args:
        model: score(x, t).
        sde: the SDE; its N is the number of steps of the published grid.
        noise: called as noise(step, purpose); "prior" gives the start.
        predictor, corrector: solvers.
        times: as in `integrate`, from T; by default the published grid.
        denoise: return the mean of the last step.
        on_step: called after each step.

    Returns:
        (B, C, H, W) in the model's range.
    """
    prior = noise(0, "prior") * sde.prior_std  # (B, C, H, W)
    times = time_grid(sde, sde.N, sde.eps) if times is None else times
    return integrate(model, prior, times, predictor, noise, corrector, denoise=denoise, on_step=on_step)


def replacement(sde, data, mask):
    """The constraint of inpainting: known pixels are replaced by the data at the noise level of the time.

    Args:
        sde, data, mask: as in `inpaint`.

    Returns:
        A function (x, t, z) -> (x, mean), all (B, C, H, W) but t (1,); the mean keeps x on the filled pixels.
    """
    unknown = 1 - mask

    def constrain(x, t, z):
        alpha, std = sde.marginal(t)
        filled, known_mean = x * unknown, per_image(alpha) * data
        return filled + (known_mean + per_image(std) * z) * mask, filled + known_mean * mask

    return constrain


class Denoiser(Score):
    """A score model whose predicted clean image is kept to what is known of it.

    The prediction is clipped to the range of images, then takes the known pixels from the data (the null-space
    projection of DDNM, arXiv 2212.00490, equation 13); the score is the one that belongs to this prediction.

    Args:
        model: a `models.score.Score`.
        limits: (lowest, highest) value of an image, or None for no clipping.
        data, mask: as in `inpaint`, or None for no projection.
    """

    def __init__(self, model, limits=None, data=None, mask=None):
        self.model, self.sde, self.limits = model, model.sde, limits
        self.known, self.unknown = (None, None) if mask is None else (data * mask, 1 - mask)

    def x0(self, x, t):
        x0 = self.model.x0(x, t)
        if self.limits is not None:
            x0 = x0.clamp(*self.limits)
        return x0 if self.known is None else self.known + x0 * self.unknown

    def __call__(self, x, t):
        alpha, std = self.sde.marginal(t)
        return (per_image(alpha) * self.x0(x, t) - x) / per_image(std) ** 2


def fill_smoothly(data, mask):
    """A first guess of unknown pixels: averages of known ones, from the nearest scale at which there are any.

    Args:
        data: (B, C, H, W).
        mask: (1 or B, 1, H, W), 1 = known; one pixel at least.

    Returns:
        (B, C, H, W), the data on the known pixels.
    """
    size = data.shape[-2:]
    if min(size) == 1:  # where all are known the data stay: asking for it would wait for a GPU
        return data
    weight = F.avg_pool2d(mask, 2, ceil_mode=True)  # the share of known pixels
    means = F.avg_pool2d(data * mask, 2, ceil_mode=True) / weight.clamp_min(1e-12)
    coarse = fill_smoothly(means, (weight > 0).to(data.dtype))
    guess = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    return data * mask + guess * (1 - mask)


CONSTRAINTS = ("replace", "project")
LIFTS = ("mask", "noise", "both")


def inpaint(
    model,
    sde,
    data,
    mask,
    noise,
    *,
    predictor,
    corrector=None,
    times=None,
    constraint="replace",
    lift="mask",
    limits=None,
    denoise=True,
    on_step=None,
):
    """The Map of Lift, Map, Detect: fills the unknown pixels by the reverse process, holding the known ones.

    The published way, with a published predictor and the defaults: the known pixels are replaced at every time by the
    data at that time's noise level, and the returned mean keeps the noisy x of the last predictor step on the filled
    pixels.  A predictor that ends at the clean image returns this, and the data on the known pixels.

    Args:
        model: score(x, t); a `models.score.Score` for solvers of few steps and for projection.
        sde: the SDE; its N is the number of steps of the published grid.
        data: (B, C, H, W) in the model's range.
        mask: (1, 1, H, W) or (B, 1 or C, H, W), 1 = known, 0 = to be filled.
        noise, predictor, corrector, denoise, on_step: as in `sample`.
        times: as in `integrate`; by default the published grid.
        constraint: how known pixels are held: 'replace' in the state, before each step, or 'project' in the predicted
            clean image.
        lift: what is taken from the image: 'mask' (its unknown pixels), 'noise' (all of it is noised to the first time,
            and nothing is held), or 'both' (all of it is noised, and the known pixels are held).
        limits: (lowest, highest) value of an image, to clip predictions to; None for no clipping.

    Returns:
        (B, C, H, W) in the model's range, not clipped.
    """
    times = time_grid(sde, sde.N, sde.eps) if times is None else times
    if lift == "noise":
        mask = torch.zeros_like(mask)
    x = _lifted(sde, data, mask, noise(0, "prior"), times[:1], predictor, lift)
    held = lift != "noise"
    projects = held and constraint == "project"
    if projects or limits is not None:
        model = Denoiser(model, limits, *((data, mask) if projects else ()))
    constrain = replacement(sde, data, mask) if held and not projects else None
    x = integrate(model, x, times, predictor, noise, corrector, constrain=constrain, denoise=denoise, on_step=on_step)
    return x * (1 - mask) + data * mask if predictor.ends_clean or projects else x


def _lifted(sde, data, mask, z, start, predictor, lift):
    """The state from which inpainting starts, at the time `start` (1,)."""
    if not predictor.ends_clean:  # as published
        return data * mask + z * sde.prior_std * (1 - mask)
    if lift != "mask":
        guess = data
    elif start.item() < sde.T:
        guess = fill_smoothly(data, mask)  # Come-Closer-Diffuse-Faster (arXiv 2112.05146)
    else:
        guess = data * mask
    alpha, std = sde.marginal(start.to(data.device))
    return per_image(alpha) * guess + per_image(std) * z


# -------------------------------------------------------------------------------------------- settings of a config


@dataclasses.dataclass(frozen=True)
class Process:
    """How the reverse process is run: what `config.sampling` says, ready for `sample` and `inpaint`.

    Attributes:
        sde: the SDE with the number of steps asked for.
        solvers: the predictor and the corrector.
        times: (N,) float32 on the CPU.
        constraint, lift, denoise: as in `inpaint`.
        limits: as in `inpaint`.
    """

    sde: object
    predictor: object
    corrector: object
    times: torch.Tensor
    constraint: str
    lift: str
    limits: tuple | None
    denoise: bool

    @property
    def steps(self):
        """Steps of the predictor, each an evaluation of the network."""
        return len(self.times) - sum(_rises(self.times))

    @property
    def evaluations(self):
        """Evaluations of the network for an image: those of the predictor and of the corrector."""
        return self.steps * (1 + (0 if self.corrector is None else self.corrector.n_steps))

    def sample(self, model, noise, on_step=None):
        """As the function `sample`.

        Raises:
            UserError: see `check_sampling`.
        """
        self.check_sampling()
        if self.limits is not None:
            model = Denoiser(model, self.limits)
        return sample(model, self.sde, noise, times=self.times, on_step=on_step, **self._solvers())

    def check_sampling(self):
        """Refuses what only inpainting can use: samples start from noise at t = 1, and nothing of them is known.

        Raises:
            UserError: names the fields.
        """
        start, noiseless = round(self.times[0].item(), 4), self.predictor.probability_flow
        found = {
            f"t_start={start}": start != self.sde.T,
            f"constraint={self.constraint}": self.constraint != "replace",
            f"lift={self.lift}": self.lift != "mask",
            "noise_removal=False": not self.denoise and (noiseless or isinstance(self.predictor, NoPredictor)),
        }
        if names := ", ".join(name for name, holds in found.items() if holds):
            raise UserError(
                f"samples cannot be drawn with config.sampling: {names}; give that to recon.py alone, and leave it out "
                "here"
            )

    def inpaint(self, model, data, mask, noise, on_step=None):
        """As the function `inpaint`."""
        options = {"times": self.times, "constraint": self.constraint, "lift": self.lift, "limits": self.limits}
        return inpaint(model, self.sde, data, mask, noise, on_step=on_step, **options, **self._solvers())

    def _solvers(self):
        return {"predictor": self.predictor, "corrector": self.corrector, "denoise": self.denoise}


def create_process(config, sde, group=None):
    """The `Process` of a config, for the method pc.

    Args:
        config: `config.sampling` and `config.data.centered` are read.
        sde: the SDE of the model.
        group: as in `create_solvers`.

    Raises:
        UserError: unknown names, numbers out of range, or settings that do not go together.
    """
    options = config.sampling
    if options.method.lower() != "pc":
        raise UserError(f"config.sampling.method is {options.method}, which can only draw samples; set it to pc")
    _check(options, sde)
    _, corrector = create_solvers(config, sde, group)  # whose step size is that of the N steps trained on
    if corrector is not None and isinstance(sde, VPSDE) and sde.betas[-1] >= 1:
        raise UserError(
            f"the corrector {options.corrector} needs config.model.num_scales above {sde.beta_max:g}, not {sde.N}: its "
            "step is one of the discrete process; use more, or the corrector none"
        )
    sde = sde.with_steps(options.steps or sde.N)
    predictor, _ = create_solvers(config, sde, group)
    if type(sde) is VPSDE and isinstance(predictor, (ReverseDiffusion, AncestralSampling)) and sde.betas[-1] >= 1:
        raise UserError(
            f"{options.predictor} needs more than {sde.beta_max:g} steps, not {sde.N}: each is one of the discrete "
            "process; use more, or --sampler ddim"
        )
    end = options.t_end or sde.eps
    times = time_grid(sde, sde.N, end, start=options.t_start, spacing=options.time_grid)
    return Process(
        sde,
        predictor,
        corrector,
        with_returns(times, options.returns),
        options.constraint,
        options.lift,
        limits=((-1.0, 1.0) if config.data.centered else (0.0, 1.0)) if predictor.ends_clean else None,
        denoise=options.noise_removal,
    )


def _check(options, sde):
    """Refuses numbers out of range and settings that do not go together, or would have no effect."""
    choose(options.constraint, dict.fromkeys(CONSTRAINTS), "constraint (config.sampling.constraint)")
    choose(options.lift, dict.fromkeys(LIFTS), "lift (config.sampling.lift)")
    end, one_of_n = options.t_end or sde.eps, options.sampler == PUBLISHED
    idle = one_of_n and options.predictor.lower() == "none" == options.corrector.lower()
    problems = {
        "steps must be 0 (the config's num_scales) or more": options.steps < 0,
        "returns must be 0 or more": options.returns < 0,
        "eta must lie between 0 and 1": not 0 <= options.eta <= 1,
        f"t_start and t_end must keep 0 < t_end < t_start <= {sde.T:g}": not 0 < end < options.t_start <= sde.T,
        "the predictor 'none' needs a corrector, or nothing would happen; choose either": idle,
    }
    for problem, found in problems.items():
        if found:
            raise UserError(f"config.sampling: {problem}")
    check_effects(options, sde)
    if options.lift != "mask" and options.t_start == sde.T:
        raise UserError(
            "config.sampling: the lifts 'noise' and 'both' need t_start < 1, since nothing is left of an image at t = 1"
        )


# Fields of config.sampling and the values that are no choice of the user's: the default, and those of published
# configs, which stand there also where another field leaves them without effect.
USUAL = {
    "method": ("pc",),
    "predictor": ("euler_maruyama", "reverse_diffusion", "ancestral_sampling"),
    "corrector": ("none", "langevin"),
    "n_steps_each": (1,),
    "snr": (0.16, 0.075, 0.15, 0.17),
    "noise_removal": (True,),
    "probability_flow": (False,),
    "sampler": (PUBLISHED,),
    "steps": (0,),
    "time_grid": ("uniform",),
    "t_start": (1.0,),
    "t_end": (0.0,),
    "eta": (1.0,),
    "constraint": ("replace",),
    "returns": (0,),
    "lift": ("mask",),
}


def without_effect(options, sde):
    """Which fields of `config.sampling` the others leave without effect.

    Args:
        options: `config.sampling`.
        sde: the SDE, whose N is the number of steps where `steps` is 0.

    Returns:
        dict: reason -> names of fields; a reason reads on after the names.
    """
    if options.method.lower() == "ode":
        return {"not with the method 'ode', which has nothing to choose; set method=pc": [*USUAL][1:]}
    own, flows = options.sampler != PUBLISHED, options.sampler == "euler"
    rules = {
        f"not with the published sampler; choose one of {', '.join(SAMPLERS)}": (
            not own,
            ["time_grid", "t_start", "t_end", "constraint", "returns", "lift"],
        ),
        f"not with the sampler {options.sampler}, which is a predictor itself and ends without noise": (
            own,
            ["predictor", "noise_removal"],
        ),
        f"not with the sampler {options.sampler}; choose euler, or ddim with eta=0": (
            own and not flows,
            ["probability_flow"],
        ),
        "not with the predictor 'none'": (not own and options.predictor.lower() == "none", ["probability_flow"]),
        "eta goes with the sampler ddim": (options.sampler != "ddim", ["eta"]),
        "not without a corrector; choose langevin or ald": (
            options.corrector.lower() == "none",
            ["n_steps_each", "snr"],
        ),
        "not with the lift 'noise', which holds no pixels": (own and options.lift == "noise", ["constraint"]),
        "not with a single step": ((options.steps or sde.N) == 1, ["time_grid", "t_end", "eta", "returns"]),
    }
    return {reason: names for reason, (holds, names) in rules.items() if holds}


def check_effects(options, sde):
    """Refuses values of `config.sampling` that are not `USUAL` and have no effect.

    Raises:
        UserError: names the fields.
    """
    single = options.sampler != PUBLISHED and options.steps == 1  # of a preset, whose t_end nobody typed
    spared = {"t_end"} if single else set()
    _refuse_without_effect(options, sde, lambda name: name not in spared and options[name] not in USUAL[name])


def _refuse_without_effect(options, sde, changed):
    for reason, names in without_effect(options, sde).items():
        if found := [name for name in names if changed(name)]:
            raise UserError(f"config.sampling: {', '.join(found)}: {reason}")


def check_typed(config, typed):
    """Refuses what a command line sets in `config.sampling` and another setting leaves without effect.

    A config file's own values may be without effect, as in published configs; what was typed is meant.

    Args:
        config: the config tree.
        typed: paths of the fields that were set on the command line, such as "sampling.snr".

    Raises:
        UserError: names the fields.
    """
    names = {path.removeprefix("sampling.") for path in typed if path.startswith("sampling.")}
    _refuse_without_effect(config.sampling, create_sde(config), lambda name: name in names)


@torch.no_grad()
def sample_ode(model, sde, prior, *, eps=None, rtol=1e-5, atol=1e-5):
    """Sampling by the probability-flow ODE with an adaptive Runge-Kutta 4(5) (Score-SDE appendix D).

    Args:
        model: score(x, t).
        sde: the SDE.
        prior: (B, C, H, W), the start at T.
        eps: the last time, by default the SDE's.
        rtol, atol: error tolerances of the solver.

    Returns:
        (B, C, H, W) in the model's range, and the number of function evaluations.
    """
    span = (sde.T, sde.eps if eps is None else eps)
    return solve_ode(lambda x, t: probability_flow(model, sde, x, t), prior, span, rtol=rtol, atol=atol)


def probability_flow(model, sde, x, t):
    """dx/dt of the ODE with the marginals of the SDE: (B, C, H, W), for x (B, C, H, W) and t (1,) or (B,)."""
    return sde.reverse_sde(model(x, t), x, t, probability_flow=True)[0]


def solve_ode(velocity, start, span, *, rtol, atol):
    """Solves dy/dt = velocity(y, t) by SciPy's adaptive Runge-Kutta 4(5), whose state is float64 on the CPU.

    The step size is one for all of y, from the mean square of its errors: rows of a batch are tied together within
    the tolerances.

    Args:
        velocity: takes y, of the start's shape, type and device, and t (1,).
        start: a tensor, y at the first time.
        span: the first and the last time.
        rtol, atol: error tolerances.

    Returns:
        y at the last time, and the number of function evaluations.

    Raises:
        UserError: the velocity is not finite, or changes too fast to be followed.
    """
    from scipy.integrate import solve_ivp  # here, as it takes long and few need it

    def flat_velocity(t, flat):
        y = torch.as_tensor(flat, dtype=start.dtype, device=start.device).view_as(start)
        time = torch.full((1,), t, dtype=start.dtype, device=start.device)
        return velocity(y, time).flatten().cpu().numpy()

    solution = solve_ivp(flat_velocity, span, start.flatten().cpu().numpy(), method="RK45", rtol=rtol, atol=atol)
    if not solution.success:
        raise UserError(
            f"the probability flow cannot be followed beyond t = {solution.t[-1]:.3g}: the network's output is NaN, "
            "infinite or too steep; check the checkpoint and its config"
        )
    end = torch.as_tensor(solution.y[:, -1], dtype=start.dtype, device=start.device).view_as(start)
    return end, solution.nfev
