"""Shift-tolerant LPIPS against the package's own numbers and its formula; the package missing or damaged.

golden/stlpips.npz holds what stlpips-pytorch 0.0.2 itself computed, `stlpips.LPIPS(net="alex",
variant="shift_tolerant")(orig, recon, normalize=True)`, on the pairs of `pair` (float32, CPU, torch 2.15).
"""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import golden, tensor, wave

from basics.console import UserError
from metrics import shift_tolerant
from metrics.shift_tolerant import ShiftTolerantLPIPS

CPU = torch.device("cpu")
INSTALLED = shift_tolerant.importlib.util.find_spec("stlpips_pytorch") is not None
needs_package = pytest.mark.skipif(not INSTALLED, reason=f"needs the weights: {shift_tolerant.INSTALL}")
CHANNELS = (3, 64, 192, 384, 256, 256)
CONVOLUTIONS = {0: 11, 5: 5, 9: 3, 11: 3, 13: 3}  # place: kernel size
BLURS = {"1.1": 64, "2.4": 64, "3.8": 192}


def pair(height, width):
    """Four images and recons (4, 3, H, W), ever further from them."""
    shape = (4, 3, height, width)
    orig = (wave(shape, 0.4) + 1) / 2
    move = wave(shape, 2.1) * wave(shape, 0.07).flip(3)
    return orig, orig + torch.tensor([0.01, 0.1, 0.5, 1.5]).reshape(4, 1, 1, 1) * move


def random_weights():
    """A state dict with the published names and shapes, random but for blurs and scaling."""
    generator = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    binomial = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    weights = {
        "scaling_layer.shift": torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1),
        "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1),
    }
    weights |= {f"net.slice{place}.filt": binomial.expand(width, 1, 3, 3).clone() for place, width in BLURS.items()}
    for k, (place, size) in enumerate(CONVOLUTIONS.items()):
        name = f"net.slice{k + 1}.{place}"
        weights[f"{name}.weight"] = normal(CHANNELS[k + 1], CHANNELS[k], size, size) * (2 / CHANNELS[k]) ** 0.5 / size
        weights[f"{name}.bias"] = 0.1 * normal(CHANNELS[k + 1])
        weights[f"lin{k}.model.1.weight"] = normal(1, CHANNELS[k + 1], 1, 1).abs()
    return weights


def by_hand(weights, orig, recon):
    """The distance in float64, with blurs as two passes of (1, 2, 1)/4 and the features one image at a time."""
    total = 0
    features = [
        ((2 * x.double() - 1) - weights["scaling_layer.shift"]) / weights["scaling_layer.scale"] for x in (orig, recon)
    ]
    for k, place in enumerate(CONVOLUTIONS):
        for i, x in enumerate(features):
            if k in (1, 2):
                x = blur(F.max_pool2d(x, 3, 1))
            name = f"net.slice{k + 1}.{place}"
            padding = (2, 2, 1, 1, 1)[k]
            x = F.conv2d(x, weights[f"{name}.weight"].double(), weights[f"{name}.bias"].double(), padding=padding)
            features[i] = (blur(x) if k == 0 else x).clamp(min=0)
        x, y = (f / (f.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for f in features)
        total = total + ((x - y).square() * weights[f"lin{k}.model.1.weight"]).sum(dim=1).mean(dim=(1, 2))
    return total


def blur(x):
    """Every second value of x, reflected by two pixels and filtered along each axis."""
    for dim in (2, 3):
        size = x.shape[dim]
        index = torch.arange(-2, size + 2).abs()
        index = torch.minimum(index, 2 * (size - 1) - index)
        x = x.index_select(dim, index)
        x = (x.narrow(dim, 0, size + 2) + 2 * x.narrow(dim, 1, size + 2) + x.narrow(dim, 2, size + 2)) / 4
        x = x.index_select(dim, torch.arange(0, size + 2, 2))
    return x


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The weight file of a package that has nothing else: importing it fails."""
    folder = tmp_path / "stlpips_pytorch"
    path = folder / "weights" / "vST0.0" / "alex_shift_tolerant.pth"
    path.parent.mkdir(parents=True)
    (folder / "__init__.py").write_text("import something_undeclared\n")
    torch.save(random_weights(), path)
    monkeypatch.syspath_prepend(tmp_path)
    return path


# ------------------------------------------------------------------------------------------------- the distance


@needs_package
@pytest.mark.parametrize("size", [(21, 21), (32, 32), (64, 48)])
def test_the_packages_numbers(size):
    """1e-4 of distances above 1e-6; the smallest lose a digit to the lengths' rounding."""
    expected = golden("stlpips")[f"{size[0]}x{size[1]}"]
    distance = ShiftTolerantLPIPS(CPU)(*pair(*size))
    assert distance.shape == (4,)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, tensor(expected), rtol=1e-4, atol=1e-9)


