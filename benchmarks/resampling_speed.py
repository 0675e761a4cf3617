"""FIR resampling of NCSN++ alone: one depthwise convolution against zero insertion and a full convolution, in turns.

    python -m benchmarks.resampling_speed --batch_size 8

Both see the same images and must give the same numbers; the 3 channels are those of an image pyramid.
"""

import argparse

import torch

from basics import noise
from basics.machine import keep_freed_memory
from benchmarks import machine
from benchmarks.machine import median
from benchmarks.plain import PlainDown, PlainUp
from models.resample import Down, Up

TAPS = (1, 3, 3, 1)
SHAPES = [(3, 256), (128, 32), (256, 32), (256, 16)]  # channels and pixels an edge, of the larger side
KINDS = {"down": (Down, PlainDown, 1), "up": (Up, PlainUp, 2)}  # and how much smaller the input is


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    keep_freed_memory()
    print(f"taps {TAPS}, batch {options.batch_size}; {machine.describe()}")
    print(f"{'':5} {'channels':>8} {'pixels':>10} {'plain ms':>9} {'ours ms':>8} {'rate':>6}")
    for kind, (ours, plain, factor) in KINDS.items():
        for channels, size in SHAPES:
            edge = size // factor
            x = torch.rand((options.batch_size, channels, edge, edge), generator=noise.generator("benchmark"))
            with torch.no_grad():
                seconds = compare(ours(TAPS), plain(TAPS), x, options.rounds)
            pixels = f"{edge} to {edge * 2 if kind == 'up' else edge // 2}"
            times = f"{1e3 * seconds['plain']:9.2f} {1e3 * seconds['ours']:8.2f}"
            print(f"{kind:5} {channels:8} {pixels:>10} {times} {seconds['plain'] / seconds['ours']:5.1f}x", flush=True)


def compare(ours, plain, x, rounds):
    """Median seconds of both, which must agree: ours on a channels-last x (B, C, H, W), as in the network."""
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(last), plain(x), rtol=1e-5, atol=1e-6)
    seconds = machine.alternate({"plain": lambda: plain(x), "ours": lambda: ours(last)}, rounds)
    return {name: median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
