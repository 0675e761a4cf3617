"""DDPM weights of Hugging Face's diffusers, such as google/ddpm-cifar10-32, as VP models of this program.

A local folder holds `config.json` of a `UNet2DModel`, `diffusion_pytorch_model.safetensors` and perhaps
`scheduler_config.json`; or it is a pipeline with such files in `unet/` and `scheduler/`.  Its network is this program's
DDPM with attention after all residual blocks on the way up; its labels are the steps 0..N-1 and its output is the
noise, as in a discrete VP model.

Names, theirs to ours (i: level; j: block in it; k: place in the list of stages and resamplings):

    conv_in, conv_norm_out, conv_out          conv_in, norm_out, conv_out
    time_embedding.linear_1, .linear_2        time.dense0, time.dense1
    down_blocks.i.resnets.j, .attentions.j    down[k].block, down[k].attention
    down_blocks.i.downsamplers.0              down[k]
    mid_block.resnets.0, .attentions.0, .resnets.1    middle[0], middle[1], middle[2]
    up_blocks.i.resnets.j, .attentions.j      up[k].block, up[k].attention        (i counts from the smallest images)
    up_blocks.i.upsamplers.0                  up[k]

and inside these the names of `PARTS`.  A projection's `weight` (out, in), or (out, in, 1, 1), is our `W` transposed.
"""

import json
import math
from pathlib import Path

import torch

from basics import tensor_files
from basics.console import UserError, counted
from configs import presets
from models import layers
from models.ddpm import DDPM, Stage

CONFIG, SCHEDULER, WEIGHTS = "config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors"

# The fields of config.json that this program's DDPM has no choice in: what diffusers takes where the field is missing,
# and the values that the DDPM can express.
FIXED = {
    "time_embedding_type": ("positional", ["positional"]),
    "freq_shift": (0, [1]),
    "flip_sin_to_cos": (True, [False]),
    "mid_block_type": ("UNetMidBlock2D", ["UNetMidBlock2D"]),
    "mid_block_scale_factor": (1, [1]),
    "downsample_padding": (1, [0]),
    "downsample_type": ("conv", ["conv"]),
    "upsample_type": ("conv", ["conv"]),
    "act_fn": ("silu", ["silu", "swish"]),
    "norm_num_groups": (32, [32]),
    "attn_norm_num_groups": (None, [None, 32]),
    "norm_eps": (1e-5, [layers.GROUP_NORM_EPS]),
    "resnet_time_scale_shift": ("default", ["default"]),
    "add_attention": (True, [True]),
    "class_embed_type": (None, [None]),
    "num_class_embeds": (None, [None]),
}

# The other fields, with what diffusers takes where one is missing.
FREE = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_dim": None,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "num_train_timesteps": None,
}

# scheduler_config.json: the same for the noise schedule.
SCHEDULE_FIXED = {
    "beta_schedule": ("linear", ["linear"]),
    "prediction_type": ("epsilon", ["epsilon"]),
    "trained_betas": (None, [None]),
    "rescale_betas_zero_snr": (False, [False]),
}
SCHEDULE_FREE = {"beta_start": 1e-4, "beta_end": 2e-2, "num_train_timesteps": 1000}
_LARGEST_JSON = 1 << 20  # bytes
ATTENDED = {"DownBlock2D": False, "AttnDownBlock2D": True}
UP = {"DownBlock2D": "UpBlock2D", "AttnDownBlock2D": "AttnUpBlock2D"}

# What the weights determine of a config.
DETERMINED = {
    "data": ("image_size", "num_channels", "centered"),
    "model": (
        "name",
        "nf",
        "ch_mult",
        "num_res_blocks",
        "attn_resolutions",
        "resamp_with_conv",
        "nonlinearity",
        "conditional",
        "scale_by_sigma",
        "num_scales",
        "beta_min",
        "beta_max",
    ),
    "training": ("sde", "continuous"),
}

# Theirs -> ours, inside each kind of part.
PARTS = {
    layers.ResidualBlock: {
        "norm1": "norm0",
        "conv1": "conv0",
        "time_emb_proj": "dense",
        "norm2": "norm1",
        "conv2": "conv1",
        "conv_shortcut": "shortcut",
    },
    layers.Attention: {"group_norm": "norm", "to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "out"},
    layers.TimeEmbedding: {"linear_1": "dense0", "linear_2": "dense1"},
    layers.Downsample: {"conv": "conv"},
    layers.Upsample: {"conv": "conv"},
}
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}  # older files


