"""CIFAR-10: DDPM network, sub-VP SDE, continuous time.

    python main.py --config configs/subvp/cifar10_ddpm_continuous.py --workdir results/cifar10/ --mode train

Published with LMD (arXiv 2302.10326), from Score-SDE (arXiv 2011.13456). As re-run in arXiv 2405.11881, table 3,
with LPIPS: ROC-AUC 0.992 against SVHN, 0.557 CelebA, 0.604 CIFAR-100, 0.667 Textures.

35.7 million parameters. On one NVIDIA H200 a training step takes 70 ms, so all 1.3 million take 25 hours; a network
evaluation, compiled in bfloat16, takes 35 us of a batch of 512, so 10,000 an image take 0.35 s.
"""

from configs.presets import CIFAR10, DDPM, SUBVP, build


def get_config():
    return build(CIFAR10, DDPM, SUBVP)
