"""LPIPS (Zhang, Isola, Efros, Shechtman and Wang, CVPR 2018): distance of the features of an image classifier.

The `lpips` package brings the networks and the linear heads (version 0.1); the weights of the
classifiers, trained on ImageNet, are downloaded to torch's hub folder, or put there by hand.
"""

import dataclasses
import warnings
from pathlib import Path

import torch

from basics.console import UserError
from metrics import weights
from metrics.features import FeatureDistance

URL = "https://download.pytorch.org/models"


@dataclasses.dataclass(frozen=True)
class Trunk:
    """A classifier whose features are compared.

    Attributes:
        net: its name in the `lpips` package.
        title: its name in messages.
        file: its weights, as torchvision publishes them; the last part is the start of the file's SHA-256.
        megabytes: the size of the file.
    """

    net: str
    title: str
    file: str
    megabytes: int

    @property
    def url(self):
        """Where the weights are published."""
        return f"{URL}/{self.file}"


class LPIPS(FeatureDistance):
    """With AlexNet: the authors' default, and that of the published results of LMD."""

    name = "LPIPS"
    smallest = 31  # of smaller images the pooling layers leave nothing
    trunk = Trunk("alex", "AlexNet", "alexnet-owt-7be5be79.pth", 244)

    def __init__(self, device):

        network = _network(self.trunk, _backbone(self.name, self.trunk))
        super().__init__(device, network, network.lins)

    def features(self, images):
        """Images (B, 3, H, W) in [-1, 1] to the outputs of the trunk's layers that the heads weigh."""
        return self.network.net(self.network.scaling_layer(images))


class LPIPSVGG(LPIPS):
    """With VGG-16."""

    name = "LPIPS_VGG"
    smallest = 16
    trunk = Trunk("vgg", "VGG-16", "vgg16-397923af.pth", 553)


class LPIPSSqueeze(LPIPS):
    """With SqueezeNet 1.1."""

    name = "LPIPS_SQUEEZE"
    smallest = 17
    trunk = Trunk("squeeze", "SqueezeNet", "squeezenet1_1-b8a52dc0.pth", 5)


def _backbone(name, trunk):
    """The path of the trunk's weights, downloaded if they are not there; raises as `weights.hub_file`."""
    return weights.hub_file(
        trunk.url,
        trunk.file,
        what=f"the {trunk.title} weights",
        user=name,
        megabytes=trunk.megabytes,
        instead="the metrics MSE and SSIM",
    )


def _network(trunk, path):
    """The `lpips` network in eval mode with the trunk's weights at `path` and the packaged heads.

    Raises:
        UserError: the weights are damaged or of another network.
    """
    remedy = f"delete the file and fetch {trunk.url}"
    tensors = weights.read(path, f"the {trunk.title} weights", remedy)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # weights drawn here are replaced below
        warnings.simplefilter("ignore")  # torchvision's deprecations
        import lpips  # here, as it takes seconds

        network = lpips.LPIPS(pretrained=False, net=trunk.net, version="0.1", pnet_rand=True, verbose=False)
    heads = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{trunk.net}.pth"
    heads = weights.read(heads, f"the heads of LPIPS for {trunk.title}", "install the package lpips again")
    for index, head in enumerate(network.lins):
        head.load_state_dict({"model.1.weight": heads[f"lin{index}.model.1.weight"]})
    try:  # slice1.0.weight here is features.0.weight there
        names = {name: f"features.{name.split('.', 1)[1]}" for name in network.net.state_dict()}
        network.net.load_state_dict({name: tensors[source] for name, source in names.items()})
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"the weights at {path} are not those of {trunk.title}; {remedy}") from error
    return network.eval().requires_grad_(False)
