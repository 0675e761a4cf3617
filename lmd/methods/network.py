"""The network at levels of noise, many images and levels in one call.

Levels are told by their noise ratio g = b/a of x_t = a x0 + b z, which means the same for VP, sub-VP and VE; x0 is in
the model's own range.  A network of discrete times is asked at levels that it was trained at, never between them.
"""

import dataclasses
import math

import torch

from basics import noise
from basics.console import UserError
from basics.pixels import to_model_range
from losses import TRAINING_EPS
from models import memory
from models.score import ScoreModel
from sde_lib import VESDE, VPSDE, per_image

TOLERANCE = 0.25  # in ln g, by which a level may miss what was asked for


@dataclasses.dataclass(frozen=True)
class Levels:
    """Levels of noise, or the level of each row of a batch.

    Attributes:
        t, alpha, std: (L,) float32, the network's time and x_t = alpha x0 + std z.
    """

    t: torch.Tensor
    alpha: torch.Tensor
    std: torch.Tensor

    def __getitem__(self, rows):
        return Levels(self.t[rows], self.alpha[rows], self.std[rows])

    def __len__(self):
        return len(self.t)

    def noisy(self, x0, z):
        """x_t of images x0 (L, C, H, W) and noise z of that shape, or 0; one level a row."""
        return per_image(self.alpha) * x0 + per_image(self.std) * z

    def eps(self, score, x):
        """The noise (L, C, H, W) that a `models.score.Score` predicts in x (L, C, H, W), one level a row."""
        return -per_image(self.std) * score(x, self.t)


def levels_at(model, ratios):
    """The levels of some noise ratios; a network of discrete times gets the nearest of those that it was trained at.

    Args:
        model: a `trained_model.TrainedModel`.
        ratios: (L,) numbers above 0.

    Returns:
        `Levels` on the model's device.

    Raises:
        UserError: the network was trained at none near one of them.
    """
    score, wanted = model.score, torch.tensor(ratios, dtype=torch.float64).log()  # (L,)
    if score.continuous:
        t = score.sde.time_at(-wanted).clamp(TRAINING_EPS, score.sde.T)
        alpha, std = score.sde.marginal(t)
    else:
        t, alpha, std = _discrete(score.sde, wanted)
    missed = ~(((std.double() / alpha.double()).log() - wanted).abs() <= TOLERANCE)  # also where it is NaN
    if missed.any():
        trained = "continuous times" if score.continuous else f"{score.sde.N} discrete levels"
        raise UserError(
            f"this checkpoint, trained at {trained}, has no level of the noise ratio "
            f"{wanted[missed][0].exp().item():.3g}; use another checkpoint or another method"
        )
    return Levels(*(value.float().to(model.device) for value in (t, alpha, std)))


def _discrete(sde, wanted):
    """t, alpha and std (L,) of the steps of the discrete process whose ln(std / alpha) is nearest to `wanted` (L,)."""
    if isinstance(sde, VESDE):
        std = sde.sigmas.cpu()
        alpha = torch.ones_like(std)
    else:
        bar = sde.alphas_bar.cpu()
        alpha, std = bar.sqrt(), (1 - bar).sqrt()
    misses = ((std / alpha).double().log() - wanted[:, None]).abs()  # (L, N)
    step = misses.nan_to_num(float("inf")).argmin(dim=1)  # NaN: with few steps VP's have a variance above 1
    t = step.float() / max(1, sde.N - 1)
    while (short := sde.timestep(t) < step).any():  # rounding down would make it the step before
        t = torch.where(short, torch.nextafter(t, torch.ones_like(t)), t)
    return t, alpha[step], std[step]


def stepping(score):
    """The score for solvers that step between `levels_at`: its SDE has the marginals that the network was trained on.

    DDPM's discrete process has gone k + 1 of N steps where its label is k, at t = k / (N - 1), and the VP SDE a time of
    k / (N - 1): their noise is 4 % apart at the ratio 0.05 (N = 1000), and at k = 0 the SDE has none.  SMLD's levels
    are those of the VE SDE.

    Args:
        score: a `models.score.Score`.
    """
    if score.continuous or isinstance(score.sde, VESDE):
        return score
    return ScoreModel(score.net, _DDPM(score.sde.beta_min, score.sde.beta_max, score.sde.N), continuous=False)


class _DDPM(VPSDE):
    """VP with the marginals of its discrete process."""

    def marginal(self, t):
        bar = self.table("alphas_bar", t.float()).to(t.dtype)  # `_discrete` chose t so that float32 gives the step
        return bar.sqrt(), (1 - bar).sqrt()


@torch.no_grad()
def in_chunks(model, count, work, fold=1):
    """work(rows) for rows (n,) of range(count), as many at once as the network sees; joined, on the CPU.

    Args:
        model: a `trained_model.TrainedModel`.
        count: rows in all.
        work: (n,) int64 on the CPU to (n, ...).
        fold: images that the network sees for a row.

    Raises:
        UserError: there is too little memory for one.
    """
    at_once, done, parts = max(1, model.rows // fold), 0, []
    while done < count:
        rows = torch.arange(done, min(done + at_once, count))
        part = memory.attempt(work, rows)
        if part is not None:
            parts.append(part.cpu())
            done += len(rows)
        elif len(rows) == 1:
            raise UserError(f"{model.device} has too little memory for one image")
        else:
            at_once = len(rows) // 2
    return torch.cat(parts)


def measure(model, images, levels, work, keys=None, fold=1):
    """What is found in every image at every level.

    Args:
        model: a `trained_model.TrainedModel`.
        images: (B, C, H, W) uint8.
        levels: `Levels` (L,); the same level twice is two draws of the noise.
        work: called as work(at, x0, draw) with the rows' `Levels` (n,), images x0 (n, C, H, W) in the model's range and
            their `noise.KeyedNoise`; returns (n, ...).
        keys: (B,) int64 of the noise, or None where none is drawn.
        fold: images that the network sees for each row.

    Returns:
        (B, L, ...) on the CPU.
    """
    count = len(levels)
    x0 = to_model_range(images.to(model.device), model.config.data.centered)  # (B, C, H, W)
    if keys is not None:
        keys = noise.repetition_keys(keys, range(count)).view(count, -1).T.flatten()  # (B L,), all of an image first

    def some(rows):
        image, at = (rows // count).to(model.device), levels[(rows % count).to(model.device)]
        draw = None if keys is None else noise.KeyedNoise(keys[rows], x0.shape[1:], model.device)
        return work(at, x0[image], draw)

    return in_chunks(model, len(images) * count, some, fold).unflatten(0, (len(images), count))


def even_ratios(first, last, count):
    """`count` noise ratios from `first` to `last`, even in their logarithms: a list."""
    if count == 1:
        return [first]
    return [first * math.exp(math.log(last / first) * i / (count - 1)) for i in range(count)]
