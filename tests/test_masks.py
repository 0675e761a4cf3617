"""Masks: equal to the published ones, one clear line for what cannot be made, and users' own files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import masks
from basics.console import UserError

GOLDEN = np.load(Path(__file__).parent / "golden" / "masks.npz")
OWN = np.kron(np.eye(4), np.ones((8, 8)))  # (32, 32) of 0 and 1: known blocks on the diagonal


def golden(name):
    return torch.from_numpy(GOLDEN[name]).float()[None, None]


# --------------------------------------------------------------------------------------------------- golden masks


def test_center_is_the_published_one():
    assert torch.equal(masks.make_mask("center", 32, rep=3), golden("center_32"))


@pytest.mark.parametrize("blocks", [4, 8, 16])
def test_checkerboards_are_the_published_ones(blocks):
    fixed = golden(f"checkerboard_32_blocks{blocks}")
    for rep in range(4):
        assert torch.equal(masks.make_mask("checkerboard", 32, rep, num_blocks=blocks), fixed)
        expected = golden(f"checkerboard_alt_32_blocks{blocks}_offset{rep % 2}")
        assert torch.equal(masks.make_mask("checkerboard_alt", 32, rep, num_blocks=blocks), expected)


@pytest.mark.parametrize(("patch", "ratio"), [(4, 0.5), (8, 0.3), (2, 0.75)])
def test_random_is_the_published_one_for_the_same_permutation(patch, ratio):
    permutation = np.random.RandomState(7).permutation((32 // patch) ** 2)
    mask = masks.random_mask_from_permutation(permutation, 32, patch, ratio)
    assert torch.equal(mask, golden(f"random_32_patch{patch}_ratio{ratio}_npseed7"))


def test_every_golden_mask_was_compared():
    assert len(GOLDEN.files) == 1 + 3 * 3 + 3


# ---------------------------------------------------------------------------------------------------- own draws


def test_random_draws_from_the_generator_alone():
    def draw(seed):
        return masks.make_mask("random", 32, 0, patch_size=4, ratio=0.3, generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("ratio", "known"), [(0.3, 20), (0.5, 32), (1 / 64, 1), (1e-9, 1), (1.0, 64)])
def test_ratio_is_the_share_of_known_cells_rounded_up(ratio, known):
    mask = masks.make_mask("random", 32, 0, patch_size=4, ratio=ratio, generator=torch.Generator())
    assert mask.sum() == known * 16
    cells = mask.view(8, 4, 8, 4)
    assert torch.equal(cells.amin((1, 3)), cells.amax((1, 3)))  # whole cells


@pytest.mark.parametrize("size", [2, 5, 30, 64])
def test_shape_type_and_both_values(size):
    blocks = next(n for n in range(2, size + 1) if size % n == 0)
    options = {"num_blocks": blocks, "patch_size": 1, "generator": torch.Generator()}
    for kind in ["center", "checkerboard", "checkerboard_alt", "random"]:
        mask = masks.make_mask(kind, size, 1, **options)
        assert mask.shape == (1, 1, size, size)
        assert mask.dtype == torch.float32
        assert sorted(mask.unique().tolist()) == [0, 1]


# ------------------------------------------------------------------------------------------------ users' mistakes


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("checkerbord", {}, "choose one of: center, checkerboard, checkerboard_alt, random, none, file"),
        ("checkerboard", {"num_blocks": 5}, "--mask_num_blocks is 5.*use 2, 4, 8, 16, 32"),
        ("checkerboard_alt", {"num_blocks": 1}, "use 2, 4, 8, 16, 32"),
        ("checkerboard", {"num_blocks": 0}, "use 2, 4"),
        ("checkerboard", {"num_blocks": -4}, "use 2, 4"),
        ("random", {"patch_size": 3}, "--mask_patch_size is 3.*use 1, 2, 4, 8, 16, 32"),
        ("random", {"patch_size": 0}, "use 1, 2, 4"),
        ("random", {"ratio": 0}, "--mask_ratio is 0"),
        ("random", {"ratio": 1.01}, "--mask_ratio"),
        ("random", {"ratio": float("nan")}, "--mask_ratio"),
        ("file", {}, "--mask_file_path"),
    ],
)
def test_options_that_do_not_fit(kind, options, message):
    with pytest.raises(UserError, match=message):
        masks.make_mask(kind, 32, 0, generator=torch.Generator(), **options)


def test_random_without_a_generator_is_a_bug():
    with pytest.raises(ValueError, match="generator"):
        masks.make_mask("random", 32, 0)


# ---------------------------------------------------------------------------------------------------------- names


def test_names_are_the_published_ones():
    assert masks.mask_name("center", 8, 4, 0.5) == "center"
    assert masks.mask_name("checkerboard", 8, 4, 0.5) == "checkerboard_blocks8"
    assert masks.mask_name("checkerboard_alt", 8, 4, 0.5) == "checkerboard_alt_blocks8"
    assert masks.mask_name("random", 8, 4, 0.5) == "random_patch4_ratio0.5"
    assert masks.mask_name("random", 8, 4, 0.5, identifier="b") == "random_patch4_ratio0.5_b"
    assert masks.mask_name("file", file_path="some/where/ring.png") == "file_ring"
    assert masks.mask_name("file", file_path="some/where/ring.png", identifier="mine") == "file_mine"


def test_names_cover_every_type():
    for kind in masks.MASK_TYPES:
        assert masks.mask_name(kind, file_path="a.png").startswith(kind)


def test_names_that_cannot_be():
    with pytest.raises(UserError, match="choose one of"):
        masks.mask_name("hexagon")
    with pytest.raises(UserError, match="--mask_file_path"):
        masks.mask_name("file")
    with pytest.raises(UserError, match="slashes"):
        masks.mask_name("center", identifier="../elsewhere")


# --------------------------------------------------------------------------------------------- a user's own mask


def _save_picture(path, mode):
    Image.fromarray((OWN * 255).astype(np.uint8)).convert(mode).save(path)


def _save_transparent(path, colour, alpha):
    """Known where `alpha` says so, whatever `colour` lies under it; the other way round where that is the mask."""
    Image.merge("LA", [Image.fromarray((part * 255).astype(np.uint8)) for part in (colour, alpha)]).save(path)


def _save_turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    Image.fromarray((np.rot90(OWN) * 255).astype(np.uint8)).save(path, exif=exif)


WRITERS = {
    "hidden_white.png": lambda path: _save_transparent(path, np.ones_like(OWN), OWN),
    "all_opaque.png": lambda path: _save_transparent(path, OWN, np.ones_like(OWN)),
    "both.png": lambda path: _save_transparent(path, np.maximum(OWN, np.tri(32)), np.maximum(OWN, 1 - np.tri(32))),
    "palette_transparent.png": lambda path: (
        Image.fromarray((OWN).astype(np.uint8))
        .convert("P")
        .point(lambda level: 255 - level)
        .save(path, transparency=255)
    ),
    "turned.png": _save_turned,
    "no ending": lambda path: Image.fromarray((OWN * 255).astype(np.uint8)).save(path, "PNG"),
    "float.tiff": lambda path: Image.fromarray(OWN.astype(np.float32)).save(path),
    "grey.png": lambda path: _save_picture(path, "L"),
    "colour.bmp": lambda path: _save_picture(path, "RGB"),
    "one_bit.png": lambda path: _save_picture(path, "1"),
    "palette.gif": lambda path: _save_picture(path, "P"),
    "alpha.PNG": lambda path: _save_picture(path, "LA"),
    "lossy.jpg": lambda path: _save_picture(path, "L"),
    "deep.png": lambda path: Image.fromarray((OWN * 65535).astype(np.uint16)).save(path),
    "dim_16_bit.png": lambda path: Image.fromarray((OWN * 32896 + 200).astype(np.uint16)).save(
        path
    ),  # clipping: all white
    "plain.npy": lambda path: np.save(path, OWN),
    "bool.npy": lambda path: np.save(path, OWN.astype(bool)),
    "one.npz": lambda path: np.savez_compressed(path, mask=OWN.astype(np.uint8)[None]),
    "gradient.pt": lambda path: torch.save(torch.from_numpy(OWN).float().requires_grad_(), path),
    "four.pt": lambda path: torch.save(torch.from_numpy(OWN)[None, None], path),
    "channels.pth": lambda path: torch.save(torch.from_numpy(OWN).float().expand(3, 32, 32), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_mask_file_of_any_kind(name, tmp_path):
    WRITERS[name](tmp_path / name)
    mask = masks.load_mask_file(tmp_path / name, 32)
    assert mask.dtype == torch.float32
    assert torch.equal(mask, torch.from_numpy(OWN).float()[None, None])
    assert masks.make_mask("file", 32, 5, file_mask=mask) is mask


class _Evil:
    def __reduce__(self):
        return (print, ("ran",))


def _save_bomb(path):
    """A small file that claims to unpack to 4.3 GB: it is not unpacked to find out."""
    np.savez_compressed(path, OWN)
    _claim(path, 2**32 - 2)


def _claim(path, size):
    """Writes into a zip file of one member that it has `size` bytes, where the central directory says so."""
    content = path.read_bytes()
    place = content.index(b"PK\x01\x02") + 24  # uncompressed size, 4 bytes
    path.write_bytes(content[:place] + size.to_bytes(4, "little") + content[place + 4 :])


def _save_huge_tensor(path):
    torch.save(torch.from_numpy(OWN), path)
    _claim(path, 3 * 10**9)


def _save_cut_off(path):
    np.save(path, OWN)
    path.write_bytes(path.read_bytes()[:-100])


def _claim_much(path):
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**6)})


BAD = {
    "zero_one.png": (
        lambda path: Image.fromarray(OWN.astype(np.uint8)).save(path),
        "no white pixel: its values go up to 1 of 255; .*multiply the values by 255",
    ),
    "zero_one_16_bit.png": (
        lambda path: Image.fromarray(OWN.astype(np.uint16)).save(path),
        "multiply the values by 65535",
    ),
    "bytes_16_bit.png": (
        lambda path: Image.fromarray((OWN * 255).astype(np.uint16)).save(path),
        "up to 255 of 65535; .*multiply the values by 257",
    ),
    "huge.png": (lambda path: Image.new("L", (9000, 9000)).save(path), "size 9000x9000"),
    "bomb.npz": (_save_bomb, "cannot be read .*unpacks to 4.3 GB"),
    "huge.pth": (_save_huge_tensor, "unpacks to 3.0 GB"),
    "cut.npy": (_save_cut_off, "does not hold the bytes that its header claims"),
    "claims.npy": (_claim_much, "does not hold the bytes that its header claims"),
    "grey_floats.tiff": (lambda path: Image.fromarray((OWN / 2).astype(np.float32)).save(path), "other than 0"),
    "size.npy": (lambda path: np.save(path, OWN[:16]), "size 16x32; the images are of 32x32"),
    "flat.npy": (lambda path: np.save(path, OWN.ravel()), "size 1024"),
    "size.png": (lambda path: Image.new("L", (16, 16)).save(path), "size 16x16"),
    "grey.npy": (lambda path: np.save(path, OWN * 0.5), "other than 0"),
    "bytes.npy": (lambda path: np.save(path, OWN * 255), "other than 0"),
    "nan.npy": (lambda path: np.save(path, OWN * np.nan), "other than 0"),
    "channels.npy": (lambda path: np.save(path, np.stack([OWN, 1 - OWN])), "between channels"),
    "black.png": (lambda path: Image.new("L", (32, 32), 0).save(path), "no pixel is known"),
    "white.png": (lambda path: Image.new("L", (32, 32), 255).save(path), "no pixel is to be filled"),
    "two.npz": (lambda path: np.savez(path, a=OWN, b=OWN), "holds 2 arrays"),
    "list.pt": (lambda path: torch.save([1, 2], path), "holds a list"),
    "sparse.pt": (lambda path: torch.save(torch.from_numpy(OWN).to_sparse(), path), "a tensor of another kind; write"),
    "csr.pt": (lambda path: torch.save(torch.from_numpy(OWN).to_sparse_csr(), path), "a tensor of another kind; write"),
    "meta.pt": (lambda path: torch.save(torch.empty(32, 32, device="meta"), path), "a tensor of another kind; write"),
    "quantised.pt": (
        lambda path: torch.save(torch.quantize_per_tensor(torch.from_numpy(OWN).float(), 1.0, 0, torch.quint8), path),
        "a tensor of another kind; write",
    ),
    "expanded.pt": (
        lambda path: torch.save(torch.zeros(1).expand(10**5, 10**5, 8, 8), path),
        "holds a tensor of 640,000,000,000 numbers; a mask is",
    ),
    "expanded_mask.pth": (
        lambda path: torch.save(torch.from_numpy(OWN).expand(10**6, 10**3, 32, 32), path),
        "holds a tensor of 1,024,00",
    ),
    "complex.pt": (lambda path: torch.save(torch.from_numpy(OWN) * 2j, path), "other than 0"),
    "half_bytes.pt": (lambda path: torch.save(torch.zeros(32, 32).to(torch.float8_e5m2), path), "mask file"),
    "code.pt": (lambda path: torch.save(_Evil(), path), "cannot be read"),
    "objects.npy": (lambda path: np.save(path, np.array([_Evil()]), allow_pickle=True), "cannot be read"),
    "text.npy": (lambda path: np.save(path, np.array([["a"]])), "cannot be read"),
    "broken.npz": (lambda path: path.write_bytes(b"PK nothing"), "cannot be read"),
    "broken.pth": (lambda path: path.write_bytes(b"nothing"), "cannot be read"),
    "broken.png": (lambda path: path.write_bytes(b"nothing"), "cannot be read"),
    "none.png": (lambda path: None, "there is no mask file"),
}


def test_a_mask_file_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "own.npy", OWN)
    assert masks.load_mask_file("~/own.npy", 32).mean() == 0.25


@pytest.mark.parametrize("name", BAD)
def test_mask_files_that_cannot_be_used(name, tmp_path, capsys):
    write, message = BAD[name]
    write(tmp_path / name)
    with pytest.raises(UserError, match=message) as caught:
        masks.load_mask_file(tmp_path / name, 32)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "ran" not in capsys.readouterr().out  # no pickled code was run
