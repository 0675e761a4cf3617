"""Training and reconstruction steps, ours and plainly written, in turns in one run.

    python -m benchmarks.network_speed --config configs/subvp/cifar10_ddpm_continuous.py --batch_size 32
    python -m benchmarks.network_speed --config configs/subvp/fashion_mnist_small.py --batch_size 64

Operations are those of the plain network by torch's counter, so a rearrangement that saves some shows as a higher rate.
The share is of the machine's own float32 matrix rate, measured in the same run.  Also: what keyed noise costs.
"""

import argparse
import importlib.util
from pathlib import Path

import torch

import losses
import noise
import sampling
import sde_lib
from benchmarks import machine, plain
from benchmarks.machine import median
from console import keep_freed_memory
from models import create_model
from models.score import ScoreModel


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/subvp/fashion_mnist_small.py")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    keep_freed_memory()  # as main.py and recon.py do; for both versions
    config = _load(options.config)
    sde = sde_lib.create_sde(config)
    shape = (options.batch_size, config.data.num_channels, config.data.image_size, config.data.image_size)
    x = torch.rand(shape, generator=noise.generator("benchmark")) * 2 - 1
    print(f"{options.config}, batch {options.batch_size}; {machine.describe()}")
    rate = machine.matrix_rate()
    print(f"float32 matrix rate: {rate / 1e9:.0f} GFLOP/s")
    print(f"{'step':16} {'version':8} {'ms':>8} {'spread':>13} {'GFLOP/s':>8} {'share':>6} {'rate':>6}")
    training(config, sde, x, rate, options.rounds)
    reconstruction(config, sde, x, rate, options.rounds)
    keyed_noise(config, sde, x)


def _load(path):
    spec = importlib.util.spec_from_file_location("config", Path(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def training(config, sde, x, rate, rounds):
    """A training step of both versions."""
    plain_step = plain.PlainTraining(plain.plain_network(config).train(), sde, config).step
    net = create_model(config).train().to(memory_format=torch.channels_last)
    state, loss = losses.create_state(config, net), losses.create_loss(config, sde)
    model = ScoreModel(net, sde)

    def step():
        draws = losses.Draws.keyed(x.shape, sde.N, config.seed, "train", state.step)
        return losses.train_step(state, loss, model, x, draws, config).item()

    work = machine.flops(lambda: plain_step(x))
    _report("training", machine.alternate({"plain": lambda: plain_step(x), "ours": step}, rounds), work, rate)


def reconstruction(config, sde, x, rate, rounds, steps=2):
    """Steps of the published inpainting loop of both versions."""
    plain_net, net = plain.plain_network(config).eval(), create_model(config).eval()
    model = ScoreModel(net.requires_grad_(False).to(memory_format=torch.channels_last), sde)
    mask = (torch.arange(x.shape[-1]) % 2).float().expand(1, 1, *x.shape[2:])
    predictor, _ = sampling.create_solvers(config, sde)
    keys = noise.image_keys(0, "benchmark", torch.arange(len(x)), [0])
    times = sampling.time_grid(sde, sde.N, sde.eps)[:steps]

    def ours():
        source = noise.KeyedNoise(keys, x.shape[1:])
        constrain = sampling.replacement(sde, x, mask)
        sampling.integrate(model, source(0, "prior"), times, predictor, source, constrain=constrain)

    with torch.no_grad():
        work = steps * machine.flops(lambda: plain_net(x, torch.ones(len(x))))
    calls = {"plain": lambda: plain.plain_inpaint(plain_net, sde, x, mask, steps), "ours": ours}
    seconds = machine.alternate(calls, rounds)
    _report("reconstruction", {k: [s / steps for s in v] for k, v in seconds.items()}, work / steps, rate)


def keyed_noise(config, sde, x):
    """The share of a reconstruction step that its two keyed draws take, beside the global generator's."""
    net = create_model(config).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    source = noise.KeyedNoise(noise.image_keys(0, "benchmark", torch.arange(len(x)), [0]), x.shape[1:])
    calls = {
        "network": lambda: net(x, torch.ones(1)),
        "keyed": lambda: (source(1, "constrain"), source(1, "predictor")),
        "global": lambda: (torch.randn_like(x), torch.randn_like(x)),
    }
    with torch.no_grad():
        seconds = {name: median(values) for name, values in machine.alternate(calls, 9).items()}
    for name in ("keyed", "global"):
        print(
            f"two {name:6} draws: {1e3 * seconds[name]:.2f} ms, {seconds[name] / seconds['network']:.2%} of the network"
        )


def _report(step, seconds, work, rate):
    for version, values in seconds.items():
        time = median(values)
        print(
            f"{step:16} {version:8} {1e3 * time:8.1f} {1e3 * min(values):6.0f}-{1e3 * max(values):<6.0f} "
            f"{work / time / 1e9:8.0f} {work / time / rate:6.0%} {median(seconds['plain']) / time:5.2f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
