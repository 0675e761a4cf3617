"""Made-up foreign images: each is what its name says, keyed by the image alone, for all sizes and channels."""

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from basics import noise
from basics.console import UserError
from lmd import shifts

SIZES = [(1, 28), (3, 32), (1, 8), (3, 9), (1, 12), (3, 37), (1, 64)]  # channels, pixels an edge
MANY = 600  # images, where a distribution is looked at


def pictures(count, channels=1, size=28, seed=0):
    """Distinct images of every grey value, uint8, none of them symmetric."""
    generator = noise.generator("pictures", seed)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


def made(name, images, partners=None):
    """The shifted images; by default each one's partner is the image after it."""
    partners = images.roll(-1, 0) if partners is None else partners
    return shifts.make(name, images, noise.content_keys(images), partners)


def changed(images, out):
    """(B, H, W) bool: where any channel differs."""
    return (images != out).any(dim=1)


def boxes(inside):
    """Top, left, height and width of what is True in each of (B, H, W), which must be that rectangle in full."""
    rows, columns = inside.any(dim=2), inside.any(dim=1)
    heights, widths = rows.sum(1), columns.sum(1)
    assert (inside.sum(dim=(1, 2)) == heights * widths).all()
    return rows.byte().argmax(1), columns.byte().argmax(1), heights, widths


# --------------------------------------------------------------------------------------------------- all of them


def test_a_dozen_shifts_with_descriptions():
    assert len(shifts.SHIFTS) == 12
    assert shifts.SHIFTS.keys() > shifts.PAIRED
    assert len({description for _, description in shifts.SHIFTS.values()}) == 12


@pytest.mark.parametrize(("channels", "size"), SIZES)
@pytest.mark.parametrize("name", shifts.SHIFTS)
def test_same_image_same_shift(name, channels, size):
    """One at a time, in another order, or again: the same bits, of the same type and shape; the input stays."""
    images = pictures(7, channels, size)
    before, partners = images.clone(), images.roll(-1, 0)
    out = made(name, images)
    assert out.shape == images.shape
    assert out.dtype == torch.uint8
    assert out.is_contiguous()
    assert changed(images, out).flatten(1).any(dim=1).all(), "an image came back as it was"
    out_again = made(name, images)
    assert torch.equal(out, out_again)
    alone = torch.cat([made(name, images[i : i + 1], partners[i : i + 1]) for i in range(7)])
    assert torch.equal(out, alone)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    assert torch.equal(out[order], made(name, images[order], partners[order]))
    out.zero_()
    assert torch.equal(images, before)
    assert torch.equal(partners, before.roll(-1, 0)), "the partners were written to"
    assert made(name, images[:0], partners[:0]).shape == (0, channels, size, size)


def test_shifts_draw_independently_of_each_other():
    """The same image's square and pasted piece are at places of their own, and its noises differ."""
    images = pictures(MANY, size=32) | 1  # no black pixel
    black = boxes(made("square", images)[:, 0] == 0)[0].double()
    pasted = boxes(made("patch", images, torch.zeros_like(images))[:, 0] == 0)[0].double()
    assert abs(np.corrcoef(black, pasted)[0, 1]) < 4 / MANY**0.5
    middle = torch.full((1, 1, 32, 32), 128, dtype=torch.uint8)
    noises = [made(name, middle).double().flatten() for name in ("noise", "uniform")]
    assert abs(np.corrcoef(*noises)[0, 1]) < 4 / 32


# -------------------------------------------------------------------------------------------------- one by one


def test_noise_is_normal():
    """Around mid grey, where nothing is clipped: mean and spread within 4 standard errors, and the share by level."""
    images = pictures(40) // 64 + 126  # 126 to 129
    added = (made("noise", images).double() - images.double()).flatten().numpy()
    assert abs(added.mean()) < 4 * 25.5 / len(added) ** 0.5
    assert added.std() == pytest.approx((25.5**2 + 1 / 12) ** 0.5, rel=4 / (2 * len(added)) ** 0.5)  # + rounding
    edges = np.arange(-60, 61, 10) + 0.5
    expected = np.diff(stats.norm(0, 25.5).cdf(np.concatenate([[-np.inf], edges, [np.inf]]))) * len(added)
    found = np.histogram(added, np.concatenate([[-np.inf], edges, [np.inf]]))[0]
    assert stats.chisquare(found, expected).pvalue > 1e-3
    light = torch.full((1, 1, 32, 32), 250, dtype=torch.uint8)
    assert made("noise", light).max() == 255
    assert made("noise", light).min() > 100, "bright pixels wrapped round to dark ones"


