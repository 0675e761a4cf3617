"""Sets of images in arrays: every way to write them; what is no image, or may be two things, is refused."""

import numpy as np
import pytest
import torch
from picture_files import load, noise_values, read_all, save_array
from PIL import Image

from basics import image_arrays
from basics.console import UserError
from basics.pixels import crop


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


def test_images_of_zeros_and_ones_are_warned_of(tmp_path, capsys):
    values = noise_values((5, 32, 32), most=1)
    for name, content in {"ones": values, "levels": 255 * values, "truths": values > 0, "black": 0 * values}.items():
        load(save_array(tmp_path / f"{name}.npy", content))
        assert ("multiply the values by 255" in capsys.readouterr().err) == (name == "ones")


def test_an_array_edited_in_place_is_noticed(tmp_path, on_demand):
    images = load(save_array(tmp_path / "p.npy", noise_values((3, 40, 33, 3))))
    assert images.fingerprint.startswith("3:")
    values = np.load(tmp_path / "p.npy", mmap_mode="r+")
    values[1, 0, 0, 0] ^= 1
    values.flush()
    images.read(0, 1)
    with pytest.raises(UserError, match=r"image 1 of .*p\.npy was changed while it was in use"):
        images.read(1, 2)


# -------------------------------------------------------------------------------------------------------------- refused

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
