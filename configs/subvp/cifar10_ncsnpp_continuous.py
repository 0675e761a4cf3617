"""CIFAR-10: NCSN++ network, sub-VP SDE, continuous time.

    python main.py --config configs/subvp/cifar10_ncsnpp_continuous.py \
        --workdir results/cifar10_subvp_ncsnpp/ --mode train

From Score-SDE (arXiv 2011.13456).
"""

from configs.presets import CIFAR10, NCSNPP, POSITIONAL, SUBVP, build


def get_config():
    return build(CIFAR10, NCSNPP, POSITIONAL, SUBVP)