def test_noise_pixels_are_independent():
    images = torch.cat([pictures(200, 3, 8), torch.full((1, 3, 8, 8), 128, dtype=torch.uint8)])
    images[:200] = images[:200] // 64 + 126
    added = (made("noise", images).double() - images.double())[:, :, :2, :2].flatten(1)
    between = np.corrcoef(added.T) - np.eye(12)
    assert np.abs(between).max() < 5 / 201**0.5  # 66 pairs


@pytest.mark.parametrize(("channels", "size"), SIZES)
def test_blur_is_scipys(channels, size):
    images = pictures(3, channels, size)
    expected = ndimage.gaussian_filter(images.double().numpy(), (0, 0, 1, 1), mode="nearest", truncate=4)
    error = np.abs(made("blur", images).double().numpy() - expected)
    assert error.max() < 0.5 + 0.02  # rounding, of the pixels and of the weights
    for level in (0, 77, 255):
        even = torch.full((1, channels, size, size), level, dtype=torch.uint8)
        assert torch.equal(made("blur", even), even)


def test_contrast_is_halved_about_the_mean():
    images = pictures(5, 3, 16)
    values = images.double()
    expected = (values + values.mean(dim=(1, 2, 3), keepdim=True)) / 2
    out = made("contrast", images).double()
    assert (out - expected).abs().max() <= 0.5
    assert (out.std(dim=(1, 2, 3)) / values.std(dim=(1, 2, 3))).sub(0.5).abs().max() < 0.01
    assert torch.equal(made("contrast", torch.full_like(images, 255)), torch.full_like(images, 255))


def test_inverted_upside_down_and_turned():
    image = torch.tensor([[0, 1, 2], [10, 11, 12], [20, 21, 255]], dtype=torch.uint8)
    image = image.repeat_interleave(3, 0).repeat_interleave(3, 1)[None, None]  # 9 x 9
    expected = {
        "inverted": [[255, 254, 253], [245, 244, 243], [235, 234, 0]],
        "upside_down": [[20, 21, 255], [10, 11, 12], [0, 1, 2]],
        "turned": [[2, 12, 255], [1, 11, 21], [0, 10, 20]],
    }
    for name, thumbnail in expected.items():
        assert made(name, image)[0, 0, ::3, ::3].tolist() == thumbnail


