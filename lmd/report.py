"""The report of a prediction: one HTML file that decides, shows and explains, and reads nothing from outside itself.

It takes plain arrays, no model.  The page decides anew while its threshold moves: an image of p-value p is flagged when
p is at most the false-alarm rate, and every conformal p-value is a whole multiple of 1 / (n + 1), so the page compares
whole numbers and agrees with Python to the image.
"""

import base64
import dataclasses
import functools
import hashlib
import io
import json
import math
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from basics import files
from basics.console import counted, percent, printable
from lmd.calibration import band_of_rank

MOST_PICTURES = 300  # images in the gallery
_MOST_BYTES = 16 << 20  # of all pictures together, as text in the page
_LARGEST_EDGE = 128  # pixels of a picture; larger ones are shrunk
_SMALL_EDGE = 64  # pixels up to which the page enlarges a picture by repeating its pixels
_MOST_SKIPPED = 200  # skipped files that the page names
_BINS = 60
_PRESETS = 0.001, 0.005, 0.01, 0.05, 0.1  # false-alarm rates with a button each
_DIGITS = 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8  # of the slider's other rates, the same in each power of ten
_HIGHEST_RATE = 0.5  # of the slider
# matplotlib's colour map of that name at 16 even places, within 7 of 255 between them; its import would take a second.
_INFERNO = np.frombuffer(
    bytes.fromhex(
        "000004 0c0826 240c4f 420a68 5d126e 781c6d 932667 ae305cc73e4c dd513a ed6925 f8850f fca50a fac62d f2e661 fcffa4"
    ),
    np.uint8,
).reshape(-1, 3)


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """What the gallery shows of one image.

    Attributes:
        row: the image's index in the report's arrays.
        original: (H, W), (H, W, 1) or (H, W, 3) uint8.
        reconstruction: of the same kind, or None.
        heat: (H, W) in [0, 1], larger = further from the domain, drawn over the original; or None.
        reason: in words, what is unusual about the image; may be empty.
    """

    row: int
    original: np.ndarray
    reconstruction: np.ndarray | None = None
    heat: np.ndarray | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class BlindSpot:
    """How many made-up foreign images of one kind are caught: `share` in [0, 1] of `images`."""

    kind: str
    share: float
    images: int


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """All that the page shows.  Names may hold any characters.

    Attributes:
        sentences: what predict.py prints; the first is the headline.
        files: N names.
        score: (N,) finite, larger = further from the domain.
        p_value: (N,) in (0, 1], multiples of 1 / (n + 1): (1 + #{calibration >= score}) / (n + 1).
        calibration: (n,) finite, the scores of the in-domain images that give the p-values; n >= 1.
        rate: false-alarm rate in [0, 1): an image is flagged when its p-value is at most this.  Under a false
            discovery rate the largest flagged p-value, or 0 where nothing is flagged.
        false_discovery_rate: in (0, 1) where that has decided, else None.
        parts: p-values in [0, 1] of the method's parts, name -> (N,).
        meanings: what an image may be where a part's p-value is small, name -> text, which may be empty.
        skipped: (file, reason) of what got no decision.
        pictures: of the rows that `pictured` names, in any order.
        blind_spots: the made-up kinds of foreign images; the page sorts them.
        blind_spot_rate: the false-alarm rate at which their shares were measured.
        facts: (name, value) of how it was made: command, versions, hashes, model, method.
        title: of the browser's window, and above the headline.
        decide_again: a command that, with `--false_alarm_rate RATE` after it, decides anew; empty for none.
    """

    sentences: list
    files: list
    score: np.ndarray
    p_value: np.ndarray
    calibration: np.ndarray
    rate: float
    false_discovery_rate: float | None = None
    parts: dict = dataclasses.field(default_factory=dict)
    meanings: dict = dataclasses.field(default_factory=dict)
    skipped: list = ()
    pictures: list = ()
    blind_spots: list = ()
    blind_spot_rate: float = 0.05
    facts: list = ()
    title: str = "Which images do not belong?"
    decide_again: str = ""


def pictured(p_value, score, rate, most=MOST_PICTURES):
    """Rows (M,) worth a picture, the most suspicious first: flagged ones, and those up to five times the rate.

    Args:
        p_value, score: (N,).
        rate: as in `Report`.
        most: M is at most this, and at least 24 if there are as many images.
    """
    order = _suspicious_first(np.asarray(p_value), np.asarray(score))
    wanted = np.count_nonzero(np.asarray(p_value) <= 5 * rate)
    return order[: min(max(wanted, 24), most)]


def write(path, report):
    """Writes `render(report)` to `path`, completely or not at all.

    Raises:
        UserError: the file cannot be written.
        ValueError: as `render`.
    """
    files.write_text(path, render(report))


