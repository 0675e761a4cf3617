"""Detectors that follow an image to noise and back, against Gaussian data, where every step is known exactly."""

import dataclasses

import numpy as np
import pytest
import tiny
import torch
from helpers import GaussianScore
from test_methods_onepass import COV, KINDS, SDES, SHAPE, exact_eps, gaussian_model, images, measured, trained

from basics import noise
from basics.console import UserError
from lmd import methods
from lmd.detector import Detector
from lmd.methods.combined import Excess
from lmd.methods.complexity import lossless_bits
from lmd.methods.projection import END
from lmd.trained_model import TrainedModel, open_model
from models.score import ScoreModel

RATIOS = np.exp(np.linspace(-3, 3, 10))


def exact_path(name, x0):
    """eps (S, B, D) along the Euler steps of d(x / a) = eps dg."""
    x, predicted, ratios = x0, [], trained(name, RATIOS)  # x / a
    for i, g in enumerate(ratios):
        predicted.append(exact_eps(name, g, x))
        x = x + (ratios[min(i + 1, len(ratios) - 1)] - g) * predicted[-1]
    return np.stack(predicted)


# -------------------------------------------------------------------------------------------------------- diffpath


@pytest.mark.parametrize("name", KINDS)
def test_path_norms(name):
    """Also the two published forms, which are sums of the same."""
    method = methods.create("diffpath")
    statistics, x0, _ = measured(method, name)
    eps = exact_path(name, x0)
    d = np.diff(eps, axis=0)
    expected = np.concatenate([(v**power).mean(axis=2) for v in (eps, d) for power in (1, 2, 3)])
    np.testing.assert_allclose(statistics, expected.T, rtol=5e-3, atol=2e-4)
    features = {form: methods.create("diffpath", form=form).features(statistics) for form in ("norms", "1d", "6d")}
    norms = np.concatenate([(eps**2).mean(axis=2), (d**2).mean(axis=2)])
    np.testing.assert_allclose(np.exp(features["norms"]["path_norms"]), norms.T, rtol=5e-3)
    root = np.sqrt((d**2).sum(axis=(0, 2)) / d.shape[2])
    np.testing.assert_allclose(features["1d"]["diffpath_1d"][:, 0], root, rtol=5e-3)
    sums = [(v**power).sum(axis=(0, 2)) / v.shape[2] for v in (eps, d) for power in (1, 2, 3)]
    np.testing.assert_allclose(features["6d"]["diffpath_6d"], np.transpose(sums), rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "within"), [("vp", 5e-3), ("ve", 1e-3)])
def test_lmd_of_discrete_times(name, within):
    """It asks such a network between its steps; its distances are those of the same data's continuous model, nearly.

    The levels differ by what `lmd.methods.lmd` says, 2 % of DDPM's, and .4 % of SMLD's.
    """
    method, (pixels, keys) = methods.create("lmd", metrics=["MSE"]), images(200)
    known = method.statistics(gaussian_model(name), pixels, keys).mean(axis=0)
    asked = method.statistics(gaussian_model(f"{name} discrete", between=True), pixels, keys).mean(axis=0)
    assert known.min() > 1e-3  # of squared differences of pixels in [0, 1]
    np.testing.assert_allclose(asked, known, rtol=within)


def test_path_forms():
    with pytest.raises(UserError, match=r"unknown form of diffpath '2d'; choose one of: norms, 1d, 6d"):
        methods.create("diffpath", form="2d")


# ----------------------------------------------------------------------------------------------------------- ufcod


@pytest.mark.parametrize("name", ["vp", "vp discrete", "ve discrete"])
def test_ufcod(name):
    """Of a path's sums; with as few references as count, the soft minimum is over all of them."""
    method = methods.create("ufcod", references=10)
    statistics, x0, _ = measured(method, name)
    eps = exact_path(name, x0)
    sums = [(v**2).mean(axis=2).sum(axis=0) for v in (eps, np.diff(eps, axis=0))]
    np.testing.assert_allclose(statistics, np.transpose(sums), rtol=5e-3)
    fitted = np.random.default_rng(0).normal(size=(10, 2)) * [3, 0.1]
    points = (fitted - fitted.mean(axis=0)) / fitted.std(axis=0)
    apart = np.linalg.norm(points[:, None] - points, axis=2)
    expected = -0.5 * np.log(np.exp(-2 * apart).sum(axis=1))
    np.testing.assert_allclose(method.fit_statistics(fitted).score_statistics(fitted)[:, 0], expected)
    few = {name: value[:9] if name == "ufcod.points" else value for name, value in method.fitted().items()}
    with pytest.raises(ValueError, match="10 points at least, not 9"):
        method.restore(few)


# ----------------------------------------------------------------------------------------------------- projections


def projected(name, x, z, ratio, steps=5):
    """DDIM from a x + b z to the clean image predicted at the noise ratio `END`, images in [0, 1]."""
    ratios = trained(name, np.geomspace(ratio, END, steps))
    x = 2 * x - 1 + ratios[0] * z  # x / a
    for g, following in zip(ratios, [*ratios[1:], 0.0], strict=True):
        x = x + (following - g) * exact_eps(name, g, x)
    return np.clip((x + 1) / 2, 0, 1)


def normals(keys):
    return noise.KeyedNoise(keys, SHAPE)(0, "prior").flatten(1).numpy()


