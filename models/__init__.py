"""Score networks: `create_model(config)` builds the one that `config.model.name` names."""

from basics.console import UserError, choose
from models.ddpm import DDPM
from models.ncsnpp import NCSNPP

MODELS = {"ddpm": DDPM, "ncsnpp": NCSNPP}


def create_model(config):
    """The network of a config, freshly initialised, in training mode, on the current default device.

    Raises:
        UserError: if `config.model.name` is unknown, or the sizes do not fit each other.
    """
    model, size = config.model, config.data.image_size
    halvings = len(model.ch_mult) - 1
    if halvings < 0 or not all(isinstance(m, int) and m > 0 for m in model.ch_mult):
        raise UserError(f"config.model.ch_mult is {tuple(model.ch_mult)}; it needs one positive int per level")
    if size % 2**halvings:
        raise UserError(
            f"images of {size} pixels cannot be halved {halvings} times; config.data.image_size must be a multiple of "
            f"{2**halvings}, or config.model.ch_mult shorter"
        )
    build = choose(model.name, MODELS, "model (config.model.name)")
    try:
        return build(config)
    except ValueError as error:  # torch refuses, say, a width that its groups do not divide
        change = "make config.model.nf a multiple of 32" if "num_groups" in str(error) else "change config.model"
        raise UserError(f"no network can be built from this config: {error}; {change}") from error
