"""Data sets: equal to torchvision, Pillow and the published crop; whatever cannot be used is named, not fatal."""

import gzip
import hashlib
import os
import pickle
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from basics import files, image_arrays, image_files, image_sets
from basics.console import UserError
from basics.image_lists import say_once
from basics.pixels import crop, dequantize, resize_bilinear, to_data_range, to_model_range
from lmd.batches import TrainingBatches, in_order

GOLDEN = np.load(Path(__file__).parent / "golden" / "center_crop.npz")
CROPS = [name[: -len("_in")] for name in GOLDEN.files if name.endswith("_in")]
ROOT = Path(__file__).parent.parent


def load(source, **options):
    return datasets.load(source, **{"split": "test", "image_size": 32, "num_channels": 3, "workers": 2, **options})


def read_all(images):
    return images.read(0, len(images))


def noise_picture(seed, size=(40, 33)):
    """An RGB picture of uniform noise, width x height."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def save(path, seed=0, size=(40, 33)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise_picture(seed, size).save(path)


def put(root, *names):
    """Pictures and other files of these names, and folders where they end with a slash."""
    for name in names:
        if name.endswith("/"):
            (root / name).mkdir(parents=True)
        elif name.endswith((".png", ".jpg")):
            save(root / name)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("{}")


def noise_values(shape, seed=0, most=255):
    return np.random.default_rng(seed).integers(0, most, shape, dtype=np.uint8, endpoint=True)


def save_array(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values) if path.suffix == ".npy" else np.savez(path, values)
    return path


def chw(picture):
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def cropped(*seeds):
    """What becomes of pictures of noise, (N, 3, 32, 32)."""
    return torch.stack([chw(crop(noise_picture(seed), 32)) for seed in seeds])


@pytest.fixture
def folder(tmp_path):
    """Seven pictures in a folder and folders below it."""
    for index, name in enumerate(["b.png", "a/x.png", "c.PNG", "a/b/y.png", "d.bmp", "e.png", "f.png"]):
        save(tmp_path / "pictures" / name, index)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


@pytest.fixture(autouse=True)
def nothing_was_said():
    """What is told once a run is told in every test."""
    say_once.cache_clear()


@pytest.fixture
def on_demand(monkeypatch):
    """No set of images is small enough to be kept."""
    monkeypatch.setattr(image_sets, "IN_MEMORY_BYTES", 0)


@pytest.fixture(params=[0, 2 << 30], ids=["on demand", "in memory"])
def memory(request, monkeypatch):
    """Sets of images are made when they are asked for, or kept."""
    monkeypatch.setattr(image_sets, "IN_MEMORY_BYTES", request.param)


@pytest.fixture
def opened(monkeypatch):
    """The files that were read, in the order in which that began."""
    names, read = [], image_files.read_file
    monkeypatch.setattr(image_files, "read_file", lambda path: names.append(path.name) or read(path))
    return names


# ------------------------------------------------------------------------------------------------------- the crop


@pytest.mark.parametrize("name", CROPS)
def test_crop_is_the_published_one(name, tmp_path):
    size = int(name.split("_to")[1])
    expected = GOLDEN[f"{name}_out"]
    picture = Image.fromarray(GOLDEN[f"{name}_in"])
    assert np.array_equal(np.array(crop(picture, size)), expected)
    picture.save(tmp_path / "picture.png")
    (tmp_path / "list.txt").write_text("picture.png\n")
    images = load(tmp_path / "list.txt", image_size=size)
    assert np.array_equal(images.read(0, 1)[0].permute(1, 2, 0).numpy(), expected)


def test_without_the_crop_pictures_are_resized(tmp_path):
    save(tmp_path / "p" / "x.png", 0, (70, 50))
    expected = chw(noise_picture(0, (70, 50)).resize((32, 32), Image.Resampling.BICUBIC))
    assert torch.equal(load(tmp_path / "p", center_crop=False).read(0, 1)[0], expected)


# -------------------------------------------------------------------------------------------- formats of pictures

RAMP = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))  # (32, 32)


def _write_16_bit(path):
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(path)


def _write_animated(path):
    Image.fromarray(RAMP).save(path, save_all=True, append_images=[Image.fromarray(255 - RAMP)], lossless=True)


FORMATS = {
    "grey.png": lambda path: Image.fromarray(RAMP).save(path),
    "colour.webp": lambda path: Image.fromarray(RAMP).convert("RGB").save(path, lossless=True),
    "palette.png": lambda path: Image.fromarray(RAMP).convert("P").save(path),
    "no ending": lambda path: Image.fromarray(RAMP).save(path, "PNG"),
    "lies.jpg": lambda path: Image.fromarray(RAMP).save(path, "PNG"),
    "scan.tga": lambda path: Image.fromarray(RAMP).save(path),
    "old.pcx": lambda path: Image.fromarray(RAMP).save(path),
    "modern.jp2": lambda path: Image.fromarray(RAMP).save(path),
    "quick.qoi": lambda path: Image.fromarray(RAMP).convert("RGB").save(path),
    "deep.png": _write_16_bit,
    "deep.tif": _write_16_bit,
    "deep_big_endian.pgm": _write_16_bit,
    "animated.gif": _write_animated,
    "animated.png": _write_animated,
    "animated.webp": _write_animated,
    "pages.tiff": _write_animated,
    "upper.BMP": lambda path: Image.fromarray(RAMP).save(path),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_every_format(name, channels, tmp_path):
    FORMATS[name](tmp_path / name)
    images = load(tmp_path, num_channels=channels)
    assert images.skipped == []
    assert torch.equal(images.read(0, 1), torch.from_numpy(RAMP).expand(1, channels, 32, 32))


def test_lossy_cmyk_and_grey_pictures(tmp_path):
    Image.fromarray(RAMP).convert("RGB").convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(RAMP).save(tmp_path / "b.jpeg", quality=95)
    for image in read_all(load(tmp_path)):  # JPEG at quality 95 is off by a few grey levels
        assert (image.int() - torch.from_numpy(RAMP).int()).abs().max() <= 8


# ------------------------------------------------------------------------------------- files that cannot be used


def _write_truncated(path):
    noise_picture(0, (200, 200)).save(path)
    path.write_bytes(path.read_bytes()[:3000])


UNUSABLE = {
    "empty.png": lambda path: path.write_bytes(b""),
    "text.jpg": lambda path: path.write_bytes(b"no picture"),
    "truncated.png": _write_truncated,
    "truncated.jpg": _write_truncated,
    "truncated.webp": _write_truncated,
    "floats.tiff": lambda path: Image.fromarray(RAMP.astype(np.float32)).save(path),
    "large_values.tiff": lambda path: Image.fromarray(RAMP.astype(np.int32) * 1000).save(path),
    "bomb.png": lambda path: Image.new("L", (3000, 1000)).save(path),
    "folder.png": lambda path: path.mkdir(),
    "missing.png": lambda path: None,
    "x" * 300 + ".png": lambda path: None,
}


def test_unusable_files_are_named_and_change_nothing_for_the_others(memory, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    names = []
    for index, (name, write) in enumerate(UNUSABLE.items()):
        write(tmp_path / name)
        save(tmp_path / f"good{index}.png", index)
        names += [name, f"good{index}.png"]
    (tmp_path / "list.txt").write_text("\n".join(names))
    images = load(tmp_path / "list.txt")
    assert [label for label, _ in images.skipped] == list(UNUSABLE)
    assert all(reason and "\n" not in reason for _, reason in images.skipped)
    assert images.labels == [f"good{index}.png" for index in range(len(UNUSABLE))]
    assert torch.equal(read_all(images), cropped(*range(len(UNUSABLE))))
    warnings = capsys.readouterr().err
    assert all(f"{name} is left out" in warnings for name in UNUSABLE)


def test_many_unusable_files_do_not_flood_the_screen(tmp_path, capsys):
    save(tmp_path / "good.png")
    (tmp_path / "list.txt").write_text("".join(f"missing{index}.png\n" for index in range(50)) + "good.png\n")
    assert len(load(tmp_path / "list.txt").skipped) == 50
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 21
    assert "30 more" in warnings[-1]


def test_nothing_usable(tmp_path):
    (tmp_path / "list.txt").write_text("gone.png\n")
    with pytest.raises(UserError, match=r"none of the 1 images of 'list' is usable; the first, gone.png: no such file"):
        load(tmp_path / "list.txt")


def test_a_file_that_vanishes_later(folder, on_demand):
    images = load(folder)
    (folder / "b.png").unlink()
    with pytest.raises(UserError, match=r"b\.png can no longer be read"):
        read_all(images)


# ----------------------------------------------------------------------------------------------- folders and lists


def test_a_folder_is_searched_below_and_sorted(folder):
    images = load(folder)
    assert images.name == "pictures"
    assert len(images) == 7
    assert torch.equal(read_all(images), cropped(3, 1, 0, 2, 4, 5, 6))  # a/b/y, a/x, b, c, d, e, f


def test_linked_folders_are_followed_once(folder, tmp_path):
    save(tmp_path / "elsewhere" / "z.png", 9)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    assert len(load(folder)) == 8


def test_a_list_resolves_paths_beside_itself_then_here(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder / "a")
    lines = ["# a comment", "", "  b.png  ", "x.png", str(folder / "e.png"), "b.png"]
    (folder / "chosen.txt").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    images = load(folder / "chosen.txt")
    assert images.name == "chosen"
    assert len(images) == 4
    assert torch.equal(read_all(images), cropped(0, 1, 5, 0))


def test_max_images_takes_evenly_spread_usable_ones_and_no_more(memory, tmp_path, opened, capsys):
    """Of class folders all are among them; a damaged one is stood in for, and the order stays that of the source."""
    for index in range(40):
        save(tmp_path / "p" / f"class{index // 10}" / f"{index:02}.png", index)
    (tmp_path / "p" / "class1" / "10.png").write_bytes(b"damaged")
    images = load(tmp_path / "p", max_images=4)
    assert images.labels == ["class0/00.png", "class1/11.png", "class2/20.png", "class3/30.png"]
    assert len(opened) == 5  # the damaged one and no more than was needed
    assert torch.equal(read_all(images), cropped(0, 11, 20, 30))
    assert "'p': 4 of 40 images are used, evenly spread (--max_images)" in capsys.readouterr().out
    assert len(load(tmp_path / "p", max_images=50)) == 39
    assert "evenly" not in capsys.readouterr().out


@pytest.mark.parametrize("usable", [{0, 1, 2}, {9}, set(), set(range(3, 20)), set(range(0, 20, 2))])
@pytest.mark.parametrize("limit", [1, 3, 7, 20])
def test_every_file_is_tried_before_there_are_too_few(usable, limit):
    found, failed, tried = {}, {}, []
    for piece in image_files._rows_to_try(20, limit, 4, found, failed):
        assert 0 < len(piece) <= 4
        tried += piece
        found.update((row, None) for row in piece if row in usable)
        failed.update((row, None) for row in piece if row not in usable)
    assert len(tried) == len(set(tried))
    assert len(found) == min(limit, len(usable))


def test_decoded_on_demand_is_the_same_as_kept(folder, monkeypatch):
    kept = load(folder)
    monkeypatch.setattr(image_sets, "IN_MEMORY_BYTES", 0)
    decoded = load(folder)
    assert type(kept.store) is not type(decoded.store)
    assert torch.equal(kept.read(2, 6), decoded.read(2, 6))
    assert len(kept) == len(decoded)


def test_fingerprints_tell_contents_apart(memory, folder, tmp_path):
    first = load(folder).fingerprint
    assert first == load(folder, workers=1).fingerprint
    assert first.startswith("7:")
    folder.rename(tmp_path / "moved")  # what it is called is no content
    assert first == load(tmp_path / "moved").fingerprint
    (tmp_path / "moved").rename(folder)
    (folder / "f.png").rename(folder / "g.png")
    assert first == load(folder).fingerprint
    assert first != load(folder, max_images=6).fingerprint
    assert first != load(folder, image_size=16).fingerprint
    assert first != load(folder, center_crop=False).fingerprint
    save(folder / "b.png", 50, (41, 33))
    assert first != load(folder).fingerprint


# ------------------------------------------------------------------------------------- identity: content, not names


def frames(folder, seed):
    """BMP pictures of equal names and sizes."""
    for index in range(3):
        save(folder / f"{index}.bmp", 10 * seed + index)
    return folder


def array_file(path, seed):
    return save_array(path, noise_values((3, 40, 33, 3), seed))


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(("make", "name"), [(frames, "pictures"), (array_file, "pictures.npy")])
def test_equal_names_and_sizes_are_no_identity(make, name, memory, check, tmp_path):
    first, second = (make(tmp_path / str(seed) / name, seed) for seed in (1, 2))
    same = make(tmp_path / "other" / f"x{name}", 1)
    marks = [load(source, check=check).fingerprint for source in (first, second, same)]
    assert marks[0] != marks[1]
    assert marks[0] == marks[2]  # the same content by another name


SAME_BYTES = {  # pairs of arrays that differ in nothing but what their bytes mean
    "types": (np.eye(40, dtype=np.uint8)[None], np.eye(40, dtype=bool)[None]),
    "shapes": (np.zeros((1, 40, 50), np.uint8), np.zeros((1, 50, 40), np.uint8)),
    "channels": (np.ones((1, 60, 40), np.uint8), np.ones((1, 40, 20, 3), np.uint8)),
}


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("kind", SAME_BYTES)
def test_equal_bytes_of_other_arrays_are_no_identity(kind, check, on_demand, tmp_path):
    marks = []
    for index, values in enumerate(SAME_BYTES[kind]):
        np.save(tmp_path / f"{index}.npy", values)
        marks.append(load(tmp_path / f"{index}.npy", check=check).fingerprint)
    assert SAME_BYTES[kind][0].tobytes() == SAME_BYTES[kind][1].tobytes()
    assert marks[0] != marks[1]


def test_a_file_edited_in_place_is_noticed(tmp_path, on_demand):
    images = load(frames(tmp_path / "p", 1))
    save(tmp_path / "p" / "1.bmp", 50)  # as many bytes
    assert torch.equal(images.read(0, 1), cropped(10))
    with pytest.raises(UserError, match=r"1\.bmp was changed while it was in use; run the same command again"):
        images.read(1, 2)


def test_an_array_edited_in_place_is_noticed(tmp_path, on_demand):
    images = load(array_file(tmp_path / "p.npy", 1))
    assert images.fingerprint.startswith("3:")
    values = np.load(tmp_path / "p.npy", mmap_mode="r+")
    values[1, 0, 0, 0] ^= 1
    values.flush()
    images.read(0, 1)
    with pytest.raises(UserError, match=r"image 1 of .*p\.npy was changed while it was in use"):
        images.read(1, 2)


def test_a_large_training_set_is_known_by_samples(folder, on_demand, monkeypatch, opened):
    monkeypatch.setattr(image_files, "SAMPLED", 3)
    first = load(folder, check=False).fingerprint
    assert opened == ["y.png", "b.png", "d.bmp"]  # rows 0, 2 and 4 of 7
    (folder / "gone.png").symlink_to("nowhere")
    assert load(folder, check=False).fingerprint != first
    (folder / "gone.png").unlink()
    assert load(folder, check=False).fingerprint == first
    save(folder / "f.png", 50, (41, 33))  # none of the samples, but of another size
    assert load(folder, check=False).fingerprint != first


def test_labels_and_treatment_tell_what_was_used_and_how(folder, tmp_path):
    (folder / "b.png").write_bytes(b"damaged")
    used = ["a/b/y.png", "a/x.png", "c.PNG", "d.bmp", "e.png", "f.png"]
    images = load(folder)
    assert images.labels == used
    assert images.treatment == {
        "orientation": "as the camera noted", "transparency": "on white", "cut": None, "shape": "crop",
    }  # fmt: skip
    assert load(folder, center_crop=False, reduced_to=20).treatment["shape"] == "squeeze"
    save(tmp_path / "CelebA" / "0.png", 0, (178, 218))
    named = load("CelebA", data_root=tmp_path)
    assert (named.labels, named.treatment["cut"]) == (["0.png"], 140)
    assert (named.treatment["orientation"], named.treatment["transparency"]) == ("as stored", "dropped")
    assert load(array_file(tmp_path / "p.npy", 1)).labels is None


def test_a_users_own_pictures_are_seen_as_viewers_show_them(tmp_path):
    """Turned as the camera noted, on white where transparent; of a named set the stored pixels count."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = noise_picture(0, (60, 30))
    hidden = picture.copy()
    hidden.putalpha(0)
    (tmp_path / "FFHQ").mkdir()
    picture.save(tmp_path / "FFHQ" / "a.png", exif=exif)
    hidden.save(tmp_path / "FFHQ" / "b.png")
    own, named = read_all(load(tmp_path / "FFHQ")), read_all(load("FFHQ", data_root=tmp_path))
    assert torch.equal(own[0], chw(crop(picture.rotate(-90, expand=True), 32)))
    assert (own[1] == 255).all()
    assert torch.equal(named, chw(crop(picture, 32)).expand(2, 3, 32, 32))


