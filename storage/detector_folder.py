"""The folder of a calibrated detector: everything that decides about an image, and no pickle.

`detector.json` describes it, `model.safetensors` holds the network's weights with the config, `calibration.npz` the
scores of the calibration images and what the method learned, `card.md` says it all for a reader.  The description
lists the hash of every other file, so that a changed or missing one is named.
"""

import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path

import numpy as np

from basics import files
from basics.console import UserError, remedy
from storage.arrays import read_arrays, shortened, write_arrays
from storage.json_schema import COUNT, FLAG, POSITIVE, SHARE, TABLE, TEXT, check_fields, parse_json, table_of

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
    "digest": TEXT,
}
_SPOT = {"kind": TEXT, "caught": SHARE, "images": POSITIVE, "rate": SHARE}  # of `blind_spots`
_IN_PART = "the detector was copied in part; copy the whole folder again"
_SETTING_MOST = 10_000  # of a number among the settings: none is larger, and far larger ones would take all memory


def write(path, description, write_weights, arrays, card):
    """Writes the folder under a temporary name beside it, which then takes its place as a whole.

    Args:
        path: the folder; a detector that is there already, and nothing else, is replaced.
        description: the fields of `detector.json` but `format` and `files`.
        write_weights: called with the path at which to write the weights.
        arrays: what `calibration.npz` holds, by name.
        card: text of `card.md`.

    Raises:
        UserError: something else stands there, or it cannot be written; what was there before stays.
    """
    path = Path(path)
    check_place(path)
    made = path.absolute().with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        made.mkdir(parents=True)
        write_weights(made / WEIGHTS)
        write_arrays(made / CALIBRATION, {}, **arrays)
        files.write_text(made / CARD, card)
        hashes = {name: files.file_hash(made / name) for name in (WEIGHTS, CALIBRATION, CARD)}
        content = {"format": FORMAT, **description, "files": hashes}
        files.write_json(made / DESCRIPTION, {**content, "digest": _digest(content)})
        _replace(made, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; {remedy(error)}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def check_place(path):
    """Refuses to write a detector where something else stands; a detector, or an empty folder, will do.

    Raises:
        UserError: it does.
    """
    path = Path(path)
    if path.is_dir():
        names = {each.name for each in path.iterdir()}
        others = sorted(names - {DESCRIPTION, WEIGHTS, CALIBRATION, CARD})
        if DESCRIPTION in names and others:
            raise UserError(
                f"{path} holds a detector and beside it {others[0]}, which would be lost when it is replaced; move "
                "that away, or choose another --detector"
            )
        if DESCRIPTION in names or not names:
            return
    if os.path.lexists(path):
        raise UserError(f"{path} is there already and holds no detector; choose another --detector")


def _replaced(path):
    """Where the detector that stood at `path` is for the moment in which another takes its place."""
    return path.absolute().with_name(f".{path.name}.replaced")


def _replace(made, path):
    """Puts the folder `made` in the place of `path`; what stood there is gone then."""
    old = _replaced(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    try:
        made.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def located(path):
    """The folder to read: `path`, or the whole detector that stood there until a run was killed while replacing it."""
    path = Path(path)
    return _replaced(path) if not path.exists() and _replaced(path).is_dir() else path


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
            raise UserError(f"{file} is missing: {_IN_PART}")
        try:
            found = files.file_hash(file)
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); change its permissions") from error
        if found != digest:
            raise UserError(f"{file} was changed or damaged after the detector was made; copy the whole folder again")
    arrays = read_arrays(path / CALIBRATION, {})
    for name, values in arrays.items():
        if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
            raise UserError(f"{path / CALIBRATION} holds {name} that are no finite numbers; calibrate again")
    return description, arrays


def _read_description(path):
    file = path / DESCRIPTION
    if path.is_file():
        raise UserError(f"{path} is a file; give the folder that calibrate.py wrote")
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if any((path / name).is_file() for name in (CALIBRATION, CARD)):
            raise UserError(f"{file} is missing: {_IN_PART}") from error
        if Path(f"{path}.unfinished").is_dir():
            raise UserError(
                f"the detector {path} is not finished: its calibration is at work, or was stopped and continues with "
                "the same calibrate.py command"
            ) from error
        raise UserError(f"there is no detector in {path} (no {DESCRIPTION}); make one by calibrate.py") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}); copy the whole folder again") from error
    try:
        if (written := parse_json(text, {"format": POSITIVE}, required=["format"])["format"]) != FORMAT:
            raise UserError(
                f"{path} was written in format {written}, this version reads {FORMAT}; use the version that wrote it, "
                "or calibrate again"
            )
        description = parse_json(text, _FIELDS, required=_FIELDS)
        _check(description)
        if description.pop("digest") != _digest(description):
            raise ValueError("it was changed after it was made; predict.py can decide at another rate")
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{file} is damaged ({reason}); copy the whole folder again") from error
    return description


def _digest(content):
    """SHA-256 of a description without its digest."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check(description):
    """Refuses what fits `_FIELDS` and is no description for all that.

    Raises:
        ValueError: says what.
    """
    if {WEIGHTS, CALIBRATION, CARD} != description["files"].keys():
        raise ValueError("it lists other files")
    for name, spot in description["blind_spots"].items():
        check_fields(spot, _SPOT, required=_SPOT, where=f"blind_spots.{shortened(name)}.")
    check_fields(description["checkpoint"], {"step": COUNT}, where="checkpoint.")
    level = [description["settings"]]
    while level:
        value = level.pop()
        level += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if isinstance(value, (int, float)) and not abs(value) <= _SETTING_MOST:
            raise ValueError(f"settings hold {shortened(value)}")
