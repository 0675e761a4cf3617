"""Solvers, sampling and inpainting against the published numbers and exact Gaussian answers."""

import dataclasses

import pytest
import torch
from helpers import close, filled_model, golden, small, tensor, wave

import sampling
import sde_lib
from console import UserError
from noise import KeyedNoise, image_keys

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
    predictor, corrector = sampling.create_solvers(config, model.sde)
    image = tensor(numbers["image"])
    data = 2 * image - 1 if config.data.centered else image
    result = sampling.inpaint(
        model,
        model.sde,
        data,
        tensor(numbers["mask"]),
        Recorded(tensor(numbers["noise"]), purposes),
        predictor=predictor,
        corrector=corrector,
        eps=float(numbers["eps"]),
    )
    close((result + 1) / 2 if config.data.centered else result, numbers["recon"], rtol=1e-4)


# ------------------------------------------------------------------------------------------ exact Gaussian answers


@dataclasses.dataclass
class GaussianScore:
    """The exact score of data N(mean, cov) on the pixels of (1, H, W) images under an SDE."""

    sde: sde_lib.SDE
    mean: torch.Tensor  # (D,)
    cov: torch.Tensor  # (D, D)

    def __call__(self, x, t):
        alpha, std = self.sde.marginal(t[:1])
        cov_t = alpha**2 * self.cov + std**2 * torch.eye(len(self.mean))
        flat = x.flatten(1) - alpha * self.mean
        return -torch.linalg.solve(cov_t, flat.T).T.view_as(x)


def gaussian_data():
    """Four correlated pixels with a mean: (D,), (D, D)."""
    mean = torch.tensor([0.5, -0.3, 0.1, 0.2])
    root = torch.tensor([[0.5, 0, 0, 0], [0.3, 0.4, 0, 0], [-0.2, 0.3, 0.4, 0], [0.1, -0.2, 0.2, 0.3]])
    return mean, root @ root.T


def keyed(count, shape=(1, 2, 2), seed=0):
    return KeyedNoise(image_keys(seed, "gaussian", torch.arange(count), [0]), shape)


def moments(x):
    flat = x.flatten(1)
    return flat.mean(dim=0), torch.cov(flat.T)


SDES = {
    "vp": lambda n: sde_lib.VPSDE(N=n),
    "subvp": lambda n: sde_lib.SubVPSDE(N=n),
    "ve": lambda n: sde_lib.VESDE(sigma_max=20.0, N=n),
}
COUNT = 20_000  # trajectories: the standard error of a mean is 0.005, of a variance about 1 %
SAMPLERS = [
    ("vp", "euler_maruyama", "none"),
    ("vp", "reverse_diffusion", "none"),
    ("vp", "ancestral_sampling", "none"),
    ("vp", "none", "ald"),
    ("subvp", "euler_maruyama", "none"),
    ("subvp", "reverse_diffusion", "none"),
    ("subvp", "euler_maruyama", "langevin"),
    ("ve", "reverse_diffusion", "none"),
    ("ve", "ancestral_sampling", "none"),
    ("ve", "reverse_diffusion", "langevin"),
]


@pytest.mark.parametrize(("sde_name", "predictor", "corrector"), SAMPLERS)
def test_sampling_reproduces_a_gaussian(sde_name, predictor, corrector):
    sde = SDES[sde_name](1000)
    mean, cov = gaussian_data()
    corrector = sampling.CORRECTORS[corrector](sde, 0.16, 1 if predictor != "none" else 2, None)
    result = sampling.sample(
        GaussianScore(sde, mean, cov),
        sde,
        keyed(COUNT),
        predictor=sampling.PREDICTORS[predictor](sde),
        corrector=corrector,
    )
    got_mean, got_cov = moments(result)
    # 4 standard errors, plus the bias of 1000 steps (largest with Langevin, which moves by finite steps)
    torch.testing.assert_close(got_mean, mean, rtol=0, atol=0.03)
    torch.testing.assert_close(got_cov, cov, rtol=0, atol=0.03)


@pytest.mark.parametrize("sde_name", SDES)
def test_probability_flow_reproduces_a_gaussian(sde_name):
    sde = SDES[sde_name](1000)
    mean, cov = gaussian_data()
    model = GaussianScore(sde, mean, cov)
    prior = keyed(COUNT)(0, "prior") * sde.prior_std
    by_ode, evaluations = sampling.sample_ode(model, sde, prior)
    assert evaluations > 10
    predictor = sampling.ReverseDiffusion(sde, probability_flow=True)
    by_steps = sampling.integrate(model, prior, sampling.time_grid(sde, 1000, sde.eps), predictor, keyed(COUNT))
    for result in (by_ode, by_steps):
        got_mean, got_cov = moments(result)
        torch.testing.assert_close(got_mean, mean, rtol=0, atol=0.03)
        torch.testing.assert_close(got_cov, cov, rtol=0, atol=0.03)


@pytest.mark.parametrize("sde_name", SDES)
def test_inpainting_independent_pixels_is_exact(sde_name):
    """Where known and unknown pixels are independent, the filled ones follow their own marginal."""
    sde = SDES[sde_name](1000)
    mean, cov = gaussian_data()
    cov = cov * torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 2, 2)
    data = torch.tensor([0.7, -0.5, 9.0, 9.0]).view(1, 1, 2, 2).expand(COUNT, 1, 2, 2)
    result = sampling.inpaint(
        GaussianScore(sde, mean, cov), sde, data, mask, keyed(COUNT), predictor=sampling.ReverseDiffusion(sde)
    ).flatten(1)
    torch.testing.assert_close(result[:, :2], data.flatten(1)[:, :2], rtol=0, atol=1e-3)  # alpha(eps) = 0.99995
    torch.testing.assert_close(result[:, 2:].mean(dim=0), mean[2:], rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(result[:, 2:].T), cov[2:, 2:], rtol=0, atol=0.03)


@pytest.mark.parametrize("sde_name", SDES)
def test_inpainting_reaches_the_conditional_gaussian(sde_name):
    """Correlated pixels: with enough Langevin steps at each time, replacement samples the conditional.

    Replacing the known pixels is exact only in the limit of small noise, where the corrector equilibrates the unknown
    ones given the known; so the corrector does most of the work here.
    """
    sde = SDES[sde_name](200)
    mean, cov = gaussian_data()
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, 1, 2, 2)
    known, unknown = [0, 2], [1, 3]
    observed = torch.tensor([0.9, 0.4])
    data = torch.zeros(4)
    data[known] = observed
    model = GaussianScore(sde, mean, cov)
    corrector = sampling.Langevin(sde, snr=0.3, n_steps=6)
    result = sampling.inpaint(
        model,
        sde,
        data.view(1, 1, 2, 2).expand(COUNT, 1, 2, 2),
        mask,
        keyed(COUNT),
        predictor=sampling.ReverseDiffusion(sde),
        corrector=corrector,
    ).flatten(1)[:, unknown]
    gain = cov[unknown][:, known] @ torch.linalg.inv(cov[known][:, known])
    expected_mean = mean[unknown] + gain @ (observed - mean[known])
    expected_cov = cov[unknown][:, unknown] - gain @ cov[known][:, unknown]
    torch.testing.assert_close(result.mean(dim=0), expected_mean, rtol=0, atol=0.06)
    torch.testing.assert_close(torch.cov(result.T), expected_cov, rtol=0, atol=0.05)
