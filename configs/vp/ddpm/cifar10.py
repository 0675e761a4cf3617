"""CIFAR-10: DDPM network, VP SDE, discrete steps: the original DDPM.

    python main.py --config configs/vp/ddpm/cifar10.py --workdir results/cifar10_vp_ddpm_discrete/ --mode train

From Score-SDE (arXiv 2011.13456), after arXiv 2006.11239.
"""

from configs.presets import CIFAR10, DDPM, VP_DISCRETE, build


def get_config():
    return build(CIFAR10, DDPM, VP_DISCRETE)
