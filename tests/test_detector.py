"""The detector: what calibrates it, what it says of images wherever they come from, and the README's lines."""

import dataclasses
import re
import shutil

import numpy as np
import pytest
import tiny
import torch
from helpers import ROOT
from PIL import Image

from basics.console import UserError
from lmd import Detector, calibration, detector, methods, open_model
from lmd.combination import combined
from lmd.methods.lmd import LMD
from models import inference

HELD = tiny.pictures(100)
NEW = np.concatenate([tiny.pictures(10, seed=7), 255 - tiny.pictures(6, seed=8), np.full((2, 8, 8), 90, np.uint8)])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return open_model(tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint.pth"), device="cpu")


@pytest.fixture(scope="module")
def fitted(detector_folder):
    return Detector.load(detector_folder, device="cpu")


@pytest.fixture(scope="module")
def predicted(fitted):
    return fitted.predict(torch.from_numpy(NEW)[:, None], maps=True)


@pytest.fixture
def mine(detector_folder):
    """One that a test may change."""
    return Detector.load(detector_folder, device="cpu")


# ------------------------------------------------------------------------------------------------- calibration


def test_p_values_are_exact(fitted, predicted):
    known = fitted.calibration
    assert known.reference.shape == known.parts.shape == (50, 2)
    np.testing.assert_array_equal(known.scores, combined(known.reference, known.parts))
    p = [(1 + sum(known.scores >= s)) / 51 for s in predicted.score]
    np.testing.assert_array_equal(predicted.p_value, p)
    np.testing.assert_array_equal(predicted.is_outlier, np.array(p) <= 0.05)
    assert predicted.is_outlier.dtype == bool
    for k, values in enumerate(predicted.parts.values()):
        assert values.shape == predicted.score.shape
        assert ((values > 0) & (values <= 1)).all(), k
    assert list(predicted.parts) == ["lmd_mse", "lmd_ssim"]


def test_all_images_give_p_values_where_nothing_is_learned(model):
    alone = Detector(model, LMD(metrics=["MSE"])).fit(HELD[:60])
    assert alone.calibration.parts.shape == (60, 1)
    assert alone.calibration.reference.shape == (0, 1)
    found = alone.predict(NEW)
    np.testing.assert_array_equal(found.p_value, calibration.p_values(alone.calibration.parts[:, 0], found.score))
    assert found.parts == {}


def test_the_split_depends_on_the_images_alone(fitted, model):
    order = np.random.default_rng(1).permutation(len(HELD))
    turned = Detector(model).fit([Image.fromarray(image) for image in HELD[order]])
    for name in ("reference", "parts"):
        ours, theirs = (np.sort(getattr(d.calibration, name), axis=0) for d in (fitted, turned))
        np.testing.assert_allclose(theirs, ours, rtol=1e-4)


@pytest.mark.parametrize(
    ("count", "share", "message"),
    [
        (1, 0.5, r"^1 image is too few to calibrate with: "),
        (49, 0.5, r"^49 images are too few to calibrate with: .*; give at least 50, better 2,000$"),
        (100, 0.0, r"^--fit_share must lie between 0 and 1, not at 0\.0$"),
        (100, 1.0, r"^--fit_share must lie between 0 and 1, not at 1\.0$"),
        (100, 0.05, "^--fit_share 0.05 of 100 images leaves 5 to learn from and 95 for the p-values; both need at lea"),
        (100, 0.95, "^--fit_share 0.95 of 100 images leaves 95 to learn from and 5 for the p-values"),
    ],
)
def test_refused_before_anything_is_measured(count, share, message, model, monkeypatch):
    monkeypatch.setattr(LMD, "statistics", None)
    monkeypatch.setattr(LMD, "examine", None)
    with pytest.raises(UserError, match=message):
        Detector(model).fit(HELD[:count], fit_share=share)
    fewest = methods.create("combined").fewest_images
    message = rf"^the method combined needs at least {fewest} images to learn from, and --fit_share 0.1 of 100"
    with pytest.raises(UserError, match=message):
        Detector(model, "combined").fit(HELD, fit_share=0.1)


def test_the_share_is_what_is_learned_from(model):
    assert len(Detector(model).fit(HELD[:60], fit_share=0.25).calibration.parts) == 45


def test_threshold(mine, predicted):
    for rate in (0.02, 0.1, 0.3):
        threshold = mine.infer_threshold(false_alarm_rate=rate)
        found = mine.decide(mine.calibration.parts)
        np.testing.assert_array_equal(found.is_outlier, found.score >= threshold)
        assert found.is_outlier.mean() <= rate + 1e-9
        again = dataclasses.replace(predicted, is_outlier=predicted.p_value <= rate)
        np.testing.assert_array_equal(again.is_outlier, predicted.score >= threshold)
    with pytest.raises(UserError, match=r"^n = 50 cannot give 1 %; calibrate with at least 99$"):
        mine.infer_threshold(0.01)


def test_they_say_in_a_line_what_they_are(model, fitted, predicted):
    assert repr(fitted) == (
        f"<Detector: method lmd, model {fitted.model.source.path} of 8x8 pixels, 1 channel, calibrated "
        "with 50 images, false-alarm rate 5 %>"
    )
    assert repr(Detector(model)).startswith("<Detector: method auto, model /")
    assert repr(Detector(model)).endswith("of 8x8 pixels, 1 channel, not calibrated yet>")
    assert repr(predicted) == f"<Prediction of 18 images, {predicted.is_outlier.sum()} flagged>"


def test_not_calibrated(model, tmp_path):
    new = Detector(model)
    for call in (lambda: new.predict(NEW), lambda: new.infer_threshold(0.1), lambda: new.save(tmp_path / "none")):
        with pytest.raises(UserError, match=r"^the detector is not calibrated yet; call fit with held-back images"):
            call()


MISUSED = {
    "a rate in words": (lambda one: one.infer_threshold("a"), "^a false-alarm rate lies between 0 and 1, not at a; "),
    "no rate": (lambda one: one.infer_threshold(None), "^a false-alarm rate lies between 0 and 1, not at None; "),
    "several rates": (lambda one: one.infer_threshold([0.1, 0.2]), "^a false-alarm rate lies between 0 and 1, not at "),
    "array of rates": (lambda one: one.infer_threshold(np.array([0.1, 0.2])), "^a false-alarm rate lies between 0 and"),
    "no folder": (lambda one: Detector.load(None), "^a detector is loaded from the path of its folder, not from NoneT"),
    "a detector": (Detector.load, "^a detector is loaded from the path of its folder, not from Detector$"),
    "model by path": (
        lambda one: Detector("x"),
        r"^a detector needs a model, which open_model\(path\) gives, not str$",
    ),
    "no model": (lambda one: Detector(None), r"^a detector needs a model, which open_model\(path\) gives, not None"),
    "no method": (lambda one: Detector(one.model, None), "^unknown method 'None'; choose one of: auto, "),
    "method class": (lambda one: Detector(one.model, LMD), "^unknown method '<class .*>'; choose one of: auto, "),
    "unknown method": (lambda one: Detector(one.model, "lmx"), "^unknown method 'lmx'; choose one of: "),
    "share in words": (
        lambda one: Detector(one.model).fit(HELD, "a"),
        "^--fit_share must lie between 0 and 1, not at a",
    ),
}


@pytest.mark.parametrize("name", MISUSED)
def test_what_cannot_be_meant(name, mine):
    call, message = MISUSED[name]
    with pytest.raises(UserError, match=message):
        call(mine)


# ------------------------------------------------------------------------------------------------------- images


def sources(folder):
    """The same images in many ways."""
    for number, image in enumerate(NEW):
        Image.fromarray(image).save(folder / f"{number:02}.png")
    paths = sorted(folder.glob("*.png"))
    (folder / "list.txt").write_text("\n".join(path.name for path in paths))
    np.savez(folder / "array.npz", NEW)
    return {
        "array": NEW,
        "tensor": torch.from_numpy(NEW)[:, None],
        "folder": folder,
        "folder's name": str(folder),
        "list": [str(path) for path in paths],
        "paths": tuple(paths),
        "list file": str(folder / "list.txt"),
        "array file": str(folder / "array.npz"),
        "pictures": [Image.fromarray(image) for image in NEW],
        "channels last": NEW[..., None],
        "in colour": np.repeat(NEW[:, None], 3, axis=1),
    }


def pixels_of(fitted, source):
    images = fitted.images_of(source)
    return images.read(0, len(images))[:, 0].numpy()


def test_the_same_images_whatever_they_come_in(fitted, predicted, tmp_path):
    for name, source in sources(tmp_path).items():
        np.testing.assert_array_equal(pixels_of(fitted, source), NEW, err_msg=name)
    for source, rows in ((tmp_path / "03.png", [3]), (Image.fromarray(NEW[3]), [3]), (tmp_path, slice(None))):
        found = fitted.predict(source)
        np.testing.assert_allclose(found.score, predicted.score[rows], rtol=1e-4)
        np.testing.assert_array_equal(found.p_value, predicted.p_value[rows])
        assert found.map is None


def test_what_cannot_be_read_has_no_row(fitted, predicted, tmp_path):
    """The names say which rows are left, as they were given."""
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for row in (3, 5):
        Image.fromarray(NEW[row]).save(tmp_path / f"{row}.png")
    given = [tmp_path / "5.png", str(tmp_path / "bad.png"), f"{tmp_path}/../{tmp_path.name}/3.png", tmp_path / "5.png"]
    found = fitted.predict(given)
    assert found.files == [str(given[0]), given[2], str(given[3])]
    assert found.skipped == [(given[1], "not an image, or damaged")]
    np.testing.assert_array_equal(found.p_value, predicted.p_value[[5, 3, 5]])
    assert fitted.predict(NEW[:2]).files is None


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (NEW.astype(np.float32), r"uint8, not float32 \(18, 8, 8\); write \(255 \* array\)\.round\(\) as"),
        (NEW[0], r"^images in memory are .* uint8, not uint8 \(8, 8\); give one image as array\[None\]$"),
        (np.zeros((4, 2, 8, 8), np.uint8), r"not uint8 \(4, 2, 8, 8\)"),
        (np.zeros((8, 8, 3), np.uint8), r"\(8, 8, 3\) may be one in colour; give \(1, 3, H, W\) for that"),
        (np.array(["a.png"]), r"uint8, not <U5$"),
        (NEW[:0], "^there are no images; give at least one$"),
        ([], "^there are no images; give at least one$"),
        (["nowhere.png"], "^of 1 image of 'list' none is usable; the first, nowhere.png"),
        ([NEW[0]], "^a list of images holds paths alone, or PIL pictures alone$"),
        (None, "^images are a path, an array, a PIL picture, or a list of paths or pictures, not NoneType$"),
        (3, "or a list of paths or pictures, not int$"),
        ("nowhere", "^unknown data set 'nowhere'"),
    ],
)
def test_what_is_no_images(images, message, fitted):
    with pytest.raises(UserError, match=message):
        fitted.predict(images)


