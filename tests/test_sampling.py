"""Solvers, sampling and inpainting against the published numbers and exact Gaussian answers."""

import pytest
import torch
from helpers import GaussianScore, close, filled_model, golden, small, tensor, wave

import sampling
import sde_lib
from basics.console import UserError
from basics.noise import KeyedNoise, image_keys
from lmd.process import create_solvers
from sampling import Scheme

MODELS = {
    "vpsde": "vp/ddpm/cifar10_continuous.py",
    "subvpsde": "subvp/cifar10_ddpm_continuous.py",
    "vesde": "ve/cifar10_ddpm.py",
}


@pytest.fixture(scope="module")
def filled():
    return {name: filled_model(small(path)) for name, path in MODELS.items()}


def golden_steps():
    names = [name[:-2] for name in golden("sampler_steps") if name.endswith("_x")]
    return [name.split("_", 1) for name in names]


@pytest.mark.parametrize(("sde_name", "solver"), golden_steps())
def test_one_update_golden(filled, sde_name, solver):
    numbers, model = golden("sampler_steps"), filled[sde_name]
    prefix = f"{sde_name}_{solver}"
    x = wave((2, 3, 16, 16), float(numbers["x_seed"])) * (5 if sde_name == "vesde" else 1)
    t = tensor(numbers["t"]).reshape(-1)
    noise = tensor(numbers[f"{prefix}_noise"]) if f"{prefix}_noise" in numbers else None
    with torch.no_grad():
        if solver in sampling.PREDICTORS:
            predictor = sampling.PREDICTORS[solver](model.sde)
            value, mean, _ = predictor.step(model, x, t, None, predictor.init(x), lambda: noise)
        else:
            value, mean = sampling.CORRECTORS[solver](model.sde, 0.16).correct(model, x, t, lambda j: noise)
    close(value, numbers[f"{prefix}_x"])
    close(mean, numbers[f"{prefix}_mean"])


class Recorded:
    """The published draws, found by step and purpose; the order in which they were drawn is given."""

    def __init__(self, draws, purposes):
        self.draws, self.purposes = draws, purposes

    def __call__(self, step, purpose):
        if purpose == "prior":
            return self.draws[0]
        return self.draws[1 + step * len(self.purposes) + self.purposes.index(purpose)]


@pytest.mark.parametrize(
    ("name", "path", "purposes"),
    [
        ("inpaint_subvp_em", "subvp/cifar10_ddpm_continuous.py", ["constrain", "predictor", "reconstrain"]),
        (
            "inpaint_ve_rd_langevin",
            "ve/cifar10_ncsnpp_continuous.py",
            ["corrector", "constrain", "predictor", "reconstrain"],
        ),
    ],
)
def test_inpainting_golden(name, path, purposes):
    numbers = golden(name)
    config = small(path)
    config.model.num_scales = int(numbers["N"])
    model = filled_model(config)
    predictor, corrector = create_solvers(config, model.sde)
    times = sampling.time_grid(model.sde, model.sde.N, float(numbers["eps"]))
    image = tensor(numbers["image"])
    data = 2 * image - 1 if config.data.centered else image
    source = Recorded(tensor(numbers["noise"]), purposes)
    scheme = Scheme(predictor, times, corrector)
    result = sampling.inpaint_as_published(model, data, tensor(numbers["mask"]), source, scheme)
    close((result + 1) / 2 if config.data.centered else result, numbers["recon"], rtol=1e-4)


# ------------------------------------------------------------------------------------------ exact Gaussian answers


def gaussian_data():
    """Four correlated pixels with a mean: (D,), (D, D)."""
    mean = torch.tensor([0.5, -0.3, 0.1, 0.2])
    root = torch.tensor([[0.5, 0, 0, 0], [0.3, 0.4, 0, 0], [-0.2, 0.3, 0.4, 0], [0.1, -0.2, 0.2, 0.3]])
    return mean, root @ root.T


def keyed(count, shape=(1, 2, 2), seed=0):
    return KeyedNoise(image_keys(seed, torch.arange(count), [0]), shape)


def moments(x):
    flat = x.flatten(1)
    return flat.mean(dim=0), torch.cov(flat.T)


