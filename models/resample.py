"""Doubling and halving the size of images: by FIR filters, or by nearest neighbours and 2x2 means.

The FIR filters are StyleGAN2's (arXiv 1912.04958, `upfirdn2d`), which NCSN++ uses: zeros are put between the pixels
(up), the image is convolved with the outer product of `taps`, and every second pixel is kept (down).  Here each is one
depthwise convolution that neither meets the inserted zeros nor computes the dropped pixels.
"""

import torch
import torch.nn.functional as F
from torch import nn

from basics.console import UserError
from models import layers


def fir_kernel(taps):
    """The outer product of `taps` (n numbers, n >= 2) with itself, of sum 1: (n, n).

    Raises:
        UserError: if there are fewer than two taps, or their sum is 0.
    """
    if len(taps) < 2 or sum(taps) == 0:
        raise UserError(f"config.model.fir_kernel {tuple(taps)} is no filter; give two or more taps, such as (1,3,3,1)")
    taps = torch.tensor(taps, dtype=torch.float32) / sum(taps)
    return torch.outer(taps, taps)


def fir_up(x, kernel):
    """Doubles the size: zeros inserted after each pixel, filtered with gain 4 so that brightness stays.

    Args:
        x: (B, C, H, W); beyond the border lie zeros.
        kernel: (n, n), of sum 1.

    Returns:
        (B, C, 2H, 2W), aligned as `upfirdn2d` with padding ((p+1)//2 + 1, p//2), p = n - 2.
    """
    channels, height, width = x.shape[1:]
    n = kernel.shape[0]
    weight = (4 * kernel).to(x.dtype).expand(channels, 1, n, n)
    y = F.conv_transpose2d(x, weight, stride=2, padding=(n - 2) // 2, groups=channels)
    return y[:, :, : 2 * height, : 2 * width]  # an odd n leaves one more


def fir_down(x, kernel):
    """Filters and keeps every second pixel of each axis.

    Args:
        x: (B, C, H, W); beyond the border lie zeros.
        kernel: (n, n), of sum 1.

    Returns:
        (B, C, H//2, W//2), aligned as `upfirdn2d` with padding ((p+1)//2, p//2), p = n - 2.
    """
    height, width = x.shape[2:]
    y = _filter(x, kernel, padding=(kernel.shape[0] - 1) // 2, stride=2)
    return y[:, :, : height // 2, : width // 2]  # an odd n may leave one more


def _filter(x, kernel, padding, stride=1):
    channels, n = x.shape[1], kernel.shape[0]
    weight = kernel.flip(0, 1).to(x.dtype).expand(channels, 1, n, n)  # conv2d correlates, a filter convolves
    return F.conv2d(x, weight, stride=stride, padding=padding, groups=channels)


class Resample(nn.Module):
    """Base of the modules below: a FIR filter with `taps`, or none (None).

    The filter is no part of the state dict.
    """

    def __init__(self, taps=None):
        super().__init__()
        self.register_buffer("kernel", None if taps is None else fir_kernel(taps), persistent=False)

    def then_conv(self, x, conv):
        """The conv3x3 `conv` of the resampled x."""
        return conv(self(x))


class Up(Resample):
    """(B, C, H, W) -> (B, C, 2H, 2W): `fir_up`, or nearest neighbours."""

    def forward(self, x):
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.kernel is None else fir_up(x, self.kernel)

    def then_conv(self, x, conv):
        return layers.doubled_conv(x, conv) if self.kernel is None else super().then_conv(x, conv)


class Down(Resample):
    """(B, C, H, W) -> (B, C, H//2, W//2): `fir_down`, or 2x2 means."""

    def forward(self, x):
        return F.avg_pool2d(x, 2) if self.kernel is None else fir_down(x, self.kernel)


class _ConvResample(Resample):
    def __init__(self, channels_in, channels_out, taps, **conv):
        super().__init__(taps)
        self.conv = layers.conv(channels_in, channels_out, **conv)
        self.published = {"conv": "Conv_0" if taps is None else "Conv2d_0"}


class ConvUp(_ConvResample):
    """(B, C_in, H, W) -> (B, C_out, 2H, 2W): doubles the size, then convolves 3x3.

    With a filter the convolution sees the filtered image beyond its border too, as in StyleGAN2's `upsample_conv_2d`.
    """

    def __init__(self, channels_in, channels_out, taps=None):
        super().__init__(channels_in, channels_out, taps, padding=1 if taps is None else 0)

    def forward(self, x):
        if self.kernel is None:
            return layers.doubled_conv(x, self.conv)
        wide = fir_up(F.pad(x, (1, 1, 1, 1)), self.kernel)  # (B, C_in, 2H + 4, 2W + 4)
        return self.conv(wide[:, :, 1:-1, 1:-1])


class ConvDown(_ConvResample):
    """(B, C_in, H, W) -> (B, C_out, H/2, W/2), H and W even: filters, then convolves 3x3 with stride 2.

    As StyleGAN2's `conv_downsample_2d`; without a filter the input is padded by one at right and bottom.
    """

    def __init__(self, channels_in, channels_out, taps=None):
        super().__init__(channels_in, channels_out, taps, stride=2, padding=0)

    def forward(self, x):
        if self.kernel is None:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        height, width = x.shape[2:]
        wide = _filter(x, self.kernel, padding=(self.kernel.shape[0] + 1) // 2)
        return self.conv(wide[:, :, : height + 1, : width + 1])  # an odd n leaves one more