def test_pictures_of_other_sizes(fitted):
    """As files of them are: halved, cropped to the centre square, grey."""
    large = np.repeat(np.repeat(NEW, 2, axis=1), 2, axis=2)  # halving gives the image back
    wide = np.pad(large, ((0, 0), (0, 0), (4, 4)))[:, None].repeat(3, axis=1)
    np.testing.assert_array_equal(pixels_of(fitted, wide), NEW)


# --------------------------------------------------------------------------------------------------------- maps


def test_maps_are_in_units_of_held_back_images(fitted, predicted):
    assert predicted.map.shape == NEW.shape
    assert predicted.map.dtype == np.float32
    held = fitted.predict(HELD, maps=True).map
    np.testing.assert_allclose([held.mean(), held.std()], [0, 1], atol=1e-3)


def test_no_map(mine, monkeypatch):
    """Told before anything is measured."""
    assert mine.has_maps
    monkeypatch.setattr(mine, "calibration", dataclasses.replace(mine.calibration, pixels=np.zeros(0)))
    monkeypatch.setattr(mine.method, "examine", tiny.failing(5))
    with pytest.raises(UserError, match=r"^a detector of the method lmd has no maps; leave --maps out$"):
        mine.predict(NEW, maps=True)


def test_reasons(fitted):
    parts = np.stack([np.full(2, 1e3), np.full(2, -1e3), np.median(fitted.calibration.parts, axis=0) * [1, 1e3]])
    far, near, second = fitted.reason(parts)
    assert far.startswith("structure: ")
    assert near.startswith("smoothness: ")
    assert "SSIM" in second


