"""Solvers of few steps: exact answers on Gaussian data, grids, inversion, lifts, and how a config names them."""

import pytest
import tiny
import torch
from helpers import GaussianScore, filled_model, load_config, small
from test_configs import LEAVES
from test_configs import load as load_leaf
from test_sampling import COUNT, KNOWN, MASK, SDES, UNKNOWN, conditional, gaussian_data, keyed, moments

import sampling
import sde_lib
from basics.console import UserError
from configs.base import TREE
from lmd import process as processes
from lmd import samples
from lmd.process import create_process, preset
from sampling import ExponentialIntegrator, InpaintingScheme, Scheme

# -------------------------------------------------------------------------------------------------------- the SDEs


@pytest.mark.parametrize("name", SDES)
def test_log_snr_is_inverted(name):
    sde = SDES[name](1000)
    t = torch.logspace(-5, 0, 11, dtype=torch.float64)
    log_snr = sde.log_snr(t)
    alpha, std = sde.marginal(t)
    torch.testing.assert_close(log_snr, (alpha / std).log())
    assert (log_snr.diff() < 0).all()
    torch.testing.assert_close(sde.time_at(log_snr), t, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", SDES)
def test_the_same_sde_in_other_steps(name):
    sde, t = SDES[name](1000), torch.tensor([0.4])
    few = sde.with_steps(10)
    assert (sde.N, few.N) == (1000, 10)
    assert few.marginal(t) == sde.marginal(t)
    x = torch.ones(1, 1, 1, 1)
    for mine, fresh, old in zip(
        few.discretize(x, t), SDES[name](10).discretize(x, t), sde.discretize(x, t), strict=True
    ):
        assert torch.equal(mine, fresh)
        assert (name == "ve" and not old.any()) or not torch.equal(mine, old)


# ----------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("spacing", sampling.TIME_GRIDS)
@pytest.mark.parametrize("name", SDES)
def test_grids_fall_from_start_to_end(name, spacing):
    sde = SDES[name](1000)
    times = sampling.time_grid(sde, 9, 0.01, start=0.7, spacing=spacing)
    assert times.dtype == torch.float32
    assert (times.diff() < 0).all()
    torch.testing.assert_close(times[[0, -1]], torch.tensor([0.7, 0.01]))
    even = {"uniform": lambda t: t, "lambda": sde.log_snr}[spacing](times.double())
    torch.testing.assert_close(even.diff(), even.diff().mean().expand(8), rtol=1e-4, atol=0)  # times are float32


@pytest.mark.parametrize("spacing", sampling.TIME_GRIDS)
def test_a_grid_of_one_step(spacing):
    times = sampling.time_grid(sde_lib.SubVPSDE(), 1, 1e-3, start=0.5, spacing=spacing)
    torch.testing.assert_close(times, torch.tensor([0.5]))


def test_going_back():
    times = torch.tensor([3.0, 2.0, 1.0])
    assert sampling.with_returns(times, 0).tolist() == [3, 2, 1]
    assert sampling.with_returns(times, 1).tolist() == [3, 2, 3, 2, 1, 2, 1]
    assert sampling.with_returns(times, 2).tolist() == [3, 2, 3, 2, 3, 2, 1, 2, 1, 2, 1]


@pytest.mark.parametrize("name", SDES)
def test_diffusing_keeps_the_marginal(name):
    """x_t of the data N(mean, cov), taken to a later time, has that time's mean and covariance (4 standard errors)."""
    sde, (mean, cov), source = SDES[name](1000), gaussian_data(), keyed(COUNT)
    t, later = torch.tensor([0.2]), torch.tensor([0.5])
    (alpha, std), (alpha_later, std_later) = sde.marginal(t), sde.marginal(later)
    data = (mean + source(0, "prior").flatten(1) @ torch.linalg.cholesky(cov).T).view(-1, 1, 2, 2)
    x = sampling.diffuse(sde, alpha * data + std * source(0, "predictor"), t, later, source(0, "return"))
    got_mean, got_cov = moments(x)
    expected = alpha_later**2 * cov + std_later**2 * torch.eye(4)
    scale = float(expected.diagonal().max())
    torch.testing.assert_close(got_mean, alpha_later * mean, rtol=0, atol=0.04 * scale**0.5)
    torch.testing.assert_close(got_cov, expected, rtol=0, atol=0.06 * scale)


# --------------------------------------------------------------------------------------------- order of convergence


def flow(sde, mean, cov, x, t, s):
    """The exact probability flow of Gaussian data from time t to s, direction by direction."""
    variances, axes = torch.linalg.eigh(cov)
    (alpha, std), (alpha_s, std_s) = sde.marginal(t), sde.marginal(s)
    along = (x.flatten(1) - alpha * mean) @ axes
    stretched = along * ((alpha_s**2 * variances + std_s**2) / (alpha**2 * variances + std**2)).sqrt()
    return (alpha_s * mean + stretched @ axes.T).view_as(x)


def flow_error(sde, solver, steps):
    """The largest error of a deterministic solver between the times 0.9 and 0.1, in float64, in units of the prior."""
    mean, cov = (value.double() for value in gaussian_data())
    model, x = GaussianScore(sde, mean, cov), keyed(16)(0, "prior").double() * sde.prior_std
    ends = torch.tensor([0.9, 0.1], dtype=torch.float64)
    first, last = sde.log_snr(ends).tolist()
    times = sde.time_at(torch.linspace(first, last, steps + 1, dtype=torch.float64))
    expected, state = flow(sde, mean, cov, x, times[:1], times[-1:]), solver.init(x)
    for i in range(steps):
        x, _, state = solver.step(model, x, times[i : i + 1], times[i + 1 : i + 2], state, None)
    return (x - expected).abs().max().item() / sde.prior_std


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (lambda sde: ExponentialIntegrator(sde, eta=0.0), 1),
        (lambda sde: ExponentialIntegrator(sde, eta=0.0, order=2), 2),
    ],
    ids=["ddim", "dpmpp_2m"],
)
@pytest.mark.parametrize("name", SDES)
def test_order_of_convergence(name, solver, order):
    """Twice the steps, 2^order less error; asymptotically, so 15 % are allowed at 160 steps."""
    sde = SDES[name](1000)
    errors = [flow_error(sde, solver(sde), steps) for steps in (160, 320)]
    assert errors[0] < 0.1
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


