"""What calibrate.py does: makes a detector from held-back images, and says what it sees and what it does not."""

import dataclasses
import functools
import shutil
from pathlib import Path

import torch

from basics import distributed, files
from basics.console import UserError, choose, counted, percent, progress, say, warn
from lmd import calibration, shifts
from lmd.card import bands, familiarity, histogram, rarest_first
from lmd.detector import AUTO, Detector
from lmd.held_out import content_keys_of, held_out
from lmd.measurement import measure_together, statistics_of
from lmd.methods import METHODS
from lmd.methods.selection import check_overrides, select
from lmd.trained_model import identity, open_model
from storage import detector_folder

_STATISTICS, _BLIND_SPOTS = "statistics", "blind_spots"  # folders of what is measured, kept until the detector is there


@dataclasses.dataclass(frozen=True)
class CalibrationJob:
    """What to calibrate, with what, and where to: what calibrate.py's flags say, under their names.

    Attributes:
        config: the config tree.
        ckpt_path, data_root, max_images, workers, seed, memory_gb, precision: as in `reconstruction.Job`.
        compile: whether to compile the network first, see `models.inference.worth_compiling`.
        in_domain: the source of the held-back images.
        detector: the folder to write.
        method: a name in `methods.METHODS`, with settings where they are not to be the default ones: `lmd:reps=10`; or
            'auto', see `Detector.choose_method`.
        false_alarm_rate: at which the detector decides, and the blind spots are measured.
        fit_share: see `Detector.fit`.
        card_images: calibration images of which each kind of made-up foreign image is made; 0 for none.
        center_crop: as --id_center_crop of recon.py.
        overridden: paths of the fields of the config that a command line set, see `configs.base.typed`.
        command: the command line, which is kept.
    """

    config: object
    ckpt_path: str
    in_domain: str
    detector: str
    method: str = AUTO
    false_alarm_rate: float = 0.05
    fit_share: float = 0.5
    card_images: int = 100
    center_crop: bool = True
    seed: int = 0
    max_images: int | None = None
    data_root: str = "./data"
    workers: int | None = None
    memory_gb: float | None = None
    precision: str = "auto"
    compile: str = "auto"
    overridden: frozenset = frozenset()
    command: str = ""


def calibrate(job, device, ranks=distributed.ALONE):
    """Writes the detector's folder, and says what it can do.

    Args:
        job: a `CalibrationJob`.
        device: torch.device.
        ranks: the processes that share the work, all of which call this.

    Raises:
        UserError: for bad input; a detector that was there stays.
    """
    detector_folder.check_place(job.detector)
    calibration.check_rate(job.false_alarm_rate)
    Detector.check_share(job.fit_share)
    method = _method(job.method)
    check_overrides([] if method == AUTO else [method], job.config, job.overridden)
    model = open_model(job.ckpt_path, job.config, device, job.precision, job.memory_gb)
    source, precision = model.source, model.score.net.precision
    detector = Detector(model, method, seed=job.seed, center_crop=job.center_crop)
    images = ranks.in_turn(lambda: _images(job, detector, source.path))
    if job.card_images:
        shifts.check_size(images, "set --card_images 0")
    detector.choose_method(len(images), job.fit_share)
    method = detector.method
    _check_rate(detector, len(images), job)
    evaluations, made_up = method.evaluations(model), len(shifts.SHIFTS) * min(job.card_images, len(images))
    say(f"method {method.name}: {counted(evaluations, 'network evaluation')} an image, {precision}")
    to_come = method.compiled_evaluations(model) * (len(images) + made_up) // ranks.world_size
    model.score.net.compile_if_worth(job.compile, to_come, images.shape)
    origin = {"method": method.name, "settings": method.settings, **identity(job.config, source, job.seed, precision)}
    unfinished = Path(f"{job.detector.rstrip('/')}.unfinished")
    with ranks.owned(unfinished):
        detector.fit(images, job.fit_share, unfinished / _STATISTICS, origin, ranks)
        _tell(detector)
        detector.rate = job.false_alarm_rate
        spots = blind_spots(detector, images, job, unfinished / _BLIND_SPOTS, origin, ranks)
        facts = _facts(job, detector, source, spots)
        ranks.on_main(lambda: detector.save(job.detector, **facts))
    ranks.on_main(lambda: _clear(unfinished))
    say(f"detector: {job.detector}")