# ------------------------------------------------------------------------------------------------------- the files


def weights_path(folder):
    """The file of weights of a diffusers folder.

    Raises:
        UserError: there is none, or the folder holds them in another format.
    """
    path = _network_folder(folder) / WEIGHTS
    if path.is_file():
        return path
    if path.with_suffix(".bin").is_file():
        raise UserError(
            f"{path.parent} holds its weights as {path.stem}.bin alone; with diffusers, "
            f"UNet2DModel.from_pretrained(FOLDER).save_pretrained(FOLDER) makes {WEIGHTS}"
        )
    raise UserError(f"there is no {WEIGHTS} in {path.parent}; copy it beside {CONFIG}")


def read_weights(folder):
    """Diffusers' name -> tensor, under the names of now, of a diffusers folder.

    Raises:
        UserError: the file of weights is missing or damaged, or holds two weights of one name.
    """
    path = weights_path(folder)
    try:
        weights, _ = tensor_files.read_safetensors(path)
    except (tensor_files.WrongFile, OSError) as error:
        reason = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else error
        raise UserError(f"{path}: it {reason}; copy it again") from error
    if len({_name_of_now(name) for name in weights}) < len(weights):
        raise UserError(f"{path} holds a weight under its old and its new name; copy the folder again")
    return {_name_of_now(name): value for name, value in weights.items()}


def _name_of_now(name):
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def is_folder(path):
    """Whether a folder is one of diffusers' weights, or seems to be."""
    return (_network_folder(path) / CONFIG).exists() or (_network_folder(path) / WEIGHTS).exists()


def _network_folder(folder):
    inner = Path(folder) / "unet"
    return inner if (inner / CONFIG).is_file() else Path(folder)


def _read_json(path):
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise UserError(f"{path} is too large for a config ({path.stat().st_size:,} bytes); copy it again")
        content = tensor_files.parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read or is no JSON; copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no table of names and values; copy it again")
    return content


