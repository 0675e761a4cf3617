"""Tables of text and numbers as .csv, safe for spreadsheets and terminals."""

import csv
import io

from basics.console import printable
from basics.files import write_text


def write_csv(path, header, rows):
    """Writes a table: `header` a list of names, `rows` an iterable of lists.

    Text is made printable; what a spreadsheet would take for a formula gets an apostrophe in front.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_harmless(cell) for cell in row] for row in rows)
    write_text(path, text.getvalue())


def _harmless(cell):
    """A cell of a table; text is one line, and never a formula."""
    if not isinstance(cell, str):
        return cell
    try:
        float(cell)
        return cell  # "-0.5" is a number
    except ValueError:
        text = printable(cell)
        return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
