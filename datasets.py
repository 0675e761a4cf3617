"""One table of data sets and one loader, for training and for reconstruction.

A source is the name of a known data set, a folder of images, a txt list of image paths, or a NumPy file of images.
`load` turns any of them into an `ImageSet`: uint8 images of one size, kept in memory while they are few and decoded
on demand by worker threads otherwise (Pillow releases the interpreter's lock while it decodes and resizes).
`TrainingBatches` and `in_order` feed a network from it.
"""

import dataclasses
import functools
import hashlib
import os
import re
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

import noise
from console import UserError, download_timeout, progress, warn

IN_MEMORY_BYTES = 2 << 30  # up to here a set of decoded images is held as one uint8 tensor, on the device in training
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_PREFETCHED_STEPS = 3  # training batches that threads decode ahead of the step that asks for them
_NAMED_FAILURES = 20  # unusable files named in warnings; ImageSet.skipped has them all
_FAILURES_IN_A_ROW = 100  # files after which training takes the disk to be the trouble, not the files


# ----------------------------------------------------------------------------------------------- the image set


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size, in the order of their source.

    Attributes:
        name: stable identity, the key of the noise: the table's name, or the stem of the file or folder.
        positions: (N,) int64, each usable image's index in its whole source, so that a file which cannot be used
            changes nothing about the others.
        skipped: (path, reason) of the files that cannot be used; grows while a set that was not checked is read.
        shape: (C, H, W).
        store: holds the pixels, see `_Memory` and `_OnDemand`.
        native: the smallest height or width of any of the images before they got their size (but after a named
            set's own cut); None where the files were not checked.
        through: pixels an edge that all images were reduced to before they got their size, or None.
    """

    name: str
    positions: torch.Tensor
    skipped: list
    shape: tuple
    store: object
    native: int | None = None
    through: int | None = None

    def __len__(self):
        return len(self.positions)

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
        """Content identity `name:count:hash`: of the pixels in memory, else of the files' names, sizes and the crop."""
        digest = hashlib.blake2b(repr((self.name, self.shape, self.positions.tolist())).encode(), digest_size=8)
        self.store.hash_into(digest)
        return f"{self.name}:{len(self)}:{digest.hexdigest()}"


@dataclasses.dataclass(frozen=True, eq=False)
class _Memory:
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
        identity: text that changes with the content, for the fingerprint.
        pool: the threads.
    """

    decode: Callable
    identity: Callable
    pool: ThreadPoolExecutor

    def take(self, indices):
        return torch.stack([future.result() for future in self.submit(indices)])

    def submit(self, indices):
        """Starts decoding; a list of futures of (C, H, W) uint8."""
        return [self.pool.submit(self.decode, row) for row in indices.tolist()]

    def hash_into(self, digest):
        digest.update(self.identity().encode())


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
    """Loads any source of images.

    torchvision's sets and arrays of 28x28 grey images are resized with `resize_bilinear`; all other images become RGB
    and go through `crop` (which leaves images of the right size as they are).  Grey images get equal channels.

    Args:
        source: a name in DATASETS (case and underscores do not matter; `LSUN:bedroom` names a category), else a path:
            a folder (searched recursively, in sorted order), a `.txt` list (one path a line, relative to the list's
            folder or else the current one; blank lines and those starting with # are ignored), or uint8 images
            (N, H, W) or (N, H, W, 1 | 3 | 4) in `file.npy`, `file.npz` or, of several arrays, `file.npz:name`.
        split: 'train' or 'test'; matters for named sets only.
        image_size: H = W of the result, in pixels.
        num_channels: 3, or 1 for grey (ITU-R 601-2 luma, as Pillow's mode L).
        data_root: where named sets lie; torchvision's are downloaded to it on demand, for the others see `_find`.
        center_crop: False resizes files and arrays bicubically to image_size x image_size, whatever their proportions,
            instead of the crop (and of a named set's own cut); as published.
        max_images: take only the first so many usable images.
        workers: decoding threads, by default one a processor up to 32; the images do not depend on it.
        category: of a set that has categories, where `source` names none.
        through: pixels an edge that every image is reduced to first, in the way described above; it then gets its
            size by `resize_bilinear`, whatever the source.  So the images of two sources come out equally sharp, if
            no image is smaller than that in either (see `ImageSet.native`).
        check: False does not decode the files of a set too large for memory once beforehand: one that turns out to be
            unusable is named when it is met, and the next usable one stands in for it.

    Returns:
        ImageSet: images (N, C, H, W) uint8.

    Raises:
        UserError: unknown source, failed download, damaged file, no usable image, or options out of range.
    """
    if split not in ("train", "test"):
        raise UserError(f"unknown split '{split}'; choose one of: train, test")
    if num_channels not in (1, 3):
        raise UserError(f"images have 3 channels or 1 (grey), not {num_channels}; change config.data.num_channels")
    if image_size < 1 or (max_images is not None and max_images < 1):
        raise UserError(f"image size {image_size} and --max_images {max_images} must be at least 1")
    form = _Form(image_size, num_channels, center_crop, workers or _processors(), max_images, through, check)
    images = _load_source(str(source), split, Path(data_root), category, form)
    if through is None:  # else it was loaded before, to learn its resolution
        _name_skipped(images)
    return images


def has_test_split(source, data_root, category=None):
    """Whether a source is a named data set, whose test images are others than those to train on; see `load`."""
    own = os.path.exists(source) and Path(source).resolve().parent != Path(data_root).resolve()  # noqa: PTH110
    return not own and _named(source, category) is not None


def part(images, indices):
    """Some images of a set as a set of its own.

    Args:
        images: an ImageSet; of one that was not checked, an unusable file's stand-in may come from the other part.
        indices: (B,) int64, which, in their order.

    Returns:
        ImageSet.
    """
    in_memory = isinstance(images.store, _Memory)
    store = _Memory(images.store.take(indices)) if in_memory else _Part(images.store, indices)
    return dataclasses.replace(images, positions=images.positions[indices], store=store)


def _load_source(source, split, data_root, category, form):
    if named := _named(source, category):
        key, name = named
        if isinstance(DATASETS[key], _Torchvision):
            return _small_images(name, _planes(_torchvision_pixels(name, split, data_root)[: form.max_images]), form)
        return _load_files(name, *_find(name, split, data_root), dataclasses.replace(form, cut=DATASETS[key].cut))
    if (array := _ARRAY_SOURCE.fullmatch(source)) and Path(array["path"]).is_file():
        return _load_array(Path(array["path"]), array["name"], form)
    if source and Path(source).is_dir():  # Path("") would be the current folder
        return _load_files(_stem(source), *_folder_files(Path(source)), form)
    if source.lower().endswith(".txt") and Path(source).is_file():
        return _load_files(_stem(source), *_listed_files(Path(source)), form)
    raise UserError(
        f"unknown data set '{source}'; choose one of: {', '.join(DATASETS)}; or give the path of an existing folder of "
        "images, .txt list of image paths, or .npz or .npy file of images"
    )


def _name_skipped(images):
    for label, reason in images.skipped[:_NAMED_FAILURES]:
        warn(f"'{images.name}': {label} is left out: {reason}")
    if len(images.skipped) > _NAMED_FAILURES:
        more = len(images.skipped) - _NAMED_FAILURES
        warn(f"'{images.name}': {more} more images are left out; {len(images)} are used")


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

    @property
    def shape(self):
        return (self.num_channels, self.image_size, self.image_size)

    @property
    def treatment(self):
        """What besides its shape tells how an image is treated, for fingerprints."""
        return self.center_crop, self.cut, self.through

    def fits_in_memory(self, count):
        return count * self.num_channels * self.image_size**2 <= IN_MEMORY_BYTES

    def pool(self):
        return ThreadPoolExecutor(self.workers, thread_name_prefix="decode")

    def prepare(self, picture):
        """A PIL image cut to the part that is used of it."""
        return cut_centre(picture, self.cut) if self.cut and self.center_crop else picture

    def pixels(self, picture):
        """A prepared PIL image as (C, H, W) uint8."""
        import numpy as np

        size = self.through or self.image_size
        if self.center_crop:
            picture = crop(picture, size)
        else:
            picture = picture.convert("RGB").resize((size, size), _filters().BICUBIC)
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
    import torchvision

    entry = DATASETS[name]
    flag = {entry.split_flag: split if entry.split_flag == "split" else split == "train"}
    try:
        with download_timeout():  # torchvision sets none of its own
            return torch.as_tensor(getattr(torchvision.datasets, name)(str(data_root), download=True, **flag).data)
    except ImportError:
        raise
    except Exception as error:  # a refused connection, a full disk, a damaged file: torchvision raises all sorts
        raise UserError(
            f"{name} can neither be read from {data_root} nor downloaded to it ({_first_line(error)}); fetch "
            f"{entry.url.format(split=split)} by hand into {Path(data_root, entry.folder)}, deleting what is damaged "
            "there, or give another folder with --data_root"
        ) from error


def _planes(stored):
    """Images uint8 (N, H, W), (N, H, W, 1 | 3 | 4) or (N, 3, H, W) as (N, 1 | 3, H, W); transparency is dropped."""
    if stored.ndim == 3:
        return stored[:, None]
    if stored.shape[-1] in (1, 3, 4):
        return stored[..., :3].permute(0, 3, 1, 2).contiguous()
    return stored


def _small_images(name, pixels, form):
    """A set of which all images are there in their own size, (N, 1 | 3, H, H) uint8."""
    native = pixels.shape[-1]
    if form.through is not None:
        pixels = _crop_all(pixels, form.through)

    def finish(pixels):  # (B, 1 | 3, H, H) to (B, 1 | C, image_size, image_size)
        pixels = resize_bilinear(pixels, form.image_size)
        return to_grey(pixels) if pixels.shape[1] > form.num_channels else pixels

    def identity():
        return repr((form.treatment, hashlib.blake2b(pixels.contiguous().numpy(), digest_size=8).hexdigest()))

    if form.fits_in_memory(len(pixels)):
        store = _Memory(finish(pixels))
    else:
        store = _OnDemand(lambda row: finish(pixels[row : row + 1])[0], identity, form.pool())
    return ImageSet(name, torch.arange(len(pixels)), [], form.shape, store, native, form.through)


def _crop_all(pixels, size):
    """`crop` of each of (N, 1 | 3, H, H) uint8: (N, 1 | 3, size, size) uint8."""
    import numpy as np
    from PIL import Image

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
        return _folder_files(whole)
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
    places = [(_listed_files, data_root / f"{name}_{split}.txt")]
    places += [(_folder_files, data_root / name / folder) for folder in _SPLIT_FOLDERS[split]]
    for reader, path in places:
        if path.exists():
            return reader, path
    if name == "CelebA" and (data_root / "celeba" / _CELEBA_PARTITION).is_file():
        return _celeba_files, data_root / "celeba", split
    return None


def _celeba_files(folder, split):
    """The images of a split of CelebA as published: `000001.jpg 0` a line, 0 train, 1 validation, 2 test."""
    number = {"train": "0", "test": "2"}[split]
    rows = [line.split() for line in _lines(folder / _CELEBA_PARTITION)]
    labels = [row[0] for row in rows if row[1:] == [number]]
    if not labels:
        raise UserError(f"{folder / _CELEBA_PARTITION} names no image of the {split} split; copy it again")
    return labels, [folder / "img_align_celeba" / label for label in labels]


def _folder_files(folder):
    """Labels (paths below the folder) and full paths of its images, sorted; links to folders are followed once."""

    def refuse(error):
        raise UserError(f"folder {error.filename} cannot be listed ({error.strerror}); change its permissions")

    paths, seen = [], set()
    for parent, below, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        paths += [Path(parent, name) for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise UserError(f"folder {folder} holds no images ({', '.join(IMAGE_SUFFIXES)}); check the path")
    labels = sorted(path.relative_to(folder).as_posix() for path in paths)
    return labels, [Path(folder, label) for label in labels]


def _listed_files(path):
    """Labels (the lines) and full paths of a txt list."""
    labels = _lines(path)
    if not labels:
        raise UserError(f"list {path} names no images; write one image path a line")
    beside = [Path(path.parent, label) for label in labels]
    return labels, [
        full if os.path.exists(full) or not os.path.exists(label) else Path(label)  # noqa: PTH110 (never raises)
        for label, full in zip(labels, beside, strict=True)
    ]


def _lines(path):
    """The lines of a text file, stripped, without blank ones and those starting with #."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"list {path} cannot be read as text ({_first_line(error)})") from error
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _load_files(name, labels, paths, form):
    """Decodes every file once, to learn which are usable and, where they are few, to keep their pixels."""
    limit = min(len(paths), form.max_images or len(paths))
    if not form.check and not form.fits_in_memory(limit):
        skipped = []
        store = _OnDemand(_standing_in(name, labels, paths[:limit], form, skipped), None, form.pool())
        return ImageSet(name, torch.arange(limit), skipped, form.shape, store, through=form.through)
    rows, skipped, sizes, pixels = _scan(labels, paths, limit, form)
    if not rows:
        label, reason = skipped[0]
        raise UserError(f"none of the {len(skipped)} images of '{name}' is usable; the first, {label}: {reason}")
    store = _Memory(pixels) if pixels is not None else _files_on_demand(rows, labels, paths, form)
    return ImageSet(name, torch.tensor(rows), skipped, form.shape, store, min(sizes), form.through)


def _scan(labels, paths, limit, form):
    """Decodes the files until `limit` usable ones are found, in pieces: so many images at most wait in memory.

    Returns:
        rows of the usable files, (label, reason) of the others, the usable ones' short sides, and their pixels
        (N, C, H, W) uint8 or None if those are too many.
    """
    pixels = torch.empty(limit, *form.shape, dtype=torch.uint8) if form.fits_in_memory(limit) else None

    def attempt(row):
        try:
            picture = form.prepare(decode_file(paths[row]))
            image = form.pixels(picture)
            return min(picture.size), (image if pixels is not None else None), None
        except Exception as error:  # a damaged file can fail anywhere inside its decoder
            return None, None, _reason(error)

    rows, skipped, sizes, start = [], [], [], 0
    with form.pool() as pool, progress(total=limit, desc="checking images", unit="image", leave=False) as bar:
        while start < len(paths) and len(rows) < limit:
            piece = range(start, min(start + min(16 * form.workers, limit - len(rows)), len(paths)))
            for row, (size, image, reason) in zip(piece, pool.map(attempt, piece), strict=True):
                if reason is not None:
                    skipped.append((labels[row], reason))
                    continue
                if pixels is not None:
                    pixels[len(rows)] = image
                rows.append(row)
                sizes.append(size)
            start = piece.stop
            bar.update(len(rows) - bar.n)
    return rows, skipped, sizes, None if pixels is None else pixels[: len(rows)]


def _files_on_demand(rows, labels, paths, form):
    def decode(index):
        path = paths[rows[index]]
        try:
            return form.pixels(form.prepare(decode_file(path)))
        except Exception as error:  # as in _scan: it was usable when the set was loaded
            raise UserError(f"image {path} can no longer be read ({_reason(error)}); put it back") from error

    def identity():
        return repr((form.treatment, [(labels[row], paths[row].stat().st_size) for row in rows]))

    return _OnDemand(decode, identity, form.pool())


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

    def decode(index):
        for further in range(min(_FAILURES_IN_A_ROW, len(paths))):
            row = (index + further) % len(paths)
            try:
                return form.pixels(form.prepare(decode_file(paths[row])))
            except Exception as error:  # as in _scan
                note(row, _reason(error))
                last = error
        raise UserError(
            f"{further + 1} images of '{name}' in a row cannot be read, the last {paths[row]} ({_reason(last)}); "
            "check the disk they are on"
        ) from last

    return decode


def decode_file(path):
    """An image file as a PIL image of 8 bits a channel, in the mode it has.

    The first frame of an animated image; 16-bit grey is scaled to 8 bits by 1/257, not clipped.  As in the published
    code the orientation that a camera noted (EXIF) is not applied.  Pillow's guard against decompression bombs is on.

    Raises:
        OSError, ValueError and whatever else Pillow's decoders raise: the file is missing, damaged or unsupported.
    """
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        if not image.mode.startswith("I"):
            image.load()  # the pixels outlive the file, which closes here
            return image
        values = np.array(image).astype(np.int64)  # (H, W), 16 or 32 bits
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels have no known range")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def crop(picture, size):
    """The published crop of listed images, that of guided diffusion (Dhariwal and Nichol, arXiv 2105.05233).

    Halves with a box filter while the short side is at least twice `size`, resizes bicubically so that the short side
    is `size`, and takes the centre square.  Grey, palette and CMYK pictures become RGB; transparency is dropped, not
    composited.

    Args:
        picture: a PIL image of any 8-bit mode.
        size: pixels an edge of the result.

    Returns:
        Image: RGB, size x size.
    """
    filters = _filters()
    picture = picture.convert("RGB")
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), filters.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), filters.BICUBIC)
    return cut_centre(picture, size)


def cut_centre(picture, edge):
    """The central square of a PIL image, `edge` pixels an edge or as many as it has."""
    edge = min(edge, *picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    return picture.crop((left, top, left + edge, top + edge))


def _filters():
    from PIL import Image

    return Image.Resampling


def _reason(error):
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "a folder, not a file"
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image, or damaged"
    return _first_line(error)


def _first_line(error):
    """An error's message as one line of bounded length."""
    return " ".join(str(error).split())[:200] or type(error).__name__


# ------------------------------------------------------------------------------------------------------ arrays

_ARRAY_SOURCE = re.compile(r"(?P<path>.+\.np[yz])(:(?P<name>[^/:]+))?", re.IGNORECASE)


def _load_array(path, array_name, form):
    values = _read_array(path, array_name)[: form.max_images]  # (N, H, W) or (N, H, W, C) uint8
    name = f"{_stem(path)}_{array_name}" if array_name else _stem(path)
    like_mnist = values.shape[1:] in ((28, 28), (28, 28, 1))
    if like_mnist or (values.shape[1:3] == form.shape[1:] and form.fits_in_memory(len(values))):
        return _small_images(name, _planes(torch.tensor(values)), form)
    store = _array_on_demand(values, path, form)
    if form.fits_in_memory(len(values)):
        store = _Memory(_gather(store, len(values), form))
    native = min(values.shape[1:3])
    return ImageSet(name, torch.arange(len(values)), [], form.shape, store, native, form.through)


def _read_array(path, array_name):
    """The array, memory-mapped where its format allows."""
    import numpy as np

    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return _checked_array(loaded, path)
        with loaded as arrays:
            names = arrays.files
            if array_name is None and len(names) == 1:
                array_name = names[0]
            if array_name not in names:
                raise UserError(f"{path} holds the arrays {', '.join(names)}; choose one, as in {path}:{names[0]}")
            return _checked_array(arrays[array_name], path)
    except UserError:
        raise
    except Exception as error:  # a damaged file can fail anywhere inside the reader
        raise UserError(f"{path} is damaged or holds no plain arrays ({_first_line(error)})") from error


def _checked_array(values, path):
    images = values.ndim == 3 or (values.ndim == 4 and values.shape[-1] in (1, 3, 4))
    if not images or str(values.dtype) != "uint8" or 0 in values.shape:
        shape = "x".join(map(str, values.shape))
        raise UserError(f"{path} holds {values.dtype} of shape {shape}; images are uint8 of shape (N, H, W[, 3])")
    return values


def _array_on_demand(values, path, form):
    import numpy as np
    from PIL import Image

    def decode(index):
        row = np.asarray(values[index])
        return form.pixels(Image.fromarray(row[..., 0] if row.shape[2:] == (1,) else row))

    return _OnDemand(decode, lambda: repr((form.treatment, values.shape, path.stat().st_size)), form.pool())


def _gather(store, count, form):
    """All images of an on-demand store, (N, C, H, W) uint8, a piece at a time."""
    pixels = torch.empty(count, *form.shape, dtype=torch.uint8)
    with store.pool:
        for rows in torch.arange(count).split(256 * form.workers):
            pixels[rows[0] : rows[-1] + 1] = store.take(rows)
    return pixels


# ------------------------------------------------------------------------------------------------------ ranges


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


# ------------------------------------------------------------------------------------------------------- feeds


class TrainingBatches:
    """Shuffled batches for training: `batch(step)` is a pure function of (seed, step), so a run resumes at any step.

    Every epoch has an order of its own, drawn from the key (seed, epoch); the images left over at its end are dropped.
    A set in memory of up to IN_MEMORY_BYTES lives on the device as uint8 and is gathered, flipped and scaled there.
    Batches of a larger one are decoded by threads some steps ahead.  Order and flips are the same on every device;
    dequantisation draws on the device, so its noise differs between CPU and GPU.

    Args:
        images: the ImageSet.
        batch_size: B.
        seed: of the order, the flips and the dequantisation.
        device: where batches go.
        random_flip: mirror each image with probability 1/2.
        uniform_dequantization: see `dequantize`.
        centered: range [-1, 1] instead of [0, 1].
        share: the slice of each batch that is made, as the whole batch would have it; B is then its length.

    Raises:
        UserError: a batch larger than the data set, or below 1.
    """

    def __init__(
        self, images, batch_size, *, seed, device, random_flip, uniform_dequantization, centered, share=slice(None)
    ):
        if not 1 <= batch_size <= len(images):
            raise UserError(f"a batch of {batch_size} cannot be taken from the {len(images)} images of '{images.name}'")
        self.images, self.batch_size, self.seed, self.device = images, batch_size, seed, torch.device(device)
        self.share = share
        self.random_flip, self.uniform_dequantization, self.centered = random_flip, uniform_dequantization, centered
        self.batches_per_epoch = len(images) // batch_size
        self._orders = {}  # epoch -> its order, for the two epochs last asked for
        self._ahead = {}  # step -> futures of its images
        weakref.finalize(self, _cancel, self._ahead)  # or the interpreter would decode them before it exits
        self._pixels = None
        if isinstance(images.store, _Memory):
            pixels = images.store.pixels
            self._pixels = pixels.to(self.device) if pixels.nbytes <= IN_MEMORY_BYTES else pixels

    def batch(self, step):
        """The batch of step 0, 1, 2, ...: (B, C, H, W) float32 on the device, in the model's range."""
        images = self._gather(step).to(self.device, non_blocking=True)  # (B, 1 or C, H, W) uint8
        if self.random_flip:
            chances = torch.rand(self.batch_size, generator=noise.generator(self.seed, "flip", step))
            images = _mirror(images, chances[self.share] < 0.5)
        images = images.expand(-1, *self.images.shape)  # (B, C, H, W)
        if self.uniform_dequantization:
            generator = noise.generator(self.seed, "dequantize", step, device=self.device)
            images = dequantize(to_model_range(images, centered=False), generator, self.batch_size, self.share)
        return to_model_range(images, self.centered).contiguous()

    def _gather(self, step):
        if self._pixels is not None:
            return self._pixels.index_select(0, self._rows(step))
        wanted = range(step, step + _PREFETCHED_STEPS + 1)
        _cancel(self._ahead, wanted)
        for ahead in wanted:
            if ahead not in self._ahead:
                self._ahead[ahead] = self.images.store.submit(self._rows(ahead))
        return torch.stack([future.result() for future in self._ahead.pop(step)])

    def _rows(self, step):
        """(B,) int64: which images step `step` sees, on the device where they are gathered."""
        epoch, turn = divmod(step, self.batches_per_epoch)
        if epoch not in self._orders:
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]  # the oldest
            order = torch.randperm(len(self.images), generator=noise.generator(self.seed, "order", epoch))
            self._orders[epoch] = order if self._pixels is None else order.to(self._pixels.device)
        return self._orders[epoch][turn * self.batch_size : (turn + 1) * self.batch_size][self.share]


def _mirror(images, chosen):
    """Images (B, C, H, W), those where `chosen` (B,) bool on the CPU is set mirrored left to right."""
    rows = torch.arange(len(images)) + len(images) * chosen
    both = torch.cat([images, images.flip(-1)])  # (2B, C, H, W): whole rows are picked faster than pixels are
    return both.index_select(0, rows.to(images.device, non_blocking=True))


def _cancel(ahead, wanted=()):
    """Gives up the batches under way (step -> futures) of steps that are not wanted."""
    for step in [step for step in ahead if step not in wanted]:
        for future in ahead.pop(step):
            future.cancel()


def in_order(images, batch_size, device, centered):
    """Yields the images in order, (B, C, H, W) float32 on `device` in the model's range; the last batch may be smaller.

    Args:
        images: an ImageSet.
        batch_size: B.
        device: where batches go.
        centered: range [-1, 1] instead of [0, 1].
    """
    for start in range(0, len(images), batch_size):
        yield to_model_range(images.read(start, start + batch_size).to(device), centered)