# -------------------------------------------------------------------------------------- what is no input of a folder


def own(folder):
    """Leaves the mark of a run that wrote there."""
    with files.owned(folder):
        pass


WRITTEN = {  # what is left out, how which folder is marked, and what lies there
    "marked": ("run", (files.mark, "run"), ["run/plot.png"]),
    "a run's": ("run", (own, "run"), ["run/manifest.json", "run/masks/mask.png"]),
    "results": ("run", None, ["run/histogram.png", "run/pos/batch_0.pth", "run/manifest.json"]),
    "scores": ("a/run", None, ["a/run/histogram.png", "a/run/results.json", "a/run/scores_MSE.csv"]),
    "training": ("run/samples", None, ["run/samples/iter_5/sample.png", "run/checkpoints-meta/"]),
    "samples": ("samples", None, ["samples/iter_5/sample.png"]),
    "evaluation": ("eval", None, ["eval/report_3.npz", "eval/ckpt_3_loss.npz"]),
    "work folder": ("checkpoints", (own, "."), ["checkpoints/checkpoint_1"]),
}


def write(root, kind):
    """Writes one of the above; returns what is left out."""
    left_out, marked, names = WRITTEN[kind]
    if marked:
        mark, below = marked
        mark(root / below)
    put(root, *names)
    return left_out


