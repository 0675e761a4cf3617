"""A checkpoint's weights as a score model ready for inference."""

from pathlib import Path

import models
import sde_lib
from configs.base import to_dict
from models import inference
from models.score import ScoreModel
from storage import diffusers_weights
from storage.checkpoints import load_ema_weights


def load_model(config, ckpt_path, device, precision="auto", compiled=False):
    """The score model of a checkpoint's EMA weights, in eval mode, and how many steps it was trained, 0 if unknown.

    Precision and `compiled` as in `models.inference.prepare`.

    Raises:
        UserError: see `checkpoints.load_ema_weights`, `diffusers_weights.load` and `models.inference.prepare`.
    """
    if Path(ckpt_path).is_dir():
        net, step = diffusers_weights.load(ckpt_path, config), 0
    else:
        net = models.create_model(config)
        step = load_ema_weights(ckpt_path, net, to_dict(config))
    net = inference.prepare(net, device, precision, compiled)
    return ScoreModel(net, sde_lib.create_sde(config), config.training.continuous), step


def weights_path(ckpt_path):
    """The file of a checkpoint's weights: itself, or that in a folder of diffusers'."""
    return diffusers_weights.weights_path(ckpt_path) if Path(ckpt_path).is_dir() else ckpt_path
