"""Keyed noise: SplitMix64 to the bit, a normal distribution, independence, and the same numbers whatever the batch."""

import enum
import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from basics import noise
from basics.noise import KeyedNoise, image_keys

# The first outputs for these seeds of Vigna's public-domain C program; 1234567 is also Rosetta Code's example.
SPLITMIX64 = {
    1234567: [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ],
    0: [16294208416658607535, 7960286522194355700, 487617019471545679],
}


def rows(count, seed=0, reps=(0,)):
    return image_keys(seed, torch.arange(count), list(reps))


def flat(keys, shape=(3, 32, 32), step=0, purpose="prior"):
    """Draws (B, C * H * W) in float64."""
    return KeyedNoise(keys, shape)(step, purpose).flatten(1).double()


def correlation(a, b):
    return np.corrcoef(a.flatten(), b.flatten())[0, 1]


# ------------------------------------------------------------------------------------------------- the generator


@pytest.mark.parametrize("seed", SPLITMIX64)
def test_splitmix64_known_outputs(seed):
    expected = SPLITMIX64[seed]
    states = seed + torch.arange(1, len(expected) + 1) * noise.GOLDEN
    assert [value % 2**64 for value in noise.mix64(states).tolist()] == expected


def test_mix64_in_place_is_the_same():
    values = torch.arange(-500, 500) * 0x1234567890ABCDEF
    expected, mine = noise.mix64(values), values.clone()
    result = noise.mix64(mine, scratch=torch.empty_like(mine))
    assert torch.equal(result, expected)
    assert result.data_ptr() == mine.data_ptr()
    assert torch.equal(values, torch.arange(-500, 500) * 0x1234567890ABCDEF)  # without scratch it copies


def test_keys_do_not_change():
    """Reconstructions on a user's disk depend on these numbers."""
    assert noise.key(1, "a", 2.5) == int.from_bytes(_blake("(1, 'a', 2.5)"), "little", signed=True)
    published = {"prior": 0, "corrector": 1, "constrain": 2, "predictor": 3, "reconstrain": 4}
    assert {**published, "return": 5} == noise.PURPOSES


