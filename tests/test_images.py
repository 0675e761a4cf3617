"""Files as what they are: pictures upright and on white, arrays that hold what they claim, one line for all others."""

import os
import struct
import sys
import types
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

import basics.images
from basics.images import _pillow, array_headers, array_names, decode, read_array, read_file, reason

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)  # (6, 9, 3)
ALPHA = np.zeros((6, 9), np.uint8)
ALPHA[:, :5] = 255
ALPHA[0] = 51  # a fifth


def written(picture, path, **options):
    picture.save(path, **options)
    return path.read_bytes()


# --------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_pictures_stand_upright(orientation, ending, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = written(Image.fromarray(COLOURS), tmp_path / f"x.{ending}", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / f"x.{ending}"))
    made = decode(data).picture
    assert made.size == ((6, 9) if orientation > 4 else (9, 6))
    assert np.array_equal(np.array(made), np.array(expected))


def test_deep_pictures_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    values = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)
    data = written(Image.fromarray(values), tmp_path / "x.png", exif=exif)
    expected = np.rot90((values.astype(int) + 128) // 257, -1)
    assert np.array_equal(np.array(decode(data).picture), expected)


def test_damaged_notes_leave_the_picture_as_it_is(tmp_path):
    data = written(Image.fromarray(COLOURS), tmp_path / "x.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff damaged")
    assert np.array_equal(np.array(decode(data).picture), COLOURS)


def test_named_sets_stay_as_published(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(np.dstack([COLOURS, ALPHA]))
    data = written(picture, tmp_path / "x.png", exif=exif)
    made = decode(data, own=False).picture
    assert np.array_equal(np.array(made.convert("RGB")), COLOURS)  # as without the notes, and without alpha


# -------------------------------------------------------------------------------------------------- transparency


def _on_white(colours, alpha):
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


def _palette(path):
    levels = Image.fromarray(np.arange(54, dtype=np.uint8).reshape(6, 9), "L").convert("P")
    levels.save(path, transparency=bytes(ALPHA.ravel()))
    return _on_white(np.arange(54).reshape(6, 9, 1).repeat(3, 2), ALPHA)


def _one_colour(path):
    Image.fromarray(COLOURS).save(path, transparency=tuple(int(part) for part in COLOURS[2, 3]))
    expected = COLOURS.copy()
    expected[2, 3] = 255
    return expected


def _grey_alpha(path):
    Image.merge("LA", [Image.fromarray(COLOURS[..., 0]), Image.fromarray(ALPHA)]).save(path)
    return _on_white(COLOURS[..., :1].repeat(3, 2), ALPHA)


def _colour_alpha(path):
    Image.fromarray(np.dstack([COLOURS, ALPHA])).save(path, **({"lossless": True} if path.suffix == ".webp" else {}))
    return _on_white(COLOURS, ALPHA)


def _deep_grey(path):
    values = np.full((6, 9), 4000, np.uint16)
    values[1, 1] = 9
    Image.fromarray(values).save(path, transparency=9)
    expected = np.full((6, 9, 1), (4000 + 128) // 257).repeat(3, 2)
    expected[1, 1] = 255
    return expected


TRANSPARENT = {
    "palette.png": _palette,
    "one_colour.png": _one_colour,
    "grey.png": _grey_alpha,
    "colour.png": _colour_alpha,
    "colour.tiff": _colour_alpha,
    "colour.webp": _colour_alpha,
    "deep.png": _deep_grey,
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_pixels_are_white(name, tmp_path):
    """Whatever colour is hidden under them: what one sees is what is used."""
    expected = TRANSPARENT[name](tmp_path / name)
    made = np.array(decode((tmp_path / name).read_bytes()).picture.convert("RGB"))
    assert np.abs(made - expected).max() <= 1
    assert (made[expected == 255] == 255).all()


def test_opaque_pictures_are_not_touched(tmp_path):
    data = written(Image.fromarray(np.dstack([COLOURS, np.full((6, 9), 255, np.uint8)])), tmp_path / "x.png")
    assert np.array_equal(np.array(decode(data).picture), COLOURS)


# ----------------------------------------------------------------------------------------------- what is no picture

FTYP = b"\0\0\0\x18ftyp"
NO_PICTURE = {
    "empty": (b"", "", "not an image, or damaged"),
    "text": (b"some words\n" * 50, "", "not an image, or damaged"),
    "heic": (FTYP + b"heic\0\0\0\0", ".heic", "pip install pillow-heif"),
    "heic called jpg": (FTYP + b"mif1\0\0\0\0", ".jpg", "pip install pillow-heif"),
    "jpeg xl": (b"\xff\x0a\0\0", ".jxl", "JPEG XL"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", ".eps", "not an image"),
    "not targa": (b"\0\0\x02" + b"\0" * 9 + b"\x09\0\x06\0\x18\0" + bytes(162), ".bin", "not an image"),
}


@pytest.mark.parametrize("name", NO_PICTURE)
def test_what_is_no_picture(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    data, ending, message = NO_PICTURE[name]
    with pytest.raises(ValueError, match=message):
        decode(data, ending)


def test_targa_needs_its_ending():
    data = NO_PICTURE["not targa"][0]
    assert decode(data, ".TGA").picture.size == (9, 6)


def test_the_reader_of_heic_is_used_where_it_is_there(monkeypatch):
    registered = []
    reader = types.SimpleNamespace(register_heif_opener=lambda: registered.append(True))
    monkeypatch.setitem(sys.modules, "pillow_heif", reader)
    _pillow.cache_clear()
    _pillow()
    _pillow.cache_clear()
    assert registered == [True]


def test_pipes_and_huge_files_are_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="not a regular file"):
        read_file(tmp_path / "pipe.png")
    (tmp_path / "large.png").write_bytes(bytes(2000))
    monkeypatch.setattr(basics.images, "MOST_BYTES", 1999)
    with pytest.raises(ValueError, match="too large for a picture"):
        read_file(tmp_path / "large.png")


def test_photos_with_too_many_pixels(tmp_path, monkeypatch):
    data = written(Image.new("L", (300, 100)), tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(Image.DecompressionBombError) as caught:
        decode(data)
    assert reason(caught.value) == "more than 0 million pixels; make a smaller copy of it and use that"


@pytest.mark.parametrize("ending", ["png", "tiff", "pgm"])
def test_the_largest_value_of_deep_pictures_is_told(ending, tmp_path):
    values = np.arange(54, dtype=np.uint16).reshape(6, 9) * 77  # up to 4081
    assert decode(written(Image.fromarray(values), tmp_path / f"x.{ending}")).deepest == 4081
    assert decode(written(Image.fromarray(COLOURS), tmp_path / "y.png")).deepest is None


def test_the_largest_value_of_deep_colour_pictures_is_told():
    """Pillow reads them, but keeps their upper 8 bits alone: 12-bit values come out below 16."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    values = np.full((2, 2, 3), 4095, ">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    made = decode(data)
    assert made.picture.mode == "RGB"
    assert made.deepest == 4095 // 256 * 256


# -------------------------------------------------------------------------------------------------------- arrays


def test_headers_are_read_without_the_arrays(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros((2, 3), np.uint8), b=np.ones(4, bool))
    np.save(tmp_path / "x.npy", np.zeros((5, 6), np.float32))
    assert array_headers(tmp_path / "x.npz") == {"a": ((2, 3), np.dtype("u1")), "b": ((4,), np.dtype("?"))}
    assert array_headers(tmp_path / "x.npy") == {"": ((5, 6), np.dtype("f4"))}
    (tmp_path / "x.npz").rename(tmp_path / "z.npy")  # the content decides
    assert array_names(tmp_path / "z.npy") == ["a", "b"]
    assert np.array_equal(read_array(tmp_path / "z.npy", "b"), np.ones(4, bool))


def _inflating(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        content = (path.parent / "x.npy").read_bytes()
        archive.writestr("x.npy", content)
    return path


def test_arrays_that_inflate_hugely_are_not_unpacked(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.zeros((1000, 100, 100), np.uint8))  # 10 MB, and 10 kB packed
    path = _inflating(tmp_path / "x.npz")
    assert read_array(path, "x").shape == (1000, 100, 100)  # while that is little
    monkeypatch.setattr(basics.images, "MOST_BYTES", 1 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(np, "load", None)  # it is not come to that
        with pytest.raises(ValueError, match=r"unpacks to 0\.0 GB, more than"):
            read_array(path, "x")
        with pytest.raises(ValueError, match="more than"):
            read_array(tmp_path / "x.npy", most=1000)


HEADERS = {"long": (10**6, 10**6), "endless": (10**30,), "negative": (-5, 4)}


@pytest.mark.parametrize("shape", HEADERS.values(), ids=HEADERS)
def test_headers_that_claim_more_than_there_is(shape, tmp_path):
    with (tmp_path / "x.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.write(bytes(1000))
    _inflating(tmp_path / "x.npz")
    for name in ("x.npy", "x.npz"):
        for read in (array_headers, lambda path: read_array(path, "x")):
            with pytest.raises(ValueError, match="cut off"):
                read(tmp_path / name)
