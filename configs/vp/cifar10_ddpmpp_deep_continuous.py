"""CIFAR-10: deep DDPM++ network, VP SDE, continuous time.

    python main.py --config configs/vp/cifar10_ddpmpp_deep_continuous.py \
        --workdir results/cifar10_vp_ddpmpp_deep/ --mode train

From Score-SDE (arXiv 2011.13456): twice the residual blocks.
"""

from configs.presets import CIFAR10, DDPMPP, DEEP, VP, build


def get_config():
    return build(CIFAR10, DDPMPP, DEEP, VP)
