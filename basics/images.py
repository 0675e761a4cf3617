"""Pictures and arrays out of files: what a file claims to hold is checked before it is unpacked.

Pictures become 8-bit PIL images in their mode; arrays come from NumPy's .npy and .npz files, without pickles.
"""

import dataclasses
import functools
import math
import os
import stat
import warnings
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from PIL import Image

MOST_BYTES = 2 << 30  # a larger file is no picture

_UNREAD_FORMATS = {
    "EPS",
    "WMF",
    "BUFR",
    "GRIB",
    "HDF5",
    "MPEG",
}  # Pillow names them, but draws them with other programs

_WEAK_FORMATS = {"TGA", "IM", "IMT", "IPTC", "SPIDER", "MSP", "FLI", "PCX", "GBR"}  # other files can look like these
_HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
_ORIENTATION = 0x0112  # the EXIF tag


# ---------------------------------------------------------------------------------------------------- the bytes


def read_file(path):
    """A file's bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file (a pipe would make the reader wait for ever) or too large for a picture.
    """
    status = Path(path).stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > MOST_BYTES:
        raise ValueError(f"too large for a picture, {status.st_size / 1e9:.1f} GB")
    return Path(path).read_bytes()


def reason(error):
    """Why a file cannot be used, as one line of bounded length."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "a folder, not a file"
    if type(error).__name__ == "DecompressionBombError":
        millions = 2 * _pillow().MAX_IMAGE_PIXELS // 1_000_000
        return f"more than {millions} million pixels; make a smaller copy of it and use that"
    return first_line(error)


def first_line(error):
    """An error's message as one line of bounded length."""
    return " ".join(str(error).split())[:200] or type(error).__name__


# ------------------------------------------------------------------------------------------------------ pictures


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A picture out of a file.

    Attributes:
        picture: a PIL image of 8 bits a channel.
        deepest: the largest value of a 16-bit file before it was scaled to 8 bits, 0..65535 (of colour, to the next
            256 below); None for other files.
    """

    picture: object
    deepest: int | None = None


def decode(data, ending="", own=True):
    """The picture in a file's bytes; the first of an animated one.  16-bit values are scaled by 1/257, not clipped.

    Args:
        data: the bytes.  What they hold decides, not the ending; Pillow's guard against decompression bombs is on.
        ending: the file's, `.tga`: formats that other files can look like by chance are believed only with theirs.
        own: treat it as a user's own picture: turned as the camera noted (EXIF), transparent parts laid on white.
            Otherwise both are ignored, as in the published code.

    Returns:
        Decoded: the picture in the mode it has, or RGB where it was laid on white.

    Raises:
        OSError, ValueError and whatever else Pillow's decoders raise: damaged or unsupported.
    """
    image = open_picture(data, ending)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    deep = ";16" in str(image.tile)
    image.load()
    if image.mode.startswith("I"):
        picture, deepest = _from_16_bits(image, own)
    else:
        picture, deepest = image, None
        if deep:  # colour of 16 bits a channel, of which Pillow keeps the upper 8
            extrema = image.getextrema()
            deepest = 256 * max(high for _, high in (extrema if isinstance(extrema[0], tuple) else [extrema]))
    if own:
        picture = upright(on_white(picture), image)
    return Decoded(picture, deepest)


def open_picture(data, ending=""):
    """A PIL image of a file's bytes, of which the header alone was read; see `decode`."""
    pillow = _pillow()
    try:
        image = pillow.open(BytesIO(data))
    except pillow.UnidentifiedImageError as error:
        raise ValueError(_unidentified(data)) from error
    weak = image.format in _WEAK_FORMATS and pillow.registered_extensions().get(ending.lower()) != image.format
    if weak or image.format in _UNREAD_FORMATS:
        raise ValueError(_unidentified(data))
    return image


def _unidentified(data):
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
        return "a HEIC picture; `pip install pillow-heif` lets this program read it, or save it as JPEG"
    if data[:2] == b"\xff\x0a" or data[4:8] == b"JXL ":
        return "a JPEG XL picture, which is not read; save it as PNG"
    return "not an image, or damaged"


