"""How training and reconstruction scale with processes: those that share a run beside as many that know nothing of
each other, on the same machine.

    OMP_NUM_THREADS=1 python -m benchmarks.scaling --processes 1,2,4
    python -m benchmarks.scaling --processes 1,2,4,8 --training_batch 128 --steps 400 --images 20000 --batch_size 500 \\
        --config configs/subvp/cifar10_ddpm_continuous.py --ckpt_path results/cifar10/     # on eight GPUs

Whole commands are timed (main.py and recon.py, under torchrun where they share), each with little and with much to do:
the difference is free of the start.  Every process has as much to do whatever their number, a batch of
--training_batch images a step, or --images to reconstruct with --sampler fast.  `of apart` is the share of the rate of
processes that share nothing: what sharing costs.  `of ideal` is that of so many times one process, which a machine with
fewer cores or GPUs than processes cannot reach.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from basics.console import UserError, guard
from benchmarks import machine
from command_line import read_config

LITTLE = 4  # times less work in the run that the start is taken from


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", default="1,2,4", help="numbers of them, separated by commas")
    parser.add_argument("--config", default="configs/subvp/fashion_mnist_small.py")
    parser.add_argument("--ckpt_path", default="pretrained/fashion_mnist_small.safetensors")
    parser.add_argument("--training_batch", type=machine.count, default=16, help="images a step and process")
    parser.add_argument("--steps", type=machine.count, default=80, help="of training")
    parser.add_argument("--images", type=machine.count, default=128, help="that a process reconstructs")
    parser.add_argument("--batch_size", type=machine.count, default=16, help="images a file of recon.py")
    options = parser.parse_args(arguments)
    print(f"{options.config}; {machine.clock().describe()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        machine.show(rows(options, Path(folder)))


def rows(options, folder):
    """Rows of both parts for each number of processes; the first number is what the others are held against.

    Args:
        options: the command line's.
        folder: for images and results, deleted by the caller.

    Yields:
        column -> text, number or None.
    """
    for part, work, command in (("training", options.steps, training), ("reconstruction", options.images, recon)):
        one = None
        for processes in map(int, options.processes.split(",")):
            amount = processes * (options.training_batch * work if part == "training" else work)
            amount -= amount // LITTLE
            place = folder / part / str(processes)
            apart = amount / _difference(command, options, work, [1] * processes, place / "apart")
            shared = apart
            if processes > 1:
                shared = amount / _difference(command, options, work, [processes], place / "shared")
            one = one or apart / processes
            yield {
                **{"part": part, "processes": processes, "images/s": shared, "apart images/s": apart},
                **{"of apart": shared / apart, "of ideal": shared / (one * processes)},
            }


def _difference(command, options, work, groups, place):
    """Seconds that much work takes longer than little, by groups of processes that run at the same time."""
    few, many = (_seconds(command, options, amount, groups, place / str(amount)) for amount in (work // LITTLE, work))
    return many - few


def _seconds(command, options, amount, groups, place):
    """Seconds of one command for each group, at the same time; a group shares the images of all its processes."""
    start, running = time.perf_counter(), []
    for number, processes in enumerate(groups):
        folder = place / str(number)
        folder.mkdir(parents=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        arguments = command(options, amount, processes, folder)
        with (folder / "log.txt").open("wb") as log:
            line = [sys.executable, *(launcher if processes > 1 else []), *arguments]
            running.append(subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT))
    codes = [process.wait() for process in running]
    if any(codes):
        number = next(number for number, code in enumerate(codes) if code)
        tail = (place / str(number) / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"a command that was to be timed failed: {''.join(tail)}")
    return time.perf_counter() - start


def training(options, steps, processes, folder):
    """The arguments of so many steps of main.py, with a batch that gives each process the same."""
    batch = processes * options.training_batch
    settings = {"snapshot_sampling": False, "eval_freq": 0, "snapshot_freq": 0, "snapshot_freq_for_preemption": 0}
    settings |= {"n_iters": steps, "batch_size": batch}
    return [
        *("main.py", "--mode=train", f"--config={options.config}", f"--workdir={folder / 'run'}"),
        f"--config.data.dataset={_images(options, 2 * batch, folder)}",
        *(f"--config.training.{name}={value}" for name, value in settings.items()),
    ]


def recon(options, images, processes, folder):
    """The arguments of recon.py for so many images a process; out of domain there is one."""
    return [
        *("recon.py", f"--config={options.config}", f"--ckpt_path={options.ckpt_path}", "--sampler=fast"),
        *("--mask_type=checkerboard_alt", "--mask_num_blocks=8", f"--batch_size={options.batch_size}"),
        f"--in_domain={_images(options, images * processes, folder)}",
        *(f"--out_of_domain={_images(options, 1, folder, 'other')}", f"--workdir={folder / 'run'}"),
    ]


def _images(options, count, folder, name="images"):
    """A file of so many random images, which no other folder has."""
    data = read_config(options.config).data
    shape = (count, data.image_size, data.image_size, data.num_channels)
    generator = np.random.default_rng(list(f"{folder}{name}".encode()))
    path = folder / f"{name}.npy"
    np.save(path, generator.integers(0, 256, shape, dtype=np.uint8))
    return path


if __name__ == "__main__":
    guard(lambda _: main(), None, interrupted="interrupted")
