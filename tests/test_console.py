"""A user's error is one line and exit code 2; anything else keeps its traceback."""

import decimal
import errno
import io
import os
import signal
import subprocess
import sys

import pytest
import tiny
import torch
from absl import flags
from helpers import ROOT

from basics.console import (
    _REMEDIES,
    EXIT_INTERRUPTED,
    EXIT_NO_READER,
    EXIT_TERMINATED,
    EXIT_USER_ERROR,
    UserError,
    are,
    choose,
    counted,
    fail,
    guard,
    log,
    percent,
    printable,
    progress,
    say,
    shell,
    some_are,
    warn,
)
from basics.files import expand_home
from basics.machine import choose_device
from command_line import _Path, read_config


def failure(capsys, function):
    """The line that a failing `function(None)` prints, guarded."""
    with pytest.raises(SystemExit) as exit_:
        guard(function, None)
    assert exit_.value.code == EXIT_USER_ERROR == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


def raising(error):
    def function(_):
        raise error

    return function


def test_a_users_error(capsys):
    assert failure(capsys, raising(UserError("no such file; check the path"))) == "no such file; check the path"
    assert failure(capsys, raising(UserError("two\n  lines\tand tabs"))) == "two lines and tabs"


@pytest.mark.parametrize("number", _REMEDIES)
def test_errors_of_the_system_that_the_user_can_put_right(number, capsys):
    line = failure(capsys, raising(OSError(number, os.strerror(number), "some/file")))
    assert line == f"{os.strerror(number)}: some/file; {_REMEDIES[number]}"


def test_a_full_disk_without_a_file_name(capsys):
    line = failure(capsys, raising(OSError(errno.ENOSPC, "No space left on device")))
    assert line == "No space left on device: while writing; free some space, then run the same command again"


@pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.EINVAL, "broken"), RuntimeError("x"), OSError("odd")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)) as caught:
        guard(raising(error), None)
    assert caught.value is error


def test_interruption(capsys):
    assert guard(raising(KeyboardInterrupt()), None) == EXIT_INTERRUPTED == 130
    assert capsys.readouterr().err == "interrupted; the same command continues where this run stopped\n"


def test_success():
    assert guard(lambda args: args, ["a"]) == ["a"]
    assert guard(lambda args: None, []) is None


def test_choose():
    assert choose("a", {"a": 1, "b": 2}, "letter") == 1
    with pytest.raises(UserError, match=r"^unknown letter 'c'; choose one of: a, b$"):
        choose("c", {"a": 1, "b": 2}, "letter")


@pytest.mark.parametrize(("count", "words"), [(0, "0 images are"), (1, "1 image is"), (1234, "1,234 images are")])
def test_numbers_of_things(count, words):
    assert f"{counted(count, 'image')} {are(count)}" == words
    assert counted(2, "batch") == "2 batches"


@pytest.mark.parametrize(
    ("part", "whole", "words"),
    [(0, 1, "0 of 1 image is"), (1, 1, "1 of 1 image is"), (1, 5, "1 of 5 images is"), (0, 5, "0 of 5 images are"),
     (2000, 5000, "2,000 of 5,000 images are")],
)  # fmt: skip
def test_some_of_a_number_of_things(part, whole, words):
    assert some_are(part, whole, "image") == words
    assert some_are(part, whole, "image", "has", "have") == words.replace("is", "has").replace("are", "have")


@pytest.mark.parametrize(
    ("share", "digits", "up", "text"),
    [
        (0.01, 3, False, "1 %"),
        (1 / 1001, 3, False, "0.0999 %"),
        (1 / 1001, 3, True, "0.1 %"),
        (0.001, 3, True, "0.1 %"),  # though 100 times the float are more
        (1 / 51, 3, True, "1.97 %"),
        (0.9996, 3, False, "100 %"),
        (0.017049, 2, False, "1.7 %"),
        (1e-8, 3, False, "0.000001 %"),
        (0.1, 3, False, "10 %"),
        (1, 3, False, "100 %"),
        (0, 3, False, "0 %"),
    ],
)
def test_percent(share, digits, up, text):
    assert percent(share, digits, *([decimal.ROUND_CEILING] if up else [])) == text


def test_say_and_warn(capsys):
    say("hello")
    warn("careful")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("hello\n", "warning: careful\n")


def test_progress_shows_rate_and_time_left_on_standard_error(capsys, monkeypatch):
    with progress(total=4, unit="image", mininterval=0) as bar:
        bar.update(3)
        bar.refresh()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "3/4" in captured.err
    assert "image/s" in captured.err
    assert list(progress(range(3))) == [0, 1, 2]


def test_progress_is_sparse_where_nobody_watches(monkeypatch):
    for watched, interval in ((True, 0.2), (False, 10.0)):
        screen = io.StringIO()
        monkeypatch.setattr(screen, "isatty", lambda watched=watched: watched, raising=False)
        monkeypatch.setattr(sys, "stderr", screen)
        with progress(total=1) as bar:
            assert bar.mininterval == interval
        monkeypatch.undo()


