"""Pixels: crop, resize and ranges equal to the published crop, to Pillow and to closed forms."""

from pathlib import Path

import numpy as np
import pytest
import torch
from picture_files import load
from PIL import Image

from basics.pixels import crop, dequantize, resize_bilinear, to_data_range, to_model_range

GOLDEN = np.load(Path(__file__).parent / "golden" / "center_crop.npz")
CROPS = [name[: -len("_in")] for name in GOLDEN.files if name.endswith("_in")]


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
