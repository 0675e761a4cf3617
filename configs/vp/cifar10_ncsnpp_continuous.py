"""CIFAR-10: NCSN++ network, VP SDE, continuous time.

    python main.py --config configs/vp/cifar10_ncsnpp_continuous.py --workdir results/cifar10_vp_ncsnpp/ --mode train

From Score-SDE (arXiv 2011.13456).
"""

from configs.presets import CIFAR10, NCSNPP, POSITIONAL, VP, build


def get_config():
    return build(CIFAR10, NCSNPP, POSITIONAL, VP)
