"""What predict.py does: decides about each image of a folder, says so, and shows why."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
from PIL import Image

from basics import distributed, files
from basics.console import UserError, printable, say, shell, warn
from lmd import calibration
from lmd import report as reports
from lmd.calibration import percent
from lmd.detector import Detector
from lmd.measurement import statistics_of
from lmd.report import BlindSpot, Picture, Report
from lmd.shifts import SHIFTS
from storage.predictions import (
    PREDICTIONS,
    REPORT,
    SKIPPED,
    read_outcome,
    write_csv,
    write_outcome,
    write_predictions,
    write_summary,
)

_CHUNKS = "chunks"  # folder in the output that holds what was measured
_PICTURED_RATE = 0.05  # images of a chunk with p-values up to five times this have their pictures kept
_HEAT = 2.0, 8.0  # standard deviations from which a pixel is coloured, and that are coloured fully


@dataclasses.dataclass(frozen=True)
class PredictionJob:
    """What to decide about, and how: what predict.py's flags say, under their names.

    Attributes:
        output: the folder of the results.
        detector: the detector's folder, and
        images: the source of the images; both None to decide anew about what `output` holds.
        false_alarm_rate: at which images are flagged; None for the detector's own.
        false_discovery_rate: flags by Benjamini and Hochberg instead; None not to.
        maps: whether to write a picture of where each flagged image is unusual.
        max_images, data_root, workers, memory_gb: as in `reconstruction.Job`.
        command: the command line, which the report shows.
    """

    output: str
    detector: str | None = None
    images: str | None = None
    false_alarm_rate: float | None = None
    false_discovery_rate: float | None = None
    maps: bool = False
    max_images: int | None = None
    data_root: str = "./data"
    workers: int | None = None
    memory_gb: float | None = None
    command: str = ""


def predict(job, device, ranks=distributed.ALONE):
    """Decides, writes the results into `job.output`, and says what was found.

    Returns:
        int: the number of flagged images.

    Raises:
        UserError: for bad input; what was there before stays.
    """
    output = Path(job.output)
    if job.detector is None:
        if not output.is_dir():
            raise UserError(f"there is no folder {output}; give --detector and --images to fill it")
        with ranks.owned(output):
            return ranks.on_main(lambda: decide(job))
    detector = Detector.load(job.detector, device, job.memory_gb)
    _check_rates(job, len(detector.calibration.parts))
    options = {"data_root": job.data_root, "max_images": job.max_images, "workers": job.workers}
    images = ranks.in_turn(lambda: detector.images_of(job.images, **options))
    origin = {"detector": detector.description["files"]}
    keep = _Pictures(detector)
    with ranks.owned(output):
        chunks = detector.measurement(images, output / _CHUNKS, origin, keep=keep).run("predicting", ranks)
        return ranks.on_main(lambda: _conclude(job, detector, images, chunks))


def _check_rates(job, n):
    """Refuses rates that cannot be, before any work."""
    if job.false_alarm_rate is not None:
        calibration.flagged_ranks(n, job.false_alarm_rate)
    if job.false_discovery_rate is not None:
        calibration.discoveries(np.ones(1), job.false_discovery_rate)


# ----------------------------------------------------------------------------------------------------- pictures


class _Pictures:
    """For `Measurement.keep`: pictures of a chunk's most unusual images, and in words what is unusual about each."""

    def __init__(self, detector):
        self.detector = detector

    def __call__(self, pixels, examined, start):
        parts = self.detector.method.score_statistics(examined.statistics)
        decided = self.detector.decide(parts)
        rows = np.sort(reports.pictured(decided.p_value, decided.score, _PICTURED_RATE))
        kept = {"picture_rows": rows + start, "picture_originals": pixels[rows].numpy()}
        if examined.reconstructions is not None:
            kept["picture_reconstructions"] = (examined.reconstructions[rows] * 255).round().byte().numpy()
        if examined.distances is not None:
            low, high = _HEAT
            heat = (self.detector.map_of(examined.distances[rows]) - low) / (high - low)
            kept["picture_heats"] = (heat.clip(0, 1) * 255).round().astype(np.uint8)
        return kept


