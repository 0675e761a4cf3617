"""Pixels: crop, resize, grey, and the ranges that models and data use."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def crop_all(pixels, size):
    """`crop` of each of (N, 1 | 3, H, H) uint8: (N, 1 | 3, size, size) uint8."""
    if pixels.shape[-1] == size:
        return pixels
    made = torch.empty(*pixels.shape[:2], size, size, dtype=torch.uint8)
    for image, out in zip(pixels, made, strict=True):
        rows = image.permute(1, 2, 0).expand(-1, -1, 3).numpy()  # (H, H, 3)
        cropped = crop(Image.fromarray(np.ascontiguousarray(rows)), size)
        out.copy_(torch.from_numpy(np.array(cropped)).permute(2, 0, 1)[: len(out)])
    return made


def resize_bilinear(pixels, size):
    """Pillow's bilinear resize, as torchvision's `Resize(size)` does it to a square picture, for a whole data set.

    From 28 to 32 pixels, the published case, the result equals Pillow's exactly (the weights are multiples of 1/16);
    between other sizes it is within 1 of 255.

    Args:
        pixels: (N, C, H, H) uint8.
        size: pixels an edge of the result.

    Returns:
        Tensor: (N, C, size, size) uint8.
    """
    if pixels.shape[-1] == size:
        return pixels
    return F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)


def to_grey(pixels):
    """Luma of colour images: (N, 3, H, W) uint8 to (N, 1, H, W), equal to Pillow's conversion to mode L."""
    grey = torch.empty_like(pixels[:, :1])
    for part, out in zip(pixels.split(4096), grey.split(4096), strict=True):  # keeps the int32 copy small
        r, g, b = part.int().unbind(1)
        out[:, 0] = (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16
    return grey


def crop(picture, size):
    """The published crop of listed images, that of guided diffusion (Dhariwal and Nichol, arXiv 2105.05233).

    Halves with a box filter while the short side is at least twice `size`, resizes bicubically so that the short side
    is `size`, and takes the centre square.  Grey, palette and CMYK pictures become RGB; what transparency
    a picture still has is dropped.

    Args:
        picture: a PIL image of any 8-bit mode.
        size: pixels an edge of the result.

    Returns:
        Image: RGB, size x size.
    """
    picture = picture.convert("RGB")
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    return cut_centre(picture, size)


def cut_centre(picture, edge):
    """The central square of a PIL image, `edge` pixels an edge or as many as it has."""
    edge = min(edge, *picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    return picture.crop((left, top, left + edge, top + edge))


def to_model_range(images, centered):
    """(B, C, H, W) uint8 or float in [0, 1] to float32: [-1, 1] when `centered`, else [0, 1]."""
    images = images.float().div_(255) if images.dtype == torch.uint8 else images.float()
    return images.mul(2).sub_(1) if centered else images


def to_data_range(images, centered):
    """The inverse of `to_model_range`: (B, C, H, W) float in the model's range to data range [0, 1], not clipped."""
    return (images + 1) / 2 if centered else images


def dequantize(images, generator, total=None, share=slice(None)):
    """Uniform dequantisation: (B, C, H, W) float in [0, 1] to (255 x + u) / 256, u ~ U[0, 1) on the images' device.

    Where the images are the `share` of a batch of `total`, u is what the whole batch would give them.
    """
    shape = (total or len(images), *images.shape[1:])
    u = torch.rand(shape, generator=generator, device=images.device)[share]
    return (images * 255 + u) / 256
