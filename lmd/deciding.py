"""The decisions of predict.py: tables, summary and report from what was measured, at any rate, without torch."""

import dataclasses
import re
from pathlib import Path

import numpy as np
from PIL import Image

from basics import files
from basics.console import UserError, counted, percent, printable, say, shell, some_are, warn
from lmd import calibration
from lmd import report as reports
from lmd.report import BlindSpot, Picture, Report
from storage.predictions import (
    PREDICTIONS,
    REPORT,
    SKIPPED,
    check_outcome,
    read_outcome,
    write_predictions,
    write_summary,
)
from storage.tables import write_csv

_WHOLE = 0.01  # p-values of a folder as a whole up to which it differs from the domain
_NAMED = 3  # flagged images that are named on the screen


@dataclasses.dataclass(frozen=True)
class Rule:
    """How to decide about what a folder of predictions holds.

    Attributes:
        output: the folder.
        false_alarm_rate: at which images are flagged; None for the detector's own.
        false_discovery_rate: flags by Benjamini and Hochberg instead; None not to.
        maps: whether to write a picture of where each flagged image is unusual.
    """

    output: str
    false_alarm_rate: float | None = None
    false_discovery_rate: float | None = None
    maps: bool = False

    def check(self, n):
        """Refuses rates that n calibration images cannot give, before any work.

        Raises:
            UserError: says which.
        """
        if self.false_alarm_rate is not None:
            try:
                calibration.flagged_ranks(n, self.false_alarm_rate)
            except UserError as error:
                if not calibration.is_share(self.false_alarm_rate):
                    raise
                halves = "for the p-values, that is, give calibrate.py twice as many (--fit_share)"
                raise UserError(f"{error} {halves}") from error
        if self.false_discovery_rate is not None:
            calibration.discoveries(np.ones(1), self.false_discovery_rate)

    def flags(self, p_value, default_rate):
        """Which p-values (N,) are flagged (N,), and at most which p-value that is."""
        if self.false_discovery_rate is not None:
            flagged = calibration.discoveries(p_value, self.false_discovery_rate)
            return flagged, float(p_value[flagged].max()) if flagged.any() else 0.0
        rate = default_rate if self.false_alarm_rate is None else self.false_alarm_rate
        return p_value <= rate, rate


def decide_again(rule):
    """Decides anew about what `rule.output` holds; see `decide`."""
    if not Path(rule.output).is_dir():
        raise UserError(f"there is no folder {rule.output}; give --detector and --images to fill it")
    check_outcome(rule.output)  # before the folder is marked as this program's
    with files.owned(rule.output):
        return decide(rule)


def decide(rule):
    """Decides about what `rule.output` holds, writes tables, summary and report, and says what was found.

    Returns:
        int: the number of flagged images.

    Raises:
        UserError: there is nothing to decide about, or the rate cannot be had.
    """
    output = Path(rule.output)
    description, arrays = read_outcome(output)
    rule.check(len(arrays["calibration"]))
    if rule.maps and "picture_heats" not in arrays:
        raise UserError("the detector's method has no maps; leave --maps out")
    flagged, rate = rule.flags(arrays["p_value"], description["rate"])
    sentences = _sentences(rule, rate, flagged, description["folder_p_value"])
    parts = {name: arrays[f"part_{name}"] for name in description["parts"]}
    columns = {"score": arrays["score"], "p_value": arrays["p_value"], "is_outlier": flagged}
    columns |= {f"p_{name}": values for name, values in parts.items()}
    write_predictions(output / PREDICTIONS, description["files"], columns)
    write_csv(output / SKIPPED, ["file", "reason"], description["skipped"])
    write_summary(output, _summary(rule, rate, flagged, description, sentences))
    if _remove_maps(output / "maps") and not rule.maps:
        say(f"{output / 'maps'}: removed, since it may be of another decision; --maps makes those of this one")
    if rule.maps:
        _write_maps(output / "maps", arrays, flagged, description["files"])
    reports.write(output / REPORT, _report(rule, rate, description, arrays, sentences))
    order = np.lexsort((-arrays["score"], arrays["p_value"]))  # the furthest out first
    _tell(output, description, arrays["p_value"], order[: min(_NAMED, int(flagged.sum()))], sentences)
    return int(flagged.sum())


def _tell(output, description, p_value, named, sentences):
    for sentence in sentences:
        say(sentence)
    if len(named):
        say("the furthest out:")
    for row in named:
        say(f"  {printable(description['files'][row])}: p = {p_value[row]:.4g}")
    if count := len(description["skipped"]):
        warn(f"{counted(count, 'file')} got no decision; see {output / SKIPPED}")
    say(f"results: {output / PREDICTIONS}; {output / REPORT} opens in a browser")


