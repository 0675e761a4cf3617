"""Distances between images and their reconstructions, the scores that they give, and the ROC-AUC.

The score of an image is the median over its repetitions of the distance between the image and its reconstruction (Liu
et al., "Unsupervised Out-of-Distribution Detection with Diffusion Inpainting", ICML 2023).  The ROC-AUC takes the
in-domain images as positives and closeness as their score.  Batch files are read one at a time; only distances are
kept.
"""

import dataclasses

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from basics import noise
from basics.console import UserError, progress
from models import inference, memory
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
        interval: 95% bootstrap interval of the ROC-AUC, or None where no resamples were asked for.
        options: what the distances depend on besides the images, JSON types, as in `metrics.Metric`.
        files: names of the files written beside the batches.
    """

    metric: str
    label: str
    names: dict
    tables: dict
    roc_auc: float
    interval: tuple | None
    options: dict
    files: list


# ---------------------------------------------------------------------------------------------------- distances


def measure(folder, tools, reps, device):
    """Every metric's distances for every image and repetition, reading each batch file once.

    Args:
        folder: a `results_folder.ResultsFolder`.
        tools: metric objects.
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
                part, shape = _measure_batch(folder, side, index, tools, reps, device, shape)
                parts[side].append(part)
                bar.update()
    positions = {side: _positions(folder, side, parts[side]) for side in parts}
    names = {side: folder.side_entries().get(side, {}).get("labels") for side in parts}
    return {
        tool.name: {
            side: _table([part[number] for part in parts[side]], positions[side], names[side]) for side in parts
        }
        for number, tool in enumerate(tools)
    }


def _measure_batch(folder, side, index, tools, reps, device, shape):
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
    distances = compare(tools, orig, recons, device) if finite else np.array(np.nan)
    if not np.isfinite(distances).all():
        raise UserError(
            f"{path} holds images that are not finite: the model's weights are broken or its training diverged; "
            "choose another --ckpt_path and run recon.py again"
        )
    return distances, shape


def compare(tools, orig, recons, device):
    """Distances between one batch and its reconstructions.

    Args:
        tools: M metric objects.
        orig: images (B, C, H, W).
        recons: list of R tensors of that shape.
        device: torch.device; images go there some at a time.

    Returns:
        np.ndarray: (M, R, B) float32.
    """
    remedy = "to compare these images; use --device cpu, or one --metric at a time"
    with memory.explained(device, remedy), inference.arithmetic("fp32"):
        return _compare(tools, orig, recons, device)


def _compare(tools, orig, recons, device):

    distances = torch.empty(len(tools), len(recons), len(orig), device=device)
    step = max(1, min(tool.pixels_at_once for tool in tools) // (orig.shape[2] * orig.shape[3]))
    for start in range(0, len(orig), step):
        rows = slice(start, start + step)
        images = orig[rows].to(device)
        known = [tool.prepare(images) for tool in tools]
        for rep, recon in enumerate(recons):
            images = recon[rows].to(device)
            for number, tool in enumerate(tools):
                distances[number, rep, rows] = tool.compare(known[number], tool.prepare(images))
    return distances.cpu().numpy()


def _positions(folder, side, parts):
    """Each image's index among the images used (N,); as its manifest says in a folder of an earlier version.

    Raises:
        UserError: the side has no images, or another number than its manifest says.
    """
    count = sum(part.shape[2] for part in parts)
    if not count:
        raise UserError(f"{folder.path / side} holds batches without images; run recon.py on more images")
    entry = folder.side_entries().get(side, {})
    told = entry.get("positions")
    if entry.get("images", count) != count or len(told or range(count)) != count:
        raise UserError(
            f"{folder.path / side} holds {count} images, but its manifest.json tells of "
            f"{entry.get('images', len(told or []))}; make all anew with recon.py in another --workdir"
        )
    return np.arange(count) if told is None else np.array(told)


def _table(parts, positions, names):
    """A side's table from its batches' distances by one metric, a list of (R, B), positions (N,) and images' names."""
    distances = np.concatenate(parts, axis=1)  # (R, N)
    return {
        "position": positions,
        "batch": np.repeat(np.arange(len(parts)), [part.shape[1] for part in parts]),
        "score": np.median(distances, axis=0),  # of an even number: the mean of the middle two
        "distances": distances,
        **({"file": names} if names else {}),
    }


def _size(shape):
    return f"{shape[1]}x{shape[2]} with {shape[0]} channel{'s' if shape[0] > 1 else ''}"


# -------------------------------------------------------------------------------------------------------- scores


def judge(tool, names, tables, bootstrap):
    """The `Result` of a metric: ROC-AUC with in-domain as the positive class, and its bootstrap interval."""
    labels, closeness = labelled(tables)
    interval = bootstrap_interval(tables["pos"]["score"], tables["neg"]["score"], bootstrap) if bootstrap else None
    label = f"1 - {tool.name}" if tool.similarity else tool.name
    return Result(tool.name, label, names, tables, float(roc_auc_score(labels, closeness)), interval, tool.options, [])


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
