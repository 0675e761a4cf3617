"""What every config field may hold: its type, range and choices, once for all.

`FIELDS` mirrors the tree of `base.py`; `base.check` holds a config against it.  Choices that are keys of a table
elsewhere (solvers, SDEs, networks) are named here again, because this module imports nothing of theirs; a test holds
the two lists equal.
"""

import dataclasses
import re
import sys

from basics.console import UserError, choose, printable


@dataclasses.dataclass(frozen=True)
class Whole:
    """An int from `low` to `high`."""

    low: int = 0
    high: int | None = None

    def accepts(self, value):
        return type(value) is int and self.low <= value and (self.high is None or value <= self.high)

    def __str__(self):
        return f"an int {_range(f'of at least {self.low}', self.low, self.high)}"


@dataclasses.dataclass(frozen=True)
class Real:
    """A finite number from `low` to `high`; `above` and `below` are bounds that it may not reach itself."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def accepts(self, value):
        return (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and -sys.float_info.max <= value <= sys.float_info.max  # nor NaN; an int may be beyond all floats
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self):
        words = {"of at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        bounds = " and ".join(f"{word} {bound:g}" for word, bound in words.items() if bound is not None)
        return f"a finite number {bounds}".rstrip()


@dataclasses.dataclass(frozen=True)
class NonZero:
    """A finite number other than 0."""

    def accepts(self, value):
        return Real().accepts(value) and value != 0

    def __str__(self):
        return "a finite number other than 0"


@dataclasses.dataclass(frozen=True)
class Flag:
    """True or False."""

    def accepts(self, value):
        return isinstance(value, bool)

    def __str__(self):
        return "True or False"


@dataclasses.dataclass(frozen=True)
class Text:
    """Text that matches a pattern from end to end, which `form` describes."""

    form: str = "text"
    pattern: str = r"[^\0]*"

    def accepts(self, value):
        return isinstance(value, str) and re.fullmatch(self.pattern, value) is not None

    def __str__(self):
        return self.form


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some names, in capitals or not unless `exact`; `what` is what one of them is called in messages."""

    what: str
    names: tuple
    exact: bool = False

    def accepts(self, value):
        return isinstance(value, str) and (value if self.exact else value.lower()) in self.names

    def __str__(self):
        return f"one of: {', '.join(self.names)}"


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of some numbers."""

    numbers: tuple

    def accepts(self, value):
        return type(value) is int and value in self.numbers

    def __str__(self):
        return " or ".join(map(str, self.numbers))


@dataclasses.dataclass(frozen=True)
class Wholes:
    """A tuple or list of `count` to 64 ints, each from `low` to `high`; their sum is not 0 where there are any."""

    low: int = 1
    count: int = 0
    high: int | None = None

    def accepts(self, value):
        return (
            isinstance(value, (tuple, list))
            and self.count <= len(value) <= 64
            and all(Whole(self.low, self.high).accepts(item) for item in value)
            and (not value or sum(value) > 0)
        )

    def __str__(self):
        bounds = _range(f"of at least {self.low}", self.low, self.high)
        return f"a tuple of {'one or more ' if self.count else ''}ints {bounds}, such as (1, 2)"


def _range(least, low, high):
    return least if high is None else f"from {low} to {high}"


def check_value(path, value, kind):
    """Refuses a value, naming it, its place and its bounds.

    Args:
        path: what the user calls the place, such as "config.model.nf" or "--memory_gb".
        value: anything.
        kind: an entry of `FIELDS`.

    Raises:
        UserError: the value is of another type, out of range, or none of the choices.
    """
    if kind.accepts(value):
        return
    if isinstance(kind, Choice) and isinstance(value, str):
        choose(value if kind.exact else value.lower(), dict.fromkeys(kind.names), f"{kind.what} ({path})")
    raise UserError(f"{path} is {_short(value)}; it must be {kind}")


def _short(value):
    try:
        text = f"'{printable(value)}'" if isinstance(value, str) else repr(value)
    except ValueError:  # Python writes no int of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


ANY_TEXT, SOME_TEXT = Text(), Text("text that is not empty", r"[^\0]+")
DEVICE = Text("auto, cpu, cuda or cuda:i", r"auto|cpu|cuda(:[0-9]{1,3})?")
SEED = Whole(0, 2**63 - 1)
_SHARE, _POSITIVE, _AMOUNT = Real(low=0, high=1), Real(above=0, high=1e9), Real(low=0, high=1e9)

# Upper bounds: far above what can be of use, and low enough for a typing error not to ask for terabytes of memory.
STEPS = 1_000_000
WIDTH = 16_384  # channels of a level of the network: model.nf times an entry of model.ch_mult
BATCH_SIZE = Whole(1, 65_536)
MOST_WORKERS = 1024  # threads
_ITERATIONS, _NUMBER = Whole(0, 10**12), Whole(0, 1_000_000)
_PYRAMID = "pyramid"

FIELDS = {
    "seed": SEED,
    "device": DEVICE,
    "data": {
        "dataset": SOME_TEXT,
        "test_dataset": ANY_TEXT,
        "category": SOME_TEXT,
        "tfrecords_path": ANY_TEXT,
        "image_size": Whole(1, 8192),
        "num_channels": OneOf((1, 3)),
        "centered": Flag(),
        "random_flip": Flag(),
        "uniform_dequantization": Flag(),
    },
    "model": {
        "name": Choice("model", ("ddpm", "ncsnpp"), exact=True),
        "nf": Whole(4, 8192),  # fewer cannot hold the sines and cosines of a time
        "ch_mult": Wholes(count=1, high=128),
        "num_res_blocks": Whole(1, 128),
        "attn_resolutions": Wholes(high=8192),
        "resamp_with_conv": Flag(),
        "dropout": Real(low=0, below=1),
        "nonlinearity": Choice("nonlinearity", ("swish", "relu", "elu", "lrelu")),
        "normalization": Choice("normalization", ("GroupNorm",), exact=True),
        "conditional": Flag(),
        "embedding_type": Choice("embedding", ("fourier", "positional")),
        "fourier_scale": _POSITIVE,
        "scale_by_sigma": Flag(),
        "ema_rate": _SHARE,
        "resblock_type": Choice("block", ("ddpm", "biggan")),
        "fir": Flag(),
        "fir_kernel": Wholes(low=0, count=1, high=1_000_000),
        "skip_rescale": Flag(),
        "progressive": Choice(_PYRAMID, ("none", "output_skip", "residual")),
        "progressive_input": Choice(_PYRAMID, ("none", "input_skip", "residual")),
        "progressive_combine": Choice("choice", ("sum", "cat")),
        "init_scale": _AMOUNT,
        "attention_type": Choice("attention", ("ddpm",), exact=True),
        "conv_size": OneOf((3,)),
        "num_scales": Whole(1, STEPS),
        "beta_min": _POSITIVE,
        "beta_max": _POSITIVE,
        "sigma_min": _POSITIVE,
        "sigma_max": _POSITIVE,
        "sigma_begin": _POSITIVE,
    },
    "training": {
        "sde": Choice("SDE", ("vpsde", "subvpsde", "vesde")),
        "continuous": Flag(),
        "likelihood_weighting": Flag(),
        "reduce_mean": Flag(),
        "batch_size": BATCH_SIZE,
        "n_iters": _ITERATIONS,
        "log_freq": _ITERATIONS,
        "eval_freq": _ITERATIONS,
        "snapshot_freq": _ITERATIONS,
        "snapshot_freq_for_preemption": _ITERATIONS,
        "snapshot_sampling": Flag(),
        "precision": Choice("precision", ("auto", "bf16", "tf32", "fp32"), exact=True),
        "compile": Choice("choice", ("auto", "on", "off"), exact=True),
    },
    "sampling": {
        "method": Choice("method", ("pc", "ode")),
        "predictor": Choice("predictor", ("euler_maruyama", "reverse_diffusion", "ancestral_sampling", "none")),
        "corrector": Choice("corrector", ("langevin", "ald", "none")),
        "n_steps_each": Whole(1, 1000),
        "snr": _POSITIVE,
        "noise_removal": Flag(),
        "probability_flow": Flag(),
        "sampler": Choice("sampler", ("published", "ddim", "dpmpp_2m", "sde_dpmpp_2m"), exact=True),
        "steps": Whole(0, STEPS),
        "time_grid": Choice("time grid", ("uniform", "lambda"), exact=True),
        "t_start": Real(above=0, high=1),
        "t_end": Real(low=0, below=1),
        "eta": _SHARE,
        "constraint": Choice("constraint", ("replace", "project"), exact=True),
        "returns": Whole(0, 1000),
        "lift": Choice("lift", ("mask", "noise", "both"), exact=True),
    },
    "optim": {
        "optimizer": Choice("optimizer", ("adam",)),
        "lr": _POSITIVE,
        "beta1": Real(low=0, below=1),
        "eps": _POSITIVE,
        "weight_decay": _AMOUNT,
        "amsgrad": Flag(),
        "warmup": _ITERATIONS,
        "cooldown": _ITERATIONS,
        "grad_clip": NonZero(),
    },
    "eval": {
        "begin_ckpt": _NUMBER,
        "end_ckpt": _NUMBER,
        "batch_size": BATCH_SIZE,
        "enable_loss": Flag(),
        "enable_sampling": Flag(),
        "num_samples": Whole(1, 100_000_000),
        "enable_bpd": Flag(),
        "bpd_dataset": Choice("split", ("train", "test"), exact=True),
        "n_samples": Whole(1, 100_000_000),
        "recon_ckpt": _NUMBER,
    },
}

# Fields that a config may lack although the tree gives them a value: some published configs do, and configs of earlier
# versions.
OPTIONAL = {
    *("training.precision", "training.compile", "optim.cooldown"),
    *("data.test_dataset", "model.beta_min", "model.beta_max"),
    *(f"eval.{name}" for name in ("enable_loss", "enable_sampling", "enable_bpd", "bpd_dataset")),
    *("eval.n_samples", "eval.recon_ckpt"),
}

# What one value makes another field necessary: (field, its values, what they need).
NEEDED_WITH = (
    (
        "model.name",
        ("ncsnpp",),
        [
            f"model.{name}"
            for name in (
                *("resblock_type", "fir", "fir_kernel", "skip_rescale", "progressive", "progressive_input"),
                *("progressive_combine", "init_scale"),
            )
        ],
    ),
    ("training.sde", ("vpsde", "subvpsde"), ["model.beta_min", "model.beta_max"]),
    ("eval.enable_bpd", (True,), ["eval.bpd_dataset"]),
)
