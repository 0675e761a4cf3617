"""What a calibrated detector keeps of its promises: false alarms, where it points, speed and memory.

    python -m benchmarks.decisions --parts guarantee,patches --data_root data
    python -m benchmarks.decisions --parts speed,methods,memory --data_root data

- guarantee: the shipped model, calibrated on Fashion-MNIST's test images; false alarms among 5,000 others at 1, 5 and
  10 %, beside the 95 % band in which they should lie.
- patches: patches of 10 x 10 pixels pasted into test images; the mean over images of the ROC-AUC of single pixels, with
  its standard error.
- speed: images per second of `predict.py`'s work, reading and writing included, and the network's own at the same
  evaluations, in turns.
- methods: seconds of what each cheap method measures, and of the same evaluations by the network alone, in turns.
- memory: peak resident set of whole `predict.py` processes over folders of different numbers of images.

On a GPU if there is one, but memory, which is that of processes on the CPU.
"""

import argparse
import functools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

import datasets
import models
from basics import noise
from basics.console import guard
from basics.machine import choose_device, keep_freed_memory
from benchmarks import machine
from benchmarks.detect_memory import measure
from command_line import read_config
from configs.base import to_dict
from lmd import calibration, methods, predicting
from lmd.deciding import Rule
from lmd.detector import Detector, open_model
from storage.checkpoints import write_network

CHECKPOINT = "pretrained/fashion_mnist_small.safetensors"
CONFIG = "configs/subvp/fashion_mnist_small.py"
RATES = 0.01, 0.05, 0.1
EDGE = 10  # pixels of a patch
CHEAP = 30  # evaluations an image, at most
CHUNK = 128  # images that compare.py measures at once


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="guarantee,patches,speed,methods,memory", help=", ".join(PARTS))
    parser.add_argument("--data_root", default="data", help="where Fashion-MNIST lies")
    parser.add_argument("--method", default="combined")
    parser.add_argument("--calibration", type=machine.count, default=1000, help="images for p-values, as many to fit")
    parser.add_argument("--others", type=machine.count, default=5000, help="guarantee: other in-domain images")
    parser.add_argument("--patched", type=machine.count, default=200, help="patches: images of each kind")
    parser.add_argument("--images", type=machine.count, default=2000, help="speed, methods: images")
    parser.add_argument("--turns", type=machine.count, default=3, help="speed: how often each is timed")
    parser.add_argument("--sizes", default="1000,20000", help="memory: images of each folder")
    options = parser.parse_args()
    if choose_device("auto").type == "cpu":
        keep_freed_memory()
    for part in options.parts.split(","):
        PARTS[part](options)


def _detector(options, images):
    """The shipped model calibrated with images (N, 1, H, W)."""
    return Detector(open_model(CHECKPOINT), options.method).fit(images)


def _test_images(options, start, stop):
    return datasets.load("FashionMNIST", split="test", image_size=32, num_channels=1, data_root=options.data_root).read(
        start, stop
    )


# --------------------------------------------------------------------------------------------------- guarantee


def guarantee(options):
    """Prints the realised false-alarm rates and their bands."""
    held, n = 2 * options.calibration, options.calibration
    detector = _detector(options, _test_images(options, 0, held))
    p_value = detector.predict(_test_images(options, held, held + options.others)).p_value
    print(f"{options.method}: {n:,} calibration images, {len(p_value):,} other in-domain images")
    print(f"{'rate':>6} {'realised':>9} {'95 % band':>17}")
    for rate in RATES:
        low, high = calibration.band(n, rate)
        print(f"{rate:6.0%} {(p_value <= rate).mean():9.2%} {low:8.2%} to {high:.2%}")


# ------------------------------------------------------------------------------------------------------ patches


def patches(options):
    """Prints the ROC-AUC of single pixels for each kind of patch."""
    count = options.patched
    detector = _detector(options, _test_images(options, 0, 400))
    images, donors = _test_images(options, 5000, 5000 + count), _test_images(options, 7000, 7000 + count)
    print(f"{options.method}: patches of {EDGE} x {EDGE} pixels in {count} images")
    print(f"{'patch':10} {'pixel ROC-AUC':>13} {'error':>6}")
    for kind in ("noise", "stripes", "piece"):
        pasted, truth = paste(kind, images, donors)
        maps = detector.predict(pasted, maps=True).map
        aucs = [roc_auc_score(t.flatten(), m.flatten()) for t, m in zip(truth, maps, strict=True)]
        print(f"{kind:10} {np.mean(aucs):13.3f} {np.std(aucs) / count**0.5:6.3f}")


