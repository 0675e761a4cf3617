"""What a method finds out about a whole set of images, chunk by chunk, kept in files so that a stopped run goes on.

The chunks are fixed by the images alone, so the numbers are the same to the bit wherever a run was stopped, and
whatever number of processes shared it.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from basics import distributed, files, noise
from basics.background import Background
from basics.console import UserError, progress
from storage.arrays import read_arrays, write_arrays

_CHUNK = 256  # images at most that are examined together
_CHUNK_VALUES = 1 << 20  # and numbers of these images at most


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A method at work on one set of images.

    Attributes:
        method: a `methods.base.Method`.
        model: a `methods.base.TrainedModel`.
        images: an `ImageSet`.
        seed: of the images' noise.
        origin: what the numbers depend on, JSON types; a file of another origin is refused.
        folder: where the chunks are kept, or None for nowhere.
        change: called as change(images (B, C, H, W) uint8, indices (B,)), gives the images to measure in their place.
        keep: called as keep(pixels, examined, start) with a chunk's images and a `methods.base.Examined`, gives further
            arrays to be kept of the chunk; or None, where the statistics are all.
    """

    method: object
    model: object
    images: object
    seed: int
    origin: dict = dataclasses.field(default_factory=dict)
    folder: Path | None = None
    change: Callable | None = None
    keep: Callable | None = None

    @property
    def chunks(self):
        """The rows of each chunk, a list of (start, stop)."""
        size = max(8, min(_CHUNK, _CHUNK_VALUES // int(np.prod(self.images.shape))))
        return [(start, min(start + size, len(self.images))) for start in range(0, len(self.images), size)]

    @property
    def missing(self):
        """How many images are not in the folder yet."""
        return sum(
            stop - start
            for number, (start, stop) in enumerate(self.chunks)
            if self.folder is None or not self._path(number).is_file()
        )

    def run(self, label, ranks=distributed.ALONE):
        """Measures what is not in the folder yet; the ranks share the chunks, each makes every so manieth.

        Args:
            label: of the progress bar, or None for no bar.
            ranks: the processes, all of which call this.

        Returns:
            list of dicts, one a chunk: `statistics` (B, F), and what `keep` gave.  Without a folder, alone.

        Raises:
            UserError: an image can no longer be read, the numbers are not finite, or a file of a chunk is damaged or
                of another origin.
        """
        if ranks.world_size > 1 and self.folder is None:
            raise ValueError("several processes share their chunks through a folder")
        with ranks.together():  # nobody writes before all have seen what is missing
            made = [self._read(number) for number in range(len(self.chunks))]
        missing = [number for number, arrays in enumerate(made) if arrays is None]
        mine = missing[ranks.rank :: ranks.world_size]
        shown = f"{label}, process 1 of {ranks.world_size}" if label and ranks.world_size > 1 else label
        with ranks.together():
            self._measure(mine, made, shown)
        return [arrays or self._read(number) for number, arrays in enumerate(made)]

    def _measure(self, numbers, made, label):
        if not numbers:
            return
        total = sum(stop - start for start, stop in (self.chunks[number] for number in numbers))
        hidden = {} if label else {"disable": True}
        with progress(total=total, unit="images", desc=label, **hidden) as bar, Background() as reader:
            pending = reader.submit(self.images.read, *self.chunks[numbers[0]])
            for number, following in zip(numbers, [*numbers[1:], None], strict=True):
                pixels = pending.result()
                if following is not None:
                    pending = reader.submit(self.images.read, *self.chunks[following])
                made[number] = self._examine(number, pixels)
                bar.update(len(pixels))

    def _examine(self, number, pixels):
        """The arrays of a chunk, written to its file."""
        start, stop = self.chunks[number]
        if self.change is not None:
            pixels = self.change(pixels, torch.arange(start, stop))
        keys = noise.seed_keys(self.seed, noise.content_keys(pixels))
        if self.keep is None:
            arrays = {"statistics": self.method.statistics(self.model, pixels, keys)}
        else:
            examined = self.method.examine(self.model, pixels, keys)
            arrays = {"statistics": examined.statistics}
        if not np.isfinite(arrays["statistics"]).all():
            raise UserError(
                f"what the method {self.method.name} measures is NaN or infinite: the model's weights are broken or "
                "its training diverged; choose another checkpoint"
            )
        if self.keep is not None:
            arrays |= self.keep(pixels, examined, start)
        if self.folder is not None:
            write_arrays(self._path(number), self._origin(number), **arrays)
        return arrays

    def _read(self, number):
        return None if self.folder is None else read_arrays(self._path(number), self._origin(number))

    def _path(self, number):
        return Path(self.folder) / f"chunk_{number}.npz"

    def _origin(self, number):
        return {**self.origin, "images": self.images.fingerprint, "chunk": list(self.chunks[number])}


def statistics_of(chunks):
    """All statistics (N, F) of what `Measurement.run` gave."""
    return np.concatenate([chunk["statistics"] for chunk in chunks])


def start_folder(folder):
    """Makes the folder of chunks, marked so that it is not read as images; returns its path."""
    files.mark(folder)
    return Path(folder)
