"""A calibrated detector: says of single images whether they belong to the domain, with a bounded false-alarm rate.

The images that calibrate it are in domain, and the model was not trained on them.  Where the method has something to
learn, or parts to combine, one share of them is its reference and the others give the p-values (split conformal
prediction, see `calibration`).  Larger scores are further out of domain, unlike in scikit-learn's outlier detectors.
"""

import dataclasses
import os
import platform
from pathlib import Path

import numpy as np
import torch

import datasets
from basics import distributed
from basics.console import UserError, are, choose, counted, percent, printable, warn
from basics.image_sets import ImageSet
from basics.machine import choose_device
from configs.base import to_dict
from lmd import calibration, heat, methods
from lmd.card import card
from lmd.combination import combined
from lmd.held_out import held_out, to_learn_from
from lmd.measurement import Measurement, chunk_on, statistics_of
from lmd.methods.base import Method
from lmd.trained_model import TrainedModel, open_model
from models import inference
from storage import detector_folder
from storage.checkpoints import write_network

AUTO = "auto"
FEWEST = 50  # calibration images below which a detector is no use
_FEWEST_EACH = 10  # of these to learn from, and to give p-values
DEFAULT_RATE = 0.05


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """What a detector says of N images.

    Attributes:
        score: (N,), larger = further out of the domain.
        p_value: (N,) in (0, 1]: the share of calibration images at least as far out, the image counted too.
        is_outlier: (N,) bool: whether the p-value is at most the detector's false-alarm rate.
        parts: name -> (N,) p-values of the method's parts.
        map: (N, H, W) float32, how unusual each pixel is in standard deviations, where it was asked for.
        files: N names, of the image that each row is of: the paths of a list as they were given, of a folder those
            below it; None for arrays and pictures, whose rows are all there, in order.
        skipped: (file, reason) of what could not be read, or is no image by its ending: it has no row, so that a list
            of paths may have fewer rows than entries.
    """

    score: np.ndarray
    p_value: np.ndarray
    is_outlier: np.ndarray
    parts: dict
    map: np.ndarray | None = None
    files: list | None = None
    skipped: list = ()

    def __repr__(self):
        return f"<Prediction of {counted(len(self.score), 'image')}, {int(self.is_outlier.sum()):,} flagged>"


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """What calibration images gave.

    Attributes:
        reference: (m, K) the parts' scores of the images that the method learned from; (0, K) where it needs none.
        parts: (n, K) the parts' scores of the images that give the p-values.
        pixels: (2,) mean and standard deviation of the distances of single pixels, see `heat`; (0,) without.
    """

    reference: np.ndarray
    parts: np.ndarray
    pixels: np.ndarray

    @property
    def scores(self):
        """(n,), the scores that give the p-values."""
        return combined(self.reference, self.parts)


