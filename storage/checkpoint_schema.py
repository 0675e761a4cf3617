"""What the parts of a checkpoint must be, checked before any of them is used.

Each function takes what was read from a file, whatever that is, and raises `tensor_files.WrongFile`, which says in a
few words what is wrong.
"""

import math
import re

import numpy as np
import torch

from basics.tensor_files import WrongFile, is_finite, is_plain
from configs.base import ABSENT, TREE

LARGEST = 2**53  # of whole numbers: steps, seeds
_PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")  # of DataParallel, which is published, and of torch.compile
_REQUIRED = {"data": ("image_size", "num_channels", "centered"), "model": ("name",), "training": ("sde", "continuous")}
_MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's


def check_parts(content):
    """A checkpoint with the parts that all readers use, checked; the optimizer is left for `adam_state`.

    Args:
        content: what the file holds.

    Returns:
        dict: as the file, with step a plain int and config of plain types; a bare state dict as `model`, with `ema`
        None and step 0.
    """
    if not isinstance(content, dict):
        raise WrongFile("it is no table of parts")
    if content and all(isinstance(name, str) and torch.is_tensor(value) for name, value in content.items()):
        content = {"model": content, "ema": None, "step": 0}
    if not {"model", "ema", "step"} <= content.keys():
        raise WrongFile("it lacks one of: model, ema, step")
    averages = content["ema"].get("shadow_params") if isinstance(content["ema"], dict) else None
    if not isinstance(content["model"], dict) or not (content["ema"] is None or isinstance(averages, (list, tuple))):
        raise WrongFile("its weights are no tensors by name")
    check_weights(content["model"])
    without_prefix(content["model"])
    check_weights({f"EMA weight {index}": value for index, value in enumerate(averages or [])})
    checked = {**content, "step": whole(content["step"], "its step")}
    if checked.get("config") is not None:
        checked["config"] = plain_config(checked["config"])
    for part in ("randomness", "data"):
        if not isinstance(checked.get(part, {}), dict):
            raise WrongFile(f"its part {part} is no table")
    if "seed" in checked.get("randomness", {}):
        whole(checked["randomness"]["seed"], "its seed", -LARGEST)
    if not (isinstance(precision := checked.get("precision", ""), str) and len(precision) <= 16):
        raise WrongFile("its precision is no word")
    if "data" in checked:
        check_data(checked["data"])
    return checked


def check_weights(weights):
    """Checks name -> tensor: text, and dense floating-point numbers."""
    for name, value in weights.items():
        if not isinstance(name, str) or not torch.is_tensor(value):
            raise WrongFile("its weights are no tensors by name")
        if not is_plain(value):
            raise WrongFile(f"{name[:80]} is of {value.dtype}, or no dense tensor; weights are floating-point numbers")


def without_prefix(weights):
    """Weights (name -> tensor) by the network's own names, without those that wrappers put in front."""
    bare = {_PREFIXES.sub("", name): value for name, value in weights.items()}
    if len(bare) < len(weights):
        raise WrongFile("it holds two weights of one name")
    return bare


def whole(value, what, least=0):
    """A whole number, from `least`, as an int."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= LARGEST:
        raise WrongFile(f"{what} is no whole number from {least} up")
    return int(value)


def number(value, what, least=0.0, most=math.inf):
    """A finite number of a range, as a float."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise WrongFile(f"{what} is no number")
    if not least <= value <= most or not -LARGEST <= value <= LARGEST:  # nor NaN
        raise WrongFile(f"{what} is no number from {least:g} to {most:g}")
    return float(value)


def check_data(data):
    """Checks what a checkpoint says of the images it was trained on."""
    if not isinstance(data.get("fingerprint"), str) or not isinstance(data.get("source"), str):
        raise WrongFile("its part data has no fingerprint or source")
    whole(data.get("images"), "its number of images")


# --------------------------------------------------------------------------------------------------- the config


def plain_config(config):
    """A config as nested dicts of JSON types, checked for its sections and the types of its fields.

    Which values the fields may have is another question.
    """
    if not isinstance(config, dict):
        raise WrongFile("its config is no table")
    plain = {}
    for name, value in config.items():
        known = TREE.get(name) if isinstance(name, str) else None
        if known is None or isinstance(known, dict) != isinstance(value, dict):
            raise WrongFile(f"its config has a part {str(name)[:40]!r} that configs/base.py does not have so")
        if isinstance(known, dict):
            plain[name] = {field: _plain_field(name, field, entry) for field, entry in value.items()}
        else:
            plain[name] = _plain_field("", name, value)
    for section, names in _REQUIRED.items():
        if missing := [name for name in names if name not in plain.get(section, {})]:
            raise WrongFile(f"its config lacks {section}.{missing[0]}")
    if not all(isinstance(plain[section][name], str) for section, name in (("model", "name"), ("training", "sde"))):
        raise WrongFile("its config names no network or no SDE")
    return plain


