"""Checkpoints: of training, of EMA weights alone, and what of their config and data must agree with the user's.

They are read weights-only, always, and every part is checked before it is used.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save

import models
from basics import tensor_files
from basics.console import UserError, counted, say, shell, warn
from basics.files import write_bytes
from basics.tensor_files import WrongFile
from configs.base import from_dict, to_dict
from configs.fields import FIELDS, Whole, Wholes, check_value
from storage import checkpoint_schema as schema
from storage import diffusers_weights
from storage.arrays import differences
from storage.tensors import read_or_refuse, read_tensors, write_tensors

_PREFIX = "module."  # published checkpoints are saved from DataParallel


# ------------------------------------------------------------------------------------------------- checkpoints
# As published: {'optimizer', 'model' (keys prefixed "module."), 'ema': {decay, num_updates, shadow_params}, 'step'};
# ours add 'config' (JSON types), 'randomness' (what the data order and every later draw are keyed by), 'precision' (in
# which the network was computed) and 'data' (what it was trained on).  An EMA-only file is a safetensors file: the
# network's weights by their published names, and metadata as text.  A file of plain weights is a state dict alone.

# What shapes a run besides what its weights depend on: none of it may change between two parts of a run.
_SHAPING = {
    "data": ("random_flip", "uniform_dequantization"),
    "model": ("dropout", "ema_rate"),
    "training": ("batch_size", "likelihood_weighting", "reduce_mean"),
    "optim": ("optimizer",),
}


def write_checkpoint(path, state, config, seed, data=None):
    """Saves a training state so that training continues from it exactly, in the published format.

    Args:
        path: the file.
        state: a `losses.TrainState`.
        config: the config as nested dicts of JSON types.
        seed: the key of data order, flips, times, noise and dropout; together with the step it determines them all.
        data: what it is trained on: {'fingerprint': text, 'images': their number, 'source': text}.
    """
    checkpoint = {
        "optimizer": state.optimizer.state_dict(),
        "model": {_PREFIX + name: value for name, value in state.net.state_dict().items()},
        "ema": state.ema.state_dict(),
        "step": state.step,
        "config": config,
        "randomness": {"seed": seed, "next_step": state.step},
        **({} if state.precision is None else {"precision": state.precision}),
        **({} if data is None else {"data": data}),
    }
    write_tensors(path, checkpoint)


def read_checkpoint(path, lazily=False):
    """A published checkpoint, ours, or plain weights, its parts checked but not against a network.

    Args:
        path: the file.
        lazily: as `read_tensors`.

    Returns:
        dict: see `checkpoint_schema.check_parts`.

    Raises:
        UserError: the file is missing, damaged, holds pickled code, or is no checkpoint.
    """
    content = read_tensors(path, "checkpoint", lazily)
    try:
        return schema.check_parts(content)
    except WrongFile as error:
        raise UserError(f"{path} is no checkpoint of main.py ({error}); check --ckpt_path") from error


def restore_state(path, state, config, seed):
    """Loads a checkpoint into a fresh training state of the same network; arguments as `write_checkpoint`.

    The optimizer's rates stay those of the config.  What of it may differ from the checkpoint's is told.

    Returns:
        dict: what it was trained on, see `write_checkpoint`; None where the checkpoint does not say.

    Raises:
        UserError: as `read_checkpoint`, or the checkpoint belongs to another network, config or seed; the state is
            as before.
    """
    checkpoint = read_checkpoint(path)
    if "optimizer" not in checkpoint or checkpoint["ema"] is None:
        raise UserError(f"{path} lacks the optimizer's state, so training cannot continue from it; choose another")
    changes = _check_run(path, checkpoint, config, seed)
    before, now = checkpoint.get("precision", state.precision), state.precision
    if now is not None and before != now:  # the config may be the same: 'auto' depends on the device
        changes.append(f"computed in {before} before, in {now} now")
    model, averages = schema.without_prefix(checkpoint["model"]), checkpoint["ema"]["shadow_params"]
    _check_weights(path, _shapes(model), state.net, compare_buffers=True)
    _check_ema(path, checkpoint["ema"], state.net)
    _check_finite(path, [*model.values(), *averages])
    try:
        schema.check_average(checkpoint["ema"])
        moments = schema.adam_state(checkpoint["optimizer"], list(state.net.parameters()), checkpoint["step"])
    except WrongFile as error:
        raise UserError(f"training cannot continue from {path}: {error}; use an earlier checkpoint") from error
    groups = state.optimizer.state_dict()["param_groups"]
    state.net.load_state_dict(model)
    state.ema.load_state_dict(checkpoint["ema"])
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    state.step = checkpoint["step"]
    if changes:
        say(f"settings that changed since {path}: {'; '.join(changes)}")
    return checkpoint.get("data")


def load_ema_weights(path, net, config):
    """Loads the EMA weights of a checkpoint (.pth, published or ours) or of an EMA-only file (.safetensors).

    A file of plain weights has no averages: its weights are taken, and the user is told.

    Args:
        path: the file.
        net: the network, changed in place.
        config: the config it was built from, as nested dicts of JSON types.

    Returns:
        int: training steps of the weights, 0 where unknown.

    Raises:
        UserError: the file is missing, damaged, holds pickled code or NaNs, or belongs to another network or config.
    """
    if Path(path).suffix == ".safetensors":
        return _load_safetensors(path, net, config)
    checkpoint = read_checkpoint(path)
    _check_config(path, checkpoint.get("config"), config)
    model = schema.without_prefix(checkpoint["model"])
    _check_weights(path, _shapes(model), net, compare_buffers=reads_sigma_table(config))
    if checkpoint["ema"] is None:
        _check_finite(path, model.values())
        net.load_state_dict(model, strict=False)  # the buffers alone may be missing
        say(f"{path} holds plain weights, without moving averages: reconstructions with averaged weights are better")
        return checkpoint["step"]
    _check_ema(path, checkpoint["ema"], net)
    averages = checkpoint["ema"]["shadow_params"]
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    published = {id(value): name for name, value in net.state_dict(keep_vars=True).items()}
    kept = [
        (parameter, model[published[id(parameter)]]) for name, parameter in net.named_parameters() if name in frozen
    ]
    _check_finite(path, [*averages, *(value for _, value in kept)])
    with torch.no_grad():
        for parameter, value in [*kept, *zip(_trainable(net), averages, strict=True)]:
            parameter.copy_(value)
    return checkpoint["step"]


def write_ema_weights(path, checkpoint_path, net, config, notes):
    """Converts a checkpoint to an EMA-only safetensors file.

    Args:
        path: the new file.
        checkpoint_path: a checkpoint of `net`.
        net: the network, which will hold the weights.
        config: the config as nested dicts of JSON types, stored in the file's metadata.
        notes: a dict of further text metadata (command, data, loss).
    """
    write_network(path, net, config, load_ema_weights(checkpoint_path, net, config), notes)


def write_network(path, net, config, step, notes=()):
    """Writes a network's weights as an EMA-only file; arguments as `write_ema_weights`, `step` the training steps."""
    buffers = dict(net.named_buffers())
    weights = {name: value.cpu().contiguous() for name, value in net.state_dict().items() if name not in buffers}
    metadata = {"config": json.dumps(config), "step": str(step), **dict(notes)}
    write_bytes(path, _in_order(save(weights, metadata)))


