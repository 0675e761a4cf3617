"""Compares detectors on one model: every method's scores of the same images in one table.

    python compare.py --ckpt_path results/mine/ --fit photos/held_back/ --in_domain photos/test/ \\
        --out_of_domain other/,SVHN,shifts --methods all --output results/compare/

What was measured is kept in the output folder: with one more method or set only that is measured.  Methods with
settings: --methods lmd:mask_type=center,lmd:mask_type=checkerboard_alt:num_blocks=4; the ablations of the LMD paper:
--methods ablations.  On several GPUs: torchrun --nproc_per_node=8 compare.py ...
"""

import sys

from absl import flags

from basics import distributed, machine
from basics.console import shell
from command_line import MODEL, define_model, define_path, run
from configs.base import check, typed

FLAGS = flags.FLAGS
_JOB_FLAGS = (  # fields of a `comparison.ComparisonJob` as they are
    "fit", "out_of_domain", "output", "methods", "parts", *MODEL,
)  # fmt: skip


def define_flags():
    """The command line; inside a function so that importing this module defines nothing."""
    define_model()
    define_path(
        "fit",
        None,
        "Other such images, which methods learn from; by default half of --in_domain, which is then not scored.",
    )
    flags.DEFINE_string(
        "out_of_domain",
        None,
        "Foreign images: sources separated by commas. `shifts` stands for all kinds of foreign images made up from the "
        "in-domain ones, `shifts:blur` for one of them.",
        required=True,
    )
    define_path("output", None, "Folder of the results.", required=True)
    flags.DEFINE_string(
        "methods",
        "all",
        "Names separated by commas, each with its settings: lmd:mask_type=center:num_blocks=4; `all` of them, or the "
        "`ablations` of the LMD paper. docs/reference.md lists them.",
    )
    flags.DEFINE_bool("parts", False, "Rows for the parts of methods that combine several, too, at no further cost.")


def main(argv):
    from lmd import comparison

    check(FLAGS.config)
    options = {name: FLAGS[name].value for name in _JOB_FLAGS}
    options |= {"overridden": typed(FLAGS["config"]), "command": shell("python", "compare.py", *sys.argv[1:])}
    job = comparison.ComparisonJob(FLAGS.config, **options)
    with distributed.start(FLAGS.device) as (ranks, device):
        if device.type == "cpu":
            machine.keep_freed_memory()
        comparison.compare(job, device, ranks)


if __name__ == "__main__":
    define_flags()
    run(main)
