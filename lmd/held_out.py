"""Images that a model was not trained on: what a detector is fitted to and calibrated with."""

from pathlib import Path

import torch

from basics import files, noise
from basics.console import UserError, are, counted, progress, say, some_are, warn
from basics.image_lists import say_once
from basics.preparation import spread
from storage.checkpoints import data_of

LEAST_DIVIDED, LARGEST_SHARE = 20, 1000  # images from which on some are held back, and the most that are
_AT_ONCE = 256  # images that are read together


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
    """`noise.content_keys` of a whole `ImageSet` (N,), read some at a time; shows a bar where that takes long."""
    found = []
    with progress(total=len(images), unit=" images", desc=f"looking at {images.name}", leave=False, delay=5) as bar:
        for start in range(0, len(images), _AT_ONCE):
            found.append(noise.content_keys(images.read(start, start + _AT_ONCE)))
            bar.update(len(found[-1]))
    return torch.cat(found)


def held_out(load, source, flag, config, ckpt_path, max_images=None):
    """The images of a source that the model was not trained on, as far as can be known.

    Where they are the very images that the checkpoint was made from, those that training held back are taken.  Images
    that were trained on are left out, copies included; told apart by their pixels.

    Args:
        load: called as load(source, **options) with options of `datasets.load`, gives an `ImageSet`.
        source: of the images.
        flag: that names the source, for messages; may be empty.
        config: the config tree that the model was trained with.
        ckpt_path: the checkpoint.
        max_images: as of `datasets.load`.

    Raises:
        UserError: all of them were trained on, or more than half are in the folder that the config names for training,
            of which it is not known what was held back; or as `datasets.load`.
    """
    flag = f"{flag} " if flag else ""
    images = load(source)  # all of them, to be recognised
    known = _trained_on(ckpt_path)
    if known == images.fingerprint:
        raise UserError(
            f"the model was trained on the images of {source}: on these it is surer than on new ones, and every "
            f"false-alarm rate would be wrong; give {flag}images that were held back"
        )
    held = held_back(len(images))
    if known is not None and len(held) and without(images, held).fingerprint == known:
        say(
            f"{source} is what the model was trained on: the {len(held):,} images held back then are used; "
            "training with --config.data.test_dataset sets other images aside"
        )
        return _some(_unseen(images.part(held), without(images, held), source, flag), max_images)
    return _unlike_training_folder(load, source, flag, config, ckpt_path, _some(images, max_images))


def _some(images, wanted):
    """`wanted` of the images, evenly spread; all of them where that is None or more."""
    rows = spread(len(images), wanted)
    if len(rows) == len(images):
        return images
    say(f"'{images.name}': {len(rows):,} of {len(images):,} images {are(len(rows))} used, evenly spread (--max_images)")
    return images.part(torch.tensor(rows))


def _unlike_training_folder(load, source, flag, config, ckpt_path, images):
    """Those of the images that are not among the ones the config names for training, if these are files here.

    Else a line says that it could not be checked, which is not needed where source and training are one named set, of
    which the test images are taken here.
    """
    trained_on, plain = config.data.dataset, lambda name: str(name).replace("_", "").lower()
    if not Path(files.expand_home(trained_on)).exists():
        if plain(source) != plain(trained_on):
            say_once(
                f"whether {ckpt_path} was trained on the in-domain images could not be checked; p-values and ROC-AUCs "
                "hold only for images that it was not trained on"
            )
        return images
    known, trained = _trained_on(ckpt_path), load(trained_on, split="train")
    seen = without(trained, held_back(len(trained)))
    if known == seen.fingerprint:
        return _unseen(images, seen, source, flag)
    most = None if known == trained.fingerprint else len(images) // 2
    return _unseen(images, trained, source, flag, most)


def _trained_on(ckpt_path):
    """The fingerprint of the images that a checkpoint was trained on, or None where it does not say."""
    known = data_of(ckpt_path) if Path(ckpt_path).suffix == ".pth" else None
    return None if known is None else known["fingerprint"]


def _unseen(images, trained, source, flag, most=None):
    """The images (an `ImageSet`) that are not among those that were trained on; says how many are left out.

    Raises:
        UserError: more than `most` would be, by default all of them.
    """
    most = len(images) - 1 if most is None else most
    seen = set(content_keys_of(trained).tolist())
    rows = [row for row, key in enumerate(content_keys_of(images).tolist()) if key not in seen]
    shared = len(images) - len(rows)
    if not shared:
        return images
    share = f"{shared:,} of the {counted(len(images), 'image')} of {source} {are(shared)} among those"
    if shared > most:
        raise UserError(
            f"{share} of {trained.name}, which the model was trained on; give {flag}images that were held back, or "
            "what training was given as a whole, of which it held back a part"
        )
    warn(f"{share} that the model was trained on, and left out")
    return images.part(torch.tensor(rows))


def to_learn_from(images, count, fewest=1):
    """Which `count` images of an `ImageSet` a method learns from (N,) bool: chosen by content, not by their place.

    Copies of an image stay together: where some would be learned from and others not, none is, and there are fewer than
    `count`.  Warns of copies, as they tell less than as many different images.

    Raises:
        UserError: fewer than `fewest` would be left to learn from, where `count` is above 0.
    """
    keys = content_keys_of(images)
    if copies := len(keys) - len(keys.unique()):
        which = f"'{images.name}': {some_are(copies, len(keys), 'image')}"
        warn(f"{which} copies of others, and tell less than as many different ones")
    order = noise.seed_keys("fit", keys).argsort(stable=True)
    learning = torch.zeros(len(keys), dtype=torch.bool)
    learning[order[:count]] = True
    if 0 < count < len(keys):
        learning &= keys != keys[order[count]]
    if count and learning.sum() < fewest:
        raise UserError(f"the images of '{images.name}' are too often copies of one; give more different ones")
    return learning


def shared_with(images, keys):
    """How many images of an `ImageSet` have their `noise.content_keys` among `keys`, a set of int."""
    return sum(key in keys for key in content_keys_of(images).tolist())
