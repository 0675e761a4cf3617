"""Lifts images off their manifold by masking them and maps them back by inpainting.

    python recon.py --config configs/subvp/cifar10_ddpm_continuous.py \
        --ckpt_path results/cifar10/checkpoints/checkpoint_20.pth --in_domain CIFAR10 --out_of_domain SVHN \
        --batch_size 200 --mask_type checkerboard_alt --mask_num_blocks 8 --reps_per_image 10 \
        --workdir results/cifar10/CIFAR10_vs_SVHN/

Without --config the checkpoint's own is taken, where it carries one.

On several GPUs: torchrun --nproc_per_node=8 recon.py ...
"""

import contextlib
import dataclasses
import shlex
from pathlib import Path

from absl import flags

import command_line
import console
import distributed
from configs.base import check, typed
from configs.fields import SEED, check_value

_SOURCE = "a data set's name, a folder of images, a .txt list of image paths, or a .npz or .npy file of images"

# Flags that are fields of config.sampling, besides --sampler itself.
SAMPLER_FLAGS = "steps", "time_grid", "t_start", "t_end", "eta", "constraint", "returns", "lift"

FLAGS = flags.FLAGS

_TEXT_FLAGS = (
    "workdir", "ckpt_path", "in_domain", "out_of_domain", "data_root",
    "mask_file_path", "mask_save_dir", "mask_identifier",
)  # fmt: skip
_SAME_AS_CONFIG = {
    **{name: f"sampling.{name}" for name in ("sampler", *SAMPLER_FLAGS)},
    "seed": "seed",
    "device": "device",
}
_NEEDS = {  # a flag: the one without which it has no effect, and what to do
    "mask_save_dir": ("save_mask", "add it or leave both out"),
    "ood_center_crop": ("out_of_domain", "add it or leave both out"),
}
_MASK_FLAGS = {  # the mask types for which each does something
    "mask_num_blocks": ["checkerboard", "checkerboard_alt"],
    "mask_patch_size": ["random"],
    "mask_ratio": ["random"],
    "mask_file_path": ["file"],
}


def define_flags():
    """The command line; inside a function so that importing this module defines nothing."""
    command_line.define_config(
        "The config that the model was trained with, by default the checkpoint's own; values can be overridden: "
        "--config.sampling.steps=100.",
        command_line.value_of("ckpt_path"),
    )
    console.define_path("workdir", None, "Folder of the results: {workdir}/{mask}_reps{R}/.")
    console.define_path(
        "ckpt_path",
        None,
        "The checkpoint (.pth), EMA weights (.safetensors), a folder of diffusers', or a work folder of main.py, of "
        "which the newest checkpoint is taken.",
    )
    flags.DEFINE_integer(
        "reps_per_image", 1, "Reconstructions of each image; --sampler fast and best bring their own.", lower_bound=1
    )
    flags.DEFINE_integer("batch_size", 100, "Images per batch file.", lower_bound=1)
    flags.DEFINE_string("in_domain", None, f"The in-domain images: {_SOURCE}.")
    flags.DEFINE_string(
        "out_of_domain", None, f"The images in question: {_SOURCE}. Without it the in-domain side is made."
    )
    flags.DEFINE_bool("id_center_crop", True, "Crop in-domain files to their centre square; else squeeze them.")
    flags.DEFINE_bool("ood_center_crop", True, "Crop out-of-domain files to their centre square; else squeeze them.")
    flags.DEFINE_integer(
        "max_images", None, "Take so many images of each side, evenly spread, for a quick look.", lower_bound=1
    )
    flags.DEFINE_bool(
        "match_resolution",
        False,
        "Reduce both sides to the smallest native resolution of either first, so that blur cannot separate them.",
    )
    console.define_path("data_root", "./data", "Where data sets lie, or are downloaded to.")
    flags.DEFINE_integer(
        "workers", None, "Threads that decode images; by default one a processor, up to 32.", lower_bound=1
    )
    flags.DEFINE_integer("seed", None, "Key of the noise and the random masks; by default the config's.")
    flags.DEFINE_string("device", None, "auto, cpu, cuda or cuda:i; by default the config's.")
    flags.DEFINE_float(
        "memory_gb",
        None,
        "Memory for the network's activations, which limits how many images it sees at once; by default 0.5 on a CPU "
        "and 80 % of what is free on a GPU, where few images show first what one needs. The results are the same.",
        lower_bound=0.0,
    )
    _define_mask_flags()
    _define_sampler_flags()
    flags.mark_flags_as_required(["workdir", "ckpt_path", "in_domain"])


