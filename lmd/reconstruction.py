"""Lift and Map: images are masked and reconstructed by inpainting, batch by batch, into a results folder."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import platform
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import datasets
import masks
import models
import sde_lib
from basics import distributed, files, noise
from basics.console import UserError, choose, progress, say, shell, warn
from basics.pixels import to_data_range, to_model_range
from configs.base import to_dict
from lmd.process import create_process
from models import inference, memory
from models.score import ScoreModel
from storage import diffusers_weights
from storage.checkpoints import find_checkpoint, load_ema_weights
from storage.results_folder import MISSING, SIDES, ResultsFolder, made_from


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
    """The Lift and the Map of Lift, Map, Detect, for batches of images and all their repetitions at once.

    Args:
        config: the config tree.
        model: a `models.score.ScoreModel`.
        mask_options: a `MaskOptions`.
        reps: repetitions R.
        seed: key of the noise and the random masks.
        device: torch.device.
        rows: trajectories in the network at once; the results do not depend on it.
    """

    def __init__(self, config, model, mask_options, reps, seed, device, rows):
        self.config, self.model, self.mask_options = config, model, mask_options
        self.reps, self.seed, self.device, self.rows = reps, seed, device, rows

    def __call__(self, images, index, on_step=None):
        """Reconstructs one batch.

        Args:
            images: (B, C, H, W) uint8; their pixels key their noise.
            index: the batch's number, which keys random masks.
            on_step: called with the number of trajectories after each step.

        Returns:
            orig (B, C, H, W) in [0, 1], masks (R, 1, H, W), recon (R, B, C, H, W) in data range, all on the CPU.

        Raises:
            UserError: the reconstructions are not finite.
        """
        batch, size, on_gpu = len(images), images.shape[-1], self.device.type == "cuda"
        masks = self.mask_options.stack(size, self.reps, self.seed, "mask", index)  # (R, 1, H, W)
        contents = noise.content_keys(images)  # (B,)
        if on_gpu:
            images = images.pin_memory()
        data = to_model_range(images.to(self.device, non_blocking=True), self.config.data.centered)
        keys = noise.image_keys(self.seed, contents, range(self.reps))  # (R B,): all of rep 0, then of rep 1
        device_masks = masks.to(self.device)
        recon = torch.empty(self.reps * batch, *data.shape[1:], pin_memory=on_gpu)
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
        if not torch.isfinite(recon).all():
            raise UserError(
                f"the reconstructions of batch {index} are NaN or infinite: the model's weights or the "
                "sampling settings are broken; nothing was written for it"
            )
        orig = to_model_range(images, centered=False)
        return orig, masks, recon.view(self.reps, batch, *data.shape[1:])

    def learn_rows(self, images, memory_gb=None):
        """On a GPU: sets `rows` to what fits, from what few trajectories are seen to need in two steps.

        Args:
            images: the number in a batch.
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

        self.rows = memory.rows_that_fit(work, self.device, self.reps * images, memory_gb)

    def _halve_rows(self, batch, tried):
        """After memory ran out: go on with half as many trajectories at once as were tried."""
        self.rows = max(1, tried // 2)
        if self._rows_at_once(batch) >= tried:
            raise UserError(f"{self.device} has too little memory for this batch; lower --batch_size")

    def _rows_at_once(self, batch):
        """Trajectories per call; whole repetitions where Langevin's step size ties the images of a batch together."""
        if self.config.sampling.corrector.lower() != "langevin":
            return self.rows
        return max(1, self.rows // batch) * batch

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
        filled = self.process(group=batch).inpaint(self.model, data[image], masks[rep], source, on_step=step)
        return to_data_range(filled, self.config.data.centered)

    def process(self, group=None):
        """The `lmd.process.Process` of the config; `group` is the number of images in the batch."""
        return create_process(self.config, self.model.sde, group)


def load_model(config, ckpt_path, device, precision="auto", compiled=False):
    """The score model of a checkpoint's EMA weights, in eval mode, and how many steps it was trained, 0 if unknown.

    Precision and `compiled` as in `models.inference.prepare`.

    Raises:
        UserError: see `checkpoints.load_ema_weights`, `diffusers_weights.load` and `models.inference.prepare`.
    """
    if Path(ckpt_path).is_dir():
        net, step = diffusers_weights.load(ckpt_path, config), 0
    else:
        net = models.create_model(config)
        step = load_ema_weights(ckpt_path, net, to_dict(config))
    net = inference.prepare(net, device, precision, compiled)
    return ScoreModel(net, sde_lib.create_sde(config), config.training.continuous), step


def rows_within(memory_gb, config, device):
    """How many images the network may see at once, by an estimate; `Reconstructor.learn_rows` knows better on a GPU.

    An image's activations are estimated as twice the skip connections of its U-Net plus some tensors of the widest
    level, which is about what was measured.

    Args:
        memory_gb: the budget, or None for 0.5 GB.
        config: the config tree.
        device: torch.device; on a GPU the result is 1 at least.

    Raises:
        UserError: the budget does not hold one image, or is no number of gigabytes.
    """
    memory.check_budget(memory_gb)
    if memory_gb is None:
        memory_gb = 0.5
    model, size = config.model, config.data.image_size
    levels = [4 * model.nf * m * (size // 2**i) ** 2 for i, m in enumerate(model.ch_mult)]  # bytes of one tensor each
    per_image = 2 * ((model.num_res_blocks + 1) * sum(levels) + 8 * max(levels))
    rows = int(memory_gb * 1e9 // per_image)
    if rows < 1 and device.type == "cpu":
        raise UserError(f"--memory_gb {memory_gb:g} is too little: one image needs about {per_image / 1e9:.3f}")
    return max(1, rows)


def claim_missing(folder, settings, entries, versions):
    """Makes the results folder this run's, takes over what neighbours have, and lists what is missing then.

    Args:
        folder: a `results_folder.ResultsFolder`.
        settings, entries, versions: as `results_folder.ResultsFolder.claim`.

    Returns:
        The batches to make, a list of (side, index).

    Raises:
        UserError: the folder holds batches of other settings.
    """
    folder.claim(settings, entries, versions)
    return [(side, index) for side in entries for index in _missing_of(folder, side, entries[side])]


def _missing_of(folder, side, entry):
    """The batches of a side to make; says what need not be made, and what is made again and why."""
    lacking, name = folder.lacking(side), SIDES[side]
    taken = folder.adopt(side, lacking)
    if taken:
        say(f"{name}: {len(taken)} batches taken over from an earlier run with the same settings")
    missing = [index for index in lacking if index not in taken]
    again = [f"batch_{i}.pth {lacking[i]}" for i in missing if lacking[i] != MISSING]
    if again:
        more = f"; and {len(again) - 3} more" if len(again) > 3 else ""
        warn(f"{name}, made again: {'; '.join(again[:3])}{more}")
    if not missing:
        say(f"{name}: all {entry['images']} images of {entry['dataset']} are there already")
    return missing


def reconstruct_missing(folder, sides, reconstruct, batch_size, missing, ranks):
    """Reconstructs this rank's part of the missing batches, (side, index), and waits until all ranks have made theirs.

    The parts are taken in turns, over both sides together, so that they differ by one batch at most.
    """
    mine = missing[ranks.rank :: ranks.world_size]
    note = f", process 1 of {ranks.world_size}" if ranks.world_size > 1 else ""  # whose progress is shown
    for side, images in sides.items():
        indices = [index for where, index in mine if where == side]
        if indices:
            reconstruct_side(folder, side, images, reconstruct, batch_size, indices, note)
    ranks.wait()


def reconstruct_side(folder, side, images, reconstruct, batch_size, missing, note=""):
    """Reconstructs what is missing of one side.

    Args:
        folder: a `results_folder.ResultsFolder`.
        side: 'pos' or 'neg'.
        images: a `datasets.ImageSet`.
        reconstruct: a `Reconstructor`.
        batch_size: images per batch file.
        missing: the numbers of the batches to make.
        note: what to add to the label of the progress bar.
    """
    spans = {i: (i * batch_size, min((i + 1) * batch_size, len(images))) for i in missing}
    trajectories = sum(stop - start for start, stop in spans.values()) * reconstruct.reps
    total = trajectories * reconstruct.process().steps
    label = f"{SIDES[side]} {images.name}{note}"

    def write(index, orig, masks, recon):
        folder.write_batch(side, index, orig, [orig * mask for mask in masks], recon.unbind())

    bar = progress(total=total, unit="steps", unit_scale=True, desc=label)
    with bar, Background() as reader, Background() as writer:
        pending = reader.submit(images.read, *spans[missing[0]])
        for index, following in zip(missing, [*missing[1:], None], strict=True):
            pixels = pending.result()
            if following is not None:
                pending = reader.submit(images.read, *spans[following])
            writer.submit(write, index, *reconstruct(pixels, index, bar.update))


class Background:
    """A thread that does one thing at a time; the first failure ends the block.

    `submit` waits for what was submitted before, so at most one result waits in memory; leaving the block waits for
    the last.
    """

    def __init__(self):

        self._pool, self._last = concurrent.futures.ThreadPoolExecutor(max_workers=1), None

    def submit(self, work, *arguments):
        """The future of work(*arguments); raises what the work before it raised."""
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(work, *arguments)
        return self._last

    def __enter__(self):
        return self

    def __exit__(self, kind, *rest):
        self._pool.shutdown(wait=True)
        if kind is None and self._last is not None:
            self._last.result()


def batches_of(images, batch_size):
    """The number of batch files of an image set."""
    return -(-len(images) // batch_size)


def weights_path(ckpt_path):
    """The file of a checkpoint's weights: itself, or that in a folder of diffusers'."""
    return diffusers_weights.weights_path(ckpt_path) if Path(ckpt_path).is_dir() else ckpt_path


def describe_settings(config, checkpoint, mask_options, reps, seed, precision="fp32"):
    """What determines both sides' reconstructions, as JSON types: the manifest's `settings`.

    `checkpoint` is the hash of the weights' file, `precision` what it came to (`models.inference.resolve`).  Compiling
    changes rounding alone, and is left out.
    """
    tree = to_dict(config)
    described = "mask_type", "num_blocks", "patch_size", "ratio", "identifier"
    mask = {name: getattr(mask_options, name) for name in described}
    if mask_options.file_mask is not None:
        mask["content"] = hashlib.sha256(mask_options.file_mask.numpy().tobytes()).hexdigest()
    return {
        "config": {
            "data": {name: tree["data"][name] for name in ("image_size", "num_channels", "centered")},
            "model": {name: value for name, value in tree["model"].items() if name not in ("dropout", "ema_rate")},
            "training": {name: tree["training"][name] for name in ("sde", "continuous")},
            "sampling": tree["sampling"],
        },
        "checkpoint": checkpoint,
        "mask": mask,
        "reps_per_image": reps,
        "seed": seed,
        "noise": noise.SCHEME,
        "precision": precision,
    }


def describe_side(images, batch_size, center_crop):
    """An entry of the manifest's `sides`, JSON types: what determines the side's batches, and its images' names.

    The names (`dataset`, `skipped`, `labels`) determine nothing: a renamed folder continues.
    """
    return {
        "dataset": images.name,
        "fingerprint": images.fingerprint,
        "treatment": images.treatment,
        "center_crop": center_crop,
        "images": len(images),
        "match_resolution": images.through,
        "batch_size": batch_size,
        "batches": batches_of(images, batch_size),
        "skipped": [[str(path), reason] for path, reason in images.skipped],
        "labels": images.labels,
    }


def save_masks(directory, mask_options, config, reps, seed, entries):
    """Writes the masks as PNG, white = known: one a repetition, or one a batch and repetition for random masks.

    Args:
        directory: where; it is marked, so that it is not read as images.
        mask_options: a `MaskOptions`.
        config: the config tree, of which the images' size is read.
        reps, seed: as in `Reconstructor`.
        entries: the manifest's entries of the sides, which have the numbers of batches.
    """
    if mask_options.mask_type == "random":
        stacks = {
            f"{side}_batch{i}_": (seed, "mask", i) for side, entry in entries.items() for i in range(entry["batches"])
        }
    else:
        stacks = {"": (seed,)}
    directory = Path(directory)
    files.mark(directory)
    for prefix, key in stacks.items():
        for rep, mask in enumerate(mask_options.stack(config.data.image_size, reps, *key)):
            picture = Image.fromarray((mask[0] * 255).to(torch.uint8).numpy())
            files.write_png(directory / f"{mask_options.name}_{prefix}rep{rep}.png", picture)
    say(f"masks: {directory}")


def run(
    config,
    *,
    ckpt_path,
    workdir,
    sources,
    mask_options,
    reps,
    batch_size,
    seed,
    device,
    max_images=None,
    data_root="./data",
    workers=None,
    match_resolution=False,
    memory_gb=None,
    precision="auto",
    compiled="auto",
    mask_directory=None,
    ranks=distributed.ALONE,
):
    """Reconstructs both sides into `{workdir}/{mask}_reps{R}`, whose path it returns; goes on where a run stopped.

    Args:
        config: the config tree; ranks: the processes that share the batches, all of which call this.
        sources: side ('pos', 'neg') -> (source of images, whether to crop them); mask_options: a `MaskOptions`.
        mask_directory: where to write masks; "" for masks/ in the results folder, None for nowhere.
        ckpt_path, workdir, reps, batch_size, seed, max_images, data_root, workers, match_resolution, memory_gb,
            precision, compiled (--compile): as the flags; device: torch.device.

    Raises:
        UserError: for bad input, or while another run writes there; what was written before stays.
    """
    mask_options = mask_options.loaded(config.data.image_size)
    precision = _check_settings(config, mask_options, seed, precision, compiled, device)
    ckpt_path = find_checkpoint(ckpt_path)
    path = Path(workdir) / f"{mask_options.name}_reps{reps}"
    rows = rows_within(memory_gb, config, device)
    with files.unchanged(weights_path(ckpt_path)) as checkpoint:
        model, step = load_model(config, ckpt_path, device, precision)
    options = {"data_root": data_root, "max_images": max_images, "workers": workers}
    sides = ranks.in_turn(lambda: load_sides(config, sources, match_resolution, **options))
    settings = describe_settings(config, checkpoint, mask_options, reps, seed, precision)
    entries = {side: describe_side(images, batch_size, sources[side][1]) for side, images in sides.items()}
    ranks.check_same((settings, entries), "settings or images")
    folder = ResultsFolder(path, {side: made_from(settings, entries[side]) for side in sides})
    versions = _versions(ckpt_path, step, device)
    with _owned(path, ranks):
        missing = ranks.on_main(lambda: claim_missing(folder, settings, entries, versions))
        if mask_directory is not None:
            masks = mask_directory or path / "masks"
            ranks.on_main(lambda: save_masks(masks, mask_options, config, reps, seed, entries))
        reconstruct = Reconstructor(config, model, mask_options, reps, seed, device, rows)
        get_ready(reconstruct, missing[ranks.rank :: ranks.world_size], sides, batch_size, memory_gb, compiled)
        reconstruct_missing(folder, sides, reconstruct, batch_size, missing, ranks)
    _tell_what_next(path, sides, reps)
    return path


@contextlib.contextmanager
def _owned(path, ranks):
    """Within it rank 0 owns the results folder for all ranks, which leave it together, see `reconstruct_missing`."""
    with contextlib.ExitStack() as owner:
        ranks.on_main(lambda: owner.enter_context(files.owned(path)))
        yield


def _tell_what_next(path, sides, reps):
    say(f"reconstructions: {path}")
    if "neg" in sides:
        command = shell("python", "detect.py", "--result_path", path, "--reps", reps, "--metric", "MSE")
        say(f"next: {command}")


def get_ready(reconstruct, batches, sides, batch_size, memory_gb=None, compiled="auto"):
    """Finds how many trajectories fit, then compiles the network if it is worth it for what is to be made, and says so.

    Args:
        reconstruct: a `Reconstructor`, whose network is a `models.inference.Network` that is not compiled yet.
        batches: what is to be made, a list of (side, index).
        sides: side -> `datasets.ImageSet`.
        batch_size: images per batch file.
        memory_gb, compiled: as in `run`.
    """
    if not batches:
        return
    reconstruct.learn_rows(batch_size, memory_gb)
    images = sum(min(batch_size, len(sides[side]) - index * batch_size) for side, index in batches)
    evaluations = images * reconstruct.reps * reconstruct.process().evaluations
    network, shape = reconstruct.model.net, next(iter(sides.values())).shape
    if inference.worth_compiling(compiled, network, evaluations, shape):
        say(f"compiling the network for {evaluations:,} evaluations; the first batch takes longer for it")
        network.compile(required=compiled == "on")


def _check_settings(config, mask_options, seed, precision, compiled, device):
    """Tells what cannot be before anything long is done or written; returns what the precision comes to."""
    choose(compiled, inference.CHOICES, "choice (--compile)")
    mask_options.stack(config.data.image_size, 1, seed)
    create_process(config, sde_lib.create_sde(config))
    return inference.resolve(precision, device)


def load_sides(config, sources, match_resolution, **options):
    """The images of both sides.

    With `match_resolution` every image of either side is first reduced to R x R pixels and then enlarged to the model's
    size in the same way, R being the smallest native height or width of any image of either side, if that is less than
    the model's size.  So no image is enlarged on its way to R, and none is sharper than another for its source's
    resolution alone (arXiv 2405.11881, section 5.3).

    Args:
        config: the config tree.
        sources: side ('pos', 'neg') -> (source of images, whether to crop them).
        match_resolution: whether to do so.
        options: further arguments of `datasets.load`.

    Returns:
        dict: side -> `datasets.ImageSet`.

    Raises:
        UserError: there is one side alone to match, or as `datasets.load`.
    """
    if match_resolution and len(sources) < 2:
        raise UserError("--match_resolution needs two sides; add --out_of_domain or leave it out")
    sides = {side: _load_images(config, *source, **options) for side, source in sources.items()}
    if not match_resolution:
        return sides
    natives = {side: images.native for side, images in sides.items()}
    through = min(natives.values())
    smallest = ", ".join(f"{SIDES[side]} {native}" for side, native in natives.items())
    if through >= config.data.image_size:
        say(f"--match_resolution: no image is enlarged (smallest: {smallest} pixels), so nothing is reduced")
        return sides
    say(f"--match_resolution: all images are reduced to {through} pixels first (smallest: {smallest})")
    del sides  # their memory is needed for the same images once more
    return {side: _load_images(config, *source, **options, through=through) for side, source in sources.items()}


def _load_images(config, source, center_crop, **options):

    data = config.data
    return datasets.load(
        source,
        split="test",
        image_size=data.image_size,
        num_channels=data.num_channels,
        category=data.get("category"),
        center_crop=center_crop,
        **options,
    )


def _versions(ckpt_path, step, device):

    return {
        "checkpoint_path": str(ckpt_path),
        "checkpoint_step": step,
        "device": str(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