# ---------------------------------------------------------------------------------------------------- the device


def gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("cpu", 0, "cpu"),
        ("cpu", 2, "cpu"),
        ("auto", 0, "cpu"),
        ("auto", 1, "cuda"),
        ("cuda", 1, "cuda"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_devices(name, count, expected, monkeypatch):
    gpus(monkeypatch, count)
    assert choose_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("tpu", 1, "unknown device 'tpu'; choose one of: auto, cpu, cuda, cuda:0"),
        ("", 0, "unknown device ''"),
        ("cpu:x", 0, "unknown device 'cpu:x'"),
        ("cudax", 1, "unknown device 'cudax'"),
        ("cuda", 0, "device 'cuda' was asked for, but torch sees no GPU; use --device cpu"),
        ("cuda:x", 1, "unknown device 'cuda:x'"),
        ("cuda:2", 2, "device 'cuda:2' was asked for, but torch sees 2 GPUs"),
    ],
)
def test_devices_that_are_not_there(name, count, message, monkeypatch):
    gpus(monkeypatch, count)
    with pytest.raises(UserError, match=message):
        choose_device(name)


# ------------------------------------------------------------------------------------------------- what is printed

PRINTABLE = {  # text, encoding of the stream -> what is shown
    "plain": ("a b'c", "ascii", "a b'c"),
    "letters": ("Größe 猫 \N{PARTY POPPER}", "utf-8", "Größe 猫 \N{PARTY POPPER}"),
    "wide spaces": ("a\u3000b\xa0c", None, "a\u3000b\xa0c"),
    "joined letters": ("می\u200cخواهم", None, "می\u200cخواهم"),
    "letters that a console lacks": ("Größe 猫", "latin-1", r"Größe \u732b"),
    "letters that ASCII lacks": ("é\N{PARTY POPPER}", "ascii", r"\xe9\U0001f389"),
    "bytes": (os.fsdecode(b"caf\xe9\xff"), "utf-8", r"caf\xe9\xff"),
    "colours": ("a\x1b[31mb\x9b", "utf-8", r"a\x1b[31mb\x9b"),
    "a window's title": ("\x1b]0;x\x07", None, r"\x1b]0;x\x07"),
    "line breaks": ("a\nb\r\tc\x0b\u2028\x85", "utf-8", r"a\nb\r\tc\x0b\u2028\x85"),
    "overwriting": ("a\b\b\x7f", "utf-8", r"a\x08\x08\x7f"),
    "directions": ("\u202egnp.exe\u2066", "utf-8", r"\u202egnp.exe\u2066"),
    "invisible": ("a\u200b\ufeff\xad\U000e0041", "utf-8", r"a\u200b\ufeff\xad\U000e0041"),
    "a lone surrogate": ("\ud83d", "utf-8", r"\ud83d"),
    "zero": ("\0", "ascii", r"\x00"),
}


def stream(encoding):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding or "utf-8", errors="strict")


@pytest.mark.parametrize("name", PRINTABLE)
def test_printable(name):
    text, encoding, shown = PRINTABLE[name]
    assert printable(text, encoding and stream(encoding)) == shown
    shown.encode(encoding or "utf-8")


@pytest.mark.parametrize("name", PRINTABLE)
def test_everything_said_can_be_printed(name, monkeypatch):
    """Each door to the console, on a stream that refuses what it cannot encode."""
    text, encoding, shown = PRINTABLE[name]
    for target in ("stdout", "stderr"):
        monkeypatch.setattr(sys, target, stream(encoding))
    say(text)
    log(text)
    warn(text)
    with progress(total=1, desc=text) as bar:
        bar.refresh()
    with pytest.raises(SystemExit):
        fail(f"'{text}'")
    out, err = (target.buffer.getvalue().decode(target.encoding) for target in (sys.stdout, sys.stderr))
    assert out == f"{shown}\n{shown}\n"
    assert err.startswith(f"warning: {shown}\n\r{shown}:   0%|")
    assert err.endswith("'\n")
    assert "\x1b" not in err


