"""The machine's own float32 matrix rate, counted operations, and fair timing of alternatives."""

import hashlib
import importlib.util
import platform
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode


def matrix_rate(size=2048, seconds=2.0):
    """The best rate of a float32 matrix product of size x size, in FLOP/s."""
    a, b = torch.randn(2, size, size)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, timed(lambda: a @ b))
    return 2 * size**3 / best


def flops(call):
    """Floating point operations of `call()`, forward and backward, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def timed(call):
    """Seconds of one `call()`."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def alternate(calls, rounds):
    """Seconds of each of some alternatives, measured in turns so that a busy machine slows all of them.

    Args:
        calls: name -> function of no arguments.
        rounds: how often each is called, after one call to warm up.

    Returns:
        name -> list of seconds.
    """
    for call in calls.values():
        call()
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(timed(call))
    return seconds


def median(values):
    """The median of a list of numbers."""
    return sorted(values)[len(values) // 2]


def load_config(path):
    """The config tree of a config file."""
    spec = importlib.util.spec_from_file_location("config", Path(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def digest(tensor):
    """A short text that stands for a tensor's values."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def describe():
    """One line on the machine."""
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
