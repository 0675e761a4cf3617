"""LSUN church, 256x256: NCSN++ network, VE SDE, continuous time.

    python main.py --config configs/ve/church_ncsnpp_continuous.py --workdir results/church_ve_ncsnpp/ --mode train

From Score-SDE (arXiv 2011.13456).
"""

from configs.presets import CHURCH, NCSNPP_256, SIZE_256, VE_256, build


def get_config():
    return build(CHURCH, SIZE_256, NCSNPP_256, VE_256, {"model.sigma_max": 380.0})
