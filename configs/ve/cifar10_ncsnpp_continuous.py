"""CIFAR-10: NCSN++ network, VE SDE, continuous time.

    python main.py --config configs/ve/cifar10_ncsnpp_continuous.py --workdir results/cifar10_ve_ncsnpp/ --mode train

From Score-SDE (arXiv 2011.13456).
"""

from configs.presets import CIFAR10, NCSNPP, VE, build


def get_config():
    return build(CIFAR10, NCSNPP, VE)
