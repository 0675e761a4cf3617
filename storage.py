"""Every on-disk format: checkpoints, the results folder, its manifest and scores.

Everything is written by `files.write_bytes`, completely or not at all.  Checkpoints and batches are read weights-only,
always.
"""

import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import torch

import checkpoint_schema as schema
import tensor_files
from console import UserError, printable, say, shell, warn
from files import link, write_bytes, write_json, write_text
from tensor_files import WrongFile

MANIFEST = "manifest.json"
FORMAT = 2  # of the manifest, and of batches that know what they were made from
MISSING = "is missing"
_INFORMATION = ("dataset", "skipped", "labels")  # of a side's entry: told, but not compared
SIDES = {"pos": "in-domain", "neg": "out-of-domain"}
_PREFIX = "module."  # published checkpoints are saved from DataParallel

# ------------------------------------------------------------------------------------------- tensors and arrays


def write_tensors(path, value):
    """`torch.save` of tensors, numbers, text, lists and dicts, atomically."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getbuffer())


def write_arrays(path, settings, **arrays):
    """Writes NumPy arrays and what they were made from as an .npz file, atomically.

    Args:
        path: the file.
        settings: a dict of JSON types, which `read_arrays` compares; stored as text under `settings`.
        arrays: by name.
    """
    buffer = io.BytesIO()
    np.savez(buffer, settings=json.dumps(settings), **arrays)
    write_bytes(path, buffer.getbuffer())


def read_arrays(path, settings):
    """The arrays that an earlier run wrote, or None where there is no file.

    Args:
        path: the file.
        settings: as in `write_arrays`.

    Returns:
        dict: name -> array, without `settings`; or None.

    Raises:
        UserError: the file is damaged, or was made from something else.
    """
    path = Path(path)
    if not path.is_file():
        return None
    try:
        tensor_files.check_zip(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        differing = differences(json.loads(str(arrays.pop("settings", "{}"))), settings)
    except PermissionError as error:
        raise UserError(f"{path} may not be read; change its permissions") from error
    except Exception as error:  # a damaged file can fail anywhere inside the reader
        raise UserError(f"{path} is damaged or truncated; delete it, then run the same command again") from error
    if differing:
        raise UserError(
            f"{path} was made from something else ({'; '.join(differing[:3])}); delete it or choose another folder"
        )
    return arrays


# -------------------------------------------------------------------------------------------------- reading


def read_tensors(path, what, lazily=False):
    """Loads a `torch.save` file to the CPU, weights-only.

    Args:
        path: the file.
        what: what the user would call it, for messages ("checkpoint", "batch").
        lazily: to look at names, shapes and numbers alone; the tensors are not read.

    Raises:
        UserError: the file is missing, truncated, not a torch file, or holds pickled code.
    """
    read = lambda path: tensor_files.read_torch(path, lazily)
    return _read(path, what, read, "copy or make it again, with tensors, numbers and text alone")


def _read(path, what, read, remedy):
    """read(path), for a file that is there; what is wrong with it becomes a user's error."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no {what} at {path}; check the path")
    try:
        return read(path)
    except WrongFile as error:
        raise UserError(f"{what} {path} {error}; {remedy}") from error
    except PermissionError as error:
        raise UserError(f"{what} {path} may not be read; change its permissions") from error
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror}); copy or make it again") from error