class Detector:
    """A trained model, a method, and what calibrates it.

    Args:
        model: a `trained_model.TrainedModel`, see `open_model`.
        method: a name in `methods.METHODS`, or a `methods.base.Method`; 'auto' for the strongest that the images which
            calibrate it allow, see `choose_method`.
        seed: of the images' noise.
        center_crop: crop images to their centre square; else squeeze them.

    Raises:
        UserError: there is no such method, or what is given is no model or method.
    """

    def __init__(self, model, method=AUTO, *, seed=0, center_crop=True):
        if not isinstance(model, TrainedModel):
            raise UserError(f"a detector needs a model, which open_model(path) gives, not {type(model).__name__}")
        if not isinstance(method, (str, Method)):
            choose(str(method), {AUTO: None, **methods.METHODS}, "method")
        self.model, self.seed, self.center_crop = model, seed, center_crop
        self.method = methods.create(method) if isinstance(method, str) and method != AUTO else method
        self.rate = DEFAULT_RATE
        self.calibration = None
        self.description = {}  # of the folder that it was loaded from

    def __repr__(self):
        method, known = getattr(self.method, "name", self.method), self.calibration
        state = "not calibrated yet"
        if known is not None:
            state = f"calibrated with {counted(len(known.parts), 'image')}, false-alarm rate {percent(self.rate)}"
        return f"<Detector: method {method}, {self.model}, {state}>"

    # ------------------------------------------------------------------------------------------------ calibrating

    def fit(self, held_back, fit_share=0.5, folder=None, origin=None, ranks=distributed.ALONE):
        """Calibrates with in-domain images that the model was not trained on; returns itself.

        Args:
            held_back: images, see `images_of`.
            fit_share: the share of them that the method learns from, where it has anything to learn.
            folder, origin, ranks: see `Measurement`.

        Raises:
            UserError: there are too few images, the share is out of range, or as `Measurement.run`.
        """
        self.check_share(fit_share)
        images = self._held_out(held_back)
        self.choose_method(len(images), fit_share)
        learning = self._learning(images, fit_share)
        chunks = self.measurement(images, folder, origin, keep=_of_the_domain).run("calibrating", ranks)
        statistics = statistics_of(chunks)
        self.method.fit_statistics(statistics[learning])
        scores = self.method.score_statistics(statistics)  # (N, K)
        parts = scores[~learning]
        pixels = heat.moments(np.stack([chunk["pixel_sums"] for chunk in chunks]))
        self.calibration = Calibration(scores[learning], parts, pixels)
        calibration.threshold(self.calibration.scores, 0.5)  # NaN and infinite scores are refused
        self.rate = max(self.rate, calibration.smallest_rate(len(parts)))
        source = held_back if isinstance(held_back, (str, Path)) else images.name
        described = {"source": str(source), "fingerprint": images.fingerprint, "count": len(images)}
        misfit = np.concatenate([chunk["misfit"] for chunk in chunks])
        if misfit.size:
            described["misfit"] = round(float(np.median(misfit)), 4)
        error, spread = np.sum([chunk["restoration"] for chunk in chunks], axis=0)
        if spread:
            described["restored"] = round(float(1 - error / spread), 4)
        self.description = {"images": described, "treatment": images.treatment}
        return self

    def _held_out(self, source):
        """The images; refused where the model is known to have been trained on them, see `held_out.held_out`."""
        model = self.model.source
        if isinstance(source, ImageSet) or model is None:
            return self.images_of(source)
        name = source if isinstance(source, (str, Path)) else "these images"
        load = lambda which, **options: self.images_of(source if which is name else which, **options)
        return held_out(load, name, "", self.model.config, model.path)

    def choose_method(self, count, fit_share=0.5):
        """Where the method is 'auto': `combined` if `count` images are enough and it suits the model, else `lmd`.

        LMD learns nothing, and suits every model.
        """
        if self.method != AUTO:
            return
        combination = methods.create("combined")
        enough = round(fit_share * count) >= combination.fewest_images
        self.method = combination if enough and combination.suits(self.model) else methods.create("lmd")

    @staticmethod
    def check_share(fit_share):
        """Refuses what is no share of images to learn from, whatever their number.

        Raises:
            UserError: it is no number in (0, 1).
        """
        if not calibration.is_share(fit_share):
            raise UserError(f"--fit_share must lie between 0 and 1, not at {fit_share}")

    def calibration_images(self, count, fit_share=0.5):
        """How many of `count` images give p-values; the method learns from the others.

        Raises:
            UserError: there are too few of either.
        """
        if count < FEWEST:
            raise UserError(
                f"{counted(count, 'image')} {are(count)} too few to calibrate with: the false-alarm rate could not be "
                f"known; give at least {FEWEST}, better 2,000"
            )
        if not self.method.fewest_images and len(self.method.parts) == 1:
            return count
        learning, fewest = round(fit_share * count), self.method.fewest_images
        if learning < fewest:
            raise UserError(
                f"the method {self.method.name} needs at least {fewest} images to learn from, and --fit_share "
                f"{fit_share:g} of {count:,} images leaves {learning:,}; give more images, or choose another method"
            )
        if min(learning, count - learning) < _FEWEST_EACH:
            raise UserError(
                f"--fit_share {fit_share:g} of {count:,} images leaves {learning:,} to learn from and "
                f"{count - learning:,} for the p-values; both need at least {_FEWEST_EACH}"
            )
        return count - learning

    def _learning(self, images, share):
        """Which of the images the method learns from (N,) bool.

        Raises:
            UserError: as `calibration_images`, or copies leave too few different ones.
        """
        count = len(images) - self.calibration_images(len(images), share)
        return to_learn_from(images, count, max(_FEWEST_EACH, self.method.fewest_images)).numpy()

    def infer_threshold(self, false_alarm_rate):
        """Sets the false-alarm rate at which images are outliers; returns the score from which on they are.

        Raises:
            UserError: the rate is out of range, or below 1 / (n + 1).
        """
        threshold = calibration.threshold(self._calibrated().scores, false_alarm_rate)
        self.rate = false_alarm_rate
        return threshold

    # -------------------------------------------------------------------------------------------------- deciding

    def predict(self, images, maps=False):
        """The `Prediction` of images, see `images_of`.

        Args:
            images: the images.
            maps: whether to say how unusual each pixel is.

        Raises:
            UserError: the detector is not calibrated, or the method has no map.
        """
        self._calibrated()
        if maps:
            self.check_maps()
        images, keep = self.images_of(images), self.keep_maps if maps else None
        chunks = self.measurement(images, keep=keep).run("predicting")
        shown = np.concatenate([chunk["map"] for chunk in chunks]) if maps else None
        decided = self.decide(self.method.score_statistics(statistics_of(chunks)), shown)
        return dataclasses.replace(decided, files=images.labels, skipped=images.without_row)

    def decide(self, parts, shown=None):
        """The `Prediction` from the parts' scores (N, K) and maps (N, H, W) or None."""
        known = self._calibrated()
        score = combined(known.reference, parts)
        p_value = calibration.p_values(known.scores, score)
        return Prediction(score, p_value, p_value <= self.rate, self.part_p_values(parts), shown)

    def part_p_values(self, parts):
        """Name -> (N,) p-values of each part by itself, both tails: of scores (N, K)."""
        known = self._calibrated().parts
        return {
            name: calibration.two_sided(known[:, k], parts[:, k])
            for k, name in enumerate(self.method.parts if len(self.method.parts) > 1 else ())
        }

    def reason(self, parts):
        """In words, what is unusual about each image: a list of N, from the parts' scores (N, K)."""
        known = self._calibrated().parts
        columns = [calibration.two_sided(known[:, k], parts[:, k]) for k in range(parts.shape[1])]
        worst = np.argmin(columns, axis=0)  # (N,)
        large = parts[np.arange(len(parts)), worst] >= np.median(known, axis=0)[worst]
        return [self.method.reason(self.method.parts[k], up) for k, up in zip(worst, large, strict=True)]

    def keep_maps(self, pixels, examined, start):
        """For `Measurement.keep`: the maps of a chunk."""
        return {"map": self.map_of(examined.distances)}

    def map_of(self, distances):
        """How unusual each pixel is (B, H, W) in standard deviations, from `Examined.distances`."""
        return heat.standardised(distances, self._calibrated().pixels)

    @property
    def has_maps(self):
        """Whether it can say how unusual single pixels are."""
        return self._calibrated().pixels.size > 0

    def check_maps(self):
        """Refuses to make maps, before any work.

        Raises:
            UserError: the method has none.
        """
        if not self.has_maps:
            raise UserError(f"a detector of the method {self.method.name} has no maps; leave --maps out")

    def measurement(self, images, folder=None, origin=None, **options):
        """The `Measurement` of an `ImageSet` by this detector's method."""
        most = chunk_on(self.model.device)
        return Measurement(self.method, self.model, images, self.seed, origin or {}, folder, most=most, **options)

    def images_of(self, source, **options):
        """Images of the model's size, an `ImageSet`.

        Args:
            source: (N, C, H, W), (N, H, W, C) or (N, H, W) uint8, a tensor or an array; a list of paths or of PIL
                pictures; one picture; a folder, a file, a .txt list, or a data set's name; or an ImageSet, taken as it
                is.
            options: further arguments of `datasets.load`.

        Raises:
            UserError: it is something else, or as `datasets.load`.
        """
        data = self.model.config.data
        sizes = {"image_size": data.image_size, "num_channels": data.num_channels, "center_crop": self.center_crop}
        if isinstance(source, ImageSet):
            return source
        return datasets.load_any(source, **sizes, category=data.get("category"), **options)

    def _calibrated(self):
        if self.calibration is None:
            raise UserError("the detector is not calibrated yet; call fit with held-back images, or load one")
        return self.calibration

    # ------------------------------------------------------------------------------------------------- in a folder

    def save(self, path, **facts):
        """Writes the detector's folder, which is all that `load` needs.

        Args:
            path: the folder; a detector that is there is replaced.
            facts: further fields of its description (`checkpoint`, `blind_spots`, `command`).
        """
        known = self._calibrated()
        config, network = to_dict(self.model.config), self.model.score.net
        arrays = {f"method_{name}": value for name, value in self.method.fitted().items()}
        arrays |= {field.name: getattr(known, field.name) for field in dataclasses.fields(known)}
        description = {
            "treatment": {},
            "images": {},
            "checkpoint": {},
            "blind_spots": {},
            "command": "",
            **self.description,
            **facts,
            "method": self.method.name,
            "settings": self.method.settings,
            "seed": self.seed,
            "precision": network.precision,
            "rate": self.rate,
            "center_crop": self.center_crop,
            "versions": _versions(),
        }
        step = description["checkpoint"].get("step", 0)
        write_weights = lambda file: write_network(file, network.net, config, step)
        detector_folder.write(path, description, write_weights, arrays, card(self, description))
        self.description = description

    @classmethod
    def load(cls, path, device="auto", memory_gb=None):
        """The detector of a folder, on any machine; without a config file or checkpoint.

        Args:
            path: the folder.
            device: 'auto', 'cpu', 'cuda' or 'cuda:i', or a torch.device.
            memory_gb: see `trained_model.rows_within`.

        Raises:
            UserError: the folder is damaged or incomplete, or of a later version; or it is no path.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise UserError(f"a detector is loaded from the path of its folder, not from {type(path).__name__}")
        path = detector_folder.located(path)
        description, arrays = detector_folder.read(path)
        device = choose_device(device) if isinstance(device, str) else device
        precision = _precision_on(device, description["precision"])
        model = open_model(path / detector_folder.WEIGHTS, device=device, precision=precision, memory_gb=memory_gb)
        try:
            method = methods.create(description["method"], **description["settings"])
            method.evaluations(model)  # it makes its masks: settings that it cannot use show here
            learned = [name for name in arrays if name.startswith("method_")]
            method.restore({name.removeprefix("method_"): arrays.pop(name) for name in learned})
            detector = cls(model, method, seed=description["seed"], center_crop=description["center_crop"])
            detector.calibration = _checked(Calibration(**arrays), len(method.parts))
            detector.infer_threshold(description["rate"])
        except Exception as error:  # what is in the files may break anything
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            reason = kind + printable(error)[:200]
            raise UserError(f"{path} holds no detector that can be used ({reason}); calibrate again") from error
        detector.description = {n: v for n, v in description.items() if n != "format"}
        return detector


def _checked(known, parts):
    """A `Calibration` whose arrays have the right shapes.

    Raises:
        ValueError: they have not.
    """
    for name in ("reference", "parts"):
        value = getattr(known, name)
        if value.ndim != 2 or value.shape[1] != parts:
            raise ValueError(f"{name} is {value.shape}, not (n, {parts})")
    if not len(known.parts) or (parts > 1 and not len(known.reference)):
        raise ValueError("it has no calibration scores")
    if known.pixels.shape not in ((0,), (2,)) or not (known.pixels[1:] > 0).all():
        raise ValueError(f"pixels are {known.pixels.tolist()[:3]}, no mean and standard deviation")
    return known


def _precision_on(device, precision):
    """The precision that a detector was calibrated in, or fp32 on a device that does not have it, which is told."""
    if precision == "tf32" and not inference.has_tf32(device):
        warn(f"calibrated in tf32, which {device} does not have: scores are computed in fp32, and differ a little")
        return "fp32"
    return precision


def _versions():
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def _of_the_domain(pixels, examined, start):
    """For `Measurement.keep`: what a chunk of held-back images says of single pixels, and of the model."""
    misfit = np.zeros(0) if examined.misfit is None else examined.misfit
    restoration = _restoration(pixels, examined.reconstructions)
    return {"pixel_sums": heat.sums(examined.distances), "misfit": misfit, "restoration": restoration}


def _restoration(pixels, recons):
    """How far masked pixels are from their reconstructions, and from their mean over the chunk: sums of squares (2,).

    Less 1, their ratio is the share of the domain's variance that the model explains.  The mean of B images is as if
    it were known without them: the second sum is multiplied by B / (B - 1).

    Args:
        pixels: (B, C, H, W) uint8.
        recons: (B, C, H, W) in [0, 1], or None.  What equals its pixel in all images was never masked.
    """
    count = len(pixels)
    if recons is None or count < 2:
        return np.zeros(2)
    orig = pixels.double() / 255
    error = (orig - recons).square().sum(dim=0)
    spread = orig.var(dim=0) * count
    masked = error > 1e-12  # more than the rounding of 32-bit floats
    return np.array([error[masked].sum().item(), spread[masked].sum().item()])
