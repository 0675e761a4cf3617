"""calibrate.py: what it prints and stores, which images it refuses, and that a stopped run ends the same."""

import contextlib
import dataclasses
import io
import json
import re

import numpy as np
import pytest
import tiny
import torch
from scipy import stats

import datasets
from basics import noise
from basics.console import UserError, percent
from lmd import Detector, calibrating, shifts
from lmd.calibrating import CalibrationJob
from lmd.card import bands, familiarity, histogram
from lmd.detector import _restoration
from lmd.held_out import content_keys_of, held_back, held_out
from lmd.methods.lmd import LMD
from models import create_model
from storage import checkpoints

TRAINED_ON = tiny.pictures(600, seed=20)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Held-back images and a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("data")
    tiny.write_checkpoint(folder / "checkpoint.pth")
    tiny.write_pictures(folder / "held.npz", 100)
    return folder


def job(data, detector, **changes):
    values = {"in_domain": str(data / "held.npz"), "card_images": 8, "method": "lmd:reps=1", **changes}
    values["command"] = "python calibrate.py"
    return CalibrationJob(tiny.config(), str(data / "checkpoint.pth"), detector=str(detector), **values)


def calibrate(job):
    calibrating.calibrate(job, tiny.CPU)


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """A detector's folder and what was printed while it was made."""
    path, out, err = tmp_path_factory.mktemp("made") / "mine", io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        calibrate(job(data, path))
    return path, out.getvalue(), err.getvalue()


# ---------------------------------------------------------------------------------------------- what it tells


def test_what_it_prints_and_stores(made):
    path, out, err = made
    low, high = stats.beta.ppf([0.025, 0.975], 2, 49)  # k = floor(0.05 * 51)
    band = f"at 5 % the realised rate lies between {percent(low, 2)} and {percent(high, 2)} (95 %)"
    lines = out.splitlines()
    assert "method lmd: 5 network evaluations an image, fp32" in lines
    assert "calibrated with n = 50 images (50 others are what the method compares with); smallest " in out
    assert "smallest false-alarm rate: 1.97 %" in out
    assert band in lines
    assert "at 1 %" not in out
    assert "warning: 50 calibration images cannot give a false-alarm rate of 1 %; hold back at least 99" in err
    assert lines[-1] == f"detector: {path}"
    assert [entry.name for entry in path.parent.iterdir()] == ["mine"]
    detector, card = Detector.load(path, device="cpu"), (path / "card.md").read_text()
    for text in (
        band[1:],
        *histogram(detector.calibration.scores),
        "smallest rate: 1.97 %",
        "n image of 8x8 pixels",
    ):
        assert text in card
    description = json.loads((path / "detector.json").read_text())
    assert description["images"]["count"] == 100
    assert description["checkpoint"]["path"].endswith("checkpoint.pth")
    assert description["command"] == "python calibrate.py"
    assert description["rate"] == 0.05


def test_blind_spots(made, data):
    """The shares are those of the detector's own answers."""
    path, out, _ = made
    detector = Detector.load(path, device="cpu")
    spots = detector.description["blind_spots"]
    assert spots.keys() == shifts.SHIFTS.keys()
    assert len(spots) == 12
    printed = [float(share) for share in re.findall(r"^  .{45} +([0-9.]+) %$", out, re.M)]
    assert printed == sorted(round(100 * spot["caught"], 1) for spot in spots.values())
    images = detector.images_of(str(data / "held.npz"))
    chosen = images.take(torch.linspace(0, 99, 8).round().long())
    keys = content_keys_of(images.part(torch.linspace(0, 99, 8).round().long()))
    for kind in ("inverted", "halves"):
        shifted = shifts.make(kind, chosen, keys, chosen[shifts.partner_positions(keys)])
        assert spots[kind]["caught"] == detector.predict(shifted).is_outlier.mean()
        assert spots[kind]["images"] == 8
        assert f"| {spots[kind]['kind']} | {percent(spots[kind]['caught'])} | 8 |" in (path / "card.md").read_text()


def test_bands_and_histogram():
    assert [line.split(" the ")[0] for line in bands(99)] == ["at 1 %", "at 5 %"]
    low, high = stats.beta.ppf([0.025, 0.975], 10, 991)
    assert bands(1000)[0] == f"at 1 % the realised rate lies between {percent(low, 2)} and {percent(high, 2)} (95 %)"
    assert bands(18) == []
    lines = histogram(np.arange(24.0))
    assert [line.split()[3:] for line in lines] == 12 * [["2", 40 * "#"]]
    assert len(histogram(np.ones(5))) == 12