def _clear(unfinished):
    """Removes what calibrating has kept in a folder, and the folder unless it holds something else."""
    for name in (_STATISTICS, _BLIND_SPOTS):
        shutil.rmtree(unfinished / name, ignore_errors=True)
    files.remove_empty(unfinished)


def _method(text):
    """The one method that --method names; 'auto' as it is."""
    choose(text.split(":")[0], {AUTO: None, **METHODS}, "method (--method)")
    if text == AUTO:
        return AUTO
    if text.startswith(f"{AUTO}:"):
        raise UserError(f"--method {AUTO} has no settings; leave them out, or name the method that is to have them")
    method, *others = select(text, "--method").values()
    if others:
        raise UserError(f"--method names {1 + len(others)} methods; a detector has one; leave the others out")
    return method


# ------------------------------------------------------------------------------------------------------- images


def _images(job, detector, ckpt_path):
    """The held-back images; refused where the model is known to have been trained on them."""
    load = functools.partial(detector.images_of, data_root=job.data_root, workers=job.workers)
    return held_out(load, job.in_domain, "--in_domain", job.config, ckpt_path, job.max_images)


def _check_rate(detector, count, job):
    """Refuses a rate that `count` images cannot give, before any work."""
    n = detector.calibration_images(count, job.fit_share)
    try:
        calibration.flagged_ranks(n, job.false_alarm_rate)
    except UserError as error:
        if n == count:
            raise
        raise UserError(
            f"{error} for the p-values, which {n:,} of these {count:,} images give (--fit_share)"
        ) from error


# --------------------------------------------------------------------------------------------------- what it sees


def _tell(detector):
    """Says what the calibration allows."""
    known = detector.calibration
    n, m = len(known.parts), len(known.reference)
    taught = f" ({m:,} others are what the method compares with)" if m else ""
    say(f"calibrated with n = {n:,} images{taught}; smallest false-alarm rate: {calibration.smallest_percent(n)}")
    for line in bands(n):
        say(line)
    for line in histogram(known.scores):
        say(line)
    for finding in familiarity(detector.description["images"]):
        (say if finding.good else warn)(finding.text)
    if n < 99:
        warn(f"{n} calibration images cannot give a false-alarm rate of 1 %; hold back at least 99 for the p-values")


def blind_spots(detector, images, job, folder, origin, ranks=distributed.ALONE):
    """The share of each kind of made-up foreign images that is caught at the detector's rate.

    Returns:
        dict: name -> {"kind": in words, "caught": share, "images": their number, "rate": at which they are caught};
        empty where `job.card_images` is 0.
    """
    if not job.card_images:
        return {}
    count = min(job.card_images, len(images))
    chosen = images.part(torch.linspace(0, len(images) - 1, count).round().long())
    keys = content_keys_of(chosen)
    spots, measurements = {}, {}
    for kind in shifts.SHIFTS:
        change = shifts.change_of(kind, chosen, keys)
        measurements[kind] = detector.measurement(chosen, folder / kind, {**origin, "shift": kind}, change=change)
    _share(list(measurements.values()), ranks)
    for number, (kind, measurement) in enumerate(measurements.items(), start=1):
        measured = measurement.run(f"blind spots {number} of {len(shifts.SHIFTS)}: {kind}", ranks)
        decided = detector.decide(detector.method.score_statistics(statistics_of(measured)))
        caught = float(decided.is_outlier.mean())
        spots[kind] = {"kind": shifts.SHIFTS[kind][1], "caught": caught, "images": count, "rate": detector.rate}
    say(f"made-up foreign images caught at {percent(detector.rate)}, {count} of each kind:")
    for spot in rarest_first(spots):
        say(f"  {spot['kind']:45} {percent(spot['caught']):>7}")
    return spots


def _share(measurements, ranks):
    """Several processes measure all kinds together: one kind may have fewer chunks than there are processes."""
    if ranks.world_size > 1:
        total, missing = sum(len(one.images) for one in measurements), sum(one.missing for one in measurements)
        with progress(total=total, initial=total - missing, unit=" images", desc="blind spots") as bar:
            measure_together([(one, 1) for one in measurements], ranks, bar.update)


# ---------------------------------------------------------------------------------------------------- the folder


def _facts(job, detector, source, spots):
    """What the folder says of where the detector comes from."""
    return {
        "images": {**detector.description["images"], "source": str(job.in_domain)},
        "checkpoint": dataclasses.asdict(source),
        "blind_spots": spots,
        "command": job.command,
    }
