"""A user's error is one line and exit code 2; anything else keeps its traceback."""

import errno
import io
import os

import pytest
import torch

import console
from console import UserError


def failure(capsys, function):
    """The line that a failing `function(None)` prints, guarded."""
    with pytest.raises(SystemExit) as exit_:
        console.guard(function, None)
    assert exit_.value.code == console.EXIT_USER_ERROR == 2
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


@pytest.mark.parametrize("number", console._REMEDIES)
def test_errors_of_the_system_that_the_user_can_put_right(number, capsys):
    line = failure(capsys, raising(OSError(number, os.strerror(number), "some/file")))
    assert line == f"{os.strerror(number)}: some/file; {console._REMEDIES[number]}"


def test_a_full_disk_without_a_file_name(capsys):
    line = failure(capsys, raising(OSError(errno.ENOSPC, "No space left on device")))
    assert line == "No space left on device: while writing; free some space, then run the same command again"


@pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.EINVAL, "broken"), RuntimeError("x"), OSError("odd")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)) as caught:
        console.guard(raising(error), None)
    assert caught.value is error


def test_interruption(capsys):
    assert console.guard(raising(KeyboardInterrupt()), None) == console.EXIT_INTERRUPTED == 130
    assert capsys.readouterr().err == "interrupted; the same command continues where this run stopped\n"


def test_success():
    assert console.guard(lambda args: args, ["a"]) == ["a"]
    assert console.guard(lambda args: None, []) is None


def test_choose():
    assert console.choose("a", {"a": 1, "b": 2}, "letter") == 1
    with pytest.raises(UserError, match=r"^unknown letter 'c'; choose one of: a, b$"):
        console.choose("c", {"a": 1, "b": 2}, "letter")


def test_say_and_warn(capsys):
    console.say("hello")
    console.warn("careful")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("hello\n", "warning: careful\n")


def test_progress_shows_rate_and_time_left_on_standard_error(capsys, monkeypatch):
    with console.progress(total=4, unit="image", mininterval=0) as bar:
        bar.update(3)
        bar.refresh()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "3/4" in captured.err
    assert "image/s" in captured.err
    assert list(console.progress(range(3))) == [0, 1, 2]


def test_progress_is_sparse_where_nobody_watches(monkeypatch):
    for watched, interval in ((True, 0.2), (False, 10.0)):
        screen = io.StringIO()
        monkeypatch.setattr(screen, "isatty", lambda watched=watched: watched, raising=False)
        monkeypatch.setattr(console.sys, "stderr", screen)
        with console.progress(total=1) as bar:
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
    assert console.choose_device(name) == torch.device(expected)


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
        console.choose_device(name)
