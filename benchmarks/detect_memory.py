"""Time and peak memory of detect.py as the data set grows, beside a plain version that holds everything.

    python -m benchmarks.detect_memory

Results folders of 32x32 images are made of a few distinct batch files and hard links to them, so
they need little disk; they lie in the page cache, so the times hold no waiting for a disk.
Each row is one process: its whole run with imports, and the largest resident set it had.
The plain version reads each file once per repetition and keeps all images and reconstructions
before it computes the same distances with the same code.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

import metrics
from storage.results_folder import SIDES, ResultsFolder

ROOT = Path(__file__).resolve().parent.parent
DISTINCT = 3  # batch files with images of their own, per side
METRICS = ("MSE", "SSIM")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[2500, 5000, 10000], help="images per side")
    parser.add_argument("--plain_images", type=int, nargs="+", default=[1000], help="the same for the plain version")
    parser.add_argument("--reps", type=int, default=10, help="repetitions per image")
    parser.add_argument("--batch_size", type=int, default=100, help="images per batch file; divides all of the above")
    parser.add_argument(
        "--plain", metavar="FOLDER", help="run the plain version on a results folder and print its ROC-AUCs"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    options = parser.parse_args()
    if options.plain:
        run_plain(ResultsFolder(Path(options.plain)), options.reps)
    else:
        print_table(options)


def print_table(options):
    """One row per version and size: images, seconds, processor seconds, images per second, peak memory."""
    setting = f"{options.reps} repetitions, {' and '.join(METRICS)}, batches of {options.batch_size}"
    print(f"{setting}, CPU threads: {options.threads}")
    print(f"{'version':10} {'images':>15} {'seconds':>8} {'CPU s':>7} {'images/s':>9} {'peak RSS':>9}", flush=True)
    sizes = sorted({*options.plain_images, *options.images})
    for version, images in [("plain", n) for n in options.plain_images] + [("detect.py", n) for n in sizes]:
        with tempfile.TemporaryDirectory() as folder:
            make_folder(ResultsFolder(Path(folder)), images // options.batch_size, options.batch_size, options.reps)
            seconds, cpu, peak = measure(COMMANDS[version](folder, options.reps), options.threads)
        times = f"{seconds:8.1f} {cpu:7.1f} {2 * images / seconds:9.0f}"
        print(f"{version:10} {f'{images} + {images}':>15} {times} {peak / 2**20:6.0f} MB", flush=True)


def make_folder(folder, batches, batch_size, reps):
    """Two sides of that many batch files, of which `DISTINCT` differ."""
    rng = torch.Generator().manual_seed(0)
    for side, noise in zip(SIDES, (0.1, 0.12), strict=True):
        for index in range(batches):
            if index < DISTINCT:
                orig = torch.rand(batch_size, 3, 32, 32, generator=rng)
                recon = [orig + noise * torch.randn(orig.shape, generator=rng) for _ in range(reps)]
                masked = [orig * (torch.rand(32, 32, generator=rng) < 0.5) for _ in range(reps)]
                folder.write_batch(side, index, orig, masked, recon)
            else:
                os.link(folder.batch_path(side, index % DISTINCT), folder.batch_path(side, index))


def measure(command, threads):
    """Runs a command from the repository's root with so many CPU threads.

    Returns:
        tuple: seconds by the clock, seconds of processor time (hardly moved by other work on the machine), and the
        peak resident set in bytes.
    """
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{errors.decode()}")
    seconds = time.perf_counter() - start
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024  # Linux counts in KiB


def run_plain(folder, reps):
    """Holds everything: per repetition, reads all files and keeps their originals and reconstructions."""
    tools = [metrics.create(name, torch.device("cpu")) for name in METRICS]
    held = {side: [read_all(folder, side, rep) for rep in range(reps)] for side in SIDES}
    for tool in tools:
        distances = {side: [[tool(*pair) for pair in rep] for rep in held[side]] for side in SIDES}
        scores = [np.median([torch.cat(rep).numpy() for rep in distances[side]], axis=0) for side in SIDES]
        labels = np.repeat([1, 0], [len(part) for part in scores])
        print(f"{tool.name} ROC AUC: {roc_auc_score(labels, -np.concatenate(scores)):.4f}")


def read_all(folder, side, rep):
    """One repetition of a side: pairs of originals and reconstructions, (B, C, H, W) each, batch by batch."""
    batches = (folder.read_batch(side, index, rep + 1) for index in range(folder.batch_count(side)))
    return [(orig, recons[rep]) for orig, recons in batches]


COMMANDS = {
    "detect.py": lambda folder, reps: [
        *(sys.executable, "detect.py", "--result_path", folder, f"--reps={reps}", f"--metric={','.join(METRICS)}")
    ],
    "plain": lambda folder, reps: [
        *(sys.executable, "-m", "benchmarks.detect_memory", "--plain", folder, f"--reps={reps}")
    ],
}


if __name__ == "__main__":
    main()