def _in_order(data):
    """The bytes of a safetensors file with its header sorted: of the same weights the same file.

    The library writes its metadata in another order each time.
    """
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header = header.ljust(-len(header) % 8 + len(header))  # tensors begin at multiples of eight bytes
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def read_ema_weights(path, lazily=False):
    """What an EMA-only file (.safetensors) holds, not checked against a network.

    Args:
        path: the file.
        lazily: to look at names and shapes alone: the tensors are on the meta device.

    Returns:
        tuple: name -> tensor; the config as nested dicts and the training steps, each None where the file does not say;
        and the notes, further text by name.

    Raises:
        UserError: the file is missing or damaged.
    """
    return read_or_refuse(path, "checkpoint", lambda path: _ema_parts(path, lazily), "copy or make it again")


def _ema_parts(path, lazily):
    weights, notes = tensor_files.read_safetensors(path, lazily)
    try:
        config, step = (tensor_files.parse_json(notes.pop(name, "null")) for name in ("config", "step"))
    except WrongFile as error:
        raise WrongFile("is damaged: its config or step is no JSON") from error
    try:
        config = None if config is None else schema.plain_config(config)
        return weights, config, None if step is None else schema.whole(step, "its step"), notes
    except WrongFile as error:
        raise WrongFile(f"is damaged: {error}") from error


def _load_safetensors(path, net, config):
    weights, their_config, step, _ = read_ema_weights(path)
    _check_config(path, their_config, config)
    _check_weights(path, _shapes(weights), net, compare_buffers=False)
    _check_finite(path, weights.values())
    buffers = dict(net.named_buffers())
    net.load_state_dict({name: value for name, value in weights.items() if name not in buffers}, strict=False)
    return step or 0


def _shapes(weights):
    return {name: value.shape for name, value in weights.items()}


def _trainable(net):
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


# ------------------------------------------------------------------------------------ the config of a checkpoint