@pytest.mark.parametrize("kind", WRITTEN)
def test_folders_that_this_program_wrote_are_left_out(kind, tmp_path, capsys):
    root = tmp_path / "photos"
    put(root, "a.png", "sub/b.png")
    left_out = write(root, kind)
    images = load(root)
    assert (images.labels, images.skipped) == (["a.png", "sub/b.png"], [])
    assert f"'{root}': left out, as this program wrote it: {left_out}\n" in capsys.readouterr().out


def test_users_folders_that_look_alike_are_read(tmp_path, capsys):
    put(tmp_path, "pos/a.png", "neg/b.png", "samples/c.png", "eval/d.png", "checkpoints/e.png", "iter_5/f.png")
    put(tmp_path, "manifest.json", "results.json")
    assert len(load(tmp_path)) == 6
    assert "wrote" not in capsys.readouterr().out


OWN_NAMES = ("cats/a.png", "samples/b.png", "samples/iter_7/c.png", "checkpoints/d.png", "checkpoints-meta/e.png",
             "tensorboard/f.png", "eval/g.png")  # fmt: skip


def train_in(root):
    """What training and an evaluation write in a folder."""
    own(root)
    own(root / "eval")
    files.mark(root / "samples")
    put(root, "samples/iter_5/sample.png", "samples/iter_5/sample.np", "checkpoints/checkpoint_1.pth", "stdout.txt")
    put(root, "checkpoints-meta/checkpoint.pth", "tensorboard/events.out.tfevents.17.host.1.0", "eval/report_1.npz")


@pytest.mark.parametrize("workdir", [".", "cats"])
@pytest.mark.parametrize("own", [OWN_NAMES, *((name, "cats/a.png") for name in OWN_NAMES), ("a.png",)])
def test_training_in_the_folder_of_the_images_leaves_them_the_same(own, workdir, tmp_path):
    """Also where they lie in folders of the names that training uses, and when all of its marks are lost."""
    for index, name in enumerate(own):
        save(tmp_path / name, index)
    before = load(tmp_path)
    assert before.labels == sorted(set(own))
    with files.owned(tmp_path / workdir):
        starting = load(tmp_path)
    train_in(tmp_path / workdir)
    during = load(tmp_path)
    for mark in tmp_path.rglob(files.MARK):
        mark.unlink()
    without = load(tmp_path)
    assert before.labels == starting.labels == during.labels == without.labels
    assert before.fingerprint == starting.fingerprint == during.fingerprint == without.fingerprint
    assert not during.skipped


@pytest.mark.parametrize("kind", ["marked", "results"])
def test_a_folder_of_results_is_no_input(kind, tmp_path):
    write(tmp_path, kind)
    with pytest.raises(UserError, match="run is written by this program, so its images are no input; give a folder of"):
        load(tmp_path / "run")
    with pytest.raises(UserError, match=r"holds no images \(this program wrote run\); check the path"):
        load(tmp_path)


def test_what_systems_put_among_images_is_no_image(folder, capsys):
    put(folder, ".hidden.png", "__MACOSX/._b.png", "@eaDir/b.png/SYNOPHOTO.jpg", ".ipynb_checkpoints/b.png")
    put(folder, ".thumbnails/b.png", "a/.trash/b.png")
    assert len(load(folder)) == 7
    assert "eaDir" not in "".join(capsys.readouterr())


def test_other_files_are_counted_by_their_endings(folder, capsys):
    put(folder, "b.CSV", "clip.mp4", "more.txt", "figure.eps", "README", "damaged.xyz")
    os.mkfifo(folder / "pipe.png")
    assert load(folder).skipped == [
        ("README", "not an image, or damaged"),
        ("damaged.xyz", "not an image, or damaged"),
        ("pipe.png", "not a regular file"),
    ]
    line = f"'{folder}': 5 files are left out by their endings: 1 .csv, 1 .eps, 1 .mp4, 2 .txt\n"
    assert line in capsys.readouterr().out
    put(folder, "only/x.csv")
    with pytest.raises(UserError, match=r"holds no images \(1 \.csv\); check the path"):
        load(folder / "only")


def test_links_to_folders_do_not_depend_on_the_file_system(folder, tmp_path, monkeypatch):
    """Two links to one folder: the first by name counts, in whatever order the system lists them."""
    save(tmp_path / "elsewhere" / "z.png")
    for name in ("link2", "link1"):
        (folder / name).symlink_to(tmp_path / "elsewhere")
    walk = os.walk

    def backwards(top, **options):
        for parent, below, names in walk(top, **options):
            below.sort(reverse=True)
            yield parent, below, names[::-1]

    expected = load(folder).labels
    assert "link1/z.png" in expected
    monkeypatch.setattr(os, "walk", backwards)
    assert load(folder).labels == expected


@pytest.mark.parametrize(("most", "factor"), [(4095, 16), (255, 257)])
def test_dark_16_bit_images_are_warned_of(most, factor, tmp_path, capsys):
    for index in range(3):
        values = np.random.default_rng(index).integers(0, most, (32, 32), dtype=np.uint16)
        values[0, 0] = most
        Image.fromarray(values).save(tmp_path / f"{index}.png")
    save(tmp_path / "plain.png")
    load(tmp_path)
    warnings = capsys.readouterr().err
    assert f"the 3 images of 16 bits reach only {most} of 65535" in warnings
    assert f"multiply the values by {factor}\n" in warnings
    Image.fromarray(np.full((32, 32), 4096, np.uint16)).save(tmp_path / "bright.png")
    load(tmp_path)
    assert "16 bits" not in capsys.readouterr().err


