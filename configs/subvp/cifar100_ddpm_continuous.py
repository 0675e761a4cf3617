"""CIFAR-100: DDPM network, sub-VP SDE, continuous time.

    python main.py --config configs/subvp/cifar100_ddpm_continuous.py --workdir results/cifar100/ --mode train

Published with LMD (arXiv 2302.10326). The CIFAR-10 config on another data set.
"""

from configs.presets import CIFAR100, DDPM, SUBVP, build


def get_config():
    return build(CIFAR100, DDPM, SUBVP)