def find_checkpoint(path, announce=True):
    """The checkpoint that a path names: the file or diffusers folder itself, or the newest in a work folder.

    Args:
        path: a file; a diffusers folder; or a work folder, or its folder of checkpoints, of which the checkpoint of
            the most training steps is taken.
        announce: say which was taken.

    Raises:
        UserError: the folder holds no checkpoint that can be used.
    """
    path = Path(path)
    if not path.is_dir() or diffusers_weights.is_folder(path):
        return path
    steps, unusable = {}, 0
    for pattern in ("checkpoints/*.pth", "checkpoints-meta/*.pth", "*.pth", "*.safetensors"):
        for candidate in sorted(path.glob(pattern)):
            try:
                steps[candidate] = _step_of(candidate)
            except UserError as error:
                unusable += 1
                warn(error)
    if not steps:
        files = "no *.pth, no *.safetensors, no config.json"
        reason = f"of {counted(unusable, 'file')} there none can be used" if unusable else files
        raise UserError(f"there is no checkpoint in {path} ({reason}); check the path")
    newest = max(steps, key=steps.get)  # the first of several
    if announce:
        say(f"checkpoint: {newest}, the newest in {path} ({counted(steps[newest], 'step')})")
    return newest


def _step_of(path):
    if path.suffix == ".safetensors":
        return read_ema_weights(path, lazily=True)[2] or 0
    return read_checkpoint(path, lazily=True)["step"]


def config_of(path):
    """The whole config that a checkpoint carries, as nested dicts of JSON types; its weights are not read.

    Args:
        path: as `find_checkpoint`.

    Raises:
        UserError: there is none, the file is damaged, or its weights are of another network than its config says.
    """
    path = find_checkpoint(path, announce=False)
    if path.is_dir():
        return schema.complete(to_dict(diffusers_weights.read_config(path)))
    if path.suffix == ".safetensors":
        weights, config, _, _ = read_ema_weights(path, lazily=True)
    else:
        checkpoint = read_checkpoint(path, lazily=True)
        weights, config = schema.without_prefix(checkpoint["model"]), checkpoint.get("config")
    if config is None:
        raise UserError(
            f"{path} does not say what config it was trained with; give --config "
            f"(`{shell('python', 'scripts/inspect_checkpoint.py', path)}` says which it fits)"
        )
    config = schema.complete(config)
    _check_network(path, config, _shapes(weights))
    return config


def _check_network(path, config, shapes):
    """Refuses a config from a file whose network does not have the file's weights; nothing of its size is made."""
    model = config["model"]
    try:
        if len(model["ch_mult"]) * model["num_res_blocks"] > len(shapes):
            raise ValueError("it has more blocks than the file has weights")
        _check_sizes(config)
        with torch.device("meta"):
            net = models.create_model(from_dict(config))
    except Exception as error:  # what was in the file may break anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"no network can be built from the config in {path} ({reason}); give --config") from error
    _check_weights(path, shapes, net, compare_buffers=False)


def _check_sizes(config):
    """Refuses numbers of a network that no config may have, which could ask for any amount of memory.

    Raises:
        UserError: names the field.
    """
    for section in ("data", "model"):
        for name, value in config[section].items():
            if isinstance(FIELDS[section].get(name), (Whole, Wholes)):
                check_value(f"config.{section}.{name}", value, FIELDS[section][name])


def check_start(path, config, seed):
    """Refuses to start anew beside a checkpoint of another training; arguments as `write_checkpoint`.

    Returns:
        dict: what that was trained on, see `write_checkpoint`; None where it does not say.

    Raises:
        UserError: as `read_checkpoint`, or it is of another network, config, seed or settings.
    """
    checkpoint = read_checkpoint(path, lazily=True)
    _check_run(path, checkpoint, config, seed)
    return checkpoint.get("data")


def check_data(path, theirs, mine):
    """Refuses to continue a run, or to start anew beside it, on other images than it was trained on.

    Args:
        path: the checkpoint.
        theirs: what `restore_state` or `check_start` returned.
        mine: the same of the images at hand, see `write_checkpoint`.

    Raises:
        UserError: the images differ.
    """
    if theirs is not None and theirs["fingerprint"] != mine["fingerprint"]:
        raise UserError(
            f"{path} was trained on other images ({theirs['images']:,} of {theirs['source']}; here are "
            f"{mine['images']:,} of {mine['source']}); give it those again, or start anew in another --workdir"
        )


def check_division(path, theirs, images):
    """Refuses to measure a loss on images held back, where a checkpoint was trained on others than are kept now.

    Args:
        path: the checkpoint.
        theirs: what `data_of` returned.
        images: the `ImageSet` that training on the same images would see.

    Raises:
        UserError: the images differ.
    """
    remedy = "name test images with --config.data.test_dataset"
    if theirs is None:
        warn(f"{path} does not say what it was trained on: images held back here may be among them; {remedy}")
    elif theirs["fingerprint"] != images.fingerprint:
        raise UserError(
            f"{path} was trained on other images than are kept for training here, so those held back may be among "
            f"them; {remedy}, or give it its own images again"
        )


