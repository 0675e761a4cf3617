"""Structural similarity (Wang, Bovik, Sheikh and Simoncelli, 2004) as scikit-image defines it.

A 7x7 uniform window, sample covariance (divided by 48, not 49), data range 1, K1 = 0.01,
K2 = 0.03; averaged over the windows that lie inside the image, then over the channels.
"""

import torch.nn.functional as F

from basics.console import UserError
from metrics import Metric

WINDOW = 7
_C1 = 0.01**2
_C2 = 0.03**2
_SAMPLE = WINDOW**2 / (WINDOW**2 - 1)  # from the variance of a window to the sample variance


class SSIM(Metric):
    """1 - SSIM, in [0, 2]."""

    name = "SSIM"
    similarity = True

    def __init__(self, device):
        self.device = device

    def prepare(self, images):
        """Window statistics of images (B, C, H, W), h = H - 6, w = W - 6.

        Variances and covariances do not change when a constant is taken from an image, so each channel's mean
        is: E[x^2] - E[x]^2 then cancels far less in float32 (measured on flat images: 3e-7 off instead of 3e-5).

        Returns:
            tuple: images less their means (B, C, H, W); window means of those, window means of the images and
            window variances, each (B, C, h, w).

        Raises:
            UserError: the window does not fit into the image.
        """
        if min(images.shape[2:]) < WINDOW:
            raise UserError(
                f"SSIM needs images of at least {WINDOW}x{WINDOW} pixels, these have "
                f"{images.shape[2]}x{images.shape[3]}; use MSE"
            )
        images = images.to(self.device).float()
        level = images.mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
        centred = images - level
        centred_mean = _box(centred)  # (B, C, h, w)
        variance = _box(centred.square()) - centred_mean.square()
        return centred, centred_mean, centred_mean + level, variance

    def compare(self, orig, recon):
        """Two results of `prepare` to 1 - SSIM (B,)."""
        return 1 - _similarity(orig, recon).mean(dim=(1, 2, 3))

    def map(self, orig, recon):
        """1 - SSIM of the window around each pixel (B, H, W); at the border, of the nearest window that fits."""
        similarity = _similarity(self.prepare(orig), self.prepare(recon)).mean(dim=1, keepdim=True)
        return 1 - F.pad(similarity, 4 * [WINDOW // 2], mode="replicate").squeeze(1)


def _similarity(orig, recon):
    """Two results of `SSIM.prepare` to each window's SSIM (B, C, h, w); Wang et al., equation 13."""
    x, x_centred_mean, x_mean, x_variance = orig
    y, y_centred_mean, y_mean, y_variance = recon
    covariance = _box(x * y) - x_centred_mean * y_centred_mean  # (B, C, h, w)
    luminance = (2 * x_mean * y_mean + _C1) / (x_mean.square() + y_mean.square() + _C1)
    structure = (2 * _SAMPLE * covariance + _C2) / (_SAMPLE * (x_variance + y_variance) + _C2)
    return luminance * structure


def _box(images):
    """Means over all 7x7 windows: (B, C, H, W) to (B, C, H - 6, W - 6)."""
    return _sum7(_sum7(images, 3), 2) / WINDOW**2


def _sum7(images, dim):
    """Sums of 7 neighbours along `dim` by pairs, 2 + 2 + 2 + 1: a few times faster than avg_pool2d on a CPU."""
    size = images.shape[dim] - WINDOW + 1
    pairs = images.narrow(dim, 0, size + 5) + images.narrow(dim, 1, size + 5)
    total = pairs.narrow(dim, 0, size) + pairs.narrow(dim, 2, size)
    return total.add_(pairs.narrow(dim, 4, size)).add_(images.narrow(dim, 6, size))
