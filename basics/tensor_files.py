"""Reads tensors from files that may be damaged, foreign or crafted: torch's, and safetensors'.

What a file claims to hold is compared with its size before anything is made of it, and nothing is unpickled but
tensors, numbers, text, lists and dicts.
"""

import json
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from basics.zip_files import WrongFile, check_zip

_LARGEST_HEADER = 16 << 20  # bytes of a safetensors header; those of networks have a few hundred kilobytes


# ------------------------------------------------------------------------------------------------- torch's files


def read_torch(path, lazily=False):
    """What `torch.save` wrote to a file, on the CPU, weights-only; NumPy's numbers are allowed.

    Args:
        path: an existing file.
        lazily: to look at names, shapes and numbers alone: the tensors are not read (where the file's format allows).

    Raises:
        WrongFile: it is damaged or no torch file, claims more than it holds, or holds pickled code.
        OSError: it cannot be read.
    """
    try:
        is_zip = check_zip(path, checksums=not lazily)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_NUMPY_NUMBERS):
            warnings.simplefilter("ignore")  # torch remarks on the pickle protocol of files that are not its own
            return torch.load(path, map_location="cpu", weights_only=True, mmap=lazily and is_zip)
    except (OSError, WrongFile):
        raise
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise WrongFile("holds pickled code, which is not loaded because it could run anything") from error
        raise WrongFile("is damaged or is no torch file") from error
    except Exception as error:  # a damaged file can fail anywhere inside the reader
        raise WrongFile("is damaged or truncated") from error


class _NumberType:
    """Stands for a NumPy dtype while numbers are read, so that no state from the file reaches NumPy."""

    def __init__(self, name, *_):
        if not re.fullmatch(r"[<>|=]?([biu][1248]|b1|f[248]|\?)", str(name)):
            raise WrongFile(f"holds a NumPy type that is no number ({str(name)[:20]})")
        self.dtype = np.dtype(name)

    def __setstate__(self, state):
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


def _number(type_, data):
    """A NumPy scalar of its bytes."""
    if isinstance(data, str):  # as Python 2 wrote bytes
        data = data.encode("latin-1")
    return np.frombuffer(data, type_.dtype, count=1)[0]


# The published optimizer holds its learning rate as a NumPy float64 scalar.  NumPy's module names are those of before
# and after version 2.
_NUMPY_NUMBERS = [
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
    (_NumberType, "numpy.dtype"),
    _NumberType,
]


def is_plain(value):
    """Whether a value is a dense tensor of floating-point numbers, all of which are in its file."""
    return (
        torch.is_tensor(value)
        and is_stored(value)
        and value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    )


def is_stored(tensor):
    """Whether a tensor is dense, and all of its numbers are in its file."""
    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()  # not one number, many times
    )


def is_finite(value):
    """Whether all numbers of a tensor are finite in float32, which the networks have."""
    return bool(value.float().isfinite().all())


# -------------------------------------------------------------------------------------------- safetensors and JSON


def read_safetensors(path, lazily=False):
    """The tensors by name, on the CPU, and the text metadata of a safetensors file.

    Args:
        path: an existing file.
        lazily: to look at names and shapes alone: the tensors are on the meta device.

    Raises:
        WrongFile: it is damaged, or holds other than floating-point numbers.
        OSError: it cannot be read.
    """
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if size < 8 or header > min(size - 8, _LARGEST_HEADER):
        raise WrongFile("is damaged or truncated")
    try:
        with safe_open(path, framework="pt") as file:
            notes, names = dict(file.metadata() or {}), list(file.keys())
            if lazily:
                return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}, notes
            weights = {name: file.get_tensor(name) for name in names}
    except OSError:
        raise
    except Exception as error:  # safetensors' own, and torch's for numbers that it does not have
        raise WrongFile("is damaged or truncated") from error
    wrong = [name for name, value in weights.items() if not is_plain(value)]
    if wrong:
        raise WrongFile(f"holds {wrong[0][:80]} as {weights[wrong[0]].dtype}, and weights are floating-point numbers")
    return weights, notes


def parse_json(text):
    """The value of a JSON text.

    Raises:
        WrongFile: it is none, nested too deeply, or holds NaN or Infinity, which are none either.
    """

    def refuse(name):
        raise WrongFile(f"holds {name}, which is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except WrongFile:
        raise
    except (ValueError, RecursionError) as error:
        raise WrongFile("is no JSON") from error