@functools.cache
def _pillow():
    """Pillow, with the reader of HEIC where that is installed, and without the warning below its limit of pixels."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        pass
    else:
        register_heif_opener()
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    return Image


def _from_16_bits(image, own):
    """A grey picture of 16 or 32 bits as (one of 8 bits, its largest value)."""
    values = np.array(image).astype(np.int64)  # (H, W)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels have no known range")
    deepest = int(values.max())
    if own and isinstance(image.info.get("transparency"), int):  # the one value that is transparent
        values[values == image.info["transparency"]] = 65535
    return _pillow().fromarray(((values + 128) // 257).astype(np.uint8)), deepest


def upright(picture, source=None):
    """A PIL image turned and mirrored as the camera's note says (EXIF orientation, of `source` or of itself)."""
    transpose = _pillow().Transpose
    turns = {
        2: transpose.FLIP_LEFT_RIGHT,
        3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE,
        6: transpose.ROTATE_270,
        7: transpose.TRANSVERSE,
        8: transpose.ROTATE_90,
    }
    try:
        turn = turns.get((source or picture).getexif().get(_ORIENTATION))
    except Exception:  # damaged notes can fail anywhere inside their reader; the pixels are whole
        turn = None
    return picture if turn is None else picture.transpose(turn)


def on_white(picture):
    """A PIL image of 8 bits laid on white, RGB; itself if none of it is transparent."""
    if not picture.has_transparency_data:
        return picture
    picture = picture.convert("RGBA")
    if picture.getextrema()[3][0] == 255:
        return picture.convert("RGB")
    return _pillow().alpha_composite(_pillow().new("RGBA", picture.size, "white"), picture).convert("RGB")


# -------------------------------------------------------------------------------------------------------- arrays


def array_headers(path):
    """What an .npy or .npz file says it holds: {name: (shape, dtype)}; the name of the only array of an .npy is ''.

    Nothing is unpacked; what the file's ending is does not matter.

    Raises:
        ValueError: an array is of Python objects, or the file does not hold the bytes that its header claims.
        OSError, zipfile.BadZipFile and other errors: the file is damaged.
    """
    if not _is_zip(path):
        with Path(path).open("rb") as file:
            return {"": _header(file, Path(path).stat().st_size)}
    headers = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename.endswith(".npy"):
                with archive.open(member) as file:
                    headers[member.filename.removesuffix(".npy")] = _header(file, member.file_size)
    return headers


def array_names(path):
    """The names of the arrays of an .npz file, or [''] for an .npy file."""
    if not _is_zip(path):
        return [""]
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def read_array(path, name="", most=None):
    """One array of an .npy file (memory-mapped) or of an .npz file.

    Args:
        path: the file.
        name: one of `array_names`.
        most: bytes that it may have, by default as many as the machine has memory, and, where it is packed, 2 GB or
            a hundred times its packed size: what inflates more is no array of images.

    Raises:
        ValueError: it has more, and as `array_headers`.
    """
    if not _is_zip(path):
        with Path(path).open("rb") as file:
            shape, dtype = _header(file, Path(path).stat().st_size)
        _within(math.prod(shape) * dtype.itemsize, most)
        return np.load(path, mmap_mode="r", allow_pickle=False)
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        _within(member.file_size, _memory() if most is None else most)
        _within(member.file_size, max(MOST_BYTES, 100 * member.compress_size))
        with archive.open(member) as file:
            _header(file, member.file_size)
    with np.load(path, allow_pickle=False) as arrays:
        return arrays[name]


def _within(size, most):
    if most is not None and size > most:
        raise ValueError(f"it unpacks to {size / 1e9:.1f} GB, more than the {most / 1e9:.1f} GB that it may have here")


def _is_zip(path):
    with Path(path).open("rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


def _header(file, size):
    """(shape, dtype) of an array's file of `size` bytes, from its beginning."""
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if any(edge < 0 for edge in shape) or math.prod(shape) * dtype.itemsize > size - file.tell():
        raise ValueError("it is cut off: it does not hold the bytes that its header claims")
    return shape, dtype


def _memory():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