def test_without_a_console(monkeypatch):
    """A process that was started with standard output or error closed."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    say("x")
    warn("x")
    assert list(progress(range(2), desc="x")) == [0, 1]
    assert guard(lambda args: args, 3) == 3


WORDS = [
    "plain",
    "a b",
    "it's",
    'a"b',
    "$HOME",
    "`date`",
    "a;b",
    "*",
    "~",
    "",
    "é",
    "\\n",
    "a\x1bb",
    "a\nb'c\\d",
    "\udce9",
]


@pytest.mark.parametrize("word", WORDS)
def test_a_printed_command_can_be_copied(word):
    command = printable(shell("printf", "%s", word))
    assert command.isprintable()
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    assert done.stdout == os.fsencode(word)


# --------------------------------------------------------------------------------------------------------- flags


def flag_values(*arguments):
    """The value of a flag that is a path."""
    values = flags.FlagValues()
    flags.DEFINE(_Path(), "path", "./d", "A path.", flag_values=values, serializer=flags.ArgumentSerializer())
    values(["program", *arguments])
    return values


def test_paths_start_at_home_where_they_say_so(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert flag_values().path == "./d"
    assert flag_values("--path=~/x/").path == "/home/me/x/"
    assert flag_values("--path", "~").path == "/home/me"
    assert flag_values("--path=a/~").path == "a/~"
    assert flag_values("--path=~nobody-of-that-name/x").path == "~nobody-of-that-name/x"
    assert expand_home("~/x") == "/home/me/x"


def test_a_config(tmp_path, monkeypatch):
    """Its fields can be overridden, none added; with a text behind a colon; by a name with a colon; from home."""
    source = (
        "from ml_collections import ConfigDict\n\n\ndef get_config(which='a'):\n    return ConfigDict({'w': which})\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("c.py", "c:d.py"):
        (tmp_path / name).write_text(source)
        config = read_config(f"~/{name}")
        assert config.w == "a"
        config.w = "b"
        with pytest.raises(AttributeError):
            config.v = 1
    assert read_config(str(tmp_path / "c.py:text:more")).w == "text:more"
    assert not list(tmp_path.glob("*/"))  # no compiled copies


# ----------------------------------------------------------------------------------------------- how a command ends

ENDS = """
import os, signal, sys, threading, time
import command_line
from basics import console

def interrupt(delay=0.0):
    threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    time.sleep(10)

def once(_):
    interrupt()

def terminated(_):
    raise console.Terminated

def twice(_):
    try:
        interrupt()
    finally:
        interrupt()

def turned_into_another_error(_):
    try:
        interrupt()
    except KeyboardInterrupt:
        raise ImportError("numpy.core.multiarray failed to import")

def while_a_thread_ends(_):
    threading.Thread(target=lambda: [time.sleep(0.5), os.kill(os.getpid(), signal.SIGINT), time.sleep(10)]).start()
    interrupt()

def after_the_end(_):
    threading.Thread(target=lambda: [time.sleep(0.5), os.kill(os.getpid(), signal.SIGINT), time.sleep(10)]).start()

def many_lines(_):
    for _ in range(100000):
        console.say("line")

def many_warnings(_):
    for _ in range(100000):
        console.warn("line")

def a_pipe_of_its_own(_):
    read, write = os.pipe()
    os.close(read)
    os.write(write, b"x")

command_line.run(globals()[sys.argv[1]], sys.argv[:1])
"""
INTERRUPTED = "interrupted; the same command continues where this run stopped\n"


def bash(line):
    environment = {**os.environ, "CODE": ENDS, "PYTHONPATH": "."}
    return subprocess.run(["bash", "-c", line], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("how", ["once", "twice", "turned_into_another_error", "while_a_thread_ends", "terminated"])
def test_interrupts_end_quietly(how):
    code = EXIT_TERMINATED if how == "terminated" else EXIT_INTERRUPTED
    assert tiny.command("-c", ENDS, how) == (code, "", INTERRUPTED)


def test_an_interrupt_after_the_end_is_quiet():
    code, out, err = tiny.command("-c", ENDS, "after_the_end")
    assert (code, out, err) in [(-signal.SIGINT, "", ""), (0, "", "")]


def test_an_interrupt_while_the_flags_are_read(tmp_path):
    (tmp_path / "slow.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    arguments = ["main.py", "--mode=train", "--workdir=out", f"--config={tmp_path / 'slow.py'}"]
    assert tiny.command(*arguments) == (EXIT_INTERRUPTED, "", INTERRUPTED)


@pytest.mark.parametrize(("how", "command"), [("many_lines", "head -1"), ("many_warnings", "head -1 >&2")])
def test_output_that_nobody_reads_any_more(how, command):
    line = f'"{sys.executable}" -c "$CODE" {how} 2>&1 | {command}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", line],
        env={**os.environ, "CODE": ENDS, "PYTHONPATH": "."},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == EXIT_NO_READER == 141
    assert (done.stdout + done.stderr).removeprefix("warning: ") == "line\n"


def test_help_that_nobody_reads_to_its_end():
    line = f'"{sys.executable}" main.py --helpfull | true; exit ${{PIPESTATUS[0]}}'
    done = bash(line)
    assert done.returncode in (0, EXIT_NO_READER)
    assert done.stderr == ""


def test_another_broken_pipe_is_a_bug():
    code, _, err = tiny.command("-c", ENDS, "a_pipe_of_its_own")
    assert code == 1
    assert err.endswith("BrokenPipeError: [Errno 32] Broken pipe\n")


def test_a_full_disk_behind_standard_output():
    line = f'"{sys.executable}" -c "$CODE" many_lines >/dev/full'
    done = subprocess.run(
        ["bash", "-c", line],
        env={**os.environ, "CODE": ENDS, "PYTHONPATH": "."},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == EXIT_USER_ERROR
    assert (
        done.stderr
        == "error: No space left on device: while writing; free some space, then run the same command again\n"
    )
