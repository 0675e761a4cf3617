"""LPIPS (Zhang, Isola, Efros, Shechtman and Wang, CVPR 2018): distance of AlexNet features.

The `lpips` package brings the network and the linear heads (version 0.1); the AlexNet weights,
trained on ImageNet, are downloaded to torch's hub folder, or put there by hand.
"""

import warnings
from pathlib import Path

import torch

from console import UserError
from metrics import weights
from metrics.features import FeatureDistance

BACKBONE = "alexnet-owt-7be5be79.pth"  # the last part is the start of the file's SHA-256
URL = f"https://download.pytorch.org/models/{BACKBONE}"


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
    """The path of the AlexNet weights, downloaded if they are not there; raises as `weights.hub_file`."""
    return weights.hub_file(
        URL, BACKBONE, what="the AlexNet weights", user="LPIPS", megabytes=233, instead="--metric MSE,SSIM"
    )


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
