"""SimCLRv2: networks against golden numbers, TensorFlow, torchvision and the paper's table; the metric; bad files."""

import gzip
import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN, fill_, golden, tensor, wave

from basics.console import UserError
from metrics import simclr, simclr_resnet
from metrics.simclr_resnet import Architecture, ResNet

CPU = torch.device("cpu")
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
SMALL = Architecture((1, 2, 1, 1), 8, selective=True, classes=5)


def filled(architecture):
    network = ResNet(architecture).eval().requires_grad_(False)
    fill_(network.state_dict())
    return network


def images(seed, shape=(2, 3, 32, 32)):
    return (wave(shape, float(seed)) + 1) / 2


def save(path, network):
    torch.save({"resnet": network.state_dict(), "head": {}}, path)
    return path


@pytest.fixture
def small_file(tmp_path):
    return save(tmp_path / "small.pth", filled(SMALL))


# -------------------------------------------------------------------------------------------------- the networks


def golden_shapes():
    return json.loads(gzip.decompress((GOLDEN / "simclr_r50_1x_sk1_shapes.json.gz").read_bytes()))


def test_published_names_and_shapes():
    architecture = simclr_resnet.infer(golden_shapes())
    assert architecture == Architecture(BLOCKS[50], 64, selective=True, classes=1000)
    with torch.device("meta"):
        state = ResNet(architecture).state_dict()
    assert [(name, list(value.shape)) for name, value in state.items()] == list(golden_shapes().items())


def test_published_features_and_similarity(tmp_path):
    """3e-5 of features up to 0.09: float32 sums in another order move these by 1e-5, an epsilon of 1.1e-5 by 4e-5.

    3e-6 of similarities near 1, which processors of different makers have moved by 1.3e-6.
    """
    expected = golden("simclr_r50_1x_sk1")
    path = save(tmp_path / "r50_1x_sk1.pth", filled(simclr_resnet.infer(golden_shapes())))
    metric = simclr.SimCLR(CPU, path=path)
    x, y = (metric.prepare(images(expected[seed])) for seed in ("x_seed", "y_seed"))
    torch.testing.assert_close(x, tensor(expected["features"]), rtol=0, atol=3e-5)
    torch.testing.assert_close(1 - metric.compare(x, y), tensor(expected["similarity"]), rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("depth", "width", "selective", "millions"),
    [
        *[(50, 1, 0, 24), (50, 1, 1, 35), (50, 2, 0, 94), (50, 2, 1, 140)],
        *[(101, 1, 0, 43), (101, 1, 1, 65), (101, 2, 0, 170), (101, 2, 1, 257)],
        *[(152, 1, 0, 58), (152, 1, 1, 89), (152, 2, 0, 233), (152, 2, 1, 354), (152, 3, 1, 795)],
    ],
)
def test_any_depth_and_width(depth, width, selective, millions):
    """Millions of parameters as in table 1 of the paper (arXiv 2006.10029); the shapes tell the architecture."""
    architecture = Architecture(BLOCKS[depth], 64 * width, bool(selective), classes=0)
    with torch.device("meta"):
        network = ResNet(architecture)
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.75)
    assert simclr_resnet.infer({name: value.shape for name, value in network.state_dict().items()}) == architecture
    assert architecture.features == 2048 * width


def torchvision_name(name):
    """The name in torchvision's ResNet of a weight of a network without selective kernels."""
    parts = name.split(".")
    if parts[:2] == ["net", "0"]:
        return f"conv1.{parts[-1]}" if parts[2] == "0" else f"bn1.{parts[-1]}"
    block = f"layer{parts[1]}.{parts[3]}"
    if parts[4] == "projection":
        return f"{block}.downsample.{0 if parts[5] == 'shortcut' else 1}.{parts[-1]}"
    place = int(parts[5])
    return f"{block}.{'conv' if place % 2 == 0 else 'bn'}{place // 2 + 1}.{parts[-1]}"


def test_plain_network_is_torchvisions():
    from torchvision.models.resnet import Bottleneck
    from torchvision.models.resnet import ResNet as TorchvisionResNet

    blocks = (2, 1, 1, 1)
    network = filled(Architecture(blocks, 64, selective=False))
    theirs = TorchvisionResNet(Bottleneck, blocks).eval()
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict({torchvision_name(name): value for name, value in network.state_dict().items()})
    for size in (32, 45):
        x = images(0.2, (2, 3, size, size))
        torch.testing.assert_close(network(x), theirs(x), rtol=1e-4, atol=1e-5)  # the same sums in float32