@pytest.mark.parametrize("name", KINDS)
def test_ddpm_ood(name):
    method = methods.create("ddpm_ood", metrics=["MSE"])
    statistics, x0, keys = measured(method, name)
    orig = (x0 + 1) / 2
    draws = [normals(noise.repetition_keys(keys, [i])) for i in range(5)]
    back = [projected(name, orig, z, g) for z, g in zip(draws, np.geomspace(0.25, 4, 5), strict=True)]
    expected = [((orig - x) ** 2).mean(axis=1) for x in back]
    np.testing.assert_allclose(statistics, np.transpose(expected), rtol=3e-3)
    held_back = np.random.default_rng(0).normal(size=(30, 5))
    far = held_back.mean(axis=0) + held_back.std(axis=0) * np.arange(5)
    np.testing.assert_allclose(method.fit_statistics(held_back).score_statistics(far[None]), [[2.0]])


@pytest.mark.parametrize("name", KINDS)
def test_projection_regret(name):
    method = methods.create("projection_regret", metrics=["MSE"])
    statistics, x0, keys = measured(method, name)

    def moved(x, keys):
        again = noise.seed_keys("projected again", keys)
        back = [projected(name, x, normals(noise.repetition_keys(again, [i])), 1.0) for i in range(2)]
        return np.mean([((x - y) ** 2).mean(axis=1) for y in back], axis=0)

    orig = (x0 + 1) / 2
    first = [noise.repetition_keys(keys, [i]) for i in range(2)]
    still = np.mean([moved(projected(name, orig, normals(own), 2.0), own) for own in first], axis=0)
    np.testing.assert_allclose(statistics, np.stack([moved(orig, keys), still], axis=1), rtol=3e-3)
    scores = method.score_statistics(statistics)
    np.testing.assert_allclose(scores[:, 0], statistics[:, 0] - statistics[:, 1])


# ------------------------------------------------------------------------------------------------------ eigenscore


@pytest.mark.parametrize("name", KINDS)
def test_eigenscore(name):
    """The posterior covariance is (C^-1 + 1 / g^2)^-1, whatever the image."""
    method = methods.create("eigenscore", eigenvalues=3, iterations=300, levels=3, draws=1)
    statistics, _, _ = measured(method, name, count=4)
    variances = np.linalg.eigvalsh(COV)[-3:]
    expected = [(variances * g**2 / (variances + g**2)).mean() for g in trained(name, np.geomspace(2, 0.2, 3))]
    np.testing.assert_allclose(statistics, np.tile(expected, (4, 1)), rtol=3e-3)


def test_eigenscore_is_in_float32(tmp_path):
    """Whatever the model's precision, which stays what it is: differences of rounded predictions say little.

    Left is what the rounded weights do, which is as large as their rounding; rounded predictions were 75 % off.
    """
    path, tree = tiny.write_checkpoint(tmp_path / "checkpoint.pth"), tiny.config()
    pixels = torch.from_numpy(tiny.pictures(3))[:, None]
    measure = lambda model, name: methods.create(name).statistics(model, pixels, noise.content_keys(pixels))
    models = [open_model(path, tree, tiny.CPU, precision) for precision in ("fp32", "bf16")]
    exact, rounded = (measure(model, "eigenscore") for model in models)
    np.testing.assert_allclose(rounded, exact, rtol=4e-3)
    assert [model.score.net.precision for model in models] == ["fp32", "bf16"]
    assert not np.allclose(*(measure(model, "msma") for model in models), rtol=1e-6)


# -------------------------------------------------------------------------------------------------------- combined


def test_combined_is_its_parts():
    """What LMD and the path norms say stands there unchanged; the parts after them see both."""
    score = GaussianScore(SDES["subvp"], torch.zeros(64), torch.eye(64) / 9)
    model, pixels = TrainedModel(tiny.config(), score, tiny.CPU, 7), torch.from_numpy(tiny.pictures(120))[:, None]
    keys = noise.seed_keys(0, noise.content_keys(pixels))
    method, parts = methods.create("combined"), [methods.create(name) for name in ("lmd", "diffpath")]
    statistics = method.statistics(model, pixels, keys)
    scores = method.fit_statistics(statistics).score_statistics(statistics)
    expected = [part.fit(model, pixels, keys).score(model, pixels, keys) for part in parts]
    np.testing.assert_allclose(scores[:, :3], np.concatenate(expected, axis=1))
    assert method.parts == ("lmd_mse", "lmd_ssim", "path_norms", "joint", "lmd_excess")
    assert set(method.reasons) >= set(method.parts) - set(parts[0].parts)
    assert method.evaluations(model) == 30
    joint = method.features(statistics)["joint"]
    np.testing.assert_allclose(np.exp(joint[:, :2]), expected[0])
    np.testing.assert_allclose(np.exp(joint[:, -1]), lossless_bits(pixels)[:, 0])
    examined = [each.examine(model, pixels[:3], keys[:3]) for each in (method, parts[0])]
    assert examined[0].reconstructions.equal(examined[1].reconstructions)
    np.testing.assert_allclose(examined[0].statistics, statistics[:3], rtol=1e-5)


def test_auto_is_what_suits_the_model():
    """A network of few discrete times knows nothing near some times of the path."""
    few = gaussian_model("vp discrete")
    few = dataclasses.replace(few, score=ScoreModel(few.score.net, SDES["vp"].with_steps(30), continuous=False))
    models = {**{name: gaussian_model(name) for name in KINDS}, "few": few}
    for count, expected in ((1000, "combined"), (100, "lmd")):
        for name, model in models.items():
            detector = Detector(model)
            detector.choose_method(count)
            assert detector.method.name == ("lmd" if name == "few" else expected)


def test_excess():
    """Of a first number that is twice the second plus noise that depends on neither, the noise is left."""
    rng = np.random.default_rng(0)
    others, left = rng.normal(size=(5000, 3)), rng.normal(size=5000) / 10
    values = np.column_stack([2 * others[:, 1] + left, others])
    scores = Excess(4).fit(values).score(values)
    assert np.corrcoef(scores, left)[0, 1] > 0.97
    assert abs(np.corrcoef(scores, others[:, 1])[0, 1]) < 0.25
