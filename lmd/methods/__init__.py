"""Detectors on one trained model, one a file behind the contract in `base`."""

import importlib

from basics.console import choose

METHODS = {  # name: module and class, imported when asked for
    "diffpath": ("lmd.methods.diffpath", "DiffPath"),
    "lmd": ("lmd.methods.lmd", "LMD"),
    "msma": ("lmd.methods.msma", "MSMA"),
}


def create(name, **settings):
    """The `base.Method` called `name`; `settings` are its class's.

    Raises:
        UserError: there is no such method; the message lists them.
    """
    module, attribute = choose(name, METHODS, "method")
    return getattr(importlib.import_module(module), attribute)(**settings)
