"""What a GPU makes of everything that takes time, in four minutes: ceilings, evaluations, reconstruction, training,
likelihood and start-up, the plain version and ours in the same run, and the levers that might make ours faster.

    python -m benchmarks.gpu --output results/gpu/
    python -m benchmarks.gpu --output results/gpu/ --rehearse    # every line, at the smallest size, on a CPU

Trials come in the order in which they are most wanted, those that compile last.  A row is printed and written to
{output}/rows.jsonl as soon as it is known; a trial that fails leaves its error there and the rest goes on; one that
by what it takes on an H100 does not fit into --seconds any more is left out and told.  {output}/table.md has all rows
at the end, also of a run that is stopped.

Times are those of the GPU's own events, medians after a call that warms up (`first s`, which compiles); shares are of
the GPU's rate of matrix products in the same precision, measured first; operations are those of the plain network;
errors are relative to strict float32 with the same weights; GB are the most that tensors took.
"""

import argparse
import copy
import dataclasses
import functools
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from basics import files
from basics.console import UserError, guard
from benchmarks import levers, machine, plain, speed
from command_line import read_config
from models import create_model, inference, layers

ROWS = "rows.jsonl"
COPIED = 2**30  # bytes of the copy that shows the memory's rate
LARGE, SMALL = "configs/subvp/cifar10_ddpm_continuous.py", "configs/subvp/fashion_mnist_small.py"
SHIPPED = "pretrained/fashion_mnist_small.safetensors"
ERROR_IMAGES = 64
OPENED = f"""
from lmd import open_model
model = open_model("{SHIPPED}")
import torch
x = torch.zeros(1, 1, 32, 32, device=model.device)
with torch.no_grad():
    model.score(x, torch.full((1,), 0.5, device=model.device)).sum().item()
"""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One row to come.

    Attributes:
        part: what is measured.
        version: how it is done.
        seconds: about how long that takes on an H100, start and compilation included.
        measure: called as measure(bench, trial), gives the other columns of the row.
    """

    part: str
    version: str
    seconds: float
    measure: Callable


@dataclasses.dataclass(frozen=True)
class Bench:
    """What trials are done with: sizes, the clock, and how often each call is timed."""

    clock: object
    large: str = LARGE
    small: str = SMALL
    evaluations: int = 512  # images a batch
    training: int = 128
    many: int = 4096
    likelihood: int = 256
    ckpt_path: str = SHIPPED  # of the likelihood, with the config `small`
    rounds: int = 8
    matrix_seconds: float = 1.0

    @functools.cached_property
    def rates(self):
        """Precision -> the device's rate of matrix products in FLOP/s."""
        precisions = ["bf16", "fp32"] + ["tf32"] * inference.has_tf32(self.clock.device)
        return {name: machine.matrix_rate(self.clock, name, self.matrix_seconds) for name in precisions}

    def timed(self, call):
        """Columns of a call: its first seconds, and the median and the spread of those of later ones."""
        first = self.clock.seconds(call)
        seconds = [self.clock.seconds(call) for _ in range(self.rounds)]
        return {**machine.times(seconds), "first s": first, "GB": self.clock.peak() / 1e9}

    def row(self, call, images, operations, precision):
        """Columns of a call that handles so many images, each of so many operations, in a precision."""
        columns = self.timed(call)
        rate = images / columns["ms"] * 1e3
        share = rate * operations / self.rates[precision] if precision in self.rates else None
        return {"batch": images, **columns, "images/s": rate, "TFLOP/s": rate * operations / 1e12, "share": share}


# -------------------------------------------------------------------------------------------------------- ceilings


def ceilings(bench, trial):
    """The rates of products in TFLOP/s and of a copy on the device in TB/s."""
    source = torch.empty(COPIED if bench.clock.device.type == "cuda" else 2**20, dtype=torch.uint8)
    source = source.to(bench.clock.device)
    target = torch.empty_like(source)
    columns = bench.timed(lambda: target.copy_(source))
    copied = 2 * source.numel() / columns["ms"] * 1e3  # read and written
    return {**{f"{name} TFLOP/s": rate / 1e12 for name, rate in bench.rates.items()}, "copy TB/s": copied / 1e12}


# ------------------------------------------------------------------------------------------------------ evaluations


def evaluation(precision, prepare, config_name, size, bench, trial):
    """Of a network for a batch of random images.

    Args:
        precision: of the rate that it is held against.
        prepare: called as prepare(net, config, device), gives a function of images and labels that gives what is timed.
        config_name, size: the field of `bench` that says the config, and the one that says how many images.
        bench, trial: as for all.
    """
    config, device = read_config(getattr(bench, config_name)), bench.clock.device
    x = speed.images(config, getattr(bench, size)).to(device)
    labels, net = torch.full((1,), 400.0, device=device), _network(config)
    exact = inference.prepare(copy.deepcopy(net), device, "fp32")
    network = prepare(net, config, device)
    with torch.no_grad():
        call = network(x, labels)
        columns = bench.row(call, len(x), speed.operations(config, False), precision)
        expected, found = exact(x[:ERROR_IMAGES], labels), call()[:ERROR_IMAGES]
    return columns | {"error": ((found - expected).norm() / expected.norm()).item()}


