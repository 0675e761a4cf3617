"""Detectors of one pass or few against Gaussian data N(MEAN, COV), where the network's score is known exactly.

What is expected is computed here in NumPy from the noise ratio g = b/a alone, by each SDE's own a and b.
"""

import io

import numpy as np
import pytest
import tiny
import torch
from helpers import GaussianScore, filled_model, small
from PIL import Image
from scipy import stats
from scipy.integrate import trapezoid

import sde_lib
from basics import noise
from basics.console import UserError
from basics.pixels import to_model_range
from lmd import likelihood, methods
from lmd.methods import complexity, network, nll
from lmd.methods.complexity import lossless_bits
from lmd.trained_model import TrainedModel
from models.ddpm import Stage
from models.score import ScoreModel

SDES = {"vp": sde_lib.VPSDE(), "subvp": sde_lib.SubVPSDE(), "ve": sde_lib.VESDE()}
COEFFICIENTS = {  # g -> a, from a^2 + b^2 = 1, a^2 + b = 1, a = 1
    "vp": lambda g: (1 + g**2) ** -0.5,
    "subvp": lambda g: ((g**2 + 4) ** 0.5 - g) / 2,
    "ve": lambda g: 1.0,
}
RATIO_TABLES = {  # b/a at each of the steps that networks of discrete times know
    "vp discrete": np.sqrt(1 / np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)) - 1),  # DDPM's
    "ve discrete": np.geomspace(0.01, 50, 1000),  # SMLD's
}
KINDS = *SDES, *RATIO_TABLES
SHAPE = 1, 4, 4
D = 16
_rng = np.random.default_rng(0)
MEAN = _rng.normal(size=D) / 3
_root = _rng.normal(size=(D, D)) / 8 + np.diag(np.linspace(0.05, 0.4, D))
COV = _root @ _root.T


class DiscreteNet:
    """The exact noise (DDPM) or score (SMLD) of N(MEAN, cov) at the labels of `kind`; knows nothing in between.

    With `between`, the noise ratio of a label that is not whole lies between those of its neighbours.
    """

    def __init__(self, kind, cov, between=False):
        self.sde, self.ratios, self.between = kind.split()[0], RATIO_TABLES[kind], between
        self.variances, self.axes = torch.linalg.eigh(torch.from_numpy(cov))

    def __call__(self, x, labels):
        assert self.between or (labels - labels.round()).abs().max() < 1e-3
        steps = (labels if self.sde == "vp" else 999 - labels).double().numpy()
        ratios = np.exp(np.interp(steps if self.between else steps.round(), np.arange(1000), np.log(self.ratios)))
        a, b = level(self.sde, torch.from_numpy(ratios)[:, None])
        along = (x.flatten(1) - a * torch.from_numpy(MEAN)) @ self.axes
        score = -(along / (a**2 * self.variances + b**2)) @ self.axes.T
        return (-b * score if self.sde == "vp" else score).float().view_as(x)


def gaussian_model(name, rows=7, cov=COV, between=False):
    if name in SDES:
        score = GaussianScore(SDES[name], *(torch.from_numpy(value).float() for value in (MEAN, cov)))
    else:
        score = ScoreModel(DiscreteNet(name, cov, between), SDES[name.split()[0]], continuous=False)
    return TrainedModel(tiny.config(data__image_size=4), score, tiny.CPU, rows)


def trained(name, ratios):
    """The noise ratios nearest to these that the network of `gaussian_model` knows: themselves if it knows all."""
    if name in SDES:
        return np.asarray(ratios)
    table = RATIO_TABLES[name]
    return table[np.abs(np.log(table) - np.log(ratios)[:, None]).argmin(axis=1)]


def images(count, seed=0):
    """(N, 1, 4, 4) uint8 and their keys."""
    z = np.random.default_rng(seed).normal(size=(count, D))
    x = MEAN + z @ np.linalg.cholesky(COV).T
    pixels = torch.from_numpy(np.clip(np.round((x + 1) * 127.5), 0, 255).astype(np.uint8)).view(-1, *SHAPE)
    return pixels, noise.seed_keys(0, noise.content_keys(pixels))


def flat(pixels):
    return pixels.flatten(1).numpy() / 127.5 - 1


