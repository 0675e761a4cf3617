"""What predict.py does: measures each image of a folder by a detector, and has `deciding` decide and show why."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from basics import distributed
from basics.console import counted, say
from basics.preparation import spread
from lmd import calibration
from lmd import report as reports
from lmd.deciding import Rule, decide
from lmd.detector import Detector
from lmd.measurement import statistics_of
from storage.predictions import CHUNKS, check_place, write_outcome

_PICTURED_RATE = 0.05  # images with p-values up to five times this have their pictures kept
_FEW = 256  # images of a folder up to which some have pictures whatever their p-values
_HEAT = 2.0, 8.0  # standard deviations from which a pixel is coloured, and that are coloured fully


@dataclasses.dataclass(frozen=True)
class PredictionJob:
    """What to decide about: what predict.py's flags say, under their names.

    Attributes:
        detector: the detector's folder.
        images: the source of the images.
        rule: a `deciding.Rule`, which says where the results go, too.
        max_images, data_root, workers, memory_gb: as in `reconstruction.Job`.
        compile: whether to compile the network first, see `models.inference.worth_compiling`.
        command: the command line, which the report shows.
    """

    detector: str
    images: str
    rule: Rule
    max_images: int | None = None
    data_root: str = "./data"
    workers: int | None = None
    memory_gb: float | None = None
    compile: str = "auto"
    command: str = ""


def predict(job, device, ranks=distributed.ALONE):
    """Decides, writes the results into `job.rule.output`, and says what was found.

    Returns:
        int: the number of flagged images.

    Raises:
        UserError: for bad input; what was there before stays.
    """
    detector = Detector.load(job.detector, device, job.memory_gb)
    job.rule.check(len(detector.calibration.parts))
    if job.rule.maps:
        detector.check_maps()
    output = Path(job.rule.output)
    ranks.on_main(lambda: check_place(output, job.images, job.detector))
    images = ranks.in_turn(lambda: _images(job, detector))
    say(_treated(images))
    keep, origin = _Pictures(detector, len(images)), {"detector": detector.description["files"]}
    with ranks.owned(output):
        measurement = detector.measurement(images, output / CHUNKS, origin, keep=keep)
        measurement.compile_if_worth(job.compile, ranks)
        statistics = statistics_of(measurement.run("predicting", ranks))
        return ranks.on_main(lambda: _conclude(job, detector, measurement, statistics))


def _images(job, detector):
    """The images; those of an array are called by their places in it."""
    options = {"data_root": job.data_root, "workers": job.workers}
    images = detector.images_of(job.images, max_images=job.max_images, **options)
    if images.labels is not None:
        return images
    whole = images if job.max_images is None else detector.images_of(job.images, **options)
    whole = dataclasses.replace(whole, labels=[f"image {row}" for row in range(len(whole))])
    rows = spread(len(whole), job.max_images)
    return whole if len(rows) == len(whole) else whole.part(torch.tensor(rows))


def _treated(images):
    """A line on what becomes of images of other sizes and colours."""
    channels, height, width = images.shape
    how = "cropped to the centre square" if images.treatment["shape"] == "crop" else "squeezed"
    colours = "grey" if channels == 1 else "RGB"
    shape = f"{width}x{height} pixels, {colours}"
    return f"'{images.name}': {counted(len(images), 'image')}; what is not {shape}, is {how} and converted"


# ----------------------------------------------------------------------------------------------------- pictures


class _Pictures:
    """For `Measurement.keep`: pictures of a chunk's most unusual images, and in words what is unusual about each."""

    def __init__(self, detector, count):
        self.detector, self.few = detector, count <= _FEW

    def __call__(self, pixels, examined, start):
        parts = self.detector.method.score_statistics(examined.statistics)
        decided = self.detector.decide(parts)
        rows = np.sort(reports.pictured(decided.p_value, decided.score, _PICTURED_RATE))
        if not self.few:
            rows = rows[decided.p_value[rows] <= 5 * _PICTURED_RATE]
        kept = {"picture_rows": rows + start, "picture_originals": pixels[rows].numpy()}
        if examined.reconstructions is not None:
            kept["picture_reconstructions"] = (examined.reconstructions[rows] * 255).round().byte().numpy()
        if examined.distances is not None and self.detector.has_maps:
            low, high = _HEAT
            heat = (self.detector.map_of(examined.distances[rows]) - low) / (high - low)
            kept["picture_heats"] = (heat.clip(0, 1) * 255).round().astype(np.uint8)
        return kept


def _most_unusual(measurement, decided):
    """The pictures of the whole folder's most unusual images, from the files of its chunks."""
    wanted = reports.pictured(decided.p_value, decided.score, _PICTURED_RATE)
    pieces = []
    for number, (start, stop) in enumerate(measurement.chunks):
        if number == 0 or ((wanted >= start) & (wanted < stop)).any():
            arrays = measurement.read(number)
            chosen = np.isin(arrays["picture_rows"], wanted)
            pieces.append({name: v[chosen] for name, v in arrays.items() if name.startswith(measurement.shown)})
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _conclude(job, detector, measurement, statistics):
    """Writes what was measured of all images, then decides."""
    images, parts = measurement.images, detector.method.score_statistics(statistics)
    decided, known = detector.decide(parts), detector.calibration.scores
    arrays = {"score": decided.score, "p_value": decided.p_value, "calibration": known}
    arrays |= {f"part_{name}": values for name, values in decided.parts.items()}
    arrays |= _most_unusual(measurement, decided)
    description = {
        "files": images.labels,
        "skipped": [[str(path), reason] for path, reason in images.without_row],
        "facts": _facts(job, detector, images),
        "parts": list(decided.parts),
        "meanings": [detector.method.meaning(part) for part in decided.parts],
        "reasons": detector.reason(parts[arrays["picture_rows"]]),
        "rate": detector.rate,
        "folder_p_value": calibration.folder_test(known, decided.score),
        "calibration_images": len(known),
        "detector": str(job.detector),
    }
    write_outcome(Path(job.rule.output), description, arrays)
    return decide(job.rule)


def _facts(job, detector, images):
    """How the results were made, JSON types."""
    made = detector.description
    rates = [spot["rate"] for spot in made["blind_spots"].values()]
    return {
        "images": {"source": str(job.images), "name": images.name, "fingerprint": images.fingerprint},
        "measured by": job.command,
        "method": {"name": made["method"], "settings": made["settings"]},
        "precision": made["precision"],
        "seed": made["seed"],
        "detector files": made["files"],
        "checkpoint": made["checkpoint"],
        "calibrated with": made["images"],
        "calibrated by": made["command"],
        "versions": made["versions"],
        "blind_spots": made["blind_spots"],
        "blind_spot_rate": rates[0] if rates else made["rate"],
    }
