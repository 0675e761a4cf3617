r"""Detect, the last step of LMD: score every image by how far its reconstructions landed from it.

    python detect.py --result_path results/cifar10/CIFAR10_vs_SVHN/checkerboard_alt_blocks8_reps10/ \
        --reps 10 --metric LPIPS

The score of an image is the median over its repetitions of the distance between the image and
its reconstruction (Liu et al., "Unsupervised Out-of-Distribution Detection with Diffusion
Inpainting", ICML 2023).  The ROC-AUC takes the in-domain images as positives and closeness as
their score.  Batch files are read one at a time; only distances are kept.
"""

import dataclasses
import io
import os
from pathlib import Path

import numpy as np

import console
from console import UserError

COLOURS = {"pos": "tab:blue", "neg": "tab:orange"}


@dataclasses.dataclass(frozen=True)
class Result:
    """What one metric says about a results folder.

    Attributes:
        metric: its name.
        label: what its distance is called in pictures, such as '1 - SSIM'.
        names: what each side is called in pictures, such as 'in-domain CIFAR10'.
        tables: per side, 'pos' (in-domain) and 'neg', what `storage.write_scores` takes: position, batch and score
            (N,) and distances (R, N); larger = further.
        roc_auc: in [0, 1]; 1 when every in-domain image is closer than every other.
        interval: 95% bootstrap interval of the ROC-AUC, or None where no resamples were asked for.
        files: names of the files written beside the batches.
    """

    metric: str
    label: str
    names: dict
    tables: dict
    roc_auc: float
    interval: tuple | None
    files: list


def define_flags():
    """The command line; inside a function so that importing this module defines nothing."""
    from absl import flags

    from metrics import METRICS

    flags.DEFINE_string("result_path", None, "Results folder of recon.py, the one with pos/ and neg/.", required=True)
    flags.DEFINE_list("metric", ["LPIPS"], f"Distances, separated by commas: {', '.join(METRICS)}.")
    flags.DEFINE_enum(
        "resize_type",
        "bicubic",
        ["nearest", "bicubic", "none"],
        "SIMCLR: how images are resized to 224x224, if at all.",
    )
    flags.DEFINE_string(
        "simclr_path", None, "SIMCLR: weights of a SimCLRv2 ResNet; by default pretrained/r50_1x_sk1.pth."
    )
    flags.DEFINE_integer("reps", 1, "Repetitions per image to use: the first ones, at most as many as were made.")
    flags.DEFINE_string("device", "auto", "Where distances are computed: auto, cpu, cuda or cuda:i.")
    flags.DEFINE_integer("bootstrap", 1000, "Resamples for the 95% interval of the ROC-AUC; 0 leaves it out.")
    flags.DEFINE_boolean("plots", True, "Write ROC curve, histograms and picture grid as PNG.")
    flags.DEFINE_integer("grid_images", 8, "Images per group in the picture grid; 0 leaves the grid out.")


def main(argv):
    """The command line: scores, prints the ROC-AUCs and says where the details are."""
    from absl import flags

    values = flags.FLAGS
    names = ("reps", "device", "bootstrap", "plots", "grid_images", "resize_type", "simclr_path")
    results = detect(values.result_path, values.metric, **{name: values[name].value for name in names})
    for result in results:
        console.say(f"{result.metric} ROC AUC: {result.roc_auc:.4f}")
        if result.interval:
            low, high = result.interval
            console.say(f"{result.metric} 95% interval: {low:.4f} to {high:.4f} ({values.bootstrap} resamples)")
    console.say(f"written to {values.result_path}:")
    for result in results:
        console.say(f"  {', '.join(result.files)}")
    console.say("  results.json")


def detect(
    result_path,
    metric_names=("LPIPS",),
    *,
    reps=1,
    device="auto",
    bootstrap=1000,
    plots=True,
    grid_images=8,
    resize_type="bicubic",
    simclr_path=None,
):
    """Scores a results folder by each metric and writes scores, summary and pictures into it.

    Args:
        result_path: the folder that holds `pos` and `neg`.
        metric_names: names in `metrics.METRICS`, in any case.
        reps: the first so many repetitions are used.
        device: 'auto', 'cpu', 'cuda' or 'cuda:i'.
        bootstrap: number of resamples for the interval; 0 for none.
        plots: whether to write the PNG files.
        grid_images: images per group of the picture grid; 0 for no grid.
        resize_type: SIMCLR: 'nearest', 'bicubic' or 'none'.
        simclr_path: SIMCLR: the weights' file, or None for pretrained/r50_1x_sk1.pth.

    Returns:
        list[Result]: one per metric, in the order asked.

    Raises:
        UserError: a wrong argument, or a folder that is incomplete, damaged or inconsistent; nothing is written then.
    """
    import metrics
    import storage

    metric_names = list(dict.fromkeys(metrics.canonical(name.strip()) for name in metric_names))
    _check_options(metric_names, reps, bootstrap, grid_images)
    folder = open_folder(result_path)
    storage.read_results(folder.path)  # a damaged file is noticed before the work
    device = console.choose_device(device)
    options = {"SIMCLR": {"resize_type": resize_type, "path": simclr_path}}
    tools = [metrics.create(name, device, **options.get(name, {})) for name in metric_names]
    tables = measure(folder, tools, reps, device)
    names = _side_names(folder)
    results = [judge(tool, names, tables[tool.name], bootstrap) for tool in tools]
    images = draw(folder, results, grid_images) if plots else {}
    return write(folder, results, images, reps, bootstrap)


