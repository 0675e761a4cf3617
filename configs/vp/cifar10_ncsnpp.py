"""CIFAR-10: NCSN++ network, VP SDE, discrete steps.

    python main.py --config configs/vp/cifar10_ncsnpp.py --workdir results/cifar10_vp_ncsnpp_discrete/ --mode train

From Score-SDE (arXiv 2011.13456).
"""

from configs.presets import CIFAR10, DISCRETE, NCSNPP_DISCRETE, VP, build


def get_config():
    return build(CIFAR10, NCSNPP_DISCRETE, VP, DISCRETE, {"sampling.predictor": "reverse_diffusion"})
