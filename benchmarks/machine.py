"""The machine's clock and matrix rate, counted operations, alternatives timed in turns, and tables of what came out."""

import argparse
import hashlib
import multiprocessing
import platform
import resource
import time
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from models import inference


class CpuClock:
    """Time and memory on the CPU.

    Attributes:
        device: torch.device.
        matrix_size: edge of the matrices whose product shows the best rate.
    """

    device = torch.device("cpu")
    matrix_size = 2048

    def seconds(self, call):
        """Seconds of one `call()`."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def peak(self):
        """The largest resident set that this process had, in bytes."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB

    def describe(self):
        """One line on the machine."""
        processor = platform.processor() or platform.machine()
        return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"


class GpuClock:
    """Time and memory on a GPU, by its own events and its own allocator; otherwise as `CpuClock`."""

    device = torch.device("cuda")
    matrix_size = 8192

    def seconds(self, call):
        """Seconds between two events around one `call()`, nothing else being at work on the GPU."""
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3

    def peak(self):
        """The most that this process's tensors took of the GPU's memory, in bytes."""
        return torch.cuda.max_memory_allocated()

    def describe(self):
        """One line on the GPU."""
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"


def clock():
    """The clock of the GPU if torch sees one, else of the CPU."""
    return GpuClock() if torch.cuda.is_available() else CpuClock()


def matrix_rate(clock, precision, seconds=2.0):
    """The best rate of a square matrix product in 'fp32', 'tf32' or 'bf16' on the clock's device, in FLOP/s."""
    size, dtype = clock.matrix_size, torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, size, size, device=clock.device).to(dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    with inference.arithmetic(precision):
        while time.perf_counter() < end:
            best = min(best, clock.seconds(lambda: a @ b))
    return 2 * size**3 / best


def flops(call):
    """Floating point operations of `call()`, forward and backward, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def in_turns(build, versions, arguments, rounds):
    """Times alternatives that take turns in processes of their own, each set up as it would be run.

    Args:
        build: a function of a module, called as build(version, *arguments) in the version's process; gives a function
            of no arguments.
        versions: names.
        arguments: what can be sent to a process.
        rounds: how often each is timed after one call to warm up.

    Returns:
        version -> (list of seconds, the first being that of the warm-up; peak memory in bytes, see the clock).

    Raises:
        RuntimeError: a process failed; its traceback is on standard error.
    """
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for version in versions:
        pipes[version], theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(theirs, build, version, arguments), daemon=True))
        processes[-1].start()
        theirs.close()  # so that the end of the process ends the pipe
    seconds = {version: [] for version in versions}
    try:
        for _ in range(rounds + 1):
            for version, pipe in pipes.items():
                pipe.send(True)
                seconds[version].append(pipe.recv())
        for pipe in pipes.values():
            pipe.send(False)
        results = {version: (seconds[version], pipe.recv()) for version, pipe in pipes.items()}
    except (EOFError, ConnectionError) as error:
        raise RuntimeError("a process of the benchmark failed; its traceback is above") from error
    for process in processes:
        process.join()
    return results


def _serve(pipe, build, version, arguments):
    call, own = build(version, *arguments), clock()
    while pipe.recv():
        pipe.send(own.seconds(call))
    pipe.send(own.peak())


def alternate(clock, calls, rounds):
    """Times alternatives in turns in this process, so that a busy machine slows all of them.

    Args:
        clock: as `clock()` gives.
        calls: name -> function of no arguments.
        rounds: how often each is timed, after one call to warm up.

    Returns:
        name -> list of seconds.
    """
    for call in calls.values():
        call()
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(clock.seconds(call))
    return seconds


def times(seconds):
    """The columns 'ms' and 'spread' of a list of seconds: the median, the least and the largest."""
    low, high = 1e3 * min(seconds), 1e3 * max(seconds)
    return {"ms": 1e3 * median(seconds), "spread": f"{low:.4g}-{high:.4g}"}


FORMATS = {
    **{"ms": ".2f", "plain ms": ".2f", "ours ms": ".2f", "first s": ".1f", "seconds": ".2f"},
    **{"evaluations/s": ".0f", "images/s": ".2f", "GFLOP/s": ".0f", "share": ".0%", "GB": ".1f"},
    **{"rate": ".2f", "evaluations": ".0f", "bits/dim": ".3f", "of the network": ".2%", "of proportion": ".2f"},
    **{"mean": ".3f", "low": ".3f", "high": ".3f", "minimum": ".3f"},
    **{"apart images/s": ".2f", "of apart": ".0%", "of ideal": ".0%"},
}  # of a table's columns; others are text or whole numbers


def show(rows):
    """Prints rows, column -> text, number or None, as they come, with a heading wherever the columns change."""
    columns = None
    for row in rows:
        if columns != row.keys():
            columns = row.keys()
            print("  ".join(name.rjust(_width(name)) for name in columns))
        cells = {name: "" if value is None else format(value, FORMATS.get(name, "")) for name, value in row.items()}
        print("  ".join(cell.rjust(_width(name)) for name, cell in cells.items()), flush=True)


def _width(column):
    return max(len(column), {"part": 14, "version": 18, "spread": 13, "method": 12}.get(column, 7))


def count(text):
    """A whole number from 1 on, as the type of an argument.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 1 on")
    return int(text)


def digest(tensor):
    """A short text that stands for a tensor's values."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]
