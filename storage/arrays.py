"""Tensors and arrays in files: read safely, written atomically, with what they were made from."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import torch

from basics import tensor_files
from basics.console import UserError
from basics.files import write_bytes
from basics.tensor_files import WrongFile

# ------------------------------------------------------------------------------------------- tensors and arrays


def write_tensors(path, value):
    """`torch.save` of tensors, numbers, text, lists and dicts, atomically."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getbuffer())


def write_arrays(path, settings, **arrays):
    """Writes NumPy arrays and what they were made from as an .npz file, atomically.

    Args:
        path: the file.
        settings: a dict of JSON types, which `read_arrays` compares; stored as text under `settings`.
        arrays: by name; their digest is stored under `digest`.
    """
    buffer, text = io.BytesIO(), json.dumps(settings)
    np.savez(buffer, settings=text, digest=_digest(text, arrays), **arrays)
    write_bytes(path, buffer.getbuffer())


def _digest(text, arrays):
    """SHA-256 of the settings' text and of all arrays: their names, types, shapes and bytes."""
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(arrays.items()):
        value = np.asarray(value)
        digest.update(repr((name, value.dtype.str, value.shape)).encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def read_arrays(path, settings, shapes=None):
    """The arrays that an earlier run wrote, or None where there is no file.

    Args:
        path: the file.
        settings: as in `write_arrays`.
        shapes: the shape of each array by name, None in the place of a size that may be any; None not to look.

    Returns:
        dict: name -> array, without `settings` and `digest`; or None.

    Raises:
        UserError: the file is damaged, was changed, was made from something else or by an earlier version.
    """
    path = Path(path)
    if not path.is_file():
        return None
    try:
        tensor_files.check_zip(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        text, digest = str(arrays.pop("settings", "{}")), arrays.pop("digest", None)
        differing = differences(json.loads(text), settings)
        fault = _fault_of_arrays(text, digest, arrays)
    except PermissionError as error:
        raise UserError(f"{path} may not be read; change its permissions") from error
    except Exception as error:  # a damaged file can fail anywhere inside the reader
        raise UserError(f"{path} is damaged or truncated; {_MAKE_AGAIN}") from error
    if fault:
        raise UserError(f"{path} {fault}; {_MAKE_AGAIN}")
    if differing:
        raise UserError(
            f"{path} was made from something else ({'; '.join(differing[:3])}); delete it or choose another folder"
        )
    if shapes is not None and not _fit(arrays, shapes):
        wanted = " and ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise UserError(f"{path} does not hold {wanted} alone; {_MAKE_AGAIN}")
    return arrays


_MAKE_AGAIN = "delete it, then run the same command again"


def _fault_of_arrays(text, digest, arrays):
    """What is wrong with the content of a file of arrays, or None."""
    if digest is None:
        return "was made by an earlier version"
    return None if str(digest) == _digest(text, arrays) else "was changed after it was made"


def _fit(arrays, shapes):
    """Whether arrays are numbers of these names and shapes."""

    def fits(value, shape):
        sizes = zip(value.shape, shape, strict=False)
        return value.ndim == len(shape) and value.dtype.kind in "fiu" and all(b in (None, a) for a, b in sizes)

    return arrays.keys() == shapes.keys() and all(fits(arrays[name], shape) for name, shape in shapes.items())


# -------------------------------------------------------------------------------------------------- reading


def read_tensors(path, what, lazily=False):
    """Loads a `torch.save` file to the CPU, weights-only.

    Args:
        path: the file.
        what: what the user would call it, for messages ("checkpoint", "batch").
        lazily: to look at names, shapes and numbers alone; the tensors are not read.

    Raises:
        UserError: the file is missing, truncated, not a torch file, or holds pickled code.
    """
    read = lambda path: tensor_files.read_torch(path, lazily)
    return read_or_refuse(path, what, read, "copy or make it again (it may hold tensors, numbers and text alone)")


def read_or_refuse(path, what, read, remedy):
    """read(path), for a file that is there; what is wrong with it becomes a user's error."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no {what} at {path}; check the path")
    try:
        return read(path)
    except WrongFile as error:
        raise UserError(f"{what} {path} {error}; {remedy}") from error
    except PermissionError as error:
        raise UserError(f"{what} {path} may not be read; change its permissions") from error
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror}); copy or make it again") from error


def differences(old, new, prefix=""):
    """The entries in which two nested dicts differ, as text `key: old there, new here`."""
    rows = []
    for name in sorted({*old, *new}):
        there, here = old.get(name), new.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            rows += differences(there, here, f"{prefix}{name}.")
        elif there != here:
            rows.append(f"{prefix}{name}: {shortened(there)} there, {shortened(here)} here")
    return rows


def shortened(value):
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
