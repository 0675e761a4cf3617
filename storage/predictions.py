"""What predict.py writes: a table of decisions for readers, and everything needed to decide anew.

`predictions.csv` and `skipped.csv` are for people and spreadsheets.  `outcome.npz` holds scores and p-values in full,
the calibration's scores and the pictures of the most unusual images; `outcome.json` the names and how it was made.
"""

import json
import os
from pathlib import Path

import numpy as np

from basics import files
from basics.console import UserError
from storage.arrays import OtherOrigin, read_arrays, write_arrays
from storage.json_schema import POSITIVE, SHARE, TABLE, TEXT, list_of, parse_json
from storage.tables import write_csv

PREDICTIONS, SKIPPED, SUMMARY, REPORT = "predictions.csv", "skipped.csv", "summary.json", "report.html"
CHUNKS = "chunks"  # folder in it of what was measured
_NAMES, _ARRAYS = "outcome.json", "outcome.npz"
_REMEDY = "run predict.py with --detector and --images again"
_FIELDS = {
    "files": list_of(TEXT),
    "skipped": list_of(list_of(TEXT, 2)),
    "facts": TABLE,
    "parts": list_of(TEXT),
    "meanings": list_of(TEXT),
    "reasons": list_of(TEXT),
    "rate": SHARE,
    "folder_p_value": SHARE,
    "calibration_images": POSITIVE,
    "detector": TEXT,
    "places": list_of(TEXT, 2),
}
_REQUIRED = _FIELDS.keys() - {"meanings", "places"}  # which came later


def write_predictions(path, names, columns):
    """Writes `predictions.csv`: a row an image.

    Args:
        path: the file.
        names: N names of images.
        columns: name -> (N,) numbers or flags; numbers are written in full, so that they are read back the same.
    """
    rows = zip(names, *(values.tolist() for values in columns.values()), strict=True)
    write_csv(path, ["file", *columns], rows)


def write_outcome(folder, description, arrays):
    """Writes what deciding anew needs.

    Args:
        folder: Path.
        description: the fields of `_FIELDS` but `places`, JSON types.
        arrays: by name.
    """
    places = [str(Path(source).absolute()) for source in _sources(description)]
    files.write_json(folder / _NAMES, {**description, "places": places})
    write_arrays(folder / _ARRAYS, {"of": files.file_hash(folder / _NAMES)}, **arrays)


def check_outcome(folder):
    """Refuses a folder in which there are no predictions.

    Raises:
        UserError: there are none.
    """
    if not (Path(folder) / _NAMES).is_file():
        raise UserError(f"there are no predictions in {folder} (no {_NAMES}); {_REMEDY}")


def check_place(folder, images, detector):
    """Refuses a folder in which other things than predictions of these images by this detector would be overwritten.

    Told apart by where they are, so that images may be added, and the detector made anew; where that is no longer
    there it may have been moved, and is told by its name.

    Args:
        folder: where predictions are to go; it need not be there.
        images, detector: as they were typed.

    Raises:
        UserError: says what is there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    if not (folder / _NAMES).is_file():
        if any(path.name != CHUNKS and not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(f"{folder} holds other files; choose an --output that is empty or not there yet")
        return
    try:
        description = _read_description(folder)
    except UserError:  # what a killed run or a disk left: it is written anew
        return
    places = description.get("places", _sources(description))
    for what, then, now in zip(("of other images", "by another detector"), places, (images, detector), strict=True):
        if not _same(Path(then), Path(now)):
            raise UserError(f"{folder} holds predictions {what} ({then}); choose another --output, or delete it")


def _sources(description):
    """The images and the detector of an outcome, as they were typed."""
    return description["facts"]["images"]["source"], description["detector"]


def _same(then, now):
    """Whether two paths lead to the same; where one does no longer, whether the names are the same."""
    there = os.path.exists(then) and os.path.exists(now)  # noqa: PTH110 (they never raise)
    return then.samefile(now) if there else then.name == now.name


def read_outcome(folder):
    """What `write_outcome` wrote: description and arrays.

    Raises:
        UserError: there is none, or it is damaged.
    """
    check_outcome(folder)
    folder, path = Path(folder), Path(folder) / _NAMES
    description = _read_description(folder)
    try:
        arrays = read_arrays(folder / _ARRAYS, {"of": files.file_hash(path)})
    except OtherOrigin as error:
        raise UserError(f"{path} was changed, or the run that wrote it was stopped; {_REMEDY}") from error
    except UserError as error:
        raise UserError(f"{folder / _ARRAYS} is damaged or was changed; {_REMEDY}") from error
    if arrays is None:
        raise UserError(f"{folder / _ARRAYS} is missing; {_REMEDY}")
    _check(folder / _ARRAYS, description, arrays)
    return description, arrays


def _read_description(folder):
    path = folder / _NAMES
    try:
        return parse_json(path.read_text(encoding="utf-8"), _FIELDS, required=_REQUIRED)
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); {_REMEDY}") from error


def _check(path, description, arrays):
    """Refuses arrays that lack what is to be decided by."""
    count = len(description["files"])
    sizes = dict.fromkeys(("score", "p_value", *(f"part_{part}" for part in description["parts"])), count)
    sizes["calibration"] = description["calibration_images"]
    for name, size in sizes.items():
        values = arrays.get(name, np.zeros(0))
        if values.shape != (size,) or values.dtype.kind != "f" or not np.isfinite(values).all():
            raise UserError(f"{path} does not hold {size} finite numbers called {name}; {_REMEDY}")


def write_summary(folder, summary):
    """Writes `summary.json`."""
    files.write_text(folder / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