def test_how_well_the_model_knows_the_domain_is_told(data, tmp_path, capsys):
    """The median over all held-back images, as soon as each pixel was masked more than once."""
    calibrate(job(data, tmp_path / "mine", method="lmd:reps=4", card_images=0))
    detector = Detector.load(tmp_path / "mine", device="cpu")
    pixels = detector.images_of(str(data / "held.npz")).read(0, 100)
    keys = noise.seed_keys(detector.seed, noise.content_keys(pixels))
    expected = np.median(detector.method.examine(detector.model, pixels, keys).misfit)
    assert detector.description["images"]["misfit"] == pytest.approx(expected, rel=1e-3)
    lines = familiarity(detector.description["images"])
    assert "the model restores 0 % of what varies" in lines[1].text
    assert not lines[1].good, "the model is untrained, and restores nothing"
    streams = capsys.readouterr()
    for line in lines:
        assert (line.text in streams.out, f"warning: {line.text}" in streams.err) == (line.good, not line.good)
        assert line.text[1:] in (tmp_path / "mine" / "card.md").read_text()


@pytest.mark.parametrize(
    ("misfit", "restored", "good", "told"),
    [
        (1.0, None, [True], ["as it should be"]),
        (1.3, None, [True], ["as it should be"]),
        (1.31, None, [False], ["knows such images badly"]),
        (1.0, 0.87, [True, True], ["as it should be", "restores 87 % of what varies"]),
        (1.73, 0.36, [False, True], ["knows such images badly", "restores 36 % of what varies"]),
        (0.98, 0.05, [True, False], ["which says little here", "restores 5 % of what varies"]),
        (2.0, -2, [False, False], ["knows such images badly", "restores 0 % of what varies"]),
        (None, -2, [False], ["restores 0 % of what varies"]),
        (None, None, [], []),
    ],
)
def test_how_well_the_domain_is_known_in_words(misfit, restored, good, told):
    """Where the model has hardly learned, images are as far from their reconstructions as these from each other."""
    lines = familiarity({n: v for n, v in (("misfit", misfit), ("restored", restored)) if v is not None})
    assert [line.good for line in lines] == good
    for line, words in zip(lines, told, strict=True):
        assert words in line.text
        assert ("hardly" in line.text) == (restored is not None and restored < 0.1 and "restores" in words)
    if misfit is not None:
        assert f"{misfit:.2f} times" in lines[0].text


def test_the_share_of_the_variance_that_is_restored():
    """Of 128 + 15 a + 20 b, a and b standard normal, who knows a restores 15^2 / 25^2; known pixels are left out.

    The mean of a chunk is that of 4 images, which would make the variance 3 / 4 of what it is.
    """
    a, b = torch.randn((2, 4, 3, 200, 200), generator=torch.Generator().manual_seed(0))
    pixels = (128 + 15 * a + 20 * b).round().clamp(0, 255).byte()
    recons = (128 + 15 * a) / 255
    recons[..., 100:] = pixels[..., 100:] / 255
    error, spread = _restoration(pixels, recons)
    assert 1 - error / spread == pytest.approx(0.36, abs=0.01)
    assert spread == pytest.approx(pixels[..., :100].numel() * (25 / 255) ** 2, rel=0.02)
    assert not _restoration(pixels, None).any()
    assert not _restoration(pixels[:1], recons[:1]).any()


def test_no_card_and_another_share(data, tmp_path, capsys):
    calibrate(job(data, tmp_path / "mine", card_images=0, fit_share=0.2, false_alarm_rate=0.2))
    assert "made-up" not in capsys.readouterr().out
    detector = Detector.load(tmp_path / "mine", device="cpu")
    assert (len(detector.calibration.reference), len(detector.calibration.parts)) == (20, 80)
    assert detector.rate == 0.2
    assert "Blind spots" not in (tmp_path / "mine" / "card.md").read_text()