def level(name, g):
    a = COEFFICIENTS[name.split()[0]](g)
    return a, g * a


def normals(method, keys, draws):
    """The noise (L, B, D) of a method."""
    keys = noise.repetition_keys(noise.seed_keys(method.name, keys), range(draws))
    return noise.KeyedNoise(keys, SHAPE)(0, "prior").flatten(1).numpy().reshape(draws, -1, D)


def exact_eps(name, g, x0, z=0.0, cov=COV):
    """The expected noise in a x0 + b z: b (a^2 C + b^2)^-1 (x - a m)."""
    a, b = level(name, g)
    return b * np.linalg.solve(a**2 * cov + b**2 * np.eye(D), (a * x0 + b * z - a * MEAN).T).T


def measured(method, name, count=5, **options):
    """The statistics of a method on few images, which are the same whatever the batch, with images and keys."""
    pixels, keys = images(count)
    statistics = method.statistics(gaussian_model(name, **options), pixels, keys)
    apart = method.statistics(gaussian_model(name, rows=1), pixels[2:4], keys[2:4])
    np.testing.assert_allclose(statistics[2:4], apart, rtol=1e-4, atol=1e-6)
    assert statistics.dtype == np.float64
    return statistics, flat(pixels), keys


# ---------------------------------------------------------------------------------------------------------- levels


@pytest.mark.parametrize("name", SDES)
def test_levels(name):
    ratios = network.even_ratios(1.0, 0.01, 10)
    np.testing.assert_allclose(np.diff(np.log(ratios)), -np.log(100) / 9)
    levels = network.levels_at(gaussian_model(name), ratios)
    expected = np.array([level(name, g) for g in ratios]).T
    np.testing.assert_allclose(np.stack([levels.alpha, levels.std]), expected, rtol=2e-3)  # VE starts a little above
    with pytest.raises(UserError, match=r"trained at continuous times, has no level of the noise ratio 1e-08"):
        network.levels_at(gaussian_model(name), [1.0, 1e-8])


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_levels_of_a_discrete_process(name):
    """Each is a step that the network was trained at; eps is then what the network of DDPM says."""
    seen = []

    def net(x, labels):
        seen.append(labels)
        return torch.ones_like(x)

    score, tree = ScoreModel(net, SDES[name], continuous=False), tiny.config()
    model = TrainedModel(tree, score, tiny.CPU, 4)
    ratios = network.even_ratios(10.0, 0.011, 40)
    levels = network.levels_at(model, ratios)
    np.testing.assert_allclose(levels.std / levels.alpha, ratios, rtol=0.2)
    eps = levels.eps(score, torch.zeros(40, *SHAPE))[:, 0, 0, 0]
    if name == "vp":
        torch.testing.assert_close(eps, torch.ones(40))
        step = seen[0].round().long()
        assert (seen[0] - step).abs().max() < 1e-3
        torch.testing.assert_close(levels.alpha**2, score.sde.alphas_bar[step])
    else:
        torch.testing.assert_close(-eps, levels.std)
        torch.testing.assert_close(levels.std, score.sde.sigmas.flip(0)[seen[0]])
    few = TrainedModel(tree, ScoreModel(net, score.sde.with_steps(3), continuous=False), tiny.CPU, 4)
    with pytest.raises(UserError, match=r"trained at 3 discrete levels, has no level of the noise ratio 0\.05"):
        network.levels_at(few, [0.05])


def test_chunks_shrink_where_memory_ends():
    model, seen = gaussian_model("vp", rows=6), []

    def work(rows, most=2):
        if len(rows) > most:
            raise MemoryError
        seen.append(len(rows))
        return rows * 2

    assert network.in_chunks(model, 7, work).tolist() == list(range(0, 14, 2))
    assert seen == [1] * 7
    assert len(network.in_chunks(model, 9, lambda rows: seen.append(len(rows)) or rows, fold=2)) == 9
    assert seen[-3:] == [3, 3, 3]
    with pytest.raises(UserError, match="too little memory for one image"):
        network.in_chunks(model, 2, lambda rows: work(rows, most=0))


# ---------------------------------------------------------------------------------------------------------- methods