def test_images_of_zeros_and_ones_are_warned_of(tmp_path, capsys):
    values = noise_values((5, 32, 32), most=1)
    for name, content in {"ones": values, "levels": 255 * values, "truths": values > 0, "black": 0 * values}.items():
        load(save_array(tmp_path / f"{name}.npy", content))
        assert ("multiply the values by 255" in capsys.readouterr().err) == (name == "ones")


# ---------------------------------------------------------------------------------------- ways to write a source


def test_a_path_wins_over_a_name_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "data", "MNIST")
    assert len(load("mnist", data_root=tmp_path / "data")) == 19
    save(tmp_path / "mnist" / "own.png")
    images = load("mnist", data_root=tmp_path / "data")
    assert images.labels == ["own.png"]
    line = f"'mnist' is taken for {tmp_path}/mnist; rename that to have the data set of this name"
    assert line in capsys.readouterr().out
    put(tmp_path, "data/FFHQ/test/1.png", "data/FFHQ/train/2.png")
    monkeypatch.chdir(tmp_path / "data")  # where the named sets lie: their folders are not the user's own
    assert load("FFHQ", data_root=".").labels == ["1.png"]
    assert len(load("MNIST", data_root=tmp_path / "data")) == 19


def test_the_home_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "data" / "FFHQ" / "test" / "1.png")
    (tmp_path / "list.txt").write_text("~/pictures/b.png\n")
    np.save(tmp_path / "p.npy", np.zeros((5, 32, 32), np.uint8))
    for source, count in (("~/pictures", 7), ("~/list.txt", 1), ("~/p.npy", 5), ("~/pictures/b.png", 1)):
        assert len(load(source)) == count
    assert len(load("FFHQ", data_root="~/data")) == 1


def test_one_picture_is_a_set(folder):
    images = load(folder / "b.png")
    assert (images.name, len(images), images.labels) == ("b", 1, [str(folder / "b.png")])
    assert torch.equal(read_all(images), cropped(0))
    (folder / "x.csv").write_text("b.png")
    with pytest.raises(UserError, match="unknown data set"):
        load(folder / "x.csv")


LINES = {
    "plain": "a b/x.png",
    "label": "a b/x.png 3",
    "word": "a b/x.png\tcat",
    "comma": "a b/x.png, 3",
    "quotes": '"a b/x.png"',
    "single quotes": "'a b/x.png'",
    "quotes and label": '"a b/x.png" 3',
    "backslashes": "a b\\x.png",
    "all": '"a b\\x.png";3',
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_lines_of_a_list(line, tmp_path):
    save(tmp_path / "a b" / "x.png", 3)
    (tmp_path / "list.txt").write_text(f"{line}\n")
    images = load(tmp_path / "list.txt")
    assert images.labels[0].strip() in ("a b/x.png", r"a b\x.png")
    assert torch.equal(read_all(images), cropped(3))


def test_lines_that_name_no_file_are_told_as_they_are(tmp_path):
    save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.png 1")  # a name with a blank is that name, not a label
    save(tmp_path / "x.png", 1)
    (tmp_path / "list.txt").write_text('x.png 1\n"gone.png" 2\n')
    images = load(tmp_path / "list.txt")
    assert images.labels == ["x.png 1"]
    assert images.skipped == [('"gone.png" 2', "no such file")]


# ------------------------------------------------------------------------------------------------- users' mistakes


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("CIFAR11", {}, "unknown data set 'CIFAR11'; choose one of: CIFAR10, .*LSUN; or give the path"),
        ("gone/pictures.npz", {}, "unknown data set"),
        ("MNIST:digits", {}, "unknown data set"),
        ("gone.txt", {}, "unknown data set"),
        ("", {}, "unknown data set"),
        ("here", {"split": "validation"}, "choose one of: train, test"),
        ("here", {"num_channels": 4}, "3 channels or 1"),
        ("here", {"max_images": 0}, "at least 1"),
        ("here", {"image_size": 0}, "at least 1"),
        ("here", {}, "holds no images"),
        ("empty.txt", {}, "names no images"),
        ("binary.txt", {}, "cannot be read as text .*; save it as UTF-8"),
        ("x" * 5000, {}, "unknown data set"),
        ("null\0byte", {}, "unknown data set"),
    ],
)
def test_sources_that_cannot_be_loaded(source, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.md").write_text("none")
    (tmp_path / "empty.txt").write_text("\n# nothing\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff\x00")
    with pytest.raises(UserError, match=message):
        load(source, **options)


def test_a_folder_that_cannot_be_listed(folder, monkeypatch):
    def walk(top, onerror, followlinks):
        onerror(PermissionError(13, "Permission denied", str(top)))

    monkeypatch.setattr(os, "walk", walk)  # the tests may run as root, whom no permission stops
    with pytest.raises(UserError, match="cannot be listed"):
        load(folder)


# ------------------------------------------------------------------------------------------------------ named sets


def idx_bytes(values):
    """An array of uint8 in MNIST's file format."""
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes()


def write_mnist(root, name, count=20):
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    made = {}
    for seed, prefix in enumerate(["train", "t10k"]):
        pictures = np.random.default_rng(seed).integers(0, 256, (count - seed, 28, 28), dtype=np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(pictures))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(len(pictures), np.uint8)))
        made[{"train": "train", "t10k": "test"}[prefix]] = pictures
    return made


