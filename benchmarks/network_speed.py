"""Network evaluations, training and reconstruction steps, ours and plainly written, in turns in one run.

    python -m benchmarks.network_speed --config configs/subvp/cifar10_ddpm_continuous.py --batch_size 32
    python -m benchmarks.network_speed --config configs/subvp/fashion_mnist_small.py --batch_size 64
    python -m benchmarks.network_speed --config configs/ve/cifar10_ncsnpp_continuous.py --batch_size 8

The plain training step and inpainting loop are those of the sub-VP SDE; with another one, evaluations alone are timed.
Each version has a process of its own, set up as it would be run, and the two take turns.  Operations are those of the
plain network by torch's counter, so a rearrangement that saves some shows as a higher rate.  The share is of the
machine's own float32 matrix rate, measured in the same run.  Also: what keyed noise costs.  On a GPU if there is one,
all in strict float32, but training, which is in TF32 where a GPU has it.
"""

import argparse

import torch

import losses
import sampling
import sde_lib
from basics import noise
from basics.machine import keep_freed_memory
from benchmarks import machine, plain
from benchmarks.machine import median
from lmd.process import create_solvers
from models import create_model, inference
from models.score import ScoreModel

STEPS = {"evaluation": 1, "training": 1, "reconstruction": 2}  # how many are timed together


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/subvp/fashion_mnist_small.py")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    config = machine.load_config(options.config)
    sde, x = sde_lib.create_sde(config), images(config, options.batch_size)
    print(f"{options.config}, batch {options.batch_size}; {machine.describe()}")
    rate = machine.matrix_rate()
    print(f"float32 matrix rate: {rate / 1e9:.0f} GFLOP/s")
    print(f"{'step':16} {'version':8} {'ms':>8} {'spread':>13} {'GFLOP/s':>8} {'share':>6} {'rate':>6}")
    counted = plain_calls(config, sde, x)
    arguments = (options.config, options.batch_size)
    seconds, _ = machine.in_turns(calls_of, VERSIONS, arguments, counted, options.rounds)
    for step, call in counted.items():
        own = {version: [s / STEPS[step] for s in seconds[version, step]] for version in VERSIONS}
        _report(step, own, machine.flops(call) / STEPS[step], rate)
    keyed_noise(config, sde, x)


def images(config, batch_size):
    """A batch in the model's range, on the GPU if there is one: (B, C, H, W)."""
    shape = (batch_size, config.data.num_channels, config.data.image_size, config.data.image_size)
    return (torch.rand(shape, generator=noise.generator("benchmark")) * 2 - 1).to(machine.device())


def calls_of(version, path, batch_size):
    """The steps of a version, in its own process."""
    config = machine.load_config(path)
    calls = VERSIONS[version](config, sde_lib.create_sde(config), images(config, batch_size))
    precisions = {"training": inference.training_precision(machine.device())}
    return {step: inference.arithmetic(precisions.get(step, "fp32"))(call) for step, call in calls.items()}


def plain_calls(config, sde, x):
    """The plain version's steps."""
    net, mask = plain.plain_network(config).eval().requires_grad_(False).to(x.device), _mask(x)
    labels = torch.ones(len(x), device=x.device)
    calls = {"evaluation": lambda: net(x, labels)}
    if isinstance(sde, sde_lib.SubVPSDE):
        training = plain.PlainTraining(plain.plain_network(config).train().to(x.device), sde, config)
        calls["training"] = lambda: training.step(x)
        calls["reconstruction"] = lambda: plain.plain_inpaint(net, sde, x, mask, STEPS["reconstruction"])
    return calls


def our_calls(config, sde, x):
    """Our steps, in a process prepared as main.py and recon.py prepare theirs."""
    if x.device.type == "cpu":
        keep_freed_memory()
    layout, labels = inference.layout(x.device), torch.ones(1, device=x.device)
    net = create_model(config).train().to(x.device, memory_format=layout)
    state, loss = losses.create_state(config, net), losses.create_loss(config, sde)
    model = ScoreModel(net, sde)

    def train():
        draws = losses.Draws.keyed(x.shape, sde.N, config.seed, "train", state.step, device=x.device)
        return losses.train_step(state, loss, model, x, draws, config).item()

    frozen = create_model(config).eval().requires_grad_(False).to(x.device, memory_format=layout)
    predictor, _ = create_solvers(config, sde)
    scheme = sampling.Scheme(predictor, sampling.time_grid(sde, sde.N, sde.eps)[: STEPS["reconstruction"]])
    source = _source(x)
    constrain = sampling.replacement(sde, x, _mask(x))

    def reconstruct():
        start = source(0, "prior")
        return sampling.integrate(ScoreModel(frozen, sde), start, scheme, source, constrain)

    return {"evaluation": lambda: frozen(x, labels), "training": train, "reconstruction": reconstruct}


VERSIONS = {"plain": plain_calls, "ours": our_calls}


def _mask(x):
    return (torch.arange(x.shape[-1], device=x.device) % 2).float().expand(1, 1, *x.shape[2:])


def _source(x):
    return noise.KeyedNoise(noise.image_keys(0, torch.arange(len(x)), [0]), x.shape[1:], x.device)


def keyed_noise(config, sde, x):
    """The share of a reconstruction step that its two keyed draws take, beside the global generator's."""
    net, source, labels = inference.prepare(create_model(config), x.device, "fp32"), _source(x), torch.ones(1).to(x)
    calls = {
        "network": lambda: net(x, labels),
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