# ------------------------------------------------------------------------------------------------- checkpoints
# As published: {'optimizer', 'model' (keys prefixed "module."), 'ema': {decay, num_updates, shadow_params}, 'step'};
# ours add 'config' (JSON types), 'randomness' (what the data order and every later draw are keyed by) and 'data' (what
# it was trained on).  An EMA-only file is a safetensors file: the network's weights by their published names, and
# metadata as text.  A file of plain weights is a state dict alone.

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
    their_seed = checkpoint.get("randomness", {}).get("seed", seed)
    if their_seed != seed:
        raise UserError(f"{path} was trained with seed {their_seed}, not {seed}; use --config.seed={their_seed}")
    _check_config(path, checkpoint.get("config"), config)
    changes = _check_shaping(path, checkpoint.get("config"), config)
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
        say(f"continuing with other settings than before: {'; '.join(changes)}")
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
    from safetensors.torch import save

    step = load_ema_weights(checkpoint_path, net, config)
    buffers = dict(net.named_buffers())
    weights = {name: value.contiguous() for name, value in net.state_dict().items() if name not in buffers}
    metadata = {"config": json.dumps(config), "step": str(step), **notes}
    write_bytes(path, save(weights, metadata))


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
    return _read(path, "checkpoint", lambda path: _ema_parts(path, lazily), "copy or make it again")


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
    from models import diffusers_weights

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
        reason = f"none of the {unusable} files there can be used" if unusable else files
        raise UserError(f"there is no checkpoint in {path} ({reason}); check the path")
    newest = max(steps, key=steps.get)  # the first of several
    if announce:
        say(f"checkpoint: {newest}, the newest in {path} ({steps[newest]:,} steps)")
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
    from configs.base import to_dict
    from models import diffusers_weights

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
            f"('python scripts/inspect_checkpoint.py {path}' says which it fits)"
        )
    config = schema.complete(config)
    _check_network(path, config, _shapes(weights))
    return config


def _check_network(path, config, shapes):
    """Refuses a config from a file whose network does not have the file's weights; nothing of its size is made."""
    import models
    from configs.base import from_dict

    model = config["model"]
    try:
        if len(model["ch_mult"]) * model["num_res_blocks"] > len(shapes):
            raise ValueError("it has more blocks than the file has weights")
        with torch.device("meta"):
            net = models.create_model(from_dict(config))
    except Exception as error:  # what was in the file may break anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"no network can be built from the config in {path} ({reason}); give --config") from error
    _check_weights(path, shapes, net, compare_buffers=False)


def check_data(path, theirs, mine):
    """Refuses to continue a run on other images than it was trained on.

    Args:
        path: the checkpoint.
        theirs: what `restore_state` returned.
        mine: the same of the images at hand, see `write_checkpoint`.

    Raises:
        UserError: the images differ.
    """
    if theirs is not None and theirs["fingerprint"] != mine["fingerprint"]:
        raise UserError(
            f"{path} was trained on other images ({theirs['images']:,} of {theirs['source']}; here are "
            f"{mine['images']:,} of {mine['source']}); give it those again, or start anew in another --workdir"
        )


def _check_config(path, theirs, mine):
    """Refuses a config whose network, SDE or images differ in kind from the one that a checkpoint carries."""
    if theirs is None:
        return
    differing = differences(what_weights_depend_on(theirs), what_weights_depend_on(mine))
    if differing:
        raise UserError(
            f"{path} was trained with another config ({'; '.join(differing[:4])}); use its own (recon.py takes it from "
            "the file where --config is left out)"
        )


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
        raise UserError(f"{path} holds NaN or infinite weights ({bad} tensors): training diverged; use an earlier one")


# ------------------------------------------------------------------------------------------- the results folder


