"""A checkpoint's weights as a model ready for use."""

import dataclasses
from pathlib import Path

import torch

import models
import sde_lib
from basics import files, noise
from basics.console import UserError, counted
from basics.machine import choose_device
from configs.base import from_dict, to_dict
from models import inference, memory
from models.score import ScoreModel
from storage import diffusers_weights
from storage.checkpoints import config_of, find_checkpoint, load_ema_weights

_MOST = 4096  # images in the network at once on a GPU, more of which make it no faster


@dataclasses.dataclass(frozen=True, eq=False, repr=False)  # each is itself alone, so that it can be looked up
class TrainedModel:
    """A model ready for use.

    Attributes:
        config: the config tree that it was trained with.
        score: its `models.score.ScoreModel`, on the device.
        device: torch.device.
        rows: images in the network at once; the results do not depend on it.
        source: the `Source` that it is from, where that is known.
    """

    config: object
    score: ScoreModel
    device: torch.device
    rows: int
    source: object = None

    def __repr__(self):
        data, where = self.config.data, "" if self.source is None else f" {self.source.path}"
        return f"model{where} of {data.image_size}x{data.image_size} pixels, {counted(data.num_channels, 'channel')}"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model is from.

    Attributes:
        path: of the checkpoint.
        hash: of its weights' file.
        step: training steps, 0 where unknown.
    """

    path: str
    hash: str
    step: int


def open_model(ckpt_path, config=None, device="auto", precision="auto", memory_gb=None):
    """The `TrainedModel` of a checkpoint.

    Args:
        ckpt_path: the file, as --ckpt_path.
        config: the config tree; by default the checkpoint's own.
        device: 'auto', 'cpu', 'cuda' or 'cuda:i', or a torch.device.
        precision: 'fp32', 'tf32', 'bf16' or 'auto', see `models.inference.prepare`.
        memory_gb: memory for the network's activations, see `rows_within`.

    Raises:
        UserError: as `load_model`, there is too little memory, or the file was changed while it was read.
    """
    device = choose_device(device) if isinstance(device, str) else device
    precision, path = inference.resolve(precision, device), find_checkpoint(ckpt_path)
    config = from_dict(config_of(path)) if config is None else config
    with files.unchanged(weights_path(path)) as content:
        score, step = load_model(config, path, device, precision)
    source = Source(str(path), content, step)
    return TrainedModel(config, score, device, _rows(config, score, device, memory_gb), source)


def _rows(config, score, device, memory_gb):
    """Images in the network at once: on a GPU by what few of them are seen to need."""
    rows = rows_within(memory_gb, config, device)
    if device.type != "cuda":
        return rows
    data = config.data
    shape, t = (data.num_channels, data.image_size, data.image_size), torch.full((1,), 0.5, device=device)
    with torch.no_grad():
        return memory.rows_that_fit(lambda n: score(torch.zeros(n, *shape, device=device), t), device, _MOST, memory_gb)


def identity(config, source, seed, precision):
    """What is measured with a model depends on, besides method and images; JSON types."""
    tree = to_dict(config)
    return {
        "checkpoint": source.hash,
        "config": {name: tree[name] for name in ("data", "model", "sampling")},
        "seed": seed,
        "precision": precision,
        "noise": noise.SCHEME,
    }


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


def rows_within(memory_gb, config, device):
    """How many images the network may see at once, by an estimate; on a GPU what is measured is better.

    An image's activations are estimated as twice the skip connections of its U-Net plus some tensors of the widest
    level, which is about what was measured.

    Args:
        memory_gb: the budget, or None for 0.5 GB.
        config: the config tree.
        device: torch.device; on a GPU the result is 1 at least.

    Raises:
        UserError: the budget does not hold one image, or is no number of gigabytes.
    """
    memory.check_budget(memory_gb)
    if memory_gb is None:
        memory_gb = 0.5
    model, size = config.model, config.data.image_size
    levels = [4 * model.nf * m * (size // 2**i) ** 2 for i, m in enumerate(model.ch_mult)]  # bytes of one tensor each
    per_image = 2 * ((model.num_res_blocks + 1) * sum(levels) + 8 * max(levels))
    rows = int(memory_gb * 1e9 // per_image)
    if rows < 1 and device.type == "cpu":
        raise UserError(f"--memory_gb {memory_gb:g} is too little: one image needs about {per_image / 1e9:.3f}")
    return max(1, rows)
