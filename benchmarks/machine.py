"""The machine's own float32 matrix rate, counted operations, and fair timing of alternatives; on the GPU if any."""

import hashlib
import importlib.util
import multiprocessing
import platform
import resource
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from models import inference


def device():
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def matrix_rate(size=2048, seconds=2.0):
    """The best rate of a matrix product of size x size in strict float32, in FLOP/s."""
    a, b = torch.randn(2, size, size, device=device())
    best, end = float("inf"), time.perf_counter() + seconds
    with inference.arithmetic("fp32"):
        while time.perf_counter() < end:
            best = min(best, timed(lambda: a @ b))
    return 2 * size**3 / best


def flops(call):
    """Floating point operations of `call()`, forward and backward, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def timed(call):
    """Seconds of one `call()`; on a GPU between two of its events, nothing else being at work."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def in_turns(build, versions, arguments, steps, rounds):
    """Alternatives that take turns in processes of their own, each set up as it would be run.

    Args:
        build: a function of a module, called as build(version, *arguments) in the version's process; gives step ->
            function of no arguments.
        versions: names.
        arguments: what can be sent to a process.
        steps: names of the steps, each timed `rounds` times after one call to warm up; a version may lack some.
        rounds: how often.

    Returns:
        (version, step) -> list of seconds; version -> its peak memory in bytes, of the GPU if there is one.
    """
    context, pipes, seconds, memory = multiprocessing.get_context("spawn"), {}, {}, {}
    for version in versions:
        pipes[version], theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, build, version, arguments), daemon=True).start()
    for step in steps:
        for turn in range(rounds + 1):
            for version, pipe in pipes.items():
                pipe.send(step)
                value = pipe.recv()
                if turn and value is not None:
                    seconds.setdefault((version, step), []).append(value)
    for version, pipe in pipes.items():
        pipe.send(None)
        memory[version] = pipe.recv()
    return seconds, memory


def _serve(pipe, build, version, arguments):
    calls = build(version, *arguments)
    while (step := pipe.recv()) is not None:
        pipe.send(timed(calls[step]) if step in calls else None)
    if torch.cuda.is_available():
        pipe.send(torch.cuda.max_memory_allocated())
    else:
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


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
    processor = platform.processor() or platform.machine()
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"
