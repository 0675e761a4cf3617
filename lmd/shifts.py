"""Made-up foreign images from in-domain ones: what a detector does not see shows without one foreign image.

Every draw is keyed by the image's own key (`noise.content_keys`), and pixels are computed in integers, so the shifted
image is the same to the bit whatever the batch, the order and the device.  Images are (B, C, H, H) uint8 with H >= 8.
"""

import math

import torch

from basics import noise
from basics.console import UserError, choose

_NOISE = 0.1  # standard deviation, of the pixels' range
_BLUR = 1.0  # standard deviation in pixels
_LEVELS = 1 << 16  # noise levels and kernel weights are multiples of 1/65536
SMALLEST = 8  # pixels an edge
PAIRED = frozenset({"halves", "patch"})  # made of two images each


def make(name, images, keys, partners=None):
    """One shifted version of each image.

    Args:
        name: one of `SHIFTS`.
        images: (B, C, H, H) uint8, H >= 8; they are left as they are.
        keys: (B,) int64, the images' `noise.content_keys`.
        partners: like `images`, for each the other image that `halves` and `patch` take from; the choice of
            `partner_positions` depends on neither batch nor order.

    Returns:
        Tensor: (B, C, H, H) uint8, on the images' device.

    Raises:
        UserError: there is no shift of that name; the message lists them.
        ValueError: images of another type or shape, or a shift of two images without partners.
    """
    shift, _ = choose(name, SHIFTS, "made-up shift")
    edge = images.shape[-1]
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-2] != edge or edge < SMALLEST:
        raise ValueError(f"images are (B, C, H, H) uint8, H >= {SMALLEST}, not {images.dtype} of {tuple(images.shape)}")
    if len(keys) != len(images):
        raise ValueError(f"{len(keys)} keys for {len(images)} images")
    if name in PAIRED and (partners is None or partners.shape != images.shape):
        raise ValueError(f"'{name}' is made of two images each: partners of the images' shape are needed")
    own = noise.image_keys(f"shift {name}", keys, [0]).to(images.device)  # (B,), others for every shift
    return shift(images, own, partners).contiguous()


def check_size(images, remedy):
    """Refuses an `ImageSet` of which no foreign images can be made up.

    Raises:
        UserError: its images are too small; says what to do, the `remedy`.
    """
    if images.shape[-1] < SMALLEST:
        raise UserError(f"foreign images are made up of images of {SMALLEST} pixels at least; {remedy}")


def change_of(name, images, keys):
    """For `Measurement.change`: what makes the shifted version of a set's images.

    Args:
        name: one of `SHIFTS`.
        images: an `ImageSet`.
        keys: (N,) int64, the `noise.content_keys` of all of them.
    """
    partners = partner_positions(keys)

    def change(pixels, indices):
        others = images.take(partners[indices]) if name in PAIRED else None
        return make(name, pixels, keys[indices], others)

    return change


def partner_positions(keys):
    """For each image another one of the set, by content alone: that with the next larger key, the first after the last.

    Args:
        keys: (N,) int64, the `noise.content_keys` of the whole set of images, not of one batch.

    Returns:
        Tensor: (N,) int64 positions among the keys; an image's own where all images are equal.
    """
    distinct, inverse = keys.unique(return_inverse=True)  # ascending
    first = torch.empty_like(distinct).scatter_reduce_(
        0, inverse, torch.arange(len(keys), device=keys.device), "amin", include_self=False
    )
    return first[(inverse + 1) % len(distinct)]


# ------------------------------------------------------------------------------------------------------- pixels


def noisy(images, keys, partners=None):
    """Gaussian noise with a standard deviation of a tenth of the range, clipped to it."""
    quantiles = (torch.arange(_LEVELS, dtype=torch.float64) + 0.5) / _LEVELS
    levels = (255 * _NOISE * torch.special.ndtri(quantiles)).round().to(images.device, torch.int16)  # up to 4.3 std
    draws = levels[_draws(keys, images.shape[1:].numel(), _LEVELS)].view_as(images)
    return (images + draws).clamp_(0, 255).to(torch.uint8)


