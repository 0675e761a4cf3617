"""The flag --config: a file, or the config that a checkpoint carries where no file is named."""

import itertools
import sys

from absl import flags
from ml_collections.config_flags import config_flags

import console


def define_config(text, checkpoint):
    """Defines the flag, which is required; any value can be overridden: --config.sampling.steps=100.

    Args:
        text: its help.
        checkpoint: the file or folder whose config is taken where the command line names none, or None.
    """
    named = value_of("config") is not None or any(a.lstrip("-").startswith("help") for a in sys.argv[1:])
    if named or not checkpoint:
        console.define_config(text)
        flags.mark_flag_as_required("config")
    else:
        config_flags.DEFINE_config_dict("config", _carried(checkpoint), text)


def value_of(name):
    """The value of a flag in this process's command line before absl has parsed it; None without it."""
    value, words = None, sys.argv[1:]
    for word, following in itertools.zip_longest(words, words[1:]):
        flag, separator, text = word.partition("=")
        if flag in (f"--{name}", f"-{name}"):
            value = text if separator else following
    return value


def _carried(checkpoint):
    config = console.guard(_read, console.expand(checkpoint))
    if config == console.EXIT_INTERRUPTED:
        sys.exit(config)
    return config


def _read(checkpoint):
    import storage  # takes a second, for which --help need not wait
    from configs.base import from_dict

    return from_dict(storage.config_of(checkpoint))
