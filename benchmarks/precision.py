"""Scores in bfloat16, and on a GPU in TF32, beside those in strict float32: the same model, images and noise.

    python -m benchmarks.precision
    python -m benchmarks.precision --setting published_100 --images 64

For each metric: the rank correlation of the images' scores over both sides, the median and the largest relative
difference of a score, and both ROC-AUCs.
"""

import argparse
import itertools

import numpy as np
from scipy.stats import spearmanr

import metrics
from basics.console import guard
from basics.machine import choose_device, keep_freed_memory
from benchmarks import machine
from benchmarks.quality_vs_cost import BATCH, MASK, SETTINGS, Setting, auc, measure_batch
from command_line import read_config
from lmd import reconstruction, trained_model
from lmd.process import PRESETS, preset
from models import inference
from storage.results_folder import SIDES


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/subvp/fashion_mnist_small.py")
    parser.add_argument("--ckpt_path", default="pretrained/fashion_mnist_small.safetensors")
    parser.add_argument("--in_domain", default="demo/fashion_mnist.npz")
    parser.add_argument("--out_of_domain", default="demo/mnist.npz")
    parser.add_argument("--images", type=machine.count, default=256, help="of either side")
    parser.add_argument("--setting", default="fast", choices=[*PRESETS, *SETTINGS])
    parser.add_argument("--metric", default="MSE,SSIM")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    device = choose_device("auto")
    if device.type == "cpu":
        keep_freed_memory()
    names = options.metric.split(",")
    reduced = ("tf32", "bf16") if inference.has_tf32(device) else ("bf16",)
    scores = {precision: scores_of(options, names, device, precision) for precision in ("fp32", *reduced)}
    print(f"{options.setting}, {options.images} images a side; {machine.clock().describe()}")
    print(
        f"{'precision':9} {'metric':8} {'rank correlation':>16} {'median':>9} {'largest difference':>18} "
        f"{'AUC fp32':>9} {'AUC':>9}"
    )
    for precision, name in itertools.product(reduced, names):
        exact, other = scores["fp32"][name], scores[precision][name]
        a, b = (np.concatenate([s[side] for side in SIDES]) for s in (exact, other))
        differences = np.abs(b / a - 1)
        print(
            f"{precision:9} {name:8} {spearmanr(a, b).statistic:16.5f} {np.median(differences):9.3%} "
            f"{differences.max():18.2%} {auc(exact):9.4f} {auc(other):9.4f}"
        )


def scores_of(options, names, device, precision):
    """{metric: {side: (N,)}}, the medians over the repetitions."""
    config = read_config(options.config)
    if options.setting in PRESETS:
        values, reps = preset(options.setting, config)
        setting = Setting(reps, values)
    else:
        setting = SETTINGS[options.setting]
    model, _ = trained_model.load_model(config, options.ckpt_path, device, precision, options.compile)
    sources = {"pos": (options.in_domain, True), "neg": (options.out_of_domain, True)}
    job = reconstruction.Job(config, options.ckpt_path, "", sources, MASK, max_images=options.images)
    sides = reconstruction.load_sides(job)
    tools = [metrics.create(name, device) for name in names]
    scores = {name: {} for name in names}
    for side, images in sides.items():
        batches = range(reconstruction.batches_of(images, BATCH))
        parts = [measure_batch(config, model, setting, tools, 42, device, images, batch) for batch in batches]
        for name in names:
            scores[name][side] = np.median(np.concatenate([part[name] for part in parts], axis=1), axis=0)
    return scores


if __name__ == "__main__":
    guard(lambda _: main(), None, interrupted="interrupted")
