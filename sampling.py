"""Solvers of the reverse-time SDE, one integration loop, and its uses: sampling, inversion and inpainting.

Everything here works in the model's range on (B, C, H, W) tensors.  Noise comes from a source called as
`noise(step, purpose)` (see `noise.KeyedNoise`), never from the global generator.

Two families of solvers: the published ones, whose step has the width 1/N that their network was trained with, and
those for few steps, which take the time of the next step into account and end at the predicted clean image.
`lmd.process` makes them from a config.

Notation: alpha(t), std(t) from `SDE.marginal`; lambda = ln(alpha / std) (`SDE.log_snr`), which rises as t falls.

Sources: Score-SDE (arXiv 2011.13456) algorithms 1 to 5; Lift, Map, Detect (arXiv 2302.10326) for the inpainting;
DDIM (arXiv 2010.02502), DPM-Solver++ (arXiv 2211.01095), DDNM (arXiv 2212.00490), RePaint (arXiv 2201.09865).
"""

import dataclasses

import torch
import torch.nn.functional as F

import ode
from basics.console import UserError, choose
from models.score import Score
from sde_lib import VESDE, VPSDE, SubVPSDE, per_image

# --------------------------------------------------------------------------------------------------- predictors
# A solver is a frozen object: `init(x) -> state` and
# `step(model, x, t, t_next, state, noise) -> (x, x_mean, state)`, t (1,) or (B,), noise a function of no arguments.


@dataclasses.dataclass(frozen=True)
class Solver:
    """A predictor without a state of its own.

    Args:
        sde: the SDE.
    """

    sde: object

    ends_clean = False  # whether the step without a next time gives the predicted clean image
    towards_noise = False  # whether it steps along rising times

    def init(self, x):
        return None


@dataclasses.dataclass(frozen=True)
class PublishedPredictor(Solver):
    """A predictor whose step has the width 1/N.

    Args:
        probability_flow: follow the ODE of the same marginals instead of the SDE.
    """

    probability_flow: bool = False


class EulerMaruyama(PublishedPredictor):
    """x_mean = x - reverse drift / N; the width 1/N is the published one and equals the grid's at N = 1000."""

    def step(self, model, x, t, t_next, state, noise):
        drift, diffusion = self.sde.reverse_sde(model(x, t), x, t, self.probability_flow)
        mean = x - drift / self.sde.N
        return mean + per_image(diffusion) * self.sde.N**-0.5 * noise(), mean, state


class ReverseDiffusion(PublishedPredictor):
    """x_mean = x - f, the reverse of the SDE's own discretisation (Score-SDE appendix E)."""

    def step(self, model, x, t, t_next, state, noise):
        f, g = self.sde.reverse_discretize(model(x, t), x, t, self.probability_flow)
        mean = x - f
        return mean + per_image(g) * noise(), mean, state


@dataclasses.dataclass(frozen=True)
class AncestralSampling(PublishedPredictor):
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


class NoPredictor(PublishedPredictor):
    """Leaves x alone and draws nothing."""

    def step(self, model, x, t, t_next, state, noise):
        return x, x, state


# ------------------------------------------------------------------------------------------- solvers of few steps


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


class DDIMInversion(Solver):
    """The deterministic `ExponentialIntegrator` of order 1 towards noise, written in the predicted noise eps.

    d(x / alpha) = eps d(std / alpha) with eps held over a step:
    x_next = alpha(t_next) (x / alpha(t) + (std(t_next) / alpha(t_next) - std(t) / alpha(t)) eps).  From x and the
    predicted clean image, as towards the data, eps would be a difference that loses its digits where std is small.
    """

    towards_noise = True

    def step(self, model, x, t, t_next, state, noise):
        eps = model.eps(x, t)  # (B, C, H, W)
        if not len(t_next):
            return x, x, None
        (alpha, std), (alpha_next, std_next) = self.sde.marginal(t.double()), self.sde.marginal(t_next.double())
        ratio = alpha_next / alpha
        x = _as(x, ratio) * x + _as(x, std_next - ratio * std) * eps
        return x, x, None


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


