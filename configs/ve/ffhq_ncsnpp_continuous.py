"""FFHQ, 1024x1024: NCSN++ network, VE SDE, continuous time.

    python main.py --config configs/ve/ffhq_ncsnpp_continuous.py --workdir results/ffhq_1024_ve_ncsnpp/ --mode train

From Score-SDE (arXiv 2011.13456).
"""

from configs.presets import FFHQ, NCSNPP_1024, SIZE_1024, VE_1024, build


def get_config():
    return build(FFHQ, SIZE_1024, NCSNPP_1024, VE_1024)
