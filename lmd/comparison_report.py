"""A comparison as tables of text and as a picture: ROC-AUC over cost, and everyone's blind spots."""

import dataclasses

import numpy as np

from basics.console import counted, printable, say, warn
from lmd.pictures import new_figure, shown_text, to_png
from storage.comparisons import write_comparison

_DARK = 0.42  # from .5, a ROC-AUC whose colour in the map is dark
_FILES = "compare.csv, compare.json, compare.npz, compare.md, compare.png"


def report(folder, table, facts, scores):
    """Prints the tables and writes the files.

    Args:
        folder: where to.
        table: a `ranking.Table`.
        facts, scores: as of `storage.comparisons.write_comparison`.
    """
    tables = {"Methods": summary(table), "Every set": every_set(table)}
    picture = None
    try:
        picture = to_png(draw(table))
    except Exception as error:  # whatever matplotlib raises: the numbers do not hang on it
        warn(f"compare.png is left out, the tables are there: {error or type(error).__name__}")
    write_comparison(folder, facts, dataclasses.asdict(table), scores, markdown(table, facts, tables), picture)
    for lines in tables.values():
        for line in aligned(lines):
            say(line)
        say("")
    for line in notes(table):
        say(line)
    say(f"written to {folder}: {_FILES if picture else _FILES.removesuffix(', compare.png')}")


# ------------------------------------------------------------------------------------------------------- tables


def summary(table):
    """A line for each method, the best first: lists of text, the header first."""
    lines = [["method", "evaluations", "s/image", "mean ROC-AUC", "minimum", "mean rank"]]
    for row in table.summaries:
        numbers = [_number(row[name], "{:.3f}") for name in ("mean", "minimum")]
        lines.append([row["method"], *_cost(row), *numbers, _number(row["mean_rank"], "{:.1f}")])
    return lines


def every_set(table):
    """A line for each method and set, as `summary`."""
    lines = [["method", "out of domain", "ROC-AUC", "95 %", "AUPR-out", "AUPR-in", "FPR95", "p (Holm)"]]
    for row in table.rows:
        low, high = (_number(row[name], "{:.3f}") for name in ("roc_auc_low", "roc_auc_high"))
        numbers = [_number(row[name], "{:.3f}") for name in ("roc_auc", "aupr_out", "aupr_in", "fpr95")]
        interval = "-" if row["roc_auc_low"] is None else f"{low} to {high}"
        p_value = "best" if row["method"] == table.best else _number(row["p_holm"], "{:.2g}")
        name, *marked = row["out_of_domain"], *(["(!)"] if row["note"] else [])
        lines.append([row["method"], " ".join([name, *marked]), numbers[0], interval, *numbers[1:], p_value])
    return lines


def notes(table):
    """Lines on what is missing, and why, each once; '(!)' marks these rows."""
    reasons = {}
    for row in table.rows:
        if row["note"]:
            reasons.setdefault((row["note"], row["method"]), []).append(row["out_of_domain"])
    merged = {}
    for (note, method), names in reasons.items():
        merged.setdefault((note, ", ".join(names)), []).append(method)
    everyone = len(table.summaries)
    return [
        f"(!) {'all methods' if 1 < len(methods) == everyone else ', '.join(methods)} on {names}: {note}"
        for (note, names), methods in merged.items()
    ]