def paste(kind, images, donors):
    """Images (B, 1, H, W) uint8 with a patch each at some place, and where it is (B, H, W) bool."""
    pasted, truth, size = images.clone(), np.zeros((len(images), *images.shape[2:]), bool), images.shape[-1]
    draws = noise.generator("patches", kind)
    for row in range(len(images)):
        top, left, from_top, from_left = torch.randint(4, size - EDGE - 4, (4,), generator=draws).tolist()
        patch = {
            "noise": lambda: torch.randint(0, 256, (EDGE, EDGE), generator=draws),
            "stripes": lambda: (torch.arange(EDGE) % 2 * 255).expand(EDGE, EDGE),
            "piece": functools.partial(_piece, donors[row, 0], from_top, from_left),
        }[kind]()
        pasted[row, 0, top : top + EDGE, left : left + EDGE] = patch.to(torch.uint8)
        truth[row, top : top + EDGE, left : left + EDGE] = True
    return pasted, truth


def _piece(image, top, left):
    return image[top : top + EDGE, left : left + EDGE]


# ------------------------------------------------------------------------------------------------ speed, memory


def speed(options):
    """Prints images per second of predicting into a folder and of the network alone."""
    images = _test_images(options, 0, options.images)
    with tempfile.TemporaryDirectory() as folder:
        detector = _detector(options, _test_images(options, 9000, 9240))
        detector.save(f"{folder}/detector")
        np.savez(f"{folder}/images.npz", images=images.numpy()[:, 0])
        rows, evaluations = [], detector.method.evaluations(detector.model)
        for turn in range(options.turns):
            rule = Rule(f"{folder}/output{turn}")
            job = predicting.PredictionJob(f"{folder}/detector", f"{folder}/images.npz", rule)
            began = time.perf_counter()
            predicting.predict(job, detector.model.device)
            ours = time.perf_counter() - began
            rows.append((len(images) / ours, len(images) / network_alone(detector.model, images, evaluations)))
    print(f"{options.method}: {evaluations} evaluations an image, {len(images):,} images; images a second")
    print(f"{'predict.py':>10} {'network':>8} {'share':>6}")
    for ours, bare in rows:
        print(f"{ours:10.1f} {bare:8.1f} {ours / bare:6.0%}")


@torch.no_grad()
def network_alone(model, images, evaluations):
    """Seconds of so many evaluations of each image, in batches of the model's size."""
    total = len(images) * evaluations
    x = torch.zeros(model.rows, *images.shape[1:], device=model.device)
    labels = torch.full((1,), 300.0, device=model.device)
    began = time.perf_counter()
    for start in range(0, total, model.rows):
        model.score.net(x[: min(model.rows, total - start)], labels)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def cheap_methods(options):
    """Prints the seconds of each method of at most `CHEAP` evaluations an image, and those of the network alone."""
    model, images = open_model(CHECKPOINT), _test_images(options, 0, options.images)
    keys = noise.seed_keys(0, noise.content_keys(images))
    costs = {name: methods.create(name).evaluations(model) for name in methods.METHODS}
    chosen = sorted((cost, name) for name, cost in costs.items() if cost <= CHEAP)
    print(f"{len(images):,} images; seconds")
    print(f"{'method':15} {'evaluations':>11} {'method':>7} {'network':>8}")
    total = np.zeros(2)
    for cost, name in chosen:
        method, began = methods.create(name), time.perf_counter()
        for start in range(0, len(images), CHUNK):
            method.statistics(model, images[start : start + CHUNK], keys[start : start + CHUNK])
        seconds = np.array([time.perf_counter() - began, network_alone(model, images, cost)])
        print(f"{name:15} {cost:11} {seconds[0]:7.1f} {seconds[1]:8.1f}", flush=True)
        total += seconds
    print(f"{'all':15} {sum(cost for cost, _ in chosen):11} {total[0]:7.1f} {total[1]:8.1f}  {total[0] / total[1]:.0%}")


def memory(options):
    """Prints the peak memory of predict.py for each number of images, with a network of next to no cost."""
    config = read_config(CONFIG)
    config.model.update({"nf": 32, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": ()})
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        write_network(weights, models.create_model(config), to_dict(config), 0)
        method = methods.create("lmd", metrics=("MSE",), reps=1)
        detector = Detector(open_model(weights, device="cpu"), method)
        detector.fit(rng.integers(0, 256, (60, 32, 32), dtype=np.uint8)).save(f"{folder}/detector")
        print(f"{'images':>8} {'peak RSS':>10}")
        for size in map(int, options.sizes.split(",")):
            np.savez(f"{folder}/images.npz", images=rng.integers(0, 256, (size, 32, 32), dtype=np.uint8))
            command = [sys.executable, "predict.py", f"--detector={folder}/detector", f"--images={folder}/images.npz"]
            _, _, peak = measure([*command, f"--output={folder}/output{size}", "--device=cpu"], threads=1)
            print(f"{size:8,} {peak / 2**20:7.0f} MB")


PARTS = {"guarantee": guarantee, "patches": patches, "speed": speed, "methods": cheap_methods, "memory": memory}


if __name__ == "__main__":
    guard(lambda _: main(), None, interrupted="interrupted")
