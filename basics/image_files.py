"""Sets of image files: each file is decoded once beforehand, or, in training on a large set, when it is met."""

import dataclasses
import functools
import itertools
import threading

import torch

from basics.console import UserError, counted, progress, warn
from basics.image_sets import SAMPLED, InMemory, OnDemand, content_digest
from basics.images import read_file, reason
from basics.preparation import spread

NAMED_FAILURES = 20  # unusable files named in warnings; ImageSet.skipped has them all
_FAILURES_IN_A_ROW = 100  # files after which training takes the disk to be the trouble, not the files


def load_files(name, preparation, labels, paths, left_out=()):
    """The set of image files; see `datasets.load`.

    Args:
        name: what the set is called.
        preparation: a `Preparation`.
        labels, paths, left_out: as `image_lists.folder_files` gives them: labels and paths of its files, and labels of
            what is there but not taken for an image.

    Raises:
        UserError: none of the files is usable.
    """
    rows = preparation.choose(name, len(paths))
    if not preparation.check and not preparation.fits_in_memory(len(rows)):
        return _unchecked(name, [labels[row] for row in rows], [paths[row] for row in rows], preparation)
    found, skipped, pixels = _scan(labels, paths, len(rows), preparation)
    if not found:
        label, why = skipped[0]
        raise UserError(f"of {counted(len(skipped), 'image')} of '{name}' none is usable; the first, {label}: {why}")
    if preparation.reduced_to is None:  # else it was loaded, and warned of, before
        _warn_of_dark(name, [seen.deepest for seen in found.values() if seen.deepest is not None])
    if pixels is not None:
        store = InMemory(pixels)
    else:
        store = _checked_on_demand([paths[row] for row in found], [seen.digest for seen in found.values()], preparation)
    known = {"source_size": min(seen.edge for seen in found.values()), "labels": [labels[row] for row in found]}
    return preparation.image_set(name, len(found), store, skipped=skipped, left_out=left_out, **known)


def _warn_of_dark(name, deepest):
    """Warns of 16-bit files that hold values of 12 bits, as cameras and scanners write them.

    Args:
        name: of the set.
        deepest: the largest value of each file of 16 bits.
    """
    dark = [value for value in deepest if value < 4096]
    if dark:
        factor = 16 if max(dark) > 255 else 257
        which = ("" if len(dark) == len(deepest) else f"{len(dark):,} of ") + f"the {counted(len(deepest), 'image')}"
        come = "it comes" if len(dark) == 1 else "they come"
        warn(
            f"'{name}': no pixel of {which} of 16 bits is above {max(dark)} of 65535, so {come} out nearly black; this "
            f"looks like {12 if factor == 16 else 8} bit: multiply the values by {factor}"
        )


# -------------------------------------------------------------------------------------------------- checked files


@dataclasses.dataclass(frozen=True)
class _Seen:
    """Of a file that was decoded: its picture's short edge, its content's digest, and `Decoded.deepest`."""

    edge: int
    digest: bytes | None
    deepest: int | None


def _scan(labels, paths, limit, preparation):
    """Decodes the files until `limit` usable ones are found, in pieces: so many images at most wait in memory.

    Returns:
        {row: _Seen} of the usable files and (label, reason) of the others, both in order, and the usable ones' pixels
        (N, C, H, W) uint8 or None if those are too many.
    """
    kept = preparation.fits_in_memory(limit)
    pixels = torch.empty(limit, *preparation.shape, dtype=torch.uint8) if kept else None

    def attempt(row):
        try:
            data = read_file(paths[row])
            made = preparation.decode(data, paths[row].suffix)
            image = preparation.pixels(made.picture)  # also where it is not kept: it may fail
            digest = None if kept else content_digest(data)
            return _Seen(min(made.picture.size), digest, made.deepest), (image if kept else None)
        except Exception as error:  # a damaged file can fail anywhere inside its decoder
            return None, reason(error)

    found, failed = {}, {}
    with preparation.pool() as pool, progress(total=limit, desc="checking images", unit="image", leave=False) as bar:
        for piece in _rows_to_try(len(paths), limit, 16 * preparation.workers, found, failed):
            for row, (seen, result) in zip(piece, pool.map(attempt, piece), strict=True):
                if seen is None:
                    failed[row] = result
                    continue
                if kept:
                    pixels[len(found)] = result
                found[row] = seen
            bar.update(len(found) - bar.n)
    rows, inorder = list(found), sorted(found)
    if kept:
        pixels = pixels[: len(rows)] if rows == inorder else pixels[sorted(range(len(rows)), key=rows.__getitem__)]
    return {row: found[row] for row in inorder}, [(labels[row], failed[row]) for row in sorted(failed)], pixels