def test_mixing_weights_are_a_softmax():
    """A selective kernel written as in Li et al., section 3.1, with the softmax and both branches spelled out."""
    kernel = simclr_resnet._SelectiveKernel(6, stride=2).eval()
    fill_(kernel.state_dict())
    x = wave((3, 6, 9, 9), 1.0)
    branches = torch.stack(kernel.main_conv(x).chunk(2, dim=1))  # (2, B, C, h, w)
    logits = kernel.mixing_conv(branches.sum(dim=0).mean(dim=(2, 3), keepdim=True))  # (B, 2C, 1, 1)
    weights = torch.stack(logits.chunk(2, dim=1)).softmax(dim=0)
    torch.testing.assert_close(kernel(x), (branches * weights).sum(dim=0), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- the metric


def test_distance_is_one_minus_cosine(small_file):
    metric = simclr.SimCLR(CPU, path=small_file)
    assert metric.name == "SIMCLR"
    assert metric.similarity
    orig, recon = images(0.1, (5, 3, 20, 24)), images(1.7, (5, 3, 20, 24))
    network = filled(SMALL).double()
    resized = [F.interpolate(x, size=224, mode="bicubic").double() for x in (orig, recon)]
    expected = 1 - F.cosine_similarity(*map(network, resized))
    distance = metric(orig, recon)
    assert distance.shape == (5,)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance.double(), expected, rtol=1e-3, atol=1e-9)  # distances near 1e-3 of float32
    assert metric(orig, orig).abs().max() == 0


def test_small_distances_keep_their_digits():
    """1 - cosine in float32 has steps of 6e-8: here the distance is 5e-9."""
    metric = simclr.SimCLR.__new__(simclr.SimCLR)
    x, y = F.normalize(torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1e-4 * 2**0.5]]))[:, None]
    assert metric.compare(x, y).item() == pytest.approx(5e-9, rel=1e-3)


@pytest.mark.parametrize(
    ("resize_type", "options"),
    [("nearest", {"mode": "nearest"}), ("bicubic", {"mode": "bicubic", "align_corners": False}), ("none", None)],
)
def test_resize_types(small_file, resize_type, options):
    x = images(0.3, (2, 3, 17, 30))
    features = simclr.SimCLR(CPU, resize_type=resize_type, path=small_file).prepare(x)
    resized = F.interpolate(x, size=(224, 224), antialias=False, **options) if options else x
    torch.testing.assert_close(features, F.normalize(filled(SMALL)(resized)), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))


def test_resize_types_differ(small_file):
    features = [simclr.SimCLR(CPU, resize_type=name, path=small_file).prepare(images(0.3)) for name in simclr.RESIZE]
    assert all((features[i] - features[i - 1]).abs().max() > 1e-4 for i in range(3))


def test_unknown_resize_type(small_file):
    with pytest.raises(UserError, match="unknown resize_type 'linear'; choose one of: nearest, bicubic, none"):
        simclr.SimCLR(CPU, resize_type="linear", path=small_file)


