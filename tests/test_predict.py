"""predict.py: a row an image whatever it is called and however often it was stopped; decided anew without torch."""

import contextlib
import csv
import io
import json
import re
import shutil
import types

import numpy as np
import pytest
import test_calibrate
import tiny
from PIL import Image

import predict as command
from basics.console import UserError
from lmd import Detector, calibration, measurement, predicting, shifts
from lmd import report as reports
from lmd.deciding import Rule, decide_again, overlay
from lmd.methods.lmd import LMD
from lmd.predicting import PredictionJob
from storage import predictions
from storage.arrays import write_arrays
from storage.tables import write_csv

NEW = np.concatenate([tiny.pictures(30, seed=7), 255 - tiny.pictures(10, seed=8)])
WRITTEN = {"chunks", "outcome.json", "outcome.npz", "predictions.csv", "report.html", "skipped.csv", "summary.json"}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(measurement, "_CHUNK_ON_CPU", 8)


@pytest.fixture(scope="module")
def data(tmp_path_factory, detector_folder):
    """Images as a folder and as an array; the detector."""
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "incoming", NEW)
    np.savez(folder / "incoming.npz", NEW)
    (folder / "detector").symlink_to(detector_folder)
    return folder


def write_images(folder, images, names="{:02}.png"):
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / names.format(number))


def predict(data, output, images=None, **options):
    rule = Rule(str(output), **options)
    job = PredictionJob(str(data / "detector"), str(images or data / "incoming"), rule, command="python predict.py")
    return predicting.predict(job, tiny.CPU)


def rows_of(output, name="predictions.csv"):
    with (output / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summary_of(output):
    return json.loads((output / "summary.json").read_text())


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """The results of the folder, and what was printed."""
    output, out = tmp_path_factory.mktemp("made") / "results", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(measurement, "_CHUNK_ON_CPU", 8)
        flagged = predict(data, output)
    return output, out.getvalue(), flagged


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "results")


def as_if_of(output, images, detector):
    """Has the predictions in a folder be of images, and by a detector, in another place."""
    description, arrays = predictions.read_outcome(output)
    description["facts"]["images"]["source"], description["detector"] = str(images), str(detector)
    predictions.write_outcome(output, description, arrays)


# ----------------------------------------------------------------------------------------------- what it writes


def test_rows_are_the_detectors_answers(made, data, detector_folder):
    output, _, flagged = made
    assert {path.name for path in output.iterdir() if not path.name.startswith(".")} == WRITTEN
    found = Detector.load(detector_folder, device="cpu").predict(data / "incoming")
    rows = rows_of(output)
    assert list(rows[0]) == ["file", "score", "p_value", "is_outlier", "p_lmd_mse", "p_lmd_ssim"]
    assert [row["file"] for row in rows] == [f"{number:02}.png" for number in range(40)]
    np.testing.assert_allclose([float(row["score"]) for row in rows], found.score, rtol=1e-4)
    np.testing.assert_array_equal([float(row["p_value"]) for row in rows], found.p_value)
    np.testing.assert_array_equal([row["is_outlier"] == "True" for row in rows], found.is_outlier)
    for name, values in found.parts.items():
        np.testing.assert_array_equal([float(row[f"p_{name}"]) for row in rows], values)
    assert flagged == found.is_outlier.sum() > 0


def test_what_it_says(made):
    output, out, flagged = made
    sentence = f"{flagged} of 40 images are flagged at a false-alarm rate of 5 % (2 would be by chance)."
    assert sentence in out.splitlines()
    assert "'incoming': 40 images; what is not 8x8 pixels, grey, is cropped to the centre square" in out
    p = calibration.folder_test(*(read_arrays_of(output)[name] for name in ("calibration", "score")))
    assert re.search(rf"^The folder as a whole .* the domain \(one-sided rank test, p = {p:.2g}\)\.$", out, re.M)
    summary = summary_of(output)
    assert summary["sentences"][0] == sentence
    assert (summary["images"], summary["flagged"], summary["skipped"]) == (40, flagged, 0)
    assert (summary["false_alarm_rate"], summary["false_discovery_rate"]) == (0.05, None)
    assert summary["calibration_images"] == 50
    assert {"images", "measured by", "method", "versions", "checkpoint", "detector files"} <= summary["facts"].keys()


