"""SimCLRv2 (Chen, Kornblith, Swersky, Norouzi and Hinton, NeurIPS 2020): angle between self-supervised features.

The weights are Google's, converted once to PyTorch; which of the published networks they are of
is read from their shapes.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from basics import files
from basics.console import UserError, choose, shell
from metrics import Metric, simclr_resnet, weights

WEIGHTS = Path(__file__).resolve().parent.parent / "pretrained" / "r50_1x_sk1.pth"
SOURCE = "gs://simclr-checkpoints/simclrv2/pretrained"  # holds a folder per network
SIZE = 224  # pixels, what the networks were trained on
RESIZE = {  # to SIZE x SIZE, without antialiasing
    "nearest": {"mode": "nearest"},
    "bicubic": {"mode": "bicubic", "align_corners": False},
    "none": None,
}
_CHUNK_PIXELS = {"cpu": 1 << 20, "gpu": 1 << 23}  # at a time, for width 1: some 320 bytes each


class SimCLR(Metric):
    """1 - cosine similarity of the features, in [0, 1] (features are not negative)."""

    name = "SIMCLR"
    similarity = True

    def __init__(self, device, resize_type="bicubic", path=None):
        """Loads the weights at `path` (`WEIGHTS` where None); images are resized by `resize_type`, a key of `RESIZE`.

        Raises:
            UserError: there is no such resizing, or the weights are missing, damaged or of another network.
        """
        self.device = device
        self.resize = choose(resize_type, RESIZE, "resize_type")
        path = WEIGHTS if path is None else Path(path)
        self.network = read_network(path).to(device)
        self.options = {"resize_type": resize_type, "weights": files.file_hash(path)}

    @torch.no_grad()
    def prepare(self, images):
        """Images (B, 1 or 3, H, W) to features of unit length (B, F).

        Raises:
            UserError: the images have neither one nor three channels.
        """
        if images.shape[1] not in (1, 3):
            raise UserError(f"SIMCLR needs grey or RGB images, not {images.shape[1]} channels; use MSE and SSIM")
        pixels = images.shape[2] * images.shape[3] if self.resize is None else SIZE**2
        budget = _CHUNK_PIXELS["cpu" if self.device.type == "cpu" else "gpu"] * 64 // self.network.architecture.channels
        return torch.cat([self._features(chunk) for chunk in images.split(max(1, budget // pixels))])

    def _features(self, images):
        images = images.to(self.device).float().expand(-1, 3, -1, -1)
        if self.resize is not None:
            images = F.interpolate(images, size=(SIZE, SIZE), **self.resize)
        return F.normalize(self.network(images))

    def compare(self, orig, recon):
        """Two results of `prepare` to (B,): |x - y|^2 / 2 is 1 - x.y for unit vectors, without cancellation."""
        return (orig - recon).square_().sum(dim=1) / 2


def read_network(path):
    """The network of a file {'resnet': state dict, 'head': state dict}, in eval mode on the CPU.

    Raises:
        UserError: the file is missing, damaged, holds pickled code, or is not of a SimCLRv2 network.
    """
    if not path.is_file():
        raise UserError(
            f"SIMCLR needs the weights of SimCLRv2, and there are none at {path}; copy Google's checkpoint by "
            f"`gsutil cp -r {SOURCE}/{WEIGHTS.stem} .` and convert it by `{_conversion(path)}`, or use what works "
            "offline: the metrics MSE and SSIM"
        )
    remedy = f"convert Google's checkpoint again by `{_conversion(path)}`"
    content = weights.read(path, "the SimCLRv2 weights", remedy)
    tensors = content.get("resnet") if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(f"{path} holds no SimCLRv2 network (an entry 'resnet' of tensors by name); {remedy}")
    network = build({name: tuple(value.shape) for name, value in tensors.items()}, path, remedy)
    if not all(value.isfinite().all() for value in tensors.values()):
        raise UserError(f"the SimCLRv2 weights {path} hold numbers that are not finite; {remedy}")
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)


def _conversion(path):
    return shell("python", "-m", "scripts.convert_simclr", WEIGHTS.stem, path)


def build(shapes, path, remedy):
    """The network with weights of these shapes, `{name: shape}`, on the meta device.

    Raises:
        UserError: no SimCLRv2 network has them; the message lists what differs.
    """
    try:
        architecture = simclr_resnet.infer(shapes)
        with torch.device("meta"):
            network = simclr_resnet.ResNet(architecture)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no SimCLRv2 network ({error!r}); {remedy}") from error
    differ = weights.differences(shapes, {name: value.shape for name, value in network.state_dict().items()})
    if differ:
        raise UserError(f"{path} holds no SimCLRv2 network of the shape it seems to be: {differ}; {remedy}")
    return network