ONE_PASS = "cfs", "denoising_loss", "gepc", "msma", "nll", "scoped"


@pytest.mark.parametrize(
    "path",
    [
        "vp/cifar10_ncsnpp_continuous.py",
        "ve/cifar10_ncsnpp_deep_continuous.py",
        "vp/cifar10_ddpmpp.py",
        "ve/cifar10_ncsnpp.py",
    ],
)
def test_every_kind_of_network(path):
    """Colour, other blocks, images in [0, 1], discrete steps: finite, and the same in every batch."""
    config = small(path)
    model = TrainedModel(config, filled_model(config), tiny.CPU, 6)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8))
    keys = noise.content_keys(pixels)
    for name in ONE_PASS if config.training.continuous else {*ONE_PASS, "diffpath", "ddpm_ood"} - {"nll"}:
        method = methods.create(name, **({"steps": 1} if name == "nll" else {}))
        statistics = method.statistics(model, pixels, keys)
        assert np.isfinite(statistics).all(), name
        np.testing.assert_allclose(method.statistics(model, pixels[1:2], keys[1:2])[0], statistics[1], rtol=2e-3)


@pytest.mark.parametrize("name", KINDS)
def test_msma(name):
    statistics, x0, _ = measured(methods.create("msma"), name)
    expected = [np.linalg.norm(exact_eps(name, g, x0), axis=1) for g in trained(name, np.geomspace(1, 0.01, 10))]
    np.testing.assert_allclose(statistics, np.transpose(expected), rtol=3e-3)


def test_few_images_are_refused():
    method = methods.create("msma")
    pixels, keys = images(49)
    with pytest.raises(UserError, match="a Gaussian mixture of 10 numbers an image needs at least 50 in-domain images"):
        method.fit(gaussian_model("vp"), pixels, keys)
    with pytest.raises(ValueError, match=r"keeps nothing called other\.means"):
        method.restore({"other.means": np.zeros(3)})


@pytest.mark.parametrize("name", KINDS)
def test_denoising_loss(name):
    method = methods.create("denoising_loss", levels=7)
    statistics, x0, keys = measured(method, name)
    z = normals(method, keys, 14).reshape(7, 2, -1, D)
    ratios = np.geomspace(np.exp(-3), np.exp(3), 7)
    expected = [
        np.mean([np.square(exact_eps(name, g, x0, z) - z).mean(axis=1) for z in two], axis=0)
        for g, two in zip(trained(name, ratios), z, strict=True)
    ]
    np.testing.assert_allclose(statistics, np.transpose(expected), rtol=2e-3, atol=1e-5)

    method.fit_statistics(np.random.default_rng(0).lognormal(size=(40, 7)))
    constant = method.score_statistics(np.full((2, 7), 3.0))
    times = SDES["vp"].time_at(-torch.from_numpy(ratios).log()).numpy()
    early = np.searchsorted(times, 0.5)  # the integral over t up to half a step behind the last early level
    expected = (np.mean(times[early - 1 : early + 1]) - times[0]) / (times[-1] - times[0])
    assert 0 < early < 7
    np.testing.assert_allclose(constant[:, 1], expected)
    later, sooner = np.ones((2, 7)), np.ones((2, 7))
    later[:, early:] *= 2
    sooner[:, :early] *= 2
    assert method.score_statistics(later)[0, 1] < expected < method.score_statistics(sooner)[0, 1]


@pytest.mark.parametrize("name", KINDS)
def test_scoped(name):
    """|s|^2 and v' J v with J = -(a^2 C + b^2)^-1; their ratio is -1 on average over the domain."""
    method, ratios = methods.create("scoped"), trained(name, (0.0148, 1.23))
    statistics, x0, keys = measured(method, name)
    draws = noise.KeyedNoise(noise.repetition_keys(noise.seed_keys("scoped", keys), range(2)), SHAPE)
    probes = draws(1, "prior").sign().flatten(1).numpy().reshape(2, 5, D)
    z = normals(method, keys, 2)
    for i, g in enumerate(ratios):
        a, b = level(name, g)
        norms = np.square(exact_eps(name, g, x0, z[i]) / b).sum(axis=1)
        curvature = -np.einsum("bi,ij,bj->b", probes[i], np.linalg.inv(a**2 * COV + b**2 * np.eye(D)), probes[i])
        np.testing.assert_allclose(statistics[:, 2 * i : 2 * i + 2], np.stack([norms, curvature], axis=1), rtol=5e-3)
    many = method.statistics(gaussian_model(name, rows=500), *images(400, seed=1))
    np.testing.assert_allclose(many[:, 2].sum() / many[:, 3].sum(), -1, atol=0.1)  # images are rounded to 8 bits
    method.fit_statistics(many)
    single = [
        density.score(values)
        for density, values in zip(method.densities.values(), method.features(statistics).values(), strict=True)
    ]
    np.testing.assert_array_equal(method.score_statistics(statistics)[:, 0], np.maximum(*single))


