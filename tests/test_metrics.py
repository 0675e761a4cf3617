"""Distances against NumPy, scikit-image, the published numbers, and LPIPS's formula written out."""

import dataclasses
import functools
import hashlib
import pickle
import urllib.error
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from skimage.metrics import structural_similarity

import metrics
from basics.console import UserError
from metrics import perceptual, simclr

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")


def random(shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ the interface


@pytest.mark.parametrize("name", ["MSE", "mse", "Ssim"])
def test_names_in_any_case(name):
    assert metrics.create(name, CPU).name == metrics.canonical(name) == name.upper()


@pytest.mark.parametrize("name", ["", "PSNR", "LPIPS2"])
def test_unknown_metric_lists_the_choices(name):
    with pytest.raises(UserError, match=f"unknown metric '{name}'; choose one of: MSE, SSIM, LPIPS"):
        metrics.create(name, CPU)


@pytest.mark.parametrize("name", ["MSE", "SSIM"])
def test_interface(name):
    metric = metrics.create(name, CPU)
    orig, recon = random((5, 3, 16, 12), 0), random((5, 3, 16, 12), 1)
    distance = metric(orig, recon)
    assert distance.shape == (5,)
    assert distance.dtype == torch.float32
    assert metric(orig, orig).abs().max() < 1e-6
    assert (distance > metric(orig, orig + 0.2 * (recon - orig))).all()  # larger = further
    assert metric.similarity == (name == "SSIM")
    alone = torch.cat([metric(orig[i : i + 1], recon[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(distance, alone, rtol=1e-6, atol=1e-7)  # rows stay apart, whatever the batch


@pytest.mark.parametrize("side", ["pos", "neg"])
@pytest.mark.parametrize("name", ["MSE", "SSIM"])
def test_published_numbers(name, side):
    """1e-5: the published SSIM sums float32 windows in another order."""
    expected = np.load(GOLDEN / "results_small_scores.npz")[f"{name.lower()}_{side}"]  # (3, N)
    batches = [torch.load(GOLDEN / f"results_small/{side}/batch_{i}.pth", weights_only=True) for i in range(3)]
    metric = metrics.create(name, CPU)
    ours = [torch.cat([metric(batch["orig"], batch["recon"][rep]) for batch in batches]).numpy() for rep in range(3)]
    np.testing.assert_allclose(1 - np.array(ours) if metric.similarity else ours, expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- MSE, SSIM


def test_mse_against_numpy():
    orig, recon = random((4, 3, 9, 5), 2), normal((4, 3, 9, 5), 3)
    expected = ((orig.numpy().astype(np.float64) - recon.numpy()) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(metrics.create("MSE", CPU)(orig, recon), expected, rtol=1e-6)


def test_mse_is_not_clipped():
    ones = torch.ones(1, 1, 4, 4)
    assert metrics.create("MSE", CPU)(ones, 3 * ones).item() == pytest.approx(4)


def hard_images(channels, height, width):
    """Smooth, noisy, flat, nearly flat, half black and half white, out of range; and reconstructions."""
    shape = (channels, height, width)
    smooth = F.interpolate(random((1, channels, 3, 3), 4), size=(height, width), mode="bilinear")[0]
    step = torch.zeros(shape)
    step[..., width // 2 :] = 1
    flat = torch.full(shape, 0.8)
    images = [smooth, random(shape, 5), flat, torch.ones(shape), step, flat + 1e-3 * normal(shape, 6), smooth]
    moves = [0.1, 0.3, 1e-4, 1e-3, 1e-3, 1e-3, 1.0]
    recons = [image + move * normal(shape, 7) for image, move in zip(images, moves, strict=True)]
    recons[3] = recons[3] * 0 + 0.999
    return torch.stack(images), torch.stack(recons)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 7, 7), (3, 7, 20), (4, 64, 33)])
def test_ssim_against_scikit_image(shape):
    """1e-5 of skimage in float64; measured 1e-6, skimage's own float32 is up to 1e-5 off."""
    orig, recon = hard_images(*shape)
    pairs = zip(orig.double().numpy(), recon.double().numpy(), strict=True)
    expected = [structural_similarity(x, y, data_range=1.0, channel_axis=0) for x, y in pairs]
    ours = 1 - metrics.create("SSIM", CPU)(orig, recon).double().numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_maps_of_mse_and_ssim(channels):
    """Their means are the distances, of SSIM over the windows that fit; SSIM's as scikit-image has it."""
    x, y = torch.rand(2, 2, channels, 12, 15, generator=torch.Generator().manual_seed(2)).unbind()
    mse, ssim = (metrics.create(name, torch.device("cpu")) for name in ("MSE", "SSIM"))
    torch.testing.assert_close(mse.map(x, y).mean(dim=(1, 2)), mse(x, y))
    found, inside = ssim.map(x, y), (slice(None), slice(3, -3), slice(3, -3))
    assert found.shape == (2, 12, 15)
    torch.testing.assert_close(found[inside].mean(dim=(1, 2)), ssim(x, y))
    for row in range(2):
        pair = x[row].double().numpy(), y[row].double().numpy()
        expected = 1 - structural_similarity(*pair, channel_axis=0, data_range=1.0, full=True)[1].mean(axis=0)
        np.testing.assert_allclose(found[inside][row], expected[3:-3, 3:-3], atol=1e-5)
    assert torch.equal(found[:, 0, 5], found[:, 3, 5])  # of the nearest window


def test_a_metric_of_whole_images_has_no_map():
    with pytest.raises(UserError, match="SIMCLR compares images as a whole and has no map"):
        simclr.SimCLR.map(object.__new__(simclr.SimCLR), None, None)


def test_ssim_needs_seven_pixels():
    with pytest.raises(UserError, match="at least 7x7 pixels, these have 6x9; use MSE"):
        metrics.create("SSIM", CPU)(torch.zeros(1, 3, 6, 9), torch.zeros(1, 3, 6, 9))


# -------------------------------------------------------------------------------------------------------- LPIPS

TRUNKS = {  # class and torchvision's network
    "LPIPS": (perceptual.LPIPS, torchvision.models.alexnet),
    "LPIPS_VGG": (perceptual.LPIPSVGG, torchvision.models.vgg16),
    "LPIPS_SQUEEZE": (perceptual.LPIPSSqueeze, torchvision.models.squeezenet1_1),
}
ALEXNET = perceptual.LPIPS.trunk
CONVOLUTIONS = (0, 3, 6, 8, 10)  # AlexNet's, by their places


@functools.cache
def random_trunk(name="LPIPS"):
    """A state dict with torchvision's names and shapes of a classifier's convolutions, random weights."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in TRUNKS[name][1]().state_dict().items() if "features" in key}
    scales = {key: (2 / shape[1:].numel()) ** 0.5 if len(shape) > 1 else 0.1 for key, shape in shapes.items()}
    return {key: scales[key] * normal(shape, number) for number, (key, shape) in enumerate(shapes.items())}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The empty folder of downloaded weights of an own TORCH_HOME, without network."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def backbone(hub):
    """The place of AlexNet's weights, which are not there."""
    return hub / "alexnet-owt-7be5be79.pth"


def lpips_with_random_trunk(name, hub):
    path = hub / TRUNKS[name][0].trunk.file
    torch.save(random_trunk(name), path)
    metric = metrics.create(name, CPU)
    path.unlink()  # VGG-16's is large
    return metric


@pytest.fixture
def lpips_metric(hub):
    return lpips_with_random_trunk("LPIPS", hub)


def lpips_by_hand(orig, recon):
    """LPIPS (arXiv 1801.03924, equation 1) with the random AlexNet and the heads of the `lpips` package, float64."""
    import lpips

    weights = {name: value.double() for name, value in random_trunk().items()}
    heads = torch.load(Path(lpips.__file__).parent / "weights/v0.1/alex.pth", map_location="cpu", weights_only=True)
    shift = torch.tensor([-0.030, -0.088, -0.188]).double().reshape(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).double().reshape(3, 1, 1)
    strides, padding, pooled = (4, 1, 1, 1, 1), (2, 2, 1, 1, 1), (False, True, True, False, False)
    total = 0
    features = [(2 * images.double() - 1 - shift) / scale for images in (orig, recon)]
    for k, layer in enumerate(CONVOLUTIONS):
        for i in range(2):
            x = F.max_pool2d(features[i], 3, 2) if pooled[k] else features[i]
            weight, bias = weights[f"features.{layer}.weight"], weights[f"features.{layer}.bias"]
            features[i] = F.conv2d(x, weight, bias, strides[k], padding[k]).relu()
        x, y = (f / (f.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for f in features)
        head = heads[f"lin{k}.model.1.weight"].double()  # (1, C, 1, 1)
        total = total + ((x - y).square() * head).sum(dim=1).mean(dim=(1, 2))
    return total


@pytest.mark.parametrize("size", [(32, 32), (31, 50), (64, 64)])
def test_lpips_against_its_formula(lpips_metric, size):
    orig = random((3, 3, *size), 8)
    recon = orig + 0.2 * normal((3, 3, *size), 9)
    np.testing.assert_allclose(lpips_metric(orig, recon), lpips_by_hand(orig, recon), rtol=1e-4)  # five layers, float32
    assert lpips_metric(orig, orig).abs().max() < 1e-7
    assert not lpips_metric.similarity


@pytest.mark.parametrize("name", TRUNKS)
def test_lpips_is_the_packages(hub, name):
    """The package's own forward pass with its own heads, on the same trunk; 1e-5: sums in another order."""
    import lpips

    ours = lpips_with_random_trunk(name, hub)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's deprecations
        theirs = lpips.LPIPS(net=ours.trunk.net, pnet_rand=True, verbose=False)
    theirs.net.load_state_dict(dict(zip(theirs.net.state_dict(), random_trunk(name).values(), strict=True)))
    for size in ((32, 32), (33, 47)):
        orig, recon = random((4, 3, *size), 10), random((4, 3, *size), 11)
        with torch.no_grad():
            expected = theirs(orig, recon, normalize=True).flatten()
        assert expected.min() > 0.01
        torch.testing.assert_close(ours(orig, recon), expected, rtol=1e-5, atol=1e-7)
        theirs.spatial = True
        with torch.no_grad():
            expected = theirs(orig, recon, normalize=True).squeeze(1)
        theirs.spatial = False
        torch.testing.assert_close(ours.map(orig, recon), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TRUNKS)
def test_lpips_smallest_images(hub, name):
    """Of images a pixel smaller the trunk leaves nothing."""
    metric = lpips_with_random_trunk(name, hub)
    size = metric.smallest
    assert metric.name == name
    assert metric(random((1, 3, size, size), 1), random((1, 3, size, size), 2)).item() > 0
    with pytest.raises(RuntimeError, match="too small"):
        metric.features(random((1, 3, size - 1, size - 1), 3))


def test_lpips_files_are_torchvisions():
    weights = (
        torchvision.models.AlexNet_Weights,
        torchvision.models.VGG16_Weights,
        torchvision.models.SqueezeNet1_1_Weights,
    )
    for (metric, _), published in zip(TRUNKS.values(), weights, strict=True):
        entry = published.IMAGENET1K_V1
        assert metric.trunk.url == entry.url
        assert metric.trunk.megabytes == round(entry.meta["_file_size"] * 2**20 / 1e6)


def test_lpips_takes_grey_images(lpips_metric):
    orig, recon = random((2, 1, 32, 32), 12), random((2, 1, 32, 32), 13)
    rgb = lpips_metric(orig.expand(-1, 3, -1, -1), recon.expand(-1, 3, -1, -1))
    torch.testing.assert_close(lpips_metric(orig, recon), rgb)


@pytest.mark.parametrize("shape", [(1, 3, 30, 32), (1, 3, 32, 30), (1, 4, 32, 32)])
def test_lpips_refuses_other_images(lpips_metric, shape):
    with pytest.raises(UserError, match=r"grey or RGB images of at least 31x31 pixels.*use MSE and SSIM"):
        lpips_metric(torch.zeros(shape), torch.zeros(shape))


def test_lpips_is_silent_and_draws_nothing(backbone, capfd, recwarn):
    torch.save(random_trunk(), backbone)
    before = torch.random.get_rng_state()
    metric = metrics.create("LPIPS", CPU)
    assert torch.equal(before, torch.random.get_rng_state())
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)
    assert not metric.network.training
    assert not any(parameter.requires_grad for parameter in metric.network.parameters())


@pytest.mark.parametrize("name", TRUNKS)
def test_lpips_without_network_says_where_the_file_goes(hub, name):
    trunk = TRUNKS[name][0].trunk
    with pytest.raises(UserError) as error:
        metrics.create(name, CPU)
    for part in (f"{name} needs the {trunk.title} weights", hub / trunk.file, trunk.url, "MSE and SSIM", "no network"):
        assert str(part) in str(error.value)
    assert list(hub.iterdir()) == []


@pytest.fixture
def served(backbone, tmp_path, monkeypatch):
    """A file that the download finds, served from the disk; `backbone` is then looked for under its hash's name."""
    source = tmp_path / "served.pth"
    torch.save(random_trunk(), source)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:8]
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    published = source.rename(tmp_path / f"alexnet-owt-{digest}.pth")
    monkeypatch.setattr(perceptual, "URL", tmp_path.as_uri())
    monkeypatch.setattr(perceptual.LPIPS, "trunk", dataclasses.replace(ALEXNET, file=published.name))
    return published


def test_lpips_download(served, backbone):
    metrics.create("LPIPS", CPU)
    assert (backbone.parent / served.name).read_bytes() == served.read_bytes()


def test_lpips_download_with_wrong_hash(served, backbone):
    served.write_bytes(served.read_bytes()[:-1000])
    with pytest.raises(UserError, match="invalid hash value"):
        metrics.create("LPIPS", CPU)
    assert list(backbone.parent.iterdir()) == []


def test_lpips_damaged_file(backbone):
    torch.save(random_trunk(), backbone)
    backbone.write_bytes(backbone.read_bytes()[:1_000_000])
    with pytest.raises(UserError, match=r"are damaged, .*delete the file"):
        metrics.create("LPIPS", CPU)


@pytest.mark.parametrize("change", ["missing", "shape", "list"])
def test_lpips_weights_of_another_network(backbone, change):
    weights = dict(random_trunk())
    if change == "missing":
        del weights["features.8.bias"]
    elif change == "shape":
        weights["features.0.weight"] = torch.zeros(64, 3, 7, 7)
    torch.save(list(weights.values()) if change == "list" else weights, backbone)
    with pytest.raises(UserError, match="are not those of AlexNet"):
        metrics.create("LPIPS", CPU)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_lpips_never_runs_pickled_code(backbone, tmp_path):
    marker = tmp_path / "ran"
    backbone.write_bytes(pickle.dumps(Payload(marker), protocol=2))
    with pytest.raises(UserError):
        metrics.create("LPIPS", CPU)
    torch.save({"features.0.weight": Payload(marker)}, backbone)
    with pytest.raises(UserError):
        metrics.create("LPIPS", CPU)
    assert not marker.exists()
