"""Lift and Map for two sets of images: masked and reconstructed, batch by batch, into a results folder."""

import dataclasses
import functools
import hashlib
import platform
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import datasets
import sde_lib
from basics import distributed, files, noise
from basics.background import Background
from basics.console import UserError, are, choose, counted, progress, say, shell, warn
from basics.pixels import to_model_range
from configs.base import to_dict
from lmd.process import create_process
from lmd.reconstructor import MaskOptions, Reconstructor
from lmd.trained_model import load_model, rows_within, weights_path
from models import inference
from storage.checkpoints import find_checkpoint
from storage.results_folder import MISSING, SIDES, ResultsFolder, made_from


@dataclasses.dataclass(frozen=True)
class Job:
    """What to reconstruct, with what, and where to: what recon.py's flags say, under their names where there is one.

    Attributes:
        config: the config tree.
        ckpt_path: the checkpoint, or what `checkpoints.find_checkpoint` finds one in.
        workdir: the results go to `path`, in it.
        sources: side ('pos', 'neg') -> (source of images, whether to crop them).
        mask_options: a `MaskOptions`.
        reps: reconstructions of each image.
        batch_size: images per batch file.
        seed: key of the noise and the random masks.
        max_images, data_root, workers: as in `datasets.load`.
        match_resolution: see `load_sides`.
        memory_gb: see `rows_within`.
        precision, compiled: see `models.inference`; `compiled` is --compile.
        mask_directory: where to write masks; "" for masks/ in the results folder, None for nowhere.
    """

    config: object
    ckpt_path: str | Path
    workdir: str | Path
    sources: dict
    mask_options: MaskOptions
    reps: int = 1
    batch_size: int = 100
    seed: int = 0
    max_images: int | None = None
    data_root: str | Path = "./data"
    workers: int | None = None
    match_resolution: bool = False
    memory_gb: float | None = None
    precision: str = "auto"
    compiled: str = "auto"
    mask_directory: str | None = None

    @property
    def path(self):
        """The results folder."""
        return Path(self.workdir) / f"{self.mask_options.name}_reps{self.reps}"

    def masks(self, index):
        """The masks of a batch (R, 1, S, S), 1 = known; `index` is its number, which keys random masks."""
        return self.mask_options.stack(self.config.data.image_size, self.reps, self.seed, "mask", index)


def run(job, device, ranks=distributed.ALONE):
    """Reconstructs both sides into `job.path`, which it returns; goes on where a run stopped.

    Args:
        job: a `Job`.
        device: torch.device.
        ranks: the processes that share the batches, all of which call this.

    Raises:
        UserError: for bad input, or while another run writes there; what was written before stays.
    """
    job = dataclasses.replace(job, mask_options=job.mask_options.loaded(job.config.data.image_size))
    precision = _check(job, device)
    ckpt_path = find_checkpoint(job.ckpt_path)
    rows = rows_within(job.memory_gb, job.config, device)
    with files.unchanged(weights_path(ckpt_path)) as checkpoint:
        model, step = load_model(job.config, ckpt_path, device, precision)
    sides = ranks.in_turn(lambda: load_sides(job))
    settings = describe_settings(job, checkpoint, precision)
    entries = {side: describe_side(images, job.batch_size, job.sources[side][1]) for side, images in sides.items()}
    ranks.check_same((settings, entries), "settings or images")
    folder = ResultsFolder(job.path, {side: made_from(settings, entries[side]) for side in sides})
    versions = _versions(ckpt_path, step, device)
    with ranks.owned(job.path):
        missing = ranks.on_main(lambda: claim_missing(folder, settings, entries, versions))
        if job.mask_directory is not None:
            ranks.on_main(lambda: save_masks(job, entries))
        reconstruct = Reconstructor(job.config, model, device, rows, "lower --batch_size")
        get_ready(job, reconstruct, sides, missing[ranks.rank :: ranks.world_size])
        reconstruct_missing(job, folder, sides, reconstruct, missing, ranks)
    _tell_what_next(job, sides)
    return job.path


def _check(job, device):
    """Tells what cannot be before anything long is done or written; returns what the precision comes to."""
    choose(job.compiled, inference.CHOICES, "choice (--compile)")
    job.mask_options.stack(job.config.data.image_size, 1, job.seed)
    create_process(job.config, sde_lib.create_sde(job.config))
    return inference.resolve(job.precision, device)


