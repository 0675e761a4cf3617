"""Image files for tables of detectors as in docs/results.md: the first images of test splits.

    python -m benchmarks.table_sets --data_root ./data
    python -m benchmarks.table_sets --images 100 --folder results/table_100

writes to results/table/, for the shipped model, fashion_fit.npz to learn from and fashion_in.npz, the images after
those; for a model of CIFAR-10, cifar_fit.npz and cifar_in.npz likewise; and fashion.npz, mnist.npz and cifar.npz, which
are out of domain.  --cifar10 names other images to be taken for CIFAR-10's test split, such as a sample of it,
sample.npz:test.
"""

import argparse
from pathlib import Path

import datasets
from basics.console import UserError, guard
from benchmarks import machine
from benchmarks.held_out import write

FASHION, MNIST, CIFAR = ("FashionMNIST", 28, 1), ("MNIST", 28, 1), ("CIFAR10", 32, 3)  # name, pixels an edge, channels
FASHION_FIT, CIFAR_FIT = 1500, 517  # images to learn from


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", default="./data")
    parser.add_argument("--cifar10", default=CIFAR[0])
    parser.add_argument("--images", type=machine.count, default=500, help="of each set that is scored")
    parser.add_argument("--folder", type=Path, default=Path("results/table"))
    options = parser.parse_args(arguments)
    cifar = (options.cifar10, *CIFAR[1:])
    files = {
        "fashion_fit": (FASHION, 0, FASHION_FIT),
        "fashion_in": (FASHION, FASHION_FIT, options.images),
        "mnist": (MNIST, 0, options.images),
        "cifar": (cifar, 0, options.images),
        "cifar_fit": (cifar, 0, CIFAR_FIT),
        "cifar_in": (cifar, CIFAR_FIT, options.images),
        "fashion": (FASHION, 0, options.images),
    }
    images = {name: _images(options.data_root, *what) for name, what in files.items()}  # all there, or nothing written
    for name, pixels in images.items():
        write(options.folder / f"{name}.npz", pixels)


def _images(data_root, kind, first, count):
    """Images of a test split as they are stored, (N, H, H) or (N, H, H, 3) uint8.

    Raises:
        UserError: there are too few.
    """
    source, edge, channels = kind
    images = datasets.load(source, split="test", image_size=edge, num_channels=channels, data_root=data_root)
    if len(images) < first + count:
        raise UserError(
            f"{source} has {len(images):,} images, of which {first + count:,} are needed; set --images lower"
        )
    pixels = images.read(first, first + count)  # (N, C, H, H)
    return pixels.permute(0, 2, 3, 1).squeeze(-1).numpy()


if __name__ == "__main__":
    guard(lambda _: main(), None)