KNOWN, UNKNOWN = [0, 2], [1, 3]
MASK = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, 1, 2, 2)


def conditional(mean, cov, observed):
    """Mean and covariance of the unknown pixels given the known ones."""
    gain = cov[UNKNOWN][:, KNOWN] @ torch.linalg.inv(cov[KNOWN][:, KNOWN])
    return mean[UNKNOWN] + gain @ (observed - mean[KNOWN]), cov[UNKNOWN][:, UNKNOWN] - gain @ cov[KNOWN][:, UNKNOWN]


SDES = {
    "vp": lambda n: sde_lib.VPSDE(N=n),
    "subvp": lambda n: sde_lib.SubVPSDE(N=n),
    "ve": lambda n: sde_lib.VESDE(sigma_max=20.0, N=n),
}
COUNT = 10_000  # trajectories: the standard error of a mean is 0.005, of a variance about 1.4 %
SAMPLERS = [
    ("vp", "euler_maruyama", "none"),
    ("vp", "reverse_diffusion", "none"),
    ("vp", "ancestral_sampling", "none"),
    ("subvp", "euler_maruyama", "none"),
    ("subvp", "reverse_diffusion", "none"),
    ("subvp", "euler_maruyama", "langevin"),
    ("ve", "reverse_diffusion", "none"),
    ("ve", "ancestral_sampling", "none"),
    ("ve", "reverse_diffusion", "langevin"),
]


@pytest.mark.parametrize(("sde_name", "predictor", "corrector"), SAMPLERS)
def test_sampling_reproduces_a_gaussian(sde_name, predictor, corrector):
    sde = SDES[sde_name](500)
    mean, cov = gaussian_data()
    scheme = Scheme(sampling.PREDICTORS[predictor](sde), corrector=sampling.CORRECTORS[corrector](sde, 0.16, 1, None))
    result = sampling.sample(GaussianScore(sde, mean, cov), keyed(COUNT), scheme)
    got_mean, got_cov = moments(result)
    # 4 standard errors, plus the bias of 500 steps (largest with Langevin, which moves by finite steps)
    torch.testing.assert_close(got_mean, mean, rtol=0, atol=0.03)
    torch.testing.assert_close(got_cov, cov, rtol=0, atol=0.03)


@pytest.mark.parametrize("sde_name", SDES)
def test_probability_flow_reproduces_a_gaussian(sde_name):
    sde = SDES[sde_name](1000)
    mean, cov = gaussian_data()
    model = GaussianScore(sde, mean, cov)
    prior = keyed(COUNT)(0, "prior") * sde.prior_std
    by_ode, evaluations = sampling.sample_ode(model, sde, prior)
    assert evaluations.min() > 10
    alone, _ = sampling.sample_ode(model, sde, prior[7:8])  # whose number of steps depends on float32 rounding
    torch.testing.assert_close(alone, by_ode[7:8], rtol=1e-4, atol=1e-4)
    clean, more = sampling.sample_ode(model, sde, prior, noise_removal=True)
    t = torch.tensor([sde.eps])
    mean_of_step = by_ode - sde.reverse_discretize(model(by_ode, t), by_ode, t)[0]
    torch.testing.assert_close(clean, mean_of_step, rtol=0, atol=0)
    assert torch.equal(more, evaluations + 1)

    scheme = Scheme(sampling.ReverseDiffusion(sde, probability_flow=True))
    by_steps = sampling.integrate(model, prior, scheme, keyed(COUNT))
    for result in (by_ode, by_steps):
        got_mean, got_cov = moments(result)
        torch.testing.assert_close(got_mean, mean, rtol=0, atol=0.03)
        torch.testing.assert_close(got_cov, cov, rtol=0, atol=0.03)


def test_noise_removal_takes_the_noise_of_the_last_time():
    """What is left of VE's smallest noise, 0.01, where all images are the same one."""
    sde, (mean, _) = SDES["ve"](1000), gaussian_data()
    model, prior = GaussianScore(sde, mean, torch.zeros(4, 4)), keyed(8)(0, "prior") * sde.prior_std
    for noise_removal, low, high in ((False, 3e-3, 3e-2), (True, 0, 1e-5)):
        x, _ = sampling.sample_ode(model, sde, prior, noise_removal=noise_removal)
        assert low <= (x.flatten(1) - mean).abs().max() <= high


