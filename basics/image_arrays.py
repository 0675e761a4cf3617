"""Sets of images that lie in an array, of an .npz or .npy file or in memory."""

import functools

import numpy as np
import torch
from PIL import Image

from basics.console import UserError
from basics.image_sets import SAMPLED, InMemory, OnDemand, content_digest
from basics.images import array_headers, array_names, first_line, on_white, read_array, upright
from basics.pixels import crop_all, resize_bilinear, to_grey
from basics.preparation import SMALL, spread

IN_MEMORY = "images in memory are (N, H, W), (N, 1 or 3, H, W) or (N, H, W, 1 or 3) uint8"


def load_array_file(name, path, array_name, preparation):
    """The set of the images in an .npz or .npy file; see `datasets.load`.

    Args:
        name: what the set is called.
        path: of the file.
        array_name: which of its arrays; None for the only one.
        preparation: a `Preparation`.

    Raises:
        UserError: the file is damaged, or the array cannot be images.
    """
    values = _read(path, array_name)  # (N, H, W) or (N, H, W, C), uint8 or bool
    rows = preparation.choose(name, len(values))
    like_mnist = values.shape[1:] in ((SMALL, SMALL), (SMALL, SMALL, 1))
    opaque = values.shape[3:] != (4,)
    fits = preparation.fits_in_memory(len(rows))
    if like_mnist or (values.shape[1:3] == preparation.shape[1:] and opaque and fits):
        return _small_images(name, torch.from_numpy(_as_bytes(_rows_of(values, rows)).copy()), preparation)
    store = _on_demand(values, rows, path, preparation)
    if fits:
        store = InMemory(_gather(store, len(rows), preparation))
    return preparation.image_set(name, len(rows), store, source_size=min(values.shape[1:3]))


def load_memory(name, stored, preparation):
    """The set of images in a tensor (N, H, W), (N, 1 | 3, H, W) or (N, H, W, 1 | 3) uint8.

    Raises:
        UserError: there are none, they are of other numbers or shapes, or (N, H, W) may be one image in colour.
    """
    if stored.ndim == 4 and stored.shape[1] not in (1, 3) and stored.shape[3] in (1, 3):
        stored = stored.permute(0, 3, 1, 2)
    grey = stored.ndim == 3
    if stored.dtype != torch.uint8 or not (grey or (stored.ndim == 4 and stored.shape[1] in (1, 3))):
        cast = "; write (255 * array).round() as uint8 if values are in 0..1" if stored.is_floating_point() else ""
        what = f"{str(stored.dtype).removeprefix('torch.')} {tuple(stored.shape)}"
        single = "; give one image as array[None]" if stored.ndim == 2 else ""
        raise UserError(f"{IN_MEMORY}, not {what}{cast}{single}")
    if not len(stored):
        raise UserError("there are no images; give at least one")
    if grey and (stored.shape[2] == 3 or (len(stored) == 3 and preparation.num_channels == 3)):
        raise UserError(f"images of shape {tuple(stored.shape)} may be one in colour; give (1, 3, H, W) for that")
    planes = stored[:, None] if grey else stored
    like_mnist = planes.shape[1:] == (1, SMALL, SMALL)
    if like_mnist or planes.shape[2:] == preparation.shape[1:]:
        return load_small_images(name, planes, preparation)  # as an array file of that size
    rows = planes.permute(0, 2, 3, 1).squeeze(3).contiguous().numpy()  # (N, H, W) or (N, H, W, 3)
    return load_pictures(name, [Image.fromarray(row) for row in rows], preparation)


def load_pictures(name, pictures, preparation):
    """The set of PIL pictures, treated as files of them would be.

    Raises:
        UserError: there are none, or something else is among them.
    """
    if not all(isinstance(picture, Image.Image) for picture in pictures):
        raise UserError("a list of images holds paths alone, or PIL pictures alone")
    if not pictures:
        raise UserError("there are no images; give at least one")
    chosen = [pictures[row] for row in preparation.choose(name, len(pictures))]
    pixels = torch.stack([preparation.pixels(on_white(upright(picture))) for picture in chosen])
    size = min(min(picture.size) for picture in chosen)
    return preparation.image_set(name, len(pixels), InMemory(pixels), source_size=size)