def _most_unusual(chunks, p_value, score):
    """The pictures of the whole folder's most unusual images, from those of its chunks."""
    names = [name for name in chunks[0] if name.startswith("picture_")]
    kept = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in names}
    wanted = reports.pictured(p_value, score, _PICTURED_RATE)
    places = np.flatnonzero(np.isin(kept["picture_rows"], wanted))
    return {name: values[places] for name, values in kept.items()}


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
    if "picture_heats" not in arrays:
        raise UserError("the detector's method has no map; leave --maps out")
    written = 0
    for place, row in enumerate(arrays["picture_rows"].tolist()):
        if flagged[row]:
            original, heat = _picture(arrays["picture_originals"], place), arrays["picture_heats"][place]
            stem = "".join(c if c.isalnum() else "_" for c in Path(names[row]).stem)[:40]
            files.write_png(folder / f"{row:06d}_{stem}.png", Image.fromarray(overlay(original, heat)))
            written += 1
    say(f"maps: {folder} ({written:,} of {int(flagged.sum()):,} flagged images)")


def overlay(picture, heat):
    """An image (H, W, 1 | 3) uint8 with a heat map (H, W) uint8 over it: (H, W, 3) uint8, red where it is unusual."""
    share = heat[..., None] / 255 * 0.7
    rgb = np.broadcast_to(picture, (*picture.shape[:2], 3))
    return (rgb * (1 - share) + np.array([255, 32, 32]) * share).round().astype(np.uint8)


# ---------------------------------------------------------------------------------------------------- deciding


def _conclude(job, detector, images, chunks):
    """Writes what was measured of all images, then decides."""
    output = Path(job.output)
    parts = detector.method.score_statistics(statistics_of(chunks))
    decided = detector.decide(parts)
    arrays = {"score": decided.score, "p_value": decided.p_value, "calibration": detector.calibration.scores}
    arrays |= {f"part_{name}": values for name, values in decided.parts.items()}
    arrays |= _most_unusual(chunks, decided.p_value, decided.score)
    description = {
        "files": images.labels or [f"image {row}" for row in range(len(images))],
        "skipped": [[str(path), reason] for path, reason in images.skipped],
        "facts": _facts(job, detector, images),
        "parts": list(decided.parts),
        "reasons": detector.reason(parts[arrays["picture_rows"]]),
        "rate": detector.rate,
        "folder_p_value": calibration.folder_test(arrays["calibration"], decided.score),
        "detector": str(job.detector),
    }
    write_outcome(output, description, arrays)
    return decide(job)


def decide(job):
    """Decides about what `job.output` holds, writes tables, summary and report, and says what was found.

    Returns:
        int: the number of flagged images.

    Raises:
        UserError: there is nothing to decide about, or the rate cannot be had.
    """
    output = Path(job.output)
    description, arrays = read_outcome(output)
    names, p_value, known = description["files"], arrays["p_value"], arrays["calibration"]
    _check_rates(job, len(known))
    rate = description["rate"] if job.false_alarm_rate is None else job.false_alarm_rate
    by_discovery = job.false_discovery_rate is not None
    flagged = calibration.discoveries(p_value, job.false_discovery_rate) if by_discovery else p_value <= rate
    sentences = _sentences(job, rate, flagged, description["folder_p_value"])
    parts = {name: arrays[f"part_{name}"] for name in description["parts"]}
    columns = {"score": arrays["score"], "p_value": p_value, "is_outlier": flagged}
    columns |= {f"p_{name}": values for name, values in parts.items()}
    write_predictions(output / PREDICTIONS, names, columns)
    write_csv(output / SKIPPED, ["file", "reason"], description["skipped"])
    write_summary(output, _summary(job, rate, flagged, description, sentences, known))
    if job.maps:
        _write_maps(output / "maps", arrays, flagged, names)
    report = _report(job, description, arrays, sentences, parts, (rate, flagged))
    reports.write(output / REPORT, report)
    for sentence in sentences:
        say(sentence)
    for row in itertools.islice(np.argsort(p_value, kind="stable"), 3):
        if flagged[row]:
            say(f"  {printable(names[row])}: p = {p_value[row]:.4g}")
    if description["skipped"]:
        warn(f"{len(description['skipped']):,} files could not be read; they are in {output / SKIPPED}")
    say(f"results: {output / PREDICTIONS}, {REPORT} (open it in a browser)")
    return int(flagged.sum())