# ------------------------------------------------------------------------------------------------------ time grids


def time_grid(sde, steps, eps, start=None, spacing="uniform"):
    """`steps` falling times from `start` to `eps`: (steps,) float32; by default the published ones.

    Args:
        sde: the SDE.
        steps: at least 1.
        eps: the last time.
        start: the first time, by default T.
        spacing: a name in `TIME_GRIDS`.
    """
    start = sde.T if start is None else start
    return choose(spacing, TIME_GRIDS, "time grid (config.sampling.time_grid)")(sde, start, eps, steps)


def _uniform(sde, start, end, steps):
    return torch.linspace(start, end, steps)


def _uniform_in_log_snr(sde, start, end, steps):
    ends = torch.tensor([start, end], dtype=torch.float64)
    first, last = sde.log_snr(ends).tolist()
    times = sde.time_at(torch.linspace(first, last, steps, dtype=torch.float64))
    times[:1], times[1:][-1:] = ends[0], ends[1]  # exactly
    return times.float()


TIME_GRIDS = {
    "uniform": _uniform,
    "lambda": _uniform_in_log_snr,  # even in the logarithm of the signal-to-noise ratio (DPM-Solver)
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


# --------------------------------------------------------------------------------------------------- the one loop


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the reverse process is run: solvers along a grid of times.

    Attributes:
        predictor: a solver.
        times: (N,) float32 on the CPU, falling; by default the published grid of the predictor's SDE.  A rise goes back
            to an earlier, noisier time by adding noise (RePaint), unless the predictor itself runs towards noise.
        corrector: a corrector, or None.
        denoise: the result is the mean of the last step instead of its noisy x.
    """

    predictor: object
    times: torch.Tensor | None = None
    corrector: object = None
    denoise: bool = True

    def __post_init__(self):
        if self.times is None:
            sde = self.predictor.sde
            object.__setattr__(self, "times", time_grid(sde, sde.N, sde.eps))

    @property
    def goes_back(self):
        """For every time whether noise is added to reach the next one, instead of a step: a list of bool."""
        rises = self.times[1:] > self.times[:-1]
        return [*(rises & (not self.predictor.towards_noise)).tolist(), False]

    @property
    def steps(self):
        """Steps of the predictor, each an evaluation of the network."""
        return len(self.times) - sum(self.goes_back)

    @property
    def evaluations(self):
        """Evaluations of the network for an image: those of the predictor and of the corrector."""
        return self.steps * (1 + (0 if self.corrector is None else self.corrector.n_steps))


@torch.no_grad()
def integrate(model, x, scheme, noise, constrain=None, on_step=None, record=None):
    """Runs a scheme.

    With a constraint this is the published corrector, constrain, predictor, constrain.  Where the corrector is none,
    two constraints follow each other and the first has no effect on anything that is read, so it is left out.

    Args:
        model: score(x, t); a `models.score.Score` for solvers of few steps and to be recorded.
        x: (B, C, H, W), the state at the first time.
        scheme: a `Scheme`.
        noise: called as noise(step, purpose), gives (B, C, H, W); None for a scheme that draws nothing.
        constrain: called as constrain(x, t, z), gives (x, mean), or None.
        on_step: called without arguments after each step.
        record: called as record(t, x, eps, x0) at each evaluation of the network by the predictor: the time (1,), the
            state that the network saw, the predicted noise and the predicted clean image, (B, C, H, W) each.

    Returns:
        (B, C, H, W)
    """
    predictor, corrector, times = scheme.predictor, scheme.corrector, scheme.times.to(x.device)
    seen = model if record is None else RecordedScore(model, record)
    state, last, mean = predictor.init(x), len(times) - 1, x
    for i, goes_back in enumerate(scheme.goes_back):
        t, t_next = times[i : i + 1], times[i + 1 : i + 2]
        if goes_back:
            x, state = diffuse(predictor.sde, x, t, t_next, noise(i, "return")), predictor.init(x)
            continue
        if corrector is not None:
            x, mean = corrector.correct(model, x, t, lambda j, i=i: noise(i * corrector.n_steps + j, "corrector"))
        if constrain is not None:
            x, mean = constrain(x, t, noise(i, "constrain"))
        x, mean, state = predictor.step(seen, x, t, t_next, state, lambda i=i: noise(i, "predictor"))
        if constrain is not None and (corrector is not None or i == last) and not predictor.ends_clean:
            x, mean = constrain(x, t, noise(i, "reconstrain"))
        if on_step is not None:
            on_step()
    return mean if scheme.denoise else x


class RecordedScore(Score):
    """A score that tells `record(t, x, eps, x0)` of each evaluation.

    Args:
        model: a `models.score.Score`.
        record: as in `integrate`.
    """

    def __init__(self, model, record):
        self.model, self.sde, self.record = model, model.sde, record

    def __call__(self, x, t):
        score = self.model(x, t)
        self.record(t, x, *self.predictions_of(score, x, t))
        return score

    def predictions(self, x, t):
        eps, x0 = self.model.predictions(x, t)
        self.record(t, x, eps, x0)
        return eps, x0


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


def sample(model, noise, scheme, on_step=None):
    """Predictor-corrector sampling from the prior; everything else comes from the noise source and the scheme.

    Args:
        model: score(x, t).
        noise: called as noise(step, purpose); "prior" gives the start.
        scheme: a `Scheme`, from T.
        on_step: called after each step.

    Returns:
        (B, C, H, W) in the model's range.
    """
    prior = noise(0, "prior") * scheme.predictor.sde.prior_std  # (B, C, H, W)
    return integrate(model, prior, scheme, noise, on_step=on_step)


def invert(model, x, times, record=None):
    """Lifts images to noise without drawing any: DDIM inversion (arXiv 2105.05233, section 4.3), see `DDIMInversion`.

    Args:
        model: a `models.score.Score`.
        x: (B, C, H, W), the state at the first time: an image, where this is near 0.
        times: (N,) on the CPU, rising; the network is evaluated once at each, the last one included.
        record: as in `integrate`.

    Returns:
        (B, C, H, W), the state at the last time.
    """
    return integrate(model, x, Scheme(DDIMInversion(model.sde), times), noise=None, record=record)


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


class ConstrainedScore(Score):
    """A score whose predicted clean image is kept to the range of images and to the known pixels.

    The prediction is clipped, then takes the known pixels from the data (the null-space projection of DDNM, arXiv
    2212.00490, equation 13); score and predicted noise are those that belong to this prediction.

    Args:
        model: a `models.score.Score`.
        limits: (lowest, highest) value of an image, or None for no clipping.
        data, mask: as in `inpaint`, or None for no projection.
    """

    def __init__(self, model, limits=None, data=None, mask=None):
        self.model, self.sde, self.limits = model, model.sde, limits
        self.known, self.unknown = (None, None) if mask is None else (data * mask, 1 - mask)

    def predictions(self, x, t):
        x0, (alpha, std) = self.model.x0(x, t), self.sde.marginal(t)
        if self.limits is not None:
            x0 = x0.clamp(*self.limits)
        if self.known is not None:
            x0 = self.known + x0 * self.unknown
        return (x - per_image(alpha) * x0) / per_image(std), x0

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


def inpaint_as_published(model, data, mask, noise, scheme, on_step=None):
    """The published Map of Lift, Map, Detect: fills the unknown pixels by the reverse process, from noise.

    The known pixels are replaced at every time by the data at that time's noise level, and the returned mean keeps the
    noisy x of the last predictor step on the filled pixels.

    Args:
        model: score(x, t).
        data: (B, C, H, W) in the model's range.
        mask: (1, 1, H, W) or (B, 1 or C, H, W), 1 = known, 0 = to be filled.
        noise, on_step: as in `sample`.
        scheme: a `Scheme` with a published predictor.

    Returns:
        (B, C, H, W) in the model's range, not clipped.
    """
    sde = scheme.predictor.sde
    x = data * mask + noise(0, "prior") * sde.prior_std * (1 - mask)
    return integrate(model, x, scheme, noise, constrain=replacement(sde, data, mask), on_step=on_step)


CONSTRAINTS = ("replace", "project")
LIFTS = ("mask", "noise", "both")


@dataclasses.dataclass(frozen=True)
class InpaintingScheme(Scheme):
    """A scheme, and what inpainting in few steps takes from the image and holds of it.

    Attributes:
        constraint: how known pixels are held: 'replace' in the state, before each step, or 'project' in the predicted
            clean image.
        lift: what the start is made of: 'mask' (the known pixels), 'noise' (all of it is noised to the first time,
            and nothing is held), or 'both' (all of it is noised, and the known pixels are held).
        limits: (lowest, highest) value of an image, to clip predictions to; None for no clipping.
    """

    constraint: str = "replace"
    lift: str = "mask"
    limits: tuple | None = None


def inpaint(model, data, mask, noise, scheme, on_step=None):
    """The Map of Lift, Map, Detect in few steps: starts from the lifted image and ends at a predicted clean one.

    Args:
        model: a `models.score.Score`.
        data, mask, noise, on_step: as in `inpaint_as_published`.
        scheme: an `InpaintingScheme` with a predictor that ends clean.

    Returns:
        (B, C, H, W) in the model's range, the data on the known pixels.
    """
    if scheme.lift == "noise":
        mask = torch.zeros_like(mask)
    sde, start = scheme.predictor.sde, scheme.times[:1]
    alpha, std = sde.marginal(start.to(data.device))
    x = per_image(alpha) * _first_guess(data, mask, scheme) + per_image(std) * noise(0, "prior")
    held = scheme.lift != "noise"
    projects = held and scheme.constraint == "project"
    if projects or scheme.limits is not None:
        model = ConstrainedScore(model, scheme.limits, *((data, mask) if projects else ()))
    constrain = replacement(sde, data, mask) if held and not projects else None
    x = integrate(model, x, scheme, noise, constrain=constrain, on_step=on_step)
    return x * (1 - mask) + data * mask


def _first_guess(data, mask, scheme):
    """The clean image to which the first time's noise is added: (B, C, H, W)."""
    if scheme.lift != "mask":
        return data
    if scheme.times[0].item() < scheme.predictor.sde.T:
        return fill_smoothly(data, mask)  # Come-Closer-Diffuse-Faster (arXiv 2112.05146)
    return data * mask


# ------------------------------------------------------------------------------------ the probability-flow ODE


@torch.no_grad()
def sample_ode(model, sde, prior, *, noise_removal=False, eps=None, rtol=1e-5, atol=1e-5):
    """Sampling by the probability-flow ODE with an adaptive Runge-Kutta 4(5) (Score-SDE appendix D).

    Args:
        model: score(x, t).
        sde: the SDE.
        prior: (B, C, H, W), the start at T.
        noise_removal: end with the mean of a step of reverse diffusion, without the noise of the last time.
        eps: the last time, by default the SDE's.
        rtol, atol: error tolerances of the solver, which controls the steps of each sample by itself.

    Returns:
        (B, C, H, W) in the model's range, and the number of function evaluations of each sample (B,) int64.

    Raises:
        UserError: see `ode.solve`.
    """

    def velocity(x, t, rows):
        return probability_flow(model, sde, x.to(prior.dtype), t.to(prior.dtype))

    eps = sde.eps if eps is None else eps
    x, evaluations = ode.solve(velocity, prior, (sde.T, eps), rtol=rtol, atol=atol)
    if noise_removal:
        t = x.new_full((1,), eps)
        x, evaluations = x - sde.reverse_discretize(model(x, t), x, t)[0], evaluations + 1
    return x, evaluations


def probability_flow(model, sde, x, t):
    """dx/dt of the ODE with the marginals of the SDE: (B, C, H, W), for x (B, C, H, W) and t (1,) or (B,)."""
    return sde.reverse_sde(model(x, t), x, t, probability_flow=True)[0]
