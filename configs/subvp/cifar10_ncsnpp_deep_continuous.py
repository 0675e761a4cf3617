"""CIFAR-10: deep NCSN++ network, sub-VP SDE, continuous time.

    python main.py --config configs/subvp/cifar10_ncsnpp_deep_continuous.py \
        --workdir results/cifar10_subvp_ncsnpp_deep/ --mode train

From Score-SDE (arXiv 2011.13456): twice the residual blocks.
"""

from configs.presets import CIFAR10, DEEP, NCSNPP, POSITIONAL, SUBVP, build


def get_config():
    return build(CIFAR10, NCSNPP, POSITIONAL, DEEP, SUBVP)