def blurred(images, keys, partners=None):
    """A Gaussian blur of one pixel, cut off at four, edges repeated."""
    reach = math.ceil(4 * _BLUR)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / _BLUR) ** 2)
    weights = (_LEVELS * kernel / kernel.sum()).round().long().tolist()  # in all _LEVELS: a flat image stays as it is
    sums, edge = images.long(), images.shape[-1]
    near = torch.arange(edge, device=images.device)
    for axis in (-1, -2):
        shifted = [sums.index_select(axis, (near + k - reach).clamp(0, edge - 1)) for k in range(2 * reach + 1)]
        sums = sum(weight * part for weight, part in zip(weights, shifted, strict=True))
    return ((sums + _LEVELS**2 // 2) // _LEVELS**2).to(torch.uint8)


def faint(images, keys, partners=None):
    """Half the contrast: each pixel half-way to the image's mean over all its pixels and channels, rounded."""
    values = images.long()
    count, total = images.shape[1:].numel(), values.sum(dim=(1, 2, 3), keepdim=True)
    return ((values * count + total + count) // (2 * count)).to(torch.uint8)


def inverted(images, keys, partners=None):
    """The negative."""
    return 255 - images


# ------------------------------------------------------------------------------------------------------- places


def upside_down(images, keys, partners=None):
    """Rows in reverse order."""
    return images.flip(-2)


def turned(images, keys, partners=None):
    """Turned by 90 degrees, anticlockwise."""
    return images.rot90(1, (-2, -1))


def shuffled(images, keys, partners=None):
    """Patches of about 8 pixels in another order, never in the same.

    A patch has the edge nearest to 8 pixels that cuts the image into whole patches but for a rest of fewer pixels than
    there are patches an edge, which stays in place at the right and at the bottom; there are at least 2 x 2.
    """
    grid = max(2, round(images.shape[-1] / 8))
    patch = images.shape[-1] // grid
    cells = grid * grid
    order = noise.mix64(keys[:, None] + _counter(cells, keys.device)).argsort(dim=1)  # (B, cells)
    same = (order == torch.arange(cells, device=keys.device)).all(dim=1, keepdim=True)  # one of cells! draws
    order = torch.where(same, order.roll(1, dims=1), order)
    out, whole = images.clone(), slice(grid * patch)
    patches = images[..., whole, whole].unflatten(-1, (grid, patch)).unflatten(-3, (grid, patch))
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (B, cells, C, patch, patch)
    moved = patches[torch.arange(len(images), device=keys.device)[:, None], order].unflatten(1, (grid, grid))
    out[..., whole, whole] = moved.permute(0, 3, 1, 4, 2, 5).flatten(-2).flatten(-3, -2)
    return out


# ------------------------------------------------------------------------------------------------ other contents


def uniform(images, keys, partners=None):
    """Nothing of the image: independent pixels, every value as likely."""
    return _draws(keys, images.shape[1:].numel(), 256).view_as(images).to(torch.uint8)


def flat(images, keys, partners=None):
    """Nothing of the image: one grey level or colour, every one as likely."""
    colours = _draws(keys, images.shape[1], 256).to(torch.uint8)  # (B, C)
    return colours[:, :, None, None].expand_as(images)


def halves(images, keys, partners):
    """The left half of the image and the right half of its partner."""
    out, middle = images.clone(), images.shape[-1] // 2
    out[..., middle:] = partners[..., middle:]
    return out


def square(images, keys, partners=None):
    """A black square of `piece_edge` at a random place."""
    edge = piece_edge(images.shape[-1])
    rows, columns = _corners(images, keys, 0)
    return images.masked_fill(_window(images, rows, columns, edge), 0)


def patch(images, keys, partners):
    """A piece of the partner, of `piece_edge`, from a random place in it to another in the image."""
    edge = piece_edge(images.shape[-1])
    (rows, columns), (from_rows, from_columns) = _corners(images, keys, 0), _corners(images, keys, 1)
    along = torch.arange(images.shape[-1], device=keys.device)
    source_rows = (along + (from_rows - rows)[:, None]) % images.shape[-1]  # (B, H): in the window no wrap
    source_columns = (along + (from_columns - columns)[:, None]) % images.shape[-1]
    each = torch.arange(len(images), device=keys.device)[:, None, None]
    moved = partners[each, :, source_rows[:, :, None], source_columns[:, None, :]].permute(0, 3, 1, 2)  # (B, C, H, W)
    return torch.where(_window(images, rows, columns, edge), moved, images)


def piece_edge(size):
    """Pixels an edge of squares and pasted pieces: 10 in images of 28 to 32 pixels, in proportion outside of these."""
    return max(min(10, round(size * 10 / 28)), round(size * 10 / 32))


# -------------------------------------------------------------------------------------------------------- draws


def _draws(keys, count, choices):
    """(B, count) int64 in 0..choices-1, each as likely; `choices` is at most 65536."""
    words = noise.mix64(keys[:, None] + _counter(count, keys.device))  # (B, count)
    return (words.bitwise_right_shift(32) & 0xFFFFFFFF) * choices >> 32


def _counter(count, device):
    return torch.arange(1, count + 1, device=device) * noise.GOLDEN


def _corners(images, keys, pair):
    """Top rows (B,) and left columns (B,) of a piece inside the images; of the first or the second `pair` of draws."""
    places = images.shape[-1] - piece_edge(images.shape[-1]) + 1
    return _draws(keys, 4, places)[:, 2 * pair : 2 * pair + 2].unbind(1)


def _window(images, rows, columns, edge):
    """(B, 1, H, W) bool: the square with that top row and left column."""
    along = torch.arange(images.shape[-1], device=images.device)
    inside = [(along >= start[:, None]) & (along < start[:, None] + edge) for start in (rows, columns)]  # (B, H)
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]


SHIFTS = {  # name: (function, what the images are then)
    "noise": (noisy, "noisy"),
    "blur": (blurred, "blurred"),
    "contrast": (faint, "of half the contrast"),
    "inverted": (inverted, "inverted"),
    "upside_down": (upside_down, "upside down"),
    "turned": (turned, "turned by 90 degrees"),
    "shuffled": (shuffled, "cut into patches and shuffled"),
    "uniform": (uniform, "nothing but noise"),
    "flat": (flat, "of one colour"),
    "halves": (halves, "halves of two images"),
    "square": (square, "partly covered by a black square"),
    "patch": (patch, "with a piece of another image pasted in"),
}
