"""Distances between images and their reconstructions, and the score that they give.

The score of an image is the median over its repetitions of the distance between the image and its reconstruction (Liu
et al., "Unsupervised Out-of-Distribution Detection with Diffusion Inpainting", ICML 2023).
"""

import numpy as np
import torch

from models import inference, memory


def distances_of(metrics, orig, recons, device):
    """Distances between one batch and its reconstructions.

    Args:
        metrics: M of `metrics.Metric`.
        orig: images (B, C, H, W) in [0, 1].
        recons: list of R tensors of that shape.
        device: torch.device; images go there some at a time.

    Returns:
        np.ndarray: (M, R, B) float32.

    Raises:
        UserError: the device has too little memory.
    """
    remedy = "to compare these images; use --device cpu, or one metric at a time"
    with memory.explained(device, remedy), inference.arithmetic("fp32"):
        return _distances_of(metrics, orig, recons, device)


def _distances_of(metrics, orig, recons, device):
    distances = torch.empty(len(metrics), len(recons), len(orig), device=device)
    step = max(1, min(metric.pixels_at_once for metric in metrics) // (orig.shape[2] * orig.shape[3]))
    for start in range(0, len(orig), step):
        rows = slice(start, start + step)
        images = orig[rows].to(device)
        known = [metric.prepare(images) for metric in metrics]
        for rep, recon in enumerate(recons):
            images = recon[rows].to(device)
            for number, metric in enumerate(metrics):
                distances[number, rep, rows] = metric.compare(known[number], metric.prepare(images))
    return distances.cpu().numpy()


def median_score(distances, axis):
    """The score of images from their distances, an axis of which are the repetitions, which goes.

    Of an even number of repetitions it is the mean of the middle two.
    """
    return np.median(distances, axis=axis)
