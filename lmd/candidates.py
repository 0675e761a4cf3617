"""The scores of many methods on one model: measures what is not kept yet, the cheapest methods first.

A method that fails on a set of images, or on all, is marked with the reason; the others go on.
"""

import dataclasses
import functools
import hashlib
import json
import time
from pathlib import Path

import numpy as np

from basics import distributed
from basics.console import UserError, progress, warn
from basics.image_sets import ImageSet
from lmd.combination import combined
from lmd.measurement import Measurement, statistics_of
from lmd.methods.base import Examined, TrainedModel
from lmd.ranking import Candidate


@dataclasses.dataclass(frozen=True, eq=False)
class Set:
    """Images, and what is made of them first: the name of a made-up shift and a `Measurement.change`, or None."""

    images: ImageSet
    shift: str | None = None
    change: object = None


@dataclasses.dataclass(frozen=True, eq=False)
class Sets:
    """The images of a comparison: `Set` for fit, `in_domain` and each of `foreign` by name."""

    fit: Set
    in_domain: Set
    foreign: dict


class _Timed:
    """A method whose `examine` measures the statistics alone, and the seconds that they took; for a `Measurement`."""

    def __init__(self, method, done):
        self.method, self.name, self.done = method, method.name, done
        self.seconds = 0.0

    def examine(self, model, images, keys):
        start = time.perf_counter()
        statistics = self.method.statistics(model, images, keys)  # on the CPU, so the device is done
        self.seconds = time.perf_counter() - start
        self.done(len(images))
        return Examined(statistics)

    def keep(self, pixels, examined, start):
        return {"seconds": np.array(self.seconds)}


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """One model and the sets of images that all methods score.

    Attributes:
        model: a `methods.base.TrainedModel`.
        sets: the images.
        origin: what all measurements depend on besides method and images, JSON types.
        folder: where they are kept.
        ranks: the processes that share the work.
        parts: as in `ComparisonJob`.
    """

    model: TrainedModel
    sets: Sets
    origin: dict
    folder: Path
    ranks: distributed.Ranks
    parts: bool

    def candidates(self, chosen):
        """A `ranking.Candidate` of each of the methods, label -> `Method`; the cheapest are measured first.

        Raises:
            UserError: none of them could be scored.
        """
        costs = {label: self._attempt(functools.partial(self._cost, method)) for label, method in chosen.items()}
        order = sorted(chosen, key=lambda label: (costs[label][0] is None, costs[label][0]))
        missing = {label: self._missing(chosen[label]) * max(1, costs[label][0] or 1) for label in order}
        found = []
        with progress(total=sum(missing.values()), unit=" evaluations", unit_scale=True, desc="comparing") as bar:
            for label in order:
                before, (evaluations, fault) = bar.n, costs[label]
                each = max(1, evaluations or 1) * self.ranks.world_size
                step = lambda images, each=each: bar.update(images * each)
                bar.set_postfix_str(label)
                if fault:
                    found += self._faulty(label, chosen[label], fault)
                else:
                    found += self._score(label, chosen[label], evaluations, step)
                bar.total += bar.n - before - missing[label]  # what a fault left out is not waited for
        if all(len(one.faults) == len(self.sets.foreign) for one in found):
            raise UserError(f"no method could be scored: {next(iter(found[0].faults.values()))}")
        return found

    def _cost(self, method):
        """Evaluations of a method for an image; what it needs besides, such as a metric's weights, is fetched."""
        return self.ranks.in_turn(lambda: method.evaluations(self.model))

    def _score(self, label, method, evaluations, step):
        """The candidates of one method: itself, and its parts where these are asked for."""
        least, images = max(method.fewest_images, 1), self.sets.fit.images
        if _learns(method) and len(images) < least:
            fault = f"it needs at least {least:,} in-domain images to learn from, --fit has {len(images):,}"
            return self._faulty(label, method, fault, evaluations)
        times, reference = [], np.zeros((0, len(method.parts)))
        if _learns(method):
            statistics, fault = self._measure(method, self.sets.fit, step, times)
            if not fault:
                learn = lambda: method.fit_statistics(statistics).score_statistics(statistics)
                reference, fault = self._attempt(learn)
            if fault:
                return self._faulty(label, method, fault, evaluations)
        measured = {name: self._measure(method, one, step, times) for name, one in self._scored().items()}
        seconds = sum(spent for spent, _ in times) / max(1, sum(count for _, count in times))
        columns = {label: functools.partial(combined, reference)}
        if self.parts and len(method.parts) > 1:
            columns |= {f"{label}[{part}]": lambda parts, k=k: parts[:, k] for k, part in enumerate(method.parts)}
        return [
            self._candidate(
                column, method, evaluations, seconds, {n: _scores(method, make, *m) for n, m in measured.items()}
            )
            for column, make in columns.items()
        ]

    def _candidate(self, label, method, evaluations, seconds, scores):
        """From the scores and faults of the in-domain images (under None) and of each set."""
        known, fault = scores.pop(None)
        faults = {name: fault or other for name, (_, other) in scores.items() if fault or other}
        foreign = {name: values for name, (values, _) in scores.items()}
        self._tell(label, faults)
        return Candidate(label, method.name, method.settings, evaluations, seconds, known, foreign, faults)

    def _faulty(self, label, method, fault, evaluations=None):
        """The candidate of a method that has no scores at all."""
        faults = dict.fromkeys(self.sets.foreign, fault)
        self._tell(label, faults)
        nothing = dict.fromkeys(self.sets.foreign)
        return [Candidate(label, method.name, method.settings, evaluations, None, None, nothing, faults)]

    def _tell(self, label, faults):
        for reason in dict.fromkeys(faults.values()):
            of = [name for name, other in faults.items() if other == reason]
            where = "" if len(of) == len(self.sets.foreign) else f" on {', '.join(of)}"
            warn(f"{label} is left out{where}: {reason}")

    # ------------------------------------------------------------------------------------------- statistics

    def _scored(self):
        """The sets that are scored by name; the in-domain images are under None."""
        return {None: self.sets.in_domain, **self.sets.foreign}

    def _missing(self, method):
        """How many images are to be measured by a method."""
        needed = [*([self.sets.fit] if _learns(method) else []), *self._scored().values()]
        return sum(self._measurement(method, one).missing for one in needed)

    def _measure(self, method, one, step, times):
        """Statistics (N, F) of a set and None, or None and why there are none; adds (seconds, images) to `times`."""
        measurement = self._measurement(method, one, step)
        chunks, fault = self._attempt(lambda: measurement.run(None, self.ranks))
        if fault:
            return None, fault
        times.append((sum(float(chunk["seconds"]) for chunk in chunks), len(one.images)))
        return statistics_of(chunks), None

    def _measurement(self, method, one, step=None):
        origin = {"method": method.name, "settings": method.settings, "shift": one.shift, **self.origin}
        text = json.dumps([origin, one.images.fingerprint], sort_keys=True)
        folder = self.folder / f"{method.name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        timed = _Timed(method, step)
        return Measurement(timed, self.model, one.images, self.origin["seed"], origin, folder, one.change, timed.keep)

    def _attempt(self, work):
        """What `work()` gives and None, or None and the user's error on any of the ranks; all of them call this."""
        result, fault = None, None
        try:
            result = work()
        except UserError as error:
            fault = str(error)
        except distributed.FailedElsewhere:
            pass
        fault = next(filter(None, self.ranks.gather(fault)), None)
        return (None, fault) if fault else (result, None)


def _learns(method):
    """Whether a method needs in-domain images to learn from, or to combine its parts."""
    return method.learns or len(method.parts) > 1


def _scores(method, make, statistics, fault):
    """Scores (N,) and None, or None and why there are none; `make` turns parts (N, K) into scores."""
    if fault:
        return None, fault
    try:
        scores = make(method.score_statistics(statistics))
    except UserError as error:
        return None, str(error)
    if missing := int(np.isnan(scores).sum()):
        return None, f"{missing:,} of {len(scores):,} scores are not a number (NaN)"
    return scores, None