def _define_mask_flags():
    flags.DEFINE_string("mask_type", "center", "center, checkerboard, checkerboard_alt, random, none or file.")
    flags.DEFINE_bool("save_mask", False, "Write the masks as pictures (white = known); --mask_file_path reads them.")
    flags.DEFINE_integer("mask_num_blocks", 4, "Checkerboards: blocks an edge.")
    flags.DEFINE_integer("mask_patch_size", 4, "Random masks: pixels an edge of a patch.")
    flags.DEFINE_float("mask_ratio", 0.5, "Random masks: share of known patches.")
    console.define_path(
        "mask_file_path", None, "Your own mask: a picture (white = known) or array; implies mask_type file."
    )
    console.define_path("mask_save_dir", None, "Where --save_mask writes; by default masks/ in the results folder.")
    flags.DEFINE_string("mask_identifier", None, "A tag in the names of the results folder and the saved masks.")


def _define_sampler_flags():
    flags.DEFINE_string(
        "sampler",
        None,
        "published; fast or best, complete settings with few network evaluations (README); or a solver by itself: "
        "euler, ddim, dpmpp_2m, sde_dpmpp_2m. By default the config's.",
    )
    flags.DEFINE_integer("steps", None, "Steps of the sampler; by default the config's.", lower_bound=1)
    flags.DEFINE_string("time_grid", None, "Where the steps are: uniform, lambda (in ln(alpha / std)) or quadratic.")
    flags.DEFINE_float("t_start", None, "The time to start from, at most 1, which is pure noise.")
    flags.DEFINE_float("t_end", None, "The last time, at which the predicted image is returned.")
    flags.DEFINE_float("eta", None, "Sampler ddim: share of fresh noise, from 0 (deterministic) to 1 (ancestral).")
    flags.DEFINE_string("constraint", None, "Known pixels are held in the state (replace) or the prediction (project).")
    flags.DEFINE_integer("returns", None, "How often each step is taken back and repeated (RePaint).", lower_bound=0)
    flags.DEFINE_string(
        "lift", None, "What is taken from an image: mask (its unknown pixels), noise (up to t_start), or both."
    )
    flags.DEFINE_string(
        "precision",
        "auto",
        "fp32, tf32 (GPUs), bf16 (faster, about the same scores), or auto: bf16 on a GPU that has it, else fp32.",
    )
    flags.DEFINE_flag(compile_flag())


def compile_flag():
    """--compile, which takes a value and, as a switch would, none."""
    text = "auto, on or off: compile the network first, faster for long runs; auto does so for long runs on a GPU."
    return flags.Flag(CompileChoice(), flags.ArgumentSerializer(), "compile", "auto", text, boolean=True)


class CompileChoice(flags.ArgumentParser):
    """The values of --compile; the flag by itself stands for on, --nocompile for off."""

    syntactic_help = "auto, on or off"

    def parse(self, argument):
        """One of 'auto', 'on' and 'off'."""
        value = {"true": "on", "false": "off"}.get(argument.lower(), argument.lower())
        if value not in ("auto", "on", "off"):
            raise ValueError(f"choose one of: {self.syntactic_help}")
        return value

    def flag_type(self):
        """What --help calls it."""
        return "auto, on or off"


