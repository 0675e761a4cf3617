"""Tensors and arrays in files: read safely, written atomically, with what they were made from."""

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
        arrays: by name.
    """
    buffer = io.BytesIO()
    np.savez(buffer, settings=json.dumps(settings), **arrays)
    write_bytes(path, buffer.getbuffer())


def read_arrays(path, settings):
    """The arrays that an earlier run wrote, or None where there is no file.

    Args:
        path: the file.
        settings: as in `write_arrays`.

    Returns:
        dict: name -> array, without `settings`; or None.

    Raises:
        UserError: the file is damaged, or was made from something else.
    """
    path = Path(path)
    if not path.is_file():
        return None
    try:
        tensor_files.check_zip(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        differing = differences(json.loads(str(arrays.pop("settings", "{}"))), settings)
    except PermissionError as error:
        raise UserError(f"{path} may not be read; change its permissions") from error
    except Exception as error:  # a damaged file can fail anywhere inside the reader
        raise UserError(f"{path} is damaged or truncated; delete it, then run the same command again") from error
    if differing:
        raise UserError(
            f"{path} was made from something else ({'; '.join(differing[:3])}); delete it or choose another folder"
        )
    return arrays


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
