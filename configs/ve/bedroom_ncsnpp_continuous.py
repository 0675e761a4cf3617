"""LSUN bedroom, 256x256: NCSN++ network, VE SDE, continuous time.

    python main.py --config configs/ve/bedroom_ncsnpp_continuous.py --workdir results/bedroom_ve_ncsnpp/ --mode train

From Score-SDE (arXiv 2011.13456).
"""

from configs.presets import BEDROOM, NCSNPP_256, SIZE_256, VE_256, build


def get_config():
    return build(BEDROOM, SIZE_256, NCSNPP_256, VE_256)