def render(report):
    """The page as text.

    Raises:
        ValueError: arrays of the wrong shape or range, NaN among them, or p-values of another calibration.
    """
    ranks = _checked_ranks(report)
    calibration = np.sort(np.asarray(report.calibration, float))
    histogram = _histogram(np.asarray(report.score, float), calibration)
    rate = float(report.rate)
    stops = _stops(rate, len(report.files), calibration, histogram)
    gallery, left_out = _gallery(report, ranks)
    data = {
        "n": len(calibration),
        "stops": stops,
        "start": next(i for i, stop in enumerate(stops) if stop["rate"] == rate),
        "files": [printable(name) for name in report.files],
        "score": _short(report.score),
        "rank": ranks.tolist(),
        "parts": [_short(values) for values in report.parts.values()],
        "gallery": gallery,
    }
    return _template().render(
        report=report,
        data=_json(data),
        stops=stops,
        start=stops[data["start"]],
        presets=[(i, stop["label"]) for i, stop in enumerate(stops) if stop["rate"] in _PRESETS],
        histogram=histogram,
        skipped=report.skipped[:_MOST_SKIPPED],
        blind_spots=sorted(report.blind_spots, key=lambda spot: spot.share),
        pictures=len(gallery),
        left_out=left_out,
    )


# ---------------------------------------------------------------------------------------------------- decisions


def _checked_ranks(report):
    """Checks a report's arrays; returns (N,) whole numbers, the p-values times n + 1."""
    count = len(report.files)
    arrays = {"score": report.score, "p_value": report.p_value, **{f"parts[{k}]": v for k, v in report.parts.items()}}
    for name, values in arrays.items():
        if np.shape(values) != (count,):
            raise ValueError(f"{name} has shape {np.shape(values)}, the report {count} files")
    arrays["calibration"] = report.calibration
    for name, values in arrays.items():
        values = np.asarray(values, float)
        if not np.isfinite(values).all():
            raise ValueError(f"{name} holds NaN or infinity")
        if name.startswith("p") and not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"{name} holds p-values outside 0 to 1")
    if np.ndim(report.calibration) != 1 or not len(report.calibration):
        raise ValueError("calibration holds no scores")
    if not 0 <= report.rate < 1:
        raise ValueError(f"rate is {report.rate}, not a false-alarm rate from 0 to below 1")
    multiples = np.asarray(report.p_value, float) * (len(report.calibration) + 1)
    ranks = np.rint(multiples).astype(int)
    if (abs(multiples - ranks) > 0.01).any() or (ranks < 1).any():
        raise ValueError(f"p_value does not come from these {len(report.calibration)} calibration scores")
    return ranks


def _suspicious_first(p_value, score):
    """Rows by p-value, those of one p-value from the largest score down."""
    return np.lexsort((-score, p_value))


def _stops(start, images, calibration, histogram):
    """The slider's stops: one dict for each rate that decides otherwise than the one before it.

    Several rates decide alike where few images calibrate; of those the page takes the start, else a round one.
    """
    n = len(calibration)
    levels = np.arange(1, n + 2) / (n + 1)  # all possible p-values
    round_rates = [digit * 10.0**power for power in range(-1, -8, -1) for digit in reversed(_DIGITS)]
    grid = [float(f"{rate:.2g}") for rate in round_rates if levels[0] <= rate <= _HIGHEST_RATE]
    presets = [rate for rate in _PRESETS if levels[0] <= rate]
    chosen = {}
    for rate in [*grid, float(levels[0]), *presets, start]:  # a later one takes an earlier one's place
        chosen[int(np.searchsorted(levels, rate, side="right"))] = rate
    stops = []
    for rank, rate in sorted(chosen.items()):
        # p <= rank / (n + 1) says that fewer than `rank` calibration scores are as large: the score is above this one.
        line = calibration[n - rank] if rank else max(calibration[-1], histogram["high"])
        stops.append(
            {
                "rate": rate,
                "exact": repr(float(rate)),
                "rank": rank,
                "label": _percent(rate),
                "chance": _expected(images * rate),
                "band": _band(rank, n),
                "threshold": f"{line:.4g}" if rank else "",
                "line": round(_place(line, histogram), 5),
            }
        )
    return stops


def _band(rank, n):
    """The realised false-alarm rate, 95 % of it: Beta(rank, n + 1 - rank), of a calibration set given once for all.

    Source: Vovk, Conditional validity of inductive conformal predictors, 2012.
    """
    if not rank:
        return _percent(0)
    low, high = band_of_rank(n, rank)
    return f"{_percent(low, 2)} to {_percent(high, 2)}"


def _percent(share, digits=3):
    """`percent` which no line break parts."""
    return percent(share, digits).replace(" ", "\N{NO-BREAK SPACE}")


def _expected(count):
    return f"{count:,.0f}" if count >= 10 or round(count, 9) == round(count) else f"{count:.2g}"


# ---------------------------------------------------------------------------------------------------- histogram


