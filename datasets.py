"""One table of data sets and one loader, for training and for reconstruction.

A source is a name in DATASETS (case and underscores do not matter; `LSUN:bedroom` names a category), else a path: a
folder (searched recursively, in sorted order), a `.txt` list (one path a line, relative to the list's folder or else
the current one; blank lines and those starting with # are ignored), one image file, or uint8 or bool images (N, H, W),
(N, H, W, 1 | 3 | 4) or (N, 1 | 3, H, W) in `file.npy`, `file.npz` or, of several arrays, `file.npz:name`.  A path that
exists wins over a name.

`load` turns any of them into a `basics.image_sets.ImageSet`: uint8 images of one size, kept in memory while they are
few and decoded on demand by worker threads otherwise (Pillow releases the interpreter's lock while it decodes and
resizes).
"""

import dataclasses
import os
import re
from pathlib import Path

import torch
from PIL import Image

from basics.console import UserError, are, counted, warn
from basics.files import expand_home
from basics.image_arrays import IN_MEMORY, load_array_file, load_memory, load_pictures, load_small_images
from basics.image_files import NAMED_FAILURES, load_files
from basics.image_lists import NOT_IMAGES, folder_files, lines_of, listed_files, say_once
from basics.image_sets import InMemory
from basics.images import first_line
from basics.machine import download_timeout
from basics.preparation import Preparation, processors

# --------------------------------------------------------------------------------------------------- the table


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
    reduced_to=None,
    check=True,
):
    """Loads any source of images; see above for what that may be.

    Args:
        source: a name or a path.
        split: 'train' or 'test'; matters for named sets only.
        image_size: H = W of the result, in pixels.
        num_channels: 3, or 1 for grey (ITU-R 601-2 luma, as Pillow's mode L).
        data_root: where named sets lie; torchvision's are downloaded to it on demand, for the others see `_find`.
        center_crop: False resizes files and arrays bicubically to image_size x image_size, whatever their proportions,
            instead of the crop (and of a named set's own cut); as published.  A user's own of 28x28 pixels are
            resized bilinearly either way, as MNIST's are.
        max_images: take only so many usable images, evenly spread.
        workers: decoding threads, by default one a processor up to 32; the images do not depend on it.
        category: of a set that has categories, where `source` names none.
        reduced_to: pixels an edge that every image is reduced to first, as it would be resized otherwise; it then gets
            its size by `resize_bilinear`, whatever the source.  So the images of two sources come out equally sharp,
            if no image is smaller than that in either (see `ImageSet.source_size`).
        check: False does not decode the files of a set too large for memory once beforehand: one that turns out to be
            unusable is named when it is met, and the next usable one stands in for it.

    Raises:
        UserError: unknown source, failed download, damaged file, no usable image, or options out of range; later, on
            reading a set too large for memory, a file or array that has changed.
    """
    _check_options(split, image_size, num_channels, max_images)
    workers = workers or processors()
    preparation = Preparation(image_size, num_channels, center_crop, workers, max_images, reduced_to, check)
    images = _load_source(expand_home(str(source)), split, Path(expand_home(str(data_root))), category, preparation)
    if reduced_to is None:  # else it was loaded before, to learn its resolution
        _warn_of(images)
    return images


def load_any(source, split="test", **options):
    """As `load`, also of images that are in memory.

    Args:
        source: as in `load`; or a tensor or array (N, H, W), (N, C, H, W) or (N, H, W, C) uint8, C 1 or 3; or a list of
            paths, or of PIL pictures; or one PIL picture.
        split, options: as in `load`.

    Raises:
        UserError: as `load`, or it is something else.
    """
    if isinstance(source, (str, Path)):
        return load(source, split=split, **options)
    options = {"center_crop": True, "max_images": None, "reduced_to": None, "check": True, **options}
    workers = options.pop("workers", None) or processors()
    for unused in ("data_root", "category"):
        options.pop(unused, None)
    preparation = Preparation(workers=workers, **options)
    if hasattr(source, "shape"):
        return load_memory("images", _tensor(source), preparation)
    source = _list(source)
    if source and all(isinstance(item, (str, Path)) for item in source):
        paths = [Path(expand_home(str(item))) for item in source]
        images = load_files("list", preparation, [str(item) for item in source], paths)
        _warn_of(images)
        return images
    return load_pictures("pictures", source, preparation)


