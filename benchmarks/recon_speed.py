"""Reconstruction: the published loop written plainly and ours at equal settings, and ours with --sampler fast.

    python -m benchmarks.recon_speed
    python -m benchmarks.recon_speed --config configs/subvp/cifar10_ddpm_continuous.py --batch_size 8 --steps 2
    python -m benchmarks.recon_speed --growth

Each version has a process of its own, and they take turns in one run.  `published` are --steps steps of the published
loop (Euler-Maruyama, 1000 steps an image); `fast` is the whole reconstruction of a batch with --sampler fast.
Operations are those of the plain network by torch's counter, the share is of the machine's own float32 matrix rate.

--growth shows how the cost grows with images, steps, repetitions and resolution: seconds, and their share of what
proportion to the smallest would give.
"""

import argparse
import dataclasses

import torch

import sde_lib
from basics import noise
from basics.machine import keep_freed_memory
from benchmarks import machine, plain
from benchmarks.machine import device, load_config, median
from benchmarks.network_speed import images
from lmd import reconstruction
from lmd.process import PRESETS, create_process, preset
from models import create_model, inference
from models.score import ScoreModel

MASK = reconstruction.MaskOptions("checkerboard_alt", num_blocks=8)
PUBLISHED_STEPS = 1000
# version -> arguments of models.inference.prepare
VERSIONS = {
    "plain": None,
    "ours": {"precision": "fp32"},
    "ours compiled": {"precision": "fp32", "compiled": True},
    "ours bf16": {"precision": "bf16"},
    "ours bf16 compiled": {"precision": "bf16", "compiled": True},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/subvp/fashion_mnist_small.py")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--versions", default=",".join(VERSIONS))
    parser.add_argument("--growth", action="store_true")
    options = parser.parse_args()
    print(f"{options.config}, batch {options.batch_size}; {machine.describe()}")
    if options.growth:
        growth(options)
    else:
        compare(options)


def compare(options):
    """Times the versions and prints the table."""
    config = load_config(options.config)
    net, x = plain.plain_network(config).eval().requires_grad_(False), images(config, 1).cpu()
    operations = machine.flops(lambda: net(x, torch.ones(1)))  # of one evaluation of one image
    rate = machine.matrix_rate()
    print(f"float32 matrix rate: {rate / 1e9:.0f} GFLOP/s; an evaluation: {operations / 1e9:.3f} GFLOP")
    print(
        f"{'setting':10} {'version':19} {'ms':>8} {'spread':>13} {'evaluations/s':>13} {'images/s':>9} {'GFLOP/s':>8} "
        f"{'share':>6} {'of plain':>8} {'GB':>5}"
    )
    versions = options.versions.split(",")
    arguments = (options.config, options.batch_size, options.steps)
    seconds, memory = machine.in_turns(calls_of, versions, arguments, ("published", "fast"), options.rounds)
    values, reps = PRESETS["fast"]
    evaluations = {"published": options.steps, "fast": values["steps"] * reps}
    per_image = {"published": PUBLISHED_STEPS, "fast": values["steps"] * reps}
    for (version, setting), times in seconds.items():
        time, count = median(times), options.batch_size * evaluations[setting]
        relative = time / median(seconds["plain", setting]) if ("plain", setting) in seconds else None
        print(
            f"{setting:10} {version:19} {1e3 * time:8.0f} {1e3 * min(times):6.0f}-{1e3 * max(times):<6.0f} "
            f"{count / time:13.0f} {count / time / per_image[setting]:9.2f} {operations * count / time / 1e9:8.0f} "
            f"{operations * count / time / rate:6.0%} {f'{relative:.2f}' if relative else '':>8} "
            f"{memory[version] / 1e9:5.1f}"
        )


def calls_of(version, path, batch_size, steps):
    """The settings of a version, in its own process."""
    config = load_config(path)
    x, sde = images(config, batch_size).to(device()), sde_lib.create_sde(config)
    if version == "plain":
        net = plain.plain_network(config).eval().requires_grad_(False).to(device())
        mask = MASK.stack(x.shape[-1], 1)[:1].to(device())
        sde.N = PUBLISHED_STEPS
        strict = inference.arithmetic("fp32")
        return {"published": strict(lambda: plain.plain_inpaint(net, sde, x, mask, steps))}
    if device().type == "cpu":
        keep_freed_memory()
    model = prepared(config, VERSIONS[version])
    return {"published": lambda: published(config, model, x, steps), "fast": lambda: fast(config, model, x)}


def prepared(config, options):
    """The score model with random weights, made ready for inference."""
    net = inference.prepare(create_model(config), device(), **options)
    return ScoreModel(net, sde_lib.create_sde(config))


def published(config, model, x, steps):
    """The first `steps` steps of the published loop."""
    config.sampling.steps = PUBLISHED_STEPS
    process = create_process(config, model.sde)
    config.sampling.steps = 0
    mask = MASK.stack(x.shape[-1], 1)[:1].to(x.device)
    source = noise.KeyedNoise(noise.image_keys(0, torch.arange(len(x)), [0]), x.shape[1:], x.device)
    return dataclasses.replace(process, times=process.times[:steps]).inpaint(model, x, mask, source)


def fast(config, model, x, reps=None, **changes):
    """A whole batch with --sampler fast, or with changes of its values."""
    config = config.copy_and_resolve_references()
    values, preset_reps = preset("fast", config)
    config.sampling.update({**values, **changes})
    pixels = ((x.cpu() + 1) * 127.5).to(torch.uint8)
    reps = preset_reps if reps is None else reps
    reconstruct = reconstruction.Reconstructor(config, model, MASK, reps, 0, x.device, rows=256)
    return reconstruct(pixels, 0)


# ---------------------------------------------------------------------------------------------------------- growth


def growth(options):
    """Prints how the cost grows: everything at --sampler fast, one number changed at a time."""
    if device().type == "cpu":
        keep_freed_memory()
    config = load_config(options.config)
    model, size = prepared(config, {"precision": "fp32"}), config.data.image_size
    x = images(config, 4 * options.batch_size).to(device())
    steps = PRESETS["fast"][0]["steps"]
    some = x[: options.batch_size]
    series = {
        "images": {n: lambda n=n: fast(config, model, x[:n]) for n in multiples(options.batch_size, (1, 2, 3, 4))},
        "steps": {n: lambda n=n: fast(config, model, some, steps=n) for n in multiples(steps, (1, 2, 4, 8))},
        "repetitions": {n: lambda n=n: fast(config, model, some, reps=n) for n in (2, 4, 8, 16)},
        "pixels": {
            n * n: lambda n=n: fast(config, model, torch.nn.functional.interpolate(some, size=n))
            for n in multiples(size, (1, 2, 3, 4))
        },
    }
    print(f"{'':12} {'number':>8} {'seconds':>9} {'of proportion':>13}")
    for name, calls in series.items():
        seconds = {n: median(times) for n, times in machine.alternate(calls, options.rounds).items()}
        first = next(iter(seconds))
        for n, value in seconds.items():
            print(f"{name:12} {n:8} {value:9.2f} {value / seconds[first] * first / n:13.2f}", flush=True)


def multiples(number, factors):
    """The number times each factor."""
    return [number * factor for factor in factors]


if __name__ == "__main__":
    main()
