"""CIFAR-10: deep DDPM++ network, sub-VP SDE, continuous time.

    python main.py --config configs/subvp/cifar10_ddpmpp_deep_continuous.py \
        --workdir results/cifar10_subvp_ddpmpp_deep/ --mode train

From Score-SDE (arXiv 2011.13456): twice the residual blocks.
"""

from configs.presets import CIFAR10, DDPMPP, DEEP, SUBVP, build


def get_config():
    return build(CIFAR10, DDPMPP, DEEP, SUBVP)