@pytest.mark.parametrize("sde_name", SDES)
def test_inpainting_independent_pixels_is_exact(sde_name):
    """Where known and unknown pixels are independent, the filled ones follow their own marginal."""
    sde = SDES[sde_name](1000)
    mean, cov = gaussian_data()
    cov = cov * torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 2, 2)
    data = torch.tensor([0.7, -0.5, 9.0, 9.0]).view(1, 1, 2, 2).expand(COUNT, 1, 2, 2)
    scheme = Scheme(sampling.ReverseDiffusion(sde))
    model = GaussianScore(sde, mean, cov)
    result = sampling.inpaint_as_published(model, data, mask, keyed(COUNT), scheme).flatten(1)
    torch.testing.assert_close(result[:, :2], data.flatten(1)[:, :2], rtol=0, atol=1e-3)  # alpha(eps) = 0.99995
    torch.testing.assert_close(result[:, 2:].mean(dim=0), mean[2:], rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(result[:, 2:].T), cov[2:, 2:], rtol=0, atol=0.03)


@pytest.mark.parametrize("name", ["langevin", "ald"])
@pytest.mark.parametrize("sde_name", SDES)
def test_correctors_leave_the_marginal_invariant(sde_name, name):
    """Many corrector steps at one time reach N(alpha mean, alpha^2 cov + std^2 I) from a wrong start."""
    sde = SDES[sde_name](1000)
    mean, cov = gaussian_data()
    t = torch.tensor([0.6 if sde_name == "ve" else 0.3])  # std 0.6 to 1: slow steps for VE at smaller times
    alpha, std = sde.marginal(t)
    corrector = sampling.CORRECTORS[name](sde, 0.16, 400)
    source = keyed(COUNT)
    start = 3 * std * torch.ones(COUNT, 1, 2, 2)
    result, _ = corrector.correct(GaussianScore(sde, mean, cov), start, t, lambda j: source(j, "corrector"))
    got_mean, got_cov = moments(result)
    expected = alpha**2 * cov + std**2 * torch.eye(4)
    scale = expected.diagonal().max()
    # the finite steps inflate variances by about step / (2 variance), 3 % here
    torch.testing.assert_close(got_mean, alpha * mean, rtol=0, atol=float(0.03 * scale.sqrt()))
    torch.testing.assert_close(got_cov, expected, rtol=0, atol=float(0.06 * scale))


def published_inpainting_moments(sde, mean, cov, data, known):
    """Exact mean and covariance of the published loop's x after its last constraint.

    With a Gaussian's score every update is linear, x <- A x + b + noise, so both follow by recursion; the constraint
    replaces the known pixels by independent draws.
    """
    size, eye = len(mean), torch.eye(len(mean), dtype=torch.float64)
    keep = torch.diag((~known).double())
    m, c = data * known, keep * sde.prior_std**2

    def constrain(m, c, t):
        alpha, std = sde.marginal(t)
        return keep @ m + alpha * data * known, keep @ c @ keep + std**2 * (eye - keep)

    for t in sampling.time_grid(sde, sde.N, sde.eps).double().split(1):
        m, c = constrain(m, c, t)
        alpha, std = sde.marginal(t)
        precision = torch.linalg.inv(alpha**2 * cov + std**2 * eye)
        probe = torch.cat([eye, torch.zeros(1, size, dtype=torch.float64)]).view(-1, 1, 1, size)
        score = -(probe.flatten(1) - alpha * mean) @ precision
        f, g = sde.reverse_discretize(score.view_as(probe), probe, t)
        moved = (probe - f).flatten(1)  # the update at each unit vector and at zero
        b = moved[-1]
        a = (moved[:-1] - b).T
        m, c = a @ m + b, a @ c @ a.T + g**2 * eye
    return constrain(m, c, t)


