"""The machine: its devices, its memory, its network."""

import contextlib

from basics.console import UserError, counted


def choose_device(name):
    """The torch.device for 'auto', 'cpu', 'cuda' or 'cuda:i'.

    Raises:
        UserError: if the name is none of these or the GPU is not there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and name.split(":")[0] != "cuda":
        raise UserError(f"unknown device '{name}'; choose one of: auto, cpu, cuda, cuda:0, cuda:1, ...")
    if name != "cpu" and not torch.cuda.is_available():
        raise UserError(f"device '{name}' was asked for, but torch sees no GPU; use --device cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device '{name}'; choose one of: auto, cpu, cuda, cuda:0") from error
    if (device.index or 0) >= max(torch.cuda.device_count(), 1):
        raise UserError(f"device '{name}' was asked for, but torch sees {counted(torch.cuda.device_count(), 'GPU')}")
    return device


@contextlib.contextmanager
def download_timeout(seconds=60):
    """Within it, a download without an answer for so long fails; the libraries that download set no limit."""
    import socket

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def keep_freed_memory():
    """Has the C library keep freed memory for the next allocation instead of handing it back to the system.

    Networks on a CPU allocate and free large tensors all the time; fresh pages for each of them cost a third of the
    time.  For glibc; elsewhere it does nothing.
    """
    import ctypes
    import platform

    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


# glibc's <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