def read_arrays_of(output):
    return predictions.read_outcome(output)[1]


@pytest.mark.parametrize("kind", ["array", "list", "one file"])
def test_other_sources(kind, made, data, tmp_path):
    source, rows, name = {
        "array": (data / "incoming.npz", slice(None), "image 4"),
        "list": (data / "list.txt", slice(None), "incoming/04.png"),
        "one file": (data / "incoming" / "04.png", slice(4, 5), str(data / "incoming" / "04.png")),
    }[kind]
    (data / "list.txt").write_text("".join(f"incoming/{number:02}.png\n" for number in range(40)))
    predict(data, tmp_path / "out", source)
    found, expected = rows_of(tmp_path / "out"), rows_of(made[0])[rows]
    assert found[0 if kind == "one file" else 4]["file"] == name
    assert [row["p_value"] for row in found] == [row["p_value"] for row in expected]
    sentences = summary_of(tmp_path / "out")["sentences"]
    assert len(sentences) == (1 if kind == "one file" else 2)  # a single image's test as a folder is its p-value
    assert re.match(r"[01] of 1 image is flagged" if kind == "one file" else r"\d+ of 40 images ", sentences[0])


def test_a_choice_of_an_array_is_called_by_its_places(data, tmp_path):
    job = PredictionJob(str(data / "detector"), str(data / "incoming.npz"), Rule(str(tmp_path / "out")), max_images=3)
    predicting.predict(job, tiny.CPU)
    assert [row["file"] for row in rows_of(tmp_path / "out")] == ["image 0", "image 13", "image 26"]
    np.testing.assert_array_equal(read_arrays_of(tmp_path / "out")["picture_originals"][:, 0], NEW[[0, 13, 26]])


HOSTILE = [
    "=1+1.png",
    "-2.png",
    "@a.png",
    'a,"b".png',
    "new\nline.png",
    "\x1b[31mred.png",
    "<script>x.png",
    "é\udce9.png",
]


def test_hostile_names_and_broken_files(data, tmp_path, capsys):
    folder = tmp_path / "incoming"
    folder.mkdir()
    for number, name in enumerate(HOSTILE):
        Image.fromarray(NEW[-1 - number]).save(folder / "x.png")
        (folder / "x.png").rename(folder / name)
    Image.fromarray(NEW[0]).resize((21, 17)).convert("RGB").save(folder / "large.jpg")
    (folder / "=broken\x1b.png").write_bytes(b"\x89PNG broken")
    (folder / "empty.png").write_bytes(b"")
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("no picture")
    (folder / ".DS_Store").write_bytes(b"")
    flagged = predict(data, tmp_path / "out", folder, maps=True, false_alarm_rate=0.9)
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert f"warning: 3 files got no decision; see {tmp_path}/out/skipped.csv" in err
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 9
    assert flagged > 3
    names = [row["file"] for row in rows]
    assert names == [
        "\\x1b[31mred.png", "'-2.png", "<script>x.png", "'=1+1.png", "'@a.png", 'a,"b".png', "large.jpg",
        "new\\nline.png", "é\\xe9.png",
    ]  # fmt: skip
    skipped = rows_of(tmp_path / "out", "skipped.csv")
    assert [row["file"] for row in skipped] == ["'=broken\\x1b.png", "empty.png", "sub/notes.txt"]
    assert all(row["reason"] for row in skipped)
    assert skipped[2]["reason"] == "not taken for an image, by its ending"
    assert "<script>x.png" not in (tmp_path / "out" / "report.html").read_text()
    pictures = [path for path in (tmp_path / "out" / "maps").iterdir() if path.suffix == ".png"]
    assert len(pictures) == flagged
    assert all(re.fullmatch(r"\d{6}_\w+\.png", path.name) for path in pictures)


def test_a_folder_without_images(data, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"^folder \S+/none holds no images; check the path$"):
        predict(data, tmp_path / "out", tmp_path / "none")
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------- stopped, continued, run again


