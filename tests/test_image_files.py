"""Sets of image files: every format; whatever cannot be used is named, and changes nothing for the others."""

import numpy as np
import pytest
import torch
from picture_files import chw, cropped, feed, load, noise_picture, read_all, save
from PIL import Image

from basics import image_files
from basics.console import UserError
from basics.pixels import crop


@pytest.fixture
def opened(monkeypatch):
    """The files that were read, in the order in which that began."""
    names, read = [], image_files.read_file
    monkeypatch.setattr(image_files, "read_file", lambda path: names.append(path.name) or read(path))
    return names


# -------------------------------------------------------------------------------------------------------------- formats

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


def test_without_the_crop_pictures_are_resized(tmp_path):
    save(tmp_path / "p" / "x.png", 0, (70, 50))
    expected = chw(noise_picture(0, (70, 50)).resize((32, 32), Image.Resampling.BICUBIC))
    assert torch.equal(load(tmp_path / "p", center_crop=False).read(0, 1)[0], expected)


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


@pytest.mark.parametrize(("most", "factor"), [(4095, 16), (255, 257)])
def test_dark_16_bit_images_are_warned_of(most, factor, tmp_path, capsys):
    for index in range(3):
        values = np.random.default_rng(index).integers(0, most, (32, 32), dtype=np.uint16)
        values[0, 0] = most
        Image.fromarray(values).save(tmp_path / f"{index}.png")
    save(tmp_path / "plain.png")
    load(tmp_path)
    warnings = capsys.readouterr().err
    assert f"no pixel of the 3 images of 16 bits is above {most} of 65535" in warnings
    assert f"multiply the values by {factor}\n" in warnings
    Image.fromarray(np.full((32, 32), 4096, np.uint16)).save(tmp_path / "bright.png")
    load(tmp_path)
    warnings = capsys.readouterr().err
    assert f"no pixel of 3 of the 4 images of 16 bits is above {most} of 65535, so they come out nearly" in warnings
    for index in range(3):
        (tmp_path / f"{index}.png").unlink()
    load(tmp_path)
    assert "16 bits" not in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- files that cannot be used


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


def test_a_file_that_vanishes_later(folder, on_demand):
    images = load(folder)
    (folder / "b.png").unlink()
    with pytest.raises(UserError, match=r"b\.png can no longer be read"):
        read_all(images)


def test_a_file_edited_in_place_is_noticed(tmp_path, on_demand):
    for index in range(2):
        save(tmp_path / "p" / f"{index}.bmp", index)
    images = load(tmp_path / "p")
    save(tmp_path / "p" / "1.bmp", 50)  # as many bytes
    assert torch.equal(images.read(0, 1), cropped(0))
    with pytest.raises(UserError, match=r"1\.bmp was changed while it was in use; run the same command again"):
        images.read(1, 2)


# ------------------------------------------------------------------------------------------------- which files are read


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


def test_files_are_read_once_for_both_check_and_fingerprint_and_then_what_is_asked_for(folder, on_demand, opened):
    images = load(folder)
    assert images.fingerprint.startswith("7:")
    assert len(opened) == 7
    opened.clear()
    images.read(2, 4)
    assert sorted(opened) == ["b.png", "c.PNG"]


# -------------------------------------------------------------------------------------- worker threads, unchecked files


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


def test_training_starts_without_decoding_a_large_set(folder, on_demand, opened):
    images = load(folder, check=False)
    assert opened == []
    assert (len(images), images.skipped) == (7, [])
    assert torch.equal(read_all(images), read_all(load(folder)))


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
