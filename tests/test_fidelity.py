"""FID, KID and Inception score: the package's numbers against their definitions, and the network's weights."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg

from basics.console import UserError
from metrics import fidelity

CPU = torch.device("cpu")
package = pytest.importorskip("torch_fidelity")


def features(count, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(6) + 0.4 * torch.ones(6, 6).tril(-1)
    values = torch.randn(count, 6, generator=generator) @ mixing + shift
    return fidelity.Features(values, torch.randn(count, 5, generator=generator))


def frechet(a, b):
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)), by SciPy's matrix root."""
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(axis=0), np.cov(x, rowvar=False)) for x in (a, b))
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)


def kernel_distance(a, b):
    """The unbiased squared MMD with (x.y/D + 1)^3, all pairs one by one."""
    kernel = lambda x, y: (x @ y / len(x) + 1) ** 3
    same = lambda x: np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])
    return same(a) + same(b) - 2 * np.mean([kernel(x, y) for x in a for y in b])


def inception_score(logits):
    """exp of the mean Kullback-Leibler divergence of p(y|x) from p(y)."""
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return np.exp((p * np.log(p / p.mean(axis=0))).sum(axis=1).mean())


def test_scores_are_their_definitions():
    """As many samples as images, so that each of KID's subsets is all of them."""
    samples, reference = features(40), features(40, shift=0.7, seed=1).pool
    found = fidelity.scores(samples, reference)
    a, b = samples.pool.double().numpy(), reference.double().numpy()
    # float32 means and sums of the package
    assert found["fid"] == pytest.approx(frechet(a, b), rel=1e-4)
    assert found["kid"] == pytest.approx(kernel_distance(a, b), rel=1e-4)
    order = np.random.RandomState(2020).permutation(40)  # the package's
    splits = np.array_split(samples.logits.double().numpy()[order], fidelity.SPLITS)
    assert found["IS"] == pytest.approx(np.mean([inception_score(split) for split in splits]), rel=1e-6)


def test_scores_of_sets_of_two_sizes():
    """KID's subsets are as large as the smaller set; draws of one distribution are nearer than those of two."""
    samples = features(300)
    near, far = (fidelity.scores(samples, features(200, shift, seed=1).pool) for shift in (0, 1))
    for name in ("fid", "kid"):
        assert abs(near[name]) < 0.1 * far[name]
    assert near["IS"] == far["IS"]
    assert fidelity.scores(samples, features(200, 1, seed=1).pool) == far


# ------------------------------------------------------------------------------------------------------- weights


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Where the weights are looked for; there is no network."""

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    path = tmp_path / "hub" / "checkpoints" / fidelity.WEIGHTS
    path.parent.mkdir(parents=True)
    return path


def random_weights(monkeypatch):
    """A state dict of the package's network that lets the images through."""
    with monkeypatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(package.feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(package.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        weights = package.FeatureExtractorInceptionV3("random", ["2048"]).state_dict()
        for value in weights.values():
            if value.ndim == 4:
                value.normal_(std=(2 / value[0].numel()) ** 0.5)
        return weights


def test_inception(path, monkeypatch):
    """Random weights: grey images as three channels, in parts, and as the package itself sees them."""
    torch.save(random_weights(monkeypatch), path)
    monkeypatch.setattr(fidelity, "_AT_ONCE", 2)
    images = torch.randint(256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    found = fidelity.Inception(CPU)(images)
    assert (found.pool.shape, found.logits.shape) == ((3, 2048), (3, 1008))
    create = package.FeatureExtractorInceptionV3
    direct = create("direct", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
    pool, logits = direct(images.repeat(1, 3, 1, 1))
    torch.testing.assert_close(found.pool, pool, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-4)
    assert (pool[0] - pool[1]).abs().max() > 1e-3  # or the images would not matter


def test_without_weights_the_message_says_where_the_file_goes(path):
    with pytest.raises(UserError) as error:
        fidelity.Inception(CPU)
    for part in (str(path), fidelity.URL, "no network", "the samples are kept"):
        assert part in str(error.value)
    assert list(path.parent.iterdir()) == []


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickled_code_is_never_run(path, tmp_path):
    marker = tmp_path / "ran"
    torch.save({"Conv2d_1a_3x3.conv.weight": Payload(marker)}, path)
    with pytest.raises(UserError, match=r"the Inception weights .* hold more than tensors"):
        fidelity.Inception(CPU)
    path.write_bytes(pickle.dumps(Payload(marker), protocol=2))
    with pytest.raises(UserError, match="the Inception weights"):
        fidelity.Inception(CPU)
    assert not marker.exists()


@pytest.mark.parametrize("weights", [{"fc.bias": torch.zeros(3)}, [torch.zeros(3)]])
def test_weights_of_another_network(weights, path):
    torch.save(weights, path)
    with pytest.raises(UserError, match="are not Inception's; delete the file and fetch"):
        fidelity.Inception(CPU)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match=r"install it by 'pip install torch-fidelity==0\.4\.0'"):
        fidelity.Inception(CPU)
