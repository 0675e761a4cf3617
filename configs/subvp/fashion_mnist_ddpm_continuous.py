"""Fashion-MNIST: DDPM network, sub-VP SDE, continuous time.

    python main.py --config configs/subvp/fashion_mnist_ddpm_continuous.py --workdir results/fashion_mnist/ --mode train

Published with LMD (arXiv 2302.10326). Grey images of 28x28 pixels become three equal channels of 32x32.
"""

from configs.presets import DDPM, FASHION_MNIST, SUBVP, build


def get_config():
    return build(FASHION_MNIST, DDPM, SUBVP)
