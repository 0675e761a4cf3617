"""How fast the networks, training and reconstruction are, ours beside a plainly written version, in turns in one run.

    python -m benchmarks.speed
    python -m benchmarks.speed --parts evaluation,resampling --config configs/ve/cifar10_ncsnpp_continuous.py
    python -m benchmarks.speed --parts training,reconstruction,fast --versions plain,ours,ours-bf16,ours-bf16-compiled
    python -m benchmarks.speed --parts growth --batch_size 8 --rounds 1

On the GPU if torch sees one.  The parts:

- evaluation: of the network, for a batch;
- training: a step, in the version's precision; compiled, its first call compiles both passes;
- reconstruction: a step of the published loop; images/s are for its 1000 steps (and one repetition);
- fast: the whole reconstruction of a batch with --sampler fast;
- likelihood: of the first of --images by the network of --ckpt_path, ours: with SciPy's solver on the CPU and one step
  size for the batch (plain), and with ours;
- noise: the two keyed draws of a reconstruction step, and the global generator's;
- resampling: NCSN++'s FIR filters alone, on an image pyramid's 3 channels and on features;
- growth: how the cost of --sampler fast grows with images, steps, repetitions and pixels; the last column is 1 on a
  straight line through the origin.

In the first four each version has a process of its own, set up as it would be run.  The plain training step and loop
are those of the sub-VP SDE; with another, ours alone are timed.  `first s` is the call that warms up (and compiles).
Operations are those of the plain network by torch's counter, so a rearrangement that saves some shows as a higher
rate.  The share is of the device's own rate of matrix products in the same precision, measured in the same run.  GB are
the largest resident set of the process, or on a GPU the most that its tensors took there.
"""

import argparse
import dataclasses
import functools

import torch

import datasets
import losses
import sde_lib
from basics import noise
from basics.console import choose, guard
from basics.machine import keep_freed_memory
from basics.pixels import dequantize, to_model_range
from benchmarks import machine, plain
from benchmarks.machine import median
from command_line import read_config
from lmd import likelihood
from lmd.process import create_process, preset
from lmd.reconstructor import MaskOptions, Reconstructor
from lmd.trained_model import load_model, rows_within
from models import create_model, inference
from models.resample import Down, Up
from models.score import ScoreModel

MASK = MaskOptions("checkerboard_alt", num_blocks=8)
PUBLISHED_STEPS = 1000
VERSIONS = {  # -> precision, whether compiled
    "plain": ("fp32", False),
    "ours": ("fp32", False),
    "ours-compiled": ("fp32", True),
    "ours-tf32": ("tf32", False),
    "ours-tf32-compiled": ("tf32", True),
    "ours-bf16": ("bf16", False),
    "ours-bf16-compiled": ("bf16", True),
}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/subvp/fashion_mnist_small.py")
    parser.add_argument("--batch_size", type=machine.count, default=32)
    parser.add_argument("--parts", default="evaluation,training,reconstruction,fast,noise", help=", ".join(PARTS))
    parser.add_argument("--versions", default="plain,ours", help=", ".join(VERSIONS))
    parser.add_argument("--steps", type=machine.count, default=2, help="of the published loop, timed together")
    parser.add_argument("--rounds", type=machine.count, default=5)
    parser.add_argument("--ckpt_path", default="pretrained/fashion_mnist_small.safetensors", help="of the likelihood")
    parser.add_argument("--images", default="demo/fashion_mnist.npz", help="of the likelihood")
    options = parser.parse_args(arguments)
    names, versions, clock = options.parts.split(","), options.versions.split(","), machine.clock()
    parts = [choose(name, PARTS, "part (--parts)") for name in names]
    for version in versions:
        inference.resolve(choose(version, VERSIONS, "version (--versions)")[0], clock.device)
    if clock.device.type == "cpu":
        keep_freed_memory()
    print(f"{options.config}, batch {options.batch_size}; {clock.describe()}")
    if any(name in OURS for name in names):
        print(f"an evaluation of an image: {operations(read_config(options.config), False) / 1e9:.3f} GFLOP")
        for precision in sorted({VERSIONS[version][0] for version in versions}):
            print(f"{precision} matrix product: {matrix_rate(clock, precision) / 1e9:.0f} GFLOP/s", flush=True)
    machine.show(row for part in parts for row in part(options, clock))


