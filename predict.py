"""Decides of each image whether it belongs to a detector's domain.

    python predict.py --detector detectors/mine/ --images incoming/ --false_alarm_rate 0.01 --output results/incoming/
    python predict.py --output results/incoming/ --false_alarm_rate 0.05         # decides anew, without the network

Writes predictions.csv, skipped.csv, summary.json and report.html.  On several GPUs:
torchrun --nproc_per_node=8 predict.py ...
"""

import sys

from absl import flags

from basics import distributed, machine
from basics.console import UserError, place, shell, speaks
from command_line import define_path, define_shared, run

EXIT_OUTLIER = 3
FLAGS = flags.FLAGS
_SHARED = "max_images", "data_root", "workers", "memory_gb", "compile"  # fields of a `predicting.PredictionJob` too


def define_flags():
    """The command line; inside a function so that importing this module defines nothing."""
    define_path("detector", None, "The folder that calibrate.py wrote.")
    define_path(
        "images",
        None,
        "The images to decide about: a folder, a .txt list, a .npz or .npy file, one image, or a data set's name.",
    )
    define_path("output", None, "Folder of the results; by itself, to decide anew about what it holds.", required=True)
    flags.DEFINE_float(
        "false_alarm_rate", None, "Share of in-domain images that may be flagged; by default the detector's."
    )
    flags.DEFINE_float(
        "false_discovery_rate", None, "Flag by Benjamini and Hochberg: share of the flagged that may be in domain."
    )
    flags.DEFINE_bool(
        "maps", False, "Write pictures of where flagged images are unusual, of the 300 most suspicious at most."
    )
    flags.DEFINE_bool("fail_on_outlier", False, f"Exit with {EXIT_OUTLIER} when an image is flagged, for pipelines.")
    define_shared(*_SHARED, "device")


def check_flags(options):
    """Refuses flags that do not go together.

    Raises:
        UserError: names them.
    """
    if options.false_alarm_rate is not None and options.false_discovery_rate is not None:
        raise UserError("--false_alarm_rate and --false_discovery_rate are two ways to flag; leave one out")
    if options.fail_on_outlier and place()[2] > 1:
        raise UserError(
            f"--fail_on_outlier cannot exit with {EXIT_OUTLIER} under torchrun, which has exit codes of its own; leave "
            "it out here, and give it to predict.py by itself afterwards, with the same rate and --output alone"
        )
    if (options.detector is None) != (options.images is None):
        missing = "images" if options.images is None else "detector"
        raise UserError(f"--{missing} is missing; give both --detector and --images, or --output alone to decide anew")
    if options.detector is None:
        for name in (*_SHARED, "device"):
            if options[name].present:
                raise UserError(f"--{name} has no effect without --detector and --images; leave it out")


def main(argv):
    check_flags(FLAGS)
    from lmd.deciding import Rule, decide_again

    rule = Rule(FLAGS.output, FLAGS.false_alarm_rate, FLAGS.false_discovery_rate, FLAGS.maps)
    flagged = 0
    if FLAGS.detector is not None:
        flagged = _measure(rule, FLAGS)
    elif speaks():  # of several processes one decides
        flagged = decide_again(rule)
    return EXIT_OUTLIER if flagged and FLAGS.fail_on_outlier else 0


def _measure(rule, values):
    """Measures the images and decides; the number of flagged ones.  `values` are the flags."""
    from lmd.predicting import PredictionJob, predict  # not before it is needed: deciding anew takes a second

    options = {name: values[name].value for name in _SHARED}
    command = shell("python", "predict.py", *sys.argv[1:])
    job = PredictionJob(values.detector, values.images, rule, command=command, **options)
    with distributed.start(values.device) as (ranks, device):
        if device.type == "cpu":
            machine.keep_freed_memory()
        return predict(job, device, ranks)


if __name__ == "__main__":
    define_flags()
    run(main)
