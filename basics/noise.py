"""Keyed randomness: every draw is a pure function of what it is for.

Nothing here reads or moves the global generator.  A draw is named by a key such as
(seed, the image's own pixels, repetition, step, purpose), so a reconstruction is the same whatever
the image's folder, name or place in it, the batch size, the number of workers or GPUs, and wherever
a run was interrupted.

Bulk noise comes from SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014) evaluated as a counter-based generator in integer tensor operations,
followed by the Box-Muller transform: all rows of a batch at once, on the device they are for.
"""

import hashlib
import math

import numpy as np
import torch

SCHEME = "content"  # by what images' noise is keyed, for what must not mix with results of another noise

# SplitMix64's constants as signed 64-bit integers: tensors' products wrap to the same bits
GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio, odd
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_CPU_CHUNK = 1 << 17  # normals made at a time on a CPU: the passes over a chunk stay in the L2 cache

# What a draw of one integration step is for; part of its key, so the numbers must not change.
PURPOSES = {"prior": 0, "corrector": 1, "constrain": 2, "predictor": 3, "reconstrain": 4, "return": 5}
_MAX_PURPOSES = 1 << 16


def key(*words):
    """A 64-bit key, as a signed int, of any strings, ints, floats, bools and tuples of them: BLAKE2b of their text.

    NumPy's numbers and subclasses give the key of the plain value that they equal.

    Raises:
        TypeError: a word of another type, whose text may not tell its value.
    """
    text = repr(tuple(_plain(word) for word in words)).encode()
    return _number(hashlib.blake2b(text, digest_size=8))


def _plain(word):
    """A word of a key as Python's own type, whose `repr` is its value in full."""
    if isinstance(word, tuple):
        return tuple(_plain(part) for part in word)
    for kinds, plain in _PLAIN:
        if isinstance(word, kinds):
            return plain(word)
    raise TypeError(f"a key is made of text, numbers and tuples of them, not of {type(word).__name__}")


_PLAIN = [  # in this order: a bool is an int too
    (str, str.__str__),  # not str, which an enumeration may define anew
    ((bool, np.bool_), bool),
    ((int, np.integer), int),
    ((float, np.floating), float),
]


def _number(digest):
    """A 64-bit digest as a signed int."""
    return int.from_bytes(digest.digest(), "little", signed=True)


def generator(*words, device="cpu"):
    """A fresh torch.Generator seeded by `key(*words)`: for draws that are not per image."""
    return torch.Generator(device).manual_seed(key(*words) & (2**63 - 1))