# ------------------------------------------------------------------------------------- versions beside each other


def compare(part, options, clock):
    """Rows of a part that every version has in its own way: an evaluation, a step or a reconstruction."""
    config = read_config(options.config)
    steps, evaluations, per_image = amounts(part, options, config)
    versions = [name for name in options.versions.split(",") if _has(name, part, config)]
    results = machine.in_turns(call_of, versions, (part, options), options.rounds)
    work = options.batch_size * evaluations * operations(config, part == "training")
    for version, ((first, *seconds), peak) in results.items():
        precision, time = VERSIONS[version][0], median(seconds)
        count = options.batch_size * evaluations / time
        yield {
            **{"part": part, "version": version, "precision": precision},
            **machine.times([value / steps for value in seconds]),
            **{"evaluations/s": count, "images/s": count / per_image},
            **{"GFLOP/s": work / time / 1e9, "share": work / time / matrix_rate(clock, precision)},
            "rate": median(results["plain"][0][1:]) / time if "plain" in results else None,
            **{"first s": first, "GB": peak / 1e9},
        }


def amounts(part, options, config):
    """What one timed call does: steps, evaluations of each image; and the evaluations that an image needs in all."""
    if part in ("evaluation", "training"):
        return 1, 1, 1
    sde = sde_lib.create_sde(config)
    if part == "reconstruction":
        per_image = create_process(published(config), sde).evaluations
        return options.steps, per_image * options.steps // PUBLISHED_STEPS, per_image
    config, reps = fast(config)
    evaluations = reps * create_process(config, sde).evaluations
    return 1, evaluations, evaluations


def _has(version, part, config):
    subvp = isinstance(sde_lib.create_sde(config), sde_lib.SubVPSDE)
    return version != "plain" or part == "evaluation" or (part != "fast" and subvp)


def operations(config, backward):
    """Of one evaluation of one image by the plain network, with or without the gradients."""
    net, x = plain.plain_network(config), images(config, 1)
    if backward:
        return machine.flops(lambda: net.train()(x, torch.ones(1)).square().mean().backward())
    return machine.flops(lambda: net.eval().requires_grad_(False)(x, torch.ones(1)))


matrix_rate = functools.cache(machine.matrix_rate)  # of a clock and a precision


def images(config, batch_size):
    """A batch in the model's range: (B, C, H, W)."""
    shape = (batch_size, config.data.num_channels, config.data.image_size, config.data.image_size)
    return torch.rand(shape, generator=noise.generator("benchmark")) * 2 - 1


def call_of(version, part, options):
    """What is timed of a version, in its own process."""
    config, device = read_config(options.config), machine.clock().device
    x = images(config, options.batch_size).to(device)
    if version == "plain":
        call = PLAIN[part](config, x, options.steps)
    else:
        if device.type == "cpu":
            keep_freed_memory()
        call = OURS[part](config, x, options.steps, *VERSIONS[version])
    return inference.arithmetic(VERSIONS[version][0])(call)


# The functions of `PLAIN` and `OURS` take the config, a batch (B, C, H, W) on the device, the steps of the published
# loop and, ours, the precision and whether to compile; they give a function of no arguments, which is timed.


def plain_evaluation(config, x, steps):
    net, labels = _plain_frozen(config, x), torch.ones(len(x), device=x.device)
    return lambda: net(x, labels)


def plain_training(config, x, steps):
    net = plain.plain_network(config).train().to(x.device)
    training = plain.PlainTraining(net, sde_lib.create_sde(config), config)
    return lambda: training.step(x)


def plain_reconstruction(config, x, steps):
    net, sde = _plain_frozen(config, x), sde_lib.create_sde(config).with_steps(PUBLISHED_STEPS)
    mask = MASK.stack(x.shape[-1], 1).to(x.device)
    return lambda: plain.plain_inpaint(net, sde, x, mask, steps)


def _plain_frozen(config, x):
    return plain.plain_network(config).eval().requires_grad_(False).to(x.device)


def our_evaluation(config, x, steps, *prepared):
    net, labels = inference.prepare(create_model(config), x.device, *prepared), torch.ones(1, device=x.device)
    return torch.no_grad()(lambda: net(x, labels))