def _sentences(rule, rate, flagged, whole):
    """What was found, in sentences that a user can act on."""
    count, found = len(flagged), int(flagged.sum())
    images = f"{some_are(found, count, 'image')} flagged"
    if rule.false_discovery_rate is not None:
        first = (
            f"{images} at a false discovery rate of {percent(rule.false_discovery_rate)} "
            f"(about {rule.false_discovery_rate * found:.3g} of these by chance)"
        )
    else:
        chance = rate * count
        text = f"{chance:,.0f}" if chance >= 10 else f"{chance:.2g}"
        first = f"{images} at a false-alarm rate of {percent(rate)} ({text} would be by chance)"
    if count == 1:
        return [f"{first}."]
    verdict = "differs from the domain" if whole <= _WHOLE else "cannot be told from the domain"
    return [f"{first}.", f"The folder as a whole {verdict} (one-sided rank test, p = {whole:.2g})."]


def _summary(rule, rate, flagged, description, sentences):
    """The content of summary.json."""
    return {
        "images": len(flagged),
        "flagged": int(flagged.sum()),
        "skipped": len(description["skipped"]),
        "false_alarm_rate": rate if rule.false_discovery_rate is None else None,
        "false_discovery_rate": rule.false_discovery_rate,
        "calibration_images": description["calibration_images"],
        "sentences": sentences,
        "detector": description["detector"],
        "facts": description["facts"],
    }


# ----------------------------------------------------------------------------------------------------- pictures


def _pictures_of(arrays, reasons):
    """The report's pictures, from what `_most_unusual` gave."""
    pictures = []
    for place, row in enumerate(arrays["picture_rows"].tolist()):
        shown = {
            "original": _picture(arrays["picture_originals"], place),
            "reconstruction": _picture(arrays.get("picture_reconstructions"), place),
            "heat": arrays["picture_heats"][place] / 255 if "picture_heats" in arrays else None,
        }
        pictures.append(Picture(row, reason=reasons[place], **shown))
    return pictures


def _picture(values, place):
    """The picture at a place of (N, C, H, W), as (H, W, C); None of None."""
    return None if values is None else np.moveaxis(values[place], 0, -1)


def _write_maps(folder, arrays, flagged, names):
    """Writes a picture of each flagged image of which there is one, its unusual pixels in red."""
    files.mark(folder)
    shown = [(place, row) for place, row in enumerate(arrays["picture_rows"].tolist()) if flagged[row]]
    for place, row in shown:
        original, heat = _picture(arrays["picture_originals"], place), arrays["picture_heats"][place]
        stem = "".join(c if c.isalnum() else "_" for c in Path(names[row]).stem)[:40]
        files.write_png(folder / f"{row:06d}_{stem}.png", Image.fromarray(overlay(original, heat)))
    say(f"maps: {folder} ({len(shown):,} of {counted(int(flagged.sum()), 'flagged image')})")


def _remove_maps(folder):
    """Removes the pictures that `_write_maps` wrote, and the folder if it holds no others; whether there were any."""
    found = [path for path in folder.glob("*.png") if re.fullmatch(r"[0-9]{6,}_\w*\.png", path.name)]
    for path in found:
        path.unlink()
    files.remove_empty(folder)
    return bool(found)


def overlay(picture, heat):
    """An image (H, W, 1 | 3) uint8 with a heat map (H, W) uint8 over it: (H, W, 3) uint8, red where it is unusual."""
    share = heat[..., None] / 255 * 0.7
    rgb = np.broadcast_to(picture, (*picture.shape[:2], 3))
    return (rgb * (1 - share) + np.array([255, 32, 32]) * share).round().astype(np.uint8)


def _report(rule, rate, description, arrays, sentences):
    """The `report.Report` of what was decided, up to the p-value `rate`."""
    facts = dict(description["facts"])
    spots, spot_rate = facts.pop("blind_spots"), facts.pop("blind_spot_rate")
    return Report(
        sentences,
        description["files"],
        arrays["score"],
        arrays["p_value"],
        arrays["calibration"],
        rate,
        false_discovery_rate=rule.false_discovery_rate,
        parts={name: arrays[f"part_{name}"] for name in description["parts"]},
        meanings=dict(zip(description["parts"], description.get("meanings", []), strict=False)),
        skipped=[tuple(row) for row in description["skipped"]],
        pictures=_pictures_of(arrays, description["reasons"]),
        blind_spots=[BlindSpot(spot["kind"], spot["caught"], spot["images"]) for spot in spots.values()],
        blind_spot_rate=spot_rate,
        facts=[(name, _text(value)) for name, value in facts.items()],
        decide_again=shell("python", "predict.py", "--output", rule.output),
    )


def _text(value):
    return ", ".join(f"{name} {_text(part)}" for name, part in value.items()) if isinstance(value, dict) else str(value)
