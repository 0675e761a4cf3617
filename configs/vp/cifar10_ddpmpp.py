"""CIFAR-10: DDPM++ network, VP SDE, discrete steps.

    python main.py --config configs/vp/cifar10_ddpmpp.py --workdir results/cifar10_vp_ddpmpp_discrete/ --mode train

From Score-SDE (arXiv 2011.13456).
"""

from configs.presets import CIFAR10, DDPMPP, VP_DISCRETE, build


def get_config():
    return build(CIFAR10, DDPMPP, VP_DISCRETE)