@dataclasses.dataclass(frozen=True)
class MaskOptions:
    """Which masks to make; see `masks.make_mask`."""

    mask_type: str = "center"
    num_blocks: int = 4
    patch_size: int = 4
    ratio: float = 0.5
    file_path: str | None = None
    identifier: str | None = None

    @property
    def name(self):
        """The stem of the results folder."""
        import masks

        values = self.mask_type, self.num_blocks, self.patch_size, self.ratio
        return masks.mask_name(*values, identifier=self.identifier, file_path=self.file_path)

    def stack(self, size, reps, *key):
        """The masks of all repetitions: (R, 1, S, S), 1 = known; `key` is what random masks are keyed by."""
        import torch

        import masks
        import noise

        file_mask = masks.load_mask_file(self.file_path, size) if self.file_path else None
        values = self.num_blocks, self.patch_size, self.ratio
        return torch.cat(
            [
                masks.make_mask(self.mask_type, size, rep, *values, noise.generator(*key, rep), file_mask)
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
        import torch

        import datasets
        import noise
        from models import memory

        batch, size, on_gpu = len(images), images.shape[-1], self.device.type == "cuda"
        masks = self.mask_options.stack(size, self.reps, self.seed, "mask", index)  # (R, 1, H, W)
        contents = noise.content_keys(images)  # (B,)
        if on_gpu:
            images = images.pin_memory()
        data = datasets.to_model_range(images.to(self.device, non_blocking=True), self.config.data.centered)
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
            raise console.UserError(
                f"the reconstructions of batch {index} are NaN or infinite: the model's weights or the "
                "sampling settings are broken; nothing was written for it"
            )
        orig = datasets.to_model_range(images, centered=False)
        return orig, masks, recon.view(self.reps, batch, *data.shape[1:])

    def learn_rows(self, images, memory_gb=None):
        """On a GPU: sets `rows` to what fits, from what few trajectories are seen to need in two steps.

        Args:
            images: the number in a batch.
            memory_gb: the largest budget, or None.

        Raises:
            UserError: not one fits.
        """
        import torch

        import noise
        from models import memory

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
            raise console.UserError(f"{self.device} has too little memory for this batch; lower --batch_size")

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
        import datasets
        import noise

        batch, device = len(data), self.device
        image, rep = (rows % batch).to(device), (rows // batch).to(device)
        source = noise.KeyedNoise(keys[rows], data.shape[1:], device)
        step = on_step and (lambda: on_step(len(rows)))
        filled = self.process(group=batch).inpaint(self.model, data[image], masks[rep], source, on_step=step)
        return datasets.to_data_range(filled, self.config.data.centered)

    def process(self, group=None):
        """The `sampling.Process` of the config; `group` is the number of images in the batch."""
        import sampling

        return sampling.create_process(self.config, self.model.sde, group)


def load_model(config, ckpt_path, device, precision="auto", compiled=False):
    """The score model of a checkpoint's EMA weights, in eval mode, and how many steps it was trained, 0 if unknown.

    Precision and `compiled` as in `models.inference.prepare`.

    Raises:
        UserError: see `storage.load_ema_weights`, `models.diffusers_weights.load` and `models.inference.prepare`.
    """
    import models
    import sde_lib
    import storage
    from configs.base import to_dict
    from models import diffusers_weights, inference
    from models.score import ScoreModel

    if Path(ckpt_path).is_dir():
        net, step = diffusers_weights.load(ckpt_path, config), 0
    else:
        net = models.create_model(config)
        step = storage.load_ema_weights(ckpt_path, net, to_dict(config))
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
    from models import memory

    memory.check_budget(memory_gb)
    if memory_gb is None:
        memory_gb = 0.5
    model, size = config.model, config.data.image_size
    levels = [4 * model.nf * m * (size // 2**i) ** 2 for i, m in enumerate(model.ch_mult)]  # bytes of one tensor each
    per_image = 2 * ((model.num_res_blocks + 1) * sum(levels) + 8 * max(levels))
    rows = int(memory_gb * 1e9 // per_image)
    if rows < 1 and device.type == "cpu":
        raise console.UserError(f"--memory_gb {memory_gb:g} is too little: one image needs about {per_image / 1e9:.3f}")
    return max(1, rows)


def claim_missing(folder, settings, entries, versions):
    """Makes the results folder this run's, takes over what neighbours have, and lists what is missing then.

    Args:
        folder: a `storage.ResultsFolder`.
        settings, entries, versions: as `storage.ResultsFolder.claim`.

    Returns:
        The batches to make, a list of (side, index).

    Raises:
        UserError: the folder holds batches of other settings.
    """
    folder.claim(settings, entries, versions)
    return [(side, index) for side in entries for index in _missing_of(folder, side, entries[side])]


def _missing_of(folder, side, entry):
    """The batches of a side to make; says what need not be made, and what is made again and why."""
    import storage

    lacking, name = folder.lacking(side), storage.SIDES[side]
    taken = folder.adopt(side, lacking)
    if taken:
        console.say(f"{name}: {len(taken)} batches taken over from an earlier run with the same settings")
    missing = [index for index in lacking if index not in taken]
    again = [f"batch_{i}.pth {lacking[i]}" for i in missing if lacking[i] != storage.MISSING]
    if again:
        more = f"; and {len(again) - 3} more" if len(again) > 3 else ""
        console.warn(f"{name}, made again: {'; '.join(again[:3])}{more}")
    if not missing:
        console.say(f"{name}: all {entry['images']} images of {entry['dataset']} are there already")
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
        folder: a `storage.ResultsFolder`.
        side: 'pos' or 'neg'.
        images: a `datasets.ImageSet`.
        reconstruct: a `Reconstructor`.
        batch_size: images per batch file.
        missing: the numbers of the batches to make.
        note: what to add to the label of the progress bar.
    """
    import storage

    spans = {i: (i * batch_size, min((i + 1) * batch_size, len(images))) for i in missing}
    trajectories = sum(stop - start for start, stop in spans.values()) * reconstruct.reps
    total = trajectories * reconstruct.process().steps
    label = f"{storage.SIDES[side]} {images.name}{note}"

    def write(index, orig, masks, recon):
        folder.write_batch(side, index, orig, [orig * mask for mask in masks], recon.unbind())

    bar = console.progress(total=total, unit="steps", unit_scale=True, desc=label)
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
        import concurrent.futures

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


def describe_settings(config, ckpt_path, mask_options, reps, seed, precision="fp32"):
    """What determines both sides' reconstructions, as JSON types: the manifest's `settings`.

    `precision` is what it came to (`models.inference.resolve`).  Compiling changes rounding alone, and is left out.
    """
    import files
    import noise
    from configs.base import to_dict
    from models import diffusers_weights

    tree = to_dict(config)
    weights = diffusers_weights.weights_path(ckpt_path) if Path(ckpt_path).is_dir() else ckpt_path
    mask = {name: value for name, value in dataclasses.asdict(mask_options).items() if name != "file_path"}
    if mask_options.file_path:
        mask["file_hash"] = files.file_hash(mask_options.file_path)
    return {
        "config": {
            "data": {name: tree["data"][name] for name in ("image_size", "num_channels", "centered")},
            "model": {name: value for name, value in tree["model"].items() if name not in ("dropout", "ema_rate")},
            "training": {name: tree["training"][name] for name in ("sde", "continuous")},
            "sampling": tree["sampling"],
        },
        "checkpoint": files.file_hash(weights),
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
    import torch
    from PIL import Image

    import files

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
    console.say(f"masks: {directory}")


def choose_sampler(options):
    """Writes what the flags say of the sampler into the config; returns the repetitions of each image.

    Args:
        options: `FLAGS`; a flag or field of the config given on the command line wins over a preset's value.
    """
    import sampling

    settings, reps = options.config.sampling, options.reps_per_image
    if options.sampler in sampling.PRESETS:
        values, preset_reps = sampling.preset(options.sampler, options.config)
        typed = options["config"].override_values
        settings.update({name: value for name, value in values.items() if f"sampling.{name}" not in typed})
        if not options["reps_per_image"].present:
            reps = preset_reps
    elif options.sampler is not None:
        choices = dict.fromkeys([sampling.PUBLISHED, *sampling.PRESETS, *sampling.SAMPLERS])
        console.choose(options.sampler, choices, "sampler (--sampler)")
        settings.sampler = options.sampler
    for name in SAMPLER_FLAGS:
        if options[name].value is not None:
            settings[name] = options[name].value
    return reps


def check_flags(options):
    """Refuses flags that were typed and would have no effect, by name.

    Args:
        options: `FLAGS`.

    Raises:
        UserError: a flag without a value, two that say the same, or one that goes with another that is not there.
    """
    for name in _TEXT_FLAGS:
        if options[name].value is not None and not options[name].value.strip():
            raise console.UserError(f"--{name} is empty; give it a value or leave it out")
    overridden = typed(options["config"])
    for name, field in _SAME_AS_CONFIG.items():
        if options[name].present and field in overridden:
            raise console.UserError(f"--{name} and --config.{field} say the same; leave one out")
    for name, (other, needed) in _NEEDS.items():
        if options[name].present and not options[other].value:
            raise console.UserError(f"--{name} goes with --{other}; {needed}")


def choose_mask_type(options):
    """The mask type that the flags come to.

    Args:
        options: `FLAGS`.

    Raises:
        UserError: a flag of masks was typed that has no effect with the others.
    """
    kind, typed = options.mask_type, [name for name in ("mask_type", *_MASK_FLAGS) if options[name].present]
    if (options.lift or options.config.sampling.lift) == "noise":  # then nothing is known
        if typed and [typed, kind] != [["mask_type"], "none"]:
            raise console.UserError(f"--{typed[0]} has no effect with --lift noise (no pixel is known); leave one out")
        return "none"
    if options.mask_file_path and kind != "file":
        if "mask_type" in typed:
            raise console.UserError(f"--mask_file_path goes with --mask_type file, not {kind}; leave one out")
        kind = "file"
    for name in typed:
        if kind not in _MASK_FLAGS.get(name, [kind]):
            kinds = " or ".join(_MASK_FLAGS[name])
            raise console.UserError(f"--{name} has no effect with --mask_type {kind}; leave it out, or choose {kinds}")
    return kind


def main(_):
    check(FLAGS.config)
    check_flags(FLAGS)
    mask_type = choose_mask_type(FLAGS)
    config, reps = FLAGS.config, choose_sampler(FLAGS)
    import sampling

    flags_given = {f"sampling.{name}" for name in SAMPLER_FLAGS if FLAGS[name].present}
    sampling.check_typed(config, typed(FLAGS["config"]) | flags_given)
    mask_options = MaskOptions(
        mask_type,
        FLAGS.mask_num_blocks,
        FLAGS.mask_patch_size,
        FLAGS.mask_ratio,
        FLAGS.mask_file_path,
        FLAGS.mask_identifier,
    )
    seed = config.seed if FLAGS.seed is None else FLAGS.seed
    check_value("--seed", seed, SEED)
    sources = {"pos": (FLAGS.in_domain, FLAGS.id_center_crop)}
    if FLAGS.out_of_domain:
        sources["neg"] = (FLAGS.out_of_domain, FLAGS.ood_center_crop)
    with distributed.start(FLAGS.device or config.device) as (ranks, device):
        if device.type == "cpu":
            console.keep_freed_memory()
        run(
            config,
            ckpt_path=FLAGS.ckpt_path,
            workdir=FLAGS.workdir,
            sources=sources,
            mask_options=mask_options,
            reps=reps,
            batch_size=FLAGS.batch_size,
            seed=seed,
            device=device,
            max_images=FLAGS.max_images,
            data_root=FLAGS.data_root,
            workers=FLAGS.workers,
            match_resolution=FLAGS.match_resolution,
            memory_gb=FLAGS.memory_gb,
            precision=FLAGS.precision,
            compiled=FLAGS.compile,
            mask_directory=(FLAGS.mask_save_dir or "") if FLAGS.save_mask else None,
            ranks=ranks,
        )


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
    import storage

    precision = _check_settings(config, mask_options, seed, precision, compiled, device)
    ckpt_path = storage.find_checkpoint(ckpt_path)
    path = Path(workdir) / f"{mask_options.name}_reps{reps}"
    rows = rows_within(memory_gb, config, device)
    model, step = load_model(config, ckpt_path, device, precision)
    options = {"data_root": data_root, "max_images": max_images, "workers": workers}
    sides = ranks.in_turn(lambda: load_sides(config, sources, match_resolution, **options))
    settings = describe_settings(config, ckpt_path, mask_options, reps, seed, precision)
    entries = {side: describe_side(images, batch_size, sources[side][1]) for side, images in sides.items()}
    ranks.check_same((settings, entries), "settings or images")
    folder = storage.ResultsFolder(path, {side: storage.made_from(settings, entries[side]) for side in sides})
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
    import files

    with contextlib.ExitStack() as owner:
        ranks.on_main(lambda: owner.enter_context(files.owned(path)))
        yield


def _tell_what_next(path, sides, reps):
    console.say(f"reconstructions: {path}")
    if "neg" in sides:
        command = ["python", "detect.py", "--result_path", str(path), "--reps", str(reps), "--metric", "MSE"]
        console.say(f"next: {shlex.join(command)}")


def get_ready(reconstruct, batches, sides, batch_size, memory_gb=None, compiled="auto"):
    """Finds how many trajectories fit, then compiles the network if it is worth it for what is to be made, and says so.

    Args:
        reconstruct: a `Reconstructor`, whose network is a `models.inference.Network` that is not compiled yet.
        batches: what is to be made, a list of (side, index).
        sides: side -> `datasets.ImageSet`.
        batch_size: images per batch file.
        memory_gb, compiled: as in `run`.
    """
    from models import inference

    if not batches:
        return
    reconstruct.learn_rows(batch_size, memory_gb)
    images = sum(min(batch_size, len(sides[side]) - index * batch_size) for side, index in batches)
    evaluations = images * reconstruct.reps * reconstruct.process().evaluations
    network, shape = reconstruct.model.net, next(iter(sides.values())).shape
    if inference.worth_compiling(compiled, network, evaluations, shape):
        console.say(f"compiling the network for {evaluations:,} evaluations; the first batch takes longer for it")
        network.compile(required=compiled == "on")


def _check_settings(config, mask_options, seed, precision, compiled, device):
    """Tells what cannot be before anything long is done or written; returns what the precision comes to."""
    import sampling
    import sde_lib
    from models import inference

    console.choose(compiled, inference.CHOICES, "choice (--compile)")
    mask_options.stack(config.data.image_size, 1, seed)
    sampling.create_process(config, sde_lib.create_sde(config))
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
    import storage

    if match_resolution and len(sources) < 2:
        raise console.UserError("--match_resolution needs two sides; add --out_of_domain or leave it out")
    sides = {side: _load_images(config, *source, **options) for side, source in sources.items()}
    if not match_resolution:
        return sides
    natives = {side: images.native for side, images in sides.items()}
    through = min(natives.values())
    smallest = ", ".join(f"{storage.SIDES[side]} {native}" for side, native in natives.items())
    if through >= config.data.image_size:
        console.say(f"--match_resolution: no image is enlarged (smallest: {smallest} pixels), so nothing is reduced")
        return sides
    console.say(f"--match_resolution: all images are reduced to {through} pixels first (smallest: {smallest})")
    del sides  # their memory is needed for the same images once more
    return {side: _load_images(config, *source, **options, through=through) for side, source in sources.items()}


def _load_images(config, source, center_crop, **options):
    import datasets

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
    import platform

    import numpy as np
    import torch

    return {
        "checkpoint_path": str(ckpt_path),
        "checkpoint_step": step,
        "device": str(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


if __name__ == "__main__":
    define_flags()
    console.run(main)