# ------------------------------------------------------------------------------------------ refused before work


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"false_alarm_rate": 0.01},
            r"^n = 50 cannot give 1 %; calibrate with at least 99 for the p-values, which 50 of these 100 images give",
        ),
        ({"false_alarm_rate": 1.0}, r"^a false-alarm rate lies between 0 and 1, not at 1\.0; 0\.01 means 1 %$"),
        ({"fit_share": 1.5}, r"^--fit_share must lie between 0 and 1, not at 1\.5$"),
        (
            {"max_images": 49},
            r"^49 images are too few to calibrate with: the false-alarm rate could not ",
        ),
        ({"method": "lmx"}, r"^unknown method \(--method\) 'lmx'; choose one of: auto, cfs, combined, "),
        ({"in_domain": "nowhere"}, "^unknown data set 'nowhere'"),
        ({"detector": "."}, r"^\. is there already and holds no detector; choose another --detector$"),
    ],
)
def test_refused_before_work(changes, message, data, tmp_path, monkeypatch):
    monkeypatch.setattr(LMD, "examine", None)
    with pytest.raises(UserError, match=message):
        calibrate(dataclasses.replace(job(data, tmp_path / "mine"), **changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"false_alarm_rate": 0.0}, "^a false-alarm rate lies between 0 and 1"),
        ({"false_alarm_rate": 2.0}, "^a false-alarm rate lies between 0 and 1"),
        ({"fit_share": 2.0}, "^--fit_share must lie between 0 and 1"),
    ],
)
def test_refused_before_model_and_images_are_read(changes, message, data, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrating, "open_model", None)
    with pytest.raises(UserError, match=message):
        calibrate(dataclasses.replace(job(data, tmp_path / "mine"), **changes))


def test_images_too_small_to_make_foreign_ones_of(tmp_path, monkeypatch):
    monkeypatch.setattr(LMD, "examine", None)
    config, held = tiny.config(data__image_size=6), tiny.write_pictures(tmp_path / "held.npz", 50, size=6)
    weights = tiny.write_checkpoint(tmp_path / "checkpoint.pth", config)
    small = CalibrationJob(config, str(weights), str(held), str(tmp_path / "mine"), method="lmd")
    with pytest.raises(UserError, match=r"^foreign images are made up of images of 8 pixels at least; set --card_im"):
        calibrate(small)
    assert not (tmp_path / "mine").exists()


def test_a_model_that_gives_nan(data, tmp_path, monkeypatch):
    plain = LMD._distances
    monkeypatch.setattr(LMD, "_distances", lambda *arguments: plain(*arguments) * np.nan)
    with pytest.raises(UserError, match=r"^what the method lmd measures is NaN or infinite: the model's weights"):
        calibrate(job(data, tmp_path / "mine"))
    assert not (tmp_path / "mine").exists()


# ------------------------------------------------------------------------------------------- images trained on


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Work folder of a model that was trained on 540 of 600 images, and those images."""
    folder = tmp_path_factory.mktemp("trained")
    np.savez(folder / "all.npz", TRAINED_ON)
    tiny.train(tiny.config(data__dataset=str(folder / "all.npz"), training__n_iters=2), folder / "work")
    return folder


def test_what_training_held_back_is_used(trained, tmp_path, capsys):
    config = tiny.config(data__dataset=str(trained / "all.npz"))
    values = {"card_images": 0, "method": "lmd:reps=1", "detector": str(tmp_path / "mine")}
    job = CalibrationJob(config, str(trained / "work"), str(trained / "all.npz"), **values)
    calibrate(job)
    assert f"{trained}/all.npz is what the model was trained on: the 60 images held back then are used; " in (
        capsys.readouterr().out
    )
    detector = Detector.load(tmp_path / "mine", device="cpu")
    expected = detector.images_of(TRAINED_ON[held_back(600).numpy()])
    assert detector.description["images"]["fingerprint"] == expected.fingerprint
    calibrate(dataclasses.replace(job, max_images=50))
    assert "'all': 50 of 60 images are used, evenly spread (--max_images)\n" in capsys.readouterr().out


def kept():
    """Those that the model has seen."""
    return np.delete(TRAINED_ON, held_back(600).numpy(), axis=0)


@pytest.mark.parametrize(
    ("images", "named", "message"),
    [
        (kept(), "", r"^the model was trained on the images of \S+: on these it is surer than on new ones"),
        (kept()[::-1], "data", r"^540 of the 540 images of \S+ are among those of all, which the model was"),
    ],
)  # fmt: skip
def test_images_trained_on_are_refused(images, named, message, trained, tmp_path, monkeypatch):
    """By the checkpoint's fingerprint, or by what is in the folder that its config names."""
    monkeypatch.setattr(LMD, "examine", None)
    np.savez(tmp_path / "held.npz", images)
    config = tiny.config(data__dataset=str(trained / "all.npz") if named else "nowhere")
    values = {"in_domain": str(tmp_path / "held.npz"), "detector": str(tmp_path / "mine")}
    with pytest.raises(UserError, match=message):
        calibrate(CalibrationJob(config, str(trained / "work"), **values))
    if not named:  # a choice of them is recognised as well
        with pytest.raises(UserError, match=message):
            calibrate(CalibrationJob(config, str(trained / "work"), **values, max_images=100))
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("images", "left", "told"),
    [
        (np.concatenate([TRAINED_ON, tiny.pictures(7, seed=9)]), 67, "540 of the 607"),  # a folder that has grown
        (np.concatenate([kept()[:20], tiny.pictures(40, seed=9)]), 40, "20 of the 60"),
        (np.repeat(TRAINED_ON, 2, axis=0), 120, "1,080 of the 1,200"),  # copies
    ],
)
def test_images_trained_on_are_left_out(images, left, told, trained, tmp_path, capsys):
    """Where the checkpoint and the folder that its config names say which these are, however many."""
    np.savez(tmp_path / "mine.npz", images)
    found = held_back_of(trained / "work", trained / "all.npz", tmp_path / "mine.npz")
    assert len(found) == left
    assert (
        f"warning: {told} images of {tmp_path}/mine.npz are among those that the model was" in capsys.readouterr().err
    )
    seen = set(noise.content_keys(torch.from_numpy(kept())[:, None]).tolist())
    assert not seen.intersection(noise.content_keys(found.read(0, left)).tolist())


