"""Detect: scores a results folder and writes scores, summary and pictures into it."""

import dataclasses
import os
import re
from pathlib import Path

import metrics
from basics import files
from basics.console import UserError, warn
from basics.machine import choose_device
from lmd.pictures import plan, to_png
from lmd.scoring import measure, summarise
from storage.results_folder import SIDES, ResultsFolder
from storage.scores import read_results, write_results, write_scores

MOST_RESAMPLES = 10_000_000


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
            A picture that cannot be made is a warning alone: the scores are there by then.
    """
    metric_names = list(dict.fromkeys(metrics.canonical(name.strip()) for name in metric_names))
    _check_options(metric_names, reps, bootstrap, grid_images)
    folder = open_folder(result_path)
    read_results(folder.path)  # a damaged file is noticed before the work
    device = choose_device(device)
    options = {"SIMCLR": {"resize_type": resize_type, "path": simclr_path}}
    created = [metrics.create(name, device, **options.get(name, {})) for name in metric_names]
    tables = measure(folder, created, reps, device)
    _tell_what_is_not_known(folder)
    _tell_repetitions(folder, reps)
    names = _side_names(folder)
    results = [summarise(metric, names, tables[metric.name], bootstrap) for metric in created]
    pictures = plan(folder, results, grid_images) if plots else {}
    write(folder, results, reps, bootstrap)
    return [_with_files(folder, result, pictures.get(result.metric, {})) for result in results]


def _check_options(metric_names, reps, bootstrap, grid_images):
    if not metric_names:
        raise UserError("--metric names no metric; for example --metric MSE,SSIM")
    for name, value, lowest in (("reps", reps, 1), ("bootstrap", bootstrap, 0), ("grid_images", grid_images, 0)):
        if value < lowest:
            raise UserError(f"--{name} must be at least {lowest}, not {value}")
    if bootstrap > MOST_RESAMPLES:
        raise UserError(f"--bootstrap must be at most {MOST_RESAMPLES}, not {bootstrap}: more make no difference")


def open_folder(result_path):
    """The `results_folder.ResultsFolder` at a path that must have both sides and be writable.

    Raises:
        UserError: it is not a results folder, lacks a side, or may not be written to.
    """
    folder = ResultsFolder(Path(result_path))
    if not folder.path.is_dir():
        raise UserError(f"there is no results folder at {folder.path}; give --result_path the folder recon.py made")
    present = [side for side in SIDES if any((folder.path / side).glob("batch_*.pth"))]
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


def _tell_what_is_not_known(folder):
    if folder.manifest() is None:
        warn(f"{folder.path} has no manifest.json: whether its batches are complete and belong together is not known")


def _tell_repetitions(folder, reps):
    """Says so where more repetitions were made than are used; the manifest or the folder's name tells how many."""
    made = (folder.manifest() or {}).get("settings", {}).get("reps_per_image")
    if not isinstance(made, int):
        name = re.search(r"_reps(\d{1,9})$", folder.path.resolve().name)
        made = int(name[1]) if name else reps
    if made > reps:
        warn(f"using {reps} of {made} repetitions; --reps {made} uses all")


def _side_names(folder):
    """What each side is called: with its data set, where the manifest tells."""
    datasets = {side: entry.get("dataset", "") for side, entry in folder.side_entries().items()}
    return {side: f"{name} {Path(datasets.get(side, '')).name}".strip() for side, name in SIDES.items()}


def write(folder, results, reps, bootstrap):
    """Writes the scores and the summary beside the batches, and warns of earlier ones that are no longer there.

    Args:
        folder: a `results_folder.ResultsFolder`.
        results: list of `Result`.
        reps: repetitions used.
        bootstrap: resamples drawn.
    """
    entries = {}
    for result in results:
        entry = {"roc_auc": result.roc_auc, "interval_95": result.interval, "bootstrap": bootstrap}
        entry |= {name: getattr(result, name) for name in ("aupr_out", "aupr_in", "fpr95")}
        entries[result.metric] = {**entry, "options": result.options} if result.options else entry
    with files.alone(folder.path):  # tables and summary are of one run
        for result in results:
            write_scores(folder.path / _table_name(result), result.tables)
        lost = write_results(folder.path, _shared(folder, results[0].tables, reps), entries)
    for line in lost:
        warn(line)


def _table_name(result):
    return f"scores_{result.metric}.csv"


def _shared(folder, tables, reps):
    """What results.json says about the folder, whatever the metric."""
    sides = {side: folder.side_entries().get(side, {}) for side in tables}
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


def _with_files(folder, result, pictures):
    """The result with the names of its files, once its pictures, `{file name: function}`, are drawn and written."""
    written = [_table_name(result)]
    for name, make in pictures.items():
        try:
            files.write_bytes(folder.path / name, to_png(make()))
            written.append(name)
        except Exception as error:  # whatever matplotlib raises: the scores, which are written, do not hang on it
            warn(f"{name} is left out, the scores are there: {error or type(error).__name__}")
    return dataclasses.replace(result, files=written)