def test_results_below_the_images_are_no_files_without_a_decision(data, tmp_path, detector_folder):
    write_images(tmp_path / "images", NEW)
    shutil.copytree(detector_folder, tmp_path / "images" / "detector")
    for _ in range(2):
        predict(data, tmp_path / "images" / "results", tmp_path / "images", maps=True)
        assert rows_of(tmp_path / "images" / "results", "skipped.csv") == []
        assert [row["file"] for row in rows_of(tmp_path / "images" / "results")] == [f"{n:02}.png" for n in range(40)]


KILLED = """
import sys
import test_predict, tiny
from pathlib import Path
from lmd import measurement

measurement._CHUNK_ON_CPU = 8
data, place = map(Path, sys.argv[1:])
predict = lambda write: test_predict.predict(data, place / str(write))
tiny.killed_at((1, 3, 6, 7, 8, 11), predict)  # five chunks, the outcome's two files, three tables, the report
"""


def test_killed_and_continued(made, data, tmp_path, monkeypatch):
    """To the same table, byte for byte; nothing is measured twice."""
    code, _, err = tiny.command("-c", KILLED, data, tmp_path)
    assert code == 0, err
    expected, plain, seen = tiny.snapshot(made[0]), LMD.examine, []
    monkeypatch.setattr(LMD, "examine", lambda self, *arguments: seen.append(1) or plain(self, *arguments))
    for write, missing in ((1, 5), (3, 3), (6, 0), (7, 0), (8, 0), (11, 0)):
        output = tmp_path / str(write)
        if write in (6, 7):  # the outcome is not whole
            with pytest.raises(UserError, match=r"; run predict\.py with --detector and --images again$"):
                decide_again(Rule(str(output)))
        seen.clear()
        predict(data, output)
        assert len(seen) == missing, write
        found = tiny.snapshot(output)
        for name in found.keys() - {path for path in found if path.name in ("report.html", ".lift-map-detect")}:
            assert found[name] == expected[name], (write, name)
        assert len(found) == len(expected)


def test_free_of_the_size_of_chunks(made, data, tmp_path, monkeypatch):
    monkeypatch.setattr(measurement, "_CHUNK_ON_CPU", 256)
    predict(data, tmp_path / "out")
    found, expected = rows_of(tmp_path / "out"), rows_of(made[0])
    np.testing.assert_allclose(*([float(row["score"]) for row in rows] for rows in (found, expected)), rtol=1e-4)
    assert [row["p_value"] for row in found] == [row["p_value"] for row in expected]


def test_a_folder_that_grew(made, data, copy, tmp_path, capsys, monkeypatch):
    """More images under later names: their own chunks alone are measured; the others' rows stay."""
    write_images(tmp_path / "incoming", [*NEW, *tiny.pictures(6, seed=9)])
    as_if_of(copy, tmp_path / "incoming", data / "detector")
    plain, seen = LMD.examine, []
    monkeypatch.setattr(LMD, "examine", lambda self, *arguments: seen.append(1) or plain(self, *arguments))
    predict(data, copy, tmp_path / "incoming")
    assert len(seen) == 1
    before, after = ((output / "predictions.csv").read_text() for output in (made[0], copy))
    assert after.startswith(before)
    assert "measured anew" not in capsys.readouterr().out
    (tmp_path / "incoming" / "00.png").unlink()
    predict(data, copy, tmp_path / "incoming")
    assert (
        "/chunks: 6 of 6 parts were measured from other images, or otherwise, and are meas" in capsys.readouterr().out
    )
    scores = [[row["p_value"] for row in rows_of(output)] for output in (made[0], copy)]
    assert scores[1][:39] == scores[0][1:]


def test_another_detector(made, data, copy, detector_folder, tmp_path, capsys):
    other = Detector.load(detector_folder, device="cpu")
    other.infer_threshold(0.5)
    other.save(tmp_path / "detector")
    as_if_of(copy, data / "incoming", tmp_path / "detector")
    predict(tmp_path, copy, data / "incoming")
    assert "/chunks: 5 of 5 parts were measured from other images, or otherwise" in capsys.readouterr().out
    assert summary_of(copy)["false_alarm_rate"] == 0.5
    assert [row["p_value"] for row in rows_of(copy)] == [row["p_value"] for row in rows_of(made[0])]