def test_large_batches_go_through_in_parts(small_file, monkeypatch):
    metric = simclr.SimCLR(CPU, resize_type="none", path=small_file)
    x, sizes = images(0.6, (7, 3, 16, 16)), []
    whole = metric.prepare(x)
    metric.network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setitem(simclr._CHUNK_PIXELS, "cpu", 3 * 16 * 16 * SMALL.channels // 64 + 1)
    torch.testing.assert_close(metric.prepare(x), whole, rtol=1e-5, atol=1e-7)
    assert sizes == [3, 3, 1]


def test_grey_images(small_file):
    metric = simclr.SimCLR(CPU, resize_type="none", path=small_file)
    grey = images(0.5, (2, 1, 16, 16))
    torch.testing.assert_close(metric.prepare(grey), metric.prepare(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(UserError, match="grey or RGB images, not 4 channels; use MSE and SSIM"):
        metric.prepare(torch.zeros(1, 4, 16, 16))


def test_no_gradient_and_nothing_drawn(small_file, recwarn):
    before = torch.random.get_rng_state()
    metric = simclr.SimCLR(CPU, resize_type="none", path=small_file)
    x = images(0.5, (2, 3, 16, 16)).requires_grad_()
    assert not metric.prepare(x).requires_grad
    assert torch.equal(before, torch.random.get_rng_state())
    assert not metric.network.training
    assert not list(recwarn)


# ----------------------------------------------------------------------------------------------------- the file


def test_published_file_format(tmp_path):
    """float16 weights and a head load too; the file's name says nothing."""
    network = filled(SMALL)
    half = {name: value.half() if value.is_floating_point() else value for name, value in network.state_dict().items()}
    path = tmp_path / "r152_3x_sk0.pth"
    torch.save({"resnet": half, "head": {"layers.0.weight": torch.zeros(256, 256)}}, path)
    loaded = simclr.read_network(path)
    assert loaded.architecture == SMALL
    assert next(loaded.parameters()).dtype == torch.float32


def test_missing_file_says_how_to_get_it(monkeypatch, tmp_path):
    missing = tmp_path / "pretrained" / "r50_1x_sk1.pth"
    monkeypatch.setattr(simclr, "WEIGHTS", missing)
    with pytest.raises(UserError) as error:
        simclr.SimCLR(CPU)
    for part in (
        str(missing),
        "gsutil cp -r gs://simclr-checkpoints/simclrv2/pretrained/r50_1x_sk1 .",
        f"python -m scripts.convert_simclr r50_1x_sk1 {missing}",
        "the metrics MSE and SSIM",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_default_place():
    assert Path(__file__).parent.parent / "pretrained" / "r50_1x_sk1.pth" == simclr.WEIGHTS


def test_damaged_file(small_file):
    small_file.write_bytes(small_file.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"small.pth are damaged.*python -m scripts.convert_simclr"):
        simclr.SimCLR(CPU, path=small_file)


NO_NETWORK = "holds no SimCLRv2 network"
STATE = filled(SMALL).state_dict()


def without(prefix):
    return {name: value for name, value in STATE.items() if not name.startswith(prefix)}


BAD_WEIGHTS = [  # of a file, and what is said
    *[({}, NO_NETWORK), ({"a": 1}, NO_NETWORK), ({1: 2}, NO_NETWORK)],
    ({**STATE, "net.0.0.weight": torch.zeros(4)}, NO_NETWORK),
    ({**STATE, "net.0.4.weight": torch.zeros(0, 4, 3, 3)}, NO_NETWORK),
    ({**STATE, "net.3.blocks.0.net.0.weight": torch.zeros(5, 64, 1, 1)}, r"blocks.0.net.0.weight is \(5, 64, 1, 1\)"),
    ({**STATE, "net.5.extra": torch.zeros(3)}, "unknown: net.5.extra"),
    ({**STATE, "fc.bias": torch.zeros(7)}, r"fc.bias is \(7,\), not \(5,\)"),
    ({**STATE, "fc.bias": torch.full((5,), torch.nan)}, "not finite"),
    (without("net.4."), r"missing: net.4.blocks.0.projection.*, .* and \d+ more"),
]
BAD_CONTENT = [([1, 2], NO_NETWORK), ({"model": {}}, NO_NETWORK)]
BAD_CONTENT += [({"resnet": weights, "head": {}}, message) for weights, message in BAD_WEIGHTS]


@pytest.mark.parametrize(("content", "message"), BAD_CONTENT)
def test_bad_content(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message):
        simclr.SimCLR(CPU, path=tmp_path / "x.pth")


def test_file_without_classifier(tmp_path):
    """Weights without the supervised classifier serve as well."""
    torch.save({"resnet": without("fc."), "head": {}}, tmp_path / "x.pth")
    x = images(0.4, (1, 3, 32, 32))
    torch.testing.assert_close(simclr.read_network(tmp_path / "x.pth")(x), filled(SMALL)(x))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_never_runs_pickled_code(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "x.pth"
    path.write_bytes(pickle.dumps(Payload(marker), protocol=2))
    with pytest.raises(UserError):
        simclr.SimCLR(CPU, path=path)
    torch.save({"resnet": {"net.0.0.weight": Payload(marker)}}, path)
    with pytest.raises(UserError, match="are not loaded"):
        simclr.SimCLR(CPU, path=path)
    assert not marker.exists()
