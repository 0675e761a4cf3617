"""Mean squared error."""

from metrics import Metric


class MSE(Metric):
    """The squared difference averaged over channels, height and width."""

    name = "MSE"

    def __init__(self, device):
        self.device = device

    def prepare(self, images):
        """The images (B, C, H, W) as float32 on the device."""
        return images.to(self.device).float()

    def compare(self, orig, recon):
        """Two tensors (B, C, H, W) to (B,)."""
        return (orig - recon).square_().mean(dim=(1, 2, 3))

    def map(self, orig, recon):
        """The squared difference, averaged over channels: (B, H, W)."""
        return (self.prepare(orig) - self.prepare(recon)).square_().mean(dim=1)
