"""FFHQ, 256x256: NCSN++ network, VE SDE, continuous time.

    python main.py --config configs/ve/ffhq_256_ncsnpp_continuous.py --workdir results/ffhq_256_ve_ncsnpp/ --mode train

From Score-SDE (arXiv 2011.13456).
"""

from configs.presets import FFHQ_256, NCSNPP_256, VE_256, build


def get_config():
    return build(FFHQ_256, NCSNPP_256, VE_256)
