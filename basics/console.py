"""What is printed and how a command ends: a user's error, exit codes, remedies.

A mistake of the user's is raised as `UserError` wherever it is noticed and becomes one line
and exit code 2 here.  Anything else is a bug and keeps its traceback.  Of the processes that
torchrun starts the first speaks for all, and the first that fails tells of it.  Everything for the
user goes through `say`, `warn`, `log`, `fail` and `progress`, which can print any name.
"""

import contextlib
import decimal
import errno
import os
import select
import shlex
import signal
import sys
import threading
import unicodedata

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143  # 128 + SIGTERM
EXIT_NO_READER = 141  # 128 + SIGPIPE: what a shell reports of a program whose output nobody reads any more


class UserError(Exception):
    """Something the user can put right: the message names the cause and the remedy."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, acted upon where work can stop in order: ends a command as Ctrl-C does, with an exit code of its own."""


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


def counted(count, noun):
    """A number of things in words, such as '1 image' or '1,000 images'."""
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('ch') else 's'}"


def percent(share, digits=3, rounding=decimal.ROUND_HALF_EVEN):
    """A finite share as text of so many significant digits: 0.001 is '0.1 %'.  All shares that users see come from it.

    Twelve digits of the share are looked at, so that rounding up sees 0.1 in what a float makes of it.
    """
    rounded = decimal.Context(digits, rounding).create_decimal(f"{100 * share:.12g}")
    return f"{rounded.normalize():f} %"


def are(count):
    """'is' after a single thing, 'are' after several or none."""
    return "is" if count == 1 else "are"


def some_are(part, whole, noun, one="is", several="are"):
    """Some of a number of things in words, with the verb for them: '3 of 1,000 images are' or '0 of 1 image is'."""
    return f"{part:,} of {counted(whole, noun)} {one if 1 in (part, whole) else several}"


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


_CONTINUES = "interrupted; the same command continues where this run stopped"


def guard(main, args, interrupted=_CONTINUES):
    """Calls `main(args)`; a user's error or a full disk becomes its line and exit code 2, Ctrl-C the line given."""
    try:
        code = main(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except Terminated:
        _end_interrupted(interrupted)
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        return _end_interrupted(interrupted)
    except Exception as error:
        if _interrupts:  # some library has made another error of it
            return _end_interrupted(interrupted)
        if isinstance(error, BrokenPipeError) and _reader_gone():
            return EXIT_NO_READER
        if (line := _line_of(error)) is not None:
            fail(line)
        if not _fails_first():  # probably because another process has gone
            os._exit(EXIT_USER_ERROR)  # an orderly end can abort in the threads of the process group, with a report
        raise


_interrupts = []  # the signals of this process's `run`


def on_interrupt(number, frame):
    """The first Ctrl-C ends the work in order; a second one leaves at once, for what is written is whole."""
    if _interrupts:
        if place()[2] == 1:
            os.write(2, f"{_CONTINUES}\n".encode())  # `print` may be what was interrupted
        os._exit(EXIT_INTERRUPTED)
    _interrupts.append(number)
    raise KeyboardInterrupt


def _end_interrupted(line):
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is on_interrupt:
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))  # the line comes once
    if _fails_first():
        _write(line, sys.stderr)
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
    errno.EEXIST: "a file, or a link that leads nowhere, stands where a folder is needed; choose another path",
    errno.EISDIR: "a folder stands where a file is needed; choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "its links go round in a circle; choose another path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "the disk fails; check it, or choose a folder on another",
}
