"""What the command lines share: a user's error, exit codes, flags, the device, what is printed.

A mistake of the user's is raised as `UserError` wherever it is noticed and becomes one line
and exit code 2 here.  Anything else is a bug and keeps its traceback.  Of the processes that
torchrun starts the first speaks for all, and the first that fails tells of it.  Everything for the
user goes through `say`, `warn`, `log`, `fail` and `progress`, which can print any name.
"""

import contextlib
import errno
import os
import select
import shlex
import signal
import sys
import threading
import unicodedata
from pathlib import Path

from absl import flags

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141  # 128 + SIGPIPE: what a shell reports of a program whose output nobody reads any more

flags.disclaim_key_flags()  # those defined through the functions below are the caller's, so its --help lists them


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


# ------------------------------------------------------------------------------------------------- what is printed


def printable(text, stream=None):
    """`text` as one line without anything that a terminal would obey or a stream could not encode.

    Control characters, invisible format characters, line breaks and bytes that are no UTF-8 become escapes such as
    \\n, \\x1b or \\xe9; so do characters that the stream's encoding lacks.

    Args:
        text: any object; `str` of it is taken.
        stream: where it will be printed, or None for a place that can show all characters.
    """
    text, encoding = str(text), getattr(stream, "encoding", None)
    if not text.isprintable():
        text = "".join(map(_shown, text))
    return text.encode(encoding, "backslashreplace").decode(encoding) if encoding else text


def _shown(character):
    if "\udc80" <= character <= "\udcff":  # a byte of a file's name that is no UTF-8, as Python keeps it
        return f"\\x{ord(character) - 0xDC00:x}"
    hidden = unicodedata.category(character) in _HIDDEN and character not in _JOINERS
    return character.encode("unicode_escape").decode() if hidden else character


_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format, surrogate, line and paragraph separators
_JOINERS = "\u200c\u200d"  # of letters and emoji: format characters that belong to many names


def shell(*words):
    """A command for the user to copy: its words quoted for the shell where they need it."""
    return " ".join(map(_quoted, map(str, words)))


def _quoted(word):
    if word.isprintable():
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{printable(escaped)}'"  # in which the shell reads the escapes


def say(message):
    """Prints a line for the user at once, also when the output goes to a file."""
    if speaks():
        _write(message, sys.stdout)


def log(message):
    """`say` while progress bars are shown, which go on below the line."""
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stdout):
        say(message)


def warn(message):
    """Prints a warning line on standard error."""
    if speaks():
        _write(f"warning: {message}", sys.stderr)


def _write(line, stream):
    if stream is not None:  # the process was started without it
        print(printable(line, stream), file=stream, flush=True)


def progress(iterable=None, desc=None, **kwargs):
    """A tqdm bar on standard error with rate and time left, labelled `desc`; sparse where nobody watches."""
    from tqdm import tqdm

    watched = sys.stderr is not None and sys.stderr.isatty()
    options = {"dynamic_ncols": watched, "mininterval": 0.2 if watched else 10.0, "file": sys.stderr}
    if desc is not None:
        options["desc"] = printable(desc, sys.stderr)
    return tqdm(iterable, **{**options, "disable": sys.stderr is None or not speaks(), **kwargs})


# ------------------------------------------------------------------------------------------------------ the machine


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


# ------------------------------------------------------------------------------------------------------------ flags


class _Path(flags.ArgumentParser):
    """A flag's path; a leading ~ is the home folder."""

    def parse(self, argument):
        return expand(argument)

    def flag_type(self):
        return "path"


class _ConfigFile(flags.ArgumentParser):
    """A flag's config file, read by `read_config`."""

    def parse(self, argument):
        return read_config(argument)

    def flag_type(self):
        return "config file"


def expand(path):
    """The text of a path with a leading ~ or ~name as that user's home folder; as it is where there is none."""
    return os.path.expanduser(path)  # noqa: PTH111 (`Path` raises for unknown users, and drops "./" and a last "/")


def define_path(name, default, help_text, **options):
    """Defines the flag `--{name}` of a file or folder; options as of absl's `DEFINE`."""
    flags.DEFINE(_Path(), name, default, help_text, serializer=flags.ArgumentSerializer(), **options)


def define_config(help_text):
    """Defines `--config`, a file of which every value can be overridden by `--config.section.field=value`."""
    from ml_collections.config_flags import config_flags

    try:
        config_flags.DEFINE_config_file("config", None, help_text)
    except (flags.Error, ValueError) as error:  # it reads a --flagfile already
        fail(error)
    flags.FLAGS["config"].parser = _ConfigFile()  # ml_collections' own lets what a file raises through


def read_config(path):
    """The config tree that a config file's `get_config()` returns, its fields fixed.

    Args:
        path: the file; in `file.py:text` the text is given to `get_config`, as ml_collections has it.

    Raises:
        UserError: there is no such file, it fails, or what it returns is no config tree; names the line.
    """
    from ml_collections import ConfigDict, FrozenConfigDict

    path, argument, source = _config_source(expand(path))
    names = {"__name__": "config", "__file__": path}
    try:
        exec(compile(source, path, "exec"), names)
        if not callable(names.get("get_config")):
            raise UserError(f"the config {path} has no function get_config; {_EXAMPLES}")
        config = names["get_config"](*argument)
    except UserError:
        raise
    except SystemExit as error:
        raise UserError(f"the config {path} ends the program{_line_in(path, error)}; take the exit out") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}{_line_in(path, error)}: {error}".split())
        raise UserError(f"the config {path} fails with {reason}; correct it ({_EXAMPLES})") from error
    if not isinstance(config, ConfigDict) or isinstance(config, FrozenConfigDict):
        raise UserError(
            f"get_config of {path} returns {_kind(config)}, not an ml_collections.ConfigDict; {_EXAMPLES}, or wrap it: "
            "configs.base.from_dict(values)"
        )
    return config.lock()