_METRICS = "MSE,SSIM"  # they need no weights; which of them detects better depends on the images and the sampler


def _tell_what_next(job, sides):
    say(f"reconstructions: {job.path}")
    if "neg" in sides:
        command = shell("python", "detect.py", "--result_path", job.path, "--reps", job.reps, "--metric", _METRICS)
        say(f"next: {command}")


def get_ready(job, reconstruct, sides, batches):
    """Finds how many trajectories fit, then compiles the network if it is worth it for what is to be made, and says so.

    Args:
        job: a `Job`.
        reconstruct: a `Reconstructor`, whose network is a `models.inference.Network` that is not compiled yet.
        sides: side -> `ImageSet`.
        batches: what is to be made, a list of (side, index).
    """
    if not batches:
        return
    reconstruct.learn_rows(job.batch_size * job.reps, job.memory_gb)
    images = sum(min(job.batch_size, len(sides[side]) - index * job.batch_size) for side, index in batches)
    evaluations = images * job.reps * reconstruct.process().evaluations
    reconstruct.model.net.compile_if_worth(job.compiled, evaluations, next(iter(sides.values())).shape)


# ------------------------------------------------------------------------------------------------- batch by batch


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
    taken = set(folder.adopt(side, lacking))
    if taken:
        say(f"{name}: {counted(len(taken), 'batch')} taken over from an earlier run with the same settings")
    missing = [index for index in lacking if index not in taken]
    again = [f"batch_{i}.pth {lacking[i]}" for i in missing if lacking[i] != MISSING]
    if again:
        more = f"; and {len(again) - 3} more" if len(again) > 3 else ""
        warn(f"{name}, made again: {'; '.join(again[:3])}{more}")
    if not missing:
        those = "the image" if (count := entry["images"]) == 1 else f"all {count:,} images"
        say(f"{name}: {those} of {entry['dataset']} {are(count)} there already")
    return missing


def reconstruct_missing(job, folder, sides, reconstruct, missing, ranks):
    """Reconstructs this rank's part of the missing batches, (side, index), and waits until all ranks have made theirs.

    The parts are taken in turns, over both sides together, so that they differ by one batch at most.
    """
    mine = missing[ranks.rank :: ranks.world_size]
    note = f", process 1 of {ranks.world_size}" if ranks.world_size > 1 else ""  # whose progress is shown
    for side, images in sides.items():
        indices = [index for where, index in mine if where == side]
        if indices:
            label = f"{SIDES[side]} {images.name}{note}"
            write = functools.partial(folder.write_batch, side)
            reconstruct_side(job, images, reconstruct, indices, write, label)
    ranks.wait()


def reconstruct_side(job, images, reconstruct, missing, write, label):
    """Reconstructs what is missing of one side.

    Args:
        job: a `Job`.
        images: a `ImageSet`.
        reconstruct: a `Reconstructor`.
        missing: the numbers of the batches to make.
        write: called as `ResultsFolder.write_batch` without the side, in another thread.
        label: of the progress bar.
    """
    spans = {i: (i * job.batch_size, min((i + 1) * job.batch_size, len(images))) for i in missing}
    trajectories = sum(stop - start for start, stop in spans.values()) * job.reps
    total = trajectories * reconstruct.process().steps
    bar = progress(total=total, unit="steps", unit_scale=True, desc=label)
    with bar, Background() as reader, Background() as writer:
        pending = reader.submit(images.read, *spans[missing[0]])
        for index, following in zip(missing, [*missing[1:], None], strict=True):
            pixels = pending.result()
            if following is not None:
                pending = reader.submit(images.read, *spans[following])
            writer.submit(write, index, *_reconstruct_batch(job, reconstruct, pixels, index, bar.update))