def our_training(config, x, steps, precision, compiled, mode="default"):
    sde = sde_lib.create_sde(config)
    net = create_model(config).train().to(x.device, memory_format=inference.layout(x.device, compiled))
    state, loss = losses.create_state(config, net), losses.create_loss(config, sde)
    network = inference.InPrecision(torch.compile(net, mode=mode) if compiled else net, x.device, precision)
    model = ScoreModel(network, sde, config.training.continuous)

    def train():
        draws = losses.Draws.keyed(x.shape, sde.N, config.seed, "train", state.step, device=x.device)
        return losses.train_step(state, loss, model, x, draws, config).item()

    return train


def our_reconstruction(config, x, steps, *prepared):
    model = score_model(config, x.device, *prepared)
    process = create_process(published(config), model.sde)
    process = dataclasses.replace(process, times=process.times[:steps])
    mask, source = MASK.stack(x.shape[-1], 1).to(x.device), keyed(x)
    return lambda: process.inpaint(model, x, mask, source)


def our_fast(config, x, steps, *prepared):
    return reconstruct_fast(config, score_model(config, x.device, *prepared), x)


PLAIN = {"evaluation": plain_evaluation, "training": plain_training, "reconstruction": plain_reconstruction}
OURS = {"evaluation": our_evaluation, "training": our_training, "reconstruction": our_reconstruction, "fast": our_fast}


def score_model(config, device, *prepared):
    """The score model with random weights, made ready for inference."""
    net = inference.prepare(create_model(config), device, *prepared)
    return ScoreModel(net, sde_lib.create_sde(config), config.training.continuous)


def keyed(x):
    """The noise source of a batch (B, C, H, W)."""
    return noise.KeyedNoise(noise.image_keys(0, torch.arange(len(x)), [0]), x.shape[1:], x.device)


def published(config):
    """The config with the steps of the published loop."""
    config = config.copy_and_resolve_references()
    config.sampling.steps = PUBLISHED_STEPS
    return config


def fast(config, **changes):
    """The config of --sampler fast, or with changes of its values, and its repetitions."""
    values, reps = preset("fast", config)
    config = config.copy_and_resolve_references()
    config.sampling.update({**values, **changes})
    return config, reps


def reconstruct_fast(config, model, x, reps=None, **changes):
    """A function that reconstructs a whole batch x (B, C, H, W) as recon.py does."""
    config, preset_reps = fast(config, **changes)
    reps, device = reps or preset_reps, x.device
    # On a GPU recon.py measures what fits, which is more than is benchmarked.
    rows = reps * len(x) if device.type == "cuda" else rows_within(None, config, device)
    reconstruct = Reconstructor(config, model, device, rows)
    pixels = ((x.cpu() + 1) * 127.5).to(torch.uint8)
    keys, masks = noise.seed_keys(0, noise.content_keys(pixels)), MASK.stack(pixels.shape[-1], reps)
    return lambda: reconstruct(pixels, keys, masks)


# ---------------------------------------------------------------------------------------------------- single parts


def keyed_noise(options, clock):
    """Rows of the two keyed draws of a reconstruction step and the global generator's, beside the network's time."""
    config = read_config(options.config)
    x = images(config, options.batch_size).to(clock.device)
    source = keyed(x)
    calls = {
        "network": our_evaluation(config, x, 0, "fp32"),
        "keyed": lambda: (source(1, "constrain"), source(1, "predictor")),
        "global": lambda: (torch.randn_like(x), torch.randn_like(x)),
    }
    seconds = machine.alternate(clock, calls, 2 * options.rounds)
    for name in ("keyed", "global"):
        share = median(seconds[name]) / median(seconds["network"])
        yield {"part": "noise", "draws": name, **machine.times(seconds[name]), "of the network": share}


