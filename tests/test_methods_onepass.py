"""Detectors of one pass or few against Gaussian data N(MEAN, COV), where the network's score is known exactly.

What is expected is computed here in NumPy from the noise ratio g = b/a alone, by each SDE's own a and b.
"""

import numpy as np
import pytest
import tiny
import torch
from helpers import GaussianScore

import sde_lib
from basics import noise
from basics.console import UserError
from lmd import methods
from lmd.methods import network
from lmd.methods.base import TrainedModel
from models.score import ScoreModel

SDES = {"vp": sde_lib.VPSDE(), "subvp": sde_lib.SubVPSDE(), "ve": sde_lib.VESDE()}
COEFFICIENTS = {  # g -> a, from a^2 + b^2 = 1, a^2 + b = 1, a = 1
    "vp": lambda g: 1 / np.sqrt(1 + g**2),
    "subvp": lambda g: (np.sqrt(g**2 + 4) - g) / 2,
    "ve": lambda g: 1.0,
}
SHAPE = 1, 4, 4
D = 16
_rng = np.random.default_rng(0)
MEAN = _rng.normal(size=D) / 3
_root = _rng.normal(size=(D, D)) / 8 + np.diag(np.linspace(0.05, 0.4, D))
COV = _root @ _root.T


def gaussian_model(name, rows=7, cov=COV):
    score = GaussianScore(SDES[name], *(torch.from_numpy(value).float() for value in (MEAN, cov)))
    return TrainedModel(tiny.config(data__image_size=4), score, tiny.CPU, rows)


def images(count, seed=0):
    """(N, 1, 4, 4) uint8 and their keys."""
    z = np.random.default_rng(seed).normal(size=(count, D))
    x = MEAN + z @ np.linalg.cholesky(COV).T
    pixels = torch.from_numpy(np.clip(np.round((x + 1) * 127.5), 0, 255).astype(np.uint8)).view(-1, *SHAPE)
    return pixels, noise.seed_keys(0, noise.content_keys(pixels))


def flat(pixels):
    return pixels.flatten(1).numpy() / 127.5 - 1


def level(name, g):
    a = COEFFICIENTS[name](g)
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


@pytest.mark.parametrize("name", SDES)
def test_msma(name):
    statistics, x0, _ = measured(methods.create("msma"), name)
    expected = [np.linalg.norm(exact_eps(name, g, x0), axis=1) for g in np.geomspace(1, 0.01, 10)]
    np.testing.assert_allclose(statistics, np.transpose(expected), rtol=3e-3)


def test_few_images_are_refused():
    method = methods.create("msma")
    pixels, keys = images(49)
    with pytest.raises(UserError, match="a Gaussian mixture of 10 numbers an image needs at least 50 in-domain images"):
        method.fit(gaussian_model("vp"), pixels, keys)
    with pytest.raises(ValueError, match=r"keeps nothing called other\.means"):
        method.restore({"other.means": np.zeros(3)})