# -------------------------------------------------------------------------------------------------- in a folder


def test_saved_and_loaded_without_the_checkpoint(detector_folder, predicted, tmp_path):
    copy = shutil.copytree(detector_folder, tmp_path / "copied")
    loaded = Detector.load(copy, device="cpu")
    loaded.infer_threshold(0.1)
    loaded.save(tmp_path / "again" / "deeper")
    again = Detector.load(str(tmp_path / "again" / "deeper"), device="cpu")
    found = again.predict(NEW, maps=True)
    for name in ("score", "p_value", "map"):
        np.testing.assert_array_equal(getattr(found, name), getattr(predicted, name))
    np.testing.assert_array_equal(found.is_outlier, predicted.p_value <= 0.1)
    for name in ("blind_spots", "images", "treatment", "command", "seed"):
        assert again.description[name] == loaded.description[name], name
    assert again.description["images"]["count"] == 100
    card = (tmp_path / "again" / "deeper" / "card.md").read_text()
    assert "- Decides at 10 %; smallest rate: 1.97 %." in card
    assert "that is caught at 5 %." in card  # as it was measured
    assert "| noisy | 25 % | 8 |" in card


def test_precision_that_another_machine_lacks(detector_folder, monkeypatch, capsys, predicted):
    read = detector.detector_folder.read
    changed = lambda path: ({**read(path)[0], "precision": "tf32"}, read(path)[1])
    monkeypatch.setattr(detector.detector_folder, "read", changed)
    found = Detector.load(detector_folder, device="cpu").predict(NEW)
    np.testing.assert_array_equal(found.p_value, predicted.p_value)
    assert capsys.readouterr().err.startswith("warning: calibrated in tf32, which cpu does not have: ")
    monkeypatch.setattr(inference, "has_tf32", lambda device: device.type == "cuda")
    assert detector._precision_on(torch.device("cuda"), "tf32") == "tf32"
    monkeypatch.setattr(inference, "has_tf32", lambda device: False)
    assert detector._precision_on(torch.device("cuda"), "tf32") == "fp32", "an older GPU"


