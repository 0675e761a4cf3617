"""Shift-tolerant LPIPS (Ghildyal and Liu, ECCV 2022, arXiv 2207.13686): a learned distance that needs no download.

It is not LPIPS: AlexNet is trained anew with a first convolution of stride 1 and with blurring
(Zhang, "Making Convolutional Networks Shift-Invariant Again", ICML 2019) wherever the resolution
halves, so its numbers stand apart and are reported under their own name.  All its weights come
inside the package `stlpips-pytorch`, of which nothing but the weight file is used: the package's
own code needs further packages that it does not declare, and some of it is under CC BY-NC-SA 4.0.
"""

import importlib.util
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from basics.console import UserError
from metrics import weights
from metrics.features import FeatureDistance

PACKAGE, VERSION = "stlpips-pytorch", "0.0.2"
INSTALL = f"pip install {PACKAGE}=={VERSION}"
_FILE = Path("weights") / "vST0.0" / "alex_shift_tolerant.pth"
LAYERS = (2, 6, 10, 12, 14)  # of the trunk, whose outputs are compared


class ShiftTolerantLPIPS(FeatureDistance):
    """The distance of LPIPS on features of a network that shifts of the images change little."""

    name = "STLPIPS"
    smallest = 21  # of smaller images the last blur has too little to reflect

    def __init__(self, device):
        network = read_network(find_weights())
        super().__init__(device, network, network.heads)

    def features(self, images):
        """Images (B, 3, H, W) in [-1, 1] to the outputs of `LAYERS`."""
        return self.network(images)


class Network(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to five feature maps (B, C_k, H_k, W_k); `heads` weigh their channels."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.empty(1, 3, 1, 1))
        self.register_buffer("scale", torch.empty(1, 3, 1, 1))
        relu, pool = nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=1)
        self.trunk = nn.Sequential(
            *(nn.Conv2d(3, 64, 11, padding=2), Blur(64), relu),
            *(pool, Blur(64), nn.Conv2d(64, 192, 5, padding=2), relu),
            *(pool, Blur(192), nn.Conv2d(192, 384, 3, padding=1), relu),
            *(nn.Conv2d(384, 256, 3, padding=1), relu),
            *(nn.Conv2d(256, 256, 3, padding=1), relu),
        )
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in (64, 192, 384, 256, 256))

    def forward(self, images):
        x, features = (images - self.shift) / self.scale, []
        for number, layer in enumerate(self.trunk):
            x = layer(x)
            if number in LAYERS:
                features.append(x)
        return features


class Blur(nn.Module):
    """Halves (B, C, H, W) after a 3x3 filter per channel, reflecting two pixels at every edge."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("filt", torch.empty(channels, 1, 3, 3))

    def forward(self, x):
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=len(self.filt))


def find_weights():
    """The path of the weight file inside the installed package, which is not imported.

    Raises:
        UserError: the package is not installed, or lacks the file.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None:
        raise UserError(f"STLPIPS needs the weights in the package {PACKAGE}; install it by '{INSTALL}'")
    path = Path(spec.submodule_search_locations[0]) / _FILE
    if not path.is_file():
        raise UserError(f"the installed {PACKAGE} lacks {path}; install the tested version by '{INSTALL}'")
    return path


def read_network(path):
    """The network with the weights at `path`, in eval mode on the CPU.

    Raises:
        UserError: the file is damaged, holds pickled code, or is of another network.
    """
    remedy = f"install the package again by '{INSTALL} --force-reinstall'"
    tensors = weights.read(path, "the weights of STLPIPS", remedy)
    with torch.device("meta"):
        network = Network()
    try:
        tensors = {_name(name): value for name, value in tensors.items()}
        shapes = {name: value.shape for name, value in tensors.items()}
    except (AttributeError, TypeError) as error:
        raise UserError(f"{path} holds no weights of STLPIPS; {remedy}") from error
    differ = weights.differences(shapes, {name: value.shape for name, value in network.state_dict().items()})
    if differ:
        raise UserError(f"{path} holds the weights of another network ({differ}); {remedy}")
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)


def _name(published):
    """Our name of a published weight: net.slice2.5.bias is trunk.5.bias, lin0.model.1.weight is heads.0.weight."""
    name = re.sub(r"^net\.slice\d\.", "trunk.", published)
    name = re.sub(r"^lin(\d)\.model\.1\.", r"heads.\1.", name)
    return name.removeprefix("scaling_layer.")
