"""Log-likelihoods by the probability-flow ODE against Gaussian data, where all is known in closed form."""

import math

import pytest
import torch
from helpers import GaussianScore, filled_model, small, wave

import sampling
import sde_lib
from basics import noise
from basics.console import UserError
from lmd import likelihood

SDES = {"vp": sde_lib.VPSDE(), "subvp": sde_lib.SubVPSDE(), "ve": sde_lib.VESDE()}
SHAPE = (1, 2, 3)
MEAN = torch.tensor([0.3, -0.2, 0.1, 0.0, 0.4, -0.5], dtype=torch.float64)
VARIANCE = torch.tensor([0.09, 0.2, 0.04, 0.5, 0.15, 0.3], dtype=torch.float64)


def gaussian_images(mean, cov, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    return (mean + z @ torch.linalg.cholesky(cov).T).view(count, *SHAPE)


def probes(count, seed=0):
    return likelihood.rademacher((count, *SHAPE), noise.generator("probes", seed)).double()


def exact_flow(sde, x, mean, variance):
    """Independent pixels: the end of the trajectory from x (B, D) at EPS, and the integral of the divergence.

    The flow keeps (x - alpha mean) / sqrt(V), V = alpha^2 variance + std^2.
    """
    (alpha, std), (end_alpha, end_std) = (sde.marginal(torch.tensor([t]).double()) for t in (likelihood.EPS, sde.T))
    start_v, end_v = alpha**2 * variance + std**2, end_alpha**2 * variance + end_std**2
    latent = end_alpha * mean + (end_v / start_v).sqrt() * (x - alpha * mean)
    return latent, (end_v / start_v).log().sum() / 2


@pytest.mark.parametrize("name", SDES)
def test_gaussian_data(name):
    """Independent pixels, so a probe of +-1 gives the exact divergence."""
    sde, cov = SDES[name], VARIANCE.diag()
    x = gaussian_images(MEAN, cov, 8)
    found, latent, evaluations = likelihood.log_likelihood(GaussianScore(sde, MEAN, cov), sde, x, probes(8))
    assert ((evaluations > 20) & (evaluations < 1000)).all()
    assert found.dtype == torch.float64

    expected_latent, gained = exact_flow(sde, x.flatten(1), MEAN, VARIANCE)
    prior = torch.distributions.Normal(0.0, sde.prior_std).log_prob(expected_latent).sum(dim=1)
    # the solver's error, of rtol = atol = 1e-5 a step
    torch.testing.assert_close(latent.flatten(1), expected_latent, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found, prior + gained, rtol=0, atol=2e-3)

    density = torch.distributions.MultivariateNormal(MEAN, cov).log_prob(x.flatten(1))
    bits, expected = (likelihood.bits_per_dimension(value, 6, centered=True) for value in (found, density))
    # the marginals at EPS and T differ from the data and the prior, most for VE: std 0.01, and the mean kept
    torch.testing.assert_close(bits, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("name", SDES)
def test_probes_are_without_bias(name):
    """Correlated pixels: the mean over probes is the exact density."""
    root = torch.diag(VARIANCE.sqrt()) + 0.15 * torch.tril(torch.ones(6, 6, dtype=torch.float64), -1)
    sde, cov, count = SDES[name], root @ root.T, 4000
    x = gaussian_images(MEAN, cov, 1)
    model = GaussianScore(sde, MEAN, cov)
    found, _, _ = likelihood.log_likelihood(model, sde, x.expand(count, *SHAPE), probes(count))
    expected = torch.distributions.MultivariateNormal(MEAN, cov).log_prob(x.flatten(1)).item()
    error = 4 * found.std().item() / math.sqrt(count)
    assert 0.01 < error < 0.2  # or the probes would not matter
    assert found.mean() == pytest.approx(expected, abs=error + 0.03)  # 0.03 nats: as above, 0.01 bits a dimension


def test_float32_images_keep_the_precision_of_the_solver():
    sde, cov = SDES["subvp"], VARIANCE.diag()
    x = gaussian_images(MEAN, cov, 8)
    double, _, _ = likelihood.log_likelihood(GaussianScore(sde, MEAN, cov), sde, x, probes(8))
    model = GaussianScore(sde, MEAN.float(), cov.float())
    single, latent, _ = likelihood.log_likelihood(model, sde, x.float(), probes(8).float())
    assert (single.dtype, latent.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(single, double, rtol=0, atol=5e-3)


def test_smaller_tolerances_take_more_evaluations():
    sde, cov = SDES["vp"], VARIANCE.diag()
    arguments = GaussianScore(sde, MEAN, cov), sde, gaussian_images(MEAN, cov, 2), probes(2)
    counts = [likelihood.log_likelihood(*arguments, rtol=tol, atol=tol)[2].tolist() for tol in (1e-3, 1e-5, 1e-7)]
    for of_an_image in zip(*counts, strict=True):
        assert list(of_an_image) == sorted(set(of_an_image))


@pytest.mark.parametrize("name", SDES)
def test_an_image_has_one_likelihood_whatever_its_batch(name):
    """Near and far from the data, which takes other numbers of steps; in float64, so that rounding chooses none."""
    sde, cov = SDES[name], VARIANCE.diag()
    x, probe = gaussian_images(MEAN, cov, 5), probes(5)
    x[3:] *= 10
    model = GaussianScore(sde, MEAN, cov)
    together, latent, evaluations = likelihood.log_likelihood(model, sde, x, probe)
    assert len(set(evaluations.tolist())) > 1
    for rows in ([0], [1, 3], [4, 2, 0]):
        alone, its_latent, counts = likelihood.log_likelihood(model, sde, x[rows], probe[rows])
        torch.testing.assert_close(alone, together[rows], rtol=0, atol=1e-8)
        torch.testing.assert_close(its_latent, latent[rows], rtol=1e-9, atol=1e-9)
        assert torch.equal(counts, evaluations[rows])


def test_divergence_of_a_known_field():
    """v = (sin x_1 + x_2, x_1 x_2, ...) has a Jacobian by hand; the sum over unit probes is its trace."""

    def velocity(x, t):
        a, b = x.flatten(1).unbind(1)
        return torch.stack([a.sin() + b, a * b * t], dim=1).view_as(x)

    x, t = torch.tensor([0.3, 2.0, -1.0, 0.5]).view(2, 1, 1, 2), torch.tensor([0.7])
    a, b = x.flatten(1).unbind(1)
    total = sum(likelihood.hutchinson(velocity, x, t, unit.view(1, 1, 1, 2).expand_as(x))[1] for unit in torch.eye(2))
    torch.testing.assert_close(total, a.cos() + 0.7 * a)
    probe = torch.tensor([1.0, -1.0, 1.0, 1.0]).view_as(x)
    v, estimate = likelihood.hutchinson(velocity, x, t, probe)
    sign = torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(estimate, a.cos() + sign * (1 + 0.7 * b) + 0.7 * a)
    assert torch.equal(v, velocity(x, t))
    assert not v.requires_grad
    assert not estimate.requires_grad


@pytest.mark.parametrize("path", ["subvp/cifar10_ddpm_continuous.py", "ve/cifar10_ncsnpp_continuous.py"])
def test_divergence_of_a_network(path):
    """Against central differences along the probe, through every layer's own backward."""
    model = filled_model(small(path))
    for parameter in model.net.parameters():
        parameter.data = (
            parameter.data.contiguous(memory_format=torch.channels_last) if parameter.ndim == 4 else parameter
        )
    x = wave((2, 3, 16, 16), 0.3).contiguous(memory_format=torch.channels_last)
    t, probe, h = torch.tensor([0.4]), likelihood.rademacher(x.shape, noise.generator("network")), 1e-2
    velocity = lambda x, t: sampling.probability_flow(model, model.sde, x, t)
    _, estimate = likelihood.hutchinson(velocity, x, t, probe)
    with torch.no_grad():
        slope = (velocity(x + h * probe, t) - velocity(x - h * probe, t)) / (2 * h)
    # float32 differences over h, and the third derivative
    torch.testing.assert_close(estimate, (slope * probe).sum(dim=(1, 2, 3)), rtol=1e-2, atol=1e-2)


def test_rademacher():
    probe = likelihood.rademacher((1000, 3, 4, 4), noise.generator("a"))
    assert probe.unique().tolist() == [-1.0, 1.0]
    assert probe.mean().abs() < 4 / math.sqrt(probe.numel())
    assert not torch.equal(probe, likelihood.rademacher((1000, 3, 4, 4), noise.generator("b")))


def test_bits_of_centred_and_uncentred_data_agree():
    """The same images in [0, 1] and, twice as wide, in [-1, 1]; p du counts one level, so bits = 8 - log2 p."""
    sde, mean, variance = SDES["vp"], 0.5 + MEAN / 4, VARIANCE / 25
    plain = gaussian_images(mean, variance.diag(), 4)
    bits = {}
    for centered in (False, True):
        m, v, x = (2 * mean - 1, 4 * variance, 2 * plain - 1) if centered else (mean, variance, plain)
        found, _, _ = likelihood.log_likelihood(GaussianScore(sde, m, v.diag()), sde, x, probes(4))
        bits[centered] = likelihood.bits_per_dimension(found, 6, centered)
    density = torch.distributions.MultivariateNormal(mean, variance.diag()).log_prob(plain.flatten(1))
    expected = 8 - density / (6 * math.log(2))
    for found in bits.values():
        torch.testing.assert_close(found, expected, rtol=0, atol=0.01)


def test_offsets():
    """A uniform density costs 8 bits a dimension: 1 on [0, 1], 1/2 a dimension on [-1, 1]."""
    for centered, log_density in ((False, 0.0), (True, -12 * math.log(2))):
        found = likelihood.bits_per_dimension(torch.tensor([log_density], dtype=torch.float64), 12, centered)
        assert found.item() == pytest.approx(8, abs=1e-12)


def test_a_broken_network_is_told():
    sde = SDES["vp"]
    with pytest.raises(UserError, match=r"cannot be followed beyond t = 1e-05: the network's output is NaN"):
        likelihood.log_likelihood(lambda x, t: x * float("nan"), sde, torch.zeros(1, *SHAPE), probes(1).float())