FLIPS = (2,), (1,), (1, 2)  # of (B, 4, 4)


@pytest.mark.parametrize("name", KINDS)
def test_gepc(name):
    method = methods.create("gepc")
    statistics, x0, keys = measured(method, name)
    maps = []
    for g, z in zip(trained(name, (0.1, 0.5)), normals(method, keys, 2), strict=True):
        turn = lambda rows, axes: np.flip(rows.reshape(-1, 4, 4), axes).reshape(-1, D)
        straight = exact_eps(name, g, x0, z)
        squares = [
            np.square(turn(exact_eps(name, g, turn(x0, axes), turn(z, axes)), axes) - straight) for axes in FLIPS
        ]
        maps.append(np.mean(squares, axis=0) / np.square(straight).mean(axis=1, keepdims=True))
    largest = np.sort(maps, axis=2)[..., -5:]  # 30 % of 16 pixels
    np.testing.assert_allclose(statistics, largest.mean(axis=2).T, rtol=1e-3)
    pixels, keys = images(5)
    distances = method.examine(gaussian_model(name), pixels, keys).distances
    assert distances.dtype == torch.float32
    np.testing.assert_allclose(distances.flatten(1), np.mean(maps, axis=0), rtol=2e-3, atol=1e-4)


def test_gepc_of_symmetric_data():
    """A network that commutes with all symmetries is consistent everywhere."""
    model = gaussian_model("vp", cov=np.eye(D))
    model.score.mean = torch.full((D,), 0.3)
    assert methods.create("gepc").statistics(model, *images(3)).max() < 1e-9


@pytest.mark.parametrize("name", SDES)
def test_nll(name):
    """Independent pixels, so that a probe gives the exact divergence; the marginal at the first level is the answer."""
    method, variance = methods.create("nll"), np.linspace(0.1, 0.4, D) ** 2
    pixels, keys = images(6)
    model = gaussian_model(name, cov=np.diag(variance))
    statistics = method.statistics(model, pixels, keys)
    np.testing.assert_allclose(statistics[2:4], method.statistics(model, pixels[2:4], keys[2:4]), rtol=1e-4)

    z = noise.KeyedNoise(noise.seed_keys("nll", keys), SHAPE)(0, "prior").flatten(1).numpy()
    x = 2 * (pixels.flatten(1).numpy() + stats.norm.cdf(z)) / 256 - 1
    smallest = 0.01 if name == "ve" else 1e-3  # what is smaller than the first level's noise cannot be seen
    density = stats.norm.logpdf(x, MEAN, np.sqrt(variance + smallest**2)).sum(axis=1)
    # the marginal at T is not quite the prior: VE keeps the mean, and VP and sub-VP 0.7 % of the image
    np.testing.assert_allclose(statistics[:, 0], 7 - density / np.log(2) / D, atol=0.02)
    np.testing.assert_array_equal(statistics[:, 1] * D, lossless_bits(pixels).min(axis=1))

    bits = statistics[:, 0]
    scores = method.fit_statistics(statistics[:3]).score_statistics(statistics)
    expected = [bits, np.abs(bits - bits[:3].mean()), bits - statistics[:, 1]]
    np.testing.assert_allclose(scores, np.transpose(expected))


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_nll_agrees_with_the_adaptive_solver(name):
    """On correlated pixels with the same images and probes: nats of 16 pixels; of order 3 in the step (VE: 2)."""
    model, (pixels, keys) = gaussian_model(name), images(4)
    x = to_model_range(pixels, centered=True)
    probe = noise.KeyedNoise(keys, SHAPE)(1, "prior").sign()
    expected, _, _ = likelihood.log_likelihood(model.score, model.score.sde, x, probe)
    errors = [float((nll.log_likelihood(model.score, x, probe, n) - expected).abs().max()) for n in (20, 40, 80)]
    np.testing.assert_array_less(errors, (0.3, 0.06, 0.02))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_nll_extrapolates_polynomials(count):
    step, u = 0.3, np.linspace(0, 0.3, 10001)
    for k in range(count):
        values = (-step * np.arange(count)) ** k
        np.testing.assert_allclose(nll._weights(step, count) @ values, trapezoid(np.exp(u) * u**k, u), rtol=1e-7)


