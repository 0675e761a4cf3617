"""The whole config tree, once, with what every value means.

A config is this tree updated by the parts it is built of (presets.py).  The values here are those of the published
32x32 configs; `ABSENT` marks a field that a part has to give, or that only some configs have.

Types matter on the command line: `--config.training.batch_size=64` replaces an int by an int, a float field also takes
`50`, a tuple is written `--config.model.ch_mult="(1,2,2)"`.  The ranges and choices are in `fields.py`.
"""

import difflib

from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from basics.console import UserError
from configs.fields import FIELDS, NEEDED_WITH, OPTIONAL, WIDTH, check_value

ABSENT = object()

TREE = {
    "seed": 42,  # of initialisation, data order, training noise and samples
    "device": "auto",  # auto (the GPU if there is one), cpu, cuda or cuda:i
    "data": {
        "dataset": ABSENT,  # a name in the table of datasets.py, or the path of your own images
        "test_dataset": "",  # the test images, named like dataset; empty: a named set's own, else a share held back
        "category": ABSENT,  # LSUN: which of its categories
        "tfrecords_path": ABSENT,  # the publishers' own TFRecords; kept as published, not read
        "image_size": 32,  # height and width in pixels
        "num_channels": 3,  # 3, or 1 for grey images
        "centered": True,  # the model sees [-1, 1]; else [0, 1], which the network rescales itself
        "random_flip": True,  # flip training images left to right with probability 1/2
        "uniform_dequantization": False,  # add U(0, 1)/256 noise: the images as (255 x + u)/256
    },
    "model": {
        "name": ABSENT,  # ddpm or ncsnpp
        "nf": 128,  # channels of the first level
        "ch_mult": (1, 2, 2, 2),  # channels of each level as multiples of nf; one halving of the size between levels
        "num_res_blocks": 2,  # residual blocks per level on the way down; one more on the way up
        "attn_resolutions": (16,),  # image sizes at which attention follows the residual blocks
        "resamp_with_conv": True,  # convolve when changing the size, besides averaging or interpolating
        "dropout": 0.1,  # probability inside residual blocks while training
        "nonlinearity": "swish",  # swish, relu, elu or lrelu
        "normalization": "GroupNorm",  # GroupNorm alone
        "conditional": True,  # the network is told the noise level
        "embedding_type": "fourier",  # ncsnpp: fourier or positional; ddpm is always positional
        "fourier_scale": ABSENT,  # ncsnpp, fourier: standard deviation of the random frequencies
        "scale_by_sigma": False,  # divide the network's output by the noise level
        "ema_rate": 0.9999,  # decay of the moving average of the weights
        # NCSN++ alone
        "resblock_type": ABSENT,  # biggan (resamples inside, both paths) or ddpm
        "fir": ABSENT,  # resample with fir_kernel; else nearest neighbours and 2x2 means
        "fir_kernel": ABSENT,  # taps along one axis, normalised to sum 1
        "skip_rescale": ABSENT,  # divide sums of two paths by sqrt(2)
        "progressive": ABSENT,  # images on the way up: none, output_skip or residual
        "progressive_input": ABSENT,  # images on the way down: none, input_skip or residual
        "progressive_combine": ABSENT,  # how input_skip joins: sum or cat
        "init_scale": ABSENT,  # scale of the last weights of each block at the start; 0 means 1e-10
        "attention_type": ABSENT,  # ddpm alone: one head over all pixels
        "conv_size": ABSENT,  # kernel width of the convolutions; 3 alone
        # The SDE's noise levels
        "num_scales": 1000,  # N, discretisation steps: training scales and sampling steps
        "beta_min": 0.1,  # VP and sub-VP: beta(0)
        "beta_max": 20.0,  # VP and sub-VP: beta(1)
        "sigma_min": 0.01,  # VE: sigma(0)
        "sigma_max": 50.0,  # VE: sigma(1), about the largest distance between two training images
        "sigma_begin": ABSENT,  # older name of sigma_max; kept as published, not read
    },
    "training": {
        "sde": ABSENT,  # vpsde, subvpsde or vesde
        "continuous": True,  # train on continuous t; else on the N discrete scales (DDPM, SMLD)
        "likelihood_weighting": False,  # weight the loss by g(t)^2 instead of std(t)^2
        "reduce_mean": True,  # average the loss over pixels; else half the sum
        "batch_size": 128,
        "n_iters": 1300001,  # the last step's number
        # the next four: 0 for never (the last step is saved all the same, as checkpoint_1 if snapshot_freq is 0)
        "log_freq": 50,  # steps between lines of the log
        "eval_freq": 100,  # steps between losses on a test batch
        "snapshot_freq": 10000,  # steps between numbered checkpoints
        "snapshot_freq_for_preemption": 5000,  # steps between overwrites of the checkpoint that a restart resumes from
        "snapshot_sampling": True,  # draw samples at every numbered checkpoint
        # Of this program alone
        "precision": "auto",  # of the network: bf16, tf32, fp32, or auto (bf16 on a GPU that has it, else fp32)
        "compile": "auto",  # compile the network: on, off, or auto (on a GPU, for a run long enough)
    },
    "sampling": {
        "method": "pc",  # pc (predictor-corrector) or ode (probability flow, RK45)
        "predictor": "euler_maruyama",  # euler_maruyama, reverse_diffusion, ancestral_sampling or none
        "corrector": "none",  # langevin, ald or none
        "n_steps_each": 1,  # corrector steps per predictor step
        "snr": 0.16,  # the corrector's target signal-to-noise ratio
        "noise_removal": True,  # return the last step's mean, without its noise; after an ODE such a step's mean
        "probability_flow": False,  # follow the probability-flow ODE with the predictor
        # Of this program alone; the defaults are the published behaviour
        "sampler": "published",  # published (the predictor above), ddim, dpmpp_2m or sde_dpmpp_2m
        "steps": 0,  # steps of the predictor; 0: model.num_scales
        "time_grid": "uniform",  # times even in t (uniform) or in ln(alpha / std) (lambda)
        "t_start": 1.0,  # the first time; below 1 in recon.py alone
        "t_end": 0.0,  # the last time; 0: 1e-3, for VE 1e-5
        "eta": 1.0,  # ddim: share of fresh noise, from 0 (deterministic) to 1 (ancestral)
        "constraint": "replace",  # how recon.py holds known pixels: in the state (replace), the prediction (project)
        "returns": 0,  # how often each step is taken back and repeated (RePaint)
        "lift": "mask",  # what recon.py takes from an image: mask, noise (to t_start), or both
    },
    "optim": {
        "optimizer": "Adam",
        "lr": 2e-4,
        "beta1": 0.9,  # beta2 is 0.999
        "eps": 1e-8,
        "weight_decay": 0.0,
        "amsgrad": ABSENT,  # 1024x1024 configs as published; not read
        "warmup": 5000,  # steps over which lr rises from 0
        "cooldown": 0,  # last steps over which lr falls to 0; of a shorter training, all
        "grad_clip": 1.0,  # largest norm of the gradient; negative: no clipping
    },
    "eval": {
        "begin_ckpt": 9,  # first numbered checkpoint to evaluate
        "end_ckpt": 26,  # last one
        "batch_size": 1024,
        "enable_loss": True,  # compute the loss on the test set
        "enable_sampling": False,  # draw num_samples samples per checkpoint and score them (FID, KID, Inception score)
        "num_samples": 50000,
        "enable_bpd": False,  # compute likelihoods in bits per dimension
        "bpd_dataset": "test",  # of the test set (every image dequantised 5 times) or of the train set (once)
        "n_samples": 50,  # kept as published; not read (recon.py's flags say what to reconstruct)
        "recon_ckpt": 25,  # kept as published; not read (recon.py's --ckpt_path says which)
    },
}