@dataclasses.dataclass(frozen=True)
class ResultsFolder:
    """`{workdir}/{mask}_reps{R}` with `pos/batch_{i}.pth` and `neg/batch_{i}.pth`, as published, and `manifest.json`.

    A batch is a dict: `orig` (B, C, H, W) in [0, 1], `masked` a list of R tensors orig * mask, `recon` a list of R
    tensors, not clipped; and, which the published code does not read, `identity` (its index, images, repetitions and
    the hash of what it was made from, see `made_from`) and `digest` (of the identity and all pixels).

    The manifest is `{"format": 2, "settings": {...}, "sides": {"pos": {...}, "neg": {...}}, "versions": {...}}`;
    settings and the part of a side's entry that `_INFORMATION` does not name say everything that determines the side's
    batches.  Folders of the published code have no manifest, those of earlier versions one without a format; the
    batches of both have no identity, and are read all the same.

    Attributes:
        path: the folder.
        making: of a run that writes here, 'pos' and 'neg' -> `made_from`: a batch is written under no other manifest.
    """

    path: Path
    making: dict = dataclasses.field(default_factory=dict)

    def batch_path(self, side, index):
        """The file of batch `index` of 'pos' or 'neg'."""
        return self.path / side / f"batch_{index}.pth"

    def identity(self, side, index):
        """What the manifest says of a batch; None where it says nothing (published folders, earlier versions).

        Returns:
            dict: `index`, `images` and `repetitions`, and `made_from`.
        """
        manifest = self.manifest() or {}
        if manifest.get("format") is None or side not in manifest["sides"]:
            return None
        settings, entry = manifest["settings"], manifest["sides"][side]
        return {
            "index": index,
            "images": max(0, min(entry["batch_size"], entry["images"] - index * entry["batch_size"])),
            "repetitions": settings["reps_per_image"],
            "made_from": made_from(settings, entry),
        }

    def write_batch(self, side, index, orig, masked, recon):
        """Writes one batch: orig (B, C, H, W), lists of R tensors of that shape.

        Raises:
            UserError: it cannot be written, or the manifest is no longer that of this run.
        """
        identity = self.identity(side, index)
        if self.making and (identity is None or identity["made_from"] != self.making[side]):
            raise UserError(
                f"{self.path / MANIFEST} was removed or replaced while this run wrote there; run the same command again"
            )
        batch = {"orig": orig, "masked": list(masked), "recon": list(recon)}
        if identity is not None:
            batch |= {"identity": identity, "digest": _digest(batch, identity)}
        write_tensors(self.batch_path(side, index), batch)

    def read_batch(self, side, index, reps=1):
        """The batch's `orig` (B, C, H, W) and its first `reps` reconstructions, a list of such tensors.

        Raises:
            UserError: the file is missing or damaged, is no batch or another one, or holds fewer repetitions.
        """
        path, (batch, fault) = self.batch_path(side, index), self._examine(side, index)
        if fault:
            ours = self.identity(side, index) is not None
            remedy = "run the same recon.py command again, it makes it again"
            raise UserError(
                f"{path} {fault}; {remedy if ours else 'copy it again, or make all anew in another --workdir'}"
            )
        if len(batch["recon"]) < reps:
            raise UserError(f"{path} holds {len(batch['recon'])} repetitions, {reps} were asked for; lower --reps")
        return batch["orig"], batch["recon"][:reps]

    def lacking(self, side):
        """The batches of the manifest's side that are not there or cannot be used, {index: why}; each is read once."""
        indices = range(self.manifest()["sides"][side]["batches"])
        faults = {index: self._examine(side, index)[1] for index in indices}
        return {index: fault for index, fault in faults.items() if fault}

    def _examine(self, side, index):
        """A batch, and what keeps it from being used (None if nothing does), which follows its path in a sentence."""
        path, identity = self.batch_path(side, index), self.identity(side, index)
        if not path.is_file():
            return None, MISSING
        try:
            batch = read_tensors(path, "batch")
        except UserError as error:
            if isinstance(error.__cause__, PermissionError):
                raise
            return None, str(error).removeprefix(f"batch {path} ").split(";")[0]
        return batch, _fault_of_batch(batch, identity)

    def batch_count(self, side):
        """The number of batches of a side, which must be numbered 0, 1, 2, ... without gaps.

        Raises:
            UserError: there are none, one is missing in between, or fewer or more than the manifest announces.
        """
        names = (re.fullmatch(r"batch_(0|[1-9][0-9]*)\.pth", path.name) for path in (self.path / side).glob("batch_*"))
        numbers = sorted(int(name[1]) for name in names if name)
        if not numbers:
            raise UserError(f"{self.path / side} holds no batches ({SIDES[side]} images); run recon.py first")
        announced = (self.manifest() or {}).get("sides", {}).get(side, {}).get("batches", numbers[-1] + 1)
        if numbers[-1] >= announced:
            raise UserError(
                f"{self.batch_path(side, numbers[-1])} is one more than the {announced} batches that {MANIFEST} tells "
                "of; move it away"
            )
        if len(numbers) < announced:
            first = next((index for index, number in enumerate(numbers) if index != number), len(numbers))
            raise UserError(
                f"{self.path / side} is incomplete: batch_{first}.pth is missing ({announced - len(numbers)} of "
                f"{announced}); run the same recon.py command again to make it"
            )
        return announced

    def manifest(self):
        """The manifest, or None where there is none (a folder of the published code); not to be changed.

        Raises:
            UserError: it cannot be read, or is none.
        """
        path = self.path / MANIFEST
        if not path.is_file():
            return None
        try:
            status = path.stat()  # an atomic write makes another file of it
            return _read_manifest(path, (status.st_ino, status.st_mtime_ns, status.st_size))
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); change its permissions") from error
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise UserError(
                f"{path} cannot be read ({reason}); delete the folder {self.path} and run recon.py again"
            ) from error

    def claim(self, settings, sides, versions):
        """Writes the manifest, or refuses a folder that was made otherwise.

        Args:
            settings: what both sides share (config, checkpoint hash, mask, seed, ...), JSON types.
            sides: `{"pos": {...}}` or with "neg": what each side's batches are made of, and `_INFORMATION`.
            versions: library versions; for information, not compared.

        Raises:
            UserError: the folder holds batches of other settings; the message says which differ.
        """
        settings, sides = json.loads(json.dumps([settings, sides]))  # as they will be read back
        old, made = self.manifest(), [side for side in SIDES if any((self.path / side).glob("batch_*.pth"))]
        if made and (old is None or old.get("format") is None):
            origin = "without a manifest.json" if old is None else "of an earlier version, with another noise"
            raise UserError(
                f"{self.path} holds batches {origin}; choose another --workdir (detect.py still scores these)"
            )
        if not made:  # nothing was made yet by what the manifest says
            old = {"settings": settings, "sides": {}}
        known = [side for side in made if side in sides and side in old["sides"]]
        then, now = ({side: _identifying(entries[side]) for side in known} for entries in (old["sides"], sides))
        differing = differences(old["settings"], settings) + differences(then, now)
        if differing:
            raise UserError(
                f"{self.path} was made with other settings ({'; '.join(differing[:4])}); choose another --workdir, or "
                "delete that folder"
            )
        merged = {"format": FORMAT, "settings": settings, "sides": {**old["sides"], **sides}, "versions": versions}
        write_json(self.path / MANIFEST, merged)

    def adopt(self, side, indices):
        """Takes over batches of this side from neighbours that made the same, instead of making them again.

        Neighbours are the results folders of the same name under the work folders beside this one, finished or not.
        Each batch is checked before.  Files are hard-linked where the file system allows, else copied.

        Args:
            side: 'pos' or 'neg', in the manifest.
            indices: the batches to look for.

        Returns:
            list: those taken over.

        Raises:
            UserError: a copy cannot be written.
        """
        taken = []
        for neighbour, their_side in self._neighbours(side):
            for index in [index for index in indices if index not in taken]:
                source = neighbour.batch_path(their_side, index)
                if neighbour._examine(their_side, index)[1] is None and _take(source, self.batch_path(side, index)):
                    taken.append(index)
        return taken

    def _neighbours(self, side):
        """(folder, side) of those whose batches are the same as this folder's of `side`."""
        mine, workdir = self.identity(side, 0), self.path.absolute().parent
        if mine is None:
            return
        with contextlib.suppress(OSError):  # one that may not be listed has no neighbours
            for path in sorted(workdir.parent.iterdir()):
                folder = ResultsFolder(path / self.path.name)
                with contextlib.suppress(UserError, OSError):
                    if path.resolve() != workdir.resolve() and folder.manifest():
                        yield from ((folder, other) for other in SIDES if folder.identity(other, 0) == mine)