def _check_options(metric_names, reps, bootstrap, grid_images):
    if not metric_names:
        raise UserError("--metric names no metric; for example --metric MSE,SSIM")
    for name, value, lowest in (("reps", reps, 1), ("bootstrap", bootstrap, 0), ("grid_images", grid_images, 0)):
        if value < lowest:
            raise UserError(f"--{name} must be at least {lowest}, not {value}")


def open_folder(result_path):
    """The `storage.ResultsFolder` at a path that must have both sides and be writable.

    Raises:
        UserError: it is not a results folder, lacks a side, or may not be written to.
    """
    import storage

    folder = storage.ResultsFolder(Path(result_path))
    if not folder.path.is_dir():
        raise UserError(f"there is no results folder at {folder.path}; give --result_path the folder recon.py made")
    present = [side for side in storage.SIDES if any((folder.path / side).glob("batch_*.pth"))]
    if not present:
        inner = sorted(path.parent for path in folder.path.glob("*/pos"))
        hint = f"did you mean {inner[0]}?" if inner else "run recon.py first"
        raise UserError(f"{folder.path} holds no reconstructions (no pos/batch_0.pth); {hint}")
    if present == ["pos"]:
        raise UserError(
            f"{folder.path} holds the in-domain side only; run the same recon.py command with --out_of_domain added "
            "to make the other"
        )
    if not os.access(folder.path, os.W_OK):
        raise UserError(f"{folder.path} may not be written to, and the scores go there; copy it or change permissions")
    return folder


# ---------------------------------------------------------------------------------------------------- distances


def measure(folder, tools, reps, device):
    """Every metric's distances for every image and repetition, reading each batch file once.

    Args:
        folder: a `storage.ResultsFolder`.
        tools: metric objects.
        reps: repetitions used, R.
        device: torch.device.

    Returns:
        dict: `{metric: {side: table}}`, tables as in `Result`.

    Raises:
        UserError: a batch is missing, damaged, not finite, or its images differ in shape from the rest.
    """
    counts = {side: folder.batch_count(side) for side in COLOURS}
    parts = {side: [] for side in counts}  # arrays (M, R, B), one per batch
    shape = None
    with console.progress(total=sum(counts.values()), unit="batch", desc="scoring") as bar:
        for side, count in counts.items():
            for index in range(count):
                part, shape = _measure_batch(folder, side, index, tools, reps, device, shape)
                parts[side].append(part)
                bar.update()
    positions = {side: _positions(folder, side, parts[side]) for side in parts}
    return {
        tool.name: {side: _table([part[number] for part in parts[side]], positions[side]) for side in parts}
        for number, tool in enumerate(tools)
    }


def _measure_batch(folder, side, index, tools, reps, device, shape):
    """The distances (M, R, B) of one batch file, and the shape (C, H, W) that all must have."""
    import torch

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
    import torch

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
    entry = _sides(folder).get(side, {})
    told = entry.get("positions")
    if entry.get("images", count) != count or len(told or range(count)) != count:
        raise UserError(
            f"{folder.path / side} holds {count} images, but its manifest.json tells of "
            f"{entry.get('images', len(told or []))}; make all anew with recon.py in another --workdir"
        )
    return np.arange(count) if told is None else np.array(told)


def _table(parts, positions):
    """A side's table from its batches' distances by one metric, a list of (R, B), and its positions (N,)."""
    distances = np.concatenate(parts, axis=1)  # (R, N)
    return {
        "position": positions,
        "batch": np.repeat(np.arange(len(parts)), [part.shape[1] for part in parts]),
        "score": np.median(distances, axis=0),  # of an even number: the mean of the middle two
        "distances": distances,
    }


def _size(shape):
    return f"{shape[1]}x{shape[2]} with {shape[0]} channel{'s' if shape[0] > 1 else ''}"


# -------------------------------------------------------------------------------------------------------- scores


def judge(tool, names, tables, bootstrap):
    """The `Result` of a metric: ROC-AUC with in-domain as the positive class, and its bootstrap interval."""
    from sklearn.metrics import roc_auc_score

    labels, closeness = _labelled(tables)
    interval = bootstrap_interval(tables["pos"]["score"], tables["neg"]["score"], bootstrap) if bootstrap else None
    label = f"1 - {tool.name}" if tool.similarity else tool.name
    return Result(tool.name, label, names, tables, float(roc_auc_score(labels, closeness)), interval, [])