@needs_package
def test_shifts_weigh_less_than_changes():
    """What the weights are for: an image moved by a pixel is nearer than another image of the same contrast."""
    orig = F.interpolate(torch.rand((4, 3, 6, 6), generator=torch.Generator().manual_seed(0)), size=40, mode="bicubic")
    metric = ShiftTolerantLPIPS(CPU)
    moved = metric(orig[..., :-1, :-1], orig[..., 1:, 1:])
    assert (moved < 0.2 * metric(orig[..., :-1, :-1], orig.roll(1, 0)[..., :-1, :-1])).all()


@pytest.mark.parametrize("size", [(21, 30), (32, 32)])
def test_formula(package, size):
    metric = ShiftTolerantLPIPS(CPU)
    assert metric.name == "STLPIPS"
    assert not metric.similarity
    orig, recon = pair(*size)
    np.testing.assert_allclose(metric(orig, recon), by_hand(random_weights(), orig, recon), rtol=1e-4)
    assert metric(orig, orig).abs().max() == 0


def test_grey_images(package):
    metric = ShiftTolerantLPIPS(CPU)
    orig, recon = (x[:, :1] for x in pair(24, 24))
    rgb = metric(orig.expand(-1, 3, -1, -1), recon.expand(-1, 3, -1, -1))
    torch.testing.assert_close(metric(orig, recon), rgb)


@pytest.mark.parametrize("shape", [(1, 3, 20, 32), (1, 3, 32, 20), (1, 4, 32, 32)])
def test_other_images(package, shape):
    with pytest.raises(UserError, match=r"grey or RGB images of at least 21x21 pixels.*use MSE and SSIM"):
        ShiftTolerantLPIPS(CPU).prepare(torch.zeros(shape))


def test_no_gradient_and_nothing_drawn(package, capfd, recwarn):
    before = torch.random.get_rng_state()
    metric = ShiftTolerantLPIPS(CPU)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not any(x.requires_grad for x in metric.prepare(torch.rand(1, 3, 21, 21, requires_grad=True)))
    assert not metric.network.training
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)


# -------------------------------------------------------------------------------------------------- the package


def test_package_not_installed(monkeypatch):
    monkeypatch.setattr(shift_tolerant.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"install it by 'pip install stlpips-pytorch==0.0.2'"):
        ShiftTolerantLPIPS(CPU)


def test_package_without_the_file(package):
    package.unlink()
    with pytest.raises(UserError, match=r"lacks .*alex_shift_tolerant.pth; install the tested version"):
        ShiftTolerantLPIPS(CPU)


def test_damaged_file(package):
    package.write_bytes(package.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"are damaged.*--force-reinstall"):
        ShiftTolerantLPIPS(CPU)


@pytest.mark.parametrize("change", ["missing", "shape", "extra", "list", "numbers"])
def test_other_content(package, change):
    weights = random_weights()
    if change == "missing":
        del weights["lin4.model.1.weight"]
    elif change == "shape":
        weights["net.slice1.0.weight"] = torch.zeros(64, 3, 7, 7)
    elif change == "extra":
        weights["net.slice6.0.weight"] = torch.zeros(1)
    elif change == "numbers":
        weights = {3: 4}
    torch.save(list(weights.values()) if change == "list" else weights, package)
    with pytest.raises(UserError, match=r"weights of another network|holds no weights of STLPIPS"):
        ShiftTolerantLPIPS(CPU)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_never_runs_pickled_code(package, tmp_path):
    marker = tmp_path / "ran"
    for content in (pickle.dumps(Payload(marker), protocol=2), None):
        if content:
            package.write_bytes(content)
        else:
            torch.save({"lin0.model.1.weight": Payload(marker)}, package)
        with pytest.raises(UserError, match="are not loaded"):
            ShiftTolerantLPIPS(CPU)
    assert not marker.exists()
