"""The methods' contract, held by every method in the table; LMD is the three commands' score."""

import contextlib

import numpy as np
import pytest
import tiny
import torch

import metrics
from basics import noise
from basics.console import UserError
from lmd import methods, scoring
from lmd.methods.lmd import _misfit
from lmd.trained_model import TrainedModel, load_model
from storage.results_folder import ResultsFolder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint.pth")


@pytest.fixture(scope="module")
def model(checkpoint):
    return TrainedModel(tiny.config(), load_model(tiny.config(), checkpoint, tiny.CPU)[0], tiny.CPU, rows=5)


def images(count, seed=0):
    return torch.from_numpy(tiny.pictures(count, seed))[:, None]


def keys_of(pixels):
    return noise.seed_keys(0, noise.content_keys(pixels))


@pytest.mark.parametrize("name", methods.METHODS)
def test_contract(name, model):
    """Fit, score, keep, restore; a row depends on its own image and key alone."""
    method, new = methods.create(name), images(5)
    held_back = images(max(12, method.fewest_images), seed=1)
    method.fit(model, held_back, keys_of(held_back))
    scores = method.score(model, new, keys_of(new))
    assert scores.shape == (5, len(method.parts))
    assert len(method.parts) == 1 or all(map(method.meaning, method.parts))  # the report has a column for each
    assert np.isfinite(scores).all()
    assert method.evaluations(model) >= 0
    turned = torch.tensor([4, 2, 0])
    again = method.score(model, new[turned], keys_of(new)[turned])
    np.testing.assert_allclose(again, scores[turned.numpy()], rtol=1e-3, atol=1e-5)
    other = methods.create(name, **method.settings)
    other.restore({key: np.array(value) for key, value in method.fitted().items()})
    np.testing.assert_array_equal(
        other.score_statistics(method.statistics(model, new, keys_of(new))), method.score(model, new, keys_of(new))
    )
    examined = method.examine(model, new, keys_of(new))
    np.testing.assert_allclose(examined.statistics, method.statistics(model, new, keys_of(new)), rtol=1e-6)


def test_unknown_method():
    with pytest.raises(UserError, match=r"unknown method 'lmx'; choose one of: .*lmd"):
        methods.create("lmx")


def test_evaluations_are_counted(model):
    """A method's number is that of the images which the network sees."""
    seen, pixels = [], images(3)
    handle = model.score.net.net.register_forward_hook(lambda net, arguments, output: seen.append(len(output)))
    for name in methods.METHODS:
        method = methods.create(name)
        method.statistics(model, pixels, keys_of(pixels))
        assert sum(seen) == 3 * method.evaluations(model), name
        assert max(seen, default=0) <= model.rows
        seen.clear()
    handle.remove()