def made_from(settings, entry):
    """The hash of what a side's batches are made from: the manifest's settings and the side's entry."""
    text = json.dumps([settings, _identifying(entry)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _identifying(entry):
    """The part of a side's entry that determines its batches."""
    return {name: value for name, value in entry.items() if name not in _INFORMATION}


def _digest(batch, identity):
    """SHA-256 of a batch's identity and of all its tensors: their names, types, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for name, tensors in (("orig", [batch["orig"]]), ("masked", batch["masked"]), ("recon", batch["recon"])):
        for tensor in tensors:
            digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _fault_of_batch(batch, expected):
    """What is wrong with the content of a batch, or None.

    Args:
        batch: what the file holds.
        expected: the identity it must have, or None where there is none to compare with.
    """
    if not _is_batch(batch):
        return "is no batch of reconstructions"
    identity = batch.get("identity")
    if expected is not None and identity is None:
        return "does not say what it was made from"
    if expected is not None and identity != expected:
        same = identity.get("made_from") == expected["made_from"]
        return "is another batch under this name" if same else "was made from other images or settings"
    if identity is not None and batch.get("digest") != _digest(batch, identity):
        return "is damaged (its content does not match its digest)"
    if expected is None or [len(batch["orig"]), len(batch["recon"])] == [expected["images"], expected["repetitions"]]:
        return None
    return "holds another number of images or repetitions than it says"


def _is_batch(value):
    def images(tensor):
        return torch.is_tensor(tensor) and tensor.ndim == 4 and tensor.layout == torch.strided and tensor.is_cpu

    def all_like(tensors, orig):
        return isinstance(tensors, list) and all(images(tensor) and tensor.shape == orig.shape for tensor in tensors)

    if not (isinstance(value, dict) and images(orig := value.get("orig")) and all_like(value.get("recon"), orig)):
        return False
    identity = value.get("identity")
    plain = isinstance(identity, dict) and all(type(part) in (int, str) for part in identity.values())
    return identity is None or (plain and all_like(value.get("masked"), orig))


def _take(source, target):
    """Makes `target` the same file as `source`, or a copy of it; False if that can no longer be read."""
    if link(source, target):
        return True
    try:
        data = source.read_bytes()
    except OSError:
        return False
    write_bytes(target, data)
    return True


# ---------------------------------------------------------------------------------------- what a JSON file may hold


def _is_count(value):
    return type(value) is int and 0 <= value <= _LARGEST


def _is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


_LARGEST = 2**53  # whole numbers up to here are the same in every reader of JSON
_DEEPEST = 32  # tables and lists in each other
_COUNT = ("a whole number, 0 or more", _is_count)
_POSITIVE = ("a whole number, 1 or more", lambda value: _is_count(value) and value > 0)
_SHARE = ("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
_FLAG = ("true or false", lambda value: type(value) is bool)
_TEXT = ("text", lambda value: isinstance(value, str))
_TABLE = ("a table", lambda value: isinstance(value, dict))


def _list_of(kind, length=None):
    what, fits = kind
    return (
        f"a list, each {what}",
        lambda value: isinstance(value, list) and (length is None or len(value) == length) and all(map(fits, value)),
    )


def _table_of(kind):
    what, fits = kind
    return f"a table, each {what}", lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _or_null(kind):
    what, fits = kind
    return f"{what}, or null", lambda value: value is None or fits(value)


# What the fields must be where they are there, and those that must be; others may be anything.
_MANIFEST = {"format": _POSITIVE, "settings": _TABLE, "sides": _table_of(_TABLE), "versions": _TABLE}
_SIDE = {
    "dataset": _TEXT,
    "fingerprint": _TEXT,
    "images": _POSITIVE,
    "batches": _POSITIVE,
    "batch_size": _POSITIVE,
    "center_crop": _FLAG,
    "match_resolution": _or_null(_POSITIVE),
    "treatment": _TABLE,
    "skipped": _list_of(_list_of(_TEXT, 2)),
    "labels": _or_null(_list_of(_TEXT)),
    "positions": _or_null(_list_of(_COUNT)),  # of earlier versions
}
_RESULTS = {
    "metrics": _table_of(_TABLE),
    "repetitions": _POSITIVE,
    "images": _table_of(_COUNT),
    "failures": _table_of(_COUNT),
    "settings": _TABLE,
    "sides": _table_of(_TABLE),
}
_METRIC = {"roc_auc": _SHARE, "interval_95": _or_null(_list_of(_SHARE, 2)), "bootstrap": _COUNT}


def _parse(text, fields, required):
    """JSON text that must be a table with these fields.

    Raises:
        ValueError: it is no such table; the message says where.
        RecursionError: it is nested too deeply to be read at all.
    """
    value = json.loads(text)
    level = [value]
    for _ in range(_DEEPEST):
        level = [part for whole in level if isinstance(whole, (dict, list)) for part in _parts(whole)]
    if level:
        raise RecursionError
    _check_fields(value, fields, required)
    return value


def _parts(value):
    return value.values() if isinstance(value, dict) else value


def _check_fields(table, fields, required=(), where=""):
    if not isinstance(table, dict):
        raise ValueError(f"{_short(table)} is no table")
    for name, (what, fits) in fields.items():
        if name in table and not fits(table[name]):
            raise ValueError(f"{where}{name} is {_short(table[name])}, not {what}")
    if missing := [name for name in required if name not in table]:
        raise ValueError(f"{where}{missing[0]} is missing")


@functools.lru_cache(maxsize=8)
def _read_manifest(path, version):
    """The manifest in a file of which `version` tells when it is another one.

    Raises:
        OSError, ValueError, RecursionError.
    """
    manifest = _parse(path.read_text(encoding="utf-8"), _MANIFEST, ["settings", "sides"])
    ours = manifest.get("format") is not None
    if ours and manifest["format"] != FORMAT:
        raise ValueError(f"its format {manifest['format']} is of a later version of this program")
    for side, entry in manifest["sides"].items():
        if side not in SIDES:
            raise ValueError(f"sides.{side} is unknown")
        _check_fields(entry, _SIDE, ["images", "batch_size", "batches"] if ours else [], f"sides.{side}.")
        _check_sizes(entry, f"sides.{side}")
    _check_fields(manifest["settings"], {"reps_per_image": _POSITIVE}, ["reps_per_image"] if ours else [], "settings.")
    return manifest


def _check_sizes(entry, where):
    """Whether the numbers of a side's entry agree, where it has them."""
    images, size = entry.get("images"), entry.get("batch_size")
    if images and size and entry.get("batches", 0) != -(-images // size):
        raise ValueError(f"{where} tells of {images} images in batches of {size}, but {entry.get('batches')} batches")
    for name in ("labels", "positions"):
        if images and entry.get(name) is not None and len(entry[name]) != images:
            raise ValueError(f"{where} tells of {images} images and of {len(entry[name])} {name}")


def differences(old, new, prefix=""):
    """The entries in which two nested dicts differ, as text `key: old there, new here`."""
    rows = []
    for name in sorted({*old, *new}):
        there, here = old.get(name), new.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            rows += differences(there, here, f"{prefix}{name}.")
        elif there != here:
            rows.append(f"{prefix}{name}: {_short(there)} there, {_short(here)} here")
    return rows


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


# ------------------------------------------------------------------------------------------------------- scores


def write_csv(path, header, rows):
    """Writes a table: `header` a list of names, `rows` an iterable of lists.

    Text is made printable; what a spreadsheet would take for a formula gets an apostrophe in front.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_harmless(cell) for cell in row] for row in rows)
    write_text(path, text.getvalue())


def _harmless(cell):
    """A cell of a table; text is one line, and never a formula."""
    if not isinstance(cell, str):
        return cell
    try:
        float(cell)
        return cell  # "-0.5" is a number
    except ValueError:
        text = printable(cell)
        return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


RESULTS = "results.json"


def write_scores(path, sides):
    """Writes `scores_{metric}.csv`: one row per image.

    Args:
        path: the file.
        sides: `{"pos": table, "neg": table}`, a table a dict of `position` (N,) the image's index in its data set,
            `batch` (N,) the number of its batch file, `score` (N,) and `distances` (R, N), one row per repetition.
    """
    count = len(next(iter(sides.values()))["distances"])
    header = ["side", "position", "batch", "score", *(f"distance_rep{rep}" for rep in range(count))]
    write_csv(path, header, (row for side, table in sides.items() for row in _score_rows(side, table)))


def _score_rows(side, table):
    numbers = np.column_stack([table["score"], *table["distances"]])  # (N, 1 + R)
    for position, batch, row in zip(table["position"], table["batch"], numbers, strict=True):
        yield [side, position, batch, *(f"{value:.9g}" for value in row)]  # 9 digits give a float32 back exactly


def read_scores(path):
    """The tables that `write_scores` wrote, as NumPy arrays.

    Raises:
        UserError: the file cannot be read, or is no such table.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if unknown := {row["side"] for row in rows} - SIDES.keys():
            raise ValueError(f"a side is {_short(unknown.pop())}")
        if not rows:
            raise ValueError("it has no rows")
        own = {
            side: [row for row in rows if row["side"] == side] for side in dict.fromkeys(row["side"] for row in rows)
        }
        return {side: _score_table(own[side]) for side in own}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from error
    except (ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
        raise UserError(f"{path} is no table of scores ({error}); run detect.py again") from error


def _score_table(rows):
    names = [name for name in rows[0] if name and name.startswith("distance_rep")]
    table = {
        "position": np.array([int(row["position"]) for row in rows], dtype=np.int64),
        "batch": np.array([int(row["batch"]) for row in rows], dtype=np.int64),
        "score": np.array([float(row["score"]) for row in rows]),
        "distances": np.array([[float(row[name]) for row in rows] for name in names]),
    }
    if min(table["position"].min(), table["batch"].min()) < 0:
        raise ValueError("a position or batch is negative")
    if not names or not all(np.isfinite(table[name]).all() for name in ("score", "distances")):
        raise ValueError("there are no distances, or not all are finite numbers")
    return table


def read_results(folder):
    """`results.json` of a results folder, or None where there is none.

    Raises:
        UserError: the file cannot be read, or is no such summary.
    """
    path = Path(folder) / RESULTS
    if not path.is_file():
        return None
    try:
        results = _parse(path.read_text(encoding="utf-8"), _RESULTS, ["metrics"])
        for name, metric in results["metrics"].items():
            _check_fields(metric, _METRIC, where=f"metrics.{name}.")
        return results
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); change its permissions") from error
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} cannot be read ({reason}); delete it and run detect.py again") from error


def write_results(folder, shared, metrics):
    """Writes `results.json`: the facts that the metrics share, and one entry per metric.

    Metrics scored earlier stay if they share those facts (folder settings, images, repetitions); else they go, for
    they were measured on something else.

    Args:
        folder: the results folder.
        shared: a dict of JSON types.
        metrics: `{name: {...}}`, JSON types; what a distance depends on is in its entry `options`.

    Returns:
        list: a line for the user of each reason for which earlier metrics go or are replaced by others.
    """
    shared, metrics = json.loads(json.dumps([shared, metrics]))
    earlier = read_results(folder) or {**shared, "metrics": {}}
    old = earlier.pop("metrics")
    others, lines = ", ".join(name for name in old if name not in metrics), []
    if (differing := differences(earlier, shared)) and others:
        lines.append(f"{RESULTS} no longer tells of {others}, measured otherwise ({'; '.join(differing[:4])})")
    for name in old.keys() & metrics.keys():
        if changed := differences(_options(old[name]), _options(metrics[name])):
            lines.append(f"earlier {name} scores were made with other options and are replaced ({'; '.join(changed)})")
    write_json(Path(folder) / RESULTS, {**shared, "metrics": {**({} if differing else old), **metrics}})
    return lines


def _options(entry):
    return entry.get("options", {}) if isinstance(entry, dict) else {}
