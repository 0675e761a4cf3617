"""What a detector is and does, as text: for the screen and for its card."""

from typing import NamedTuple

import numpy as np

from basics.console import counted, percent
from lmd import calibration

BAND_RATES = 0.01, 0.05  # at which the band of the realised false-alarm rate is told
_BINS = 12  # of the histogram
_RESTORED = 0.1  # share of the variance; .86 of the shipped model on its own domain, below 0 of an untrained one
_KNOWN = 1.3  # misfit; 1.1 of the shipped model on its own domain, 1.5 of one trained on 5,000 photographs, 1.4 to 2 of
# images of another domain


def bands(n):
    """Lines on how far the realised false-alarm rate may be from the one that was asked for."""
    lines = []
    for rate in BAND_RATES:
        if rate >= calibration.smallest_rate(n):
            low, high = (percent(end, 2) for end in calibration.band(n, rate))
            lines.append(f"at {percent(rate)} the realised rate lies between {low} and {high} (95 %)")
    return lines


class Finding(NamedTuple):
    """A line on what a calibration found; `good` is False where it is to be a warning."""

    text: str
    good: bool = True


def familiarity(images):
    """How well the model knows the domain: `misfit` and `restored` of what a description says of held-back images.

    Returns:
        list of `Finding`; empty where the method does not tell.
    """
    findings = []
    learned = images.get("restored", 1) >= _RESTORED
    if "misfit" in images:
        known = images["misfit"] <= _KNOWN
        if not known:
            verdict = (
                f"above {_KNOWN} the model knows such images badly and sees little of their structure; decisions stay "
                "valid, and a model trained on such images, or for longer, catches more"
            )
        elif learned:
            verdict = "as it should be where the model knows such images (1 is ideal)"
        else:
            verdict = "which says little here, as a model that restores nothing comes near to 1, too"
        findings.append(
            Finding(
                f"held-back images are {images['misfit']:.2f} times as far from their reconstructions as two of these "
                f"are from each other: {verdict}",
                known,
            )
        )
    if "restored" in images:
        share = max(images["restored"], 0)
        line = f"the model restores {percent(share, 2)} of what varies between these images where it is masked"
        if not learned:
            line += ": it has hardly learned them, or they are all texture; train it for longer if it was not for long"
        findings.append(Finding(line, learned))
    return findings


def histogram(scores):
    """The calibration scores as lines of text."""
    counts, edges = np.histogram(scores, bins=_BINS)
    widest = counts.max()
    return [
        f"  {low:10.4g} to {high:10.4g} {count:7,} {'#' * round(40 * count / widest)}"
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]


def rarest_first(spots):
    """The entries of `blind_spots`, what is rarely caught first."""
    return sorted(spots.values(), key=lambda spot: spot["caught"])


def card(detector, description):
    """The card of a `detector.Detector`, Markdown.

    Args:
        detector: a calibrated one.
        description: the fields of its folder's `detector.json`.
    """
    known, data = detector.calibration, detector.model.config.data
    told = [finding.text for finding in familiarity(description["images"])]
    n, cost = len(known.parts), counted(detector.method.evaluations(detector.model), "network evaluation")
    lines = [
        "# Detector",
        "",
        f"Decides whether an image belongs to the domain of {description['images'].get('source', 'some images')}.",
        "",
        f"- Method: {detector.method.name}, {cost} an image of {data.image_size}x{data.image_size} pixels, "
        f"{counted(data.num_channels, 'channel')}.",
        f"- Calibrated with {n:,} images; {len(known.reference):,} others are what the method compares with.",
        f"- Decides at {percent(detector.rate)}; smallest rate: {calibration.smallest_percent(n)}.",
        *(f"- {line[0].upper()}{line[1:]}." for line in [*bands(n), *told]),
        *([f"- Made by: `{description['command']}`"] if description["command"] else []),
        "",
        "## Scores of the calibration images",
        "",
        "```",
        *histogram(known.scores),
        "```",
        "",
    ]
    return "\n".join(lines + _blind_spots(description["blind_spots"]))


def _blind_spots(spots):
    if not spots:
        return []
    rate = next(iter(spots.values()))["rate"]
    return [
        "## Blind spots",
        "",
        f"Made-up foreign images, and the share of them that is caught at {percent(rate)}. What is rarely caught here",
        "is not seen.",
        "",
        "| kind | caught | images |",
        "|---|---|---|",
        *(f"| {spot['kind']} | {percent(spot['caught'])} | {spot['images']} |" for spot in rarest_first(spots)),
        "",
    ]
