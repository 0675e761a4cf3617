"""CelebA-HQ, 256x256: DDPM network, VP SDE, discrete steps: the original DDPM.

    python main.py --config configs/vp/ddpm/celebahq.py --workdir results/celebahq_vp_ddpm/ --mode train

From Score-SDE (arXiv 2011.13456), after arXiv 2006.11239.
"""

from configs.presets import CELEBAHQ, DDPM_256, SIZE_256, VP_DISCRETE, build


def get_config():
    return build(CELEBAHQ, SIZE_256, DDPM_256, VP_DISCRETE)
