"""How many bits an image takes: too complex and too simple are both unlike the domain.  No network is asked.

Serra et al., "Input Complexity and Out-of-distribution Detection with Likelihood-based Generative Models", ICLR 2020
(arXiv 1909.11480), section 3: the length of the losslessly compressed image, there to correct a likelihood (see
`nll`).  As published: PNG level 9, JPEG-2000 and FLIF.  Ours: the first two, which Pillow writes, each by itself the
negative log of a kernel density of the logarithm of the bits, which is large on both sides of the domain.  Cost: none.
"""

import io

import numpy as np
from PIL import Image, features

from basics.console import UserError
from lmd.methods.densities import KernelDensity
from lmd.methods.fitted import DensityMethod

FORMATS = {  # what Pillow is told: no loss, and no more than is needed around the pixels
    "png": {"format": "PNG", "compress_level": 9},
    "jpeg2000": {"format": "JPEG2000", "no_jp2": True, "irreversible": False},
}


class Complexity(DensityMethod):
    """-log density of the log bits, a part a format."""

    name = "complexity"

    def __init__(self):
        super().__init__({f"{self.name}_{name}": KernelDensity(1) for name in FORMATS})
        self.reasons = {
            f"{self.name}_{name}": (
                f"complexity: its file ({kind['format']}) is smaller or larger than those of the domain's images",
                f"typicality: its file ({kind['format']}) is of the domain's most usual size",
            )
            for name, kind in FORMATS.items()
        }

    def evaluations(self, model):
        return 0

    def statistics(self, model, images, keys):
        """The bits of each image's files (B, 2), PNG and JPEG-2000."""
        return lossless_bits(images)

    def features(self, statistics):
        return {part: np.log(statistics[:, [i]]) for i, part in enumerate(self.densities)}


def lossless_bits(images):
    """The bits that images take in each of `FORMATS`.

    Args:
        images: (B, 1 | 3, H, W) uint8.

    Returns:
        (B, 2) float64.

    Raises:
        UserError: this Pillow cannot write JPEG-2000.
    """
    if not features.check("jpg_2000"):
        raise UserError("this Pillow cannot write JPEG-2000 files, whose bits are counted; install one from PyPI")
    pixels = images.cpu().permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
    return np.array([[_bits(picture, options) for options in FORMATS.values()] for picture in pixels], np.float64)


def _bits(pixels, options):
    file = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))
    picture.save(file, **options)
    return 8 * len(file.getvalue())
