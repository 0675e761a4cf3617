"""Weight files of the learned distances: fetched, read weights-only, written completely or not at all."""

import http.client
import io
import sys
from pathlib import Path

import torch

from basics import files, tensor_files
from basics.console import UserError, warn
from basics.machine import download_timeout


def hub_file(url, name, *, what, user, megabytes, instead):
    """The path of a file in torch's hub folder, downloaded if it is not there.

    Args:
        url: where it is to be had.
        name: of the file; it ends in `-{start of its SHA-256}.pth`, which is checked.
        what: what it is, in the plural ("the AlexNet weights").
        user: what needs it, as the user calls it.
        megabytes: its size.
        instead: what works offline, for the message.

    Raises:
        UserError: it cannot be downloaded; nothing is left behind.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    warn(f"downloading {what} of {user} ({megabytes} MB) to {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with download_timeout():  # a partial download is removed
            prefix = path.stem.rsplit("-", 1)[-1]
            torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix, progress=sys.stderr.isatty())
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # no network, no space; a wrong hash
        raise UserError(
            f"{user} needs {what}, and they could not be downloaded ({error}); fetch {url} elsewhere and "
            f"put it at {path}, or use what works offline: {instead}"
        ) from error
    return path


def read(path, what, remedy):
    """What `torch.save` wrote to `path`, loaded to the CPU, weights-only.

    Args:
        path: an existing file.
        what: what the user would call it, in the plural ("the AlexNet weights").
        remedy: what to do about a damaged file.

    Returns:
        The content.  Tensors that are its values, or the values of tables in it, are floating-point and finite, or
        counts.

    Raises:
        UserError: the file cannot be read, is damaged, holds pickled code, or tensors of another kind.
    """
    try:
        content = tensor_files.read_torch(path)
        _check(content)
    except PermissionError as error:
        raise UserError(f"{what} {path} may not be read; change the file's permissions") from error
    except (tensor_files.WrongFile, OSError) as error:
        reason = f"the file cannot be read: {error.strerror}" if isinstance(error, OSError) else f"the file {error}"
        raise UserError(
            f"{what} {path} are damaged, or hold more than tensors and are not loaded ({reason}); {remedy}"
        ) from error
    return content


def _check(content):
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, dict):
            for inner, tensor in value.items():
                _check_tensor(inner, tensor)
        else:
            _check_tensor(name, value)


def _check_tensor(name, value):
    counts = torch.is_tensor(value) and value.dtype is torch.int64 and value.numel() == 1
    if torch.is_tensor(value) and not counts and not (tensor_files.is_plain(value) and tensor_files.is_finite(value)):
        raise tensor_files.WrongFile(f"holds {name} of another type, or numbers that are not finite")


def write(path, value):
    """`torch.save` to `path`, completely or not at all; makes parent folders.

    Raises:
        UserError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    files.write_bytes(path, buffer.getbuffer())


def differences(found, expected):
    """How shapes `{name: shape}` differ from the expected ones, as one short text; empty where they do not."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    shapes = [
        f"{name} is {tuple(found[name])}, not {tuple(expected[name])}"
        for name in expected
        if name in found and tuple(found[name]) != tuple(expected[name])
    ]
    parts = []
    for title, names in (("missing", missing), ("unknown", extra), ("of other shape", shapes)):
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{title}: {', '.join(names[:3])}{rest}")
    return "; ".join(parts)
