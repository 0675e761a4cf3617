"""How much training detection needs: tables of compare.py for models of one kind, as one table and one picture.

    for k in 1 4 10 20 40 80; do    # checkpoints of a training with --config.training.snapshot_freq=250,
                                    # --config.training.n_iters=20000 and --config.optim.cooldown=0
        python compare.py --ckpt_path results/steps/checkpoints/checkpoint_$k.pth --fit F.npz --in_domain A.npz \\
            --out_of_domain B.npz,C.npz,shifts --methods combined --parts --output results/curves/steps_$((250 * k))
    done
    python -m benchmarks.training_curves results/curves/*_* --output results/curves/training.png

A folder's name is that of its series and a number, such as steps_250 or images_1000; all of them must have scored the
same images.  `mean` is over the sets of foreign images; `low` and `high` are the means of the ends of the sets' 95 %
intervals, so wider than an interval of the mean.  Chance of another training is not in them.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from basics.console import UserError, guard
from basics.files import write_bytes
from benchmarks import machine
from lmd.pictures import to_png

METHODS = {"combined": "combined", "combined[lmd_ssim]": "LMD by SSIM", "combined[lmd_mse]": "LMD by MSE"}
TITLES = {"steps": "training steps", "images": "training images"}
MEANS = {"mean": "roc_auc", "low": "roc_auc_low", "high": "roc_auc_high"}
SAME = "fit", "in_domain", "out_of_domain"  # what compare.json says of the images


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="outputs of compare.py, called SERIES_NUMBER")
    parser.add_argument("--output", type=Path, help="the picture, a .png")
    options = parser.parse_args(arguments)
    rows = sorted(
        _rows(options.folders),
        key=lambda row: (row["series"], list(METHODS.values()).index(row["method"]), row["number"]),
    )
    machine.show(rows)
    if options.output:
        write_bytes(options.output, to_png(draw(rows)))
        print(f"picture: {options.output}")


def _rows(folders):
    """A row for each folder and method, column -> text or number.

    Raises:
        UserError: a folder has no table or no such name, lacks numbers, or scored other images than the first.
    """
    first = None
    for folder in folders:
        series, _, number = folder.name.rpartition("_")
        if not (series and number.isdecimal() and (folder / "compare.json").is_file()):
            raise UserError(f"{folder} is no output of compare.py called SERIES_NUMBER, such as steps_250")
        table = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
        images = [table[name] for name in SAME]
        first = first or images
        if images != first:
            raise UserError(f"{folder} scored other images than {folders[0]}; give folders of the same images")
        for method, label in METHODS.items():
            sets = [row for row in table["rows"] if row["method"] == method]
            if not sets and method != "combined":  # it was made without --parts
                continue
            if not sets or any(row[column] is None for row in sets for column in MEANS.values()):
                raise UserError(
                    f"{folder} lacks ROC-AUCs or intervals of {method}; run compare.py with --methods combined and "
                    "sets of 2 images at least"
                )
            means = {name: mean(row[column] for row in sets) for name, column in MEANS.items()}
            least = min(row["roc_auc"] for row in sets)
            yield {"series": series, "number": int(number), "method": label, **means, "minimum": least}


def draw(rows):
    """A figure with a panel for each series and a line for each method, the intervals behind it."""
    names = list(dict.fromkeys(row["series"] for row in rows))
    figure = Figure(figsize=(4.4 * len(names), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for label in METHODS.values():
            mine = [row for row in rows if (row["series"], row["method"]) == (name, label)]
            numbers = [row["number"] for row in mine]
            axes.fill_between(numbers, [row["low"] for row in mine], [row["high"] for row in mine], alpha=0.2)
            axes.plot(numbers, [row["mean"] for row in mine], marker="o", label=label)
        axes.set(xscale="log", xlabel=TITLES.get(name, name), ylabel="mean ROC-AUC", ylim=(0.5, 1))
        axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


if __name__ == "__main__":
    guard(lambda _: main(), None)
