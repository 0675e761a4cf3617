"""CelebA-HQ, 1024x1024: NCSN++ network, VE SDE, continuous time.

    python main.py --config configs/ve/celebahq_ncsnpp_continuous.py \
        --workdir results/celebahq_1024_ve_ncsnpp/ --mode train

From Score-SDE (arXiv 2011.13456), which sums the loss here and averages it for FFHQ.
"""

from configs.presets import CELEBAHQ, NCSNPP_1024, SIZE_1024, SUM_LOSS, VE_1024, build


def get_config():
    return build(CELEBAHQ, SIZE_1024, NCSNPP_1024, VE_1024, SUM_LOSS)
