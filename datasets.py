"""One table of data sets and one loader, for training and for reconstruction.

A source is the name of a known data set, a folder of images, a txt list of image paths, one image file, or a NumPy
file of images.
`load` turns any of them into an `ImageSet`: uint8 images of one size, kept in memory while they are few and decoded
on demand by worker threads otherwise (Pillow releases the interpreter's lock while it decodes and resizes).
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from basics.console import UserError, progress, warn
from basics.files import expand_home
from basics.image_lists import NOT_IMAGES, folder_files, lines_of, listed_files, say_once
from basics.images import array_headers, array_names, decode, first_line, on_white, read_array, read_file, reason
from basics.machine import download_timeout
from basics.pixels import crop, crop_all, cut_centre, resize_bilinear, to_grey

IN_MEMORY_BYTES = 2 << 30  # up to here a set of decoded images is held as one uint8 tensor, on the device in training
_NAMED_FAILURES = 20  # unusable files named in warnings; ImageSet.skipped has them all
_SAMPLED_FILES = 1000  # of a large training set, whose content is in its fingerprint
_FAILURES_IN_A_ROW = 100  # files after which training takes the disk to be the trouble, not the files


# ----------------------------------------------------------------------------------------------- the image set


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size, in the order of their source.

    Attributes:
        name: what the set is called: the table's name, or the stem of the file or folder.
        count: the number of images N, those that can be used.
        skipped: (path, reason) of the files that cannot be used; grows while a set that was not checked is read.
        shape: (C, H, W).
        store: holds the pixels, see `InMemory` and `_OnDemand`.
        native: the smallest height or width of any of the images before they got their size (but after a named
            set's own cut); None where the files were not checked.
        through: pixels an edge that all images were reduced to before they got their size, or None.
        labels: the images' paths as the user knows them (below the folder, or as the list has them), in order; None
            for arrays and torchvision's sets.
        treatment: what was done to each picture, as JSON types, see `_Form.treatment`.
    """

    name: str
    count: int
    skipped: list
    shape: tuple
    store: object
    native: int | None = None
    through: int | None = None
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

    @functools.cached_property
    def fingerprint(self):
        """Content identity `count:hash`, whatever the images are called and wherever they lie.

        Of sets in memory it is the hash of the pixels, as treated; of larger ones that of the files' or the array's
        bytes and the treatment.  A large set that was not checked (training) is not read for it: its hash is of the
        number and the sizes of its files, and of the content of up to 1000 of them, evenly spread.
        """
        digest = hashlib.blake2b(repr(self.shape).encode(), digest_size=8)
        if not isinstance(self.store, InMemory):
            digest.update(repr((self.through, sorted(self.treatment.items()))).encode())
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
class _OnDemand:
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


def _digest(content):
    """16 bytes that tell contents apart."""
    return hashlib.blake2b(content, digest_size=16).digest()


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """Some rows, (B,) int64, of another store that makes pixels when they are asked for."""

    whole: _OnDemand
    rows: torch.Tensor

    def take(self, indices):
        return self.whole.take(self.rows[indices])

    def submit(self, indices):
        return self.whole.submit(self.rows[indices])

    def hash_into(self, digest):
        self.whole.hash_into(digest)
        digest.update(self.rows.numpy())


# --------------------------------------------------------------------------------------------------- the loader