def _network(config):
    """A network of a config with weights in all layers: those that start at zero hide what comes before them."""
    torch.manual_seed(0)
    net = create_model(config)
    for weight in net.parameters():
        if weight.ndim > 1 and weight.detach().std() < 1e-3:
            layers.variance_scaling_(weight)
    return net


def _plainly(net, config, device):
    same = plain.plain_network(config)
    same.load_state_dict(net.state_dict())
    same = same.eval().requires_grad_(False).to(device)
    return lambda x, labels: lambda: same(x, labels.expand(len(x)))


def _by_autocast(net, config, device):
    network = inference.InPrecision(net.eval().requires_grad_(False).to(device), device, "bf16")
    return lambda x, labels: lambda: network(x, labels)


def _prepared(precision, compiled=False, last=False, fused=False, captured=False):
    def prepare(net, config, device):
        network = inference.prepare(net, device, precision, compiled)
        if last:
            network.net.to(memory_format=torch.channels_last)
        if fused:
            levers.fuse_norms(network.net)
        given = lambda x, labels: lambda: network(x, labels)
        return (lambda x, labels: levers.capture(given(x, labels), device)) if captured else given

    return prepare


def _tuned(net, config, device):
    network = inference.Network(net, device, "bf16")
    compiled = torch.compile(network.net.to(memory_format=torch.channels_last), mode="max-autotune")
    return lambda x, labels: lambda: compiled(x, labels).float()


# ------------------------------------------------------------------------------------ reconstruction and training


def fast(bench, trial):
    """The whole of --sampler fast for a batch; images are evaluations here."""
    config = read_config(bench.small)
    x = speed.images(config, bench.evaluations).to(bench.clock.device)
    model = speed.score_model(config, bench.clock.device, trial.version)
    evaluations = speed.amounts("fast", None, config)[1]
    call = speed.reconstruct_fast(config, model, x)
    return bench.row(call, evaluations * len(x), speed.operations(config, False), trial.version)


def training(precision, build, bench, trial):
    """A step; `build(config, x)` gives the function that is timed."""
    inference.resolve(precision, bench.clock.device)  # refuses what the device does not have
    config = read_config(bench.large)
    x = speed.images(config, bench.training).to(bench.clock.device)
    with inference.arithmetic(precision):
        return bench.row(build(config, x), len(x), speed.operations(config, True), precision)


def _ours(precision, compiled, mode="default"):
    return lambda config, x: speed.our_training(config, x, None, precision, compiled, mode)


# ------------------------------------------------------------------------------------------ likelihood and start-up


def likelihoods(bench, trial):
    """Of the demo's images by the shipped network, in seconds, with SciPy's solver (plain) or ours."""
    files = {"config": bench.small, "ckpt_path": bench.ckpt_path, "images": "demo/fashion_mnist.npz"}
    sizes = {"batch_size": bench.likelihood, "rounds": 1}
    rows = speed.likelihoods(argparse.Namespace(versions=trial.version, **files, **sizes), bench.clock)
    row = next(iter(rows))
    return {name: row[name] for name in ("seconds", "bits/dim", "evaluations")} | {"batch": bench.likelihood}


