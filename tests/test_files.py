"""Files are whole or not there, and a folder has one run that writes to it."""

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import threading

import pytest
import tiny
from PIL import Image

from basics import files
from basics.console import UserError

# ---------------------------------------------------------------------------------------------- atomic writing


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_writes_whole_files_and_makes_folders(tmp_path):
    files.write_text(tmp_path / "a" / "b" / "c.txt", "grün")
    files.write_text(tmp_path / "a" / "b" / "c.txt", "blau")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == b"blau"
    files.write_json(tmp_path / "a" / "d.json", {"x": [1, 2.5, None]})
    assert json.loads((tmp_path / "a" / "d.json").read_text()) == {"x": [1, 2.5, None]}
    assert listing(tmp_path / "a") == ["b", "d.json"]
    assert listing(tmp_path / "a" / "b") == ["c.txt"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_the_umask_is_respected(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        files.write_text(tmp_path / "file", "text")
        assert os.umask(mask) == mask  # and left as it was
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


WRITE_FAILURES = {
    "no room": (errno.ENOSPC, "free some space, then run the same command again"),
    "quota": (errno.EDQUOT, "free some space, then run the same command again"),
    "no permission": (errno.EACCES, "choose a folder you may write to"),
    "a failing disk": (errno.EIO, "the disk fails; check it"),
    "something else": (errno.EINVAL, "check the disk, or choose a folder on another"),
}


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("name", WRITE_FAILURES)
def test_a_failing_write_leaves_the_old_file_alone(step, name, tmp_path, monkeypatch):
    """And names the remedy of this very failure."""
    path, (number, remedy) = tmp_path / "file", WRITE_FAILURES[name]
    files.write_bytes(path, b"old")
    monkeypatch.setattr(files.os, step, tiny.failing(number))
    with pytest.raises(UserError) as error:
        files.write_bytes(path, b"new")
    monkeypatch.undo()
    assert str(error.value).startswith(f"cannot write {path}: {os.strerror(number)}; {remedy}")
    assert path.read_bytes() == b"old"
    assert listing(tmp_path) == ["file"]


@contextlib.contextmanager
def no_larger_than(size):
    """Within it the system refuses to write beyond so many bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_system_refuses_midway(tmp_path):
    """The kernel itself takes the first part and refuses the rest."""
    path = tmp_path / "file"
    files.write_bytes(path, b"old")
    with no_larger_than(1000), pytest.raises(UserError, match="cannot write"):
        files.write_bytes(path, bytes(5000))
    assert path.read_bytes() == b"old"
    assert listing(tmp_path) == ["file"]


def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    def interrupt(handle):
        raise KeyboardInterrupt

    files.write_bytes(tmp_path / "file", b"old")
    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert listing(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*/file/below/x: (Not a directory|File exists)"):
        files.write_text(tmp_path / "file" / "below" / "x", "text")


def test_hash(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, example B.1
    assert files.file_hash(tmp_path / "file") == expected


def test_a_picture(tmp_path):
    files.write_png(tmp_path / "a" / "picture.png", Image.new("L", (3, 2), 7))
    assert Image.open(tmp_path / "a" / "picture.png").size == (3, 2)


def test_a_name_as_long_as_the_system_allows(tmp_path):
    """The temporary name is no longer than the final one has to be."""
    files.write_text(tmp_path / ("n" * 255), "text")
    assert (tmp_path / ("n" * 255)).read_text() == "text"


def test_too_long_a_name(tmp_path):
    with pytest.raises(UserError, match=r"^cannot write .*: File name too long; choose a shorter path$"):
        files.write_text(tmp_path / ("n" * 256), "text")


# ---------------------------------------------------------------------------------------------------- ownership

HOLDER = """
import sys, time
sys.path.insert(0, ".")
from basics import files
with files.owned(sys.argv[1]):
    print("owned", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that owns the folder `owned`."""
    process = tiny.start("-c", HOLDER, tmp_path / "owned")
    assert process.stdout.readline() == "owned\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_has_one_owner_until_it_ends_or_is_killed(holder, tmp_path):
    folder = tmp_path / "owned"
    with (
        pytest.raises(UserError, match=rf"^{folder} is being written to by process {holder.pid} on .*; wait until"),
        files.owned(folder),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with files.owned(folder):
        assert f"process {os.getpid()} on" in (folder / files.MARK).read_text()
    with files.owned(folder):  # and again
        pass


def test_an_owner_that_fails_leaves_no_empty_folders(tmp_path):
    """But those that were there, and those in which something was made."""

    def owned(folder, make=None):
        with files.owned(folder):
            if make:
                (folder / make).touch()
            raise UserError("no")

    def fail(*arguments):
        with pytest.raises(UserError, match="no"):
            owned(*arguments)

    fail(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    fail(tmp_path / "there" / "c")
    fail(tmp_path / "there")
    assert (tmp_path / "there" / files.MARK).exists()
    fail(tmp_path / "d", "result")
    assert (tmp_path / "d" / "result").exists()
    with files.owned(tmp_path / "e"):
        pass
    assert (tmp_path / "e" / files.MARK).exists()


def test_an_owner_removes_what_killed_writes_left_but_not_what_others_are_writing(holder, tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    mine, dead, living, foreign = (
        f".lmd-{machine}-{process}-{16 * '0'}.tmp"
        for machine, process in [
            (files._machine(), os.getpid()), (files._machine(), ended.pid), (files._machine(), holder.pid),
            ("0" * 8, ended.pid),
        ]
    )  # fmt: skip
    kept = [tmp_path / "owned" / living, tmp_path / mine, tmp_path / foreign, tmp_path / "deep" / "my.tmp"]
    gone = [tmp_path / dead, tmp_path / "deep" / "er" / dead, tmp_path / "deep" / foreign]
    for path in [*kept, *gone]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    os.utime(gone[-1], (0, 0))  # of another machine, and old
    with files.owned(tmp_path):
        assert [path.exists() for path in [*kept, *gone]] == 4 * [True] + 3 * [False]


def test_a_write_that_is_killed_leaves_a_file_that_the_next_owner_removes(tmp_path):
    code = (
        "import sys, os, signal; sys.path.insert(0, '.'); from basics import files\n"
        "files.os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.write_text(sys.argv[1], 'text')"
    )
    assert tiny.command("-c", code, tmp_path / "file")[0] == -signal.SIGKILL
    assert len(listing(tmp_path)) == 1
    with files.owned(tmp_path):
        pass
    assert listing(tmp_path) == [files.MARK]


def test_trying_a_folder_out_leaves_nothing(tmp_path):
    for folder in tmp_path, tmp_path / "a" / "b":
        files.check_writable(folder)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for folder in tmp_path / "file", tmp_path / "file" / "a" / "b":
        with pytest.raises(UserError, match=rf"^cannot write to {folder}: Not a directory; a file stands where"):
            files.check_writable(folder)


def test_a_folder_that_takes_names_but_no_content_is_found_out(tmp_path):
    """As on a full disk; here by a limit on the size of files."""
    with no_larger_than(1000), pytest.raises(UserError, match=rf"^cannot write to {tmp_path}: File too large; "):
        files.check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_owned(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(UserError, match=r"^cannot write to .*/file/below: Not a directory; a file stands where"),
        files.owned(tmp_path / "file" / "below"),
    ):
        pass


def test_only_a_new_folder_is_marked(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_text("picture")
    for name in ("mine", "new"):
        files.mark(tmp_path / name)
    assert listing(tmp_path / "mine") == ["photo.png"]
    assert listing(tmp_path / "new") == [files.MARK]


# ------------------------------------------------------------------------------------------------- short sections


def test_a_short_section_waits_for_its_turn_and_leaves_nothing(tmp_path):
    inside, leave, order = threading.Event(), threading.Event(), []

    def first():
        with files.alone(tmp_path):
            inside.set()
            leave.wait(10)
            order.append("first")

    def second():
        inside.wait(10)
        with files.alone(tmp_path):
            order.append("second")

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    inside.wait(10)
    threads[1].join(0.2)
    assert order == []
    leave.set()
    for thread in threads:
        thread.join()
    assert order == ["first", "second"]
    assert listing(tmp_path) == []


def test_a_short_section_where_folders_cannot_be_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(files.fcntl, "flock", tiny.failing(errno.EBADF))
    with files.alone(tmp_path):
        files.write_text(tmp_path / "x", "y")