# ---------------------------------------------------------------------------------------------------- the import


def test_importing_the_package_is_light():
    code = "import sys, lmd; print('torch' in sys.modules, lmd.__all__); from lmd import Detector; print(Detector.load)"
    exit_code, out, err = tiny.command("-c", code)
    assert exit_code == 0, err
    assert out.startswith("False ['Detector', 'Prediction', 'open_model']\n<bound method Detector.load")
    exit_code, _, err = tiny.command("-c", "import lmd; lmd.nothing")
    assert "AttributeError: module 'lmd' has no attribute 'nothing'" in err


def test_the_lines_of_the_readme(detector_folder, tmp_path):
    """With tiny things in the place of its paths, and a rate that 50 images can give."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    blocks = [block for block in blocks if "from lmd import Detector" in block]
    assert len(blocks) == 1, "the README has no such lines"
    text = blocks[0].replace("0.01", "0.1")
    for number, path in enumerate(re.findall(r'"([^"\n]*[/.][^"\n]*)"', text)):
        text = text.replace(f'"{path}"', f'"{stand_in(path, tmp_path / str(number), detector_folder)}"')
    names = {"__name__": "readme"}
    exec(compile(text, "README.md", "exec"), names)
    assert isinstance(names["detector"], Detector)
    assert names["prediction"].p_value.shape == names["prediction"].is_outlier.shape


def stand_in(path, place, detector_folder):
    """A tiny thing of the kind that a path of the README names."""
    if "detector" in path:
        return shutil.copytree(detector_folder, place)
    if "results" in path or path.endswith(".pth"):
        return tiny.write_checkpoint(place / "checkpoint.pth")
    place.mkdir()
    for number, image in enumerate(HELD if "held" in path else NEW):
        Image.fromarray(image).save(place / f"{number:03}.png")
    return place
