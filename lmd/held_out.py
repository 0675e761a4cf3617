"""Images that a model was not trained on: what a detector is fitted to and calibrated with."""

from pathlib import Path

import torch

from basics import files, noise
from basics.console import UserError, are, counted, say, warn
from basics.image_lists import say_once
from basics.preparation import spread
from storage.checkpoints import data_of

LEAST_DIVIDED, LARGEST_SHARE = 20, 1000  # images from which on some are held back, and the most that are


def held_back(count):
    """Which of a user's own images are kept from training for the test loss: a tenth, evenly spread, 1000 at most.

    Args:
        count: the number of images.

    Returns:
        (B,) int64, rising; none of fewer than 20 images.
    """
    share = min(count // 10, LARGEST_SHARE) if count >= LEAST_DIVIDED else 0
    return (2 * torch.arange(share) + 1) * count // max(2 * share, 1)  # the middles of as many equal pieces


def without(images, rows):
    """An `ImageSet` without the images at `rows` (B,)."""
    kept = torch.ones(len(images), dtype=torch.bool)
    kept[rows] = False
    return images.part(kept.nonzero().flatten())


def content_keys_of(images):
    """`noise.content_keys` of a whole `ImageSet` (N,), read some at a time."""
    spans = [(start, start + 256) for start in range(0, len(images), 256)]
    return torch.cat([noise.content_keys(images.read(*span)) for span in spans])


def held_out(load, source, flag, config, ckpt_path, max_images=None):
    """The images of a source; refused where the model is known to have been trained on them.

    Where they are the very images that the checkpoint was made from, those that training held back are taken.

    Args:
        load: called as load(source, **options) with options of `datasets.load`, gives an `ImageSet`.
        source: of the images.
        flag: that names the source, for messages; may be empty.
        config: the config tree that the model was trained with.
        ckpt_path: the checkpoint.
        max_images: as of `datasets.load`.

    Raises:
        UserError: more than half of them were trained on, or as `datasets.load`.
    """
    flag = f"{flag} " if flag else ""
    images = load(source)  # all of them, to be recognised
    known = data_of(ckpt_path) if Path(ckpt_path).suffix == ".pth" else None
    if known is not None and known["fingerprint"] == images.fingerprint:
        raise UserError(
            f"the model was trained on the images of {source}: on these it is surer than on new ones, and every "
            f"false-alarm rate would be wrong; give {flag}images that were held back"
        )
    held = held_back(len(images))
    if known is not None and len(held) and without(images, held).fingerprint == known["fingerprint"]:
        say(
            f"{source} is what the model was trained on: the {len(held):,} images held back then are used; "
            "training with --config.data.test_dataset sets other images aside"
        )
        return _some(images.part(held), max_images)
    images = _some(images, max_images)
    _check_against_training_folder(load, source, flag, config, ckpt_path, images)
    return images


def _some(images, wanted):
    """`wanted` of the images, evenly spread; all of them where that is None or more."""
    rows = spread(len(images), wanted)
    if len(rows) == len(images):
        return images
    say(f"'{images.name}': {len(rows):,} of {len(images):,} images {are(len(rows))} used, evenly spread (--max_images)")
    return images.part(torch.tensor(rows))


def _check_against_training_folder(load, source, flag, config, ckpt_path, images):
    """Compares with the images that the config names for training, if these are files here; else a line says so.

    None is needed where source and training are one named set, of which the test images are taken here.
    """
    trained_on, plain = config.data.dataset, lambda name: str(name).replace("_", "").lower()
    if not Path(files.expand_home(trained_on)).exists():
        if plain(source) != plain(trained_on):
            say_once(
                f"whether {ckpt_path} was trained on the in-domain images could not be checked; p-values and ROC-AUCs "
                "hold only for images that it was not trained on"
            )
        return
    shared = shared_with(images, load(trained_on, split="train"))
    share = f"{shared:,} of the {counted(len(images), 'image')} of {source} {are(shared)}"
    if 2 * shared > len(images):
        raise UserError(
            f"{share} among those of {trained_on}, which the model was trained on; give {flag}images that "
            "were held back, or what training was given as a whole, of which it held back a part"
        )
    if shared:
        warn(f"{share} in {trained_on}, the training images, too")


def shared_with(images, others):
    """How many images of an `ImageSet` are in another one, by their pixels."""
    known = set(content_keys_of(others).tolist())
    return sum(key in known for key in content_keys_of(images).tolist())