def held_back_of(work, trained_on, source):
    """What `held_out` gives for a source."""
    load = lambda name, **options: datasets.load_any(str(name), image_size=8, num_channels=1, **options)
    checkpoint = checkpoints.find_checkpoint(work)
    return held_out(load, source, "--in_domain", tiny.config(data__dataset=str(trained_on)), checkpoint)


def test_copies_of_images_trained_on_are_not_held_back(tmp_path, capsys):
    """A folder of duplicates: of the 6 images that training held back 4 are among the others, too."""
    pictures = tiny.pictures(60)
    held = held_back(60).numpy()
    pictures[np.setdiff1d(np.arange(60), held)[:4]] = pictures[held[:4]]
    np.savez(tmp_path / "all.npz", pictures)
    tiny.train(tiny.config(data__dataset=str(tmp_path / "all.npz"), training__n_iters=1), tmp_path / "work")
    found = held_back_of(tmp_path / "work", tmp_path / "all.npz", tmp_path / "all.npz")
    assert torch.equal(found.read(0, 2)[:, 0], torch.from_numpy(pictures[held[4:]]))
    assert f"4 of the 6 images of {tmp_path}/all.npz are among those that the model was" in capsys.readouterr().err


def test_weights_that_do_not_say_what_they_were_trained_on(trained, tmp_path, monkeypatch):
    """Those of an EMA-only file: the folder that its config names is compared; a few images of it are warned of."""
    config = tiny.config(data__dataset=str(trained / "all.npz"))
    source, weights = checkpoints.find_checkpoint(trained / "work"), tmp_path / "ema.safetensors"
    checkpoints.write_ema_weights(weights, source, create_model(config), tiny.to_dict(config), {})
    monkeypatch.setattr(LMD, "examine", None)
    values = {"detector": str(tmp_path / "mine"), "card_images": 0, "method": "lmd:reps=1"}
    np.savez(tmp_path / "held.npz", np.concatenate([TRAINED_ON[:41], tiny.pictures(39, seed=9)]))
    with pytest.raises(UserError, match=r"^41 of the 80 images of "):
        calibrate(CalibrationJob(config, str(weights), in_domain=str(tmp_path / "held.npz"), **values))
    monkeypatch.undo()
    err = io.StringIO()
    np.savez(tmp_path / "held.npz", np.concatenate([TRAINED_ON[:10], tiny.pictures(50)]))
    with contextlib.redirect_stderr(err):
        calibrate(CalibrationJob(config, str(weights), in_domain=str(tmp_path / "held.npz"), **values))
    assert (
        f"warning: 10 of the 60 images of {tmp_path}/held.npz are among those that the model was trained on, and left"
        in err.getvalue()
    )


