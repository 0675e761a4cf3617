"""The folder of a detector: whole or as it was, named when it is not, and no traceback whatever is in it."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
import tiny

from basics import files
from basics.console import UserError
from lmd import Detector
from storage import detector_folder as folder_format
from storage.arrays import read_arrays, write_arrays

NAMES = ["calibration.npz", "card.md", "detector.json", "model.safetensors"]


@pytest.fixture
def copy(detector_folder, tmp_path):
    return shutil.copytree(detector_folder, tmp_path / "mine")


def load(path):
    return Detector.load(path, device="cpu")


def refused(path, message):
    with pytest.raises(UserError, match=message) as found:
        load(path)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 700


def test_it_holds_four_files_and_no_pickle(detector_folder):
    assert sorted(path.name for path in detector_folder.iterdir()) == NAMES
    with np.load(detector_folder / "calibration.npz", allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays.files)
    description = json.loads((detector_folder / "detector.json").read_text())
    hashes = {name: files.file_hash(detector_folder / name) for name in NAMES if name != "detector.json"}
    assert description["files"] == hashes
    wanted = {"format", "method", "settings", "precision", "versions", "images", "treatment", "blind_spots", "rate"}
    assert wanted <= description.keys()


# -------------------------------------------------------------------------------------------- damaged and incomplete


@pytest.mark.parametrize("name", NAMES)
def test_missing_truncated_or_changed(name, copy):
    content = (copy / name).read_bytes()
    (copy / name).unlink()
    refused(copy, rf"/{name} is missing: the detector was copied in part; copy the whole folder again$")
    (copy / name).mkdir()
    refused(copy, rf"{name} (is missing|cannot be read)")
    (copy / name).rmdir()
    for changed in (content[:-20], content[: len(content) // 2], b"", content.replace(b"1", b"2"), b"\xff" + content):
        assert changed != content
        (copy / name).write_bytes(changed)
        refused(copy, rf"/mine.* ({name}|format)|{name} (is|was|cannot)")
    (copy / name).write_bytes(content)
    load(copy)


def test_no_folder(tmp_path):
    refused(tmp_path / "nowhere", r"^there is no detector in .*/nowhere \(no detector\.json\); make one by cali")
    (tmp_path / "nowhere.unfinished").mkdir()
    refused(tmp_path / "nowhere", r"^the detector .*/nowhere is not finished: .* continues with the same calibrate\.py")
    (tmp_path / "file").write_text("text")
    refused(tmp_path / "file", "file is a file; give the folder that calibrate.py wrote")


# ------------------------------------------------------------------------------------------------------- crafted

DEEP = "[" * 100_000 + "]" * 100_000


def nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


SPOT = {"kind": "noisy", "caught": 0, "images": 3, "rate": 0.1}
CRAFTED = {  # field: value, message; a field that is not there yet is added
    "newer": ("format", 2, "was written in format 2, this version reads 1; use the version that wrote it, or calibr"),
    "format": ("format", "1", "format is .* not a whole number"),
    "yes": ("format", True, "format is true, not a whole number"),
    "no rate": ("rate", "x", "rate is .*, not a number from 0 to 1"),
    "NaN": ("rate", float("nan"), "rate is NaN, not a number from 0 to 1"),
    "infinite": ("rate", float("inf"), "rate is Infinity"),
    "rate 0": ("rate", 0, "a false-alarm rate lies between 0 and 1, not at 0"),
    "rate 1": ("rate", 1, "a false-alarm rate lies between 0 and 1, not at 1"),
    "small rate": ("rate", 0.001, r"n = 50 cannot give 0\.1 %"),
    "method": ("method", "no\nsuch", "unknown method 'no"),
    "method's type": ("method", ["lmd"], "method is .*, not text"),
    "settings' type": ("settings", [], r"settings is \[\], not a table"),
    "setting": ("settings", {"colour": 1}, "there is no setting 'colour'"),
    "metrics": ("settings", {"metrics": ["PSNR"]}, "unknown metric 'PSNR'"),
    "metrics' type": ("settings", {"metrics": 5}, "can be used"),
    "other metrics": ("settings", {"metrics": ["MSE"]}, r"reference is \(50, 2\), not \(n, 1\)"),
    "sampler": ("settings", {"sampler": "slow"}, "unknown sampler of lmd 'slow'"),
    "no blocks": ("settings", {"num_blocks": 0}, "can be used"),
    "blocks": ("settings", {"num_blocks": "8"}, "can be used"),
    "too many blocks": ("settings", {"num_blocks": 10**12}, "settings hold 1000000000000"),
    "too many repetitions": ("settings", {"reps": [[10**9]]}, "settings hold 1000000000"),
    "not a number": ("settings", {"reps": float("nan")}, "settings hold NaN"),
    "mask": ("settings", {"mask_type": "file"}, "can be used"),
    "precision": ("precision", "fp8", "unknown precision"),
    "seed": ("seed", -1, "seed is -1, not a whole number"),
    "huge seed": ("seed", 10**400, "seed is 1000"),
    "crop": ("center_crop", 1, "center_crop is 1, not true or false"),
    "files": ("files", {}, "it lists other files"),
    "file elsewhere": ("files", {"../model.safetensors": "0"}, "it lists other files"),
    "files' type": ("files", {"card.md": 3}, "files is .*, not a table, each text"),
    "blind spots": ("blind_spots", [], r"blind_spots is \[\], not a table"),
    "a blind spot": ("blind_spots", {"noise": 3}, "3 is no table"),
    "its kind": ("blind_spots", {"n": {**SPOT, "kind": 3}}, r"blind_spots\.\S+kind is 3, not text"),
    "its share": ("blind_spots", {"n": {**SPOT, "caught": float("nan")}}, "caught is NaN, not a number from 0 to 1"),
    "its images": ("blind_spots", {"n": {**SPOT, "images": "3"}}, "images is .*, not a whole number"),
    "no rate of it": ("blind_spots", {"n": {"kind": "k", "caught": 0, "images": 3}}, "rate is missing"),
    "steps": ("checkpoint", {"step": "many"}, r"checkpoint\.step is .*, not a whole number"),
    "nested": ("images", {"source": nested(40)}, "it is nested too deeply"),
}  # fmt: skip


def write_description(folder, content):
    """With a digest that fits."""
    content.pop("digest", None)
    (folder / "detector.json").write_text(json.dumps({**content, "digest": folder_format._digest(content)}))


def test_an_edited_description(copy):
    text = (copy / "detector.json").read_text()
    (copy / "detector.json").write_text(text.replace('"rate": 0.05', '"rate": 0.01'))
    refused(copy, r"detector\.json is damaged \(it was changed after it was made; predict\.py can decide at another")


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_description(name, copy):
    field, value, message = CRAFTED[name]
    description = json.loads((copy / "detector.json").read_text())
    if field == "settings" and isinstance(value, dict):
        value = {**description["settings"], **value}
    write_description(copy, {**description, field: value})
    refused(copy, message)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"format"', "{}", DEEP, '{"format": ' + DEEP + "}"])
def test_description_that_is_none(text, copy):
    (copy / "detector.json").write_text(text)
    refused(copy, r"detector\.json is damaged \(.+\); copy the whole folder again$")


@pytest.mark.parametrize("field", sorted(folder_format._FIELDS))
def test_a_field_is_missing(field, copy):
    description = json.loads((copy / "detector.json").read_text())
    del description[field]
    (copy / "detector.json").write_text(json.dumps(description))
    refused(copy, rf"detector\.json is damaged \({field} is missing\); copy the whole folder again")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": np.zeros((0, 2))}, "it has no calibration scores"),
        ({"parts": np.zeros((50, 3))}, r"parts is \(50, 3\), not \(n, 2\)"),
        ({"parts": np.zeros(50)}, r"parts is \(50,\), not \(n, 2\)"),
        ({"parts": np.full((50, 2), np.nan)}, r"calibration\.npz holds parts that are no finite numbers; cal"),
        ({"parts": np.full((50, 2), "1")}, "holds parts that are no finite numbers"),
        ({"parts": None}, "missing 1 required positional argument: 'parts'"),
        ({"reference": np.zeros((0, 2))}, "it has no calibration scores"),
        ({"reference": np.full((50, 2), np.inf)}, "holds reference that are no finite numbers"),
        ({"pixels": np.zeros(2)}, "no mean and standard deviation"),
        ({"pixels": np.ones(3)}, "no mean and standard deviation"),
        ({"more": np.zeros(1)}, "unexpected keyword argument 'more'"),
        ({"method_more": np.zeros(1)}, "the method lmd keeps no arrays"),
    ],
)  # fmt: skip
def test_crafted_arrays(changes, message, copy):
    """With hashes that fit."""
    path = copy / "calibration.npz"
    arrays = {**read_arrays(path, {}), **changes}
    write_arrays(path, {}, **{name: value for name, value in arrays.items() if value is not None})
    description = json.loads((copy / "detector.json").read_text())
    description["files"]["calibration.npz"] = files.file_hash(path)
    write_description(copy, description)
    refused(copy, message)


# --------------------------------------------------------------------------------------------------- written whole


@pytest.fixture(scope="module")
def detector(detector_folder):
    return load(detector_folder)


def test_what_stands_there(detector, copy, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = tiny.snapshot(tmp_path)
    for name in ("photos", "file", "link"):
        with pytest.raises(UserError, match=rf"/{name} is there already and holds no detector; choose another"):
            detector.save(tmp_path / name)
    assert tiny.snapshot(tmp_path) == before
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", copy):
        detector.save(path)
        load(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "link", "mine", "photos"]


def test_what_lies_beside_a_detector_is_not_lost(detector, copy):
    (copy / "incoming").mkdir()
    (copy / "incoming" / "cat.png").write_text("mine")
    before = tiny.snapshot(copy.parent)
    with pytest.raises(UserError, match=r"/mine holds a detector and beside it incoming, which would be lost when it "):
        detector.save(copy)
    assert tiny.snapshot(copy.parent) == before


@pytest.mark.parametrize("write", range(1, 5))
def test_full_disk(write, detector, copy, monkeypatch):
    before, written, flush = tiny.snapshot(copy.parent), [], os.fsync

    def full(handle):
        written.append(handle)
        if len(written) == write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device; free some space"):
        detector.save(copy)
    assert tiny.snapshot(copy.parent) == before
    assert [path.name for path in copy.parent.iterdir()] == ["mine"]


@pytest.mark.parametrize("rename", [1, 2])
def test_a_folder_that_cannot_be_renamed(rename, detector, copy, monkeypatch):
    before, plain, renamed = tiny.snapshot(copy.parent), folder_format.Path.rename, []

    def fails(self, target):
        renamed.append(target)
        if len(renamed) == rename:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return plain(self, target)

    monkeypatch.setattr(folder_format.Path, "rename", fails)
    with pytest.raises(UserError, match="/mine cannot be written: Permission denied; choose a folder you may write to"):
        detector.save(copy)
    assert tiny.snapshot(copy.parent) == before


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from basics import files
from lmd import Detector
from storage import detector_folder

source, place = Path(sys.argv[1]), Path(sys.argv[2])
detector = Detector.load(source, device="cpu")
detector.infer_threshold(0.2)
rename, flush = Path.rename, os.fsync

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

for moment in ("write 1", "write 2", "write 3", "write 4", "rename 1", "rename 2", "rename 3"):
    kind, number = moment.split()
    where = shutil.copytree(source, place / moment / "mine")
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if moment == "rename 3" else -signal.SIGKILL)
        continue
    done = {"write": 0, "rename": 0}

    def counted(what, function):
        def call(*arguments):
            done[what] += 1
            if what == kind and done[what] == int(number):
                kill()
            return function(*arguments)
        return call

    files.os.fsync, Path.rename = counted("write", flush), counted("rename", rename)
    detector.save(where)
    os._exit(0)
"""


def test_killed_while_it_is_replaced(detector, detector_folder, tmp_path):
    """The old one stays whole, also in the moment in which neither stands in its place."""
    code, _, err = tiny.command("-c", KILLED, detector_folder, tmp_path)
    assert code == 0, err
    for moment in tmp_path.iterdir():
        assert load(moment / "mine").rate == (0.2 if moment.name == "rename 3" else 0.05), moment
    assert not (tmp_path / "rename 2" / "mine").exists()
    again = tmp_path / "rename 2" / "mine"
    detector.save(again)
    assert sorted(path.name for path in again.iterdir()) == NAMES
