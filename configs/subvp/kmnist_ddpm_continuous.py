"""KMNIST: DDPM network, sub-VP SDE, continuous time.

    python main.py --config configs/subvp/kmnist_ddpm_continuous.py --workdir results/kmnist/ --mode train

Published with LMD (arXiv 2302.10326). Grey images of 28x28 pixels become three equal channels of 32x32.
"""

from configs.presets import DDPM, KMNIST, SUBVP, build


def get_config():
    # The batch size is as published and looks like a leftover of a test: the other data sets have 128.
    return build(KMNIST, DDPM, SUBVP, {"training.batch_size": 4})
