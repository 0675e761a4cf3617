"""Inpainting masks: the Lift of Lift, Map, Detect.

A mask is (1, 1, S, S) float32, 1 at a known pixel and 0 at one to be filled, the same for every image of a batch.
Checkerboard and centre masks are those of LMD (arXiv 2302.10326); random ones those of SimMIM (arXiv 2111.09886).
"""

import math
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from basics import tensor_files
from basics.console import UserError, choose
from basics.files import expand_home
from basics.images import array_names, first_line, open_picture, read_array, read_file, upright

_WHITE = 128  # a picture's grey value of 0..255 from which on a pixel counts as known
_MOST_BYTES = 256 << 20  # of an array that is to be a mask: 4 channels of 2048x2048 float64 are half of it


# -------------------------------------------------------------------------------------------------- the kinds


def center_mask(size):
    """(1, 1, S, S): zero on [S//4, S*3//4) of both axes.

    Raises:
        UserError: the image is so small that nothing would be masked.
    """
    if size < 2:
        raise UserError(f"a center mask needs images of at least 2 pixels, not {size}")
    mask = torch.ones(1, 1, size, size)
    hole = slice(size // 4, size * 3 // 4)
    mask[..., hole, hole] = 0
    return mask


def checkerboard_mask(size, num_blocks, complement=False):
    """(1, 1, S, S): zero where block row + block column is odd, or where it is even for the complement.

    Args:
        size: S, pixels an edge.
        num_blocks: blocks an edge; divides S.
        complement: swaps known and unknown.

    Raises:
        UserError: the blocks do not divide the image, or there is but one.
    """
    _check_divides(num_blocks, size, "--mask_num_blocks", smallest=2)
    block = torch.arange(size) // (size // num_blocks)  # (S,) block index of a row or column
    odd = (block[:, None] + block[None, :]) % 2  # (S, S)
    return (odd if complement else 1 - odd).float()[None, None]


def random_mask_from_permutation(permutation, size, patch_size, ratio):
    """The random mask that one permutation of the grid's cells gives: its first ceil(ratio * cells) cells are known.

    Args:
        permutation: (cells,) integers, a permutation of 0..cells-1 with cells = (S / patch_size)^2, row by row.
        size: S, pixels an edge.
        patch_size: pixels an edge of a cell; divides S.
        ratio: share of known cells, in (0, 1].

    Returns:
        Tensor: (1, 1, S, S).

    Raises:
        UserError: the patches do not divide the image, or the ratio is out of range.
    """
    cells = _grid(size, patch_size, ratio) ** 2
    known = torch.as_tensor(permutation)[: math.ceil(ratio * cells)]
    mask = torch.zeros(cells)
    mask[known] = 1
    edge = size // patch_size
    mask = mask.view(1, 1, edge, edge)
    return mask.repeat_interleave(patch_size, -2).repeat_interleave(patch_size, -1)  # (1, 1, S, S)


def random_mask(size, patch_size, ratio, generator):
    """A fresh random mask (1, 1, S, S): `random_mask_from_permutation` of a permutation drawn from `generator`."""
    cells = _grid(size, patch_size, ratio) ** 2
    permutation = torch.randperm(cells, generator=generator)
    return random_mask_from_permutation(permutation, size, patch_size, ratio)


def _grid(size, patch_size, ratio):
    """Cells an edge, checked."""
    _check_divides(patch_size, size, "--mask_patch_size", smallest=1)
    if not 0 < ratio <= 1:
        raise UserError(f"--mask_ratio is {ratio}; it is the share of known pixels, above 0 and at most 1")
    return size // patch_size


def _check_divides(number, size, flag, smallest):
    if number < smallest or size % number:
        divisors = [str(d) for d in range(smallest, size + 1) if size % d == 0]
        raise UserError(f"{flag} is {number}, which does not divide images of {size} pixels; use {', '.join(divisors)}")


# ------------------------------------------------------------------------------------------------- the interface

# Each entry makes a mask from the options of `make_mask`, and its name in the results folder.
MASK_TYPES = {
    "center": lambda o: center_mask(o["size"]),
    "checkerboard": lambda o: checkerboard_mask(o["size"], o["num_blocks"]),
    "checkerboard_alt": lambda o: checkerboard_mask(o["size"], o["num_blocks"], complement=o["rep"] % 2 == 1),
    "random": lambda o: random_mask(o["size"], o["patch_size"], o["ratio"], o["generator"]),
    "none": lambda o: torch.zeros(1, 1, o["size"], o["size"]),  # nothing is known, as with the lift 'noise'
    "file": lambda o: o["file_mask"],
}
_NAMES = {
    "center": "center",
    "checkerboard": "checkerboard_blocks{num_blocks}",
    "checkerboard_alt": "checkerboard_alt_blocks{num_blocks}",
    "random": "random_patch{patch_size}_ratio{ratio}",
    "none": "none",
    "file": "file_{stem}",
}


def make_mask(mask_type, size, rep, num_blocks=4, patch_size=4, ratio=0.5, generator=None, file_mask=None):
    """The mask of repetition `rep`.

    Args:
        mask_type: a key of MASK_TYPES.
        size: S, pixels an edge of the images.
        rep: the repetition; odd ones get the complement of `checkerboard_alt`, the other types ignore it.
        num_blocks: blocks an edge of the checkerboards.
        patch_size: pixels an edge of a cell of `random`.
        ratio: share of known cells of `random`, in (0, 1].
        generator: torch.Generator on the CPU from which `random` draws; required for it.
        file_mask: (1, 1, S, S), what `load_mask_file` gave; required for `file`.

    Returns:
        Tensor: (1, 1, S, S) float32 on the CPU, 1 = known, 0 = to be filled.

    Raises:
        UserError: unknown type, or options that do not fit the images.
    """
    make = choose(mask_type, MASK_TYPES, "mask type")
    if mask_type == "random" and generator is None:
        raise ValueError("random masks need a generator: draws are keyed here")
    if mask_type == "file" and file_mask is None:
        raise UserError("the mask type 'file' needs a mask: give one with --mask_file_path")
    options = {"size": size, "rep": rep, "num_blocks": num_blocks, "patch_size": patch_size, "ratio": ratio}
    return make({**options, "generator": generator, "file_mask": file_mask})


def mask_name(mask_type, num_blocks=4, patch_size=4, ratio=0.5, identifier=None, file_path=None):
    """The stem of the results folder, in the published spelling; the caller appends `_reps10`.

    Args:
        mask_type, num_blocks, patch_size, ratio: as for `make_mask`.
        identifier: the user's own tag.  It replaces the file's stem for `file` and is appended for the others.
        file_path: the mask file, for `file`.

    Returns:
        str: center | checkerboard_blocks8 | checkerboard_alt_blocks8 | random_patch4_ratio0.5 | none |
            file_<tag or stem>.

    Raises:
        UserError: unknown type, a tag that is no file name, or `file` with neither tag nor file.
    """
    form = choose(mask_type, _NAMES, "mask type")
    if identifier and Path(identifier).name != identifier:
        raise UserError(f"--mask_identifier is '{identifier}'; it becomes part of a folder's name: leave out slashes")
    stem = identifier or (Path(file_path).stem if file_path else "")
    if mask_type == "file" and not stem:
        raise UserError("the mask type 'file' needs a mask: give one with --mask_file_path")
    name = form.format(num_blocks=num_blocks, patch_size=patch_size, ratio=ratio, stem=stem)
    return f"{name}_{identifier}" if identifier and mask_type != "file" else name


# ------------------------------------------------------------------------------------------- a user's own mask


def load_mask_file(path, size):
    """A user's own mask, from a picture or an array.

    Args:
        path: `.npy`, `.npz` with one array, `.pt` or `.pth` with one tensor (read weights-only): zeros and ones of
            shape (S, S) or (..., S, S) with all channels equal.  Or any picture: white (>= 128 of 255) is known, black
            and transparent (alpha 0) are to be filled; what is partly transparent is as if laid on black.
        size: S, pixels an edge of the images.

    Returns:
        Tensor: (1, 1, S, S) float32, 1 = known, 0 = to be filled.

    Raises:
        UserError: missing or unreadable file, another size, other values, or nothing known or nothing to fill.
    """
    path = Path(expand_home(path))
    if not path.is_file():
        raise UserError(f"there is no mask file {path}; check --mask_file_path")
    read = _READERS.get(path.suffix.lower(), _read_picture)
    try:
        values = read(path, size)
        return _checked_mask(values, path, size)
    except UserError:
        raise
    except Exception as error:  # a damaged file can fail anywhere inside its reader, a crafted one later
        raise UserError(
            f"mask file {path} cannot be read ({first_line(error)}); give a picture, a .npy, .npz, .pt or .pth file"
        ) from error


def _read_array(path, size):
    """The only array of an .npy or .npz file."""
    names = array_names(path)
    if len(names) != 1:
        raise UserError(f"mask file {path} holds {len(names)} arrays; it must hold one")
    return torch.from_numpy(np.array(read_array(path, names[0], most=_MOST_BYTES)))


def _read_torch(path, size):
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            claimed = sum(member.file_size for member in archive.infolist())
        if claimed > _MOST_BYTES:
            raise UserError(f"mask file {path} unpacks to {claimed / 1e9:.1f} GB; it must hold one tensor, the mask")
    values = tensor_files.read_torch(path)
    if not torch.is_tensor(values):
        raise UserError(f"mask file {path} holds a {type(values).__name__}; it must hold one tensor")
    if values.layout is not torch.strided or values.device.type != "cpu" or values.is_quantized:
        raise UserError(
            f"mask file {path} holds a tensor of another kind; write mask.to_dense().float() of plain numbers"
        )
    if values.numel() * values.element_size() > _MOST_BYTES:  # it may be a few numbers, many times
        raise UserError(f"mask file {path} holds a tensor of {values.numel():,} numbers; a mask is (C, {size}, {size})")
    return values.detach()


def _read_picture(path, size):
    """Which pixels of a picture are known, (S, S) bool, or its values where they are floats, which are then checked."""
    with open_picture(read_file(path), path.suffix) as picture:
        if picture.size != (size, size):  # before it is decoded, as it may be huge
            shape = "x".join(map(str, picture.size))
            raise UserError(f"mask file {path} is of size {shape}; the images are of {size}x{size} pixels")
        picture.load()
        if picture.mode == "F":
            return torch.from_numpy(np.array(upright(picture)))
        if picture.mode.startswith("I"):  # 16-bit grey, which convert("L") would clip
            return _known(Image.fromarray(np.array(picture).astype(np.int32)), picture, path, 257)
        grey = picture
        if picture.has_transparency_data:
            grey = picture.convert("RGBA")
            grey = Image.alpha_composite(Image.new("RGBA", grey.size, "black"), grey)
        return _known(grey.convert("L"), picture, path, 1)


def _known(grey, picture, path, scale):
    """Which pixels of a grey picture are white, (S, S) bool; `picture` has the camera's notes.

    Raises:
        UserError: none is, but some are not black: they are numbers of another range, such as 0 and 1.
    """
    values = torch.from_numpy(np.array(upright(grey, picture)))
    least, most = values.aminmax()
    if least < most < _WHITE * scale:
        raise UserError(
            f"mask file {path} has no white pixel: its values go up to {most} of {255 * scale}; known pixels are "
            f"{_WHITE * scale} and above, so multiply the values by {255 * scale // max(int(most), 1)}"
        )
    return values >= _WHITE * scale


_READERS = {".npy": _read_array, ".npz": _read_array, ".pt": _read_torch, ".pth": _read_torch}


def _checked_mask(values, path, size):
    """`values` of any shape and type as a mask (1, 1, S, S), or a UserError."""
    if values.ndim < 2 or tuple(values.shape[-2:]) != (size, size) or values.numel() == 0:
        shape = "x".join(map(str, values.shape))
        raise UserError(f"mask file {path} is of size {shape}; the images are of {size}x{size} pixels")
    planes = values.reshape(-1, size, size)  # (C, S, S)
    if not ((planes == 0) | (planes == 1)).all():
        raise UserError(f"mask file {path} holds values other than 0 (to be filled) and 1 (known)")
    if not (planes == planes[:1]).all():
        raise UserError(f"mask file {path} differs between channels; a mask is the same for all of them")
    mask = planes[0].float()[None, None]  # (1, 1, S, S)
    if mask.min() == mask.max():
        what = "no pixel is to be filled (0)" if mask.max() == 1 else "no pixel is known (1)"
        raise UserError(f"in mask file {path} {what}; it needs both")
    return mask