@pytest.mark.parametrize(
    ("size", "grid", "patch"), [(8, 2, 4), (9, 2, 4), (12, 2, 6), (16, 2, 8), (28, 4, 7), (32, 4, 8), (37, 5, 7)]
)
def test_shuffled_moves_whole_patches(size, grid, patch):
    """All patches are there once, not all in their places, in one order for all channels; the rest is as it was."""
    cells = torch.arange(grid * grid, dtype=torch.uint8).view(grid, grid)
    numbered = torch.full((size, size), 255, dtype=torch.uint8)
    numbered[: grid * patch, : grid * patch] = cells.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    images = numbered.expand(50, 3, size, size).clone()
    keys = torch.arange(50)
    out = shifts.make("shuffled", images, keys)
    rest = numbered == 255
    assert (out[..., rest] == 255).all()
    orders = out[:, :, : grid * patch : patch, : grid * patch : patch].flatten(2)  # (B, 3, cells)
    assert (orders == orders[:, :1]).all()
    assert (orders[:, 0].sort(dim=1).values == cells.flatten()).all()
    assert (orders[:, 0] != cells.flatten()).any(dim=1).all()
    assert len({tuple(order) for order in orders[:, 0].tolist()}) >= 15  # of 23 for 2 x 2
    within = pictures(50, 3, size)
    moved = shifts.make("shuffled", within, keys)
    for image, result, order in zip(within, moved, orders[:, 0].tolist(), strict=True):
        for place, source in enumerate(order):
            (row, column), (from_row, from_column) = divmod(place, grid), divmod(source, grid)
            at = lambda picture, r, c: picture[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
            assert torch.equal(at(result, row, column), at(image, from_row, from_column))


def test_shuffled_never_keeps_the_order():
    """Of 24 orders of 2 x 2 patches one changes nothing: 600 draws would hit it 25 times."""
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(MANY, -1, -1, -1)
    out = shifts.make("shuffled", images, torch.arange(MANY))
    assert changed(images, out).flatten(1).any(dim=1).all()


def test_uniform_has_every_value_as_often():
    values = made("uniform", pictures(40, 3, 16)).flatten()
    counts = torch.bincount(values.long(), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_flat_has_one_colour_an_image():
    images = pictures(MANY, 3, 8)
    out = made("flat", images)
    assert (out == out[..., :1, :1]).all()
    colours = out[..., 0, 0]  # (B, 3)
    counts = torch.bincount(colours.flatten().long() // 16, minlength=16)
    assert stats.chisquare(counts).pvalue > 1e-3
    assert np.abs(np.corrcoef(colours.double().T) - np.eye(3)).max() < 4 / MANY**0.5, "channels move together"


@pytest.mark.parametrize(("channels", "size"), SIZES)
def test_halves_of_two_images(channels, size):
    images, partners = pictures(4, channels, size), pictures(4, channels, size, seed=1)
    out, middle = made("halves", images, partners), size // 2
    assert torch.equal(out[..., :middle], images[..., :middle])
    assert torch.equal(out[..., middle:], partners[..., middle:])


@pytest.mark.parametrize(("size", "edge"), [(8, 3), (14, 5), (28, 10), (30, 10), (32, 10), (64, 20), (256, 80)])
def test_edge_of_squares_and_pieces(size, edge):
    assert shifts.piece_edge(size) == edge


@pytest.mark.parametrize(("channels", "size"), SIZES)
def test_square_is_black_and_anywhere(channels, size):
    images = pictures(MANY, channels, size) | 1  # no black pixel
    out = made("square", images)
    black, edge = changed(images, out), shifts.piece_edge(size)
    top, left, heights, widths = boxes(black)
    assert (heights == edge).all()
    assert (widths == edge).all()
    assert ((out == 0).all(dim=1) == black).all()
    for start in (top, left):
        counts = torch.bincount(start, minlength=size - edge + 1)
        assert len(counts) == size - edge + 1
        assert stats.chisquare(counts).pvalue > 1e-3
    assert abs(np.corrcoef(top, left)[0, 1]) < 4 / MANY**0.5


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 9), (1, 28), (3, 15)])
def test_patch_is_a_piece_of_the_partner(channels, size):
    """Partners of odd pixels, images of even ones: one window each, which is one of the partner's windows."""
    images, partners = pictures(MANY, channels, size) & 254, pictures(MANY, channels, size, seed=1) | 1
    out, edge = made("patch", images, partners), shifts.piece_edge(size)
    pasted = changed(images, out)
    top, left, heights, widths = boxes(pasted)
    assert (heights == edge).all()
    assert (widths == edge).all()
    windows = partners.unfold(2, edge, 1).unfold(3, edge, 1)  # (B, C, places, places, edge, edge)
    sources = []
    for i in range(MANY):
        piece = out[i, :, top[i] : top[i] + edge, left[i] : left[i] + edge]
        equal = (windows[i] == piece[:, None, None]).all(dim=-1).all(dim=-1).all(dim=0)  # (places, places)
        assert equal.sum() == 1
        sources.append(equal.nonzero()[0])
    sources = torch.stack(sources)
    for start in (top, left, *sources.unbind(1)):
        assert stats.chisquare(torch.bincount(start, minlength=size - edge + 1)).pvalue > 1e-3
    assert np.abs(np.corrcoef(torch.stack([top, left, *sources.unbind(1)])) - np.eye(4)).max() < 4.5 / MANY**0.5


# ------------------------------------------------------------------------------------------------------ partners


def test_partners_go_round_by_content():
    keys = torch.tensor([40, -7, 9, 40, 12])
    assert shifts.partner_positions(keys).tolist() == [1, 2, 4, 1, 0]
    assert shifts.partner_positions(torch.tensor([5, 5])).tolist() == [0, 0]
    assert shifts.partner_positions(torch.tensor([], dtype=torch.int64)).tolist() == []


def test_partners_do_not_depend_on_the_order():
    keys = noise.content_keys(pictures(50))
    positions, order = shifts.partner_positions(keys), torch.randperm(50, generator=noise.generator("order"))
    assert (positions != torch.arange(50)).all()
    assert sorted(positions.tolist()) == list(range(50))
    assert torch.equal(keys[order][shifts.partner_positions(keys[order])], keys[positions][order])


# ----------------------------------------------------------------------------------------------------- bad input


def test_unknown_shift_lists_the_choices():
    with pytest.raises(UserError, match=r"unknown made-up shift 'fog'; choose one of: noise, blur, .*, patch$"):
        made("fog", pictures(1))


@pytest.mark.parametrize(
    "images",
    [pictures(2).float(), pictures(2)[0], pictures(2)[..., :20], pictures(2, size=8)[..., :7, :7]],
    ids=["float", "one image", "not square", "too small"],
)
def test_images_of_another_kind(images):
    with pytest.raises(ValueError, match="images are"):
        shifts.make("noise", images, torch.arange(2))


@pytest.mark.parametrize("name", sorted(shifts.PAIRED))
def test_partners_are_needed(name):
    images = pictures(2)
    for partners in (None, images[:1]):
        with pytest.raises(ValueError, match="partners"):
            shifts.make(name, images, torch.arange(2), partners)
    with pytest.raises(ValueError, match="3 keys for 2 images"):
        shifts.make(name, images, torch.arange(3), images)
