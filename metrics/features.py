"""What the learned perceptual distances share: comparing a network's feature maps (Zhang et al., CVPR 2018)."""

import abc

import torch
import torch.nn.functional as F

from basics.console import UserError
from metrics import Metric

_EPSILON = 1e-10  # keeps the length of an all-zero feature apart from zero


class FeatureDistance(Metric):
    """Squared differences of unit-length features, weighted by heads, averaged over space, summed over layers.

    Attributes:
        smallest: pixels an edge below which the network has nothing left to compare.
        device: where it runs.
        network: the network, channels-last: 1.1 to 2.8 times as fast as NCHW on a CPU, by network.
        heads: one a layer, (B, C_k, H_k, W_k) -> (B, 1, H_k, W_k).
    """

    smallest = None
    pixels_at_once = 1 << 17

    def __init__(self, device, network, heads):
        self.device = device
        self.network = network.to(device, memory_format=torch.channels_last)
        self.heads = heads

    @abc.abstractmethod
    def features(self, images):
        """Images (B, 3, H, W) in [-1, 1] to feature maps (B, C_k, H_k, W_k), one a layer."""

    @torch.no_grad()
    def prepare(self, images):
        """Images (B, 1 or 3, H, W) to feature maps (B, C_k, H_k, W_k), each position of unit length.

        Raises:
            UserError: the images are too small or have neither one nor three channels.
        """
        channels, height, width = images.shape[1:]
        if min(height, width) < self.smallest or channels not in (1, 3):
            raise UserError(
                f"{self.name} needs grey or RGB images of at least {self.smallest}x{self.smallest} pixels, these are "
                f"{height}x{width} with {channels} channels; use MSE and SSIM"
            )
        images = 2 * images.to(self.device).float().expand(-1, 3, -1, -1) - 1
        features = self.features(images.contiguous(memory_format=torch.channels_last))
        return [x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + _EPSILON) for x in features]

    @torch.no_grad()
    def compare(self, orig, recon):
        """Two results of `prepare` to (B,); Zhang et al., equation 1."""
        layers = zip(self.heads, orig, recon, strict=True)
        return sum(head((x - y).square_()).mean(dim=(1, 2, 3)) for head, x, y in layers)

    @torch.no_grad()
    def map(self, orig, recon):
        """Each layer's distances, enlarged bilinearly to the images' size and summed: (B, H, W)."""
        layers = zip(self.heads, self.prepare(orig), self.prepare(recon), strict=True)
        enlarge = {"size": orig.shape[2:], "mode": "bilinear", "align_corners": False}
        return sum(F.interpolate(head((x - y).square_()), **enlarge) for head, x, y in layers).squeeze(1)
