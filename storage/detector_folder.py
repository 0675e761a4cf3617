"""The folder of a calibrated detector: everything that decides about an image, and no pickle.

`detector.json` describes it, `model.safetensors` holds the network's weights with the config, `calibration.npz` the
scores of the calibration images and what the method learned, `card.md` says it all for a reader.  The description
lists the hash of every other file, so that a changed or missing one is named.
"""

import json
import secrets
import shutil
from pathlib import Path

import numpy as np

from basics import files
from basics.console import UserError, remedy
from storage.arrays import read_arrays, write_arrays
from storage.json_schema import COUNT, FLAG, POSITIVE, SHARE, TABLE, TEXT, parse_json, table_of

FORMAT = 1  # what a version of this program that reads another will refuse
DESCRIPTION, WEIGHTS, CALIBRATION, CARD = "detector.json", "model.safetensors", "calibration.npz", "card.md"

_FIELDS = {
    "format": POSITIVE,
    "method": TEXT,
    "settings": TABLE,
    "seed": COUNT,
    "precision": TEXT,
    "rate": SHARE,
    "center_crop": FLAG,
    "treatment": TABLE,
    "images": TABLE,
    "checkpoint": TABLE,
    "blind_spots": TABLE,
    "versions": TABLE,
    "command": TEXT,
    "files": table_of(TEXT),
}


def write(path, description, write_weights, arrays, card):
    """Writes the folder under a temporary name beside it, which then takes its place as a whole.

    Args:
        path: the folder; a detector that is there already is replaced.
        description: the fields of `detector.json` but `format` and `files`.
        write_weights: called with the path at which to write the weights.
        arrays: what `calibration.npz` holds, by name.
        card: text of `card.md`.

    Raises:
        UserError: something else stands there, or it cannot be written; what was there before stays.
    """
    path = Path(path)
    if path.exists() and not (path / DESCRIPTION).is_file():
        raise UserError(f"{path} is there already and holds no detector; choose another --detector")
    made = _beside(path)
    try:
        made.mkdir(parents=True)
        write_weights(made / WEIGHTS)
        write_arrays(made / CALIBRATION, {}, **arrays)
        files.write_text(made / CARD, card)
        hashes = {name: files.file_hash(made / name) for name in (WEIGHTS, CALIBRATION, CARD)}
        files.write_json(made / DESCRIPTION, {"format": FORMAT, **description, "files": hashes})
        _replace(made, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; {remedy(error)}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _beside(path):
    """A folder's name beside another that nobody else takes."""
    return path.absolute().with_name(f".{path.name}.{secrets.token_hex(4)}")


def _replace(made, path):
    """Puts the folder `made` in the place of `path`; what stood there is gone then."""
    old = _beside(path)
    if path.exists():
        path.rename(old)
    try:
        made.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def read(path):
    """The description and the arrays of a detector folder; that its files are those that were written is checked.

    Returns:
        tuple: the fields of `detector.json`, and arrays by name, finite numbers.

    Raises:
        UserError: it is no detector folder, a file is missing, changed or damaged, or a later version wrote it.
    """
    path = Path(path)
    description = _read_description(path)
    for name, digest in description["files"].items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{file} is missing: the detector was copied in part; copy the whole folder again")
        if files.file_hash(file) != digest:
            raise UserError(f"{file} was changed or damaged after the detector was made; copy the whole folder again")
    arrays = read_arrays(path / CALIBRATION, {})
    for name, values in arrays.items():
        if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
            raise UserError(f"{path / CALIBRATION} holds {name} that are no finite numbers; calibrate again")
    return description, arrays


def _read_description(path):
    file = path / DESCRIPTION
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"there is no detector in {path} (no {DESCRIPTION}); make one by calibrate.py") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}); copy the whole folder again") from error
    try:
        newest = json.loads(text)["format"]
        if newest != FORMAT:
            raise UserError(
                f"{path} was written in format {newest!r}, this version reads {FORMAT}; use the version that wrote it, "
                "or calibrate again"
            )
        description = parse_json(text, _FIELDS, required=_FIELDS)
        if {WEIGHTS, CALIBRATION, CARD} != description["files"].keys():
            raise ValueError("it lists other files")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); copy the whole folder again") from error
    return description