FEW = {  # solver, steps, tolerance of a covariance: the bias seen at that number of steps, plus 4 standard errors
    "ddim": (lambda sde: ExponentialIntegrator(sde), 100, 0.08),
    "ddim deterministic": (lambda sde: ExponentialIntegrator(sde, eta=0.0), 100, 0.05),
    "dpmpp_2m": (lambda sde: ExponentialIntegrator(sde, eta=0.0, order=2), 20, 0.05),
    "sde_dpmpp_2m": (lambda sde: ExponentialIntegrator(sde, order=2), 20, 0.05),
}


@pytest.mark.parametrize("solver", FEW)
@pytest.mark.parametrize("name", SDES)
def test_few_steps_reproduce_a_gaussian(name, solver):
    sde, (mean, cov) = SDES[name](1000), gaussian_data()
    make, steps, tolerance = FEW[solver]
    times = sampling.time_grid(sde, steps, sde.eps, spacing="lambda")
    result = sampling.sample(GaussianScore(sde, mean, cov), keyed(COUNT), Scheme(make(sde), times))
    got_mean, got_cov = moments(result)
    torch.testing.assert_close(got_mean, mean, rtol=0, atol=0.04)
    torch.testing.assert_close(got_cov, cov, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------- inversion and record


@pytest.mark.parametrize("name", SDES)
def test_inversion_follows_the_probability_flow(name):
    """From t = 0.01 to 0.9, for data N(m, s^2), whose flow is known."""
    sde, (mean, cov) = SDES[name](1000), (torch.full((4,), 0.3).double(), 0.25 * torch.eye(4).double())
    model, x = GaussianScore(sde, mean, cov), keyed(16)(0, "prior").double()
    ends, errors = torch.tensor([0.01, 0.9], dtype=torch.float64), []
    for steps in (200, 400):
        times = sde.time_at(torch.linspace(*sde.log_snr(ends).tolist(), steps + 1, dtype=torch.float64))
        found = sampling.invert(model, x, times)
        errors.append((found - flow(sde, mean, cov, x, times[:1], times[-1:])).abs().max().item() / sde.prior_std)
    assert errors[1] < 0.03
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)  # of first order
    back = sampling.invert(model, found, times.flip(0))  # the same equation towards the data
    torch.testing.assert_close(back, x, rtol=0, atol=0.03)


