"""Packs the demo's images: the first test images of Fashion-MNIST and MNIST, as they are (28x28 grey).

    python scripts/pack_demo.py --data_root data

reads both test sets in torchvision's layout (downloading what is missing) and writes `demo/fashion_mnist.npz` and
`demo/mnist.npz`, each one array `images`, uint8 (256, 28, 28).  Both files are in the repository, so nobody needs to
run this; `demo/README.md` names sources and licences.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


import datasets  # noqa: E402
from basics.console import UserError, fail, say  # noqa: E402
from basics.files import write_bytes  # noqa: E402

FILES = {"FashionMNIST": "fashion_mnist.npz", "MNIST": "mnist.npz"}


def pack(name, count, data_root, path):
    """Writes the first `count` test images of a named grey data set to `path`."""
    images = datasets.load(name, split="test", image_size=28, num_channels=1, data_root=data_root)
    pixels = images.read(0, count)[:, 0].numpy()  # (count, 28, 28) uint8
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=pixels)
    write_bytes(path, buffer.getvalue())
    say(f"{path}: {len(pixels)} images, {path.stat().st_size / 1000:.0f} kB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", default="data", help="folder with FashionMNIST/raw and MNIST/raw")
    parser.add_argument("--out", type=Path, default=ROOT / "demo", help="folder to write to")
    parser.add_argument("--count", type=int, default=256, help="images of each set")
    flags = parser.parse_args()
    try:
        for name, file in FILES.items():
            pack(name, flags.count, flags.data_root, flags.out / file)
    except UserError as error:
        fail(error)


if __name__ == "__main__":
    main()
