"""LPIPS (Zhang, Isola, Efros, Shechtman and Wang, CVPR 2018): distance of AlexNet features.

The `lpips` package brings the network and the linear heads (version 0.1); the AlexNet weights,
trained on ImageNet, are downloaded to torch's hub folder, or put there by hand.
"""

import contextlib
import http.client
import socket
import sys
import warnings
from pathlib import Path

import torch

from console import UserError, warn
from metrics.features import FeatureDistance

BACKBONE = "alexnet-owt-7be5be79.pth"  # the last part is the start of the file's SHA-256
URL = f"https://download.pytorch.org/models/{BACKBONE}"
_TIMEOUT = 30  # seconds without an answer before the download is given up


class LPIPS(FeatureDistance):
    """The learned perceptual distance with AlexNet, version 0.1."""

    name = "LPIPS"
    smallest = 31  # of smaller images the pooling layers leave nothing

    def __init__(self, device):
        self.device = device
        self.network = _network(_backbone()).to(device)
        self.heads = self.network.lins

    def features(self, images):
        """Images (B, 3, H, W) in [-1, 1] to the outputs of AlexNet's five ReLUs."""
        return self.network.net(self.network.scaling_layer(images))


def _backbone():
    """The path of the AlexNet weights, downloaded if they are not there.

    Raises:
        UserError: they cannot be downloaded; nothing is left behind.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE
    if path.is_file():
        return path
    warn(f"downloading the AlexNet weights of LPIPS (233 MB) to {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _socket_timeout(_TIMEOUT):  # the hash is of the file's name; a partial download is removed
            prefix = path.stem.rsplit("-", 1)[-1]
            torch.hub.download_url_to_file(URL, str(path), hash_prefix=prefix, progress=sys.stderr.isatty())
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # no network, no space; a wrong hash
        raise UserError(
            f"LPIPS needs the AlexNet weights, and they could not be downloaded ({error}); fetch {URL} elsewhere and "
            f"put it at {path}, or use what works offline: --metric MSE,SSIM"
        ) from error
    return path


def _read_weights(path):
    """A state dict, weights-only (the hub's own loading is not)."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere inside the reader
        raise UserError(f"the AlexNet weights {path} are damaged; delete the file and fetch {URL} again") from error


def _network(path):
    """The `lpips` network in eval mode with the AlexNet weights at `path` and the packaged heads.

    Raises:
        UserError: the weights are damaged or of another network.
    """
    trunk = _read_weights(path)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # weights drawn here are replaced below
        warnings.simplefilter("ignore")  # torchvision's deprecations
        import lpips

        network = lpips.LPIPS(pretrained=False, net="alex", version="0.1", pnet_rand=True, verbose=False)
    heads = _read_weights(Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth")
    for index, head in enumerate(network.lins):
        head.load_state_dict({"model.1.weight": heads[f"lin{index}.model.1.weight"]})
    try:  # slice1.0.weight here is features.0.weight there
        names = {name: f"features.{name.split('.', 1)[1]}" for name in network.net.state_dict()}
        network.net.load_state_dict({name: trunk[source] for name, source in names.items()})
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"the weights at {path} are not AlexNet's; delete the file and fetch {URL}") from error
    return network.eval().requires_grad_(False)


@contextlib.contextmanager
def _socket_timeout(seconds):
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
