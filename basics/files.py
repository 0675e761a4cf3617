"""Files and folders: written completely or not at all, owned by one run at a time, marked as this program's.

A file is written to a temporary name in its own folder, flushed to the disk and renamed, so a reader never meets half
a file and a killed run loses nothing that stood there before.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import socket
import stat
import time
from pathlib import Path

from basics.console import UserError, remedy, warn

MARK = ".lift-map-detect"  # in folders that this program writes: what is below is no input, and its lock is the owner's
_TEMPORARY = re.compile(r"\.lmd-([0-9a-f]{8})-([0-9]+)-[0-9a-f]{16}\.tmp")  # whose it is: machine and process
_DAY = 24 * 3600.0  # seconds
_NOTE = "This folder is written by Lift, Map, Detect. Images in it are left out when a folder around it is read.\n"


# ---------------------------------------------------------------------------------------------- atomic writing


def write_bytes(path, data):
    """Writes `data` to `path` completely or not at all, making parent folders.

    Raises:
        UserError: the folder cannot be written, the disk is full or fails; nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(_temporary())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; {remedy(error)}") from error
    finally:
        with contextlib.suppress(OSError):  # it is not there after success
            os.unlink(temporary)


def link(source, target):
    """Gives `source` a second name, in place of what has it; returns False where the file system cannot do so."""
    target = Path(target)
    temporary = target.with_name(_temporary())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, temporary)
        os.replace(temporary, target)
        return True
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):  # it is not there after success
            os.unlink(temporary)


def write_text(path, text):
    """`write_bytes` of UTF-8 text; bytes of file names that are no UTF-8 become escapes such as \\udce9."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path, value):
    """Writes `value` (JSON types) indented, with a newline at the end."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_png(path, picture):
    """Writes a PIL image as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def remove_temporaries(folder):
    """Removes what killed writes left in a folder and below; what a living process is writing stays."""
    for parent, _, names in os.walk(folder):
        for name in names:
            if (found := _TEMPORARY.fullmatch(name)) and _abandoned(Path(parent, name), *found.groups()):
                with contextlib.suppress(OSError):
                    os.unlink(Path(parent, name))


def _temporary():
    """A name for a file that this process is writing."""
    return f".lmd-{_machine()}-{os.getpid()}-{secrets.token_hex(8)}.tmp"


def _machine():
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _abandoned(path, machine, process):
    """Whether nobody writes a temporary file any more: its process has ended, or it is a day old on another machine."""
    if machine != _machine():
        with contextlib.suppress(OSError):
            return time.time() - path.stat().st_mtime > _DAY
        return False
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # another user's
        return False
    return False


# ---------------------------------------------------------------------------------------------------- ownership


@contextlib.contextmanager
def owned(folder):
    """Within it this process alone writes to the folder, which is made if it is not there, marked, and tidied.

    A folder that was made, and is still empty when an error ends it, is removed.  The lock is the operating system's,
    on the folder's mark: it ends with the process, however that ends.

    Args:
        folder: a work or results folder; its own subfolders may have other owners.

    Raises:
        UserError: another run writes there, or the folder cannot be written to.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open_own(folder / MARK)
    except OSError as error:
        raise _not_writable(folder, error) from error
    with file:
        if not _lock(file, folder / MARK):
            file.seek(0)
            owner = (file.read().splitlines() or ["another run"])[-1]
            raise UserError(f"{folder} is being written to by {owner}; wait until it ends, or choose another folder")
        file.truncate(0)
        file.write(f"{_NOTE}process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        remove_temporaries(folder)
        try:
            yield
        except BaseException:
            remove_empty(*made)
            raise


def remove_empty(*folders):
    """Removes folders of which the first holds nothing, or a mark alone, and each of the others the one before."""
    with contextlib.suppress(OSError):
        if folders and {path.name for path in folders[0].iterdir()} <= {MARK}:
            (folders[0] / MARK).unlink(missing_ok=True)
            for folder in folders:
                folder.rmdir()


def check_writable(folder):
    """Whether a folder can be written to, or made where it is not there, tried out beforehand; leaves nothing behind.

    Raises:
        UserError: it cannot.
    """
    folder = Path(folder)
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    trial = there / _temporary()
    try:
        with contextlib.ExitStack() as after, trial.open("xb") as file:
            after.callback(trial.unlink)
            file.write(bytes(4096))  # a full disk takes a name, but no content
    except OSError as error:
        raise _not_writable(folder, error) from error


def _not_writable(folder, error):
    return UserError(f"cannot write to {folder}: {error.strerror}; {remedy(error)}")


@contextlib.contextmanager
def alone(folder):
    """A short section in which no other process is in such a section of the same folder; waits for its turn.

    The lock is on the folder itself, so that no file is left; it ends with the process.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks of folders
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def open_own(path):
    """Opens a text file of this program's for reading and appending; it is made if it is not there.

    Raises:
        UserError: a link stands there, which could lead out of the folder, or something else that is no plain file.
        OSError: it cannot be opened.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if not path.is_symlink():
            raise
        raise UserError(f"{path} is a link, which is not followed; remove it, or choose another folder") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{path} is no plain file; remove it, or choose another folder")
    return os.fdopen(handle, "a+", encoding="utf-8")


def _lock(file, path):
    """Takes the lock of an open file at `path`, unless another process has it; returns whether."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems have no locks
        warn(f"{path} cannot be locked ({error.strerror}): start one run at a time in this folder")
    return True


def mark(folder):
    """Marks a folder as this program's: made if it is not there, left as it is if it holds files of another kind."""
    folder = Path(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        write_text(folder / MARK, _NOTE)


def is_owned(folder):
    """Whether a marked folder is or was a run's (`owned`), so that files of other origin may lie there too."""
    try:
        return "process " in (Path(folder) / MARK).read_text(errors="replace")
    except OSError:
        return False


# -------------------------------------------------------------------------------------------------------- names


def expand_home(path):
    """The text of a path with a leading ~ or ~name as that user's home folder; as it is where there is none."""
    return os.path.expanduser(path)  # noqa: PTH111 (`Path` raises for unknown users, and drops "./" and a last "/")


# ------------------------------------------------------------------------------------------------------ content


@contextlib.contextmanager
def unchanged(path):
    """Yields the `file_hash` of a file that is read within it.

    Raises:
        UserError: it was replaced meanwhile, so that nobody knows what was read.
    """
    before = file_hash(path) if Path(path).is_file() else None  # whoever reads it tells that it is not there
    yield before
    if file_hash(path) != before:
        raise UserError(f"{path} was replaced while it was read; run the same command again")


def file_hash(path):
    """SHA-256 of a file's bytes as hexadecimal text."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