def test_other_things_are_not_overwritten(data, copy, detector_folder, tmp_path):
    shutil.copytree(detector_folder, tmp_path / "other")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "predictions.csv").write_text("mine")
    write_images(tmp_path / "incoming", NEW[:3])
    shutil.copytree(detector_folder, tmp_path / "detector")
    before = tiny.snapshot(tmp_path)
    for output, images, detector, message in (
        (copy, tmp_path / "few.npz", data / "detector", "holds predictions of other images"),
        (copy, data / "incoming", tmp_path / "other", "holds predictions by another detector"),
        (copy, tmp_path / "incoming", data / "detector", "holds predictions of other images"),
        (copy, data / "incoming", tmp_path / "detector", "holds predictions by another detector"),
        (tmp_path / "own", data / "incoming", data / "detector", "own holds other files; choose an --output that is"),
        (tmp_path / "other", data / "incoming", data / "detector", "other holds other files; choose an --output"),
    ):
        job = predicting.PredictionJob(str(detector), str(images), Rule(str(output)))
        with pytest.raises(UserError, match=message):
            predicting.predict(job, tiny.CPU)
    assert tiny.snapshot(tmp_path) == before


def test_images_and_detector_may_be_moved(data, detector_folder, tmp_path):
    """And reached by another path; but another folder that has come in the place of the name is not taken for them."""
    (tmp_path / "a").mkdir()
    write_images(tmp_path / "a" / "incoming", NEW[:3])
    shutil.copytree(detector_folder, tmp_path / "a" / "detector")
    output = tmp_path / "out"
    predict(tmp_path / "a", output)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    predict(tmp_path / "link", output)
    (tmp_path / "link").unlink()
    shutil.move(tmp_path / "a", tmp_path / "b")
    predict(tmp_path / "b", output)
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    with pytest.raises(UserError, match=rf"holds predictions of other images \({tmp_path}/b/incoming\); choose"):
        predict(tmp_path / "c", output)


def test_a_damaged_part_is_measured_anew(made, data, copy, capsys):
    path = copy / "chunks" / "chunk_1.npz"
    path.write_bytes(path.read_bytes()[:100])
    predict(data, copy, data / "incoming")
    assert "chunk_1.npz is damaged or truncated; it is measured anew" in capsys.readouterr().err
    assert (copy / "predictions.csv").read_bytes() == (made[0] / "predictions.csv").read_bytes()


def test_nan_is_one_line_and_loses_nothing(data, copy, tmp_path, monkeypatch):
    before, plain = tiny.snapshot(copy), LMD._distances
    (copy / "chunks" / "chunk_2.npz").unlink()
    monkeypatch.setattr(LMD, "_distances", lambda *arguments: plain(*arguments) * np.nan)
    with pytest.raises(UserError, match=r"^what the method lmd measures is NaN or infinite: .* another checkpoint$"):
        predict(data, copy)
    after = tiny.snapshot(copy)
    assert {name for name in before if after.get(name) != before[name] and name.suffix != ""} == {
        name for name in before if name.name == "chunk_2.npz"
    }


SHARED = """
import os, sys
import test_calibrate, test_predict
from pathlib import Path
from basics import distributed
from lmd import calibrating, measurement, predicting
from lmd.deciding import Rule

measurement._CHUNK_ON_CPU = 8
data, held, place = map(Path, sys.argv[1:])
examine = measurement.Measurement._examine

def noted(self, number, pixels):
    with (place / ("rank " + os.environ["RANK"])).open("a") as file:
        print(self.origin.get("shift", "-"), file=file)
    return examine(self, number, pixels)

measurement.Measurement._examine = noted

def main():  # as in the commands, so that the process group is gone before the interpreter is
    with distributed.start("cpu") as (ranks, device):
        calibrating.calibrate(test_calibrate.job(held, place / "mine", card_images=4), device, ranks)
        job = predicting.PredictionJob(str(data / "detector"), str(data / "incoming"), Rule(str(place / "out")))
        predicting.predict(job, device, ranks)

main()
"""