def load(
    source,
    *,
    split,
    image_size,
    num_channels,
    data_root="./data",
    center_crop=True,
    max_images=None,
    workers=None,
    category=None,
    through=None,
    check=True,
):
    """Loads any source of images; see above for what becomes of them.

    Args:
        source: a name in DATASETS (case and underscores do not matter; `LSUN:bedroom` names a category), else a path:
            a folder (searched recursively, in sorted order), a `.txt` list (one path a line, relative to the list's
            folder or else the current one; blank lines and those starting with # are ignored), one image file, or
            uint8 or bool images (N, H, W), (N, H, W, 1 | 3 | 4) or (N, 1 | 3, H, W) in `file.npy`, `file.npz` or, of
            several arrays, `file.npz:name`.  A path that exists wins over a name.
        split: 'train' or 'test'; matters for named sets only.
        image_size: H = W of the result, in pixels.
        num_channels: 3, or 1 for grey (ITU-R 601-2 luma, as Pillow's mode L).
        data_root: where named sets lie; torchvision's are downloaded to it on demand, for the others see `_find`.
        center_crop: False resizes files and arrays bicubically to image_size x image_size, whatever their proportions,
            instead of the crop (and of a named set's own cut); as published.
        max_images: take only so many usable images, evenly spread.
        workers: decoding threads, by default one a processor up to 32; the images do not depend on it.
        category: of a set that has categories, where `source` names none.
        through: pixels an edge that every image is reduced to first, as it would be resized otherwise; it then gets its
            size by `resize_bilinear`, whatever the source.  So the images of two sources come out equally sharp, if
            no image is smaller than that in either (see `ImageSet.native`).
        check: False does not decode the files of a set too large for memory once beforehand: one that turns out to be
            unusable is named when it is met, and the next usable one stands in for it.

    Returns:
        ImageSet.

    Raises:
        UserError: unknown source, failed download, damaged file, no usable image, or options out of range; later, on
            reading a set too large for memory, a file or array that has changed.
    """
    _check_options(split, image_size, num_channels, max_images)
    form = _Form(image_size, num_channels, center_crop, workers or _processors(), max_images, through, check)
    images = _load_source(expand_home(str(source)), split, Path(expand_home(str(data_root))), category, form)
    if through is None:  # else it was loaded before, to learn its resolution
        _warn_of(images)
    return images


def _check_options(split, image_size, num_channels, max_images):
    if split not in ("train", "test"):
        raise UserError(f"unknown split '{split}'; choose one of: train, test")
    if num_channels not in (1, 3):
        raise UserError(f"images have 3 channels or 1 (grey), not {num_channels}; change config.data.num_channels")
    if image_size < 1 or (max_images is not None and max_images < 1):
        raise UserError(f"image size {image_size} and --max_images {max_images} must be at least 1")


def has_test_split(source, data_root, category=None):
    """Whether a source is a named data set, whose test images are others than those to train on; see `load`."""
    return _named_unless_path(expand_home(str(source)), Path(expand_home(str(data_root))), category) is not None


def _named_unless_path(source, data_root, category):
    """`_named`, but None where a path of that name exists, other than where the named set itself lies."""
    own = os.path.exists(source) and Path(source).resolve().parent != data_root.resolve()  # noqa: PTH110
    return None if own else _named(source, category)


def part(images, indices):
    """Some images of a set as a set of its own.

    Args:
        images: an ImageSet; of one that was not checked, an unusable file's stand-in may come from the other part.
        indices: (B,) int64, which, in their order.

    Returns:
        ImageSet.
    """
    in_memory = isinstance(images.store, InMemory)
    store = InMemory(images.store.take(indices)) if in_memory else _Part(images.store, indices)
    labels = images.labels and [images.labels[index] for index in indices.tolist()]
    return dataclasses.replace(images, count=len(indices), labels=labels, store=store)


def _load_source(source, split, data_root, category, form):
    is_file, is_folder = os.path.isfile(source), os.path.isdir(source)  # noqa: PTH112, PTH113 (they never raise)
    if named := _named_unless_path(source, data_root, category):
        key, name = named
        form = dataclasses.replace(form, own=False, cut=getattr(DATASETS[key], "cut", None))
        if isinstance(DATASETS[key], _Torchvision):
            return _small_images(name, _planes(_chosen(name, _torchvision_pixels(name, split, data_root), form)), form)
        return _load_files(name, *_find(name, split, data_root), form)
    if (array := _ARRAY_SOURCE.fullmatch(source)) and os.path.isfile(array["path"]):  # noqa: PTH113
        return _load_array(Path(array["path"]), array["name"], form)
    if (is_file or is_folder) and source.replace("_", "").lower() in (key.lower() for key in DATASETS):
        say_once(f"'{source}' is taken for {Path(source).resolve()}; rename that to have the data set of this name")
    if is_folder:
        return _load_files(_stem(source), *folder_files(Path(source)), form)
    if is_file and source.lower().endswith(".txt"):
        return _load_files(_stem(source), *listed_files(Path(source)), form)
    if is_file and Path(source).suffix.lower() not in NOT_IMAGES:
        return _load_files(_stem(source), [source], [Path(source)], form)
    raise UserError(
        f"unknown data set '{source}'; choose one of: {', '.join(DATASETS)}; or give the path of an existing folder of "
        "images, image file, .txt list of image paths, or .npz or .npy file of images"
    )


