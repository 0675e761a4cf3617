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
    return method_class(name)(**settings)


def method_class(name):
    """The class of the method called `name`, whose parameters are its settings; raises as `create`."""
    module, attribute = choose(name, METHODS, "method")
    return getattr(importlib.import_module(module), attribute)
