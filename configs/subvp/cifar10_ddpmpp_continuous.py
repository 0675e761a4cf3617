"""CIFAR-10: DDPM++ network, sub-VP SDE, continuous time.

    python main.py --config configs/subvp/cifar10_ddpmpp_continuous.py \
        --workdir results/cifar10_subvp_ddpmpp/ --mode train

From Score-SDE (arXiv 2011.13456).
"""

from configs.presets import CIFAR10, DDPMPP, SUBVP, build


def get_config():
    return build(CIFAR10, DDPMPP, SUBVP)
