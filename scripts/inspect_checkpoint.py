"""Says what a checkpoint holds and which configs it fits; converts it to a file of its EMA weights alone.

    python scripts/inspect_checkpoint.py results/cifar10/checkpoints/checkpoint_20.pth
    python scripts/inspect_checkpoint.py checkpoint_26.pth --config configs/subvp/cifar10_ddpm_continuous.py
    python scripts/inspect_checkpoint.py checkpoint_2.pth --to pretrained/mine.safetensors --note "data=Fashion-MNIST"

Reads what Score-SDE's and this program's training wrote (.pth), weights-only, EMA weights (.safetensors), and folders
of diffusers' UNet2DModel.  The converted file holds the weights by their published names, about a quarter of the
checkpoint's size, and as text its config, the number of training steps and the notes; recon.py takes it as --ckpt_path.
"""

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import models  # noqa: E402
from basics.console import UserError, guard, say  # noqa: E402
from command_line import read_config  # noqa: E402
from configs.base import from_dict, to_dict  # noqa: E402
from models.ddpm import DDPM  # noqa: E402
from storage import arrays, checkpoint_schema, diffusers_weights  # noqa: E402
from storage.checkpoints import (  # noqa: E402
    config_of,
    find_checkpoint,
    read_checkpoint,
    read_ema_weights,
    reads_sigma_table,
    what_weights_depend_on,
    write_ema_weights,
)

DIFFUSERS = "folder of diffusers' (UNet2DModel): attention after every block on the way up"
BUFFERS = {"sigmas"}  # what a checkpoint's network holds besides parameters
RESERVED = {"config", "step"}  # what a file of EMA weights says of itself, so no names for notes
CLOSEST = 3  # networks shown where no config fits
SHOWN = 3  # differences shown of each, and tensors that are not finite


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        format: in words.
        weights: name -> tensor; buffers too in a training checkpoint.
        averages: the EMA weights by position, or None where `weights` are the averages themselves.
        step: training steps, or None where the file does not say.
        config: the config it was trained with, as nested dicts, or None where the file does not say.
        notes: further text in the file.
    """

    format: str
    weights: dict
    averages: list | None
    step: int | None
    config: dict | None
    notes: dict

    @property
    def parameters(self):
        """The number of parameters."""
        return sum(value.numel() for name, value in self.weights.items() if name not in BUFFERS)

    def not_finite(self):
        """The names of the tensors that hold a NaN or an infinity."""
        averages = {f"EMA weight {i}": value for i, value in enumerate(self.averages or [])}
        return [name for name, value in {**self.weights, **averages}.items() if not torch.isfinite(value).all()]


# ------------------------------------------------------------------------------------------------------- reading


def read(path):
    """The `Checkpoint` in a file, in a folder of diffusers', or the newest in a work folder.

    Raises:
        UserError: the file is missing, damaged, holds pickled code, or is no checkpoint.
    """
    path = find_checkpoint(path)
    if path.is_dir():
        return _read_diffusers(path)
    return _read_ema(path) if path.suffix == ".safetensors" else _read_training(path)


def _read_training(path):
    content = read_checkpoint(path)
    config, weights = content.get("config"), checkpoint_schema.without_prefix(content["model"])
    if content["ema"] is None:
        return Checkpoint("plain weights, without moving averages", weights, None, None, None, {})
    return Checkpoint(
        format="training checkpoint of Score-SDE, as published" if config is None else "training checkpoint of main.py",
        weights=weights,
        averages=content["ema"]["shadow_params"],
        step=content["step"],
        config=None if config is None else checkpoint_schema.complete(config),
        notes={},
    )


def _read_ema(path):
    weights, config, step, notes = read_ema_weights(path)
    if "conv_in.weight" in weights:
        raise UserError(f"{path} belongs to a folder of diffusers'; name the folder, whose config.json is needed too")
    config = None if config is None else checkpoint_schema.complete(config)
    return Checkpoint("EMA weights (safetensors)", weights, None, step, config, notes)


def _read_diffusers(path):
    config, weights = diffusers_weights.read_config(path), diffusers_weights.read_weights(path)
    with torch.device("meta"):
        net = DDPM(config, attention_up="all")
    diffusers_weights.check_weights(path, weights, net)
    return Checkpoint(DIFFUSERS, weights, None, None, to_dict(config), {})


def load_config(path):
    """The config tree of a config file.

    Raises:
        UserError: there is no such file, or it is no config.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no config at {path}; they are in {ROOT / 'configs'}")
    return read_config(str(path))