def _spread(count, wanted):
    """`wanted` of the numbers 0..count-1, evenly spread; all of them where that is None or more."""
    if wanted is None or wanted >= count:
        return range(count)
    return [index * count // wanted for index in range(wanted)]


def _chosen(name, values, form):
    """Of all images (N, ...) those that are used."""
    rows = _spread(len(values), form.max_images)
    _tell_chosen(name, len(rows), len(values))
    return values if len(rows) == len(values) else values[rows]


def _tell_chosen(name, used, count):
    if used < count:
        say_once(f"'{name}': {used} of {count} images are used, evenly spread (--max_images)")


def _warn_of(images):
    """Names the files that are left out, and warns of images of 0 and 1 alone, as masks and class numbers are."""
    for label, why in images.skipped[:_NAMED_FAILURES]:
        warn(f"'{images.name}': {label} is left out: {why}")
    if len(images.skipped) > _NAMED_FAILURES:
        more = len(images.skipped) - _NAMED_FAILURES
        warn(f"'{images.name}': {more} more images are left out; {len(images)} are used")
    if isinstance(images.store, InMemory) and images.store.pixels.max() == 1:
        warn(f"'{images.name}': no pixel is above 1 of 255, so all images are nearly black; multiply the values by 255")


@dataclasses.dataclass(frozen=True)
class _Form:
    """What images are to become, and how much work to spend on it: arguments of `load`, and a named set's own cut."""

    image_size: int
    num_channels: int
    center_crop: bool
    workers: int
    max_images: int | None
    through: int | None
    check: bool
    cut: int | None = None
    own: bool = True  # a user's own pictures, not a named set's

    @property
    def shape(self):
        return (self.num_channels, self.image_size, self.image_size)

    @property
    def treatment(self):
        """What is done to each picture besides resizing it (`through`), in this order, as JSON types."""
        return {
            "orientation": "as the camera noted" if self.own else "as stored",
            "transparency": "on white" if self.own else "dropped",
            "cut": self.cut if self.center_crop else None,
            "shape": "crop" if self.center_crop else "squeeze",
        }

    def fits_in_memory(self, count):
        return count * self.num_channels * self.image_size**2 <= IN_MEMORY_BYTES

    def pool(self):
        return ThreadPoolExecutor(self.workers, thread_name_prefix="decode")

    def decode(self, data, ending=""):
        """A file's bytes as `Decoded`, cut to the part that is used of it."""
        made = decode(data, ending, self.own)
        if self.cut and self.center_crop:
            made = dataclasses.replace(made, picture=cut_centre(made.picture, self.cut))
        return made

    def pixels(self, picture):
        """A PIL image as (C, H, W) uint8."""
        size = self.through or self.image_size
        if self.center_crop:
            picture = crop(picture, size)
        else:
            picture = picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        if self.num_channels == 1:
            picture = picture.convert("L")
        values = torch.from_numpy(np.array(picture)).view(1, size, size, -1).permute(0, 3, 1, 2)  # (1, C, size, size)
        return resize_bilinear(values, self.image_size)[0].contiguous()


def _stem(source):
    path = Path(source).resolve()
    return path.stem if path.is_file() else path.name


def _processors():
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, 32)


