"""Packs the demo's images from the test sets of Fashion-MNIST and MNIST, as they are (28x28 grey).

    python scripts/pack_demo.py --data_root data

reads both test sets in torchvision's layout (downloading what is missing) and writes into `demo/` what `FILES` and
`FOLDER` say.  All is in the repository, so nobody needs to run this; `demo/README.md` names sources and licences.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


import datasets  # noqa: E402
from basics.console import UserError, fail, say  # noqa: E402
from basics.files import write_bytes, write_png  # noqa: E402

FILES = {  # file: data set, and which of its test images
    "fashion_mnist.npz": ("FashionMNIST", 0, 256),
    "mnist.npz": ("MNIST", 0, 256),
    "held_back.npz": ("FashionMNIST", 256, 756),
}
FOLDER = "incoming"  # of PNG files, a picture each
PICTURES = {"clothes": ("FashionMNIST", 756, 780), "digit": ("MNIST", 256, 268)}  # start of the name: as FILES


def read(data_root, name, start, stop):
    """Test images start..stop-1 of a named grey data set: (B, 28, 28) uint8."""
    images = datasets.load(name, split="test", image_size=28, num_channels=1, data_root=data_root)
    return images.read(start, stop)[:, 0].numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", default="data", help="folder with FashionMNIST/raw and MNIST/raw")
    parser.add_argument("--out", type=Path, default=ROOT / "demo", help="folder to write to")
    options = parser.parse_args()
    try:
        for file, which in FILES.items():
            buffer = io.BytesIO()
            np.savez_compressed(buffer, images=read(options.data_root, *which))
            write_bytes(options.out / file, buffer.getvalue())
            say(f"{options.out / file}: {which[2] - which[1]} images")
        for stem, which in PICTURES.items():
            for number, pixels in enumerate(read(options.data_root, *which)):
                write_png(options.out / FOLDER / f"{stem}_{number:02d}.png", Image.fromarray(pixels))
        say(f"{options.out / FOLDER}: {', '.join(f'{stop - a} of {stem}' for stem, (_, a, stop) in PICTURES.items())}")
    except UserError as error:
        fail(error)


if __name__ == "__main__":
    main()
