"""Where in an image it is unusual: distances of single pixels, smoothed, in units of what held-back images have.

Single pixels say little, so each takes the mean of its neighbourhood, weighted by a Gaussian.  Mean and standard
deviation are those of all pixels of held-back images: standardising each place by itself finds pasted patches less
well (docs/decisions.md), since a place that is hard to reconstruct is also where something foreign shows.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

_NEIGHBOURHOOD = 0.14  # standard deviation of the weights, of the images' edge


def smoothed(distances):
    """Distances (B, H, W) averaged over a Gaussian neighbourhood, edges repeated."""
    deviation = _NEIGHBOURHOOD * distances.shape[-1]
    reach = math.ceil(2 * deviation)
    weights = torch.exp(-torch.arange(-reach, reach + 1).float().square() / (2 * deviation**2))
    weights = (weights / weights.sum())[None, None]  # (1, 1, 2 reach + 1)
    values = F.pad(distances[:, None].float(), 4 * [reach], mode="replicate")
    return F.conv2d(F.conv2d(values, weights[..., None]), weights[:, :, None])[:, 0]


def sums(distances):
    """What `moments` needs of a chunk's `methods.base.Examined.distances` (B, H, W), or None: (3,) or (0,)."""
    if distances is None:
        return np.zeros(0)
    values = smoothed(distances).double()
    return np.array([values.numel(), values.sum().item(), values.square().sum().item()])


def moments(sums):
    """Mean and standard deviation (2,) of the pixels of all chunks, from an array of their `sums`; (0,) without."""
    if not sums.size:
        return np.zeros(0)
    count, total, squares = sums.sum(axis=0)
    mean = total / count
    return np.array([mean, max(math.sqrt(max(squares / count - mean**2, 0)), 1e-6)])


def standardised(distances, moments):
    """How many standard deviations each pixel is further than usual: (B, H, W) float32 NumPy.

    Args:
        distances: (B, H, W), `methods.base.Examined.distances`.
        moments: (2,), of held-back images.
    """
    mean, deviation = moments
    return ((smoothed(distances) - mean) / deviation).float().numpy()