def leaves():
    """Path from the root -> config tree, of every config of the repository."""
    paths = sorted((ROOT / "configs").glob("*/**/*.py"))
    return {str(path.relative_to(ROOT)): load_config(path) for path in paths}


# -------------------------------------------------------------------------------------------------------- fitting


def differences(checkpoint, config):
    """What keeps a checkpoint from being used with a config: one line each, none if it fits.

    The weights are compared where the configs agree, or the checkpoint carries none.

    Args:
        checkpoint: a `Checkpoint`.
        config: a config tree.
    """
    if checkpoint.format == DIFFUSERS:
        return diffusers_weights.differences(from_dict(checkpoint.config), config)
    tree = to_dict(config)
    rows = [] if checkpoint.config is None else _config_differences(checkpoint.config, tree)
    if rows:
        return rows
    expected, trainable = _network(json.dumps({"model": tree["model"], "data": tree["data"]}))
    compare_buffers = checkpoint.averages is not None and reads_sigma_table(tree)
    ignored = set() if compare_buffers else BUFFERS
    rows = _shape_differences(
        {name: tuple(value.shape) for name, value in checkpoint.weights.items() if name not in ignored},
        {name: shape for name, shape in expected.items() if name not in ignored},
    )
    if checkpoint.averages is not None and [tuple(value.shape) for value in checkpoint.averages] != trainable:
        rows.append(
            f"{len(checkpoint.averages)} EMA weights there, {len(trainable)} here, or of other shapes, by position"
        )
    return rows


def _config_differences(there, here):
    """The fields that the weights' meaning depends on and that differ, by the rule that loading goes by."""
    return arrays.differences(what_weights_depend_on(there), what_weights_depend_on(here))


@functools.cache
def _network(tree):
    """Name -> shape of the state dict, and the trainable parameters' shapes in order, of a config's network."""
    with torch.device("meta"):
        net = models.create_model(from_dict(json.loads(tree)))
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    return shapes, [tuple(value.shape) for value in net.parameters() if value.requires_grad]


def _shape_differences(there, here):
    rows = [f"{name} is missing there" for name in here if name not in there]
    rows += [f"{name} is unknown here" for name in there if name not in here]
    common = [name for name in here if name in there and there[name] != here[name]]
    return rows + [f"{name}: {there[name]} there, {here[name]} here" for name in common]


# ------------------------------------------------------------------------------------------------------ reporting


def report(checkpoint, path, configs):
    """Prints what a checkpoint holds and which of `configs` (path -> config tree) it fits."""
    found = {name: differences(checkpoint, config) for name, config in configs.items()}
    fitting = [name for name, rows in found.items() if not rows]
    config = from_dict(checkpoint.config) if checkpoint.config else None
    example = config or next((configs[name] for name in fitting), None)
    say(f"{path}")
    _row("format", checkpoint.format)
    _row("architecture", _architecture(example) if example else _first_convolution(checkpoint.weights))
    _row("parameters", f"{checkpoint.parameters:,} in {len(checkpoint.weights.keys() - BUFFERS)} tensors")
    _row("steps", f"{checkpoint.step:,}" if checkpoint.step is not None else "the file does not say")
    _row("SDE", _sde(config) if config else "the file does not say; the config that it was trained with does")
    _row("weights", _finite(checkpoint.not_finite()))
    for name, text in sorted(checkpoint.notes.items()):
        _row(name, text)
    for name in fitting:
        _row("fits", f"{name} ({_sde(configs[name])})")
    if not fitting and config and len(configs) > 1 and not differences(checkpoint, config):
        _row("fits", f"the config that it carries ({_sde(config)}), which is none of the {len(configs)} in configs/")
    elif not fitting:
        _report_misses(found)