def _blake(text):
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def test_box_muller_of_the_known_words():
    """The normals of one row, from SplitMix64 and the Box-Muller transform in float64; float32 keeps 1e-6 of them."""
    key, count = 1234567, 10
    words = np.array(SPLITMIX64[key], dtype=np.uint64).view(np.int32).reshape(-1, 2).astype(np.float64)
    radius = np.sqrt(-2 * np.log(np.abs(words[:, 0]) / 2**31))
    angle = words[:, 1] * np.pi / 2**31
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    weyl = torch.arange(1, count // 2 + 1) * noise.GOLDEN
    made = noise.normal(torch.tensor([key]), weyl, count)
    np.testing.assert_allclose(made[0].numpy(), expected, rtol=0, atol=2e-6)


# -------------------------------------------------------------------------------------------------- distribution


def test_moments():
    """1.5 million numbers; each bound is 5 standard errors of the moment."""
    values = flat(rows(500), step=3, purpose="predictor").numpy().ravel()
    n = values.size
    assert abs(values.mean()) < 5 / n**0.5
    assert abs(values.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((values**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((values**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert 4.3 < np.abs(values).max() < 6.7  # the tail is there: 26 of 1.5 million are expected beyond 4.3


def test_kolmogorov_smirnov():
    """Against scipy's normal: as one sample, within images and across images (p-values not all small)."""
    values = flat(rows(200)).numpy()
    assert stats.kstest(values.ravel(), "norm").pvalue > 1e-3
    for axis, count in ((0, 200), (1, 200)):
        p = [stats.kstest(values.take(i, axis=axis), "norm").pvalue for i in range(count)]
        assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_radius_and_angle_are_independent():
    """The two halves of a row are the two numbers of each pair: their squares must not correlate either."""
    first, second = flat(rows(500)).chunk(2, dim=1)
    bound = 5 / first.numel() ** 0.5
    assert abs(correlation(first, second)) < bound
    assert abs(correlation(first**2, second**2)) < bound


@pytest.mark.parametrize("lag", [1, 2, 31, 32, 33, 1024])
def test_positions_do_not_correlate(lag):
    values = flat(rows(300))
    bound = 5 / (300 * (3072 - lag)) ** 0.5
    assert abs(correlation(values[:, lag:], values[:, :-lag])) < bound
    assert abs(correlation(values[:, lag:] ** 2, values[:, :-lag] ** 2)) < bound


@pytest.mark.parametrize("lag", [1, 2, 17])
def test_neighbouring_images_do_not_correlate(lag):
    values = flat(rows(300 + lag))
    bound = 5 / (300 * 3072) ** 0.5
    assert abs(correlation(values[lag:], values[:-lag])) < bound


def test_no_pair_of_rows_steps_or_purposes_correlates():
    """Every pair among images, repetitions, steps and purposes; 5 standard errors hold for all some thousand pairs."""
    keys = rows(4, reps=range(2))
    source = KeyedNoise(keys, (3, 32, 32))
    draws = [source(step, purpose).flatten(1) for step in (0, 1, 2, 999) for purpose in noise.PURPOSES]
    values = torch.cat(draws).double()  # (4 steps * 6 purposes * 8 rows, 3072)
    together = torch.corrcoef(values)
    together.fill_diagonal_(0)
    assert together.abs().max() < 5 / 3072**0.5


# --------------------------------------------------------------------------------------- a pure function of the key


def test_same_numbers_whatever_the_batch():
    keys = rows(9, reps=range(3))
    whole = KeyedNoise(keys, (3, 8, 8))(5, "constrain")
    for size in (1, 2, 4, 27):
        parts = [KeyedNoise(part, (3, 8, 8))(5, "constrain") for part in keys.split(size)]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(27, generator=torch.Generator().manual_seed(0))
    assert torch.equal(KeyedNoise(keys[order], (3, 8, 8))(5, "constrain"), whole[order])


@pytest.mark.parametrize("chunk", [1, 100, 192, 1000, 1 << 20])
def test_same_numbers_whatever_the_chunks(chunk, monkeypatch):
    source = KeyedNoise(rows(20), (3, 8, 8))
    expected = source(0, "prior")
    monkeypatch.setattr(noise, "_CPU_CHUNK", chunk)
    assert torch.equal(source(0, "prior"), expected)


def test_image_keys_are_of_one_image_and_one_repetition():
    """All images of the first repetition, then all of the next; images may come in any order."""
    together = image_keys(7, torch.tensor([5, 2, 8]), [0, 3])
    singles = [image_keys(7, torch.tensor([i]), [rep]) for rep in (0, 3) for i in (5, 2, 8)]
    assert torch.equal(together, torch.cat(singles))


def test_any_word_of_the_key_changes_the_numbers():
    seeds, contents, reps, draws = [0, 1, 42], [0, 1, -9999], [0, 1, 9], [0, 1, 999]
    keys = [
        image_keys(seed, torch.tensor([content]), [rep]).item()
        for seed, content, rep in itertools.product(seeds, contents, reps)
    ]
    assert len(set(keys)) == 3**3
    firsts = [
        KeyedNoise(torch.tensor([key]), (1, 1, 1))(step, purpose).item()
        for key in keys[:20]
        for step in draws
        for purpose in noise.PURPOSES
    ]
    assert len(set(firsts)) == 20 * 3 * len(noise.PURPOSES)


def test_key_tells_types_and_groups_apart():
    words = [("1",), (1,), (1.0,), (True,), ("1", ""), ("", "1"), (1, 2), (12,), ("1, 2",), ((1, 2),)]
    assert len({noise.key(*group) for group in words}) == len(words)


class _Name(str):
    def __str__(self):
        return "another"

    def __repr__(self):
        return f"_Name({id(self)})"


class _Number(enum.IntEnum):
    THREE = 3


@pytest.mark.parametrize(
    ("word", "plain"),
    [
        (np.int64(3), 3), (np.uint8(3), 3), (_Number.THREE, 3), (np.int64(-(2**63)), -(2**63)),
        (np.float64(0.1), 0.1), (np.float32(0.5), 0.5), (np.float16(0.5), 0.5),
        (np.bool_(True), True), (np.str_("a"), "a"), (_Name("a"), "a"), ((np.int64(1), ("b",)), (1, ("b",))),
    ],
)  # fmt: skip
def test_a_key_is_of_the_value_whatever_type_holds_it(word, plain):
    assert noise.key("seed", word) == noise.key("seed", plain)
    assert torch.equal(image_keys(word, torch.arange(3), [0]), image_keys(plain, torch.arange(3), [0]))


@pytest.mark.parametrize(
    "word", [None, [1], {1: 2}, b"a", np.arange(3), np.array(3), torch.tensor(3), Path("a"), object(), 1j, (1, None)]
)
def test_a_key_of_what_it_cannot_name_is_a_bug(word):
    """The text of an object may hold its address, that of an array leaves numbers out."""
    with pytest.raises(TypeError, match="a key is made of text, numbers and tuples of them, not of"):
        noise.key(1, word)


# ------------------------------------------------------------------------------------------------------ contents


def pixels(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_contents_are_each_images_own():
    images = pixels(6, 3, 5, 4)
    keys = noise.content_keys(images)
    assert (keys.dtype, keys.shape) == (torch.int64, (6,))
    assert len(keys.unique()) == 6
    order = torch.tensor([4, 0, 4, 5])
    assert torch.equal(noise.content_keys(images[order]), keys[order])
    assert noise.content_keys(images[:0]).shape == (0,)


def test_contents_do_not_depend_on_how_they_are_stored():
    grey = pixels(3, 1, 4, 6)
    spread = grey.expand(-1, 3, -1, -1)
    assert torch.equal(noise.content_keys(spread), noise.content_keys(spread.contiguous()))
    last = grey.contiguous(memory_format=torch.channels_last)[..., ::2]
    assert torch.equal(noise.content_keys(last), noise.content_keys(last.clone(memory_format=torch.contiguous_format)))


def test_one_pixel_or_the_shape_makes_another_content():
    images = pixels(1, 3, 4, 4)
    changed = images.clone()
    changed[0, 2, 3, 1] ^= 1
    variants = [images, changed, images.view(1, 3, 2, 8), images.view(1, 1, 12, 4), images.transpose(2, 3)]
    assert len({noise.content_keys(variant).item() for variant in variants}) == len(variants)


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)])
def test_contents_of_other_pixels_are_a_bug(images):
    """The same picture in [0, 1] would get another key."""
    with pytest.raises(TypeError, match="uint8"):
        noise.content_keys(images)


def test_contents_do_not_change():
    """Reconstructions on a user's disk depend on these numbers."""
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    expected = [
        hashlib.blake2b(bytes(range(start, start + 12)), digest_size=8, key=b"(3, 2, 2)").digest() for start in (0, 12)
    ]
    assert noise.content_keys(images).tolist() == [int.from_bytes(d, "little", signed=True) for d in expected]


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 5), (1, 7, 3), (3, 1, 2)])
def test_odd_sizes(shape):
    """An odd count leaves the last number of the last pair out; nothing else changes."""
    made = KeyedNoise(rows(4), shape)(0, "prior")
    assert made.shape == (4, *shape)
    assert made.dtype == torch.float32
    assert made.isfinite().all()
    count = made[0].numel()
    assert len(made.unique()) == 4 * count
    even = KeyedNoise(rows(4), (1, 1, count + count % 2))(0, "prior").flatten(1)
    assert torch.equal(made.flatten(1), even[:, :count])


def test_no_rows():
    assert KeyedNoise(rows(0), (3, 4, 4))(0, "prior").shape == (0, 3, 4, 4)


def test_the_extreme_words_stay_finite():
    """A word of zero would give an infinite radius; its logarithm is clamped to that of 2^-32, 6.66."""
    largest = torch.tensor(2.0**-32).log().mul(-2).sqrt()
    out = torch.empty(1, 2)
    state, scratch = torch.empty(2, 1, 1, dtype=torch.int64)
    radius, angle = torch.empty(2, 1, 1)
    keys, weyl = torch.tensor([[-noise.GOLDEN]]), torch.tensor([noise.GOLDEN])  # their sum 0 is mixed to 0: both words
    noise._fill_normal(out, keys, weyl, state, scratch, radius, angle)
    torch.testing.assert_close(out, torch.tensor([[largest, 0.0]]))


def test_unknown_purpose_is_a_bug():
    with pytest.raises(KeyError):
        KeyedNoise(rows(1), (1, 2, 2))(0, "whatever")


# ------------------------------------------------------------------------------------------------- the generators


def test_generator_is_keyed_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    first, again, other = (
        torch.rand(5, generator=noise.generator(*words)) for words in ((1, "flip"), (1, "flip"), (1, "order"))
    )
    KeyedNoise(rows(3), (3, 4, 4))(0, "prior")
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
