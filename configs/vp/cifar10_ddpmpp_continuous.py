"""CIFAR-10: DDPM++ network, VP SDE, continuous time.

    python main.py --config configs/vp/cifar10_ddpmpp_continuous.py --workdir results/cifar10_vp_ddpmpp/ --mode train

From Score-SDE (arXiv 2011.13456).
"""

from configs.presets import CIFAR10, DDPMPP, VP, build


def get_config():
    return build(CIFAR10, DDPMPP, VP)
