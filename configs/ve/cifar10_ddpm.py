"""CIFAR-10: DDPM network, VE SDE, discrete scales (SMLD).

    python main.py --config configs/ve/cifar10_ddpm.py --workdir results/cifar10_ve_ddpm/ --mode train

From Score-SDE (arXiv 2011.13456).
"""

from configs.presets import CIFAR10, CONV_3X3, DDPM, DISCRETE, VE, build


def get_config():
    return build(CIFAR10, DDPM, CONV_3X3, VE, DISCRETE)