def from_dict(values):
    """A ConfigDict of a nested dict, lists turned into tuples: the inverse of `to_dict`.

    Args:
        values: nested dicts of numbers, text, booleans, lists and tuples, as `json.load` gives them.

    Returns:
        ConfigDict: unlocked; every field can be overridden on the command line.
    """
    return ConfigDict(_convert(values, tuple))


def to_dict(config):
    """A config as nested dicts of JSON types (tuples become lists), to be stored in checkpoints and manifests."""
    return _convert(config, list)


def _convert(value, sequence):
    if isinstance(value, (dict, ConfigDict)):
        return {name: _convert(field, sequence) for name, field in value.items()}
    return sequence(value) if isinstance(value, (list, tuple)) else value


def typed(flag):
    """The paths, such as "sampling.snr", of the fields that a command line set; `flag` is `FLAGS["config"]`."""
    return set(config_flags.get_override_values(flag))


# ------------------------------------------------------------------------------------------------------- checking


def check(config):
    """Holds a whole config against `fields.FIELDS`, before anything is made from it.

    Args:
        config: what a config file's `get_config()` returned, with its overrides.

    Raises:
        UserError: a section or field is missing or unknown (the nearest name is given), a value is of another type, out
            of range, not finite or none of the choices, or two values contradict each other.
    """
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config() of the config file gave a {type(config).__name__}; have it return a ConfigDict")
    values = {}
    for name, kind in FIELDS.items():
        if name not in config:
            raise UserError(f"the config lacks config.{name}; add it (configs/base.py lists all fields)")
        if not isinstance(kind, dict):
            values[name] = config[name]
            continue
        if not isinstance(config[name], ConfigDict):
            raise UserError(f"config.{name} is {config[name]!r}; it must be a section of fields as in configs/base.py")
        values |= {f"{name}.{field}": value for field, value in config[name].items()}
    kinds = _flat(FIELDS)
    for path in [*values, *(name for name in config if name not in FIELDS)]:
        if path not in kinds:
            raise UserError(f"the config has an unknown field config.{path}{_nearest(path, kinds)}")
    for path in kinds:
        if path in values:
            check_value(f"config.{path}", values[path], kinds[path])
        elif _flat(TREE)[path] is not ABSENT and path not in OPTIONAL:
            raise UserError(f"the config lacks config.{path}; add it (usually {_flat(TREE)[path]!r})")
    _check_together(values)


