r"""Lifts images off their manifold by masking them and maps them back by inpainting.

    python recon.py --config configs/subvp/cifar10_ddpm_continuous.py \
        --ckpt_path results/cifar10/checkpoints/checkpoint_20.pth --in_domain CIFAR10 --out_of_domain SVHN \
        --batch_size 200 --mask_type checkerboard_alt --mask_num_blocks 8 --reps_per_image 10 \
        --workdir results/cifar10/CIFAR10_vs_SVHN/

Without --config the checkpoint's own is taken, where it carries one.

On several GPUs: torchrun --nproc_per_node=8 recon.py ...
"""

from absl import flags

from basics import distributed, machine
from basics.console import UserError, choose
from command_line import define_config, define_path, define_shared, run, value_of
from configs.base import check, typed
from configs.fields import BATCH_SIZE, FIELDS, SEED, check_value

_SOURCE = "a data set's name, a folder of images, a .txt list of image paths, or a .npz or .npy file of images"

FLAGS = flags.FLAGS

_SAME_AS_CONFIG = {"sampler": "sampling.sampler", "steps": "sampling.steps", "seed": "seed", "device": "device"}

REMOVED = {  # flags of earlier versions -> what to write instead
    name: f"--config.sampling.{name}"
    for name in ("time_grid", "t_start", "t_end", "eta", "constraint", "returns", "lift")
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


# Flags that are fields of a `reconstruction.Job` as they are.
_JOB_FLAGS = "batch_size", "max_images", "data_root", "workers", "match_resolution", "memory_gb", "precision"


def define_flags():
    """The command line; inside a function so that importing this module defines nothing."""
    define_config(
        "The config that the model was trained with, by default the checkpoint's own; values can be overridden: "
        "--config.sampling.steps=100.",
        value_of("ckpt_path"),
        needed=False,
    )
    define_path("workdir", None, "Folder of the results: {workdir}/{mask}_reps{R}/.")
    define_path(
        "ckpt_path",
        None,
        "The checkpoint (.pth), EMA weights (.safetensors), a folder of diffusers', or a work folder of main.py, of "
        "which the newest checkpoint is taken.",
    )
    flags.DEFINE_integer(
        "reps_per_image",
        1,
        "Reconstructions of each image; --sampler fast and best bring their own.",
        lower_bound=1,
        upper_bound=10_000,
    )
    flags.DEFINE_integer("batch_size", 100, "Images per batch file.", lower_bound=1, upper_bound=BATCH_SIZE.high)
    flags.DEFINE_integer("seed", None, "Key of the noise and the random masks; by default the config's.")
    flags.DEFINE_string("device", None, "auto, cpu, cuda or cuda:i; by default the config's.")
    define_shared("memory_gb")
    _define_image_flags()
    _define_mask_flags()
    _define_sampler_flags()
    flags.mark_flags_as_required(["workdir", "ckpt_path", "in_domain"])


def _define_image_flags():
    flags.DEFINE_string("in_domain", None, f"The in-domain images: {_SOURCE}.")
    flags.DEFINE_string(
        "out_of_domain", None, f"The images in question: {_SOURCE}. Without it the in-domain side is made."
    )
    flags.DEFINE_bool("id_center_crop", True, "Crop in-domain files to their centre square; else squeeze them.")
    flags.DEFINE_bool("ood_center_crop", True, "Crop out-of-domain files to their centre square; else squeeze them.")
    flags.DEFINE_bool(
        "match_resolution",
        False,
        "Reduce both sides to the smallest native resolution of either first, so that blur cannot separate them.",
    )
    define_shared("max_images", "data_root", "workers")


def _define_mask_flags():
    flags.DEFINE_string("mask_type", "center", "center, checkerboard, checkerboard_alt, random, none or file.")
    flags.DEFINE_bool("save_mask", False, "Write the masks as pictures (white = known); --mask_file_path reads them.")
    flags.DEFINE_integer("mask_num_blocks", 4, "Checkerboards: blocks an edge.")
    flags.DEFINE_integer("mask_patch_size", 4, "Random masks: pixels an edge of a patch.")
    flags.DEFINE_float("mask_ratio", 0.5, "Random masks: share of known patches.")
    define_path("mask_file_path", None, "Your own mask: a picture (white = known) or array; implies mask_type file.")
    define_path("mask_save_dir", None, "Where --save_mask writes; by default masks/ in the results folder.")
    flags.DEFINE_string("mask_identifier", None, "A tag in the names of the results folder and the saved masks.")


def _define_sampler_flags():
    flags.DEFINE_string(
        "sampler",
        None,
        "published; fast or best, complete settings with few network evaluations (README); or a solver by itself: "
        "ddim, dpmpp_2m, sde_dpmpp_2m. By default the config's. More: --config.sampling.t_start=0.6 and the like.",
    )
    flags.DEFINE_integer("steps", None, "Steps of the sampler; by default the config's.", lower_bound=1)
    define_shared("precision", "compile")


def choose_sampler(options):
    """Writes what the flags say of the sampler into the config; returns the repetitions of each image.

    Args:
        options: `FLAGS`; a flag or field of the config given on the command line wins over a preset's value.

    Raises:
        UserError: a value is out of range, or there is no such sampler.
    """
    from lmd import process

    settings, reps = options.config.sampling, options.reps_per_image
    if options.sampler in process.PRESETS:
        values, preset_reps = process.preset(options.sampler, options.config)
        overridden = typed(options["config"])
        settings.update({name: value for name, value in values.items() if f"sampling.{name}" not in overridden})
        if not options["reps_per_image"].present:
            reps = preset_reps
    elif options.sampler is not None:
        choices = dict.fromkeys([process.PUBLISHED, *process.PRESETS, *process.SAMPLERS])
        choose(options.sampler, choices, "sampler (--sampler)")
        settings.sampler = options.sampler
    if options.steps is not None:
        check_value("--steps", options.steps, FIELDS["sampling"]["steps"])
        settings.steps = options.steps
    check(options.config)
    return reps


def check_flags(options):
    """Refuses flags that were typed and would have no effect, by name.

    Args:
        options: `FLAGS`.

    Raises:
        UserError: two flags that say the same, or one that goes with another that is not there.
    """
    overridden = typed(options["config"])
    for name, field in _SAME_AS_CONFIG.items():
        if options[name].present and field in overridden:
            raise UserError(f"--{name} and --config.{field} say the same; leave one out")
    for name, (other, needed) in _NEEDS.items():
        if options[name].present and not options[other].value:
            raise UserError(f"--{name} goes with --{other}; {needed}")


def choose_mask_type(options):
    """The mask type that the flags come to.

    Args:
        options: `FLAGS`.

    Raises:
        UserError: there is no such mask type, or a flag of masks was typed that has no effect with the others.
    """
    from masks import MASK_TYPES  # here, as it brings torch, which --help need not wait for

    choose(options.mask_type, MASK_TYPES, "mask type (--mask_type)")
    kind, given = options.mask_type, [name for name in ("mask_type", *_MASK_FLAGS) if options[name].present]
    if options.config.sampling.lift == "noise":  # then nothing is known
        if given and [given, kind] != [["mask_type"], "none"]:
            raise UserError(
                f"--{given[0]} has no effect with --config.sampling.lift=noise (no pixel is known); leave one out"
            )
        return "none"
    if options.mask_file_path and kind != "file":
        if "mask_type" in given:
            raise UserError(f"--mask_file_path goes with --mask_type file, not {kind}; leave one out")
        kind = "file"
    for name in given:
        if kind not in _MASK_FLAGS.get(name, [kind]):
            kinds = " or ".join(_MASK_FLAGS[name])
            raise UserError(f"--{name} has no effect with --mask_type {kind}; leave it out, or choose {kinds}")
    return kind


def main(_):
    from lmd import process, reconstruction
    from lmd.reconstructor import MaskOptions

    check(FLAGS.config)
    check_flags(FLAGS)
    config, reps = FLAGS.config, choose_sampler(FLAGS)
    process.check_typed(config, typed(FLAGS["config"]))
    mask_type = choose_mask_type(FLAGS)
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
    job = reconstruction.Job(
        config,
        FLAGS.ckpt_path,
        FLAGS.workdir,
        sources,
        mask_options,
        reps=reps,
        seed=seed,
        compiled=FLAGS.compile,
        mask_directory=(FLAGS.mask_save_dir or "") if FLAGS.save_mask else None,
        **{name: FLAGS[name].value for name in _JOB_FLAGS},
    )
    with distributed.start(FLAGS.device or config.device) as (ranks, device):
        if device.type == "cpu":
            machine.keep_freed_memory()
        reconstruction.run(job, device, ranks)


if __name__ == "__main__":
    define_flags()
    run(main, removed=REMOVED)