def data_of(path):
    """What a checkpoint says of its training images, see `write_checkpoint`; None where it does not."""
    read = lambda path: tensor_files.read_torch(path, lazily=True)
    return read_or_refuse(path, "checkpoint", read, "copy it again").get("data")


def _check_run(path, checkpoint, config, seed):
    """The settings that differ from a checkpoint's and may; refuses a seed, config or settings of another training."""
    their_seed = checkpoint.get("randomness", {}).get("seed", seed)
    if their_seed != seed:
        remedy = f"use --config.seed={their_seed}, or start anew in another --workdir"
        raise UserError(f"{path} was trained with seed {their_seed}, not {seed}; {remedy}")
    _check_config(path, checkpoint.get("config"), config, "continue with its own, or start anew in another --workdir")
    return _check_shaping(path, checkpoint.get("config"), config)


def _check_config(path, theirs, mine, remedy="leave --config and its values out: the checkpoint's own is used then"):
    """Refuses a config whose network, SDE or images differ in kind from the one that a checkpoint carries."""
    if theirs is None:
        return
    differing = differences(what_weights_depend_on(theirs), what_weights_depend_on(mine))
    if differing:
        raise UserError(f"{path} was trained with another config ({'; '.join(differing[:4])}); {remedy}")


def _check_shaping(path, theirs, mine):
    """The settings of training that differ from the checkpoint's and may; refuses those that would make another run."""
    if theirs is None:
        return []
    theirs, mine = schema.complete(theirs), schema.complete(mine)
    pick = lambda tree: {section: {name: tree[section].get(name) for name in _SHAPING[section]} for section in _SHAPING}
    if differing := differences(pick(theirs), pick(mine)):
        old = " ".join("--config." + row.partition(" there, ")[0].replace(": ", "=") for row in differing)
        raise UserError(
            f"{path} was trained with other settings ({'; '.join(differing)}); continue with {old}, or start anew in "
            "another --workdir"
        )
    return [row for section in ("training", "optim") for row in _changes(section, theirs, mine)]


def _changes(section, theirs, mine):
    rows = differences(theirs[section], mine[section], f"{section}.")
    return [row.replace(" there", " before").replace(" here", " now") for row in rows]


def reads_sigma_table(config):
    """Whether a config's network (nested dicts) reads its table of noise levels; one with Fourier features does not."""
    model = schema.complete(config)["model"]
    fourier = model["name"] == "ncsnpp" and model["embedding_type"].lower() == "fourier"
    return model["scale_by_sigma"] and not fourier


def what_weights_depend_on(config):
    """The part of a config (nested dicts) that must be the same where weights are used as where they were trained."""
    config = schema.complete(config)
    free = {"dropout", "ema_rate"}
    if config["training"]["continuous"] and not reads_sigma_table(config):
        free.add("num_scales")  # merely the number of sampling steps
    model = {name: value for name, value in config["model"].items() if name not in free}
    return {
        "model": {name: list(value) if isinstance(value, tuple) else value for name, value in model.items()},
        "training": {name: config["training"][name] for name in ("sde", "continuous")},
        "data": {name: config["data"][name] for name in ("image_size", "num_channels", "centered")},
    }


# ---------------------------------------------------------------------------------- the weights and the network


def _check_weights(path, found, net, compare_buffers):
    """Names every weight that is missing, unknown or of another shape, for `found` name -> shape."""
    buffers = set() if compare_buffers else {name for name, _ in net.named_buffers()}
    expected = {name: value.shape for name, value in net.state_dict().items() if name not in buffers}
    found = {name: shape for name, shape in found.items() if name not in buffers}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name[:80]} is unknown" for name in found if name not in expected]
    problems += [
        f"{name} is {tuple(found[name])}, the config's is {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{path} does not fit the config: {'; '.join(problems[:3])}{more}; use the config it was made with "
            f"(`{shell('python', 'scripts/inspect_checkpoint.py', path)}` says which it fits)"
        )


def _check_ema(path, ema, net):
    found = [tuple(value.shape) for value in ema["shadow_params"]]
    expected = [tuple(parameter.shape) for parameter in _trainable(net)]
    if len(found) != len(expected):
        raise UserError(
            f"{path} holds {len(found)} EMA weights, the config's network has {len(expected)}; check --config"
        )
    for position, (theirs, mine) in enumerate(zip(found, expected, strict=True)):
        if theirs != mine:
            raise UserError(f"{path}: EMA weight {position} is {theirs}, the config's is {mine}; check --config")


def _check_finite(path, weights):
    bad = sum(not tensor_files.is_finite(value) for value in weights)
    if bad:
        count = counted(bad, "tensor")
        raise UserError(f"{path} holds NaN or infinite weights ({count}): training diverged; use an earlier one")
