"""Running out of memory: how it is recognised, let go of and explained, and how much of a GPU's work fits at once."""

import contextlib
import gc
import math

import torch

from basics.console import UserError

SHARE = 0.8  # of the free memory that is planned with: the allocator leaves gaps, and a large batch may need workspaces
PROBE = 32  # rows at most that are measured
# How libraries call it, cuDNN, cuBLAS and the CPU's allocator among them, whose errors are plain RuntimeErrors.
_ALLOCATION_FAILED = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "alloc_failed",
)


def ran_out(error):
    """Whether an exception says that memory could not be had, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _ALLOCATION_FAILED)


def attempt(work, *arguments):
    """The result of work(*arguments), or None where memory ran out.

    An exception keeps alive what the calls that it went through held.  So what is to be done then is left to the
    caller, after the exception is gone and its memory was given back.
    """
    try:
        return work(*arguments)
    except Exception as error:
        if not ran_out(error):
            raise
    give_back()
    return None


def give_back():
    """Frees what nothing refers to any more."""
    gc.collect()  # frames of an exception may refer to each other
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def explained(device, remedy):
    """A block in which running out of memory becomes one line.

    Args:
        device: what has too little memory.
        remedy: what the line says then, such as 'for 4 images at once; lower --batch_size'.

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
        return
    except Exception as error:
        if not ran_out(error):
            raise
    raise UserError(f"{device} has too little memory {remedy}") from None


def check_budget(memory_gb):
    """Refuses a budget that is no number of gigabytes; None stands for none.

    Raises:
        UserError: it is not above 0, or not finite.
    """
    if memory_gb is not None and not (math.isfinite(memory_gb) and memory_gb > 0):
        raise UserError(f"--memory_gb must be a number above 0, not {memory_gb:g}")


def rows_that_fit(work, device, most, memory_gb=None):
    """How many rows a GPU holds at once, from what few of them were seen to need.

    Args:
        work: called as work(rows), does what is to be done later, with few rows.
        device: torch.device, a GPU.
        most: rows that are wanted at most.
        memory_gb: the largest budget; by default `SHARE` of what is free.

    Returns:
        1 .. most.

    Raises:
        UserError: not one fits.
    """
    free = _free(device)  # bytes
    budget = SHARE * free if memory_gb is None else min(memory_gb * 1e9, free)
    one = _needed(work, 1, device)
    if one is None:
        raise UserError(f"{device} has too little memory for one image: {free / 1e9:.1f} GB are free")
    rows = max(1, min(PROBE, most, int(budget / 4 / one)))  # far from the limit: one row has all fixed costs
    several = _needed(work, rows, device)
    each = one if several is None else min(one, several / rows)
    if memory_gb is not None and each > budget:
        raise UserError(f"--memory_gb {memory_gb:g} is too little: one image needs about {each / 1e9:.3f}")
    return max(1, min(most, int(budget / each)))


def _free(device):
    """Bytes that can still be had on a GPU: those of the device, and those that torch keeps without use."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _needed(work, rows, device):
    """Bytes by which work(rows) raises what is allocated, at its peak; None where they could not be had."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    if attempt(_done, work, rows) is None:
        return None
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    return max(1, peak - before)


def _done(work, rows):
    work(rows)
    return True
