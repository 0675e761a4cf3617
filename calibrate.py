"""Makes a detector from a trained model and in-domain images that were held back from its training.

    python calibrate.py --ckpt_path results/mine/ --in_domain photos/held_back/ --detector detectors/mine/

The detector decides about single images with a false-alarm rate that is known (predict.py); its card says what it does
not see.  Without --config the checkpoint's own is taken, where it carries one.  On several GPUs:
torchrun --nproc_per_node=8 calibrate.py ...
"""

import sys

from absl import flags

from basics import distributed, machine
from basics.console import shell
from command_line import MODEL, define_model, define_path, run
from configs.base import check, typed

FLAGS = flags.FLAGS
_JOB_FLAGS = (  # fields of a `calibrating.CalibrationJob` as they are
    "detector", "method", "false_alarm_rate", "fit_share", "card_images", *MODEL,
)  # fmt: skip


def define_flags():
    """The command line; inside a function so that importing this module defines nothing."""
    define_model()
    define_path("detector", None, "The folder to write; a detector that is there is replaced.", required=True)
    flags.DEFINE_string(
        "method",
        "auto",
        "What an image is judged by, with settings if need be, as of compare.py; docs/reference.md lists the methods. "
        "auto: combined where there are enough images, else lmd.",
    )
    flags.DEFINE_float("false_alarm_rate", 0.05, "At which the detector decides; predict.py can choose another.")
    flags.DEFINE_float(
        "fit_share", 0.5, "Share of the images that the method learns from; the others give the p-values."
    )
    flags.DEFINE_integer(
        "card_images", 100, "Images of which each kind of made-up foreign image is made; 0 for no blind-spot card.",
        lower_bound=0,
    )  # fmt: skip


def main(argv):
    from lmd import calibrating

    check(FLAGS.config)
    options = {name: FLAGS[name].value for name in _JOB_FLAGS}
    options |= {"overridden": typed(FLAGS["config"]), "command": shell("python", "calibrate.py", *sys.argv[1:])}
    job = calibrating.CalibrationJob(FLAGS.config, **options)
    with distributed.start(FLAGS.device) as (ranks, device):
        if device.type == "cpu":
            machine.keep_freed_memory()
        calibrating.calibrate(job, device, ranks)


if __name__ == "__main__":
    define_flags()
    run(main)