def content_keys(images):
    """What tells images apart for their noise: a hash of each image's own pixels and shape.

    Args:
        images: (B, C, H, W) uint8, on any device.

    Returns:
        (B,) int64 on the CPU; equal for equal images, wherever they are.

    Raises:
        TypeError: pixels of another type, which would be equal images with other keys.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise TypeError(f"images are (B, C, H, W) uint8, not {images.dtype} of shape {tuple(images.shape)}")
    shape = repr(tuple(images.shape[1:])).encode()
    rows = images.cpu().contiguous().numpy()  # (B, C, H, W)
    keys = [_number(hashlib.blake2b(row, digest_size=8, key=shape)) for row in rows]
    return torch.tensor(keys, dtype=torch.int64)


def image_keys(seed, contents, reps):
    """The keys of B images in some repetitions, as `repetition_keys` of their `seed_keys`."""
    return repetition_keys(seed_keys(seed, contents), reps)


def seed_keys(seed, contents):
    """The keys of B images under a seed.

    Args:
        seed: int, or another word of `key`.
        contents: (B,) int64, what tells the images apart: their `content_keys`, or the numbers of samples.

    Returns:
        (B,) int64.
    """
    return mix64(contents.to(torch.int64) + key(seed, "images"))


def repetition_keys(keys, reps):
    """Each repetition's keys.

    Args:
        keys: (B,) int64, of the images.
        reps: the repetitions' numbers.

    Returns:
        (len(reps) * B,) int64: all images of the first repetition, then all of the next.
    """
    return torch.cat([mix64(keys + _signed((rep + 1) * GOLDEN)) for rep in reps])


class KeyedNoise:
    """The noise of one batch of trajectories: `noise(step, purpose)` is standard normal, (B, C, H, W).

    Args:
        keys: (B,) int64, one a trajectory (`image_keys`).
        shape: (C, H, W).
        device: where the noise is made.
    """

    def __init__(self, keys, shape, device="cpu"):
        self.keys, self.shape = keys.to(device), tuple(shape)
        half = (math.prod(self.shape) + 1) // 2  # Box-Muller makes pairs
        self._weyl = torch.arange(1, half + 1, device=device) * GOLDEN

    def __call__(self, step, purpose):
        """Standard normal noise (B, C, H, W) float32 for an int step and a name in `PURPOSES`."""
        draw = step * _MAX_PURPOSES + PURPOSES[purpose] + 1
        keys = mix64(self.keys + _signed(draw * GOLDEN))  # (B,)
        return normal(keys, self._weyl, math.prod(self.shape)).view(-1, *self.shape)


def _signed(value):
    """A Python int wrapped to 64 bits, signed, as tensors hold it."""
    return (value + 2**63) % 2**64 - 2**63


def mix64(values, scratch=None):
    """SplitMix64's finaliser of int64 values, a bijection whose output bits look random.

    With `scratch` (a tensor of the same shape) it works in place and allocates nothing.
    """
    z = values.clone() if scratch is None else values
    t = torch.empty_like(z) if scratch is None else scratch
    for shift, factor in ((30, _MIX_1), (27, _MIX_2), (31, None)):
        torch.bitwise_right_shift(z, shift, out=t)  # arithmetic: the copies of the sign bit are masked away
        z.bitwise_xor_(t.bitwise_and_((1 << (64 - shift)) - 1))
        if factor is not None:
            z.mul_(factor)
    return z


def normal(keys, weyl, count):
    """Standard normal numbers by key.

    Args:
        keys: (B,) int64, the state of each row's SplitMix64 generator.
        weyl: (ceil(count / 2),) int64, the counter times `GOLDEN`.
        count: numbers a row.

    Returns:
        (B, count) float32; the largest magnitude is 6.66.
    """
    rows = len(keys) if keys.device.type != "cpu" else max(1, _CPU_CHUNK // max(1, count))
    out = torch.empty(len(keys), 2 * len(weyl), device=keys.device)
    state = torch.empty(min(rows, len(keys)), len(weyl), dtype=torch.int64, device=keys.device)
    scratch = torch.empty_like(state)
    radius, angle = torch.empty(2, *state.shape, device=keys.device)
    for chunk, chunk_keys in zip(out.split(rows), keys.split(rows), strict=True):
        m = len(chunk_keys)
        _fill_normal(chunk, chunk_keys[:, None], weyl, state[:m], scratch[:m], radius[:m], angle[:m])
    return out[:, :count]


def _fill_normal(out, keys, weyl, state, scratch, radius, angle):
    """Box-Muller: each 64-bit output gives a radius (its one half) and an angle (its other half)."""
    torch.add(keys, weyl, out=state)  # (B, n/2)
    words = mix64(state, scratch).view(torch.int32).unflatten(1, (-1, 2))  # (B, n/2, 2)
    radius.copy_(words[..., 0]).abs_().mul_(2.0**-31).clamp_min_(2.0**-32)  # uniform on (0, 1]
    radius.log_().mul_(-2).sqrt_()
    angle.copy_(words[..., 1]).mul_(math.pi * 2.0**-31)  # uniform on [-pi, pi]
    half = len(weyl)
    torch.cos(angle, out=out[:, :half]).mul_(radius)
    torch.sin(angle, out=out[:, half:]).mul_(radius)