@pytest.mark.parametrize(
    ("source", "trained_on", "told"),
    [
        (
            "held.npz",
            "nowhere",
            True,
        ),  # of weights that do not say what they were trained on
        ("held.npz", "FashionMNIST", True),
        ("Fashion_MNIST", "FashionMNIST", False),  # its test images
        ("held.npz", "others.npz", False),  # which are compared
    ],
)
def test_what_could_not_be_checked_is_told(source, trained_on, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.write_pictures(tmp_path / "others.npz", 20, seed=1)
    sets = {name: tiny.write_pictures(tmp_path / f"{name}.npz", 20) for name in ("held", "test")}
    path = lambda name: {"held.npz": sets["held"], "Fashion_MNIST": sets["test"]}.get(name, name)
    load = lambda name, **options: datasets.load_any(str(path(name)), image_size=8, num_channels=1, **options)
    config = tiny.config(data__dataset=trained_on)
    weights = tmp_path / "ema.safetensors"
    for flag in ("--in_domain", "--fit"):  # once
        assert len(held_out(load, source, flag, config, weights)) == 20
    line = (
        f"whether {weights} was trained on the in-domain images could not be checked; p-values and ROC-AUCs hold only "
        "for images that it was not trained on\n"
    )
    assert capsys.readouterr() == (line * told, "")


# ------------------------------------------------------------------------------------------- killed and continued

KILLED = """
import sys
import test_calibrate, tiny
from pathlib import Path

data, place = map(Path, sys.argv[1:])
calibrate = lambda write: test_calibrate.calibrate(test_calibrate.job(data, place / str(write) / "mine"))
tiny.killed_at((4, 8, 15, 22), calibrate)  # amid the images, the first blind spot, another, the detector
"""


def test_killed_and_continued(made, data, tmp_path, monkeypatch):
    code, _, err = tiny.command("-c", KILLED, data, tmp_path)
    assert code == 0, err
    for folder in sorted(tmp_path.iterdir(), key=lambda path: int(path.name)):
        assert not (folder / "mine").exists()
        assert (folder / "mine.unfinished").is_dir()
        if folder.name == "22":
            monkeypatch.setattr(LMD, "_reconstruct", None)  # all is there
        calibrate(job(data, folder / "mine"))
        assert tiny.snapshot(folder / "mine") == tiny.snapshot(made[0])
        assert not (folder / "mine.unfinished").exists()


def test_what_lies_beside_unfinished_parts_is_not_lost(data, tmp_path):
    (tmp_path / "mine.unfinished").mkdir()
    (tmp_path / "mine.unfinished" / "notes.txt").write_text("mine")
    calibrate(job(data, tmp_path / "mine", card_images=0))
    assert {path.name for path in (tmp_path / "mine.unfinished").iterdir()} == {".lift-map-detect", "notes.txt"}


def write_copies(path, different):
    """60 images, of which so many are different."""
    np.savez(path, images=np.resize(tiny.pictures(different), (60, 8, 8)))


@pytest.mark.parametrize("different", [2, 3])
def test_copies_are_not_both_learned_from_and_decided_by(different, data, tmp_path, capsys):
    """Of three images, those of which the cut would part the copies are not learned from."""
    write_copies(tmp_path / "held.npz", different)
    calibrate(job(data, tmp_path / "mine", in_domain=str(tmp_path / "held.npz"), card_images=0))
    told = f"{60 - different} of 60 images are copies of others, and tell less than as many different ones"
    assert told in capsys.readouterr().err
    known = Detector.load(tmp_path / "mine", device="cpu").calibration
    assert (len(known.reference), len(known.parts)) == ((30, 30) if different == 2 else (20, 40))
    assert not {tuple(row) for row in known.reference} & {tuple(row) for row in known.parts}


def test_copies_of_one_image_are_refused_before_work(data, tmp_path, monkeypatch):
    monkeypatch.setattr(LMD, "examine", None)
    write_copies(tmp_path / "held.npz", 1)
    with pytest.raises(
        UserError, match=r"^the images of 'held' are too often copies of one; give more different ones$"
    ):
        calibrate(job(data, tmp_path / "mine", in_domain=str(tmp_path / "held.npz"), card_images=0))
    assert [path.name for path in tmp_path.iterdir()] == ["held.npz"]


def test_other_settings_than_the_run_that_was_stopped(made, data, tmp_path, capsys, monkeypatch):
    """It is told, and what no longer fits is measured anew."""
    monkeypatch.setattr(calibrating, "blind_spots", tiny.failing(5))
    with pytest.raises(OSError, match="Input/output error"):
        calibrate(job(data, tmp_path / "mine", seed=1))
    monkeypatch.undo()
    calibrate(job(data, tmp_path / "mine"))
    assert "mine.unfinished/statistics: 7 of 7 parts were measured from other images, or oth" in capsys.readouterr().out
    assert tiny.snapshot(tmp_path / "mine") == tiny.snapshot(made[0])