def test_lmd_is_what_recon_and_detect_say(model, checkpoint, tmp_path):
    """The published sampler with the masks and repetitions of a results folder: equal distances, equal scores."""
    source = tiny.write_pictures(tmp_path / "pictures.npz", 7)
    path = tiny.reconstruct(tmp_path / "run", checkpoint, {"pos": source, "neg": source})
    compared = [metrics.create(name, tiny.CPU) for name in ("MSE", "SSIM")]
    tables = scoring.measure(ResultsFolder(path), compared, 2, tiny.CPU)
    method, pixels = methods.create("lmd", sampler="published", reps=2, num_blocks=4), images(7)
    statistics = method.statistics(model, pixels, keys_of(pixels)).reshape(7, 2, 2)
    for number, name in enumerate(("MSE", "SSIM")):
        table = tables[name]["pos"]
        np.testing.assert_allclose(statistics[:, number].T, table["distances"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(method.score(model, pixels, keys_of(pixels))[:, number], table["score"], rtol=1e-4)


def test_lmd_with_a_langevin_corrector_depends_on_no_other_image(tmp_path):
    """As published, and with recon.py, the corrector's step size is a mean over the batch."""
    config = tiny.config(model__num_scales=24, sampling__corrector="langevin")
    score, _ = load_model(config, tiny.write_checkpoint(tmp_path / "checkpoint.pth", config), tiny.CPU)
    corrected = TrainedModel(config, score, tiny.CPU, rows=5)
    method, pixels = methods.create("lmd", sampler="published", reps=2, num_blocks=4), images(4)
    together, keys = method.statistics(corrected, pixels, keys_of(pixels)), keys_of(pixels)
    np.testing.assert_allclose(method.statistics(corrected, pixels[2:3], keys[2:3]), together[2:3], rtol=1e-3)


@pytest.mark.parametrize("name", ["ddpm_ood", "projection_regret"])
def test_metrics_are_made_once_and_before_anything_is_measured(name, model, monkeypatch):
    """One may have to be downloaded, or be large."""
    create, made = metrics.create, []
    monkeypatch.setattr(metrics, "create", lambda name, device: made.append(name) or create(name, device))
    method, pixels = methods.create(name), images(3)
    method.evaluations(model)
    assert made == ["MSE", "SSIM"]
    for _ in range(2):
        method.statistics(model, pixels, keys_of(pixels))
    assert made == ["MSE", "SSIM"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_compiled_network_evaluates(precision, model, checkpoint, monkeypatch):
    """The evaluations for which compiling may be worth it: those that `Network` hands to what was compiled."""
    pixels, compiled, stances = images(3), [], []

    def compile_(net, mode):
        return lambda x, labels: (None if stances else compiled.append(len(x))) or net(x, labels)

    @contextlib.contextmanager
    def set_stance(stance):
        stances.append(stance)
        yield
        stances.pop()

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(torch.compiler, "set_stance", set_stance)
    score, _ = load_model(model.config, checkpoint, tiny.CPU, precision, compiled=True)
    compiling = TrainedModel(model.config, score, tiny.CPU, rows=5)
    for name in methods.METHODS:
        method = methods.create(name)
        method.statistics(compiling, pixels, keys_of(pixels))
        assert sum(compiled) == 3 * method.compiled_evaluations(compiling), name
        compiled.clear()


def test_lmd_shows_where_an_image_differs(model):
    """With two repetitions each pixel was masked once, so its reconstruction and distance are those of that one."""
    method, pixels = methods.create("lmd", sampler="published", reps=2, num_blocks=4), images(3)
    examined = method.examine(model, pixels, keys_of(pixels))
    orig, recons, masks = method._reconstruct(model, pixels, keys_of(pixels))
    expected = torch.where(masks[0] == 0, recons[0], recons[1])  # (B, 1, H, W)
    torch.testing.assert_close(examined.reconstructions, expected.clamp(0, 1))
    torch.testing.assert_close(examined.distances, (expected - orig).abs()[:, 0] / 0.2)
    centre = methods.create("lmd", sampler="published", reps=1, mask_type="center")
    examined = centre.examine(model, pixels, keys_of(pixels))
    assert examined.distances[:, 0].count_nonzero() == 0  # the border was never masked
    assert torch.equal(examined.reconstructions[..., 0, :], orig[..., 0, :])


def test_blocks_fit_any_size():
    """28 pixels have no 8 blocks: they get 7."""
    tree = tiny.config(data__image_size=28)
    method = methods.create("lmd")
    _, masks, _ = method._prepare(TrainedModel(tree, None, tiny.CPU, 1))
    assert masks.shape == (4, 1, 28, 28)
    assert masks[0, 0, :8, :8].tolist() == [[(i < 4) == (j < 4) for j in range(8)] for i in range(8)]
    message = "lmd: num_blocks is 16, which does not divide images of 28 pixels; choose one of: 1, 2, 4, 7, 14, 28"
    with pytest.raises(UserError, match=message):
        methods.create("lmd", num_blocks=16).evaluations(TrainedModel(tree, None, tiny.CPU, 1))


def test_misfit_compares_an_image_with_pairs_of_its_reconstructions(model):
    """Masks alternate, so the first and the third reconstruction filled the same pixels, as the others did."""
    method, pixels = methods.create("lmd", reps=4, num_blocks=4), images(3)
    orig, recons, masks = method._reconstruct(model, pixels, keys_of(pixels))
    assert masks[0].equal(masks[2])
    squares = lambda a, b: (a - b).square().flatten(1).sum(dim=1)
    from_each_other = sum(squares(recons[a], recons[b]) for a, b in ((0, 2), (1, 3)))
    expected = sum(squares(orig, recon) for recon in recons) / from_each_other / 2
    np.testing.assert_allclose(method.examine(model, pixels, keys_of(pixels)).misfit, expected, rtol=1e-4)
    once = methods.create("lmd", reps=2, num_blocks=4).examine(model, pixels, keys_of(pixels))
    assert once.misfit is None, "each pixel was masked once, so nothing is known of the spread"


@pytest.mark.parametrize(("spread", "expected"), [(1, 1.0), (2, 2.5)])
def test_misfit_is_one_of_draws_of_one_distribution(spread, expected):
    """Of draws with twice the deviation the squares are (4 + 1) / 2 times as large; 200,000 know it within .01."""
    draws = torch.randn((5, 10, 1, 20, 1000), generator=torch.Generator().manual_seed(0))
    image, recons = spread * draws[0], draws[1:]
    variance = recons.var(dim=0, correction=0)
    misfit = _misfit(recons.mean(dim=0) - image, variance, torch.full((1, 1, 20, 1000), 4.0))
    np.testing.assert_allclose(misfit, expected, rtol=0.03)
