"""LSUN church, 256x256: DDPM network, VP SDE, discrete steps: the original DDPM.

    python main.py --config configs/vp/ddpm/church.py --workdir results/church_vp_ddpm/ --mode train

From Score-SDE (arXiv 2011.13456), after arXiv 2006.11239.
"""

from configs.presets import CHURCH, DDPM_256, SIZE_256, VP_DISCRETE, build


def get_config():
    return build(CHURCH, SIZE_256, DDPM_256, VP_DISCRETE)
