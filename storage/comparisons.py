"""What compare.py writes: compare.csv, a row for each method and set; compare.json, the same and what it is from.

compare.npz holds the scores of single images.
"""

import io
import platform
from pathlib import Path

import numpy as np
import torch

from basics.files import write_bytes, write_json, write_text
from storage.tables import write_csv

REPORT = "compare.json"
COLUMNS = (
    "method", "out_of_domain", "roc_auc", "roc_auc_low", "roc_auc_high", "aupr_out", "aupr_in", "fpr95",
    "evaluations", "seconds", "p_holm",
)  # fmt: skip


def write_comparison(folder, facts, table, scores, markdown, picture):
    """Writes a comparison's files.

    Args:
        folder: the folder.
        facts: what the table was made from, JSON types.
        table: a dict of `rows`, dicts with `COLUMNS` and `note`, None where a number is missing; and of further JSON
            types.
        scores: arrays by name, for compare.npz.
        markdown: the tables as text.
        picture: PNG bytes, or None for no picture; an earlier one goes.
    """
    folder = Path(folder)
    rows = ([_cell(row[name]) for name in COLUMNS] for row in table["rows"])
    write_csv(folder / "compare.csv", COLUMNS, rows)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    write_json(folder / REPORT, {**facts, "versions": versions, **table})
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **scores)
    write_bytes(folder / "compare.npz", buffer.getbuffer())
    write_text(folder / "compare.md", markdown)
    if picture is None:
        (folder / "compare.png").unlink(missing_ok=True)
    else:
        write_bytes(folder / "compare.png", picture)


def _cell(value):
    """A number to six digits, which no interval is narrower than; nothing where there is none."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value