def _side_names(folder):
    """What each side is called: with its data set, where the manifest tells."""
    import storage

    datasets = {side: entry.get("dataset", "") for side, entry in _sides(folder).items()}
    return {side: f"{name} {Path(datasets.get(side, '')).name}".strip() for side, name in storage.SIDES.items()}


def _sides(folder):
    """The manifest's entries of the sides; none in a folder of the published code."""
    return (folder.manifest() or {}).get("sides", {})


def _labelled(tables):
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
    import noise

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


def write(folder, results, images, reps, bootstrap):
    """Writes scores, pictures and, last, the summary beside the batches.

    Args:
        folder: a `storage.ResultsFolder`.
        results: list of `Result`.
        images: `{metric: {file name: PNG bytes}}`.
        reps: repetitions used.
        bootstrap: resamples drawn.

    Returns:
        list[Result]: the results with the names of their files.
    """
    import files
    import storage

    written = []
    for result in results:
        table = f"scores_{result.metric}.csv"
        storage.write_scores(folder.path / table, result.tables)
        pictures = images.get(result.metric, {})
        for name, data in pictures.items():
            files.write_bytes(folder.path / name, data)
        written.append(dataclasses.replace(result, files=[table, *pictures]))
    entries = {
        result.metric: {"roc_auc": result.roc_auc, "interval_95": result.interval, "bootstrap": bootstrap}
        for result in results
    }
    storage.write_results(folder.path, _shared(folder, results[0].tables, reps), entries)
    return written


def _shared(folder, tables, reps):
    """What results.json says about the folder, whatever the metric."""
    sides = {side: _sides(folder).get(side, {}) for side in tables}
    return {
        "repetitions": reps,
        "images": {side: len(table["score"]) for side, table in tables.items()},
        "failures": {side: len(entry.get("skipped", [])) for side, entry in sides.items()},  # unreadable files
        "settings": _summary((folder.manifest() or {}).get("settings", {})),
        "sides": {side: _summary(entry) for side, entry in sides.items()},
    }


def _summary(entry):
    """A manifest entry without the whole config and lists, which stay in manifest.json."""
    return {name: value for name, value in entry.items() if name != "config" and not isinstance(value, list | None)}


# ------------------------------------------------------------------------------------------------------ pictures


def draw(folder, results, grid_images):
    """All pictures as PNG bytes: `{metric: {file name: bytes}}`.

    Raises:
        UserError: a batch file has no masked images to show.
    """
    groups = {result.metric: _groups(result.tables, grid_images) for result in results}
    shown = _read_pictures(folder, {pick for group in groups.values() for picks in group.values() for pick in picks})
    images = {}
    for result in results:
        figures = {"roc": _roc(result), "histogram": _histogram(result)}
        if grid_images:
            figures["pictures"] = _grid(result, groups[result.metric], shown)
        images[result.metric] = {f"{name}_{result.metric}.png": _png(figure) for name, figure in figures.items()}
    return images


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
    import torch

    import storage

    batch = storage.read_tensors(path, "batch")
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


def _figure(width, height):
    import logging

    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # absl would show its notes on fonts
    return Figure(figsize=(width, height), layout="constrained")  # without pyplot: no window, no global state


def _png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _roc(result):
    """The ROC curve, in-domain as the positive class."""
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(*_labelled(result.tables))
    figure = _figure(5, 5)
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
    return f"ROC-AUC {result.roc_auc:.4f} (95%: {result.interval[0]:.4f} to {result.interval[1]:.4f})"


def _histogram(result):
    """Both sides' scores in common bins, as shares of their side."""
    scores = {side: table["score"] for side, table in result.tables.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(scores.values())), bins=50)
    figure = _figure(7, 4)
    axes = figure.add_subplot()
    for side, values in scores.items():
        share = np.full(len(values), 100 / len(values))
        label = f"{result.names[side]} ({len(values)} images)"
        axes.hist(values, edges, weights=share, color=COLOURS[side], alpha=0.55, label=label)
    axes.set(title=_auc_text(result), ylabel="% of the side's images")
    axes.set_xlabel(f"score: median distance over repetitions ({result.label}; larger = more out-of-domain)")
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _grid(result, groups, pictures):
    """Originals, masked images and reconstructions: four groups, columns in the order of the score."""
    columns = max(len(picks) for picks in groups.values())
    figure = _figure(max(2 * columns * 0.85 + 2, 9), 7)
    axes = figure.subplots(2, 2)
    for number, ((side, group), picks) in enumerate(groups.items()):
        title = f"{result.names[side]}, {group} out-of-domain ({'lowest' if group == 'least' else 'highest'} scores)"
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


if __name__ == "__main__":
    define_flags()
    console.run(main)
