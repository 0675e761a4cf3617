"""A model so small that it trains in seconds, its data, and how the commands are run with it."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import torch
from helpers import ROOT, load_config

import models
from basics import files, noise
from configs.base import to_dict
from lmd import reconstruction, training
from lmd.detector import Detector, open_model
from lmd.reconstructor import MaskOptions
from losses import create_state
from storage import checkpoints

SIZE = 8  # pixels an edge
CPU = torch.device("cpu")
OVERRIDES = {
    "data.image_size": SIZE,
    "model.nf": 32,  # the least: GroupNorm has 32 groups
    "model.ch_mult": (1,),
    "model.num_res_blocks": 1,
    "model.attn_resolutions": (),
    "model.num_scales": 3,
    "training.batch_size": 4,
    "training.n_iters": 12,
    "training.log_freq": 2,
    "training.eval_freq": 4,
    "training.snapshot_freq": 5,
    "training.snapshot_freq_for_preemption": 3,
    "optim.warmup": 2,
    "optim.cooldown": 0,
    "eval.begin_ckpt": 1,
    "eval.end_ckpt": 2,
    "eval.batch_size": 4,
}
CONFIG_FILE = "configs/subvp/fashion_mnist_small.py"


def config(**changes):
    """The small Fashion-MNIST config at test size; `changes` are fields such as `model__dropout=0.1`."""
    tree = load_config("subvp/fashion_mnist_small.py")
    tree.update_from_flattened_dict({**OVERRIDES, **{name.replace("__", "."): v for name, v in changes.items()}})
    return tree


def config_flags(**changes):
    """The same on a command line."""
    values = {**OVERRIDES, **{name.replace("__", "."): v for name, v in changes.items()}}
    return [f"--config={CONFIG_FILE}", *(f"--config.{name}={value}" for name, value in values.items())]


def pictures(count, seed=0, size=SIZE):
    """Grey images (N, S, S) uint8: a bright square on a dark ground, somewhere."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 60, (count, size, size), dtype=np.uint8)
    for image in images:
        top, left = rng.integers(0, size // 2, 2)
        image[top : top + size // 2, left : left + size // 2] += 160
    return images


def write_pictures(path, count, seed=0, size=SIZE):
    """`pictures` as an .npz file; returns its path."""
    images = pictures(count, seed, size)
    np.savez(path, images=images[..., None] if count == 3 else images)  # (3, S, S) might be one picture in colour
    return path


def write_checkpoint(path, tree=None, seed=3):
    """A checkpoint of random weights; returns its path."""
    tree = tree or config()
    net = models.create_model(tree)
    randomise(net, seed)
    checkpoints.write_checkpoint(path, create_state(tree, net), to_dict(tree), tree.seed)
    return path


def write_detector(path, count=100):
    """A detector's folder, of random weights and `pictures`; returns its path."""
    checkpoint = write_checkpoint(path.with_suffix(".pth"))
    detector = Detector(open_model(checkpoint, device="cpu")).fit(pictures(count))
    spots = {"noise": {"kind": "noisy", "caught": 0.25, "images": 8, "rate": 0.05}}
    detector.save(path, blind_spots=spots, command="python calibrate.py")
    checkpoint.unlink()
    return path


@torch.no_grad()
def randomise(net, seed=3):
    """Fills a network with random weights, also those that start at about zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        fan_in = max(1, parameter[0].numel())
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)


def train(tree, workdir):
    """`training.train` on the CPU."""
    training.train(tree, workdir, CPU, "./data")


def reconstruct(workdir, checkpoint, sources, tree=None, mask=None, **options):
    """`reconstruction.run` on the CPU, of a `job`."""
    return reconstruction.run(job(workdir, checkpoint, sources, tree, mask, **options), CPU)


def job(workdir, checkpoint, sources, tree=None, mask=None, **options):
    """A `reconstruction.Job`; sources are side -> path, or (path, whether to crop)."""
    sources = {side: source if isinstance(source, tuple) else (str(source), True) for side, source in sources.items()}
    options = {"reps": 2, "batch_size": 4, **options}
    mask = mask or MaskOptions("checkerboard_alt")
    return reconstruction.Job(tree or config(), checkpoint, workdir, sources, mask, **options)


def inpainted(reconstruct, pixels, reps=2):
    """What a `Reconstructor` makes of images (B, C, H, W) uint8 under seed 0 and alternating checkerboards."""
    masks = MaskOptions("checkerboard_alt").stack(pixels.shape[-1], reps)
    return reconstruct(pixels, noise.seed_keys(0, noise.content_keys(pixels)), masks)


def snapshot(folder):
    """Every file below a folder -> its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def failing(number):
    """A function that fails as the operating system does with the error of that number."""

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


def same(a, b):
    """Whether two nests of dicts, lists, tensors and plain values are equal to the bit."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def start(*arguments, **options):
    """A Python process in the repository's root, not waited for."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, **pipes, **options)


def finish(process, timeout=300):
    """Waits; returns exit code, standard output, standard error."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, out, err


def killed_at(writes, work):
    """Runs work(write) in a child process for each number of a write to disk, at which the child is killed."""
    for write in writes:
        if child := os.fork():
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            continue
        flush, done = os.fsync, []

        def fsync(handle, write=write, flush=flush, done=done):
            done.append(handle)
            if len(done) == write:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(handle)

        files.os.fsync = fsync
        work(write)


def command(*arguments):
    """Runs a Python process to its end: exit code, standard output, standard error."""
    return finish(start(*arguments))


def forked(rows, folder):
    """Runs command lines as `tests/forked.py` does: rows [command, arguments, folder, encoding]; their outcomes."""
    table = folder / "rows.json"
    table.write_text(json.dumps([[name, [os.fsdecode(a) for a in words], str(at), to] for name, words, at, to in rows]))
    code, out, err = command("tests/forked.py", table)
    assert code == 0, err
    return json.loads(out)
