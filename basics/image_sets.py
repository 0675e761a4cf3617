"""A set of images of one size, whose pixels are kept in memory or made when they are asked for."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

IN_MEMORY_BYTES = 2 << 30  # up to here a set of decoded images is held as one uint8 tensor, on the device in training
SAMPLED = 1000  # images of a large training set, whose content is in its fingerprint


def fits_in_memory(count, shape):
    """Whether `count` images of a shape (C, H, W) uint8 are few enough to be kept."""
    return count * math.prod(shape) <= IN_MEMORY_BYTES


def content_digest(content):
    """16 bytes that tell contents apart."""
    return hashlib.blake2b(content, digest_size=16).digest()


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size, in the order of their source.

    Attributes:
        name: what the set is called: the table's name, or the stem of the file or folder.
        count: the number of images N, those that can be used.
        shape: (C, H, W).
        store: holds the pixels: `InMemory`, `OnDemand` or a part of that.
        skipped: (path, reason) of the files that cannot be used; grows while a set that was not checked is read.
        left_out: paths of the files in the folder that are not taken for images, by their endings; only if checked.
        source_size: the smallest height or width of any of the images before they got their size (but after a named
            set's own cut); None where the files were not checked.
        reduced_to: pixels an edge that all images were reduced to before they got their size, or None.
        labels: the images' paths as the user knows them (below the folder, or as the list has them), in order; None
            for arrays and torchvision's sets.
        treatment: what was done to each picture, as JSON types, see `Preparation.treatment`.
    """

    name: str
    count: int
    shape: tuple
    store: object
    skipped: list = dataclasses.field(default_factory=list)
    left_out: list = ()
    source_size: int | None = None
    reduced_to: int | None = None
    labels: list | None = None
    treatment: dict = dataclasses.field(default_factory=dict)

    def __len__(self):
        return self.count

    def read(self, start, stop):
        """Images start..stop-1, (B, C, H, W) uint8; fewer where the set ends before.

        Raises:
            UserError: a file that was usable when the set was loaded no longer is.
        """
        return self.take(torch.arange(start, min(stop, len(self))))

    def take(self, indices):
        """The images at `indices`, (B,) int64 on the CPU, as (B, C, H, W) uint8."""
        return self.store.take(indices).expand(-1, *self.shape).contiguous()

    def part(self, indices):
        """The images at `indices`, (B,) int64, in their order, as a set of its own.

        Of a set that was not checked, what takes an unusable file's place may come from outside the part.
        """
        in_memory = isinstance(self.store, InMemory)
        store = InMemory(self.store.take(indices)) if in_memory else _Part(self.store, indices)
        labels = self.labels and [self.labels[index] for index in indices.tolist()]
        return dataclasses.replace(self, count=len(indices), labels=labels, store=store)

    @property
    def without_row(self):
        """(path, reason) of all files that were given and are not among the images, but for `max_images`."""
        return [*self.skipped, *((path, "not taken for an image, by its ending") for path in self.left_out)]

    @functools.cached_property
    def fingerprint(self):
        """Content identity `count:hash`, whatever the images are called and wherever they lie.

        Of sets in memory it is the hash of the pixels, as treated; of larger ones that of the files' or the array's
        bytes and the treatment.  A large set that was not checked (training) is not read for it: its hash is of the
        number and the sizes of its files, and of the content of up to 1000 of them, evenly spread.
        """
        digest = hashlib.blake2b(repr(self.shape).encode(), digest_size=8)
        if not isinstance(self.store, InMemory):
            digest.update(repr((self.reduced_to, sorted(self.treatment.items()))).encode())
        self.store.hash_into(digest)
        return f"{len(self)}:{digest.hexdigest()}"


@dataclasses.dataclass(frozen=True, eq=False)
class InMemory:
    """Pixels in one tensor (N, C, H, W) uint8, or (N, 1, H, W) where all channels are equal."""

    pixels: torch.Tensor

    def take(self, indices):
        return self.pixels.index_select(0, indices)

    def hash_into(self, digest):
        for part in self.pixels.split(4096):
            digest.update(part.contiguous().numpy())


@dataclasses.dataclass(frozen=True, eq=False)
class OnDemand:
    """Pixels made when they are asked for, by threads.

    Attributes:
        decode: takes a row number 0..N-1, gives (C, H, W) uint8.
        contents: gives bytes objects that change with the content, for the fingerprint.
        pool: the threads.
    """

    decode: Callable
    contents: Callable
    pool: ThreadPoolExecutor

    def take(self, indices):
        return torch.stack([future.result() for future in self.submit(indices)])

    def submit(self, indices):
        """Starts decoding; a list of futures of (C, H, W) uint8."""
        return [self.pool.submit(self.decode, row) for row in indices.tolist()]

    def hash_into(self, digest):
        for part in self.contents():
            digest.update(part)


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """Some rows, (B,) int64, of another store that makes pixels when they are asked for."""

    whole: OnDemand
    rows: torch.Tensor

    def take(self, indices):
        return self.whole.take(self.rows[indices])

    def submit(self, indices):
        return self.whole.submit(self.rows[indices])

    def hash_into(self, digest):
        self.whole.hash_into(digest)
        digest.update(self.rows.numpy())
