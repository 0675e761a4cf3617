"""Batches: a function of seed and step, every image once an epoch, in the model's range."""

import pytest
import torch
from picture_files import feed, load, noise_values, numbered, read_all, save_array

from basics import image_sets
from basics.console import UserError
from basics.pixels import to_model_range
from lmd.batches import in_order


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
    images = load(save_array(tmp_path / "grey.npy", noise_values((19, 28, 28))))
    assert images.store.pixels.shape == (19, 1, 32, 32)
    batch = feed(images, random_flip=True).batch(1)
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