def likelihoods(options, clock):
    """Rows of the likelihoods of a batch by two solvers, which must agree; bits and evaluations are means."""
    config = read_config(options.config)
    model, _ = load_model(config, options.ckpt_path, clock.device, "fp32")
    size = {"image_size": config.data.image_size, "num_channels": config.data.num_channels}
    pixels = datasets.load(options.images, split="test", **size).read(0, options.batch_size)
    generator = noise.generator("benchmark")
    x = to_model_range(dequantize(to_model_range(pixels, centered=False), generator), config.data.centered)
    given = model, model.sde, x.to(clock.device), likelihood.rademacher(x.shape, generator).to(clock.device)
    solvers = {"plain": plain.plain_log_likelihood, "ours": likelihood.log_likelihood}
    solvers = {name: solver for name, solver in solvers.items() if name in options.versions.split(",")}
    results = {}

    def call(name):
        density, *_, evaluations = solvers[name](*given)
        bits = likelihood.bits_per_dimension(density.cpu(), x[0].numel(), config.data.centered)
        results[name] = bits, torch.as_tensor(evaluations).double().mean().item()

    seconds = machine.alternate(clock, {name: functools.partial(call, name) for name in solvers}, options.rounds)
    first = next(iter(results.values()))[0]  # (B,)
    for name, (bits, evaluations) in results.items():
        torch.testing.assert_close(bits, first, rtol=0, atol=0.01)
        rate = median(seconds["plain"]) / median(seconds[name]) if "plain" in seconds else None
        yield {
            **{"part": "likelihood", "version": name, "seconds": median(seconds[name])},
            **{"spread": f"{min(seconds[name]):.4g}-{max(seconds[name]):.4g}"},
            **{"bits/dim": bits.mean().item(), "evaluations": evaluations, "rate": rate},
        }


TAPS = (1, 3, 3, 1)
SHAPES = [(3, 256), (128, 32), (256, 32), (256, 16)]  # channels and pixels an edge, of the larger side
FILTERS = {"down": (Down, plain.PlainDown, 1), "up": (Up, plain.PlainUp, 2)}  # and how much smaller the input is


@torch.no_grad()
def resampling(options, clock):
    """Rows of the FIR filters: one depthwise convolution against zero insertion and a full convolution.

    Both see the same images, ours in the network's layout, and must give the same numbers.
    """
    for kind, (ours, theirs, factor) in FILTERS.items():
        for channels, size in SHAPES:
            edge = size // factor
            x = torch.rand((options.batch_size, channels, edge, edge), generator=noise.generator("benchmark"))
            x = x.to(clock.device)
            last = x.contiguous(memory_format=inference.layout(clock.device))
            plainly, our = (version(TAPS).to(clock.device) for version in (theirs, ours))
            calls = {"plain": functools.partial(plainly, x), "ours": functools.partial(our, last)}
            with inference.arithmetic("fp32"):
                torch.testing.assert_close(calls["ours"](), calls["plain"](), rtol=1e-5, atol=1e-6)
                seconds = machine.alternate(clock, calls, 4 * options.rounds)
            time = {name: 1e3 * median(values) for name, values in seconds.items()}
            yield {
                **{"part": "resampling", "filter": kind, "channels": channels, "from": edge},
                **{"to": edge * 2 if kind == "up" else edge // 2, "plain ms": time["plain"], "ours ms": time["ours"]},
                "rate": time["plain"] / time["ours"],
            }


def growth(options, clock):
    """Rows of the cost of --sampler fast with one number changed at a time, and its share of proportion."""
    config = read_config(options.config)
    model, batch = score_model(config, clock.device, "fp32"), options.batch_size
    x = images(config, 4 * batch).to(clock.device)
    steps, size = fast(config)[0].sampling.steps, config.data.image_size
    call = functools.partial(reconstruct_fast, config, model)
    series = {
        "images": {n * batch: call(x[: n * batch]) for n in (1, 2, 3, 4)},
        "steps": {n * steps: call(x[:batch], steps=n * steps) for n in (1, 2, 4, 8)},
        "repetitions": {n: call(x[:batch], reps=n) for n in (2, 4, 8, 16)},
        "pixels": {
            (n * size) ** 2: call(torch.nn.functional.interpolate(x[:batch], size=n * size)) for n in (1, 2, 3, 4)
        },
    }
    for name, calls in series.items():
        seconds = {n: median(values) for n, values in machine.alternate(clock, calls, options.rounds).items()}
        first = next(iter(seconds))
        for n, value in seconds.items():
            proportion = value / seconds[first] * first / n
            yield {"part": "growth", "of": name, "number": n, "seconds": value, "of proportion": proportion}


PARTS = {
    **{name: functools.partial(compare, name) for name in OURS},
    **{"likelihood": likelihoods, "noise": keyed_noise, "resampling": resampling, "growth": growth},
}

if __name__ == "__main__":
    guard(lambda _: main(), None, interrupted="interrupted")
