"""The scores of many methods on one model: measures what is not kept yet, the cheapest methods first.

A method that fails on a set of images, or on all, is marked with the reason; the others go on.
"""

import dataclasses
import hashlib
import json
import time
from pathlib import Path

import numpy as np

from basics import distributed
from basics.console import UserError, are, counted, progress, say, some_are, warn
from basics.image_sets import ImageSet
from lmd.combination import FEWEST, combined
from lmd.measurement import Measurement, measure_together, statistics_of
from lmd.methods.base import Examined
from lmd.ranking import Candidate
from lmd.trained_model import TrainedModel

_MORE_TO_FIT = "give more as --fit (--max_images holds for these, too)"
_CHUNK_EVALUATIONS = 100_000  # of the network at most for images that are measured together: what a kill loses


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

    def __init__(self, method):
        self.method, self.name, self.evaluations = method, method.name, method.evaluations
        self.seconds = 0.0

    def examine(self, model, images, keys):
        start = time.perf_counter()
        statistics = self.method.statistics(model, images, keys)  # on the CPU, so the device is done
        self.seconds = time.perf_counter() - start
        return Examined(statistics)

    def keep(self, pixels, examined, start):
        return {"seconds": np.array(self.seconds)}


@dataclasses.dataclass
class _Work:
    """Evaluations that methods cost; an image counts as 1 at least.

    Attributes:
        total: in all.
        missing: those of them that are still to be made.
        compiled: and those of these that a compiled network would make.
    """

    total: int = 0
    missing: int = 0
    compiled: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """One model and the sets of images that all methods score.

    Attributes:
        model: a `trained_model.TrainedModel`.
        sets: the images.
        origin: what all measurements depend on besides method and images, JSON types.
        folder: where they are kept.
        ranks: the processes that share the work.
        parts, compile: as in `ComparisonJob`.
    """

    model: TrainedModel
    sets: Sets
    origin: dict
    folder: Path
    ranks: distributed.Ranks
    parts: bool
    compile: str = "auto"

    def candidates(self, chosen):
        """A `ranking.Candidate` of each of the methods, label -> `Method`; the cheapest are measured first.

        Raises:
            UserError: none of them could be scored.
        """
        lacking = self._lacking(chosen)
        costs = {label: self._cost(method) for label, method in chosen.items()}
        fails = {label for label, cost in costs.items() if isinstance(cost, UserError)}
        order = sorted(chosen, key=lambda label: (True, 0) if label in fails else (False, costs[label]))
        work, counted_already = {}, set()
        for label in order:
            if label not in lacking | fails:
                work[label] = self._work(chosen[label], counted_already)
        compiled = sum(one.compiled for one in work.values()) // self.ranks.world_size
        self.model.score.net.compile_if_worth(self.compile, compiled, self.sets.fit.images.shape)
        found = []
        with self._bar(work.values()) as bar:
            for label in order:
                before, missing = bar.n, work.get(label, _Work()).missing
                bar.set_postfix_str(label)
                made = self._made(label, chosen[label], costs[label], bar.update)
                bar.total += bar.n - before - missing  # what a fault left out is not waited for
                found += made
                if label not in lacking and not (len(chosen) == 1 and self._all_fail(made)):
                    self._tell(made, bar)
        if self._all_fail(found):
            raise UserError(f"no method could be scored: {next(iter(found[0].faults.values()))}")
        return found

    def _all_fail(self, candidates):
        """Whether none of them has scores of any set."""
        return all(len(one.faults) == len(self.sets.foreign) for one in candidates)

    def _lacking(self, chosen):
        """The labels of the methods for which there are too few images to learn from; names them.

        Raises:
            UserError: there are too few for all of them.
        """
        count = len(self.sets.fit.images)
        lacking = {label: _fewest(method) for label, method in chosen.items() if _fewest(method) > count}
        named = ", ".join(f"{label} (which needs {fewest:,})" for label, fewest in lacking.items())
        have = f"there {are(count)} only {counted(count, 'image')} to learn from"
        if lacking and len(lacking) == len(chosen):
            raise UserError(f"{have}, too few for {named}; {_MORE_TO_FIT}, or choose other --methods")
        if lacking:
            warn(f"{named} {are(len(lacking))} left out: {have}; {_MORE_TO_FIT}")
        return set(lacking)

    def _bar(self, work):
        """A bar of evaluations that begins at those that are kept, and says how many these are; `work` as `_work`."""
        total, missing = sum(one.total for one in work), sum(one.missing for one in work)
        if 0 < missing < total:
            say(f"comparing: {some_are(total - missing, total, 'network evaluation')} there already")
        options = {"unit": " evaluations", "unit_scale": True, "desc": "comparing"}
        return progress(total=total, initial=total - missing, **options)

    def _made(self, label, method, evaluations, on_evaluations):
        """The candidates of one method: itself, and its parts where these are asked for; arguments as of `_cost`."""
        times = []  # (seconds, images)
        measure = lambda one: self._measure(method, one, times, on_evaluations)
        columns = {label: None}
        if self.parts and len(method.parts) > 1:
            columns |= {f"{label}[{part}]": k for k, part in enumerate(method.parts)}
        try:
            if isinstance(evaluations, UserError):
                evaluations, fault = None, evaluations
                raise fault
            self._check_fit(method)
            self._share(method, on_evaluations)
            reference = self._learn(method, measure)
            known = measure(self.sets.in_domain)
        except UserError as error:
            faults, nothing = dict.fromkeys(self.sets.foreign, str(error)), dict.fromkeys(self.sets.foreign)
            return [
                Candidate(one, method.name, method.settings, evaluations, None, None, nothing, faults)
                for one in columns
            ]
        foreign = {name: _outcome(measure, one) for name, one in self.sets.foreign.items()}
        seconds = sum(spent for spent, _ in times) / sum(count for _, count in times)
        made = []
        for one, part in columns.items():
            scores, faults = _scores(method, reference, part, {None: known, **foreign})
            of = one, method.name, method.settings, evaluations, seconds
            made.append(Candidate(*of, scores.pop(None), scores, faults))
        return made

    def _check_fit(self, method):
        """Raises UserError where there are too few images to learn from."""
        least, count = _fewest(method), len(self.sets.fit.images)
        if count < least:
            raise UserError(f"it needs at least {least:,} in-domain images to learn from, not {count:,}")

    def _learn(self, method, measure):
        """What a method's parts are compared with (m, K), once it has learned; (0, K) where it needs nothing.

        Raises:
            UserError: what the method says.
        """
        if not _learns(method):
            return np.zeros((0, len(method.parts)))
        statistics = measure(self.sets.fit)
        return self._agreed(lambda: method.fit_statistics(statistics).score_statistics(statistics))

    def _tell(self, candidates, bar):
        """Warns of what candidates lack, on lines of their own."""
        for one in candidates:
            for reason in dict.fromkeys(one.faults.values()):
                names = [name for name, other in one.faults.items() if other == reason]
                where = "" if len(names) == len(self.sets.foreign) else f" on {', '.join(names)}"
                bar.clear()
                warn(f"{one.label} is left out{where}: {reason}")

    # ---------------------------------------------------------------------------------------------- statistics

    def _cost(self, method):
        """Evaluations of a method for an image, or why it fails, a UserError; what it needs, as weights, is fetched."""
        return _outcome(self._agreed, lambda: self.ranks.in_turn(lambda: method.evaluations(self.model)))

    def _work(self, method, counted_already):
        """The `_Work` of a method, which is not to lack images, nor to fail.

        What is in `counted_already`, the folders of measurements, is left out, and what is counted here is added to it.
        """
        work = _Work()
        for piece, measurement in self._measurements(method):
            if measurement.folder not in counted_already:
                counted_already.add(measurement.folder)
                missing = measurement.missing
                work.total += self._weight(piece) * len(measurement.images)
                work.missing += self._weight(piece) * missing
                work.compiled += piece.compiled_evaluations(self.model) * missing
        return work

    def _measurements(self, method):
        """All that a method needs: (piece, `Measurement`) of each of its pieces and the sets."""
        needed = [*([self.sets.fit] if _learns(method) else []), self.sets.in_domain, *self.sets.foreign.values()]
        return [(piece, self._measurement(piece, one)) for piece in method.pieces for one in needed]

    def _share(self, method, on_evaluations):
        """Several processes measure what a method lacks, of all sets together: one alone may not keep all of them busy.

        Raises:
            UserError: they see different images.
        """
        if self.ranks.world_size > 1:
            work = {}  # by folder, so that nothing is measured twice
            for piece, one in self._measurements(method):
                work[one.folder] = one, self._weight(piece)
            self._agreed(lambda: measure_together(list(work.values()), self.ranks, on_evaluations))

    def _follower(self, method, on_evaluations):
        """Tells on_evaluations of the images that this process measures, as if the others made as many."""
        each = self._weight(method) * self.ranks.world_size
        return lambda images: on_evaluations(images * each)

    def _weight(self, method):
        """What an image counts as in the bar: evaluations, 1 at least."""
        return max(1, method.evaluations(self.model))

    def _measurement(self, method, one):
        origin = {"method": method.name, "settings": method.settings, "shift": one.shift, **self.origin}
        text = json.dumps([origin, one.images.fingerprint], sort_keys=True)
        folder = self.folder / f"{method.name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        timed, most = _Timed(method), _CHUNK_EVALUATIONS // self._weight(method)
        where = {"seed": self.origin["seed"], "origin": origin, "folder": folder}
        return Measurement(timed, self.model, one.images, **where, change=one.change, keep=timed.keep, most=most or 1)

    def _measure(self, method, one, times, on_evaluations):
        """A method's statistics (N, F) of a set; adds (seconds, images) to `times`.

        Calls on_evaluations with numbers of evaluations made by all processes together.

        Raises:
            UserError: on all ranks alike, as `Measurement.run`.
        """
        seconds, found = 0.0, []
        for piece in method.pieces:
            lacking, follow = self._measurement(piece, one), self._follower(piece, on_evaluations)
            chunks = self._agreed(lambda lacking=lacking, follow=follow: lacking.run(None, self.ranks, follow))
            seconds += sum(float(chunk["seconds"]) for chunk in chunks)
            found.append(statistics_of(chunks))
        times.append((seconds, len(one.images)))
        return method.assembled(found)

    def _agreed(self, work):
        """What `work()` gives; all ranks call this.

        Raises:
            UserError: on all of them, if one of them had it.
        """
        result, fault = None, None
        try:
            result = work()
        except UserError as error:
            fault = str(error)
        except distributed.FailedElsewhere:
            pass  # the other rank says why
        if fault := next(filter(None, self.ranks.gather(fault)), None):
            raise UserError(fault)
        return result


