"""SVHN: DDPM network, sub-VP SDE, continuous time.

    python main.py --config configs/subvp/svhn_ddpm_continuous.py --workdir results/svhn/ --mode train

Published with LMD (arXiv 2302.10326). As re-run in arXiv 2405.11881, table 3, with LPIPS:
ROC-AUC 0.919 against CIFAR-10, 0.890 CelebA, 0.881 CIFAR-100, 0.914 Textures.
"""

from configs.presets import DDPM, SUBVP, SVHN, build


def get_config():
    return build(SVHN, DDPM, SUBVP)
