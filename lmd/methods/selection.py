"""Which methods to compare, as text: names with settings, `all`, or the ablations of the LMD paper.

    lmd:mask_type=center,lmd:mask_type=checkerboard_alt:num_blocks=4,lmd:metrics=[MSE,SSIM]

Commas separate methods and colons settings; a value is a number, true, false, null, a word, or a list in brackets.
"""

import json
import re
from pathlib import Path

import torch

from basics.console import UserError, choose
from lmd.methods import METHODS, create, method_class
from lmd.methods.settings import checked, text_of
from lmd.process import PUBLISHED, check_typed
from metrics import perceptual, shift_tolerant, simclr

ALL, ABLATIONS = "all", "ablations"
_REST_OF_LIST = r"(?![^\[\]]*\])"  # what follows is not the rest of a list in brackets


def select(text, flag="--methods"):
    """The methods that a text names, each once.

    Args:
        text: see above.
        flag: that the text was given as, for messages.

    Returns:
        dict: label -> `base.Method`; a label is a name and the settings that were given.

    Raises:
        UserError: an unknown method or setting, or a value that it cannot have; the message lists the choices.
    """
    chosen = {}
    for label, name, settings in _named(text, flag):
        method = _created(label, name, settings, flag)
        if all((method.name, method.settings) != (other.name, other.settings) for other in chosen.values()):
            chosen[label] = method
    if not chosen:
        raise UserError(f"{flag} names no method; choose some of: {ALL}, {ABLATIONS}, {', '.join(METHODS)}")
    return chosen


def check_overrides(chosen, config, typed):
    """Refuses what a command line sets in the config and none of the methods sees.

    Args:
        chosen: the methods.
        config: the config tree.
        typed: paths of the fields that were set on the command line, see `configs.base.typed`.

    Raises:
        UserError: names the fields.
    """
    for name in ("seed", "device"):
        if name in typed:
            raise UserError(f"--config.{name} has no effect here; write --{name}")
    sampling = sorted(path for path in typed if path.startswith("sampling."))
    if any(method.settings.get("sampler") == PUBLISHED for method in chosen):
        check_typed(config, typed)
    elif sampling:
        raise UserError(
            f"--config.{sampling[0]} has no effect: of the methods that sample, none does so as the config says but "
            f"with sampler={PUBLISHED}; write lmd:sampler={PUBLISHED}, or leave it out"
        )


def ablations():
    """The settings of `lmd` that its paper compares, one changed at a time: masks, blocks, repetitions, metrics, lifts.

    Learned metrics are among them where their weights are there.
    """
    changed = {
        "mask_type": ["center", "checkerboard", "random"],
        "num_blocks": [2, 4, 16],  # 8 by default
        "reps": [1, 2, 10],  # 4 by default
        "metrics": ["MSE", "SSIM", *_learned()],
        "lift": ["noise", "both"],
    }
    return [{}, *({name: value} for name, values in changed.items() for value in values)]


def _learned():
    """The learned metrics that need no download."""
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    trunks = perceptual.LPIPS, perceptual.LPIPSVGG, perceptual.LPIPSSqueeze
    found = [metric.name for metric in trunks if (hub / metric.trunk.file).is_file()]
    try:
        shift_tolerant.find_weights()
        found.append(shift_tolerant.ShiftTolerantLPIPS.name)
    except UserError:
        pass
    return [*found, simclr.SimCLR.name] if simclr.WEIGHTS.is_file() else found


# ------------------------------------------------------------------------------------------------------- reading


def _named(text, flag):
    """(label, name, settings) of each method."""
    for word in filter(None, map(str.strip, re.split("," + _REST_OF_LIST, text))):
        if word == ALL:
            yield from ((name, name, {}) for name in METHODS)
        elif word == ABLATIONS:
            yield from ((_label("lmd", settings), "lmd", settings) for settings in ablations())
        else:
            name, *given = re.split(":" + _REST_OF_LIST, word)
            settings = {}
            for key, value in (_setting(word, part, flag) for part in given):
                if key in settings:
                    raise UserError(f"{flag}: '{word}': {key} is given twice; leave one out")
                settings[key] = value
            yield _label(name, settings), name, settings


def _label(name, settings):
    return ":".join([name, *(f"{key}={text_of(value)}" for key, value in settings.items())])


def _setting(word, part, flag):
    name, equals, value = part.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise UserError(f"{flag}: '{word}': settings are written name=value, not '{part}'")
    return name.strip(), _value(value.strip())


def _value(text):
    if text.startswith("[") and text.endswith("]"):
        return [_value(part.strip()) for part in text[1:-1].split(",") if part.strip()]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if value is None or isinstance(value, (bool, int, float, str)) else text


def _created(label, name, settings, flag):
    """The method, its settings checked against what its class takes."""
    if name in (ALL, ABLATIONS):
        raise UserError(f"{flag}: {label}: {name} stands for several methods and has no settings")
    choose(name, {ALL: None, ABLATIONS: None, **METHODS}, "method")
    return create(name, **checked(method_class(name), settings, f"{flag}: {label}"))