@pytest.mark.parametrize("name", RATIO_TABLES)
def test_nll_refuses_discrete_times(name):
    with pytest.raises(UserError, match="trained at 1000 discrete levels; use another checkpoint or another method"):
        methods.create("nll").statistics(gaussian_model(name), *images(2))


class Passing(torch.nn.Module):
    """A network of two stages that hand on the image, and the doubled image."""

    def __init__(self):
        super().__init__()
        self.down, self.up = Stage(lambda h, temb: h), Stage(lambda h, temb: h[:, :1] + h[:, 1:], takes_skip=True)

    def forward(self, x, labels):
        h = self.down(x, None)
        return 0 * self.up(h, None, h)


@pytest.mark.parametrize("name", KINDS)
def test_cfs(name):
    """A channel's mean and standard deviation, and the distance in units of the fitted variance."""
    method, (pixels, keys) = methods.create("cfs"), images(30)
    score = ScoreModel(Passing(), SDES[name.split()[0]], continuous=name in SDES)
    model = TrainedModel(tiny.config(), score, tiny.CPU, 7)
    statistics = method.statistics(model, pixels, keys)
    a, b = level(name, trained(name, [np.exp(-2.5)])[0])
    x = a * flat(pixels) + b * normals(method, keys, 1)[0]
    moments = np.stack([x.mean(axis=1), x.std(axis=1)], axis=1)
    expected = np.concatenate([moments, 2 * moments], axis=1)
    np.testing.assert_allclose(statistics, expected, rtol=1e-4, atol=1e-5)
    scores = method.fit_statistics(statistics).score_statistics(statistics)
    z = (expected - expected.mean(axis=0)) / expected.std(axis=0)
    np.testing.assert_allclose(scores[:, 0], np.square(z).sum(axis=1), rtol=1e-3)
    assert not model.score.net.down._forward_hooks
    with pytest.raises(UserError, match="this network has none"):
        method.statistics(TrainedModel(tiny.config(), ScoreModel(None, score.sde), tiny.CPU, 7), pixels, keys)


@pytest.mark.parametrize("channels", [1, 3])
def test_complexity(channels):
    """The bits are those of files that give the image back; flat images and noise are both far from the pictures."""
    rng, size = np.random.default_rng(0), 16
    fitted = torch.from_numpy(tiny.pictures(60, size=size))[:, None].expand(-1, channels, -1, -1)
    strange = torch.from_numpy(rng.integers(0, 256, (4, channels, size, size), dtype=np.uint8))
    strange[2:] = strange[2:, :, :1, :1]
    method = methods.create("complexity")
    bits = method.statistics(None, strange, None)
    for options, first in zip(complexity.FORMATS.values(), bits[0], strict=True):
        file = io.BytesIO()
        Image.fromarray(strange[0].permute(1, 2, 0).numpy().squeeze()).save(file, **options)
        assert len(file.getvalue()) * 8 == first > 8 * channels * size**2  # noise cannot be compressed
        back = np.asarray(Image.open(io.BytesIO(file.getvalue())))
        np.testing.assert_array_equal(back, strange[0].permute(1, 2, 0).numpy().squeeze())
    assert (bits[2:] < bits[:2].min(axis=0) / 2).all()
    method.fit_statistics(method.statistics(None, fitted, None))
    inside = method.score_statistics(method.statistics(None, fitted, None))
    assert (method.score_statistics(bits).min(axis=0) > inside.max(axis=0)).all()