def aligned(lines):
    """Lines of text of equally wide columns; the first column to the left, numbers to the right."""
    lines = [[printable(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = lines[0].index("out of domain") if "out of domain" in lines[0] else 0
    put = lambda k, cell: cell.ljust(widths[k]) if k <= words else cell.rjust(widths[k])
    return ["  ".join(put(k, cell) for k, cell in enumerate(line)).rstrip() for line in lines]


def markdown(table, facts, tables):
    """The tables with what they are from, Markdown."""
    foreign = ", ".join(f"{_md(name)} ({one['images']:,})" for name, one in facts["out_of_domain"].items())
    parts = [
        "# Comparison",
        "",
        f"- In domain: {counted(facts['in_domain']['images'], 'image')} of {_md(facts['in_domain']['source'])}; "
        f"methods learned from {facts['fit']['images']:,} of {_md(facts['fit']['source'])}.",
        f"- Out of domain: {foreign}.",
        f"- Checkpoint: {_md(facts['checkpoint']['path'])}, step {facts['checkpoint']['step']:,}, precision "
        f"{facts['precision']}, seed {facts['seed']}.",
        *([f"- Made by: `{printable(facts['command'])}`"] if facts["command"] else []),
        "- ROC-AUC with its 95 % bootstrap interval; AUPR is average precision with either side as the positive class; "
        "FPR95 is the share of in-domain images flagged where 95 % of the out-of-domain ones are.",
        f"- p: DeLong's paired test against {_md(table.best)}, of the largest mean, with Holm's correction over the "
        "table."
        if table.best
        else "- No method has scores of every set, so none is the best.",
    ]
    for title, lines in tables.items():
        parts += ["", f"## {title}", "", *_rows(lines)]
    found = [f"- {_md(line)}" for line in notes(table)]
    return "\n".join([*parts, *(["", "## What is missing", "", *found] if found else []), ""])


def _rows(lines):
    header, *rest = [f"| {' | '.join(map(_md, line))} |" for line in lines]
    return [header, "|---" * len(lines[0]) + "|", *rest]


def _md(text):
    """Text that no cell ends at."""
    return printable(text).replace("|", "\\|")


def _number(value, form):
    return "-" if value is None else form.format(value)


def _cost(row):
    return [_number(row["evaluations"], "{:,}"), _number(row["seconds"], "{:.3g}")]


# ------------------------------------------------------------------------------------------------------ picture


def draw(table):
    """Mean ROC-AUC over evaluations, with a line down to the minimum; and a map of methods by sets."""
    methods = {row["method"]: f"{rank} {row['method']}" for rank, row in enumerate(table.summaries, 1)}
    names = list(dict.fromkeys(row["out_of_domain"] for row in table.rows))
    longest = 0.08 * min(60, max(map(len, [*names, *methods.values()])))  # inches
    figure = new_figure(5 + longest + max(3, 0.55 * len(names)), max(5, 0.3 * len(methods) + longest + 1))
    left, right = figure.subplots(1, 2, width_ratios=(4, longest + max(3, 0.55 * len(names))))
    _draw_cost(left, [(rank, row) for rank, row in enumerate(table.summaries, 1) if row["mean"] is not None])
    _draw_map(right, table, methods, names)
    return figure


def _draw_cost(axes, summaries):
    for rank, row in summaries:
        place = {"textcoords": "offset points", "xytext": (6, -3), "fontsize": 8}
        axes.plot([row["evaluations"]] * 2, [row["minimum"], row["mean"]], "_-", color=f"C{rank % 10}", linewidth=1)
        axes.plot(row["evaluations"], row["mean"], "o", color=f"C{rank % 10}")
        axes.annotate(str(rank), (row["evaluations"], row["mean"]), color=f"C{rank % 10}", **place)
    axes.set_xscale("symlog", linthresh=1)
    costs = sorted({row["evaluations"] for _, row in summaries})
    axes.set_xticks(costs, [f"{cost:,}" for cost in costs], rotation=60, fontsize=8)
    axes.minorticks_off()
    axes.margins(x=0.2)
    axes.set(xlabel="evaluations of the network for an image", ylabel="ROC-AUC")
    axes.set_title("Mean over the sets (dot) and minimum (bar)", fontsize=10)
    axes.axhline(0.5, color="0.6", linestyle="--", linewidth=1)
    axes.grid(color="0.9")


def _draw_map(axes, table, methods, names):
    values = {(row["method"], row["out_of_domain"]): row["roc_auc"] for row in table.rows}
    grid = np.array([[values[method, name] for name in names] for method in methods], float)  # None becomes NaN
    axes.imshow(np.ma.masked_invalid(grid), vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        text = "-" if np.isnan(value) else f"{value:.2f}"
        colour = "white" if abs(value - 0.5) > _DARK else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(names)), map(shown_text, names), rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(methods)), map(shown_text, methods.values()), fontsize=8)
    axes.set_title("ROC-AUC of each set", fontsize=10)