def test_two_processes_write_the_same(made, data, tmp_path):
    held = tmp_path / "held"
    held.mkdir()
    tiny.write_checkpoint(held / "checkpoint.pth")
    tiny.write_pictures(held / "held.npz", 60)
    (tmp_path / "child.py").write_text(SHARED)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    code, out, err = tiny.command(*launch, tmp_path / "child.py", data, held, tmp_path)
    assert code == 0, err
    assert out.count("detector: ") == 1
    measured = [set((tmp_path / f"rank {rank}").read_text().split()) - {"-"} for rank in (0, 1)]  # a chunk each
    assert [len(kinds) for kinds in measured] == [len(shifts.SHIFTS) // 2] * 2
    assert set().union(*measured) == set(shifts.SHIFTS)
    assert (tmp_path / "out" / "predictions.csv").read_bytes() == (made[0] / "predictions.csv").read_bytes()
    test_calibrate.calibrate(test_calibrate.job(held, tmp_path / "alone", card_images=4))
    assert tiny.snapshot(tmp_path / "mine") == tiny.snapshot(tmp_path / "alone")


# ----------------------------------------------------------------------------------------------- deciding anew


@pytest.mark.parametrize("options", [{"false_alarm_rate": 0.3}, {"false_discovery_rate": 0.4}, {}])
def test_decided_anew_is_as_from_scratch(options, data, copy, tmp_path, capsys):
    again = decide_again(Rule(str(copy), **options))
    said = capsys.readouterr().out
    assert again == predict(data, tmp_path / "new", **options)
    assert said.splitlines()[:2] == capsys.readouterr().out.splitlines()[1:3]
    for name in ("predictions.csv", "skipped.csv"):
        assert (copy / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
    ours, theirs = summary_of(copy), summary_of(tmp_path / "new")
    assert ours == theirs


def test_results_of_an_earlier_version_are_decided_anew(made, copy):
    """They do not say what the parts mean."""
    description, arrays = predictions.read_outcome(copy)
    del description["meanings"]
    predictions.write_outcome(copy, description, arrays)
    decide_again(Rule(str(copy)))
    words = ">p of lmd_mse</dt><dd>structure: its parts do not fit together as the domain"
    assert [words in (output / "report.html").read_text() for output in (made[0], copy)] == [True, False]


def test_false_discovery_rate(copy, capsys):
    p = read_arrays_of(copy)["p_value"]
    for rate in (0.02, 0.3):
        flagged = calibration.discoveries(p, rate)
        assert decide_again(Rule(str(copy), false_discovery_rate=rate)) == flagged.sum()
        assert [row["is_outlier"] == "True" for row in rows_of(copy)] == flagged.tolist()
        assert f"{flagged.sum()} of 40 images are flagged at a false discovery rate of " in capsys.readouterr().out
        assert summary_of(copy)["false_alarm_rate"] is None
    assert flagged.any()


def test_maps_are_of_what_is_flagged_now(copy):
    """Also where more was flagged before; what else is in the folder stays."""
    (copy / "maps").mkdir()
    (copy / "maps" / "mine.png").write_text("mine")
    for rate in (0.2, 0.05):
        decide_again(Rule(str(copy), false_alarm_rate=rate, maps=True))
        flagged = [number for number, row in enumerate(rows_of(copy)) if row["is_outlier"] == "True"]
        names = {path.name for path in (copy / "maps").glob("*.png")}
        assert names == {"mine.png", *(f"{number:06d}_{number:02}.png" for number in flagged)}
    with Image.open(copy / "maps" / f"{flagged[0]:06d}_{flagged[0]:02}.png") as picture:
        assert (picture.size, picture.mode) == ((8, 8), "RGB")


def test_maps_of_another_decision_are_removed(copy, capsys):
    decide_again(Rule(str(copy), false_alarm_rate=0.2, maps=True))
    assert "removed" not in capsys.readouterr().out
    decide_again(Rule(str(copy), false_alarm_rate=0.1))
    assert f"{copy / 'maps'}: removed, since it may be of another decision; --maps makes" in capsys.readouterr().out
    assert not (copy / "maps").exists()
    decide_again(Rule(str(copy), false_alarm_rate=0.2, maps=True))
    (copy / "maps" / "notes.txt").write_text("mine")
    decide_again(Rule(str(copy), false_alarm_rate=0.1))
    assert {path.name for path in (copy / "maps").iterdir()} == {".lift-map-detect", "notes.txt"}


def test_a_detector_without_maps_says_so_before_it_measures(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Detector, "has_maps", False)
    monkeypatch.setattr(measurement.Measurement, "run", tiny.failing(5))
    with pytest.raises(UserError, match="has no maps; leave --maps out"):
        predict(data, tmp_path / "out", maps=True)
    assert not (tmp_path / "out").exists()


def test_maps_are_no_input(copy, data, tmp_path):
    """Results below the folder of images: what was written there is not taken for images."""
    images = shutil.copytree(data / "incoming", tmp_path / "incoming")
    shutil.copytree(copy, images / "results")
    as_if_of(images / "results", images, data / "detector")
    decide_again(Rule(str(images / "results"), false_alarm_rate=0.5, maps=True))
    predict(data, images / "results", images)
    assert len(rows_of(images / "results")) == 40


def test_overlay():
    grey, heat = np.full((4, 4, 1), 100, np.uint8), np.zeros((4, 4), np.uint8)
    heat[0, 0] = 255
    shown = overlay(grey, heat)
    assert shown.shape == (4, 4, 3)
    assert shown[0, 0].tolist() == [round(100 * 0.3 + 255 * 0.7), *2 * [round(100 * 0.3 + 32 * 0.7)]]
    assert (shown[1:] == 100).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"false_alarm_rate": 0.01},
            r"^n = 50 cannot give 1 %; calibrate with at least 99 for the p-values",
        ),
        ({"false_alarm_rate": 1.5}, "^a false-alarm rate lies between 0 and 1, not at 1.5"),
        ({"false_discovery_rate": 0.0}, "^a false discovery rate lies between 0 and 1, not at 0.0"),
    ],
)
def test_rates_that_cannot_be_had(options, message, data, copy, tmp_path, monkeypatch):
    before = tiny.snapshot(copy)
    with pytest.raises(UserError, match=message):
        decide_again(Rule(str(copy), **options))
    assert {n: v for n, v in tiny.snapshot(copy).items() if n.suffix} == {n: v for n, v in before.items() if n.suffix}
    monkeypatch.setattr(LMD, "examine", None)
    with pytest.raises(UserError, match=message):
        predict(data, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_nothing_to_decide_about(tmp_path, copy):
    with pytest.raises(UserError, match=r"^there is no folder \S+/nowhere; give --detector and --images to fill it$"):
        decide_again(Rule(str(tmp_path / "nowhere")))
    again = r"run predict\.py with --detector and --images again$"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"^there are no predictions in \S+/empty \(no outcome\.json\); {again}"):
        decide_again(Rule(str(tmp_path / "empty")))
    text = (copy / "outcome.json").read_text()
    for changed in (text[:-5], text.replace("00.png", "01.png"), text.replace('"files"', '"names"'), "[]", "[" * 10**5):
        (copy / "outcome.json").write_text(changed)
        with pytest.raises(UserError, match=rf"outcome\.json (is damaged|was changed|holds).*{again}"):
            decide_again(Rule(str(copy)))
    (copy / "outcome.json").write_text(text)
    arrays = read_arrays_of(copy)
    settings = {"of": predictions.files.file_hash(copy / "outcome.json")}
    for name, values in (("score", np.zeros(3)), ("p_value", np.full(40, np.nan)), ("calibration", np.zeros(49))):
        write_arrays(copy / "outcome.npz", settings, **{**arrays, name: values})
        with pytest.raises(UserError, match=rf"does not hold \d+ finite numbers called {name}; {again}"):
            decide_again(Rule(str(copy)))
    (copy / "outcome.npz").unlink()
    with pytest.raises(UserError, match=rf"outcome\.npz is missing; {again}"):
        decide_again(Rule(str(copy)))