def _report_misses(found):
    """Prints what keeps each of the closest configs from fitting; all of it where there is one config."""
    if len(found) == 1:
        for name, rows in found.items():
            _row("does not fit", name)
            for row in rows:
                _row("", row)
        return
    groups = {}  # configs of the same network differ in the same
    for name, rows in found.items():
        groups.setdefault(tuple(rows), []).append(name)
    for rows, names in sorted(groups.items(), key=lambda group: len(group[0]))[:CLOSEST]:
        _row("does not fit", ", ".join(names))
        _row("", _first(rows, "; "))
    _row("fits", f"none of the {len(found)} configs; those above come closest")


def _first(items, separator):
    more = f"{separator}and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return separator.join(items[:SHOWN]) + more


def _row(label, text):
    say(f"  {label + ':' if label else '':14} {text}")


def _architecture(config):
    model, data = config.model, config.data
    levels, attention = "-".join(map(str, model.ch_mult)), ", ".join(map(str, model.attn_resolutions)) or "none"
    size = f"{data.num_channels}x{data.image_size}x{data.image_size}"
    return (
        f"{model.name}, {model.nf} channels times {levels}, residual blocks a level: {model.num_res_blocks}, attention "
        f"at: {attention}; images {size} in {'[-1, 1]' if data.centered else '[0, 1]'}"
    )


def _first_convolution(weights):
    """What can be told of an unknown network."""
    for value in weights.values():
        if value.ndim == 4:
            out, channels = value.shape[:2]
            return f"unknown; its first convolution takes {channels} channels to {out}"
    return "unknown; it has no convolution"


def _sde(config):
    times = "continuous times" if config.training.continuous else "discrete times"
    return f"{config.training.sde}, {times}, {config.model.num_scales} steps"


def _finite(names):
    if not names:
        return "all finite"
    return f"NaN or infinite: {_first(names, ', ')}"


# ----------------------------------------------------------------------------------------------------- converting


def convert(checkpoint, path, target, config, notes):
    """Writes the EMA weights of a checkpoint to a safetensors file.

    Args:
        checkpoint: the `Checkpoint` at `path`.
        path: the file it was read from.
        target: the new file, .safetensors.
        config: the config tree, or None for the checkpoint's own.
        notes: further text metadata; the checkpoint's own notes are kept.

    Raises:
        UserError: no config is known, the checkpoint does not fit it, or the file cannot be written.
    """
    if checkpoint.format == DIFFUSERS:
        raise UserError(f"{path} holds weights alone already: recon.py takes the folder as --ckpt_path, without --to")
    if Path(target).suffix != ".safetensors":
        raise UserError(f"--to {target}: the new file's name must end in .safetensors, which recon.py goes by")
    if config is None and checkpoint.config is None:
        raise UserError(f"{path} does not say what config it was trained with; name it with --config")
    tree = config_of(path) if config is None else to_dict(config)
    net = models.create_model(from_dict(tree))
    write_ema_weights(target, path, net, tree, {**checkpoint.notes, **notes})
    say(f"{target}: EMA weights of {path}, {Path(target).stat().st_size / 1e6:.1f} MB")


def parse_notes(texts):
    """{'key': 'text'} of 'key=text' each.

    Raises:
        UserError: a note has no key, or one that the file itself uses.
    """
    notes = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key or key in RESERVED:
            raise UserError(f"--note '{text}': write KEY=TEXT, with a key other than {' and '.join(sorted(RESERVED))}")
        notes[key] = value
    return notes


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="the checkpoint")
    parser.add_argument("--config", help="compare with this config alone, and list all that differs")
    parser.add_argument("--to", metavar="OUT.safetensors", help="convert, by --config or the checkpoint's own config")
    parser.add_argument("--note", action="append", default=[], metavar="KEY=TEXT", help="text to store with --to")
    flags = parser.parse_args(argv)
    notes = parse_notes(flags.note)
    if notes and not flags.to:
        raise UserError("--note goes with --to, which names the new file")
    config = load_config(flags.config) if flags.config else None
    checkpoint = read(flags.path)
    if flags.to:
        convert(checkpoint, flags.path, flags.to, config, notes)
    else:
        report(checkpoint, flags.path, {flags.config: config} if flags.config else leaves())


if __name__ == "__main__":
    sys.exit(guard(main, None))
