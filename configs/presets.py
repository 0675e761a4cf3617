"""What configs are built of: data sets, networks and SDEs, each a table of `section.field` values over the base tree.

From the published LMD and Score-SDE (arXiv 2011.13456, appendix H) configs.  Later parts of a build win.
"""

from configs.base import ABSENT, TREE, from_dict


def build(*parts):
    """The base tree updated by each part in turn, without the fields that stay absent.

    Args:
        parts: dicts from a field's path, such as "model.nf", to its value, or to `ABSENT` to leave it out.

    Returns:
        ConfigDict: of JSON types, and tuples.

    Raises:
        KeyError: if a part names a field that the tree does not have.
    """
    tree = {name: dict(value) if isinstance(value, dict) else value for name, value in TREE.items()}
    for path, value in (item for part in parts for item in part.items()):
        section, _, name = path.rpartition(".")
        fields = tree[section] if section else tree
        if name not in fields:
            raise KeyError(f"the config tree of configs/base.py has no field '{path}'")
        fields[name] = value
    return from_dict({name: _present(value) for name, value in tree.items()})


def _present(value):
    if not isinstance(value, dict):
        return value
    return {name: field for name, field in value.items() if field is not ABSENT}


def without(*paths):
    """A part that leaves fields out."""
    return dict.fromkeys(paths, ABSENT)


# --------------------------------------------------------------------------------------------- data sets, 32x32

CIFAR10 = {"data.dataset": "CIFAR10"}
CIFAR100 = {"data.dataset": "CIFAR100"}
SVHN = {"data.dataset": "SVHN", "data.random_flip": False}
MNIST = {"data.dataset": "MNIST", "data.random_flip": False}
KMNIST = {"data.dataset": "KMNIST", "data.random_flip": False}
FASHION_MNIST = {"data.dataset": "FASHION_MNIST"}

# ---------------------------------------------------------------------------------------- data sets of large images

_LARGE = {
    "training.snapshot_freq": 50000,
    **without("eval.n_samples", "eval.recon_ckpt"),
}

CELEBA = {
    **_LARGE,
    "data.dataset": "CELEBA",
    "data.image_size": 64,
    "model.sigma_max": 90.0,
    "model.sigma_begin": 90.0,
    "sampling.snr": 0.17,
    "training.snapshot_freq_for_preemption": 10000,
    "eval.begin_ckpt": 1,
    "eval.enable_sampling": True,
}

_HIGH_RESOLUTION = {
    **_LARGE,
    "model.dropout": 0.0,
    "training.n_iters": 2400001,
    "eval.end_ckpt": 96,
}

SIZE_256 = {
    **_HIGH_RESOLUTION,
    "data.image_size": 256,
    "model.sigma_max": 378.0,
    "sampling.snr": 0.075,
    "training.batch_size": 64,
    "eval.begin_ckpt": 50,
    "eval.batch_size": 512,
    "eval.enable_sampling": True,
}

SIZE_1024 = {
    **_HIGH_RESOLUTION,
    "data.image_size": 1024,
    "model.sigma_max": 1348.0,
    "sampling.snr": 0.15,
    "training.batch_size": 8,
    "eval.begin_ckpt": 1,
    "optim.amsgrad": False,
    **without("model.beta_min", "model.beta_max"),
    **without("eval.enable_loss", "eval.enable_sampling", "eval.enable_bpd", "eval.bpd_dataset"),
}

BEDROOM = {"data.dataset": "LSUN", "data.category": "bedroom"}
CHURCH = {"data.dataset": "LSUN", "data.category": "church_outdoor"}
CELEBAHQ = {"data.dataset": "CelebAHQ", "data.tfrecords_path": "/atlas/u/yangsong/celeba_hq/-r10.tfrecords"}
FFHQ = {"data.dataset": "FFHQ", "data.tfrecords_path": "/raid/song/ffhq-dataset/ffhq/ffhq-r10.tfrecords"}

_FACES_256 = {**SIZE_256, "model.sigma_max": 348.0}
CELEBAHQ_256 = {**CELEBAHQ, **_FACES_256, "data.tfrecords_path": "/home/yangsong/ncsc/celebahq/r08.tfrecords"}
FFHQ_256 = {**FFHQ, **_FACES_256, "data.tfrecords_path": "/home/yangsong/ncsc/ffhq/ffhq-r08.tfrecords"}

# ---------------------------------------------------------------------------------------------------------- networks

DDPM = {"model.name": "ddpm"}

# DDPM of 256x256 images (arXiv 2006.11239): VP-SDE, discrete.
DDPM_256 = {**DDPM, "model.ch_mult": (1, 1, 2, 2, 4, 4), "optim.lr": 2e-5}

CONV_3X3 = {"model.conv_size": 3}

_PLUS_PLUS = {
    **CONV_3X3,
    "model.name": "ncsnpp",
    "model.num_res_blocks": 4,
    "model.resblock_type": "biggan",
    "model.attention_type": "ddpm",
    "model.fir_kernel": (1, 3, 3, 1),
    "model.fourier_scale": 16.0,
    "model.init_scale": 0.0,
    "model.progressive": "none",
    "model.progressive_combine": "sum",
    "model.skip_rescale": True,
}

POSITIONAL = {"model.embedding_type": "positional"}

# DDPM++: NCSN++ without FIR filters and image pyramids.
DDPMPP = {**_PLUS_PLUS, **POSITIONAL, "model.fir": False, "model.progressive_input": "none"}

NCSNPP = {**_PLUS_PLUS, "model.fir": True, "model.progressive_input": "residual"}

# The first NCSN++, of discrete scales.
NCSNPP_DISCRETE = {**NCSNPP, **POSITIONAL, **without("model.fourier_scale")}

_NCSNPP_HIGH_RESOLUTION = {**NCSNPP, "model.progressive": "output_skip", "model.progressive_input": "input_skip"}

NCSNPP_256 = {**_NCSNPP_HIGH_RESOLUTION, "model.ch_mult": (1, 1, 2, 2, 2, 2, 2), "model.num_res_blocks": 2}

NCSNPP_1024 = {
    **_NCSNPP_HIGH_RESOLUTION,
    "model.nf": 16,
    "model.ch_mult": (1, 2, 4, 8, 16, 32, 32, 32),
    "model.num_res_blocks": 1,
}

# Twice the residual blocks, fewer steps.
DEEP = {"model.num_res_blocks": 8, "training.n_iters": 950001}

# -------------------------------------------------------------------------------------------------------------- SDEs

SUBVP = {"training.sde": "subvpsde"}
VP = {"training.sde": "vpsde"}

_VE = {
    "training.sde": "vesde",
    "data.centered": False,
    "model.scale_by_sigma": True,
    "sampling.predictor": "reverse_diffusion",
    "sampling.corrector": "langevin",
}
SUM_LOSS = {"training.reduce_mean": False}
VE = {**_VE, **SUM_LOSS, "model.ema_rate": 0.999}

_SCALES_2000 = {"model.num_scales": 2000}
VE_256 = {**VE, **_SCALES_2000}
VE_1024 = {**_VE, **_SCALES_2000}

# Trained on the N scales alone: DDPM for VP, SMLD for VE.
DISCRETE = {"training.continuous": False}
VP_DISCRETE = {**VP, **DISCRETE, "sampling.predictor": "ancestral_sampling"}
