"""Pictures of a results folder: ROC curves, histograms, grids of images, as PNG."""

import functools
import io
import logging
import warnings

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from basics.console import UserError, counted, printable
from lmd.scoring import labelled
from storage.tensors import read_tensors

COLOURS = {"pos": "tab:blue", "neg": "tab:orange"}


def plan(folder, results, grid_images):
    """What there is to draw: `{metric: {file name: function that gives the figure}}`.

    Raises:
        UserError: a batch file has no masked images to show.
    """
    groups = {result.metric: _groups(result.tables, grid_images) for result in results}
    shown = _read_pictures(folder, {pick for group in groups.values() for picks in group.values() for pick in picks})
    figures = {}
    for result in results:
        makers = {"roc": functools.partial(_roc, result), "histogram": functools.partial(_histogram, result)}
        if grid_images:
            makers["pictures"] = functools.partial(_grid, result, groups[result.metric], shown)
        figures[result.metric] = {f"{name}_{result.metric}.png": maker for name, maker in makers.items()}
    return figures


def _groups(tables, count):
    """`{(side, 'least' or 'most'): picks}`: each side's `count` images of lowest and of highest score.

    A pick is (side, batch, row in the batch, repetition); the repetition is the one nearest to the median.
    """
    groups = {}
    for side, table in tables.items():
        order = np.argsort(table["score"], kind="stable")
        rows = np.arange(len(order)) - np.searchsorted(table["batch"], table["batch"])
        reps = np.abs(table["distances"] - table["score"]).argmin(axis=0)
        for group, chosen in (("least", order[:count]), ("most", order[::-1][:count])):
            groups[side, group] = [(side, int(table["batch"][i]), int(rows[i]), int(reps[i])) for i in chosen]
    return groups


def _read_pictures(folder, picks):
    """`{pick: (3, H, W, 3) uint8}`: original, masked and reconstruction; each batch file is read once."""
    pictures = {}
    for side, batch in sorted({pick[:2] for pick in picks}):
        own = [pick for pick in picks if pick[:2] == (side, batch)]
        pictures.update(_read_batch_pictures(folder.batch_path(side, batch), own))
    return pictures


def _read_batch_pictures(path, picks):

    batch = read_tensors(path, "batch")
    orig, recon, masked = batch["orig"], batch["recon"], batch.get("masked")  # (B, C, H, W), two lists of such
    reps = max(rep for *_, rep in picks) + 1
    if not isinstance(masked, list) or [getattr(images, "shape", 0) for images in masked[:reps]] != reps * [orig.shape]:
        raise UserError(f"{path} holds no masked images to show; --grid_images=0 does without them")
    pictures = {}
    for pick in picks:
        row, rep = pick[2:]
        trio = torch.stack([orig[row], masked[rep][row], recon[rep][row]]).float()  # (3, C, H, W)
        trio = (trio.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()  # (3, H, W, C)
        pictures[pick] = trio[..., :3] if trio.shape[3] >= 3 else trio[..., :1].repeat(3, axis=3)
    return pictures


def new_figure(width, height):
    """An empty figure of so many inches."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # absl would show its notes on fonts
    return Figure(figsize=(width, height), layout="constrained")  # without pyplot: no window, no global state


def to_png(figure):
    """The bytes of its PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box stands for it
        figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def shown_text(name):
    """A name as matplotlib shows it as it is: printable, of bearable length, and $ no sign of a formula."""
    name = printable(name)
    return (name if len(name) <= 60 else f"{name[:40]}...{name[-17:]}").replace("$", r"\$")


def _roc(result):
    """The ROC curve, in-domain as the positive class."""
    fpr, tpr, _ = roc_curve(*labelled(result.tables))
    figure = new_figure(5, 5)
    axes = figure.add_subplot()
    axes.plot(fpr, tpr, color=COLOURS["pos"], linewidth=2, label=_auc_text(result), clip_on=False)
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="chance")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title=f"Is an image in-domain? ROC curve by {result.metric}")
    axes.set_xlabel("false positives: share of out-of-domain images accepted")
    axes.set_ylabel("true positives: share of in-domain images accepted")
    axes.grid(color="0.9")
    axes.legend(loc="lower right")
    return figure


def _auc_text(result):
    if not result.interval:
        return f"ROC-AUC {result.roc_auc:.4f}"
    return f"ROC-AUC {result.roc_auc:.4f} (95 %: {result.interval[0]:.4f} to {result.interval[1]:.4f})"


def _histogram(result):
    """Both sides' scores in common bins, as shares of their side."""
    scores = {side: table["score"] for side, table in result.tables.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(scores.values())), bins=50)
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    for side, values in scores.items():
        share = np.full(len(values), 100 / len(values))
        label = f"{shown_text(result.names[side])} ({counted(len(values), 'image')})"
        axes.hist(values, edges, weights=share, color=COLOURS[side], alpha=0.55, label=label)
    axes.set(title=_auc_text(result), ylabel="% of the side's images")
    axes.set_xlabel(f"score: median distance over repetitions ({result.label}; larger = more out-of-domain)")
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _grid(result, groups, pictures):
    """Originals, masked images and reconstructions: four groups, columns in the order of the score."""
    columns = max(len(picks) for picks in groups.values())
    figure = new_figure(max(2 * columns * 0.85 + 2, 9), 7)
    axes = figure.subplots(2, 2)
    for number, ((side, group), picks) in enumerate(groups.items()):
        end = "lowest" if group == "least" else "highest"
        title = f"{shown_text(result.names[side])}, {group} out-of-domain ({end} scores)"
        scores = sorted(result.tables[side]["score"], reverse=group == "most")[: len(picks)]
        _group(axes.flat[number], [pictures[pick] for pick in picks], scores, columns)
        axes.flat[number].set_title(title, color=COLOURS[side])
    figure.suptitle(
        f"{_auc_text(result)}\nbelow each image its score: the median distance over repetitions ({result.label})"
    )
    return figure


def _group(axes, trios, scores, columns):
    """Draws a list of (3, H, W, 3) pictures side by side, three rows, each with its score below."""
    height, width = trios[0].shape[1:3]
    gap = max(1, width // 16)
    canvas = np.full((3 * (height + gap), columns * (width + gap), 3), 255, np.uint8)
    for column, trio in enumerate(trios):
        for row, picture in enumerate(trio):
            top, left = row * (height + gap), column * (width + gap)
            canvas[top : top + height, left : left + width] = picture
    axes.imshow(canvas, interpolation="nearest")
    axes.set_yticks([row * (height + gap) + height / 2 for row in range(3)], ["original", "masked", "reconstructed"])
    centres = [column * (width + gap) + width / 2 for column in range(len(scores))]
    axes.set_xticks(centres, [f"{score:#.3g}" for score in scores])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