@pytest.mark.parametrize("sde_name", SDES)
def test_inpainting_has_the_exact_moments_of_the_published_loop(sde_name):
    sde = SDES[sde_name](100)
    mean, cov = gaussian_data()
    known = torch.tensor([True, False, True, False])
    data = torch.tensor([0.9, 0.0, 0.4, 0.0])
    result = sampling.inpaint_as_published(
        GaussianScore(sde, mean, cov),
        data.view(1, 1, 2, 2).expand(COUNT, 1, 2, 2),
        known.float().view(1, 1, 2, 2),
        keyed(COUNT),
        Scheme(sampling.ReverseDiffusion(sde), denoise=False),
    )
    expected_mean, expected_cov = published_inpainting_moments(sde, mean.double(), cov.double(), data.double(), known)
    got_mean, got_cov = moments(result.double())
    # 4 standard errors
    torch.testing.assert_close(got_mean, expected_mean, rtol=0, atol=0.02)
    torch.testing.assert_close(got_cov, expected_cov, rtol=0, atol=0.02)


@pytest.mark.parametrize("sde_name", SDES)
def test_inpainting_reaches_the_conditional_gaussian(sde_name):
    """Correlated pixels: with the published Langevin corrector, replacement samples the conditional.

    Replacement alone does not (the published loop's bias, see the moments above: its first mean is off by 0.17).
    """
    sde = SDES[sde_name](1000)
    mean, cov = gaussian_data()
    data = torch.tensor([0.9, 0.0, 0.4, 0.0])
    result = sampling.inpaint_as_published(
        GaussianScore(sde, mean, cov),
        data.view(1, 1, 2, 2).expand(COUNT, 1, 2, 2),
        MASK,
        keyed(COUNT),
        Scheme(sampling.ReverseDiffusion(sde), corrector=sampling.Langevin(sde, snr=0.16)),
    ).flatten(1)[:, UNKNOWN]
    expected_mean, expected_cov = conditional(mean, cov, data[KNOWN])
    # 4 standard errors, plus the bias of finite steps
    torch.testing.assert_close(result.mean(dim=0), expected_mean, rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(result.T), expected_cov, rtol=0, atol=0.02)


# ---------------------------------------------------------------------------------------------- solvers by name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling.predictor": "heun"}, "unknown predictor .*choose one of: euler_maruyama"),
        ({"sampling.corrector": "mcmc"}, "unknown corrector .*choose one of: langevin, ald, none"),
        ({"sampling.predictor": "ancestral_sampling"}, "not defined for sub-VP"),
    ],
)
def test_impossible_solvers_are_refused(change, message):
    config = small("subvp/cifar10_ddpm_continuous.py")
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        create_solvers(config, sde_lib.create_sde(config))


def test_ancestral_sampling_has_no_probability_flow():
    with pytest.raises(UserError, match="no probability flow"):
        sampling.AncestralSampling(sde_lib.VPSDE(), probability_flow=True)


def test_langevin_averages_norms_over_its_group_alone():
    sde = sde_lib.SubVPSDE()
    score, z = keyed(6)(0, "prior"), keyed(6)(0, "corrector")
    t = torch.tensor([0.5])
    grouped = sampling.Langevin(sde, 0.16, group=3).step_size(score, z, t)
    for part in (slice(0, 3), slice(3, 6)):
        alone = sampling.Langevin(sde, 0.16).step_size(score[part], z[part], t)
        torch.testing.assert_close(grouped[part], alone)
    assert grouped[0] != grouped[3]


def test_without_a_corrector_one_constraint_a_step_is_enough():
    """The published second constraint of a step changes nothing that is read, but at the last step."""
    sde = sde_lib.SubVPSDE(N=10)
    model, source = GaussianScore(sde, *gaussian_data()), keyed(3)
    data, mask = keyed(3, seed=1)(0, "prior"), torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 2, 2)
    constrain = sampling.replacement(sde, data, mask)
    predictor = sampling.EulerMaruyama(sde)
    x = data * mask + source(0, "prior") * (1 - mask)
    for i, t in enumerate(sampling.time_grid(sde, 10, sde.eps).split(1)):
        x, mean = constrain(x, t, source(i, "constrain"))
        x, mean, _ = predictor.step(model, x, t, None, None, lambda i=i: source(i, "predictor"))
        x, mean = constrain(x, t, source(i, "reconstrain"))
    assert torch.equal(mean, sampling.inpaint_as_published(model, data, mask, source, Scheme(predictor)))
