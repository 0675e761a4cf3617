"""Samples of a model, drawn by the way that `config.sampling` names, and the files that training writes of them."""

import io
import math

import numpy as np
import torch
from PIL import Image

import sampling
from basics import files, noise
from basics.console import choose, progress
from basics.pixels import to_data_range
from lmd.process import check_effects, create_process

FILES = "sample.np", "sample.png"  # in the order in which they are written


def draw(trainer, count, word, first=0):
    """Samples number `first` and on of the network as it is: (count, C, H, W) in data range.

    Each is keyed by the seed, `word` (a step, or what the samples are for) and its number.

    Args:
        trainer: a `training.Trainer`.
        count, word, first: see above.
    """
    config, sde = trainer.config, trainer.sde
    sample = create_sampler(config, sde)
    shape = (config.data.num_channels, config.data.image_size, config.data.image_size)
    numbers = torch.arange(first, first + count)
    keys = noise.image_keys(noise.key(config.seed, word, "samples"), numbers, reps=[0])
    source = noise.KeyedNoise(keys, shape, trainer.device)
    return to_data_range(sample(trainer.model, source), config.data.centered)


def create_sampler(config, sde):
    """The config's way of sampling: called as sample(model, noise), gives images in the model's range.

    Raises:
        UserError: an unknown method or solver, or a solver that the SDE does not have.
    """
    return choose(config.sampling.method.lower(), METHODS, "method (config.sampling.method)")(config, sde)


def _predictor_corrector(config, sde):
    process = create_process(config, sde)
    process.check_sampling()

    def sample(model, noise):
        with progress(total=process.steps, unit="step", desc="sampling", leave=False) as bar:
            return process.sample(model, noise, on_step=bar.update)

    return sample


def _probability_flow(config, sde):
    check_effects(config.sampling, sde)
    options = {"noise_removal": config.sampling.noise_removal}
    return lambda model, noise: sampling.sample_ode(model, sde, noise(0, "prior") * sde.prior_std, **options)[0]


METHODS = {"pc": _predictor_corrector, "ode": _probability_flow}  # config.sampling.method


def to_pixels(images):
    """Images (N, C, H, W) in [0, 1], clipped, as an array (N, H, W, C) uint8; cut off, not rounded, as published."""
    return (images.permute(0, 2, 3, 1).cpu() * 255).clamp(0, 255).to(torch.uint8).numpy()


def write(folder, images):
    """Writes `FILES`: (N, H, W, C) uint8, as published, and a picture, a grid; images (N, C, H, W) in [0, 1]."""
    from torchvision.utils import make_grid  # here, as it takes seconds

    array = io.BytesIO()
    np.save(array, to_pixels(images))
    files.write_bytes(folder / FILES[0], array.getvalue())
    grid = make_grid(images.cpu().clamp(0, 1), nrow=max(1, math.isqrt(len(images))), padding=2)  # (3, H', W')
    files.write_png(folder / FILES[1], Image.fromarray((grid.permute(1, 2, 0) * 255).round().byte().numpy()))
