"""Distances and scores of a results folder, and its ROC-AUC.

The ROC-AUC takes the in-domain images as positives and closeness as their score.  Batch files are read one at a time;
only distances are kept.
"""

import dataclasses

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from basics import noise
from basics.console import UserError, counted, progress
from lmd.distances import distances_of, median_score
from lmd.separation import aupr_in, aupr_out, fpr95
from storage.results_folder import SIDES


@dataclasses.dataclass(frozen=True)
class Result:
    """What one metric says about a results folder.

    Attributes:
        metric: its name.
        label: what its distance is called in pictures, such as '1 - SSIM'.
        names: what each side is called in pictures, such as 'in-domain CIFAR10'.
        tables: per side, 'pos' (in-domain) and 'neg', what `scores.write_scores` takes: position, batch and score
            (N,) and distances (R, N); larger = further.
        roc_auc: in [0, 1]; 1 when every in-domain image is closer than every other.
        interval: 95 % bootstrap interval of the ROC-AUC, or None where no resamples were asked for.
        aupr_out, aupr_in, fpr95: see `separation`.
        options: what the distances depend on besides the images, JSON types, as in `metrics.Metric`.
        files: names of the files written beside the batches.
    """

    metric: str
    label: str
    names: dict
    tables: dict
    roc_auc: float
    interval: tuple | None
    aupr_out: float
    aupr_in: float
    fpr95: float
    options: dict
    files: list


# ---------------------------------------------------------------------------------------------------- distances


def measure(folder, metrics, reps, device):
    """Every metric's distances for every image and repetition, reading each batch file once.

    Args:
        folder: a `results_folder.ResultsFolder`.
        metrics: list of `metrics.Metric`.
        reps: repetitions used, R.
        device: torch.device.

    Returns:
        dict: `{metric: {side: table}}`, tables as in `Result`.

    Raises:
        UserError: a batch is missing, damaged, not finite, or its images differ in shape from the rest.
    """
    counts = {side: folder.batch_count(side) for side in SIDES}
    parts = {side: [] for side in counts}  # arrays (M, R, B), one per batch
    shape = None
    with progress(total=sum(counts.values()), unit="batch", desc="scoring") as bar:
        for side, count in counts.items():
            for index in range(count):
                part, shape = _measure_batch(folder, side, index, metrics, reps, device, shape)
                parts[side].append(part)
                bar.update()
    positions = {side: _positions(folder, side, parts[side]) for side in parts}
    names = {side: folder.side_entries().get(side, {}).get("labels") for side in parts}
    return {
        metric.name: {
            side: _table([part[number] for part in parts[side]], positions[side], names[side]) for side in parts
        }
        for number, metric in enumerate(metrics)
    }


def _measure_batch(folder, side, index, metrics, reps, device, shape):
    """The distances (M, R, B) of one batch file, and the shape (C, H, W) that all must have."""
    orig, recons = folder.read_batch(side, index, reps)  # (B, C, H, W), R of them
    path = folder.batch_path(side, index)
    shape = shape or tuple(orig.shape[1:])
    if tuple(orig.shape[1:]) != shape:
        raise UserError(
            f"{path} holds images of {_size(orig.shape[1:])}, the batches before it {_size(shape)}; all must be made "
            "by the same recon.py command"
        )
    if not all(images.is_floating_point() for images in (orig, *recons)):
        raise UserError(f"{path} holds images of {orig.dtype}; numbers in [0, 1] are expected")
    finite = all(images.sum(dtype=torch.float32).isfinite() for images in (orig, *recons))  # one NaN makes the sum NaN
    distances = distances_of(metrics, orig, recons, device) if finite else np.array(np.nan)
    if not np.isfinite(distances).all():
        raise UserError(
            f"{path} holds images that are not finite: the model's weights are broken or its training diverged; "
            "choose another --ckpt_path and run recon.py again"
        )
    return distances, shape


def _positions(folder, side, parts):
    """Each image's index among the images used (N,); as its manifest says in a folder of an earlier version.

    Raises:
        UserError: the side has no images, or another number than its manifest says.
    """
    count = sum(part.shape[2] for part in parts)
    if not count:
        raise UserError(f"{folder.path / side} holds batches without images; run recon.py on more images")
    entry = folder.side_entries().get(side, {})
    listed = entry.get("positions")
    if entry.get("images", count) != count or len(listed or range(count)) != count:
        raise UserError(
            f"{folder.path / side} holds {counted(count, 'image')}, but its manifest.json tells of "
            f"{entry.get('images', len(listed or []))}; make all anew with recon.py in another --workdir"
        )
    return np.arange(count) if listed is None else np.array(listed)


def _table(parts, positions, names):
    """A side's table from its batches' distances by one metric, a list of (R, B), positions (N,) and images' names."""
    distances = np.concatenate(parts, axis=1)  # (R, N)
    return {
        "position": positions,
        "batch": np.repeat(np.arange(len(parts)), [part.shape[1] for part in parts]),
        "score": median_score(distances, axis=0),
        "distances": distances,
        **({"file": names} if names else {}),
    }


def _size(shape):
    return f"{shape[1]}x{shape[2]} with {shape[0]} channel{'s' if shape[0] > 1 else ''}"


# -------------------------------------------------------------------------------------------------------- scores


def summarise(metric, names, tables, bootstrap):
    """The `Result` of a metric: ROC-AUC with in-domain as the positive class and its interval, AUPR and FPR95."""
    auc = float(roc_auc_score(*labelled(tables)))
    sides = tables["pos"]["score"], tables["neg"]["score"]
    interval = bootstrap_interval(*sides, bootstrap) if bootstrap else None
    others = aupr_out(*sides), aupr_in(*sides), fpr95(*sides)
    return Result(metric.name, metric.label, names, tables, auc, interval, *others, metric.options, [])


def labelled(tables):
    """Labels (N,), 1 for in-domain, and closeness (N,) of both sides together."""
    scores = [tables[side]["score"] for side in ("pos", "neg")]
    return np.repeat([1, 0], [len(part) for part in scores]), -np.concatenate(scores)


def bootstrap_interval(pos, neg, resamples, level=0.95):
    """Percentile bootstrap interval of the ROC-AUC, images drawn with replacement within each side.

    The ROC-AUC is the share of pairs in which the in-domain image has the smaller score, ties counting half (Mann
    and Whitney).  With the out-of-domain scores sorted once, a resample is their counts, summed up, looked up at
    each drawn in-domain image: time linear in the images.

    Args:
        pos: scores (n,) of in-domain images, larger = further.
        neg: scores (m,) of out-of-domain images.
        resamples: how many.
        level: coverage, in (0, 1).

    Returns:
        tuple: (low, high), the same for the same numbers of images, scores and resamples.
    """
    rng = np.random.default_rng(noise.key("bootstrap") & (2**63 - 1))
    neg = np.sort(neg)
    left, right = np.searchsorted(neg, pos, "left"), np.searchsorted(neg, pos, "right")  # (n,)
    aucs = np.empty(resamples)
    for number in range(resamples):
        counts = np.bincount(rng.integers(len(neg), size=len(neg)), minlength=len(neg))
        below = np.concatenate([[0], np.cumsum(counts)])  # (m + 1,): drawn scores below the k-th
        drawn = rng.integers(len(pos), size=len(pos))
        closer_or_tied = 2 * len(neg) - below[left[drawn]] - below[right[drawn]]
        aucs[number] = closer_or_tied.sum() / (2 * len(neg) * len(pos))
    low, high = np.quantile(aucs, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
