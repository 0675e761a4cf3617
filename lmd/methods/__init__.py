"""Detectors on one trained model, one a file behind the contract in `base`."""

import importlib

from basics.console import choose

METHODS = {  # name: module and class, imported when asked for
    "lmd": ("lmd.methods.lmd", "LMD"),
    "cfs": ("lmd.methods.cfs", "CFS"),
    "complexity": ("lmd.methods.complexity", "Complexity"),
    "denoising_loss": ("lmd.methods.denoising_loss", "DenoisingLoss"),
    "gepc": ("lmd.methods.gepc", "GEPC"),
    "msma": ("lmd.methods.msma", "MSMA"),
    "nll": ("lmd.methods.nll", "NLL"),
    "scoped": ("lmd.methods.scoped", "Scoped"),
}


def create(name, **settings):
    """The `base.Method` called `name`; `settings` are its class's.

    Raises:
        UserError: there is no such method; the message lists them.
    """
    module, attribute = choose(name, METHODS, "method")
    return getattr(importlib.import_module(module), attribute)(**settings)