_EXAMPLES = "the files in configs/ show how it is done"


def _kind(value):
    return "nothing" if value is None else f"a {type(value).__name__}"


def _config_source(path):
    """A config file's path, what to call its get_config with, and its bytes, for `path` or `path:text`."""
    try:
        path, argument = (path, []) if Path(path).exists() else (path.split(":", 1)[0], path.split(":", 1)[1:])
        if Path(path).exists() and not Path(path).is_file():
            raise OSError(f"'{path}' is no file")
        return path, argument, Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"no config can be read ({error}); give --config a file such as those in configs/") from error


def _line_in(path, error):
    """' in line N' of the file where an error arose; '' where that is not known."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f" in line {error.lineno}"
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" in line {line}" if line else ""


def _check_values(values):
    """Refuses what no flag can use: empty text, zero bytes, and numbers that are none or beyond 64 bits.

    Config fields have their own bounds; of them the text alone is checked.
    """
    for name in values:
        value = values[name].value
        if not values[name].present or isinstance(value, bool):
            continue
        if isinstance(value, str) and not value.strip():
            fail(f"flag --{name} is empty; give it a value or leave it out")
        if isinstance(value, str) and "\0" in value:
            fail(f"flag --{name} holds a zero byte, which no file's name can have; give it another value")
        if isinstance(value, (int, float)) and "." not in name and not -(2**63) <= value < 2**63:  # nor is NaN
            fail(f"flag --{name}={value}: a number within 64 bits is expected")


# ------------------------------------------------------------------------------------------------ start and the end


def run(main, argv=None):
    """Parses absl flags, runs `main(argv)` and leaves the process with its exit code.

    Args:
        main: takes the positional arguments; may return an exit code.
        argv: the command line, `sys.argv` by default.
    """
    from absl import app

    def parse(args):
        try:
            rest = flags.FLAGS(args)
        except SystemExit:  # --help has been printed; absl would call that a failure
            sys.exit(0)
        except (UserError, BrokenPipeError):
            raise
        except (KeyError, AttributeError) as error:  # their message may be the field's name alone
            fail(f"the config has no such field: {error.args[0]}; configs/base.py lists them")
        except Exception as error:  # absl and ml_collections raise many kinds for a flag they cannot use
            fail(error)
        if len(rest) > 1:
            fail(f"unexpected argument '{rest[1]}'; flags are written --name=value (--help lists them)")
        _check_values(flags.FLAGS)
        return rest

    def command(args):
        try:
            app.run(lambda rest: sys.exit(main(rest)), argv=args, flags_parser=parse)
        except SystemExit as end:
            return end.code

    signal.signal(signal.SIGINT, _on_interrupt)
    try:
        code = guard(command, argv)
    finally:
        if signal.getsignal(signal.SIGINT) is _on_interrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # from here on there is nothing to end in order
    if code == EXIT_INTERRUPTED:  # at once: what is written is whole, and whoever interrupts again is not to wait
        os._exit(code)
    sys.exit(code)


def guard(main, args):
    """Calls `main(args)`; a user's error or a full disk becomes its line and exit code 2."""
    try:
        code = main(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _end_interrupted()
    except Exception as error:
        if _interrupts:  # some library has made another error of it
            return _end_interrupted()
        if isinstance(error, BrokenPipeError) and _reader_gone():
            return EXIT_NO_READER
        if (line := _line_of(error)) is not None:
            fail(line)
        if not _fails_first():  # probably because another process has gone
            os._exit(EXIT_USER_ERROR)  # an orderly end can abort in the threads of the process group, with a report
        raise


_INTERRUPTED = "interrupted; the same command continues where this run stopped"
_interrupts = []  # the signals of this process's `run`


def _on_interrupt(number, frame):
    """The first Ctrl-C ends the work in order; a second one leaves at once, for what is written is whole."""
    if _interrupts:
        if place()[2] == 1:
            os.write(2, f"{_INTERRUPTED}\n".encode())  # `print` may be what was interrupted
        os._exit(EXIT_INTERRUPTED)
    _interrupts.append(number)
    raise KeyboardInterrupt


def _end_interrupted():
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is _on_interrupt:
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))  # the line comes once
    if _fails_first():
        _write(_INTERRUPTED, sys.stderr)
    return EXIT_INTERRUPTED


def _reader_gone():
    """Whether nobody reads the output any more, as behind `| head`; what is still written goes nowhere then."""
    gone = False
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):  # it is no file of the system
            pipe = select.poll()
            pipe.register(stream.fileno(), select.POLLOUT)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in pipe.poll(0)):
                gone = True
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return gone


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
        _write(f"error: {line}", sys.stderr)
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
