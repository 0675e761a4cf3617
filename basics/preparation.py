"""How images of any source are prepared: which of them are used, and what each picture goes through."""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from basics import image_sets
from basics.console import are
from basics.image_lists import say_once
from basics.images import decode
from basics.pixels import crop, cut_centre, resize_bilinear

SMALL = 28  # pixels an edge of MNIST and its kin, which torchvision's resize makes larger


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What images are to become, and how much work to spend on it.

    Attributes:
        image_size, num_channels, center_crop, max_images, reduced_to, check: see `datasets.load`.
        workers: decoding threads.
        cut: pixels an edge of the central square that alone is used of a named set's pictures, or None.
        own: they are a user's own pictures, not a named set's.
    """

    image_size: int
    num_channels: int
    center_crop: bool
    workers: int
    max_images: int | None
    reduced_to: int | None
    check: bool
    cut: int | None = None
    own: bool = True

    @property
    def shape(self):
        return (self.num_channels, self.image_size, self.image_size)

    @property
    def treatment(self):
        """What is done to each picture besides resizing it (`reduced_to`), in this order, as JSON types."""
        return {
            "orientation": "as the camera noted" if self.own else "as stored",
            "transparency": "on white" if self.own else "dropped",
            "cut": self.cut if self.center_crop else None,
            "shape": "crop" if self.center_crop else "squeeze",
        }

    def image_set(self, name, count, store, **known):
        """The ImageSet of images that were prepared this way; `known` are further attributes of it."""
        details = {"reduced_to": self.reduced_to, "treatment": self.treatment}
        return image_sets.ImageSet(name, count, self.shape, store, **details, **known)

    def choose(self, name, count):
        """The rows, of 0..count-1, of the images that are used; says so where those are not all."""
        rows = spread(count, self.max_images)
        if len(rows) < count:
            say_once(f"'{name}': {len(rows):,} of {count:,} images {are(len(rows))} used, evenly spread (--max_images)")
        return rows

    def fits_in_memory(self, count):
        return image_sets.fits_in_memory(count, self.shape)

    def pool(self):
        return ThreadPoolExecutor(self.workers, thread_name_prefix="decode")

    def decode(self, data, ending=""):
        """A file's bytes as `images.Decoded`, cut to the part that is used of it."""
        made = decode(data, ending, self.own)
        if self.cut and self.center_crop:
            made = dataclasses.replace(made, picture=cut_centre(made.picture, self.cut))
        return made

    def pixels(self, picture):
        """A PIL image as (C, H, W) uint8; a user's own of 28x28 is resized as an array of that size, bilinearly."""
        small = self.own and picture.size == (SMALL, SMALL)
        size = self.reduced_to or (SMALL if small else self.image_size)
        if self.center_crop:
            picture = crop(picture, size)
        else:
            picture = picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        if self.num_channels == 1:
            picture = picture.convert("L")
        values = torch.from_numpy(np.array(picture)).view(1, size, size, -1).permute(0, 3, 1, 2)  # (1, C, size, size)
        return resize_bilinear(values, self.image_size)[0].contiguous()


def spread(count, wanted):
    """`wanted` of the numbers 0..count-1, evenly spread; all of them where that is None or more."""
    if wanted is None or wanted >= count:
        return range(count)
    return [index * count // wanted for index in range(wanted)]


def processors():
    """Decoding threads by default: one for each processor that this process may use, 32 at most."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, 32)
