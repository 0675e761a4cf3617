"""Arrays in files: read safely, written atomically, with what they were made from."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np

from basics.console import UserError
from basics.files import write_bytes
from basics.zip_files import check_zip


class OtherOrigin(UserError):
    """Whole arrays, made from something else than was asked for."""


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
        OtherOrigin: the file was made from something else.
        UserError: it is damaged, was changed, or was made by an earlier version.
    """
    path = Path(path)
    if not path.is_file():
        return None
    try:
        check_zip(path)
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
        raise OtherOrigin(
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