# --------------------------------------------------------------------------------------------------- the command

LIGHT = """
import runpy, sys
sys.argv = ["predict.py", *sys.argv[1:]]
try:
    runpy.run_path("predict.py", run_name="__main__")
except SystemExit as end:
    print("code", end.code, {"torch", "matplotlib"} & sys.modules.keys())
"""


def test_the_command_decides_anew_without_torch_and_matplotlib(copy):
    again = ["-c", LIGHT, f"--output={copy}", "--false_alarm_rate=0.3", "--fail_on_outlier"]
    _, out, err = tiny.command(*again)
    assert out.splitlines()[-1] == "code 3 set()", err
    (copy / "outcome.json").rename(copy / "gone")
    assert "predict.py with --detector and --images again" in tiny.command(*again)[2]


def test_one_of_several_processes_decides_anew(copy, monkeypatch):
    """Each would want to write; and torchrun's exit code cannot say what was found."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        before = tiny.snapshot(copy)
        _, out, err = tiny.command("-c", LIGHT, f"--output={copy}", "--false_alarm_rate=0.3")
        assert out.splitlines()[-1:] == ["code 0 set()"], err
        assert (tiny.snapshot(copy) == before) == (rank == "1")
    options = types.SimpleNamespace(fail_on_outlier=True, false_alarm_rate=None)
    with pytest.raises(UserError, match=r"cannot exit with 3 under torchrun, .* give it to predict\.py by itself "):
        command.check_flags(options)


def test_the_command_measures(made, data, tmp_path):
    measure = [f"--detector={data / 'detector'}", f"--images={data / 'incoming'}", "--device=cpu"]
    strict = [f"--output={tmp_path / 'b'}", "--false_discovery_rate=0.001"]
    rows = [
        ("predict", [*measure, f"--output={tmp_path / 'a'}", "--fail_on_outlier"], tmp_path, "utf-8"),
        ("predict", [*measure, *strict], tmp_path, "ascii"),
        ("predict", [*strict, "--fail_on_outlier"], tmp_path, "ascii"),
    ]
    (first, said, err), second, third = tiny.forked(rows, tmp_path)
    assert first == 3, err
    assert [row["p_value"] for row in rows_of(tmp_path / "a")] == [row["p_value"] for row in rows_of(made[0])]
    assert said.endswith("report.html opens in a browser\n")
    assert (second[0], third[0]) == (0, 0)
    assert "0 of 40 images are flagged at a false discovery rate of 0.1 %" in third[1]
    assert "predict.py --detector=" in summary_of(tmp_path / "a")["facts"]["measured by"]


# -------------------------------------------------------------------------------------------------------- tables


def test_tables_are_harmless(tmp_path):
    write_csv(tmp_path / "t.csv", ["a", "b"], [["=x", 1], ["-0.5", -0.5], ["-x", True], ["+x\n", None], ["@", 1e-17]])
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["a", "b"], ["'=x", "1"], ["-0.5", "-0.5"], ["'-x", "True"], ["'+x\\n", ""], ["'@", "1e-17"],
    ]  # fmt: skip


def test_pictures_that_are_kept(made, data):
    """Of the most unusual images, from the files of their chunks; each with its reason."""
    description, arrays = predictions.read_outcome(made[0])
    wanted = reports.pictured(arrays["p_value"], arrays["score"], 0.05)
    assert set(arrays["picture_rows"].tolist()) == set(wanted.tolist())
    assert len(description["reasons"]) == len(wanted) >= 24
    for row, original in zip(arrays["picture_rows"], arrays["picture_originals"], strict=True):
        np.testing.assert_array_equal(original[0], NEW[row])
    chunk = read_arrays_of_chunk(made[0])
    assert chunk["picture_heats"].dtype == chunk["picture_reconstructions"].dtype == np.uint8


def read_arrays_of_chunk(output):
    with np.load(output / "chunks" / "chunk_0.npz", allow_pickle=False) as arrays:
        return dict(arrays)