def _shown(value):
    """A value of the file as short text."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# -------------------------------------------------------------------------------------------------------- the config


def read_config(folder):
    """The config tree of a diffusers folder: a DDPM network, the discrete VP SDE, and no data set.

    Raises:
        UserError: a file is missing or damaged, or this program's DDPM cannot express the network.
    """
    inner = _network_folder(folder)
    path = inner / CONFIG
    if not path.is_file():
        raise UserError(f"there is no {CONFIG} in {folder}, so it is no folder of diffusers weights; check the path")
    content = _read_json(path)
    if content.get("_class_name") != "UNet2DModel":
        raise UserError(
            f"{path} is of a {str(content.get('_class_name'))[:40]}; only a UNet2DModel can be used as a DDPM"
        )
    fields = _fields(path, content, FIXED, FREE)
    unknown = [name for name in content if name not in {**FIXED, **FREE} and name[:1] != "_" and content[name]]
    if unknown:
        raise UserError(f"{path} has a field that this program does not know: {unknown[0][:40]}; use other weights")
    try:
        part = {**_network_part(path, fields), **_schedule_part(inner)}
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise UserError(f"{path} has values of a wrong type or number ({str(error)[:80]}); copy it again") from error
    return presets.build(presets.DDPM, presets.VP_DISCRETE, part)


def _fields(path, content, fixed, free):
    """The free fields of a config, defaults filled in; raises for a fixed one that has another value."""
    for name, (default, possible) in fixed.items():
        value = content.get(name, default)
        if value not in possible:
            raise UserError(
                f"{path}: {name} is {_shown(value)}, which this program's DDPM cannot express; it has "
                f"{' or '.join(map(json.dumps, possible))}"
            )
    return {name: content.get(name, default) for name, default in free.items()}


def _network_part(path, fields):
    """The part of a config tree that fields of config.json say, after checking them."""
    channels, levels, size = fields["block_out_channels"], fields["down_block_types"], _edge(fields["sample_size"])
    _check_types(fields)
    for name, met, has in _requirements(fields, channels, levels, size):
        if not met:
            raise UserError(
                f"{path}: {name} is {_shown(fields[name])}, which this program's DDPM cannot express; it has {has}"
            )
    return {
        "data.image_size": size,
        "data.num_channels": fields["in_channels"],
        "data.centered": not fields["center_input_sample"],
        "model.nf": channels[0],
        "model.ch_mult": tuple(c // channels[0] for c in channels),
        "model.num_res_blocks": fields["layers_per_block"],
        "model.attn_resolutions": tuple(size // 2**i for i, level in enumerate(levels) if ATTENDED[level]),
        "model.dropout": float(fields["dropout"]),
    }


def _check_types(fields):
    """Raises TypeError or ValueError for fields of config.json that are no numbers or lists of what they should be."""
    channels, levels, dropout = fields["block_out_channels"], fields["down_block_types"], fields["dropout"]
    if not isinstance(channels, list) or not isinstance(levels, list) or not 1 <= len(channels) <= 12:
        raise TypeError("block_out_channels and down_block_types are lists of 1 to 12 levels")
    if not all(_is_count(c, 1 << 16) for c in channels):
        raise ValueError(f"block_out_channels are whole numbers from 1 to {1 << 16}")
    if fields["layers_per_block"] != 0 and not _is_count(fields["layers_per_block"], 64):
        raise ValueError("layers_per_block is a whole number from 1 to 64")
    if not all(type(fields[name]) is int for name in ("in_channels", "out_channels")):
        raise TypeError("in_channels and out_channels are whole numbers")
    if not isinstance(fields["center_input_sample"], bool) or not _is_number(dropout) or not 0 <= dropout <= 1:
        raise ValueError("center_input_sample is true or false, and dropout a number from 0 to 1")


def _is_count(value, most):
    return type(value) is int and 1 <= value <= most


def _is_number(value):
    return type(value) in (int, float) and abs(value) < 1e9 and math.isfinite(value)


def _edge(size):
    """The edge of square images that a `sample_size`, a number or a pair, says; None for others."""
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    return size if _is_count(size, 1 << 14) else None


def _requirements(fields, channels, levels, size):
    """(field, whether the DDPM can express it, what the DDPM has) of every field that it could not always."""
    factor, head = 2 ** (len(channels) - 1), fields["attention_head_dim"]
    attending = {c for c, level in zip(channels, levels, strict=True) if ATTENDED.get(level)} | {channels[-1]}
    mirrored = [UP.get(level) for level in reversed(levels)]
    return [
        ("sample_size", size is not None and size % factor == 0, f"square images, the edge a multiple of {factor}"),
        ("in_channels", fields["in_channels"] in (1, 3), "1 or 3"),
        ("out_channels", fields["out_channels"] == fields["in_channels"], "as many as in_channels"),
        ("block_out_channels", all(c % channels[0] == c % 32 == 0 for c in channels), "multiples of 32 and the first"),
        ("down_block_types", all(level in ATTENDED for level in levels), " and ".join(ATTENDED)),
        ("up_block_types", fields["up_block_types"] == mirrored, "the levels of down_block_types in reverse"),
        ("attention_head_dim", head is None or attending == {head}, "one head, of all channels (null)"),
        ("time_embedding_dim", fields["time_embedding_dim"] in (None, 4 * channels[0]), "4 times the first channels"),
        ("layers_per_block", fields["layers_per_block"] >= 1, "one or more"),
    ]


def _schedule_part(inner):
    """The noise schedule: scheduler_config.json's, or DDPM's where there is none."""
    candidates = [inner / SCHEDULER, *([inner.parent / "scheduler" / SCHEDULER] if inner.name == "unet" else [])]
    path = next((path for path in candidates if path.is_file()), None)
    fields = _fields(path, _read_json(path), SCHEDULE_FIXED, SCHEDULE_FREE) if path else SCHEDULE_FREE
    steps = fields["num_train_timesteps"]
    if not _is_count(steps, 10**6) or not all(_is_number(fields[f"beta_{end}"]) for end in ("start", "end")):
        raise ValueError("num_train_timesteps, beta_start and beta_end of the scheduler are numbers")
    if not 0 < fields["beta_start"] <= fields["beta_end"] < 1:
        raise ValueError("beta_start and beta_end of the scheduler lie between 0 and 1")
    return {
        "model.num_scales": steps,
        "model.beta_min": round(fields["beta_start"] * steps, 12),  # rounded to what a config says: 0.1, 20.0
        "model.beta_max": round(fields["beta_end"] * steps, 12),
    }


def differences(theirs, config):
    """The fields that the weights determine and in which two config trees differ: 'model.nf: 64 there, 128 here'."""
    pairs = [(f"{s}.{n}", theirs[s].get(n), config[s].get(n)) for s, names in DETERMINED.items() for n in names]
    return [
        f"{name}: {json.dumps(there)} there, {json.dumps(here)} here" for name, there, here in pairs if there != here
    ]


# ------------------------------------------------------------------------------------------------------- the weights


def load(folder, config):
    """The network of a diffusers folder with its weights.

    Args:
        folder: the diffusers folder.
        config: a config tree that agrees with the folder's in all that the weights determine.

    Returns:
        DDPM: in training mode, on the CPU, float32.

    Raises:
        UserError: a file is missing or damaged, this program's DDPM cannot express the network, the config is of
            another one, or weights are missing, unknown, of another shape, NaN or infinite.
    """
    rows = differences(read_config(folder), config)
    if rows:
        raise UserError(
            f"{folder} does not fit the config: {'; '.join(rows)}; set these on the command line, such as "
            "--config.data.image_size=64, or use another --config"
        )
    weights = read_weights(folder)
    with torch.device("meta"):
        check_weights(folder, weights, DDPM(config, attention_up="all"))  # before anything of the claimed size is made
    net = DDPM(config, attention_up="all")
    copy_weights(folder, weights, net)
    return net


@torch.no_grad()
def copy_weights(source, weights, net):
    """Copies diffusers' weights into a DDPM of the same architecture, in place; arguments as `check_weights`.

    Raises:
        UserError: as `check_weights`, or weights are NaN or infinite.
    """
    check_weights(source, weights, net)
    bad = [name for name, value in weights.items() if not tensor_files.is_finite(value)]
    if bad:
        found = f"{counted(len(bad), 'tensor')}, {bad[0]} first"
        raise UserError(f"{source} holds NaN or infinite weights ({found}); copy it again")
    for name, (parameter, turned) in name_table(net).items():
        parameter.copy_(_turned(weights[name], turned))


def check_weights(source, weights, net):
    """Checks that diffusers' weights are those of a DDPM, by name and shape.

    Args:
        source: what the user calls them, for messages.
        weights: diffusers' name -> tensor, under the names of now.
        net: a `DDPM` with `attention_up="all"`, also one on the meta device.

    Raises:
        UserError: weights are missing, unknown or of another shape.
    """
    table = name_table(net)
    problems = [f"{name} is missing" for name in table if name not in weights]
    problems += [f"{name[:80]} is unknown" for name in weights if name not in table]
    problems += [
        f"{name} has the shape {tuple(weights[name].shape)}"
        for name, (parameter, turned) in table.items()
        if name in weights and _turned(weights[name], turned).shape != parameter.shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"the weights of {source} do not fit its {CONFIG}: {'; '.join(problems[:3])}{more}; copy the folder again"
        )


def _turned(weight, turned):
    """A projection's weight (out, in) or (out, in, 1, 1) as (in, out); others as they are."""
    return weight.flatten(1).t() if turned and weight.ndim > 1 else weight