def start_up(command, bench, trial):
    """Seconds of a fresh process; the first of two, which finds its files outside of the memory, is `first s`."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return {"first s": seconds[0], "seconds": seconds[1]}


# ------------------------------------------------------------------------------------------------------------ plan


def trials():
    """All of them, the most wanted first."""
    bf16 = functools.partial(_prepared, "bf16")
    fused = functools.partial(bf16, last=True, fused=True)
    return [
        Trial("ceilings", "", 8, ceilings),
        _evaluation("plain fp32", 6, _plainly, "fp32"),
        _evaluation("tf32", 4, _prepared("tf32"), "tf32"),
        _evaluation("bf16, autocast", 4, _by_autocast),
        _evaluation("bf16", 4, bf16()),
        _evaluation("bf16, NHWC", 4, bf16(last=True)),
        _evaluation("bf16, graph", 5, bf16(captured=True)),
        _training("tf32", 5, _ours("tf32", False), "tf32"),
        _training("bf16", 5, _ours("bf16", False)),
        _training("bf16, graph", 6, lambda config, x: levers.captured_training(config, x, "bf16")),
        _small_evaluation("bf16", 3, bf16()),
        _small_evaluation("bf16, graph", 3, bf16(captured=True)),
        _small_evaluation("bf16, many", 3, bf16(), "many"),
        Trial("fast", "fp32", 5, fast),
        Trial("fast", "bf16", 4, fast),
        Trial("start-up", "recon.py --help", 2, functools.partial(start_up, ["recon.py", "--help"])),
        Trial("start-up", "first evaluation", 12, functools.partial(start_up, ["-c", OPENED])),
        Trial("likelihood", "ours", 12, likelihoods),
        _evaluation("bf16, NHWC, fused", 25, fused()),
        _evaluation("bf16, NHWC, fused, graph", 10, fused(captured=True)),
        _evaluation("bf16, compiled", 35, bf16(compiled=True)),
        _evaluation("bf16, compiled again", 15, bf16(compiled=True)),  # as a later run finds it
        _training("bf16, compiled", 70, _ours("bf16", True)),
        _training("bf16, compiled, graph", 60, _ours("bf16", True, "reduce-overhead")),  # each pass launched at once
        Trial("likelihood", "plain", 40, likelihoods),
        _evaluation("bf16, max-autotune", 120, _tuned),
    ]


def _evaluation(version, seconds, prepare, precision="bf16"):
    measure = functools.partial(evaluation, precision, prepare, "large", "evaluations")
    return Trial("evaluation", version, seconds, measure)


def _small_evaluation(version, seconds, prepare, size="evaluations"):
    return Trial("small evaluation", version, seconds, functools.partial(evaluation, "bf16", prepare, "small", size))


def _training(version, seconds, build, precision="bf16"):
    return Trial("training", version, seconds, functools.partial(training, precision, build))


def rehearsal(clock):
    """The bench at the smallest size."""
    sizes = {"evaluations": 2, "training": 2, "many": 3, "likelihood": 1, "rounds": 1, "matrix_seconds": 0.05}
    return Bench(clock, large=SMALL, **sizes)


def run(plan, bench, output, seconds):
    """Measures a plan's trials while there is time; gives the rows as they come, each written before.

    Args:
        plan: `Trial`s in their order.
        bench: a `Bench`.
        output: the folder, which exists, and where no `ROWS` are yet.
        seconds: for all of them.

    Yields:
        Rows, column -> text or number.
    """
    end = time.perf_counter() + seconds
    with (output / ROWS).open("x", encoding="utf-8") as file:
        for trial in plan:
            row = {"part": trial.part, "version": trial.version}
            left = end - time.perf_counter()
            if trial.seconds > left:
                row["note"] = f"left out: takes about {trial.seconds:.0f} s, {max(left, 0):.0f} s are left"
            else:
                row |= _attempted(trial, bench)
            file.write(json.dumps(row) + "\n")
            file.flush()
            yield row


def _attempted(trial, bench):
    """The columns of a trial, or its error; what it held is let go of."""
    torch.compiler.reset()
    if bench.clock.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        return trial.measure(bench, trial)
    except Exception as error:  # whatever it is: a lever that fails here must not cost the others
        return {"note": f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", required=True, type=Path, help="folder of the rows and the table")
    parser.add_argument("--seconds", type=float, default=240, help="for everything")
    parser.add_argument("--parts", default="", help="only these, separated by commas")
    parser.add_argument("--rehearse", action="store_true", help="everything at the smallest size, on a CPU, too")
    options = parser.parse_args(arguments)
    clock = machine.clock()
    if clock.device.type == "cpu" and not options.rehearse:
        raise UserError("torch sees no GPU, whose speed this measures; --rehearse does all of it small on the CPU")
    plan = [trial for trial in trials() if not options.parts or trial.part in options.parts.split(",")]
    if not plan:
        raise UserError(
            f"no part called {options.parts!r}; there are {', '.join(dict.fromkeys(t.part for t in trials()))}"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    if (options.output / ROWS).exists():
        raise UserError(f"{options.output} holds the rows of an earlier run; give another --output")
    print(clock.describe())
    rows = []
    try:
        for row in run(plan, rehearsal(clock) if options.rehearse else Bench(clock), options.output, options.seconds):
            print("  ".join(f"{name} {_cell(name, value)}" for name, value in row.items()), flush=True)
            rows.append({name: _cell(name, value) for name, value in row.items()})
    finally:
        files.write_text(options.output / "table.md", f"{clock.describe()}\n\n{_markdown(rows)}")
        print(f"rows: {options.output / ROWS}, as a table: {options.output / 'table.md'}")


def _markdown(rows):
    """A table of rows, column -> text, with all columns that any of them has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cell(name, value):
    if value is None or isinstance(value, str):
        return value or ""
    return format(value, FORMATS.get(name, ".3g"))


FORMATS = machine.FORMATS | {"batch": "d", "images/s": ",.0f", "error": ".1e", "TFLOP/s": ".1f"}

if __name__ == "__main__":
    guard(lambda _: main(), None, interrupted="interrupted")