def _rows_to_try(count, limit, most, found, failed):
    """Yields which of the rows 0..count-1 to try next, so that `limit` evenly spread usable ones are found.

    Every share of the source gives its first usable row; if a share has none, any others do.

    Args:
        count, limit: of the source, and of the rows wanted.
        most: rows to yield at once.
        found, failed: dicts of the rows that were tried, which the caller fills.
    """
    bounds = [*spread(count, limit), count] if limit < count else []
    shares = [iter(range(first, stop)) for first, stop in itertools.pairwise(bounds)]
    while shares:
        tries = [(share, row) for share in shares if (row := next(share, None)) is not None]
        for start in range(0, len(tries), most):
            yield [row for _, row in tries[start : start + most]]
        shares = [share for share, row in tries if row in failed]
    others = [row for row in range(count) if row not in found and row not in failed] if len(found) < limit else []
    start = 0
    while start < len(others) and len(found) < limit:
        piece = others[start : start + min(most, limit - len(found))]
        start += len(piece)
        yield piece


def _checked_on_demand(paths, digests, preparation):
    """The store of files that were usable when they were loaded, and of what content."""

    def decode_row(index):
        path = paths[index]
        try:
            data = read_file(path)
            if content_digest(data) != digests[index]:
                raise UserError(f"image {path} was changed while it was in use; run the same command again")
            return preparation.pixels(preparation.decode(data, path.suffix).picture)
        except UserError:
            raise
        except Exception as error:  # as in _scan: it was usable when the set was loaded
            raise UserError(f"image {path} can no longer be read ({reason(error)}); put it back") from error

    return OnDemand(decode_row, functools.partial(iter, digests), preparation.pool())


# ------------------------------------------------------------------------------------------------ unchecked files


def _unchecked(name, labels, paths, preparation):
    """The set of files too many to decode beforehand."""
    reader = _UncheckedFiles(name, labels, paths, preparation)
    store = OnDemand(reader.decode, functools.partial(_sampled_contents, paths), preparation.pool())
    return preparation.image_set(name, len(paths), store, skipped=reader.skipped, labels=labels)


class _UncheckedFiles:
    """Decodes files that nobody has checked; the next usable file takes the place of one that is not.

    So the images depend on the files alone, not on the order in which they are read.

    Attributes:
        skipped: (label, reason) of the unusable files that were met.
    """

    def __init__(self, name, labels, paths, preparation):
        self.name, self.labels, self.paths, self.preparation = name, labels, paths, preparation
        self.skipped = []
        self._rows_skipped, self._lock = set(), threading.Lock()

    def decode(self, index):
        """The image of row `index`, (C, H, W) uint8."""
        for further in range(min(_FAILURES_IN_A_ROW, len(self.paths))):
            row = (index + further) % len(self.paths)
            path = self.paths[row]
            try:
                return self.preparation.pixels(self.preparation.decode(read_file(path), path.suffix).picture)
            except Exception as error:  # as in _scan
                self._skip(row, reason(error))
                last = error
        raise UserError(
            f"{counted(further + 1, 'image')} of '{self.name}' in a row cannot be read, the last {path} "
            f"({reason(last)}); check the disk they are on"
        ) from last

    def _skip(self, row, why):
        """Counts an unusable file, and names it while there are few, when it is first met."""
        with self._lock:
            if row in self._rows_skipped:
                return
            self._rows_skipped.add(row)
            self.skipped.append((self.labels[row], why))
            if len(self.skipped) <= NAMED_FAILURES:
                more = "; more are counted, not named" if len(self.skipped) == NAMED_FAILURES else ""
                label = self.labels[row]
                warn(f"'{self.name}': {label} is left out, the next image stands in for it: {why}{more}")


def _sampled_contents(paths):
    """Bytes that change with the content of files too many to read: their sizes, and up to 1000 evenly spread ones."""

    def size(path):
        try:
            return path.stat().st_size
        except OSError:
            return -1  # it will be named when it is met

    yield repr([size(path) for path in paths]).encode()
    for row in spread(len(paths), SAMPLED):
        try:
            yield content_digest(read_file(paths[row]))
        except (OSError, ValueError):
            yield b"unusable"
