"""Tensors in files: read safely, written atomically."""

import io
from pathlib import Path

import torch

from basics import tensor_files
from basics.console import UserError
from basics.files import write_bytes
from basics.zip_files import WrongFile


def write_tensors(path, value):
    """`torch.save` of tensors, numbers, text, lists and dicts, atomically."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getbuffer())


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
