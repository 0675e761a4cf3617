"""Image distances: how far a reconstruction landed from its original.

One file per distance and one line in `METRICS`.  A metric describes images by `prepare` and
compares two descriptions by `compare`; calling it does both.  An original is described once for
all its repetitions.
"""

import abc
import importlib

from basics.console import UserError, choose

METRICS = {  # name: module and class, imported when asked for
    "MSE": ("metrics.mse", "MSE"),
    "SSIM": ("metrics.ssim", "SSIM"),
    "LPIPS": ("metrics.perceptual", "LPIPS"),
    "LPIPS_VGG": ("metrics.perceptual", "LPIPSVGG"),
    "LPIPS_SQUEEZE": ("metrics.perceptual", "LPIPSSqueeze"),
    "SIMCLR": ("metrics.simclr", "SimCLR"),
    "STLPIPS": ("metrics.shift_tolerant", "ShiftTolerantLPIPS"),
}


class Metric(abc.ABC):
    """A distance between images (B, C, H, W), nominally in [0, 1]; reconstructions are not clipped.

    Attributes:
        name: the key in `METRICS`.
        similarity: whether the published closeness is 1 - distance; False where it is -distance.
        options: what its distances depend on besides the images, JSON types; kept with the results.
        pixels_at_once: how many, height times width times images, to describe at a time: few large operations, and
            descriptions of some 100 MB.
    """

    name = None
    similarity = False
    options = {}
    pixels_at_once = 1 << 20

    def __call__(self, orig, recon):
        """The distance of every pair: two tensors (B, C, H, W) to (B,) float32, larger = further apart."""
        return self.compare(self.prepare(orig), self.prepare(recon))

    @property
    def label(self):
        """What the distance is called in pictures, such as '1 - SSIM'."""
        return f"1 - {self.name}" if self.similarity else self.name

    def map(self, orig, recon):
        """How far apart two tensors (B, C, H, W) are at each pixel: (B, H, W) float32.

        Raises:
            UserError: the metric compares images as a whole.
        """
        raise UserError(f"{self.name} compares images as a whole and has no map; choose MSE, SSIM or a LPIPS")

    @abc.abstractmethod
    def prepare(self, images):
        """What `compare` needs to know of images (B, C, H, W); rows stay apart."""

    @abc.abstractmethod
    def compare(self, orig, recon):
        """The distance (B,) float32 of two results of `prepare`."""


def canonical(name):
    """A metric's name as it stands in `METRICS`, whatever its case.

    Raises:
        UserError: there is no such metric; the message lists them.
    """
    choose(name.upper(), METRICS, "metric")
    return name.upper()


def create(name, device, **options):
    """The metric called `name` (in any case) on a torch.device; `options` are its constructor's.

    Raises:
        UserError: there is no such metric, or what it needs cannot be had.
    """
    module, attribute = METRICS[canonical(name)]
    return getattr(importlib.import_module(module), attribute)(device, **options)