def _sentences(job, rate, flagged, whole):
    """What was found, in sentences that a user can act on."""
    count, found = len(flagged), int(flagged.sum())
    images = f"{found:,} of {count:,} images {'is' if found == 1 else 'are'} flagged"
    if job.false_discovery_rate is not None:
        first = (
            f"{images} at a false discovery rate of {percent(job.false_discovery_rate)} "
            f"(about {job.false_discovery_rate * found:.3g} of these by chance)"
        )
    else:
        chance = rate * count
        text = f"{chance:,.0f}" if chance >= 10 else f"{chance:.2g}"
        first = f"{images} at a false-alarm rate of {percent(rate)} ({text} would be by chance)"
    verdict = "differs from the domain" if whole <= 0.01 else "cannot be told from the domain"
    return [f"{first}.", f"The folder as a whole {verdict} (one-sided rank test, p = {whole:.2g})."]


def _summary(job, rate, flagged, description, sentences, known):
    """The content of summary.json."""
    return {
        "images": len(flagged),
        "flagged": int(flagged.sum()),
        "skipped": len(description["skipped"]),
        "false_alarm_rate": rate if job.false_discovery_rate is None else None,
        "false_discovery_rate": job.false_discovery_rate,
        "calibration_images": len(known),
        "sentences": sentences,
        "detector": description["detector"],
        "facts": description["facts"],
    }


def _facts(job, detector, images):
    """How the results were made, JSON types."""
    made = detector.description
    return {
        "images": {"source": str(job.images), "name": images.name, "fingerprint": images.fingerprint},
        "command": job.command,
        "method": {"name": made["method"], "settings": made["settings"]},
        "precision": made["precision"],
        "seed": made["seed"],
        "detector files": made["files"],
        "checkpoint": made["checkpoint"],
        "calibrated with": made["images"],
        "calibrated by": made["command"],
        "versions": made["versions"],
        "blind_spots": made["blind_spots"],
        "blind_spot_rate": made["rate"],
    }


def _report(job, description, arrays, sentences, parts, decision):
    """The `report.Report` of what was decided, `decision` the rate and the flags (N,)."""
    rate, flagged = decision
    facts = dict(description["facts"])
    spots, spot_rate = facts.pop("blind_spots"), facts.pop("blind_spot_rate")
    if job.false_discovery_rate is not None:
        rate = float(arrays["p_value"][flagged].max()) if flagged.any() else 0.0
    return Report(
        sentences,
        description["files"],
        arrays["score"],
        arrays["p_value"],
        arrays["calibration"],
        rate,
        false_discovery_rate=job.false_discovery_rate,
        parts=parts,
        skipped=[tuple(row) for row in description["skipped"]],
        pictures=_pictures_of(arrays, description["reasons"]),
        blind_spots=[BlindSpot(SHIFTS[kind][1], spot["caught"], spot["images"]) for kind, spot in spots.items()],
        blind_spot_rate=spot_rate,
        facts=[(name, _text(value)) for name, value in facts.items()],
        decide_again=shell("python", "predict.py", "--output", job.output),
    )


def _text(value):
    return ", ".join(f"{name} {_text(part)}" for name, part in value.items()) if isinstance(value, dict) else str(value)
