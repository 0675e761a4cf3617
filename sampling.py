"""Solvers of the reverse-time SDE, one integration loop, and what it is used for: sampling and inpainting.

Everything here works in the model's range on (B, C, H, W) tensors.  Noise comes from a source called as
`noise(step, purpose)` (see `noise.KeyedNoise`), never from the global generator.

Sources: Score-SDE (arXiv 2011.13456) algorithms 1 to 5; Lift, Map, Detect (arXiv 2302.10326) for the inpainting.
"""

import dataclasses

import torch

from console import UserError, choose
from sde_lib import VESDE, VPSDE, SubVPSDE, per_image

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
    predictor = choose(options.predictor.lower(), PREDICTORS, "predictor (config.sampling.predictor)")
    corrector = choose(options.corrector.lower(), CORRECTORS, "corrector (config.sampling.corrector)")
    return (
        predictor(sde, options.probability_flow),
        corrector(sde, options.snr, options.n_steps_each, group),
    )


# ------------------------------------------------------------------------------------------------- the one loop


def time_grid(sde, steps, eps, device="cpu"):
    """The published grid: `steps` times, evenly from T to eps: (steps,) float32."""
    return torch.linspace(sde.T, eps, steps, device=device)


@torch.no_grad()
def integrate(model, x, times, predictor, noise, corrector=None, constrain=None, denoise=True, on_step=None):
    """Runs the reverse process along `times`.

    With a constraint this is the published corrector, constrain, predictor, constrain.  Where the corrector is none,
    two constraints follow each other and the first has no effect on anything that is read, so it is left out.

    Args:
        model: score(x, t).
        x: (B, C, H, W), the state at the first time.
        times: (N,) descending, on x's device.
        predictor, corrector: solvers; the corrector may be None.
        noise: called as noise(step, purpose), gives (B, C, H, W).
        constrain: called as constrain(x, t, z), gives (x, mean), or None.
        denoise: return the mean of the last step instead of its noisy x.
        on_step: called without arguments after each step.

    Returns:
        (B, C, H, W)
    """
    state, last = predictor.init(x), len(times) - 1
    mean = x
    for i in range(len(times)):
        t, t_next = times[i : i + 1], times[i + 1 : i + 2]
        if corrector is not None:
            x, mean = corrector.correct(model, x, t, lambda j, i=i: noise(i * corrector.n_steps + j, "corrector"))
        if constrain is not None:
            x, mean = constrain(x, t, noise(i, "constrain"))
        x, mean, state = predictor.step(model, x, t, t_next, state, lambda i=i: noise(i, "predictor"))
        if constrain is not None and (corrector is not None or i == last):
            x, mean = constrain(x, t, noise(i, "reconstrain"))
        if on_step is not None:
            on_step()
    return mean if denoise else x


# ------------------------------------------------------------------------------------------ sampling, inpainting


def sample(model, sde, noise, *, predictor, corrector=None, eps=None, denoise=True, on_step=None):
    """Predictor-corrector sampling from the prior; everything else comes from the noise source and the solvers.

    Args:
        model: score(x, t).
        sde: the SDE; its N is the number of steps.
        noise: called as noise(step, purpose); "prior" gives the start.
        predictor, corrector: solvers.
        eps: the last time, by default the SDE's.
        denoise: return the mean of the last step.
        on_step: called after each step.

    Returns:
        (B, C, H, W) in the model's range.
    """
    prior = noise(0, "prior") * sde.prior_std  # (B, C, H, W)
    times = time_grid(sde, sde.N, sde.eps if eps is None else eps, prior.device)
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


def inpaint(model, sde, data, mask, noise, *, predictor, corrector=None, eps=None, denoise=True, on_step=None):
    """The Map of Lift, Map, Detect: fills the unknown pixels by the reverse process, holding the known ones.

    The known pixels are replaced at every time by the data at that time's noise level.  As published, the returned
    mean keeps the noisy x of the last predictor step on the filled pixels.

    Args:
        model: score(x, t).
        sde: the SDE; its N is the number of steps.
        data: (B, C, H, W) in the model's range.
        mask: (1, 1, H, W) or (B, 1 or C, H, W), 1 = known, 0 = to be filled.
        noise, predictor, corrector, eps, denoise, on_step: as in `sample`.

    Returns:
        (B, C, H, W) in the model's range, not clipped.
    """
    constrain = replacement(sde, data, mask)
    x = data * mask + noise(0, "prior") * sde.prior_std * (1 - mask)
    times = time_grid(sde, sde.N, sde.eps if eps is None else eps, data.device)
    return integrate(
        model, x, times, predictor, noise, corrector, constrain=constrain, denoise=denoise, on_step=on_step
    )


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
    from scipy.integrate import solve_ivp

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
