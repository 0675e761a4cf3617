"""Detectors on one trained model, one a file behind the contract in `base`."""

import importlib

from basics.console import choose
from lmd.methods.settings import checked

METHODS = {  # name: module and class, imported when asked for
    "cfs": ("lmd.methods.cfs", "CFS"),
    "combined": ("lmd.methods.combined", "Combined"),
    "complexity": ("lmd.methods.complexity", "Complexity"),
    "ddpm_ood": ("lmd.methods.ddpm_ood", "DDPMOOD"),
    "denoising_loss": ("lmd.methods.denoising_loss", "DenoisingLoss"),
    "diffpath": ("lmd.methods.diffpath", "DiffPath"),
    "eigenscore": ("lmd.methods.eigenscore", "EigenScore"),
    "gepc": ("lmd.methods.gepc", "GEPC"),
    "lmd": ("lmd.methods.lmd", "LMD"),
    "msma": ("lmd.methods.msma", "MSMA"),
    "nll": ("lmd.methods.nll", "NLL"),
    "projection_regret": ("lmd.methods.projection_regret", "ProjectionRegret"),
    "scoped": ("lmd.methods.scoped", "Scoped"),
    "ufcod": ("lmd.methods.ufcod", "UFCOD"),
}


def create(name, **settings):
    """The `base.Method` called `name`; `settings` are its class's.

    Raises:
        UserError: there is no such method, and the message lists them; or it cannot have these settings.
    """
    method = method_class(name)
    return method(**checked(method, settings, name))


def method_class(name):
    """The class of the method called `name`, whose parameters are its settings; raises as `create`."""
    module, attribute = choose(name, METHODS, "method")
    return getattr(importlib.import_module(module), attribute)