def _tensor(source):
    try:
        return torch.as_tensor(source).cpu()
    except (TypeError, ValueError) as error:  # text, objects
        kind = getattr(source, "dtype", type(source).__name__)
        raise UserError(f"{IN_MEMORY}, not {kind}") from error


def _list(source):
    """The items of a list of images; a picture by itself is a list of one."""
    if isinstance(source, Image.Image):
        return [source]
    try:
        return list(source)
    except TypeError as error:
        raise UserError(
            f"images are a path, an array, a PIL picture, or a list of paths or pictures, not {type(source).__name__}"
        ) from error


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


def _load_source(source, split, data_root, category, preparation):
    is_file, is_folder = os.path.isfile(source), os.path.isdir(source)  # noqa: PTH112, PTH113 (they never raise)
    if named := _named_unless_path(source, data_root, category):
        return _load_named(*named, split, data_root, preparation)
    if (array := _ARRAY_SOURCE.fullmatch(source)) and os.path.isfile(array["path"]):  # noqa: PTH113
        name = _stem(array["path"]) + (f"_{array['name']}" if array["name"] else "")
        return load_array_file(name, Path(array["path"]), array["name"], preparation)
    if (is_file or is_folder) and source.replace("_", "").lower() in (key.lower() for key in DATASETS):
        say_once(f"'{source}' is taken for {Path(source).resolve()}; rename that to have the data set of this name")
    if is_folder:
        return load_files(_stem(source), preparation, *folder_files(Path(source)))
    if is_file and source.lower().endswith(".txt"):
        return load_files(_stem(source), preparation, *listed_files(Path(source)))
    if is_file and Path(source).suffix.lower() not in NOT_IMAGES:
        return load_files(_stem(source), preparation, [source], [Path(source)])
    kinds = "folder of images, image file, .txt list of image paths, or .npz or .npy file of images"
    names = f"choose one of: {', '.join(DATASETS)}"
    if is_file:
        raise UserError(f"{source} is no image by its ending; give a {kinds}")
    if os.path.lexists(source):
        raise UserError(f"{source} is neither a file nor a folder, or leads to none; give a {kinds}")
    if "/" in source:
        raise UserError(f"there is no file or folder '{source}'; give a {kinds}, or the name of a data set: {names}")
    raise UserError(f"unknown data set '{source}'; {names}; or give the path of an existing {kinds}")


def _warn_of(images):
    """Names the files that are left out, and warns of images of 0 and 1 alone, as masks and class numbers are."""
    for label, why in images.skipped[:NAMED_FAILURES]:
        warn(f"'{images.name}': {label} is left out: {why}")
    if len(images.skipped) > NAMED_FAILURES:
        more = len(images.skipped) - NAMED_FAILURES
        warn(f"'{images.name}': {counted(more, 'more image')} {are(more)} left out; used: {len(images):,}")
    if isinstance(images.store, InMemory) and images.store.pixels.max() == 1:
        warn(f"'{images.name}': no pixel is above 1 of 255, so all images are nearly black; multiply the values by 255")


_ARRAY_SOURCE = re.compile(r"(?P<path>.+\.np[yz])(:(?P<name>[^/:]+))?", re.IGNORECASE)


def _stem(source):
    path = Path(source).resolve()
    return path.stem if path.is_file() else path.name


# -------------------------------------------------------------------------------------------------- named sets


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


def _load_named(key, name, split, data_root, preparation):
    entry = DATASETS[key]
    preparation = dataclasses.replace(preparation, own=False, cut=getattr(entry, "cut", None))
    if isinstance(entry, _Torchvision):
        return load_small_images(name, _torchvision_pixels(name, split, data_root), preparation)
    return load_files(name, preparation, *_find(name, split, data_root))


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


def _find(name, split, data_root):
    """What `load_files` takes of the images of a set of files, from the first of these places below the data root.

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