class Counted(GaussianScore):
    """Keeps what it was called with."""

    def __init__(self, *args):
        super().__init__(*args)
        self.calls = []

    def __call__(self, x, t):
        self.calls.append((t, x))
        return super().__call__(x, t)


@pytest.mark.parametrize("predictor", ["inversion", "ddim", "euler_maruyama"])
@pytest.mark.parametrize("name", SDES)
def test_a_record_is_of_every_evaluation(name, predictor):
    """Times and states that the network saw, with the exact eps and x0; what comes out is the same without it."""
    sde, m, variance = SDES[name](1000), 0.3, 0.25
    model, x, seen = Counted(sde, torch.full((4,), m), variance * torch.eye(4)), keyed(3)(0, "prior"), []
    times = torch.linspace(0.9, 0.1, 5)
    if predictor == "inversion":
        run = lambda record: sampling.invert(model, x, times.flip(0), record)
    else:
        solver = ExponentialIntegrator(sde) if predictor == "ddim" else sampling.EulerMaruyama(sde)
        run = lambda record: sampling.integrate(model, x, Scheme(solver, times), keyed(3), record=record)
    result = run(lambda *values: seen.append(values))
    assert len(seen) == len(model.calls) == len(times)
    for (t, state, eps, x0), of_network in zip(seen, model.calls, strict=True):
        assert tiny.same((t, state), of_network)
        alpha, std = sde.marginal(t)
        expected = std * (state - alpha * m) / (alpha**2 * variance + std**2)
        torch.testing.assert_close(eps, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(x0, (state - std * expected) / alpha, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.cat([t for t, *_ in seen]), times.flip(0) if predictor == "inversion" else times)
    assert torch.equal(run(None), result)


# ------------------------------------------------------------------------------------------------------ inpainting


def filled(sde, returns=0, steps=50, **options):
    """Moments of the filled pixels, and the known ones, of many inpaintings of one Gaussian image."""
    mean, cov = gaussian_data()
    data = torch.tensor([0.9, 0.0, 0.4, 0.0])
    times = sampling.with_returns(sampling.time_grid(sde, steps, sde.eps, spacing="lambda"), returns)
    result = sampling.inpaint(
        GaussianScore(sde, mean, cov),
        data.view(1, 1, 2, 2).expand(COUNT, 1, 2, 2),
        MASK,
        keyed(COUNT),
        InpaintingScheme(ExponentialIntegrator(sde), times, **options),
    ).flatten(1)
    assert torch.equal(result[:, KNOWN], data[KNOWN].expand(COUNT, 2))
    expected_mean, expected_cov = conditional(mean, cov, data[KNOWN])
    unknown = result[:, UNKNOWN]
    return (unknown.mean(dim=0) - expected_mean).abs().max(), (torch.cov(unknown.T) - expected_cov).abs().max()


@pytest.mark.parametrize("constraint", sampling.CONSTRAINTS)
@pytest.mark.parametrize("name", SDES)
def test_going_back_reaches_the_conditional_gaussian(name, constraint):
    """Either constraint alone is off by about 0.18 in a mean (as published); ten returns a step bring it to 0.03."""
    sde = SDES[name](1000)
    biased, _ = filled(sde, constraint=constraint)
    mean_error, cov_error = filled(sde, returns=10, constraint=constraint)
    assert 0.1 < biased < 0.25
    assert mean_error < 0.05  # 4 standard errors, 0.02, and what is left of the bias
    assert cov_error < 0.05  # 0.026 to 0.043 over four seeds


@pytest.mark.parametrize("name", SDES)
def test_langevin_reaches_the_conditional_gaussian_in_few_steps(name):
    sde = SDES[name](1000)
    mean_error, cov_error = filled(sde, corrector=sampling.Langevin(sde, 0.16, n_steps=6))
    assert mean_error < 0.05
    assert cov_error < 0.04


@pytest.mark.parametrize("constraint", sampling.CONSTRAINTS)
@pytest.mark.parametrize("name", SDES)
def test_independent_pixels_are_filled_exactly(name, constraint):
    sde = SDES[name](1000)
    mean, cov = gaussian_data()
    cov = torch.diag(cov.diagonal())
    times = sampling.time_grid(sde, 100, sde.eps, spacing="lambda")
    data = torch.tensor([0.7, 9.0, -0.5, 9.0]).view(1, 1, 2, 2).expand(COUNT, 1, 2, 2)
    scheme = InpaintingScheme(ExponentialIntegrator(sde, order=2), times, constraint=constraint)
    result = sampling.inpaint(GaussianScore(sde, mean, cov), data, MASK, keyed(COUNT), scheme).flatten(1)
    torch.testing.assert_close(result[:, UNKNOWN].mean(dim=0), mean[UNKNOWN], rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(result[:, UNKNOWN].T), cov[UNKNOWN][:, UNKNOWN], rtol=0, atol=0.03)


def test_a_constrained_score_keeps_to_limits_and_known_pixels():
    """Score and predicted noise belong to its prediction."""
    sde, (mean, cov) = sde_lib.SubVPSDE(), gaussian_data()
    model, x, t = GaussianScore(sde, mean, cov), 3 * keyed(5)(0, "prior"), torch.tensor([0.3])
    data = torch.full((5, 1, 2, 2), 0.25)
    constrained = sampling.ConstrainedScore(model, (-0.4, 0.4), data, MASK)
    x0 = constrained.x0(x, t)
    torch.testing.assert_close(x0, torch.where(MASK == 1, data, model.x0(x, t).clamp(-0.4, 0.4)))
    alpha, std = sde.marginal(t)
    torch.testing.assert_close(constrained(x, t), -(x - alpha * x0) / std**2)
    assert tiny.same(constrained.predictions(x, t), (constrained.eps(x, t), x0))
    torch.testing.assert_close(constrained.eps(x, t), (x - alpha * x0) / std)
    torch.testing.assert_close(sampling.ConstrainedScore(model)(x, t), model(x, t), rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- lifts


class Recorder:
    """A predictor that ends at once and keeps the state and the model that it got."""

    ends_clean, towards_noise = True, False

    def __init__(self, sde):
        self.sde = sde

    def init(self, x):
        return None

    def step(self, model, x, t, t_next, state, noise):
        self.x, self.model = x, model
        return x, x, None


@pytest.mark.parametrize("lift", sampling.LIFTS)
@pytest.mark.parametrize("start", [1.0, 0.5])
def test_what_a_lift_starts_from(lift, start):
    """Constraint 'project' leaves the state alone: it is alpha guess + std z."""
    sde, source = sde_lib.SubVPSDE(), keyed(3)
    data = keyed(3, seed=5)(0, "prior")
    model, recorder = GaussianScore(sde, *gaussian_data()), Recorder(sde)
    scheme = InpaintingScheme(recorder, torch.tensor([start]), constraint="project", lift=lift)
    result = sampling.inpaint(model, data, MASK, source, scheme)
    alpha, std = sde.marginal(torch.tensor([start]))
    known = (data * MASK).sum(dim=(2, 3), keepdim=True) / 2  # every unknown pixel's guess is the mean of the two known
    guess = data if lift != "mask" else data * MASK + known * (1 - MASK) if start < 1 else data * MASK
    torch.testing.assert_close(recorder.x, alpha * guess + std * source(0, "prior"))
    held = (result == data).flatten(1).float().mean(dim=0).view(1, 1, 2, 2)
    assert torch.equal(held, torch.zeros_like(MASK) if lift == "noise" else MASK)
    assert isinstance(recorder.model, sampling.ConstrainedScore) == (lift != "noise")


def test_a_smooth_fill():
    """Known pixels stay; a constant and a ramp are continued; far from known pixels coarser averages serve."""
    ramp = torch.linspace(0, 1, 16).expand(1, 1, 16, 16)
    blocks = (torch.arange(16) // 2)[:, None] + (torch.arange(16) // 2)[None]
    mask = (blocks % 2 == 0).float()[None, None]
    guess = sampling.fill_smoothly(ramp, mask)
    assert torch.equal(guess * mask, ramp * mask)
    assert (guess - ramp).abs().max() < 0.11  # a pixel and a half of the ramp
    hole = torch.ones(1, 1, 16, 16)
    hole[..., 2:14, 2:14] = 0
    torch.testing.assert_close(
        sampling.fill_smoothly(torch.full((1, 1, 16, 16), 0.3), hole), torch.full_like(hole, 0.3)
    )
    assert sampling.fill_smoothly(ramp, torch.zeros_like(mask)).isfinite().all()
    odd = torch.rand(2, 3, 7, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sampling.fill_smoothly(odd, torch.ones(1, 1, 7, 5)), odd)


# --------------------------------------------------------------------------------------------------------- configs


def process_of(path="subvp/cifar10_ddpm_continuous.py", **sampling_values):
    config = load_config(path)
    config.sampling.update(sampling_values)
    return create_process(config, sde_lib.create_sde(config))


def test_the_published_process_is_the_default():
    process = process_of()
    assert isinstance(process.predictor, sampling.EulerMaruyama)
    assert torch.equal(process.times, torch.linspace(1, 1e-3, 1000))
    assert (process.evaluations, process.limits, process.constraint, process.lift) == (1000, None, "replace", "mask")
    process = process_of(steps=25)
    assert process.predictor.sde.N == 25
    assert len(process.times) == 25


@pytest.mark.parametrize(
    ("values", "evaluations"),
    [
        ({"sampler": "ddim", "steps": 10}, 10),
        ({"sampler": "ddim", "steps": 10, "returns": 1}, 19),
        ({"sampler": "ddim", "steps": 10, "corrector": "langevin", "n_steps_each": 2}, 30),
        ({"sampler": "dpmpp_2m", "steps": 4, "time_grid": "lambda", "t_end": 0.03}, 4),
        ({"steps": 10, "corrector": "langevin"}, 20),
    ],
)
def test_evaluations_are_those_made(values, evaluations):
    """Counted on a network."""
    config = small("subvp/cifar10_ddpm_continuous.py")
    config.sampling.update(values)
    model, calls = filled_model(config), []
    network = model.net
    model.net = lambda x, labels: (calls.append(1), network(x, labels))[1]
    process, steps = create_process(config, model.sde), []
    source = keyed(2, (3, 16, 16))
    data = source(0, "prior").clamp(-1, 1)
    mask = torch.ones(1, 1, 16, 16)
    mask[..., 4:8] = 0
    result = process.inpaint(model, data, mask, source, on_step=lambda: steps.append(1))
    assert result.isfinite().all()
    assert len(calls) == process.evaluations == evaluations
    assert len(steps) == process.steps


@pytest.mark.parametrize("sampler", processes.SAMPLERS)
@pytest.mark.parametrize("path", ["vp/ddpm/cifar10.py", "ve/cifar10_ddpm.py", "ve/cifar10_ncsnpp_continuous.py"])
def test_every_sampler_runs_every_kind_of_model(path, sampler):
    """Predictions are clipped to the range of the data: [-1, 1] or, for VE, [0, 1]."""
    config = small(path)
    config.sampling.update({"sampler": sampler, "steps": 4, "corrector": "none"})
    model = filled_model(config)
    result = create_process(config, model.sde).sample(model, keyed(2, (3, 16, 16)))
    low = -1 if config.data.centered else 0
    assert result.isfinite().all()
    assert low <= result.min() < result.max() <= 1


@pytest.mark.parametrize("path", ["subvp/cifar10_ddpm_continuous.py", "vp/ddpm/cifar10.py", "ve/cifar10_ncsnpp.py"])
@pytest.mark.parametrize("name", processes.PRESETS)
def test_presets_are_of_few_evaluations_and_of_the_same_noise_on_every_sde(name, path):
    config = load_config(path)
    values, reps = preset(name, config)
    config.sampling.update(values)
    sde = sde_lib.create_sde(config)
    process = create_process(config, sde)
    assert process.evaluations * reps <= {"fast": 20, "best": 100}[name]
    measured, sub_vp = processes.PRESETS[name][0], sde_lib.SubVPSDE()
    for field, found in zip(("t_start", "t_end"), process.times[[0, -1]].split(1), strict=True):
        (alpha, std), expected = sde.marginal(found), sub_vp.marginal(torch.tensor([measured[field]]))
        size = 1 if config.data.centered else 2  # noise in units of images that are half as large
        torch.testing.assert_close(size * std / alpha, expected[1] / expected[0], rtol=2e-3, atol=0)


def test_too_few_steps_for_a_discrete_process_are_refused():
    with pytest.raises(UserError, match="needs more than 20 steps"):
        process_of("vp/ddpm/cifar10.py", steps=20)
    assert process_of("vp/ddpm/cifar10.py", steps=21).steps == 21


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sampler": "heun"}, "unknown sampler .*'heun'; choose one of: published, ddim, dpmpp"),
        ({"sampler": "dpmpp_2m", "eta": 0.5}, "eta goes with the sampler ddim"),
        ({"sampler": "ddim", "t_start": 1.2}, "t_start is 1.2; it must be .* at most 1"),
        ({"sampler": "ddim", "t_start": 0.1, "t_end": 0.2}, "t_end, 0.2, must be below t_start, 0.1"),
        ({"sampler": "ddim", "lift": "noise"}, "need t_start < 1"),
        ({"t_start": 0.5}, "t_start: not with the published sampler; choose one of ddim, dpmpp"),
        ({"time_grid": "lambda", "returns": 2}, "time_grid, returns: not with the published sampler"),
        ({"sampler": "dpmpp_2m", "probability_flow": True}, "probability_flow: not with the sampler dpmpp_2m; ddim wi"),
        ({"sampler": "ddim", "noise_removal": False}, "noise_removal: not with the sampler ddim, which is a predictor"),
        ({"sampler": "ddim", "predictor": "none"}, "predictor: not with the sampler ddim"),
        ({"eta": 0.5}, "eta goes with the sampler ddim"),
        ({"snr": 0.2}, "snr: not without a corrector; choose langevin or ald"),
        ({"n_steps_each": 2, "snr": 0.2}, "n_steps_each, snr: not without a corrector"),
        ({"predictor": "none"}, "the predictor 'none' needs a corrector, or nothing would happen"),
        (
            {"predictor": "none", "corrector": "ald", "probability_flow": True},
            "probability_flow: not with the predictor",
        ),
        (
            {"sampler": "ddim", "lift": "noise", "t_start": 0.5, "constraint": "project"},
            "constraint: not with the lift ",
        ),
        ({"sampler": "ddim", "steps": 1, "time_grid": "lambda"}, "time_grid: not with a single step"),
        ({"sampler": "ddim", "steps": 1, "returns": 1}, "returns: not with a single step"),
        ({"method": "ode"}, "method is ode, which can only draw samples; set it to pc"),
    ],
)
def test_settings_that_cannot_be_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        process_of(**values)


@pytest.mark.parametrize("corrector", ["langevin", "ald"])
def test_a_corrector_of_too_few_scales_is_refused(corrector):
    """Its step size comes from the discrete process, of which nothing is left at 20 scales."""
    config = load_config("subvp/cifar10_ddpm_continuous.py")
    config.model.num_scales, config.sampling.corrector = 20, corrector
    with pytest.raises(UserError, match=rf"{corrector} needs config\.model\.num_scales above 20, not 20"):
        create_process(config, sde_lib.create_sde(config))
    config.model.num_scales = 21
    create_process(config, sde_lib.create_sde(config))


@pytest.mark.parametrize("path", LEAVES)
def test_no_published_config_and_no_preset_is_refused(path):
    config = load_leaf(path).get_config()
    sde = sde_lib.create_sde(config)
    create_process(config, sde).check_sampling()
    config.sampling.method = "ode"
    processes.check_effects(config.sampling, sde)
    for name in [*processes.PRESETS, *processes.SAMPLERS]:
        config = load_leaf(path).get_config()
        config.sampling.update(preset(name, config)[0] if name in processes.PRESETS else {"sampler": name})
        for steps in (config.sampling.steps, 1):
            config.sampling.steps = steps
            create_process(config, sde)


def test_usual_values_are_those_of_the_published_configs():
    found = {name: set() for name in processes.USUAL}
    for path in LEAVES:
        for name, value in load_leaf(path).get_config().sampling.items():
            found[name].add(value)
    assert found == {name: set(values) for name, values in processes.USUAL.items()}
    assert {name: values[0] for name, values in processes.USUAL.items()} == TREE["sampling"]


def test_what_was_typed_is_refused_where_it_has_no_effect_whatever_its_value():
    config = load_config("ve/cifar10_ddpm.py")
    processes.check_typed(config, {"sampling.snr", "model.nf"})
    config.sampling.update({"sampler": "ddim", "corrector": "none"})
    processes.check_typed(config, {"sampling.steps", "sampling.eta"})
    for name, message in {"predictor": "a predictor itself", "snr": "a corrector"}.items():
        with pytest.raises(UserError, match=f"{name}: not with.*{message}"):
            processes.check_typed(config, {f"sampling.{name}"})


# -------------------------------------------------------------------------------------- every setting has an effect

BASES = {  # settings from which every field is changed by itself
    "published": {},
    "ancestral": {"predictor": "ancestral_sampling"},
    "flow": {"predictor": "reverse_diffusion", "probability_flow": True},
    "no predictor": {"predictor": "none", "corrector": "ald"},
    "langevin": {"corrector": "langevin"},
    "ald": {"corrector": "ald", "n_steps_each": 2},
    "ddim": {"sampler": "ddim"},
    "ddim deterministic": {"sampler": "ddim", "eta": 0.0, "corrector": "langevin"},
    "dpmpp_2m": {"sampler": "dpmpp_2m"},
    "sde_dpmpp_2m": {"sampler": "sde_dpmpp_2m", "time_grid": "lambda"},
    "project": {"sampler": "ddim", "constraint": "project", "t_start": 0.6},
    "noise": {"sampler": "ddim", "lift": "noise", "t_start": 0.6},
    "one step": {"sampler": "ddim", "steps": 1, "t_start": 0.6},
}
OTHERS = {
    "method": ["ode"],
    "predictor": ["reverse_diffusion", "ancestral_sampling", "none"],
    "corrector": ["none", "langevin", "ald"],
    "n_steps_each": [3],
    "snr": [0.3],
    "noise_removal": [False],
    "probability_flow": [True, False],
    "sampler": ["published", "ddim", "dpmpp_2m", "sde_dpmpp_2m"],
    "steps": [37],
    "time_grid": ["uniform", "lambda"],
    "t_start": [0.8],
    "t_end": [0.1],
    "eta": [0.5],
    "constraint": ["replace", "project"],
    "returns": [1],
    "lift": ["mask", "noise", "both"],
}


def outcome(values, inpaints):
    """What settings make of three Gaussian images, by inpainting or sampling; None where they are refused."""
    config = load_config("vp/ddpm/cifar10_continuous.py")
    config.model.num_scales = 40
    config.sampling.update(values)
    sde, source = sde_lib.create_sde(config), keyed(3)
    model = GaussianScore(sde, *gaussian_data())
    try:
        if not inpaints:
            return samples.create_sampler(config, sde)(model, source)
        return create_process(config, sde).inpaint(model, keyed(3, seed=5)(0, "prior"), MASK, source)
    except UserError:
        return None


@pytest.mark.parametrize("inpaints", [True, False], ids=["inpainting", "sampling"])
@pytest.mark.parametrize("base", BASES)
def test_every_setting_changes_the_result_or_is_refused(base, inpaints):
    """All of config.sampling, one field at a time; the usual predictor may stand where the sampler is another."""
    first = outcome(BASES[base], inpaints)
    if first is None:  # for inpainting alone
        assert not inpaints
        assert {"t_start", "constraint", "lift"} & BASES[base].keys()
        return
    assert OTHERS.keys() == TREE["sampling"].keys()
    for name, values in OTHERS.items():
        for value in values:
            current = {**TREE["sampling"], **BASES[base]}
            usual = name == "predictor" and value != "none" and current["sampler"] != "published"
            # one step leads every sampler to the same prediction; t_end may stand there as a preset's
            alike = name in ("sampler", "t_end") and base == "one step"
            if value == current[name] or usual or alike:
                continue
            result = outcome({**BASES[base], name: value}, inpaints)
            assert result is None or not torch.equal(result, first), f"{name}={value} does nothing"


# ------------------------------------------------------------------------------------- what samples cannot start from


def test_samples_start_from_noise_alone():
    """From t = 1 the mean of the data is met; what starts later is refused, since the prior is not its marginal."""
    config = load_config("subvp/cifar10_ddpm_continuous.py")
    own = {"sampler": "ddim", "eta": 0.0, "time_grid": "lambda", "steps": 50}
    config.sampling.update(own)
    sde = sde_lib.create_sde(config)
    mean = torch.full((4,), 0.3)
    model = GaussianScore(sde, mean, 0.04 * torch.eye(4))
    samples = create_process(config, sde).sample(model, keyed(COUNT))
    torch.testing.assert_close(samples.flatten(1).mean(dim=0), mean, rtol=0, atol=0.02)
    for values in ({"constraint": "project"}, {"t_start": 0.3}, {"t_start": 0.3, "lift": "both"}):
        config.sampling.update({**TREE["sampling"], **own, **values})
        process = create_process(config, sde)
        told = ", ".join(f"{name}={value}" for name, value in values.items())
        with pytest.raises(UserError, match=f"cannot be drawn with config.sampling: {told}; give that to recon"):
            process.sample(model, keyed(3))
    late = sampling.sample(model, keyed(COUNT), process)
    assert late.mean() < 0.27  # what it would come to: the prior taken for the marginal at 0.3


@pytest.mark.parametrize("name", SDES)
def test_samples_may_be_taken_back(name):
    """Steps that are taken back and repeated keep the distribution, up to the steps' width (see `FEW`)."""
    sde, (mean, cov) = SDES[name](1000), gaussian_data()
    times = sampling.with_returns(sampling.time_grid(sde, 100, sde.eps, spacing="lambda"), 1)
    scheme = Scheme(ExponentialIntegrator(sde), times)
    result = sampling.sample(GaussianScore(sde, mean, cov), keyed(COUNT), scheme)
    got_mean, got_cov = moments(result)
    torch.testing.assert_close(got_mean, mean, rtol=0, atol=0.04)
    torch.testing.assert_close(got_cov, cov, rtol=0, atol=0.08)


@pytest.mark.parametrize("name", processes.PRESETS)
def test_a_preset_is_complete(name):
    """Whatever a checkpoint's config brings along, it comes to the same process."""
    plain, other = load_config("subvp/cifar10_ddpm_continuous.py"), load_config("subvp/cifar10_ddpm_continuous.py")
    other.sampling.update({"sampler": "dpmpp_2m", "returns": 3, "time_grid": "lambda", "lift": "both", "t_start": 0.8})
    sde, made = sde_lib.SubVPSDE(), []
    for config in (plain, other):
        config.sampling.update(preset(name, config)[0])
        made.append(create_process(config, sde))
    assert torch.equal(made[0].times, made[1].times)
    assert len({(p.evaluations, p.lift, p.constraint, p.predictor.eta, p.predictor.order) for p in made}) == 1
