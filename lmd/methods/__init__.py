"""Detectors on one trained model, one a file behind the contract in `base`."""

import importlib

from basics.console import choose

METHODS = {  # name: module and class, imported when asked for
    "combined": ("lmd.methods.combined", "Combined"),
    "ddpm_ood": ("lmd.methods.ddpm_ood", "DDPMOOD"),
    "diffpath": ("lmd.methods.diffpath", "DiffPath"),
    "eigenscore": ("lmd.methods.eigenscore", "EigenScore"),
    "lmd": ("lmd.methods.lmd", "LMD"),
    "msma": ("lmd.methods.msma", "MSMA"),
    "projection_regret": ("lmd.methods.projection_regret", "ProjectionRegret"),
    "ufcod": ("lmd.methods.ufcod", "UFCOD"),
}


def create(name, **settings):
    """The `base.Method` called `name`; `settings` are its class's.

    Raises:
        UserError: there is no such method; the message lists them.
    """
    module, attribute = choose(name, METHODS, "method")
    return getattr(importlib.import_module(module), attribute)(**settings)