def _reconstruct_batch(job, reconstruct, pixels, index, on_step):
    """What a batch file holds of images (B, C, H, W) uint8.

    Returns:
        orig (B, C, H, W) in [0, 1], and the masked images and the reconstructions, lists of R such.

    Raises:
        UserError: the reconstructions are not finite.
    """
    keys, masks = noise.seed_keys(job.seed, noise.content_keys(pixels)), job.masks(index)
    recon = reconstruct(pixels, keys, masks, on_step)  # (R, B, C, H, W)
    if not torch.isfinite(recon).all():
        raise UserError(
            f"the reconstructions of batch {index} are NaN or infinite: the model's weights or the "
            "sampling settings are broken; nothing was written for it"
        )
    orig = to_model_range(pixels, centered=False)
    return orig, [orig * mask for mask in masks], recon.unbind()


def batches_of(images, batch_size):
    """The number of batch files of an image set."""
    return -(-len(images) // batch_size)


# ------------------------------------------------------------------------------------------ images and manifest


def load_sides(job):
    """The images of both sides.

    With `match_resolution` every image of either side is first reduced to R x R pixels and then enlarged to the model's
    size in the same way, R being the smallest height or width of any image of either side, if that is less than
    the model's size.  So no image is enlarged on its way to R, and none is sharper than another for its source's
    resolution alone (arXiv 2405.11881, section 5.3).

    Args:
        job: a `Job`.

    Returns:
        dict: side -> `ImageSet`.

    Raises:
        UserError: there is one side alone to match, or as `datasets.load`.
    """
    if job.match_resolution and len(job.sources) < 2:
        raise UserError("--match_resolution needs two sides; add --out_of_domain or leave it out")
    sides = {side: _load_images(job, *source) for side, source in job.sources.items()}
    if not job.match_resolution:
        return sides
    sizes = {side: images.source_size for side, images in sides.items()}
    edge = min(sizes.values())
    smallest = ", ".join(f"{SIDES[side]} {size}" for side, size in sizes.items())
    if edge >= job.config.data.image_size:
        say(f"--match_resolution: no image is enlarged (smallest: {smallest} pixels), so nothing is reduced")
        return sides
    say(f"--match_resolution: all images are reduced to {edge} pixels first (smallest: {smallest})")
    del sides  # their memory is needed for the same images once more
    return {side: _load_images(job, *source, reduced_to=edge) for side, source in job.sources.items()}


def _load_images(job, source, center_crop, **options):
    data = job.config.data
    return datasets.load(
        source,
        split="test",
        image_size=data.image_size,
        num_channels=data.num_channels,
        category=data.get("category"),
        center_crop=center_crop,
        max_images=job.max_images,
        data_root=job.data_root,
        workers=job.workers,
        **options,
    )


def describe_settings(job, checkpoint, precision="fp32"):
    """What determines both sides' reconstructions, as JSON types: the manifest's `settings`.

    `checkpoint` is the hash of the weights' file, `precision` what it came to (`models.inference.resolve`).  Compiling
    changes rounding alone, and is left out.
    """
    tree, mask_options = to_dict(job.config), job.mask_options
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
        "reps_per_image": job.reps,
        "seed": job.seed,
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
        "match_resolution": images.reduced_to,
        "batch_size": batch_size,
        "batches": batches_of(images, batch_size),
        "skipped": [[str(path), reason] for path, reason in images.skipped],
        "labels": images.labels,
    }


def _versions(ckpt_path, step, device):
    return {
        "checkpoint_path": str(ckpt_path),
        "checkpoint_step": step,
        "device": str(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def save_masks(job, entries):
    """Writes the masks as PNG, white = known: one a repetition, or one a batch and repetition for random masks.

    Args:
        job: a `Job`, whose `mask_directory` says where; it is marked, so that it is not read as images.
        entries: the manifest's entries of the sides, which have the numbers of batches.
    """
    stacks = {"": 0}  # what a picture's name says of the batch, and the batch
    if job.mask_options.mask_type == "random":
        stacks = {f"{side}_batch{i}_": i for side, entry in entries.items() for i in range(entry["batches"])}
    directory = Path(job.mask_directory or job.path / "masks")
    files.mark(directory)
    for prefix, index in stacks.items():
        for rep, mask in enumerate(job.masks(index)):
            picture = Image.fromarray((mask[0] * 255).to(torch.uint8).numpy())
            files.write_png(directory / f"{job.mask_options.name}_{prefix}rep{rep}.png", picture)
    say(f"masks: {directory}")
