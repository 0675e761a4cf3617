"""CIFAR-10: NCSN++ network, VE SDE, discrete scales (SMLD).

    python main.py --config configs/ve/cifar10_ncsnpp.py --workdir results/cifar10_ve_ncsnpp_discrete/ --mode train

From Score-SDE (arXiv 2011.13456).
"""

from configs.presets import CIFAR10, DISCRETE, NCSNPP_DISCRETE, VE, build


def get_config():
    return build(CIFAR10, NCSNPP_DISCRETE, VE, DISCRETE)