@pytest.mark.parametrize(
    ("source", "name"),
    [("MNIST", "MNIST"), ("KMNIST", "KMNIST"), ("FashionMNIST", "FashionMNIST"), ("fashion_mnist", "FashionMNIST")],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_mnist_like_sets_are_torchvisions_resized_as_published(source, name, split, tmp_path):
    from torchvision.transforms import Resize

    pictures = write_mnist(tmp_path, name)[split]
    images = load(source, split=split, data_root=tmp_path)
    assert (images.name, images.shape, len(images)) == (name, (3, 32, 32), len(pictures))
    resize = Resize(32)  # on a PIL image, bilinear: what the published code calls
    expected = torch.stack([chw(resize(Image.fromarray(picture))) for picture in pictures])
    assert torch.equal(read_all(images), expected)


def write_cifar(root, name, monkeypatch):
    """CIFAR files of 4 training and 3 test images, under the names and (patched) checksums torchvision checks."""
    import torchvision

    made = getattr(torchvision.datasets, name)
    folder = root / made.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(file, count):
        data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        content = pickle.dumps({"data": data, "labels": [0] * count, "fine_labels": [0] * count})
        (folder / file).write_bytes(content)
        return [file, hashlib.md5(content).hexdigest()], data.reshape(-1, 3, 32, 32)

    train, train_pixels = write("train_part", 4)
    test, test_pixels = write("test_part", 3)
    meta, _ = write("meta", 1)
    monkeypatch.setattr(made, "train_list", [train])
    monkeypatch.setattr(made, "test_list", [test])
    content = pickle.dumps({made.meta["key"]: ["a class"]})
    (folder / "meta").write_bytes(content)
    monkeypatch.setattr(made, "meta", {**made.meta, "filename": meta[0], "md5": hashlib.md5(content).hexdigest()})
    return {"train": train_pixels, "test": test_pixels}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("reduced_to", [None, 20])
def test_named_sets_too_large_for_memory_are_enlarged_when_read(channels, reduced_to, tmp_path, monkeypatch):
    """As CIFAR-10 is at 256x256; resizing one image or all at once may round apart by one level."""
    write_mnist(tmp_path, "MNIST")
    write_cifar(tmp_path, "CIFAR10", monkeypatch)
    options = {"data_root": tmp_path, "image_size": 50, "num_channels": channels, "reduced_to": reduced_to}
    for source in ("MNIST", "CIFAR10"):
        monkeypatch.setattr(image_sets, "IN_MEMORY_BYTES", 2 << 30)
        kept = load(source, **options)
        monkeypatch.setattr(image_sets, "IN_MEMORY_BYTES", 0)
        made = load(source, **options)
        assert made.store.decode(0).nbytes <= channels * 50 * 50  # one image at a time
        assert (read_all(made).int() - read_all(kept).int()).abs().max() <= 1
        assert (made.source_size, made.reduced_to, made.shape) == (kept.source_size, kept.reduced_to, kept.shape)
        assert made.fingerprint == load(source, **options).fingerprint
        assert made.fingerprint != load(source, **{**options, "split": "train", "max_images": len(made)}).fingerprint


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar(name, split, tmp_path, monkeypatch):
    pixels = torch.from_numpy(write_cifar(tmp_path, name, monkeypatch)[split])
    images = load(name, split=split, data_root=tmp_path)
    assert images.name == name
    assert torch.equal(read_all(images), pixels)
    spread = pixels[[0, len(pixels) // 2]]
    assert torch.equal(read_all(load(name, split=split, data_root=tmp_path, max_images=2)), spread)


@pytest.mark.parametrize("split", ["train", "test"])
def test_svhn(split, tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    file = tmp_path / f"{split}_32x32.mat"
    savemat(file, {"X": pixels.transpose(2, 3, 1, 0), "y": np.ones((5, 1), np.uint8)})
    entry = [SVHN.split_list[split][0], file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", {**SVHN.split_list, split: entry})
    assert torch.equal(read_all(load("svhn", split=split, data_root=tmp_path)), torch.from_numpy(pixels))


def test_colour_sets_become_grey_as_pillow_does_it(tmp_path, monkeypatch):
    pixels = write_cifar(tmp_path, "CIFAR10", monkeypatch)["train"]
    expected = np.stack([np.array(Image.fromarray(image.transpose(1, 2, 0)).convert("L")) for image in pixels])
    grey = read_all(load("CIFAR10", split="train", data_root=tmp_path, num_channels=1))
    assert torch.equal(grey, torch.from_numpy(expected)[:, None])


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("name", [n for n, e in datasets.DATASETS.items() if isinstance(e, datasets._Torchvision)])
def test_a_failed_download_says_what_to_fetch_and_where_to(name, tmp_path, no_network):
    with pytest.raises(UserError, match="no route to host") as caught:
        load(name, data_root=tmp_path / "root")
    message = str(caught.value)
    entry = datasets.DATASETS[name]
    assert entry.url.format(split="test") in message
    assert str(tmp_path / "root" / entry.folder) in message
    assert "--data_root" in message
    assert "\n" not in message


def test_damaged_files_of_a_named_set(tmp_path, no_network):
    write_mnist(tmp_path, "MNIST")
    file = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="deleting what is damaged"):
        load("MNIST", data_root=tmp_path)
    assert len(load("MNIST", split="train", data_root=tmp_path)) == 20


def test_the_files_fetched_by_hand_are_found_where_the_message_says(tmp_path, no_network, monkeypatch):
    from torchvision.datasets import KMNIST

    made = write_mnist(tmp_path, "KMNIST")
    resources = []
    for file in sorted((tmp_path / "KMNIST" / "raw").iterdir()):
        packed = file.with_name(file.name + ".gz")
        packed.write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
        resources.append((packed.name, hashlib.md5(packed.read_bytes()).hexdigest()))
    monkeypatch.setattr(KMNIST, "resources", resources)
    assert len(load("KMNIST", data_root=tmp_path)) == len(made["test"])


# ------------------------------------------------------------------------------------------- named sets of files

FILE_SETS = {"CELEBA": "CelebA", "celebahq": "CelebAHQ", "FFHQ": "FFHQ", "ImageNet": "ImageNet", "LSUN": "LSUN_tower"}
SIZE = (180, 220)


def save_noise(folder, *seeds, size=SIZE):
    """Pictures `{seed}.png` of noise."""
    for seed in seeds:
        save(folder / f"{seed}.png", seed, size)


def as_used(name, *seeds):
    """What a named set makes of pictures of noise, (N, 3, 32, 32)."""
    pictures = [noise_picture(seed, SIZE) for seed in seeds]
    if name == "CelebA":  # the central 140x140 pixels
        pictures = [picture.crop((20, 40, 160, 180)) for picture in pictures]
    return torch.stack([chw(crop(picture, 32)) for picture in pictures])


def lists(root, name):
    for split, seeds in {"train": [3, 1], "test": [2]}.items():
        save_noise(root / name / "all", *seeds)
        (root / f"{name}_{split}.txt").write_text("\n".join(f"{name}/all/{seed}.png" for seed in seeds))


def folders(root, name, test="test"):
    save_noise(root / name / "train" / "below", 1)
    save_noise(root / name / "train", 3)
    save_noise(root / name / test, 2)


def torchvision_folders(root, name):
    folders(root, name, "val")


@pytest.mark.parametrize("layout", [lists, folders, torchvision_folders])
@pytest.mark.parametrize("source", FILE_SETS)
def test_named_sets_of_files(source, layout, tmp_path):
    name = FILE_SETS[source]
    layout(tmp_path, name)
    for split, seeds in {"train": [3, 1], "test": [2]}.items():
        images = load(source, split=split, data_root=tmp_path, category="tower")
        assert (images.name, len(images)) == (name, len(seeds))
        assert torch.equal(read_all(images), as_used(name, *seeds))


@pytest.mark.parametrize("source", FILE_SETS)
def test_a_set_without_splits_serves_both_and_says_so(source, tmp_path, capsys):
    name = FILE_SETS[source]
    save_noise(tmp_path / name / "faces", 2)
    for split in ("train", "test"):
        images = load(source, split=split, data_root=tmp_path, category="tower")
        assert torch.equal(read_all(images), as_used(name, 2))
        assert f"{name} is not split: all images of {tmp_path / name} serve" in capsys.readouterr().err


@pytest.mark.parametrize("source", FILE_SETS)
def test_an_absent_set_says_what_to_put_where(source, tmp_path):
    name = FILE_SETS[source]
    options = {"data_root": tmp_path, "category": "tower"}
    with pytest.raises(UserError, match=rf"the test split of {name} is not in {tmp_path}: put ") as caught:
        load(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith("or give another folder with --data_root")
    assert ("img_align_celeba/ and list_eval_partition.txt" in message) == (name == "CelebA")
    places = [tmp_path / f"{name}_test.txt", tmp_path / name / "test", tmp_path / name]
    for place in places:
        assert f"{place}," in message or f"{place} " in message
    save_noise(places[1], 2)  # as the message says
    assert len(load(source, **options)) == 1
    with pytest.raises(UserError, match="the train split of"):
        load(source, split="train", **options)  # the test images must not be trained on


def test_training_images_are_never_taken_for_test_images(tmp_path):
    lists(tmp_path, "FFHQ")  # the list is of a folder that would do for a set without splits
    (tmp_path / "FFHQ_test.txt").unlink()
    with pytest.raises(UserError, match="the test split of FFHQ"):
        load("FFHQ", data_root=tmp_path)
    assert len(load("FFHQ", split="train", data_root=tmp_path)) == 2


def test_a_set_known_by_name_differs_from_its_folder(tmp_path, on_demand):
    """By the cut that CelebA's name brings, also in its fingerprint; without the crop there is no cut either."""
    save_noise(tmp_path / "CelebA", 2)
    named, folder = load("CelebA", data_root=tmp_path), load(tmp_path / "CelebA")
    assert named.name == folder.name
    assert not torch.equal(read_all(named), read_all(folder))
    assert named.fingerprint != folder.fingerprint
    sources = (tmp_path / "CelebA", "celeba")
    whole = [read_all(load(source, data_root=tmp_path, center_crop=False)) for source in sources]
    assert torch.equal(*whole)


def test_pictures_smaller_than_the_cut(tmp_path):
    save_noise(tmp_path / "CelebA", 2, size=(64, 80))
    assert torch.equal(read_all(load("CelebA", data_root=tmp_path))[0], chw(crop(noise_picture(2, (64, 80)), 32)))


def write_celeba(root):
    """CelebA as published and as torchvision reads it: pictures 1 to 6, in the splits 0, 1, 2, 0, 1, 2."""
    folder = root / "celeba"
    names = [f"{seed}.png" for seed in range(1, 7)]
    save_noise(folder / "img_align_celeba", *range(1, 7), size=(178, 218))
    (folder / "list_eval_partition.txt").write_text("".join(f"{n} {i % 3}\n" for i, n in enumerate(names)))
    for file in ("identity_CelebA.txt", "list_bbox_celeba.txt", "list_landmarks_align_celeba.txt"):
        header = "" if file.startswith("identity") else "6\nvalue\n"
        (folder / file).write_text(header + "".join(f"{n} 1\n" for n in names))
    (folder / "list_attr_celeba.txt").write_text("6\nvalue\n" + "".join(f"{n} 1\n" for n in names))


@pytest.mark.parametrize("split", ["train", "test"])
def test_celeba_as_published_is_torchvisions(split, tmp_path, monkeypatch):
    from torchvision.datasets import CelebA
    from torchvision.transforms import CenterCrop

    write_celeba(tmp_path)
    monkeypatch.setattr(CelebA, "_check_integrity", lambda self: True)  # of the real files
    theirs = CelebA(str(tmp_path), split, transform=CenterCrop(140))
    images = load("CELEBA", split=split, data_root=tmp_path)
    assert images.name == "CelebA"
    assert torch.equal(read_all(images), torch.stack([chw(crop(picture, 32)) for picture, _ in theirs]))


def test_a_damaged_partition_of_celeba(tmp_path):
    write_celeba(tmp_path)
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text("1.png\n2.png one\n")
    with pytest.raises(UserError, match=r"list_eval_partition\.txt names no image of the test split; copy it again"):
        load("CelebA", data_root=tmp_path)


def test_categories_of_lsun(tmp_path):
    save_noise(tmp_path / "LSUN_church_outdoor" / "test", 1, 2)
    for source, category in [("LSUN", "church_outdoor"), ("lsun:church_outdoor", None), ("LSUN:church_outdoor", "x")]:
        images = load(source, category=category, data_root=tmp_path)
        assert (images.name, len(images)) == ("LSUN_church_outdoor", 2)
    for source in ("LSUN", "LSUN:", "LSUN:../x"):
        with pytest.raises(UserError, match=f"'{source}' names no category of LSUN; write LSUN:bedroom, or set config"):
            load(source, data_root=tmp_path)


# --------------------------------------------------------------------------------- worker threads, unchecked files


def test_workers_change_nothing(folder, on_demand):
    (folder / "c.PNG").write_bytes(b"damaged")
    alone, many = load(folder, workers=1), load(folder, workers=5)
    assert alone.skipped == many.skipped
    assert torch.equal(read_all(alone), read_all(many))
    assert alone.fingerprint == many.fingerprint
    for check in (True, False):
        first, second = (
            feed(load(folder, workers=workers, check=check), 3, random_flip=True, uniform_dequantization=True)
            for workers in (1, 5)
        )
        for step in range(5):
            assert torch.equal(first.batch(step), second.batch(step))


def test_files_are_read_once_for_both_check_and_fingerprint_and_then_what_is_asked_for(folder, on_demand, opened):
    images = load(folder)
    assert images.fingerprint.startswith("7:")
    assert len(opened) == 7
    opened.clear()
    images.read(2, 4)
    assert sorted(opened) == ["b.png", "c.PNG"]


def test_training_starts_without_decoding_a_large_set(folder, on_demand, opened):
    images = load(folder, check=False)
    assert opened == []
    assert (len(images), images.skipped) == (7, [])
    assert torch.equal(read_all(images), read_all(load(folder)))


def test_unusable_files_met_in_training(folder, on_demand, capsys):
    """The next usable image stands in, so that a batch stays a function of seed, step and files."""
    for name in ("a/x.png", "b.png", "f.png"):  # rows 1, 2 and 6 of 7
        (folder / name).write_bytes(b"damaged")
    images = load(folder, check=False)
    whole = read_all(images)
    usable = read_all(load(folder))  # rows 0, 3, 4, 5
    assert torch.equal(whole, usable[[0, 1, 1, 1, 2, 3, 0]])
    assert sorted(images.skipped) == [(name, "not an image, or damaged") for name in ("a/x.png", "b.png", "f.png")]
    read_all(images)
    assert len(images.skipped) == 3
    warnings = capsys.readouterr().err
    assert warnings.count("b.png is left out, the next image stands in for it: not an image, or damaged\n") == 1
    batches, jumping = feed(load(folder, check=False), 3), feed(load(folder, check=False), 3)
    expected = [batches.batch(step) for step in range(6)]
    for step in [4, 1, 5, 0]:
        assert torch.equal(jumping.batch(step), expected[step])


def test_many_unusable_files_met_in_training(folder, on_demand, capsys):
    for index in range(60):
        (folder / f"more{index}.png").write_bytes(b"damaged")
    images = load(folder, check=False, workers=1)
    assert read_all(images).shape == (67, 3, 32, 32)
    assert len(images.skipped) == 60
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 20
    assert warnings[-1].endswith("; more are counted, not named")


@pytest.mark.parametrize("count", [7, 150])
def test_a_disk_that_fails_ends_training(count, folder, on_demand):
    for index in range(count - 7):
        (folder / f"more{index}.png").write_bytes(b"")
    images = load(folder, check=False, workers=1)
    for path in folder.rglob("*.*"):
        path.unlink()
    with pytest.raises(UserError, match=rf"{min(count, 100)} images of 'pictures' in a row cannot be read.*no such fi"):
        images.read(0, 1)


# ---------------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize("shape", [(7, 28, 28), (7, 28, 28, 1)])
def test_arrays_of_28x28_are_treated_as_mnist_is(shape, tmp_path):
    pictures = write_mnist(tmp_path, "MNIST", count=8)["test"]
    np.savez_compressed(tmp_path / "pack.npz", images=pictures.reshape(shape))
    for size in [28, 32, 16]:
        packed = load(tmp_path / "pack.npz", image_size=size)
        assert packed.name == "pack"
        assert torch.equal(read_all(packed), read_all(load("MNIST", data_root=tmp_path, image_size=size)))


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("shape", [(5, 32, 32, 3), (5, 45, 70, 3), (5, 30, 45), (5, 33, 40, 1), (5, 32, 32, 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_go_through_the_crop(shape, suffix, memory, channels, tmp_path):
    values = noise_values(shape)
    path = save_array(tmp_path / f"pack.{suffix}", values)
    pictures = [Image.fromarray(row.squeeze()) for row in values]
    if shape[-1] == 4:
        pictures = [Image.alpha_composite(Image.new("RGBA", each.size, "white"), each) for each in pictures]
    squares = [crop(picture, 32).convert("L" if channels == 1 else "RGB") for picture in pictures]
    expected = torch.from_numpy(np.stack(squares)).view(5, 32, 32, channels).permute(0, 3, 1, 2)
    images = load(path, num_channels=channels)
    assert torch.equal(read_all(images), expected)
    assert torch.equal(read_all(load(path, num_channels=channels, max_images=2)), expected[[0, 2]])
    assert images.fingerprint == load(path, num_channels=channels).fingerprint


def test_one_of_several_arrays(tmp_path):
    values = np.zeros((2, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "pack.npz", train=values, test=values + 9)
    images = load(f"{tmp_path}/pack.npz:test")
    assert images.name == "pack_test"
    assert (read_all(images) == 9).all()


ACCEPTED = {
    "channels first": ((5, 3, 40, 33), lambda values: values.transpose(0, 2, 3, 1)),
    "grey channel first": ((5, 1, 40, 33), lambda values: values[:, 0]),
    "one grey image": ((1, 40, 33), lambda values: values),
    "28x28 channel first": ((5, 1, 28, 28), lambda values: values[:, 0]),
    "booleans": ((5, 40, 33), lambda values: values),
    "colour booleans": ((5, 32, 32, 3), lambda values: values),
}


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("kind", ACCEPTED)
def test_ways_to_write_images_as_an_array(kind, suffix, memory, tmp_path):
    shape, as_usual = ACCEPTED[kind]
    values = noise_values(shape)
    usual = as_usual(values)
    if "booleans" in kind:
        values = values > 127
        usual = np.where(values, 255, 0).astype(np.uint8)
    odd, plain = (
        load(save_array(tmp_path / f"{name}.{suffix}", content))
        for name, content in (("odd", values), ("usual", usual))
    )
    assert torch.equal(read_all(odd), read_all(plain))
    assert odd.source_size == plain.source_size == min(usual.shape[1:3])


AMBIGUOUS = [(40, 48, 3), (40, 48, 1), (40, 48, 4), (3, 40, 48), (5, 3, 40, 3), (5, 1, 40, 1)]


@pytest.mark.parametrize("shape", AMBIGUOUS)
def test_ambiguous_arrays_are_refused_with_the_way_to_write_them(shape, tmp_path):
    values = np.zeros(shape, np.uint8)
    with pytest.raises(UserError, match="may be") as caught:
        load(save_array(tmp_path / "pack.npy", values))
    if len(shape) == 3:
        assert "array[None] for one picture, array[..., None] for grey images" in str(caught.value)
        assert len(load(save_array(tmp_path / "grey.npy", values[..., None]))) == shape[0]
        assert len(load(save_array(tmp_path / "one.npy", values[None]))) == 1


def test_wrong_arrays_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", np.zeros((1000, 100)))
    monkeypatch.setattr(image_arrays, "read_array", None)
    with pytest.raises(UserError, match="holds float64 of shape 1000x100"):
        load(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 32, 32, 3)), r"holds float64 of shape 2x32x32x3; .*write \(255 \* array\)"),
        (np.zeros((2, 32, 32), np.uint16), r"holds uint16 .*write \(array // 257\)"),
        (np.zeros((2, 32, 32), int), r"holds int64 .*write array.astype\('uint8'\)"),
        (np.zeros((2, 4, 32, 32), np.uint8), r"shape 2x4x32x32; images are"),
        (np.zeros((2, 2, 32, 32), np.uint8), "shape 2x2x32x32"),
        (np.zeros((32, 32), np.uint8), r"shape 32x32; .*write array\[None\] for a single image"),
        (np.zeros((0, 32, 32), np.uint8), "shape 0x32x32"),
        (np.array([print]), "no plain arrays"),
    ],
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_arrays_that_are_no_images(values, message, suffix, tmp_path):
    with pytest.raises(UserError, match=message):
        load(save_array(tmp_path / f"pack.{suffix}", values))


PICTURES, LABELS, PAIRS = np.zeros((9, 32, 32), np.uint8), np.zeros(9, int), np.zeros((9, 2), np.uint8)
UNUSABLE_ARRAYS = {  # a source: the arrays in its file, and what is wrong
    "two.npz": ({"a": PICTURES, "b": PICTURES}, r"holds the arrays a, b; choose one, as in .*two\.npz:a"),
    "two.npz:c": ({"a": PICTURES, "b": PICTURES}, r"holds the arrays a, b; choose one, as in .*two\.npz:a"),
    "some.npz": ({"y": LABELS, "i": PAIRS, "x": PICTURES > 0}, r"the arrays y, i, x; choose one, as in .*some\.npz:x"),
    "none.npz": ({"y": LABELS, "i": PAIRS}, r"arrays y, i, of which none is images; images are uint8 or bool"),
    "empty.npz": ({}, r"empty\.npz holds no arrays; save images with numpy\.savez"),
    "cut.npz": ({"a": PICTURES}, r"cut\.npz is damaged"),
    "text.npy": ({}, r"text\.npy is damaged"),
}


@pytest.mark.parametrize("source", UNUSABLE_ARRAYS)
def test_array_files_that_cannot_be_used(source, tmp_path):
    arrays, message = UNUSABLE_ARRAYS[source]
    path = tmp_path / source.partition(":")[0]
    np.savez(path, **arrays)
    if source == "cut.npz":
        path.write_bytes(path.read_bytes()[:5000])
    if source == "text.npy":
        path.write_text("no array")
    with pytest.raises(UserError, match=message):
        load(tmp_path / source)


# --------------------------------------------------------------------------------------------- matched resolutions


def smooth(count, size, seed=0):
    """Images (N, size, size, 3) uint8 whose detail grows with the size: noise at every scale from 4 pixels on."""
    rng = np.random.default_rng(seed)
    images = np.zeros((count, size, size, 3))
    for cells in (4, 8, 16, 32, 64):
        images += np.kron(rng.normal(0, 16, (count, cells, cells, 3)), np.ones((1, size // cells, size // cells, 1)))
    return (images + 128).clip(0, 255).astype(np.uint8)


def mean_of_blocks(images, edge):
    """Images (N, H, W, C) uint8 at a lower resolution, as a sensor of larger pixels sees them."""
    count, size, _, channels = images.shape
    blocks = images.reshape(count, edge, size // edge, edge, size // edge, channels)
    return blocks.mean((2, 4)).round().astype(np.uint8)


def sharpness(images):
    """(N,) mean squared difference of neighbouring pixels of (N, C, H, W)."""
    images = images.float()
    return (images.diff(dim=2).square().mean((1, 2, 3)) + images.diff(dim=3).square().mean((1, 2, 3))).numpy()


def write_files(path, images):
    path.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(path / f"{index:02}.png")
    return path


@pytest.mark.parametrize(("write", "ending"), [(save_array, ".npy"), (write_files, "")])
def test_matched_images_are_equally_sharp(write, ending, memory, tmp_path):
    scenes = smooth(40, 64)
    low = write(tmp_path / f"low{ending}", mean_of_blocks(scenes, 16))
    high = write(tmp_path / f"high{ending}", mean_of_blocks(scenes, 32))
    assert (load(low).source_size, load(high).source_size) == (16, 32)
    ratio = sharpness(read_all(load(low))) / sharpness(read_all(load(high)))
    assert ratio.max() < 0.5  # resizing one side alone tells every pair apart
    matched = [load(source, reduced_to=16) for source in (low, high)]
    ratio = sharpness(read_all(matched[0])) / sharpness(read_all(matched[1]))
    assert abs(ratio - 1).max() < 0.02  # 0.005 seen: block means are not quite Pillow's filters
    assert [images.reduced_to for images in matched] == [16, 16]


def test_images_go_the_same_way_from_every_kind_of_source(tmp_path):
    pictures = write_mnist(tmp_path, "MNIST", count=8)["test"]
    np.save(tmp_path / "array.npy", pictures)
    write_files(tmp_path / "files", pictures)
    (tmp_path / "list.txt").write_text("\n".join(f"files/{i:02}.png" for i in range(len(pictures))))
    for reduced_to in (28, 20, 14):
        expected = read_all(load("MNIST", data_root=tmp_path, reduced_to=reduced_to))
        small = torch.stack([chw(crop(Image.fromarray(picture), reduced_to)) for picture in pictures])
        assert torch.equal(expected, resize_bilinear(small, 32))
        for source in ("array.npy", "files", "list.txt"):
            made = read_all(load(tmp_path / source, reduced_to=reduced_to))
            assert (made.int() - expected.int()).abs().max() <= 1  # resizing one image or all at once may round apart
        assert torch.equal(
            read_all(load("MNIST", data_root=tmp_path, reduced_to=reduced_to, num_channels=1)), expected[:, :1]
        )


def test_colour_sets_are_matched_too(tmp_path, monkeypatch):
    pixels = write_cifar(tmp_path, "CIFAR10", monkeypatch)["test"]
    images = load("CIFAR10", data_root=tmp_path, reduced_to=28)
    cropped = torch.stack([chw(crop(Image.fromarray(image.transpose(1, 2, 0)), 28)) for image in pixels])
    assert torch.equal(read_all(images), resize_bilinear(cropped, 32))
    assert (images.source_size, images.reduced_to) == (32, 28)


def test_squeezed_images_are_matched_squeezed(tmp_path):
    picture = noise_picture(0, (70, 50))
    write_files(tmp_path / "p", [np.array(picture)])
    small = chw(picture.resize((20, 20), Image.Resampling.BICUBIC))
    expected = resize_bilinear(small[None], 32)
    assert torch.equal(read_all(load(tmp_path / "p", center_crop=False, reduced_to=20)), expected)


def test_native_resolution_is_the_smallest_edge_of_a_used_image(memory, tmp_path):
    for index, size in enumerate([(60, 90), (50, 41), (300, 45), (9, 9)]):
        save(tmp_path / f"{index}.png", index, size)
    Image.fromarray(RAMP[:4, :4].astype(np.float32)).save(tmp_path / "1a.tiff")  # unusable
    assert load(tmp_path, max_images=3).source_size == 41
    assert load(tmp_path).source_size == 9
    save(tmp_path / "CelebA" / "0.png", 0, (178, 218))
    assert load("CelebA", data_root=tmp_path).source_size == 140  # its cut
    assert load("CelebA", data_root=tmp_path, center_crop=False).source_size == 178


def test_what_images_went_through_is_in_their_fingerprint(memory, folder):
    assert len({load(folder, reduced_to=reduced_to).fingerprint for reduced_to in (None, 20, 21)}) == 3


# ---------------------------------------------------------------------------------------------- resizing and ranges


@pytest.mark.parametrize(("before", "after", "tolerance"), [(28, 32, 0), (28, 16, 1), (32, 20, 1), (32, 64, 1)])
def test_resize_is_pillows(before, after, tolerance):
    pixels = np.random.default_rng(1).integers(0, 256, (300, before, before), dtype=np.uint8)
    pixels[:50] = np.where(pixels[:50] > 127, 255, 0)  # hard edges, where rounding and clipping show
    size = (after, after)
    expected = np.stack([np.array(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)) for image in pixels])
    made = resize_bilinear(torch.from_numpy(pixels)[:, None], after)[:, 0]
    assert (made.int() - torch.from_numpy(expected).int()).abs().max() <= tolerance


def test_ranges():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    plain, centred = to_model_range(levels, False), to_model_range(levels, True)
    assert torch.equal(plain, levels.float() / 255)
    assert torch.equal(centred, plain * 2 - 1)
    assert torch.equal(to_model_range(plain, True), centred)
    assert plain.max() == 1  # the input is left as it was
    assert torch.equal(to_data_range(plain, False), plain)
    torch.testing.assert_close(to_data_range(centred, True), plain, rtol=0, atol=1e-7)
    assert to_data_range(torch.tensor([3.0]), True) == 2  # not clipped


def test_dequantize():
    levels = torch.arange(256).repeat(200, 1).float() / 255
    made = dequantize(levels, torch.Generator().manual_seed(0))
    u = made.double() * 256 - torch.arange(256)
    assert u.min() > -1e-4  # float32 rounding at 256
    assert u.max() < 1 + 1e-4
    assert abs(u.mean() - 0.5) < 0.01  # 51,200 draws: 0.0013 is one standard error
    assert abs(u.var() - 1 / 12) < 0.002


# ----------------------------------------------------------------------------------------------------------- feeds


def numbered(count, shape=(3, 4, 4)):
    """A set whose image i is filled with i, its left half with i + 100."""
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, *shape)
    pixels[..., : shape[-1] // 2] += 100
    return image_sets.ImageSet("numbered", count, shape, image_sets.InMemory(pixels))


def feed(images, batch_size=4, **options):
    plain = {"seed": 7, "device": "cpu", "random_flip": False, "uniform_dequantization": False, "centered": False}
    return TrainingBatches(images, batch_size, **{**plain, **options})


def numbers(batch):
    """The numbers of the images in a batch, mirrored or not."""
    return (batch.amin((1, 2, 3)) * 255).round().int().tolist()


def test_an_epoch_sees_every_image_once_and_drops_the_rest():
    batches = feed(numbered(11))
    epochs = [
        [number for turn in range(2) for number in numbers(batches.batch(2 * epoch + turn))] for epoch in range(40)
    ]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 40  # a fresh order each
    assert {number for epoch in epochs for number in epoch} == set(range(11))  # nothing is dropped for good


def test_a_batch_is_a_function_of_seed_and_step():
    options = {"random_flip": True, "uniform_dequantization": True}
    before = torch.get_rng_state()
    straight = feed(numbered(11), **options)
    expected = [straight.batch(step) for step in range(12)]
    jumping = feed(numbered(11), **options)
    for step in [9, 2, 2, 11, 0, 5]:
        assert torch.equal(jumping.batch(step), expected[step])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(feed(numbered(11), seed=8, **options).batch(0), expected[0])


def test_flips_mirror_half_the_images():
    batches = feed(numbered(50), batch_size=50, random_flip=True)
    mirrored = 0
    for step in range(40):
        batch = batches.batch(step)
        level = batch.amin((1, 2, 3)).view(-1, 1, 1, 1)
        left, right = (batch[..., :2] > level).flatten(1), (batch[..., 2:] > level).flatten(1)
        assert (left.all(1) ^ right.all(1)).all()  # one half is brighter, and wholly
        assert (left.any(1) == left.all(1)).all()
        mirrored += right.all(1).sum().item()
    assert abs(mirrored - 1000) < 4.5 * 500**0.5  # 2000 draws of probability 1/2: 4.5 standard deviations
    assert torch.equal(feed(numbered(3), 3).batch(0)[..., :2] > 0.35, torch.ones(3, 3, 4, 2, dtype=torch.bool))


def test_training_ranges():
    plain = feed(numbered(11)).batch(3)
    assert plain.dtype == torch.float32
    assert plain.is_contiguous()
    assert torch.equal(feed(numbered(11), centered=True).batch(3), plain * 2 - 1)
    spread = feed(numbered(11), uniform_dequantization=True).batch(3) - plain * 255 / 256
    assert -1e-6 < spread.min() < spread.max() < 1 / 256 + 1e-6
    assert spread.std() > 0.2 / 256
    centred = feed(numbered(11), uniform_dequantization=True, centered=True).batch(3)
    torch.testing.assert_close(centred, (plain * 255 / 256 + spread) * 2 - 1, rtol=0, atol=1e-6)


def test_grey_sets_feed_equal_channels(tmp_path):
    write_mnist(tmp_path, "MNIST")
    batch = feed(load("MNIST", data_root=tmp_path), random_flip=True).batch(1)
    assert batch.shape == (4, 3, 32, 32)
    assert batch.is_contiguous()
    assert torch.equal(batch[:, 0], batch[:, 1])
    assert torch.equal(batch[:, 0], batch[:, 2])


def test_decoding_ahead_gives_the_same_batches(folder, monkeypatch):
    kept = feed(load(folder), batch_size=3, random_flip=True)
    monkeypatch.setattr(image_sets, "IN_MEMORY_BYTES", 0)
    decoded = feed(load(folder), batch_size=3, random_flip=True)
    for step in [0, 1, 2, 9, 10, 4, 4, 0]:
        assert torch.equal(kept.batch(step), decoded.batch(step))
        assert sorted(decoded._ahead) == [step + 1, step + 2, step + 3]  # and no more wait in memory


def test_batches_under_way_are_given_up_with_the_feed(folder, on_demand):
    batches = feed(load(folder), batch_size=3)
    batches.batch(0)
    ahead = batches._ahead
    assert len(ahead) == 3
    del batches
    assert ahead == {}


@pytest.mark.parametrize("size", [0, 12])
def test_a_batch_that_cannot_be_filled(size):
    message = f"a batch of {size} cannot be taken from the 11 images of 'numbered'; choose a batch size from 1 to 11"
    with pytest.raises(UserError, match=message):
        feed(numbered(11), size)


def test_in_order():
    images = numbered(11)
    batches = list(in_order(images, 4, "cpu", centered=True))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert torch.equal(torch.cat(batches), to_model_range(read_all(images), True))


# -------------------------------------------------------------------------------------------------- what is shipped


@pytest.mark.parametrize("name", ["fashion_mnist", "mnist"])
def test_the_demo_images_load(name):
    images = load(ROOT / "demo" / f"{name}.npz")
    assert (images.name, len(images), images.shape) == (name, 256, (3, 32, 32))
    pixels = read_all(images).float()
    assert pixels[:, :, 0].mean() < 20  # drawn on black
    assert 20 < pixels.mean() < 100