def _histogram(score, calibration):
    """Both histograms as SVG paths in a box of 1000 x 200: new images upward from the middle, calibration downward.

    Heights are square roots of shares, so that a few foreign images are seen beside many of the domain.  Scores far
    outside the calibration's range count in the outermost bars.
    """
    span = np.ptp(calibration) or max(abs(calibration[0]), 1.0)
    everything = np.concatenate([score, calibration])
    low = max(everything.min(), calibration[0] - span)
    high = max(min(everything.max(), calibration[-1] + 1.5 * span), low + 1e-6 * span)
    shares = [
        np.histogram(values.clip(low, high), _BINS, (low, high))[0] / max(len(values), 1)
        for values in (score, calibration)
    ]
    top = max(share.max() for share in shares)
    ticks = [share for share in (0.01, 0.05, 0.2, 0.5, 1.0) if share <= top][-3:]
    return {
        "low": low,
        "high": high,
        "new": _bars(shares[0], top, -1),
        "calibration": _bars(shares[1], top, 1),
        "beyond": int((score > high).sum()),
        "shares": [(_percent(share), round(50 * (share / top) ** 0.5, 2)) for share in ticks],
        "scores": [
            (f"{value:.4g}", round(100 * (value - low) / (high - low), 2)) for value in _round_numbers(low, high)
        ],
    }


def _round_numbers(low, high):
    """At most six multiples of 1, 2 or 5 times a power of ten, from `low` to `high`."""
    least = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(least))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= least)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _bars(shares, top, direction):
    width = 1000 / len(shares)
    heights = 100 * direction * np.sqrt(shares / top)
    bars = enumerate(heights.tolist())
    return "".join(f"M{i * width:.1f} 100v{height:.1f}h{width - 1:.1f}V100z" for i, height in bars if height)


def _place(score, histogram):
    """Where a score lies in the histogram, from 0 at its left to 1 at its right."""
    return float(np.clip((score - histogram["low"]) / (histogram["high"] - histogram["low"]), 0, 1))


# ------------------------------------------------------------------------------------------------------ pictures


def _gallery(report, ranks):
    """([{row, reason, original, reconstruction, map}], number left out because the page would grow too large)."""
    place = np.argsort(_suspicious_first(ranks, np.asarray(report.score)))  # (N,)
    pictures = sorted(report.pictures, key=lambda picture: place[picture.row])
    entries, size = [], 0
    for number, picture in enumerate(pictures):
        shown = {"original": _rgb(picture.original), "reconstruction": None, "map": None}
        if picture.reconstruction is not None:
            shown["reconstruction"] = _rgb(picture.reconstruction)
        if picture.heat is not None:
            shown["map"] = _overlay(shown["original"], picture.heat)
        encoded = {name: _png(array) for name, array in shown.items() if array is not None}
        size += sum(map(len, encoded.values()))
        if size > _MOST_BYTES:
            return entries, len(pictures) - number
        small = max(picture.original.shape[:2]) <= _SMALL_EDGE
        entries.append({"row": int(picture.row), "reason": printable(picture.reason), "small": small, **encoded})
    return entries, 0


def _rgb(array):
    """(H, W, 3) uint8 of a picture's array."""
    array = np.asarray(array)
    if array.ndim == 2:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3):
        raise ValueError(f"a picture has shape {array.shape} of {array.dtype}, not (H, W), (H, W, 1 or 3) of uint8")
    return np.broadcast_to(array, (*array.shape[:2], 3))


def _overlay(original, heat):
    """(H, W, 3) uint8: the original in grey under the map's colours, which hide more of it where it is hotter."""
    heat = np.asarray(heat, float)
    if heat.shape != original.shape[:2] or not ((heat >= 0) & (heat <= 1)).all():  # NaN fails too
        raise ValueError(f"a map has shape {heat.shape} or values outside 0 to 1, the picture {original.shape[:2]}")
    grey = original.mean(2, keepdims=True)
    places = np.linspace(0, 1, len(_INFERNO))
    colours = np.stack([np.interp(heat, places, channel) for channel in _INFERNO.T], axis=-1)  # (H, W, 3)
    opacity = 0.85 * heat[..., None]
    return ((1 - opacity) * grey + opacity * colours).round().astype(np.uint8)


def _png(array):
    """Base64 of a PNG file, shrunk to the largest edge; grey where all channels are equal, which is smaller."""
    grey = (array == array[..., :1]).all()
    picture = Image.fromarray(np.ascontiguousarray(array[..., 0] if grey else array))
    picture.thumbnail((_LARGEST_EDGE, _LARGEST_EDGE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


# ---------------------------------------------------------------------------------------------------------- page


def _short(values):
    """Numbers of six significant digits, which the page shows four of."""
    return [float(f"{value:.6g}") for value in np.asarray(values, float).tolist()]


def _json(value):
    """JSON that stands inside a script element: nothing in it can end the element or begin another."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # in ASCII
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(text):
    """The name by which a content security policy allows one script and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@functools.cache
def _template():
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "digest": _digest,
        "percent": _percent,
        "printable": printable,
        "count": "{:,}".format,
        "counted": counted,
    }
    return environment.get_template("report.html.j2")