def load_small_images(name, stored, preparation):
    """The set of images that are all there in their own size.

    Args:
        name: what the set is called.
        stored: uint8 tensor (N, H, H), (N, H, H, 1 | 3) or (N, 3, H, H).
        preparation: a `Preparation`.
    """
    return _small_images(name, _rows_of(stored, preparation.choose(name, len(stored))), preparation)


def _small_images(name, stored, preparation):
    """A set of images uint8 (N, H, H), (N, H, H, 1 | 3) or (N, 3, H, H), resized as torchvision does it."""
    pixels = _planes(stored)
    source_size = pixels.shape[-1]
    if preparation.reduced_to is not None:
        pixels = crop_all(pixels, preparation.reduced_to)

    def finish(pixels):  # (B, 1 | 3, H, H) to (B, 1 | C, image_size, image_size)
        pixels = resize_bilinear(pixels, preparation.image_size)
        return to_grey(pixels) if pixels.shape[1] > preparation.num_channels else pixels

    if preparation.fits_in_memory(len(pixels)):
        store = InMemory(finish(pixels))
    else:
        contents = functools.partial(iter, [pixels.contiguous().numpy()])
        store = OnDemand(lambda row: finish(pixels[row : row + 1])[0], contents, preparation.pool())
    return preparation.image_set(name, len(pixels), store, source_size=source_size)


def _rows_of(values, rows):
    """Some rows of (N, ...), in order; the whole itself where those are all."""
    return values if len(rows) == len(values) else values[rows]


def _planes(stored):
    """Images uint8 (N, H, W), (N, H, W, 1 | 3) or (N, 3, H, W) as (N, 1 | 3, H, W)."""
    if stored.ndim == 3:
        return stored[:, None]
    if stored.shape[-1] in (1, 3):
        return stored.permute(0, 3, 1, 2).contiguous()
    return stored


# -------------------------------------------------------------------------------------- what a file's array can be


def _read(path, array_name):
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


# ------------------------------------------------------------------------------------------------- a row at a time


def _as_bytes(values):
    """uint8 or bool as uint8, False and True as 0 and 255."""
    return np.where(values, np.uint8(255), np.uint8(0)) if values.dtype == bool else np.asarray(values)


def _on_demand(values, rows, path, preparation):
    """The store of some rows of an array; once the fingerprint was made, a row that has changed is refused."""
    digests = {}  # index -> digest, of what is in the fingerprint

    def read(index):
        return np.array(values[rows[index]], order="C")  # a copy: what is checked is what is used

    def contents():
        yield repr((values.dtype.str, values.shape[1:])).encode()  # the same bytes can be other images
        for index in spread(len(rows), None if preparation.check else SAMPLED):
            digests[index] = content_digest(read(index))
            yield digests[index]

    def decode_row(index):
        row = read(index)
        if index in digests and content_digest(row) != digests[index]:
            raise UserError(
                f"image {rows[index]} of {path} was changed while it was in use; run the same command again"
            )
        row = _as_bytes(row)
        return preparation.pixels(on_white(Image.fromarray(row[..., 0] if row.shape[2:] == (1,) else row)))

    return OnDemand(decode_row, contents, preparation.pool())


def _gather(store, count, preparation):
    """All images of an on-demand store, (N, C, H, W) uint8, a piece at a time."""
    pixels = torch.empty(count, *preparation.shape, dtype=torch.uint8)
    with store.pool:
        for rows in torch.arange(count).split(256 * preparation.workers):
            pixels[rows[0] : rows[-1] + 1] = store.take(rows)
    return pixels