# -------------------------------------------------------------------------------------------------- named sets


@dataclasses.dataclass(frozen=True)
class _Torchvision:
    """A data set of torchvision's: what to fetch by hand, and where below the data root that goes."""

    url: str
    folder: str = ""
    split_flag: str = "train"  # torchvision's keyword: train=True or split="train"


@dataclasses.dataclass(frozen=True)
class _Files:
    """A data set of image files that the user puts below the data root; `_find` says where."""

    cut: int | None = None  # pixels an edge of the central square that alone is used of each picture
    has_categories: bool = False


DATASETS = {
    "CIFAR10": _Torchvision("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
    "CIFAR100": _Torchvision("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"),
    "SVHN": _Torchvision("http://ufldl.stanford.edu/housenumbers/{split}_32x32.mat", split_flag="split"),
    "MNIST": _Torchvision("the .gz files of https://ossci-datasets.s3.amazonaws.com/mnist/", "MNIST/raw"),
    "KMNIST": _Torchvision("the .gz files of http://codh.rois.ac.jp/kmnist/dataset/kmnist/", "KMNIST/raw"),
    "FashionMNIST": _Torchvision(
        "the .gz files of http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", "FashionMNIST/raw"
    ),
    "CelebA": _Files(cut=140),
    "CelebAHQ": _Files(),
    "FFHQ": _Files(),
    "ImageNet": _Files(),
    "LSUN": _Files(has_categories=True),
}


def _named(source, category):
    """The key of DATASETS that `source` spells and the set's name, or None.

    (FashionMNIST, FashionMNIST) for FASHION_MNIST; (LSUN, LSUN_bedroom) for lsun:bedroom, or LSUN and that category.
    """
    spelled, colon, own_category = source.partition(":")
    plain = spelled.replace("_", "").lower()
    key = next((name for name in DATASETS if name.lower() == plain), None)
    if key is None or not getattr(DATASETS[key], "has_categories", False):
        return (key, key) if key and not colon else None
    category = own_category or category
    if not category or not re.fullmatch(r"\w+", category):
        raise UserError(f"'{source}' names no category of {key}; write {key}:bedroom, or set config.data.category")
    return key, f"{key}_{category}"


def _torchvision_pixels(name, split, data_root):
    """The images of a named set as torchvision stores them, downloaded where they are missing.

    Returns:
        Tensor: uint8 (N, 28, 28), (N, 32, 32, 3), or for SVHN (N, 3, 32, 32).
    """
    import torchvision  # here, as it takes seconds and files and arrays do without

    entry = DATASETS[name]
    flag = {entry.split_flag: split if entry.split_flag == "split" else split == "train"}
    try:
        with download_timeout():  # torchvision sets none of its own
            return torch.as_tensor(getattr(torchvision.datasets, name)(str(data_root), download=True, **flag).data)
    except ImportError:
        raise
    except Exception as error:  # a refused connection, a full disk, a damaged file: torchvision raises all sorts
        raise UserError(
            f"{name} can neither be read from {data_root} nor downloaded to it ({first_line(error)}); fetch "
            f"{entry.url.format(split=split)} by hand into {Path(data_root, entry.folder)}, deleting what is damaged "
            "there, or give another folder with --data_root"
        ) from error


def _planes(stored):
    """Images uint8 (N, H, W), (N, H, W, 1 | 3) or (N, 3, H, W) as (N, 1 | 3, H, W)."""
    if stored.ndim == 3:
        return stored[:, None]
    if stored.shape[-1] in (1, 3):
        return stored.permute(0, 3, 1, 2).contiguous()
    return stored


def _small_images(name, pixels, form):
    """A set of which all images are there in their own size, (N, 1 | 3, H, H) uint8."""
    native = pixels.shape[-1]
    if form.through is not None:
        pixels = crop_all(pixels, form.through)

    def finish(pixels):  # (B, 1 | 3, H, H) to (B, 1 | C, image_size, image_size)
        pixels = resize_bilinear(pixels, form.image_size)
        return to_grey(pixels) if pixels.shape[1] > form.num_channels else pixels

    if form.fits_in_memory(len(pixels)):
        store = InMemory(finish(pixels))
    else:
        contents = functools.partial(iter, [pixels.contiguous().numpy()])
        store = _OnDemand(lambda row: finish(pixels[row : row + 1])[0], contents, form.pool())
    return ImageSet(name, len(pixels), [], form.shape, store, native, form.through, treatment=form.treatment)


# ------------------------------------------------------------------------------------------------------- files


def _find(name, split, data_root):
    """Labels and paths of the images of a set of files, from the first of these places below the data root.

    `{name}_{split}.txt`, a list; `{name}/{split}/`, for the test split also `{name}/val/`; of CelebA the files as they
    are published, in `celeba/`; and `{name}/` for both splits alike, if there is nothing for a single split.

    Raises:
        UserError: none is there; the message says what to put where.
    """
    found = {each: _find_split(name, each, data_root) for each in _SPLIT_FOLDERS}
    if found[split]:
        reader, *arguments = found[split]
        return reader(*arguments)
    whole = data_root / name
    if whole.is_dir() and not any(found.values()):
        warn(f"{name} is not split: all images of {whole} serve for training and for testing")
        return folder_files(whole)
    published = f"or the published img_align_celeba/ and {_CELEBA_PARTITION} into {data_root / 'celeba'}, "
    raise UserError(
        f"the {split} split of {name} is not in {data_root}: put a .txt list of image paths at "
        f"{data_root / f'{name}_{split}.txt'}, or images into the folder {whole / split}, or into {whole} if it is not "
        f"split, {published if name == 'CelebA' else ''}or give another folder with --data_root"
    )


_SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val")}
_CELEBA_PARTITION = "list_eval_partition.txt"


def _find_split(name, split, data_root):
    """What reads a split's labels and paths, and its arguments; None if the split is not there by itself."""
    places = [(listed_files, data_root / f"{name}_{split}.txt")]
    places += [(folder_files, data_root / name / folder) for folder in _SPLIT_FOLDERS[split]]
    for reader, path in places:
        if path.exists():
            return reader, path
    if name == "CelebA" and (data_root / "celeba" / _CELEBA_PARTITION).is_file():
        return _celeba_files, data_root / "celeba", split
    return None


def _celeba_files(folder, split):
    """The images of a split of CelebA as published: `000001.jpg 0` a line, 0 train, 1 validation, 2 test."""
    number = {"train": "0", "test": "2"}[split]
    rows = [line.split() for line in lines_of(folder / _CELEBA_PARTITION)]
    labels = [row[0] for row in rows if row[1:] == [number]]
    if not labels:
        raise UserError(f"{folder / _CELEBA_PARTITION} names no image of the {split} split; copy it again")
    return labels, [folder / "img_align_celeba" / label for label in labels]


def _load_files(name, labels, paths, form):
    """Decodes every file once, to learn which are usable and, where they are few, to keep their pixels."""
    limit = min(len(paths), form.max_images or len(paths))
    _tell_chosen(name, limit, len(paths))
    if not form.check and not form.fits_in_memory(limit):
        chosen, skipped = _spread(len(paths), limit), []
        labels, paths = [labels[row] for row in chosen], [paths[row] for row in chosen]
        decode_row = _standing_in(name, labels, paths, form, skipped)
        store = _OnDemand(decode_row, functools.partial(_sampled_contents, paths), form.pool())
        details = {"labels": labels, "treatment": form.treatment}
        return ImageSet(name, limit, skipped, form.shape, store, through=form.through, **details)
    found, skipped, pixels = _scan(labels, paths, limit, form)
    if not found:
        label, why = skipped[0]
        raise UserError(f"none of the {len(skipped)} images of '{name}' is usable; the first, {label}: {why}")
    if form.through is None:  # else it was loaded, and told, before
        _warn_of_dark(name, [seen.deepest for seen in found.values() if seen.deepest is not None])
    rows, native = list(found), min(seen.edge for seen in found.values())
    if pixels is not None:
        store = InMemory(pixels)
    else:
        store = _files_on_demand([paths[row] for row in rows], [seen.digest for seen in found.values()], form)
    details = {"labels": [labels[row] for row in rows], "treatment": form.treatment}
    return ImageSet(name, len(rows), skipped, form.shape, store, native, form.through, **details)


def _warn_of_dark(name, deepest):
    """Warns of 16-bit files that hold values of 12 bits, as cameras and scanners write them."""
    if deepest and max(deepest) < 4096:
        factor = 16 if max(deepest) > 255 else 257
        warn(
            f"'{name}': the {len(deepest)} images of 16 bits reach only {max(deepest)} of 65535, so they come out "
            f"nearly black; this looks like {12 if factor == 16 else 8} bit: multiply the values by {factor}"
        )


@dataclasses.dataclass(frozen=True)
class _Seen:
    """Of a file that was decoded: its picture's short edge, its content's digest, and `Decoded.deepest`."""

    edge: int
    digest: bytes | None
    deepest: int | None


def _scan(labels, paths, limit, form):
    """Decodes the files until `limit` usable ones are found, in pieces: so many images at most wait in memory.

    Returns:
        {row: _Seen} of the usable files and (label, reason) of the others, both in order, and the usable ones' pixels
        (N, C, H, W) uint8 or None if those are too many.
    """
    pixels = torch.empty(limit, *form.shape, dtype=torch.uint8) if form.fits_in_memory(limit) else None

    def attempt(row):
        try:
            data = read_file(paths[row])
            made = form.decode(data, paths[row].suffix)
            image = form.pixels(made.picture)  # also where it is not kept: it may fail
            digest = None if pixels is not None else _digest(data)
            return _Seen(min(made.picture.size), digest, made.deepest), (image if pixels is not None else None)
        except Exception as error:  # a damaged file can fail anywhere inside its decoder
            return None, reason(error)

    found, failed = {}, {}
    with form.pool() as pool, progress(total=limit, desc="checking images", unit="image", leave=False) as bar:
        for piece in _turns(len(paths), limit, 16 * form.workers, found, failed):
            for row, (seen, image) in zip(piece, pool.map(attempt, piece), strict=True):
                if seen is None:
                    failed[row] = image
                    continue
                if pixels is not None:
                    pixels[len(found)] = image
                found[row] = seen
            bar.update(len(found) - bar.n)
    rows, inorder = list(found), sorted(found)
    if pixels is not None:
        pixels = pixels[: len(rows)] if rows == inorder else pixels[sorted(range(len(rows)), key=rows.__getitem__)]
    return {row: found[row] for row in inorder}, [(labels[row], failed[row]) for row in sorted(failed)], pixels


def _turns(count, limit, most, found, failed):
    """Yields which of the rows 0..count-1 to try next, so that `limit` evenly spread usable ones are found.

    Every share of the source gives its first usable row; if a share has none, any others do.

    Args:
        count, limit: of the source, and of the rows wanted.
        most: rows to yield at once.
        found, failed: dicts of the rows that were tried, which the caller fills.
    """
    bounds = [*_spread(count, limit), count] if limit < count else []
    shares = [iter(range(first, stop)) for first, stop in itertools.pairwise(bounds)]
    while shares:
        tries = [(share, row) for share in shares if (row := next(share, None)) is not None]
        for start in range(0, len(tries), most):
            yield [row for _, row in tries[start : start + most]]
        shares = [share for share, row in tries if row in failed]
    others = [row for row in range(count) if row not in found and row not in failed] if len(found) < limit else []
    start = 0
    while start < len(others) and len(found) < limit:
        piece = others[start : start + min(most, limit - len(found))]
        start += len(piece)
        yield piece


def _files_on_demand(paths, digests, form):
    """The store of files that were usable when they were loaded, and of what content."""

    def decode_row(index):
        path = paths[index]
        try:
            data = read_file(path)
            if _digest(data) != digests[index]:
                raise UserError(f"image {path} was changed while it was in use; run the same command again")
            return form.pixels(form.decode(data, path.suffix).picture)
        except UserError:
            raise
        except Exception as error:  # as in _scan: it was usable when the set was loaded
            raise UserError(f"image {path} can no longer be read ({reason(error)}); put it back") from error

    return _OnDemand(decode_row, functools.partial(iter, digests), form.pool())


def _sampled_contents(paths):
    """Bytes that change with the content of files too many to read: their sizes, and up to 1000 evenly spread ones."""

    def size(path):
        try:
            return path.stat().st_size
        except OSError:
            return -1  # it will be named when it is met

    yield repr([size(path) for path in paths]).encode()
    for row in _spread(len(paths), _SAMPLED_FILES):
        try:
            yield _digest(read_file(paths[row]))
        except (OSError, ValueError):
            yield b"unusable"


def _standing_in(name, labels, paths, form, skipped):
    """Decodes files that nobody has checked; the next usable file stands in for one that is not.

    So the images depend on the files alone, not on the order in which they are read.  Unusable files are added to
    `skipped` when they are first met.
    """
    met, lock = set(), threading.Lock()

    def note(row, reason):
        with lock:
            if row in met:
                return
            met.add(row)
            skipped.append((labels[row], reason))
            if len(skipped) <= _NAMED_FAILURES:
                more = "; more are counted, not named" if len(skipped) == _NAMED_FAILURES else ""
                warn(f"'{name}': {labels[row]} is left out, the next image stands in for it: {reason}{more}")

    def decode_row(index):
        for further in range(min(_FAILURES_IN_A_ROW, len(paths))):
            row = (index + further) % len(paths)
            try:
                return form.pixels(form.decode(read_file(paths[row]), paths[row].suffix).picture)
            except Exception as error:  # as in _scan
                note(row, reason(error))
                last = error
        raise UserError(
            f"{further + 1} images of '{name}' in a row cannot be read, the last {paths[row]} ({reason(last)}); "
            "check the disk they are on"
        ) from last

    return decode_row


# ------------------------------------------------------------------------------------------------------ arrays


_ARRAY_SOURCE = re.compile(r"(?P<path>.+\.np[yz])(:(?P<name>[^/:]+))?", re.IGNORECASE)


def _load_array(path, array_name, form):
    name = f"{_stem(path)}_{array_name}" if array_name else _stem(path)
    values = _read_array(path, array_name)  # (N, H, W) or (N, H, W, C), uint8 or bool
    rows = _spread(len(values), form.max_images)
    _tell_chosen(name, len(rows), len(values))
    like_mnist = values.shape[1:] in ((28, 28), (28, 28, 1))
    opaque = values.shape[3:] != (4,)
    fits = form.fits_in_memory(len(rows))
    if like_mnist or (values.shape[1:3] == form.shape[1:] and opaque and fits):
        used = values if len(rows) == len(values) else values[rows]
        return _small_images(name, _planes(torch.from_numpy(_as_bytes(used).copy())), form)
    store = _array_on_demand(values, rows, path, form)
    if fits:
        store = InMemory(_gather(store, len(rows), form))
    native = min(values.shape[1:3])
    return ImageSet(name, len(rows), [], form.shape, store, native, form.through, treatment=form.treatment)


def _read_array(path, array_name):
    """The images (N, H, W) or (N, H, W, 1 | 3 | 4), uint8 or bool, memory-mapped where the format allows."""
    try:
        names = array_names(path)
        if array_name is None and len(names) == 1:
            array_name = names[0]
        if array_name not in names:
            raise UserError(_choose_array(path, names))
        shape, dtype = array_headers(path)[array_name]
        channels_first = _channels_first(path, shape, dtype)
        values = read_array(path, array_name)
    except UserError:
        raise
    except Exception as error:  # a damaged file can fail anywhere inside the reader
        raise UserError(f"{path} is damaged or holds no plain arrays ({first_line(error)})") from error
    return values.transpose(0, 2, 3, 1) if channels_first else values


def _choose_array(path, names):
    """The message that asks for one of several arrays, and suggests one that can be images."""
    if not names:
        return f"{path} holds no arrays; save images with numpy.savez"

    def can_be_images(header):
        try:
            _channels_first(path, *header)
        except UserError:
            return False
        return True

    fitting = [name for name, header in array_headers(path).items() if can_be_images(header)]
    listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    if not fitting:
        return f"{path} holds the arrays {listed}, of which none is images; {_ARRAYS_WANTED}"
    return f"{path} holds the arrays {listed}; choose one, as in {path}:{fitting[0]}"


_ARRAYS_WANTED = "images are uint8 or bool of shape (N, H, W[, 1 or 3 or 4]) or (N, 1 or 3, H, W)"

_CASTS = {
    "f": ": write (255 * array).round().astype('uint8') if its values are in 0..1",
    "u": ": write (array // 257).astype('uint8') if its values are in 0..65535",
    "i": ": write array.astype('uint8') if its values are in 0..255",
}


def _channels_first(path, shape, dtype):
    """Whether an array of images is (N, C, H, W) rather than (N, H, W) or (N, H, W, C).

    Raises:
        UserError: it is no array of images, or may be read in two ways; the message says how to write it.
    """
    what = f"{path} holds {dtype} of shape {'x'.join(map(str, shape))}"
    if dtype.name not in ("uint8", "bool"):
        raise UserError(f"{what}; {_ARRAYS_WANTED}{_CASTS.get(dtype.kind, '')}")
    last = len(shape) == 4 and shape[3] in (1, 3, 4)
    first = len(shape) == 4 and shape[1] in (1, 3)
    if 0 in shape or not (len(shape) == 3 or last or first):
        one = "; write array[None] for a single image" if len(shape) == 2 else ""
        raise UserError(f"{what}; {_ARRAYS_WANTED}{one}")
    if first and last:
        raise UserError(
            f"{what}, of which axis 1 or axis 3 may be the channels; give images higher and wider than that"
        )
    if len(shape) == 3 and (shape[2] in (1, 3, 4) or shape[0] == 3):
        raise UserError(
            f"{what}, which may be one picture or {shape[0]} grey images; write array[None] for one picture, "
            "array[..., None] for grey images"
        )
    return first


def _as_bytes(values):
    """uint8 or bool as uint8, False and True as 0 and 255."""
    return np.where(values, np.uint8(255), np.uint8(0)) if values.dtype == bool else np.asarray(values)


def _array_on_demand(values, rows, path, form):
    """The store of some rows of an array; once the fingerprint was made, a row that has changed is refused."""
    digests = {}  # index -> digest, of what is in the fingerprint

    def read(index):
        return np.array(values[rows[index]], order="C")  # a copy: what is checked is what is used

    def contents():
        count = len(rows)
        yield repr((values.dtype.str, values.shape[1:])).encode()  # the same bytes can be other images
        for index in _spread(count, None if form.check else _SAMPLED_FILES):
            digests[index] = _digest(read(index))
            yield digests[index]

    def decode_row(index):
        row = read(index)
        if index in digests and _digest(row) != digests[index]:
            raise UserError(
                f"image {rows[index]} of {path} was changed while it was in use; run the same command again"
            )
        row = _as_bytes(row)
        return form.pixels(on_white(Image.fromarray(row[..., 0] if row.shape[2:] == (1,) else row)))

    return _OnDemand(decode_row, contents, form.pool())


def _gather(store, count, form):
    """All images of an on-demand store, (N, C, H, W) uint8, a piece at a time."""
    pixels = torch.empty(count, *form.shape, dtype=torch.uint8)
    with store.pool:
        for rows in torch.arange(count).split(256 * form.workers):
            pixels[rows[0] : rows[-1] + 1] = store.take(rows)
    return pixels