def _outcome(work, *arguments):
    """What `work(*arguments)` gives, or the UserError that it raises."""
    try:
        return work(*arguments)
    except UserError as error:
        return error


def _learns(method):
    """Whether a method needs in-domain images to learn from, or to combine its parts."""
    return method.fewest_images > 0 or len(method.parts) > 1


def _fewest(method):
    """How many images a method needs to learn from, or to combine its parts, at least; 0 where it does neither."""
    return max(method.fewest_images, FEWEST if len(method.parts) > 1 else 0)


def _scores(method, reference, part, measured):
    """Scores of sets of images, and why there are none.

    Args:
        method: it has learned.
        reference: (m, K), see `combination.combined`.
        part: number of the part that is the score, or None for all combined.
        measured: set -> statistics (N, F), or a UserError in their place; the in-domain images are under None.

    Returns:
        set -> (N,) or None; and set -> reason, also of sets whose scores have no in-domain ones beside them.
    """
    scores, faults = {}, {}
    for name, statistics in measured.items():
        outcome = statistics
        if not isinstance(statistics, UserError):
            outcome = _outcome(_score, method, reference, part, statistics)
        scores[name] = None if isinstance(outcome, UserError) else outcome
        if scores[name] is None:
            faults[name] = str(outcome)
    if known := faults.pop(None, None):
        faults = {name: known for name in measured if name is not None}
    return scores, faults


def _score(method, reference, part, statistics):
    parts = method.score_statistics(statistics)  # (N, K)
    column = combined(reference, parts) if part is None else parts[:, part]
    if missing := int(np.isnan(column).sum()):
        raise UserError(f"{some_are(missing, len(column), 'score')} not a number (NaN)")
    return column
