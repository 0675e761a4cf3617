r"""Detect, the last step of LMD: score every image by how far its reconstructions landed from it.

    python detect.py --result_path results/cifar10/CIFAR10_vs_SVHN/checkerboard_alt_blocks8_reps10/ \
        --reps 10 --metric LPIPS

The score of an image is the median over its repetitions of the distance between the image and
its reconstruction (Liu et al., "Unsupervised Out-of-Distribution Detection with Diffusion
Inpainting", ICML 2023).  The ROC-AUC takes the in-domain images as positives and closeness as
their score.  Batch files are read one at a time; only distances are kept.
"""

from absl import flags

from basics.console import UserError, say
from command_line import define_path, run
from metrics import METRICS


def define_flags():
    """The command line; inside a function so that importing this module defines nothing."""
    define_path("result_path", None, "Results folder of recon.py, the one with pos/ and neg/.", required=True)
    flags.DEFINE_list("metric", ["LPIPS"], f"Distances, separated by commas: {', '.join(METRICS)}.")
    flags.DEFINE_enum(
        "resize_type",
        "bicubic",
        ["nearest", "bicubic", "none"],
        "SIMCLR: how images are resized to 224x224, if at all.",
    )
    define_path("simclr_path", None, "SIMCLR: weights of a SimCLRv2 ResNet; by default pretrained/r50_1x_sk1.pth.")
    flags.DEFINE_integer("reps", 1, "Repetitions per image to use: the first ones, at most as many as were made.")
    flags.DEFINE_string("device", "auto", "Where distances are computed: auto, cpu, cuda or cuda:i.")
    flags.DEFINE_integer("bootstrap", 1000, "Resamples for the 95 % interval of the ROC-AUC; 0 leaves it out.")
    flags.DEFINE_boolean("plots", True, "Write ROC curve, histograms and picture grid as PNG.")
    flags.DEFINE_integer("grid_images", 8, "Images per group in the picture grid; 0 leaves the grid out.")


def main(argv):
    """The command line: scores, prints the ROC-AUCs and says where the details are."""
    from lmd import detection

    values = flags.FLAGS
    if "SIMCLR" not in (name.strip().upper() for name in values.metric):
        for name in ("resize_type", "simclr_path"):
            if values[name].present:
                raise UserError(f"--{name} is for --metric SIMCLR; leave it out, or add that")
    names = ("reps", "device", "bootstrap", "plots", "grid_images", "resize_type", "simclr_path")
    results = detection.detect(values.result_path, values.metric, **{name: values[name].value for name in names})
    for result in results:
        say(f"{result.metric} ROC AUC: {result.roc_auc:.4f}")
        if result.interval:
            low, high = result.interval
            say(f"{result.metric} 95 % interval: {low:.4f} to {high:.4f} ({values.bootstrap} resamples)")
    say(f"written to {values.result_path}:")
    for result in results:
        say(f"  {', '.join(result.files)}")
    say("  results.json")


if __name__ == "__main__":
    define_flags()
    run(main)
