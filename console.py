"""What the command lines share: a user's error, exit codes, the device, progress.

A mistake of the user's is raised as `UserError` wherever it is noticed and becomes one line
and exit code 2 here.  Anything else is a bug and keeps its traceback.  Of the processes that
torchrun starts the first speaks for all, and the first that fails tells of it.
"""

import contextlib
import errno
import os
import signal
import sys

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Something the user can put right: the message names the cause and the remedy."""


def choose(name, table, what):
    """The entry of `table` called `name`.

    Raises:
        UserError: if there is none; the message lists the choices.
    """
    if name not in table:
        raise UserError(f"unknown {what} '{name}'; choose one of: {', '.join(table)}")
    return table[name]


def place():
    """What torchrun's environment says: (rank, rank on this machine, number of processes); (0, 0, 1) without it."""
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():
        return 0, 0, 1
    return tuple(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def speaks():
    """Whether this process tells the user what all processes of the run know."""
    return place()[0] == 0


def say(message):
    """Prints a line for the user at once, also when the output goes to a file."""
    if speaks():
        print(message, flush=True)


def warn(message):
    """Prints a warning line on standard error."""
    if speaks():
        print(f"warning: {message}", file=sys.stderr, flush=True)


def progress(iterable=None, **kwargs):
    """A tqdm bar on standard error with rate and time left; sparse where nobody watches."""
    from tqdm import tqdm

    watched = sys.stderr.isatty()
    options = {"dynamic_ncols": watched, "mininterval": 0.2 if watched else 10.0, "file": sys.stderr}
    return tqdm(iterable, **{**options, "disable": not speaks(), **kwargs})


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
        raise UserError(f"device '{name}' was asked for, but torch sees {torch.cuda.device_count()} GPUs")
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


def run(main, argv=None):
    """Parses absl flags, runs `main(argv)` and leaves the process with its exit code.

    Args:
        main: takes the positional arguments; may return an exit code.
        argv: the command line, `sys.argv` by default.
    """
    from absl import app, flags

    def parse(args):
        try:
            rest = flags.FLAGS(args)
            if "config" in flags.FLAGS and flags.FLAGS["config"].present:
                flags.FLAGS.config.keys()  # where ml_collections tells that it could not open the file
        except SystemExit:  # --help has been printed; absl would call that a failure
            sys.exit(0)
        except OSError as error:
            reason = str(error).splitlines()[-1].strip()
            fail(f"no config can be read ({reason}); give --config a file such as those in configs/")
        except (KeyError, AttributeError) as error:  # their message may be the field's name alone
            fail(f"the config has no such field: {error.args[0]}; configs/base.py lists them")
        except Exception as error:  # absl and ml_collections raise many kinds for a flag they cannot use
            fail(error)
        if len(rest) > 1:
            fail(f"unexpected argument '{rest[1]}'; flags are written --name=value (--help lists them)")
        return rest

    app.run(lambda args: sys.exit(guard(main, args)), argv=argv, flags_parser=parse)


def guard(main, args):
    """Calls `main(args)`; a user's error or a full disk becomes its line and exit code 2."""
    try:
        return main(args)
    except KeyboardInterrupt:
        if _fails_first():
            print("interrupted; the same command continues where this run stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if (line := _line_of(error)) is not None:
            fail(line)
        if not _fails_first():  # probably because another process has gone
            sys.exit(EXIT_USER_ERROR)
        raise


def _line_of(error):
    """What to tell of an error that the user can put right; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return f"{error.strerror}: {error.filename or 'while writing'}; {remedy(error)}"
    return None


def remedy(error):
    """What the user can do about an OSError."""
    return _REMEDIES.get(error.errno, "check the disk, or choose a folder on another")


def fail(message):
    """Prints `error: message` as one line on standard error and exits with code 2."""
    line = " ".join(str(message).split())
    if _fails_first():
        print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USER_ERROR)


def _fails_first():
    """Whether this process is to tell why it ends: it is by itself, or the first to ask of those torchrun started."""
    if place()[2] == 1:
        return True
    import torch.distributed as dist

    stay_to_tell()
    try:
        store, *_ = next(dist.rendezvous("env://"))
        return store.add("failures", 1) == 1
    except RuntimeError:  # whoever held the store has failed and gone
        return False


def stay_to_tell():
    """Has this process of several, which failed, outlive torchrun's ending them all when one has left."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


_REMEDIES = {
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some space, then run the same command again",
    errno.EFBIG: "files may not be so large there; choose a folder on another disk, or raise the limit (ulimit -f)",
    errno.EACCES: "choose a folder you may write to",
    errno.EPERM: "choose a folder you may write to",
    errno.EROFS: "choose a folder you may write to",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another path",
    errno.EEXIST: "a file stands where a folder is needed; choose another path",
    errno.EISDIR: "a folder stands where a file is needed; choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "its links go round in a circle; choose another path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "the disk fails; check it, or choose a folder on another",
}
