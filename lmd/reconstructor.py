"""The Lift and the Map: images are masked and reconstructed by inpainting, all repetitions of a batch at once."""

import dataclasses

import torch

import masks
from basics import noise
from basics.console import UserError
from basics.pixels import to_data_range, to_model_range
from lmd.process import create_process
from models import memory


@dataclasses.dataclass(frozen=True)
class MaskOptions:
    """Which masks to make; see `masks.make_mask`."""

    mask_type: str = "center"
    num_blocks: int = 4
    patch_size: int = 4
    ratio: float = 0.5
    file_path: str | None = None
    identifier: str | None = None
    file_mask: torch.Tensor | None = dataclasses.field(default=None, compare=False, repr=False)

    def loaded(self, size):
        """The same with `file_mask` (1, 1, S, S), what the file holds now: it is read once for a run."""
        if not self.file_path:
            return self
        return dataclasses.replace(self, file_mask=masks.load_mask_file(self.file_path, size))

    @property
    def name(self):
        """The stem of the results folder."""
        values = self.mask_type, self.num_blocks, self.patch_size, self.ratio
        return masks.mask_name(*values, identifier=self.identifier, file_path=self.file_path)

    def stack(self, size, reps, *key):
        """The masks of all repetitions: (R, 1, S, S), 1 = known; `key` is what random masks are keyed by."""
        values = self.num_blocks, self.patch_size, self.ratio
        return torch.cat(
            [
                masks.make_mask(self.mask_type, size, rep, *values, noise.generator(*key, rep), self.file_mask)
                for rep in range(reps)
            ]
        )


class Reconstructor:
    """Reconstructs batches of images, as many trajectories at once as memory holds.

    Args:
        config: the config tree, of which `data` and `sampling` are read.
        model: a `models.score.ScoreModel`.
        device: torch.device.
        rows: trajectories in the network at once; the results do not depend on it.
        remedy: what the user can do where memory is too little even for the fewest.
        shared_step: whether the images of a batch share Langevin's step size, as published; else each has its own.
    """

    def __init__(self, config, model, device, rows, remedy="choose another --device", shared_step=True):
        self.config, self.model, self.device, self.rows, self.remedy = config, model, device, rows, remedy
        self.shared_step = shared_step and config.sampling.corrector.lower() == "langevin"

    def __call__(self, images, keys, masks, on_step=None):
        """Reconstructs one batch, once for each mask.

        Args:
            images: (B, C, H, W) uint8.
            keys: (B,) int64, of the images' noise (`noise.seed_keys`); each repetition's follow from them.
            masks: (R, 1, H, W), 1 = known.
            on_step: called with the number of trajectories after each step.

        Returns:
            (R, B, C, H, W) in data range, on the CPU; not finite where the model is broken.
        """
        batch, on_gpu = len(images), self.device.type == "cuda"
        if on_gpu:
            images = images.pin_memory()
        data = to_model_range(images.to(self.device, non_blocking=True), self.config.data.centered)
        keys = noise.repetition_keys(keys, range(len(masks)))  # (R B,): all of rep 0, then of rep 1
        device_masks = masks.to(self.device)
        recon = torch.empty(len(keys), *data.shape[1:], pin_memory=on_gpu)
        done = 0
        while done < len(recon):
            rows = torch.arange(done, min(done + self._rows_at_once(batch), len(recon)))
            filled = memory.attempt(self._inpaint, data, device_masks, keys, rows, on_step)
            if filled is None:
                self._halve_rows(batch, len(rows))
                continue
            done += len(rows)
            recon[rows[0] : done].copy_(filled, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize(self.device)  # the copies have arrived
        return recon.view(len(masks), batch, *data.shape[1:])

    def learn_rows(self, trajectories, memory_gb=None):
        """On a GPU: sets `rows` to what fits, from what few trajectories are seen to need in two steps.

        Args:
            trajectories: how many are wanted at once at most.
            memory_gb: the largest budget, or None.

        Raises:
            UserError: not one fits.
        """
        if self.device.type != "cuda":
            return
        data = self.config.data
        shape, mask = (data.num_channels, data.image_size, data.image_size), (data.image_size, data.image_size)

        def work(rows):
            process = self.process()
            process = dataclasses.replace(process, times=process.times[:2])
            source = noise.KeyedNoise(torch.arange(rows), shape, self.device)
            ones = torch.ones(rows, 1, *mask, device=self.device)
            process.inpaint(self.model, torch.zeros(rows, *shape, device=self.device), ones, source)

        self.rows = memory.rows_that_fit(work, self.device, trajectories, memory_gb)

    def _halve_rows(self, batch, tried):
        """After memory ran out: go on with half as many trajectories at once as were tried."""
        self.rows = max(1, tried // 2)
        if self._rows_at_once(batch) >= tried:
            raise UserError(f"{self.device} has too little memory for this batch; {self.remedy}")

    def _rows_at_once(self, batch):
        """Trajectories per call; whole repetitions where Langevin's step size ties the images of a batch together."""
        return max(1, self.rows // batch) * batch if self.shared_step else self.rows

    def _inpaint(self, data, masks, keys, rows, on_step):
        """Some trajectories of a batch.

        Args:
            data: (B, C, H, W) in the model's range.
            masks: (R, 1, H, W).
            keys: (R B,), of the noise.
            rows: (n,) of the R B trajectories, on the CPU.
            on_step: called with n after each step, or None.

        Returns:
            (n, C, H, W) in data range.
        """
        batch, device = len(data), self.device
        image, rep = (rows % batch).to(device), (rows // batch).to(device)
        source = noise.KeyedNoise(keys[rows], data.shape[1:], device)
        step = on_step and (lambda: on_step(len(rows)))
        group = batch if self.shared_step else 1
        filled = self.process(group).inpaint(self.model, data[image], masks[rep], source, on_step=step)
        return to_data_range(filled, self.config.data.centered)

    def process(self, group=None):
        """The `process.Process` of the config; `group` is the number of images that share Langevin's step size."""
        return create_process(self.config, self.model.sde, group)
