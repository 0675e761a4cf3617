"""CelebA, 64x64: NCSN++ network, VE SDE, discrete scales (SMLD).

    python main.py --config configs/ve/celeba_ncsnpp.py --workdir results/celeba_ve_ncsnpp/ --mode train

From Score-SDE (arXiv 2011.13456).
"""

from configs.presets import CELEBA, DISCRETE, NCSNPP_DISCRETE, VE, build


def get_config():
    return build(CELEBA, NCSNPP_DISCRETE, VE, DISCRETE)
