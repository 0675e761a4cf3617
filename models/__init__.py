"""Score networks: `create_model(config)` builds the one that `config.model.name` names."""

from console import choose


def _ddpm(config):
    from models.ddpm import DDPM

    return DDPM(config)


def _ncsnpp(config):
    from models.ncsnpp import NCSNPP

    return NCSNPP(config)


MODELS = {"ddpm": _ddpm, "ncsnpp": _ncsnpp}


def create_model(config):
    """The network of a config, freshly initialised, in training mode, on the current default device.

    Raises:
        UserError: if `config.model.name` is unknown.
    """
    return choose(config.model.name, MODELS, "model (config.model.name)")(config)
