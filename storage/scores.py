"""What detect.py writes: the scores of single images (csv) and the summary (results.json)."""

import json
from pathlib import Path

import numpy as np

from basics.console import UserError
from basics.files import write_json
from storage.arrays import differences
from storage.json_schema import COUNT, POSITIVE, SHARE, TABLE, check_fields, list_of, or_null, parse_json, table_of
from storage.tables import write_csv

_RESULTS = {
    "metrics": table_of(TABLE),
    "repetitions": POSITIVE,
    "images": table_of(COUNT),
    "failures": table_of(COUNT),
    "settings": TABLE,
    "sides": table_of(TABLE),
}

_METRIC = {
    "roc_auc": SHARE,
    "interval_95": or_null(list_of(SHARE, 2)),
    "bootstrap": COUNT,
    "aupr_out": SHARE,
    "aupr_in": SHARE,
    "fpr95": SHARE,
}


RESULTS = "results.json"


def write_scores(path, sides):
    """Writes `scores_{metric}.csv`: one row per image.

    Args:
        path: the file.
        sides: `{"pos": table, "neg": table}`, a table a dict of `position` (N,) the image's index in its data set,
            `batch` (N,) the number of its batch file, `score` (N,) and `distances` (R, N), one row per repetition; and
            `file`, a list of the images' names, where they have some.
    """
    count = len(next(iter(sides.values()))["distances"])
    header = ["side", "position", "batch", "score", *(f"distance_rep{rep}" for rep in range(count))]
    if any(table.get("file") for table in sides.values()):
        header.append("file")
    write_csv(path, header, (row for side, table in sides.items() for row in _score_rows(side, table, header)))


def _score_rows(side, table, header):
    numbers = np.column_stack([table["score"], *table["distances"]])  # (N, 1 + R)
    names = table.get("file")
    for index, (position, batch, row) in enumerate(zip(table["position"], table["batch"], numbers, strict=True)):
        values = (f"{value:.9g}" for value in row)  # 9 digits give a float32 back exactly
        yield [side, position, batch, *values, names[index] if names else ""][: len(header)]


def read_results(folder):
    """`results.json` of a results folder, or None where there is none.

    Raises:
        UserError: the file cannot be read, or is no such summary.
    """
    path = Path(folder) / RESULTS
    if not path.is_file():
        return None
    try:
        results = parse_json(path.read_text(encoding="utf-8"), _RESULTS, ["metrics"])
        for name, metric in results["metrics"].items():
            check_fields(metric, _METRIC, where=f"metrics.{name}.")
        return results
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); change its permissions") from error
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} cannot be read ({reason}); delete it and run detect.py again") from error


def write_results(folder, shared, metrics):
    """Writes `results.json`: the facts that the metrics share, and one entry per metric.

    Metrics scored earlier stay if they share those facts (folder settings, images, repetitions); else they go, for
    they were measured on something else.

    Args:
        folder: the results folder.
        shared: a dict of JSON types.
        metrics: `{name: {...}}`, JSON types; what a distance depends on is in its entry `options`.

    Returns:
        list: a line for the user of each reason for which earlier metrics go or are replaced by others.
    """
    shared, metrics = json.loads(json.dumps([shared, metrics]))
    earlier = read_results(folder) or {**shared, "metrics": {}}
    old = earlier.pop("metrics")
    others, lines = ", ".join(name for name in old if name not in metrics), []
    if (differing := differences(earlier, shared)) and others:
        lines.append(f"{RESULTS} no longer tells of {others}, measured otherwise ({'; '.join(differing[:4])})")
    for name in old.keys() & metrics.keys():
        if changed := differences(_options(old[name]), _options(metrics[name])):
            lines.append(f"earlier {name} scores were made with other options and are replaced ({'; '.join(changed)})")
    write_json(Path(folder) / RESULTS, {**shared, "metrics": {**({} if differing else old), **metrics}})
    return lines


def _options(entry):
    return entry.get("options", {}) if isinstance(entry, dict) else {}