def name_table(net):
    """Diffusers' name -> (our parameter, whether it is the transpose of theirs), of every parameter of a DDPM."""
    table = {}
    for prefix, part in _parts(net):
        for theirs, ours in PARTS.get(type(part), {"": ""}).items():
            module = getattr(part, ours) if ours else part
            if module is None:  # a block without a shortcut
                continue
            name = f"{prefix}.{theirs}".rstrip(".")
            projection = isinstance(module, layers.Projection)
            table[f"{name}.weight"] = (module.W if projection else module.weight, projection)
            table[f"{name}.bias"] = (module.b if projection else module.bias, False)
    return table


def _parts(net):
    """Diffusers' prefix and our module of every part of a DDPM, see the table at the top."""
    yield "conv_in", net.conv_in
    yield "time_embedding", net.time
    yield from _levels("down_blocks", "downsamplers", net.down)
    first, attention, second = net.middle
    yield from (("mid_block.resnets.0", first), ("mid_block.attentions.0", attention), ("mid_block.resnets.1", second))
    yield from _levels("up_blocks", "upsamplers", net.up)
    yield "conv_norm_out", net.norm_out
    yield "conv_out", net.conv_out


def _levels(name, resamplers, modules):
    """The same of one way: stages in a list, a resampling after each level but the last."""
    level = block = 0
    for module in modules:
        if isinstance(module, Stage):
            yield f"{name}.{level}.resnets.{block}", module.block
            if module.attention is not None:
                yield f"{name}.{level}.attentions.{block}", module.attention
            block += 1
        else:
            yield f"{name}.{level}.{resamplers}.0", module
            level, block = level + 1, 0
