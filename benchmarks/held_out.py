"""Fashion-MNIST with its footwear held out, as image files for training and for benchmarks/quality_vs_cost.py.

    python -m benchmarks.held_out --data_root ./data

writes clothes_train.npz (of the train split), clothes.npz and shoes.npz (sandals, sneakers and ankle boots; of the test
split) to results/held_out/.
"""

import argparse
import io
from pathlib import Path

import numpy as np
from torchvision.datasets import FashionMNIST

from basics import files
from basics.console import UserError, guard, say

FOOTWEAR = (5, 7, 9)  # the labels of sandals, sneakers and ankle boots


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", default="./data")
    parser.add_argument("--folder", default="results/held_out")
    options = parser.parse_args(arguments)
    for split in ("train", "test"):
        data = _loaded(options.data_root, split)
        images, footwear = data.data.numpy(), np.isin(data.targets.numpy(), FOOTWEAR)
        if split == "train":
            write(Path(options.folder) / "clothes_train.npz", images[~footwear])
        else:
            write(Path(options.folder) / "clothes.npz", images[~footwear])
            write(Path(options.folder) / "shoes.npz", images[footwear])


def _loaded(data_root, split):
    try:
        return FashionMNIST(data_root, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"Fashion-MNIST is not in {data_root} and cannot be downloaded ({reason}); put its files in "
            f"{Path(data_root) / 'FashionMNIST' / 'raw'}"
        ) from error


def write(path, images):
    """Saves images (N, H, W) or (N, H, W, 3) uint8."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=images)
    files.write_bytes(path, buffer.getvalue())
    say(f"{path}: {len(images)} images")


if __name__ == "__main__":
    guard(lambda _: main(), None)
