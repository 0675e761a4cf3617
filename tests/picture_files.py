"""Sources of images that tests write, the loader at their size, and batches of what it gives."""

import numpy as np
import torch
from PIL import Image

import datasets
from basics import image_sets
from basics.pixels import crop
from lmd.batches import TrainingBatches


def load(source, **options):
    return datasets.load(source, **{"split": "test", "image_size": 32, "num_channels": 3, "workers": 2, **options})


def read_all(images):
    return images.read(0, len(images))


def noise_values(shape, seed=0, most=255):
    """An array of uniform noise, uint8 in 0..most."""
    return np.random.default_rng(seed).integers(0, most, shape, dtype=np.uint8, endpoint=True)


def noise_picture(seed, size=(40, 33)):
    """An RGB picture of uniform noise, width x height."""
    return Image.fromarray(noise_values((size[1], size[0], 3), seed))


def save(path, seed=0, size=(40, 33)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise_picture(seed, size).save(path)


def save_array(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values) if path.suffix == ".npy" else np.savez(path, values)
    return path


def put(root, *names):
    """Pictures and other files of these names, and folders where they end with a slash."""
    for name in names:
        if name.endswith("/"):
            (root / name).mkdir(parents=True)
        elif name.endswith((".png", ".jpg")):
            save(root / name)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("{}")


def chw(picture):
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def cropped(*seeds):
    """What becomes of pictures of noise, (N, 3, 32, 32)."""
    return torch.stack([chw(crop(noise_picture(seed), 32)) for seed in seeds])


def numbered(count, shape=(3, 4, 4)):
    """A set whose image i is filled with i, its left half with i + 100."""
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, *shape)
    pixels[..., : shape[-1] // 2] += 100
    return image_sets.ImageSet("numbered", count, shape, image_sets.InMemory(pixels))


def feed(images, batch_size=4, **options):
    plain = {"seed": 7, "device": "cpu", "random_flip": False, "uniform_dequantization": False, "centered": False}
    return TrainingBatches(images, batch_size, **{**plain, **options})


def idx_bytes(values):
    """An array of uint8 in MNIST's file format."""
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes()


def write_mnist(root, name, count=20, classes=1):
    """MNIST's files under a set's name, labelled 0, 1, ... in turns; returns the pictures of its splits."""
    made = {}
    (root / name / "raw").mkdir(parents=True)
    for seed, (split, prefix) in enumerate([("train", "train"), ("test", "t10k")]):
        made[split] = noise_values((count - seed, 28, 28), seed)
        labels = np.arange(count - seed, dtype=np.uint8) % classes
        for kind, values in (("images-idx3", made[split]), ("labels-idx1", labels)):
            (root / name / "raw" / f"{prefix}-{kind}-ubyte").write_bytes(idx_bytes(values))
    return made
