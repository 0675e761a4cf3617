"""Several methods' scores of the same images in one table: how well each separates, and whether the best one is better.

Scores are larger further out of domain.  A row is a method and a set of out-of-domain images; numbers that could not be
had are None, with the reason in `note`.
"""

import dataclasses

import numpy as np

from lmd import separation
from lmd.scoring import bootstrap_interval

RESAMPLES = 1000  # of the intervals
_FEWEST = 2  # images a side, of which there are intervals and tests


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """A method's scores.

    Attributes:
        label: what it is called.
        method, settings: its name and what it was set to, JSON types.
        evaluations: of the network for an image, or None where it is not known.
        seconds: an image took, or None.
        in_domain: (n,) scores, or None.
        out_of_domain: set -> (m,) scores, or None.
        faults: set -> why there are no scores.
    """

    label: str
    method: str
    settings: dict
    evaluations: int | None
    seconds: float | None
    in_domain: np.ndarray | None
    out_of_domain: dict
    faults: dict


@dataclasses.dataclass(frozen=True)
class Table:
    """All numbers of a comparison, JSON types.

    Attributes:
        rows: dicts of `method`, `out_of_domain`, `roc_auc`, `roc_auc_low`, `roc_auc_high`, `aupr_out`, `aupr_in`,
            `fpr95`, `evaluations`, `seconds`, `p_holm` and `note`; a method's rows together, the best method first.
        summaries: dicts of `method`, `evaluations`, `seconds`, `mean`, `minimum` and `mean_rank` of the ROC-AUCs over
            `sets`, and `note`, in the same order; None for a method that lacks one of the sets.
        sets: the sets of out-of-domain images that at least one method scored.
        best: the label of the method of the largest mean, or None.
    """

    rows: list
    summaries: list
    sets: list
    best: str | None


def tabulate(candidates, sets):
    """The `Table` of methods on sets of out-of-domain images.

    Intervals are bootstrap ones (95 %).  `p_holm` is of DeLong's paired test of the row's ROC-AUC against that of the
    method of the largest mean on the same images, with Holm's correction over the table; None in that method's rows.

    Args:
        candidates: list of `Candidate`.
        sets: the names of the sets.
    """
    rows = {(one.label, name): _row(one, name) for one in candidates for name in sets}
    shared = [name for name in sets if any(rows[one.label, name]["roc_auc"] is not None for one in candidates)]
    summaries = _summaries(candidates, rows, shared)
    best = summaries[0]["method"] if summaries and summaries[0]["mean"] is not None else None
    if best is not None:
        _test(rows, {one.label: one for one in candidates}, best)
    ordered = [rows[summary["method"], name] for summary in summaries for name in sets]
    return Table(ordered, summaries, shared, best)


def _row(one, name):
    row = {"method": one.label, "out_of_domain": name}
    row |= dict.fromkeys(["roc_auc", "roc_auc_low", "roc_auc_high", "aupr_out", "aupr_in", "fpr95"])
    row |= {"evaluations": one.evaluations, "seconds": one.seconds, "p_holm": None, "note": one.faults.get(name, "")}
    if name in one.faults:
        return row
    sides = one.in_domain, one.out_of_domain[name]
    for measure in ("roc_auc", "aupr_out", "aupr_in", "fpr95"):
        row[measure] = getattr(separation, measure)(*sides)
    if fewest := _too_few(sides):
        row["note"] = f"no interval and no test: there is one {fewest} image"
    else:
        row["roc_auc_low"], row["roc_auc_high"] = bootstrap_interval(*sides, RESAMPLES)
    return row


def _too_few(sides):
    """The side that has too few images for intervals and tests, or None."""
    names = ("in-domain", "out-of-domain")
    return next((name for side, name in zip(sides, names, strict=True) if len(side) < _FEWEST), None)


def _summaries(candidates, rows, shared):
    """One dict a method, the best first, those that lack a set last."""
    complete = [
        one for one in candidates if shared and all(rows[one.label, name]["roc_auc"] is not None for name in shared)
    ]
    aucs = np.array([[rows[one.label, name]["roc_auc"] for name in shared] for one in complete])  # (M, S)
    means = {}
    if complete:
        better = (aucs[None] > aucs[:, None]).sum(axis=1)  # (M, S): how many others are
        tied = (aucs[None] == aucs[:, None]).sum(axis=1)  # itself counted
        ranks = better + (tied + 1) / 2
        for one, row, rank in zip(complete, aucs, ranks, strict=True):
            means[one.label] = {"mean": row.mean(), "minimum": row.min(), "mean_rank": rank.mean()}
    summaries = []
    for one in candidates:
        numbers = {name: float(value) for name, value in means.get(one.label, {}).items()}
        lacking = next((one.faults[name] for name in shared if name in one.faults), "")
        if not shared:
            lacking = next(iter(one.faults.values()), "")
        summaries.append(
            {"method": one.label, "evaluations": one.evaluations, "seconds": one.seconds}
            | dict.fromkeys(["mean", "minimum", "mean_rank"])
            | numbers
            | {"note": lacking}
        )
    return sorted(summaries, key=lambda summary: (summary["mean"] is None, -(summary["mean"] or 0)))


def _test(rows, candidates, best):
    """Fills in `p_holm`."""
    first, p_values = candidates[best], {}
    for (label, name), row in rows.items():
        other = candidates[label]
        if label == best or row["roc_auc"] is None or name in first.faults:
            continue
        sides = other.in_domain, other.out_of_domain[name]
        if not _too_few(sides):
            p_values[label, name] = separation.compare((first.in_domain, first.out_of_domain[name]), sides).p_value
    for key, p_value in zip(p_values, separation.holm(list(p_values.values())), strict=True):
        rows[key]["p_holm"] = float(p_value)
