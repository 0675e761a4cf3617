"""What a method finds out about a whole set of images, chunk by chunk, kept in files so that a stopped run goes on.

The chunks are fixed by the images and by what measuring one costs, so the numbers are the same to the bit wherever a
run was stopped, and whatever number of processes shared it.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from basics import distributed, noise
from basics.background import Background
from basics.console import UserError, are, progress, say, some_are, warn
from basics.image_sets import InMemory
from models import inference
from storage.arrays import OtherOrigin, read_arrays, write_arrays

_CHUNK = 128  # images at most that are examined together
_CHUNK_ON_CPU = 16  # the same where more are no faster, since what is examined together is lost when a run is stopped
_CHUNK_VALUES = 1 << 20  # and numbers of these images at most


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A method at work on one set of images.

    Attributes:
        method: a `methods.base.Method`.
        model: a `trained_model.TrainedModel`.
        images: an `ImageSet`.
        seed: of the images' noise.
        origin: what the numbers depend on besides the images, JSON types; a chunk of another origin, or of other
            images, is measured anew.
        folder: where the chunks are kept, or None for nowhere.
        change: called as change(images (B, C, H, W) uint8, indices (B,)), gives the images to measure in their place.
        keep: called as keep(pixels, examined, start) with a chunk's images and a `methods.base.Examined`, gives further
            arrays to be kept of the chunk; or None, where the statistics are all.
        shown: how the names of the arrays begin that stay in the files, where there are any, as they may be large.
        most: images of a chunk at most, or None for `_CHUNK`; there are 8 at least.
    """

    method: object
    model: object
    images: object
    seed: int
    origin: dict = dataclasses.field(default_factory=dict)
    folder: Path | None = None
    change: Callable | None = None
    keep: Callable | None = None
    shown: str = "picture_"
    most: int | None = None

    @property
    def chunks(self):
        """The rows of each chunk, a list of (start, stop)."""
        size = max(8, min(self.most or _CHUNK, _CHUNK, _CHUNK_VALUES // int(np.prod(self.images.shape))))
        return [(start, min(start + size, len(self.images))) for start in range(0, len(self.images), size)]

    def count(self, numbers):
        """How many images the chunks of some numbers have."""
        chunks = self.chunks
        return sum(stop - start for start, stop in (chunks[number] for number in numbers))

    @property
    def missing(self):
        """How many images are not in the folder yet."""
        return sum(
            stop - start
            for number, (start, stop) in enumerate(self.chunks)
            if self.folder is None or not self._path(number).is_file()
        )

    def compile_if_worth(self, choice, ranks=distributed.ALONE):
        """Compiles the network where that is worth it for what this process has to measure; see `Network`."""
        evaluations = self.missing * self.method.compiled_evaluations(self.model) // ranks.world_size
        self.model.score.net.compile_if_worth(choice, evaluations, self.images.shape)

    def run(self, label, ranks=distributed.ALONE, on_images=None):
        """Measures what is not in the folder yet; the ranks share the chunks, each makes every so manieth.

        Args:
            label: of the progress bar, or None for no bar.
            ranks: the processes, all of which call this.
            on_images: called with numbers of further images that this process has measured, in the place of a bar.

        Returns:
            list of dicts, one a chunk: `statistics` (B, F), and what `keep` gave, but for what stays in the files.

        Raises:
            UserError: an image can no longer be read, or the numbers are not finite.
        """
        if ranks.world_size > 1:
            if self.folder is None:
                raise ValueError("several processes share their chunks through a folder")
            ranks.check_same(self.images.fingerprint, "images")
        # One process looks: another might see already what a third has made since, and share out the rest otherwise.
        missing = ranks.on_main(self._missing)
        made = {}
        with ranks.together(), self._bar(label, missing, ranks) as bar:
            self._measure(missing[ranks.rank :: ranks.world_size], made, on_images or bar.update)
        return [made.get(number) or self._light(self.read(number)) for number in range(len(self.chunks))]

    def _missing(self):
        """The numbers of the chunks to measure; says which are measured anew."""
        if self.folder is None:
            return list(range(len(self.chunks)))
        missing, others = [], 0
        for number in range(len(self.chunks)):
            try:
                missing += [number] if self.read(number) is None else []
            except OtherOrigin:
                missing.append(number)
                others += 1
            except UserError as error:
                warn(f"{str(error).partition(';')[0]}; it is measured anew")
                missing.append(number)
        if others:
            made = some_are(others, len(self.chunks), "part", "was", "were")
            say(f"{self.folder}: {made} measured from other images, or otherwise, and {are(others)} measured anew")
        return missing

    def _light(self, arrays):
        """What of a chunk's arrays is kept in memory."""
        return arrays if self.folder is None else {n: v for n, v in arrays.items() if not n.startswith(self.shown)}

    def _bar(self, label, missing, ranks):
        """A bar of all images that begins at those that are there; of several processes, of what this one measures.

        Says how many are there, where it is not all or none; without a label nothing is told.
        """
        total = len(self.images)
        kept = total - self.count(missing)
        if label and 0 < kept < total:
            say(f"{label}: {some_are(kept, total, 'image')} measured already")
        if ranks.world_size > 1:
            total, kept = self.count(missing[ranks.rank :: ranks.world_size]), 0
            label = label and f"{label}, process 1 of {ranks.world_size}"
        shown = {} if label and total else {"disable": True}
        return progress(total=total, initial=kept, unit=" images", desc=label, **shown)

    def _measure(self, numbers, made, on_images):
        if not numbers:
            return
        with Background() as reader:
            pending = reader.submit(self.images.read, *self.chunks[numbers[0]])
            for number, following in zip(numbers, [*numbers[1:], None], strict=True):
                pixels = pending.result()
                if following is not None:
                    pending = reader.submit(self.images.read, *self.chunks[following])
                with self._at_work(len(pixels), on_images):
                    arrays = self._examine(number, pixels)
                made[number] = self._light(arrays)

    @contextlib.contextmanager
    def _at_work(self, count, on_images):
        """While a chunk of `count` images is measured, tells of them by how often the network was evaluated.

        A chunk can take many seconds on a CPU.  What the evaluations do not tell follows at the end.  The network's
        derivatives, which are computed outside of its calls, are in its precision, too.
        """
        evaluations, seen, told = self.method.evaluations(self.model), 0, 0

        def follow(images):
            nonlocal seen, told
            seen += images
            done = min(count - 1, seen // evaluations)
            if done > told:
                on_images(done - told)
                told = done

        with contextlib.ExitStack() as stack:
            if evaluations:
                net = self.model.score.net
                stack.enter_context(net.watched(follow))
                stack.enter_context(inference.arithmetic(net.precision))
            yield
        on_images(count - told)

    def _examine(self, number, pixels):
        """The arrays of a chunk, written to its file."""
        start, stop = self.chunks[number]
        if self.change is not None:
            pixels = self.change(pixels, torch.arange(start, stop))
        keys = noise.seed_keys(self.seed, noise.content_keys(pixels))
        if self.keep is None:
            arrays = {"statistics": self.method.statistics(self.model, pixels, keys)}
        else:
            examined = self.method.examine(self.model, pixels, keys)
            arrays = {"statistics": examined.statistics}
        if not np.isfinite(arrays["statistics"]).all():
            raise UserError(
                f"what the method {self.method.name} measures is NaN or infinite: the model's weights are broken or "
                "its training diverged; choose another checkpoint"
            )
        if self.keep is not None:
            arrays |= self.keep(pixels, examined, start)
        if self.folder is not None:
            write_arrays(self._path(number), self._origin(number), **arrays)
        return arrays

    def read(self, number):
        """All arrays of a chunk, from its file; None where there is none."""
        return read_arrays(self._path(number), self._origin(number))

    def _path(self, number):
        return Path(self.folder) / f"chunk_{number}.npz"

    def _origin(self, number):
        """What a chunk is made from: of a set in memory its own images, so that others may be added behind them."""
        rows, images = self.chunks[number], self.images
        if isinstance(images.store, InMemory):
            images = images.part(torch.arange(*rows))
        return {**self.origin, "images": images.fingerprint, "chunk": list(rows)}


def measure_together(work, ranks, on_progress):
    """Measures what several measurements lack; the ranks share the chunks of all of these, dealt out one by one.

    By itself (`Measurement.run`) one may have fewer chunks than there are ranks, some of which then only wait.  What
    cannot be measured stays missing: `Measurement.run` says why.

    Args:
        work: a list of (`Measurement` with a folder, what an image of it counts), alike on all ranks.
        ranks: the processes, all of which call this.
        on_progress: called with further counts of images measured, as if all ranks were equally far.

    Raises:
        UserError: the ranks see different images.
    """
    ranks.check_same([one.images.fingerprint for one, _ in work], "images")
    missing, dealt, mine = ranks.on_main(lambda: [one._missing() for one, _ in work]), 0, []
    for numbers in missing:
        mine.append(numbers[(ranks.rank - dealt) % ranks.world_size :: ranks.world_size])
        dealt += len(numbers)
    count = lambda parts: sum(one.count(numbers) * each for (one, each), numbers in zip(work, parts, strict=True))
    follow = _in_proportion(count(mine), count(missing), on_progress)
    with ranks.together():
        for (one, each), numbers in zip(work, mine, strict=True):
            with contextlib.suppress(UserError):
                one._measure(numbers, {}, lambda images, each=each: follow(images * each))


def _in_proportion(part, whole, on_progress):
    """A function of further counts of a `part`, which tells on_progress of those of the `whole`."""
    done, told = 0, 0

    def follow(count):
        nonlocal done, told
        done += count
        now = whole * done // part
        on_progress(now - told)
        told = now

    return follow


def chunk_on(device):
    """Images at most that a torch.device had best examine together, see `Measurement.most`."""
    return _CHUNK_ON_CPU if device.type == "cpu" else _CHUNK


def statistics_of(chunks):
    """All statistics (N, F) of what `Measurement.run` gave."""
    return np.concatenate([chunk["statistics"] for chunk in chunks])
