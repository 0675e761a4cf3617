"""Fill a model's state dict with fixed values that any implementation can reproduce.

`fill_(state_dict)` writes every floating-point tensor in place from its name and
shape alone, so two implementations whose state dicts have the same names and
shapes hold the same weights without a weight file.  Buffers named in `KEEP`
(noise schedules that a constructor computes) are left as they are.
"""

import zlib

import torch

KEEP = ("sigmas",)


def fill_(state_dict):
    for name, tensor in state_dict.items():
        if not tensor.is_floating_point() or name.rsplit(".", 1)[-1] in KEEP:
            continue
        phase = (zlib.crc32(name.encode()) % 10007) / 10007 * 6.283185307179586
        index = torch.arange(tensor.numel(), dtype=torch.float64)
        wave = torch.sin(index * 12.9898 + phase) * 43758.5453
        wave = ((wave - wave.floor()) * 2 - 1).reshape(tensor.shape)
        if name.endswith("running_var"):
            value = 1 + 0.1 * wave
        elif tensor.dim() >= 2:
            fan_in = max(1, tensor[0].numel())
            value = wave * (6.0 / fan_in) ** 0.5
        elif name.endswith("weight"):
            value = 1 + 0.1 * wave
        else:
            value = 0.1 * wave
        tensor.copy_(value.to(tensor.dtype))
    return state_dict


def wave(shape, seed):
    """A fixed input in [-1, 1] of the given shape: sin(0.37 k + seed), k the flat index."""
    n = 1
    for s in shape:
        n *= s
    return torch.sin(torch.arange(n, dtype=torch.float64) * 0.37 + seed).reshape(shape).float()
