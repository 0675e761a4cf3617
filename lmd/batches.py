"""Batches for training and evaluation, from an `ImageSet`."""

import time
import weakref

import torch

from basics import noise
from basics.console import UserError, counted
from basics.image_sets import IN_MEMORY_BYTES, InMemory
from basics.pixels import dequantize, to_model_range

_PREFETCHED_STEPS = 3  # training batches that threads decode ahead of the step that asks for them


class TrainingBatches:
    """Shuffled batches for training: `batch(step)` is a pure function of (seed, step), so a run resumes at any step.

    Every epoch has an order of its own, drawn from the key (seed, epoch); the images left over at its end are dropped.
    A set in memory of up to IN_MEMORY_BYTES lives on the device as uint8 and is gathered, flipped and scaled there.
    Batches of a larger one are decoded by threads some steps ahead.  Order and flips are the same on every device;
    dequantisation draws on the device, so its noise differs between CPU and GPU.

    Args:
        images: the ImageSet.
        batch_size: B.
        seed: of the order, the flips and the dequantisation.
        device: where batches go.
        random_flip: mirror each image with probability 1/2.
        uniform_dequantization: see `dequantize`.
        centered: range [-1, 1] instead of [0, 1].
        share: the slice of each batch that is made, as the whole batch would have it; B is then its length.

    Attributes:
        waited: seconds that were spent so far until the images of a batch were there.

    Raises:
        UserError: a batch larger than the data set, or below 1.
    """

    def __init__(
        self, images, batch_size, *, seed, device, random_flip, uniform_dequantization, centered, share=slice(None)
    ):
        if not 1 <= batch_size <= len(images):
            raise UserError(
                f"a batch of {batch_size} cannot be taken from the {counted(len(images), 'image')} of '{images.name}'; "
                f"choose a batch size from 1 to {len(images)}, as with --config.training.batch_size={len(images)}"
            )
        self.images, self.batch_size, self.seed, self.device = images, batch_size, seed, torch.device(device)
        self.share = share
        self.random_flip, self.uniform_dequantization, self.centered = random_flip, uniform_dequantization, centered
        self.batches_per_epoch = len(images) // batch_size
        self._orders = {}  # epoch -> its order, for the two epochs last asked for
        self._ahead = {}  # step -> futures of its images
        weakref.finalize(self, _cancel, self._ahead)  # or the interpreter would decode them before it exits
        self.waited = 0.0
        self._pixels = None
        if isinstance(images.store, InMemory):
            pixels = images.store.pixels
            self._pixels = pixels.to(self.device) if pixels.nbytes <= IN_MEMORY_BYTES else pixels

    def batch(self, step):
        """The batch of step 0, 1, 2, ...: (B, C, H, W) float32 on the device, in the model's range."""
        start = time.perf_counter()
        images = self._gather(step)  # (B, 1 or C, H, W) uint8
        self.waited += time.perf_counter() - start
        images = images.to(self.device, non_blocking=True)
        if self.random_flip:
            chances = torch.rand(self.batch_size, generator=noise.generator(self.seed, "flip", step))
            images = _mirror(images, chances[self.share] < 0.5)
        images = images.expand(-1, *self.images.shape)  # (B, C, H, W)
        if self.uniform_dequantization:
            generator = noise.generator(self.seed, "dequantize", step, device=self.device)
            images = dequantize(to_model_range(images, centered=False), generator, self.batch_size, self.share)
        return to_model_range(images, self.centered).contiguous()

    def _gather(self, step):
        if self._pixels is not None:
            return self._pixels.index_select(0, self._rows(step))
        wanted = range(step, step + _PREFETCHED_STEPS + 1)
        _cancel(self._ahead, wanted)
        for ahead in wanted:
            if ahead not in self._ahead:
                self._ahead[ahead] = self.images.store.submit(self._rows(ahead))
        return torch.stack([future.result() for future in self._ahead.pop(step)])

    def _rows(self, step):
        """(B,) int64: which images step `step` sees, on the device where they are gathered."""
        epoch, turn = divmod(step, self.batches_per_epoch)
        if epoch not in self._orders:
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]  # the oldest
            order = torch.randperm(len(self.images), generator=noise.generator(self.seed, "order", epoch))
            self._orders[epoch] = order if self._pixels is None else order.to(self._pixels.device)
        return self._orders[epoch][turn * self.batch_size : (turn + 1) * self.batch_size][self.share]


def _mirror(images, chosen):
    """Images (B, C, H, W), those where `chosen` (B,) bool on the CPU is set mirrored left to right."""
    rows = torch.arange(len(images)) + len(images) * chosen
    both = torch.cat([images, images.flip(-1)])  # (2B, C, H, W): whole rows are picked faster than pixels are
    return both.index_select(0, rows.to(images.device, non_blocking=True))


def _cancel(ahead, wanted=()):
    """Gives up the batches under way (step -> futures) of steps that are not wanted."""
    for step in [step for step in ahead if step not in wanted]:
        for future in ahead.pop(step):
            future.cancel()


def in_order(images, batch_size, device, centered):
    """Yields the images in order, (B, C, H, W) float32 on `device` in the model's range; the last batch may be smaller.

    Args:
        images: an ImageSet.
        batch_size: B.
        device: where batches go.
        centered: range [-1, 1] instead of [0, 1].
    """
    for start in range(0, len(images), batch_size):
        yield to_model_range(images.read(start, start + batch_size).to(device), centered)