def _flat(tree):
    """Nested sections as one dict: path, such as "model.nf", -> value."""
    flat = {name: value for name, value in tree.items() if not isinstance(value, dict)}
    sections = {name: value for name, value in tree.items() if isinstance(value, dict)}
    return flat | {f"{name}.{field}": value for name, section in sections.items() for field, value in section.items()}


def _nearest(path, kinds):
    """What to add to a message about an unknown field: the field that was probably meant."""
    section, _, name = path.rpartition(".")
    names = [known.rpartition(".")[2] for known in kinds]
    close = [name, *difflib.get_close_matches(name, names)]
    found = [known for guess in close for known in kinds if known.rpartition(".")[2] == guess]
    guess = sorted(found, key=lambda known: known.rpartition(".")[0] != section)[:1]  # rather in its own section
    return f"; did you mean config.{guess[0]}?" if guess else "; remove it (configs/base.py lists all fields)"


def _check_together(values):
    """Refuses values that are fine by themselves and contradict each other; `values` path -> value."""
    for path, causes, needed in NEEDED_WITH:
        if (cause := values.get(path)) in causes or (isinstance(cause, str) and cause.lower() in causes):
            for name in needed:
                if name not in values:
                    raise UserError(f"the config lacks config.{name}, which config.{path}={cause} needs; add it")
    _check_order(values, "model.sigma_min", "model.sigma_max", strictly=True)
    _check_order(values, "model.beta_min", "model.beta_max")
    _check_order(values, "eval.begin_ckpt", "eval.end_ckpt")
    width = values["model.nf"] * max(values["model.ch_mult"])
    if width > WIDTH:
        raise UserError(
            f"config.model.ch_mult {values['model.ch_mult']} times config.model.nf {values['model.nf']} makes "
            f"{width:,} channels; a level has at most {WIDTH:,}, so lower one of them"
        )
    _check_labels(values)
    scales, largest = values["model.num_scales"], values.get("model.beta_max", 0)
    if values["training.sde"].lower() == "vpsde" and not values["training.continuous"] and scales <= largest:
        raise UserError(
            f"config.model.num_scales is {scales}; discrete training on the VP SDE needs more than {largest:g} "
            "(config.model.beta_max)"
        )


def _check_labels(values):
    """Refuses a network that cannot read what its training would tell it of the noise, see `ScoreModel`."""
    continuous, fourier = values["training.continuous"], False
    if values["model.name"] == "ncsnpp":
        fourier = values["model.embedding_type"].lower() == "fourier"
    if fourier and not continuous:
        raise UserError(
            "config.training.continuous is False: the network is told the number of a step, of which the embedding "
            "'fourier' cannot take the logarithm; set config.model.embedding_type=positional or "
            "config.training.continuous=True"
        )
    tells_sigma = continuous and values["training.sde"].lower() == "vesde"
    if tells_sigma and values["model.scale_by_sigma"] and not fourier:
        raise UserError(
            "config.training.continuous is True: on the VE SDE the network is told the noise level, but this one "
            "divides by that of a step whose number it is told (config.model.scale_by_sigma); set "
            "config.training.continuous=False, or config.model.name=ncsnpp with config.model.embedding_type=fourier"
        )


def _check_order(values, first, second, strictly=False):
    low, high = values.get(first), values.get(second)
    if low is None or high is None or low < high or (low == high and not strictly):
        return
    wanted = "below" if strictly else "at most"
    raise UserError(f"config.{first} is {low}; it must be {wanted} config.{second}, which is {high}")
