"""What several test modules share: golden numbers, published configs at test size, a training-free score."""

import csv
import importlib.util
from pathlib import Path

import numpy as np
import torch

import models
import sde_lib
from models.score import Score, ScoreModel

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"

_spec = importlib.util.spec_from_file_location("fill", GOLDEN / "fill.py")
_fill = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fill)
fill_, wave = _fill.fill_, _fill.wave


def golden(name):
    """The arrays of tests/golden/{name}.npz."""
    return np.load(GOLDEN / f"{name}.npz")


def read_scores(path):
    """The tables of a scores_{metric}.csv by side, as `storage.scores.write_scores` takes them, but for the names."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    tables = {}
    for side in dict.fromkeys(row["side"] for row in rows):
        own = [row for row in rows if row["side"] == side]
        columns = {name: np.array([row[name] for row in own], float) for name in own[0] if name not in ("side", "file")}
        distances = np.stack([values for name, values in columns.items() if name.startswith("distance_rep")])
        numbers = {name: columns[name].astype(np.int64) for name in ("position", "batch")}
        tables[side] = {**numbers, "score": columns["score"], "distances": distances}
    return tables


def tensor(array):
    """A float32 (or int64) tensor of a golden array."""
    array = np.asarray(array)
    return torch.as_tensor(array).float() if array.dtype.kind == "f" else torch.as_tensor(array)


def load_config(path):
    """The config tree of a file under configs/."""
    spec = importlib.util.spec_from_file_location("leaf", ROOT / "configs" / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def small(path, **model):
    """The config at the size of the golden numbers: 16x16, 32 channels, two levels, one block each."""
    config = load_config(path)
    config.data.image_size = 16
    sizes = {"nf": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,), **model}
    for name, value in sizes.items():
        config.model[name] = value
    return config


def filled_model(config):
    """The network of a config with the golden weights, in eval mode, as a `ScoreModel`."""
    net = models.create_model(config).eval()
    fill_(net.state_dict())
    return ScoreModel(net, sde_lib.create_sde(config), config.training.continuous)


class GaussianScore(Score):
    """The exact score of data N(mean, cov), mean (D,), under an SDE: -(alpha^2 cov + std^2 I)^-1 (x - alpha mean)."""

    continuous = True

    def __init__(self, sde, mean, cov):
        self.sde, self.mean = sde, mean
        self.variances, self.axes = torch.linalg.eigh(cov)

    def __call__(self, x, t):
        alpha, std = (value[:, None] for value in self.sde.marginal(t))  # (B, 1) or (1, 1)
        along = (x.flatten(1) - alpha * self.mean) @ self.axes  # (B, D)
        return -((along / (alpha**2 * self.variances + std**2)) @ self.axes.T).view_as(x)


def close(value, expected, rtol=1e-5, atol=1e-6):
    """Asserts agreement relative to the largest magnitude: float32 sums taken in another order."""
    value, expected = torch.as_tensor(value).double(), torch.as_tensor(np.asarray(expected)).double()
    assert value.shape == expected.shape
    error, scale = (value - expected).abs().max().item(), expected.abs().max().item()
    assert error <= rtol * scale + atol, f"error {error:.3g} of scale {scale:.3g}"