def _plain_field(section, name, value):
    path = f"{section}.{name}".lstrip(".")[:80]
    if not isinstance(name, str):
        raise WrongFile("its config has fields without names")
    if isinstance(value, (list, tuple)):
        if len(value) > 64:
            raise WrongFile(f"its config's {path} is too long")
        plain = [_plain_scalar(path, entry) for entry in value]
    else:
        plain = _plain_scalar(path, value)
    default = (TREE[section] if section else TREE).get(name, ABSENT)
    if default is not ABSENT and not _same_kind(plain, default):
        raise WrongFile(f"its config's {path} is of another type than configs/base.py has")
    return plain


def _plain_scalar(path, value):
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, bool) or (isinstance(value, str) and len(value) <= 4096):
        return value
    if (isinstance(value, int) and -LARGEST <= value <= LARGEST) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise WrongFile(f"its config's {path} is neither a number nor text")


def _same_kind(value, default):
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    if isinstance(default, (tuple, list)):
        return isinstance(value, list) and all(isinstance(entry, int) and entry > 0 for entry in value)
    return isinstance(value, type(default))


def complete(config):
    """A config (nested dicts), with the fields that it lacks and that have a usual value in the tree."""
    filled = {}
    for name, default in TREE.items():
        if isinstance(default, dict):
            usual = {field: value for field, value in default.items() if value is not ABSENT}
            filled[name] = {**usual, **config.get(name, {})}
        else:
            filled[name] = config.get(name, default)
    return filled


# ------------------------------------------------------------------------------------------------------ training


def check_average(ema):
    """Checks the numbers of an EMA's state besides its weights."""
    whole(ema.get("num_updates"), "the EMA's number of updates")
    number(ema.get("decay"), "the EMA's decay", 0.0, 1.0)


def adam_state(optimizer, parameters, step):
    """Adam's moments and counts of a checkpoint, checked; its rates are left out, for the config has them.

    Args:
        optimizer: the checkpoint's part.
        parameters: the network's, in order.
        step: the steps of training done.

    Returns:
        dict: position of the parameter -> {'step' (), 'exp_avg', 'exp_avg_sq' of its shape}, float32.
    """
    order = _order(optimizer, len(parameters))
    state = optimizer.get("state")
    if not isinstance(state, dict) or not set(state) <= set(order):
        raise WrongFile("the optimizer's state is no table of its parameters")
    checked = {}
    for position, (key, parameter) in enumerate(zip(order, parameters, strict=True)):
        if key in state:
            checked[position] = _moments(state[key], position, parameter)
        elif parameter.requires_grad and step > 0:
            raise WrongFile(f"the optimizer's state lacks parameter {position}")
    return checked


def _order(optimizer, count):
    """The keys of the parameters in an optimizer's state, by position."""
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    if not isinstance(groups, list) or len(groups) != 1 or not isinstance(groups[0], dict):
        raise WrongFile("the optimizer's state has no single group of parameters")
    order = groups[0].get("params")
    if not isinstance(order, list) or not all(type(key) is int for key in order) or len(set(order)) != len(order):
        raise WrongFile("the optimizer's parameters are no list of numbers")
    if len(order) != count:
        raise WrongFile(f"the optimizer has {len(order)} parameters, the config's network {count}")
    for name in ("lr", "eps", "weight_decay"):
        number(groups[0].get(name, 0.0), f"the optimizer's {name}")
    return order


def _moments(entry, position, parameter):
    what = f"the optimizer's state of parameter {position}"
    if not isinstance(entry, dict) or not all(is_plain(entry.get(name)) for name in _MOMENTS):
        raise WrongFile(f"{what} has no {' and '.join(_MOMENTS)} of floating-point numbers")
    for name in _MOMENTS:
        if entry[name].shape != parameter.shape:
            shapes = f"{tuple(entry[name].shape)}, the config's is {tuple(parameter.shape)}"
            raise WrongFile(f"{what}: {name} is {shapes}")
        if not is_finite(entry[name]):
            raise WrongFile(f"{what}: {name} holds NaN or infinite numbers, so training diverged")
    if entry["exp_avg_sq"].numel() and entry["exp_avg_sq"].min() < 0:
        raise WrongFile(f"{what}: exp_avg_sq holds negative numbers")
    step = entry.get("step")
    if torch.is_tensor(step) and step.numel() == 1 and (is_plain(step) or step.dtype in (torch.int32, torch.int64)):
        step = step.item()
    count = number(step, f"{what}: step")
    return {"step": torch.tensor(count, dtype=torch.float32), **{name: entry[name].float() for name in _MOMENTS}}
