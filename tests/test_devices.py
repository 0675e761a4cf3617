"""What a GPU would see, without one: everything runs on the meta device, which has shapes and no numbers.

`Watched` sees each operation of torch.  On a GPU an operation that mixes tensors of the CPU and of the device is an
error, and one that tells the CPU a value of the device waits for all that was asked of the device before; neither shows
on a CPU.  Sampling by the ODE and likelihoods are left out: SciPy's solver keeps its state on the CPU by design.
"""

import dataclasses

import pytest
import tiny
import torch
from helpers import small
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import losses
import metrics
import models
import sampling
import sde_lib
from basics import noise
from basics.console import UserError
from lmd import process as processes
from lmd import training
from lmd.reconstructor import Reconstructor
from metrics.features import FeatureDistance
from models.score import ScoreModel

META = torch.device("meta")
TRANSFERS = {"_to_copy", "copy_"}
WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "_unique2"}


class Watched(TorchDispatchMode):
    """Raises where a GPU could not do an operation, or would be waited for.

    Args:
        results: whether copies to the CPU are the results of the work, and let pass.
        stream: whether copies to the device may not wait for what was asked of it before.

    Attributes:
        steady: set when the first step is done: from then on nothing may be sent to the device either.
        scalars: operations that took a CPU tensor without dimensions beside the device's, as torch allows.
    """

    def __init__(self, results=False, stream=False):
        super().__init__()
        self.results, self.stream, self.steady, self.scalars = results, stream, False, set()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        packet = str(function.overloadpacket).split(".")[-1]
        tensors = [x for x in tree_leaves((arguments, named)) if isinstance(x, torch.Tensor)]
        on_device, on_cpu = ([x for x in tensors if x.device.type == kind] for kind in ("meta", "cpu"))
        if packet in TRANSFERS:
            return self._transfer(function, packet, arguments, named)
        picks = packet in ("index", "index_put_") and any(x.dtype == torch.bool for x in on_device[1:])
        assert not (on_device and (packet in WAITS or picks)), f"{packet} waits for the device"
        if on_device and on_cpu:
            shapes = [tuple(x.shape) for x in on_cpu]
            assert not any(shapes), f"{packet} mixes the device with CPU tensors of shapes {shapes}"
            self.scalars.add(packet)
        return function(*arguments, **named)

    def _transfer(self, function, packet, arguments, named):
        source = arguments[1] if packet == "copy_" else arguments[0]
        target = arguments[0].device if packet == "copy_" else named.get("device") or source.device
        if source.device == target:
            return function(*arguments, **named)
        if source.device == META:
            assert self.results, f"{packet} brings a tensor of shape {tuple(source.shape)} to the CPU"
            return arguments[0].zero_() if packet == "copy_" else torch.zeros(source.shape, dtype=source.dtype)
        waits = not (named.get("non_blocking") or arguments[2:3] == (True,))
        assert not (self.stream and waits), f"{packet} of a tensor of shape {tuple(source.shape)} waits for the device"
        assert not self.steady, f"{packet} sends a tensor of shape {tuple(source.shape)} in every step"
        return function(*arguments, **named)

    def step(self, *_):
        """To be called after each step."""
        self.steady = True


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda x: bool((x > 0).all()), "_local_scalar_dense waits"),
        (lambda x: x[0].item(), "_local_scalar_dense waits"),
        (lambda x: x.nonzero(), "nonzero waits"),
        (lambda x: x[x > 0], "index waits"),
        (lambda x: x + torch.ones(3), r"add mixes the device with CPU tensors of shapes \[\(3,\)\]"),
        (lambda x: x[torch.tensor([0, 1])], "index mixes"),
        (lambda x: x.cpu(), "_to_copy brings"),
        (lambda x: torch.zeros(3).copy_(x), "copy_ brings"),
        (lambda x: torch.ones(3).to(META), r"_to_copy of a tensor of shape \(3,\) waits"),
        (lambda x: x.copy_(torch.ones(3)), r"copy_ of a tensor of shape \(3,\) waits"),
    ],
)
def test_the_watch_sees_what_a_gpu_could_not_do(operation, message):
    with pytest.raises(AssertionError, match=message), Watched(stream=True):
        operation(torch.zeros(3, device=META))
    with Watched() as watched:
        torch.zeros(3, device=META) * torch.tensor(2.0)
    assert watched.scalars == {"mul"}


# ----------------------------------------------------------------------------------------- sampling and inpainting

SDES = ("vpsde", "subvpsde", "vesde")
SOLVERS = [*((processes.PUBLISHED, name) for name in sampling.PREDICTORS), *((n, None) for n in processes.SAMPLERS)]
B, SHAPE = 4, (1, 8, 8)


VARIANTS = [  # of every solver, where they go together
    {},
    {"corrector": "langevin"},
    {"corrector": "ald"},
    {"probability_flow": True},
    {"t_start": 0.6},
    {"t_start": 0.6, "lift": "noise"},
    {"t_start": 0.6, "lift": "both"},
    {"constraint": "project"},
    {"returns": 1},
    {"t_start": 0.6, "lift": "both", "constraint": "project", "returns": 1, "corrector": "langevin"},
    {"t_start": 0.6, "lift": "noise", "returns": 1, "corrector": "ald"},
]


def process_of(options, sde_name, sampler, predictor):
    """A process of few steps, and a score model without a network."""
    config = tiny.config(training__sde=sde_name, model__num_scales=50)
    few = sampler != processes.PUBLISHED
    config.sampling.update({"sampler": sampler, "steps": 3 if few else 0, **options})
    config.sampling.predictor = predictor or config.sampling.predictor
    model = ScoreModel(lambda x, labels: x * labels.to(x.dtype).view(-1, 1, 1, 1), sde_lib.create_sde(config))
    process = processes.create_process(config, model.sde, group=B)
    return dataclasses.replace(process, times=process.times if few else process.times[:3]), model


@pytest.mark.parametrize("sde_name", SDES)
@pytest.mark.parametrize(("sampler", "predictor"), SOLVERS)
def test_sampling_and_inpainting_stay_on_the_device(sde_name, sampler, predictor):
    """Every solver, SDE, corrector, lift, constraint and number of returns that go together."""
    done, data, mask = 0, torch.zeros(B, *SHAPE, device=META), torch.ones(B, 1, *SHAPE[1:], device=META)
    draw = lambda step, purpose: torch.empty(B, *SHAPE, device=META)
    for options in VARIANTS:
        try:
            process, model = process_of(options, sde_name, sampler, predictor)
        except UserError:  # what does not go together
            continue
        with Watched() as watched:
            filled = process.inpaint(model, data, mask, draw, on_step=watched.step)
            watched.steady = False
            results = [filled]
            if not options.keys() & {"t_start", "constraint"}:  # which are for inpainting alone
                results.append(process.sample(model, draw, on_step=watched.step))
        assert {(result.device, result.shape) for result in results} == {(META, data.shape)}, options
        assert not watched.scalars, options
        done += 1
    assert done or (sde_name, predictor) == ("subvpsde", "ancestral_sampling")


def test_noise_is_made_on_the_device():
    with Watched() as watched:
        source = noise.KeyedNoise(torch.arange(B), SHAPE, META)
        watched.step()
        assert source(3, "predictor").shape == (B, *SHAPE)
    assert not watched.scalars


def test_a_batch_of_reconstructions_stays_on_the_device():
    """With the network, for all repetitions in parts; its results are what comes back."""
    config = tiny.config()
    config.sampling.update(processes.preset("fast", config)[0])
    net = models.create_model(config).eval().requires_grad_(False).to(META)
    model = ScoreModel(net, sde_lib.create_sde(config))
    reconstruct = Reconstructor(config, model, META, rows=3)
    with Watched(results=True) as watched:
        recons = tiny.inpainted(reconstruct, torch.zeros(B, *SHAPE, dtype=torch.uint8))
    assert recons.device.type == "cpu"
    assert recons.shape == (2, B, *SHAPE)
    assert not watched.scalars


# ------------------------------------------------------------------------------------------------------- training

TRAININGS = {
    "continuous": {},
    "likelihood weighting": {"training__likelihood_weighting": True},
    "half the sum, no clipping": {"training__reduce_mean": False, "optim__grad_clip": -1.0, "optim__warmup": 0},
    "dropout": {"model__dropout": 0.1},
    "vp": {"training__sde": "vpsde"},
    "ve": {"training__sde": "vesde"},
    "discrete vp": {"training__sde": "vpsde", "training__continuous": False},
    "discrete ve": {"training__sde": "vesde", "training__continuous": False},
}


@pytest.mark.parametrize("name", TRAININGS)
def test_training_stays_on_the_device(name, tmp_path, monkeypatch):
    """Gradient, warm-up, clipping, Adam and the moving average; the loss alone is read, when it is logged."""
    # what torch has for the CPU and GPUs, and not for this device: one pass over all weights
    adam, clip = torch.optim.Adam, torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, fused, **options: adam(*args, **options))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args, foreach, **options: clip(*args, **options))
    trainer = training.Trainer(tiny.config(**TRAININGS[name]), tmp_path, META, "./data")
    for step in range(3):
        images = torch.zeros(4, *SHAPE, device=META)
        with Watched(stream=step > 0) as watched:
            loss = trainer.train_step(images)
        assert (loss.device, loss.shape, trainer.state.step) == (META, (), step + 1)
        assert not watched.scalars


@pytest.mark.parametrize(
    "path", ["subvp/cifar10_ddpm_continuous.py", "ve/cifar10_ncsnpp_continuous.py", "ve/cifar10_ddpm.py"]
)
def test_networks_stay_on_the_device(path):
    config = small(path)
    net = models.create_model(config).to(META)
    x, labels = torch.zeros(2, 3, 16, 16, device=META), torch.ones(2, device=META)
    with Watched() as watched:
        net(x, labels).sum().backward()
    assert not watched.scalars


def test_losses_need_no_copies_after_the_first():
    """The tables of the discrete processes are sent once."""
    for name in ("discrete vp", "discrete ve"):
        config = tiny.config(**TRAININGS[name])
        sde = sde_lib.create_sde(config)
        model, loss = ScoreModel(lambda x, labels: x, sde), losses.create_loss(config, sde)
        x = torch.zeros(4, *SHAPE, device=META)
        draws = losses.Draws.keyed(x.shape, sde.N, 0, device=META)
        with Watched() as watched:
            loss(model, x, draws)
            watched.step()
            loss(model, x, draws)


# -------------------------------------------------------------------------------------------------------- metrics


class Features(FeatureDistance):
    """A learned distance with a network of one layer."""

    name, smallest = "features", 4

    def __init__(self):
        super().__init__(META, torch.nn.Conv2d(3, 4, 3), [torch.nn.Conv2d(4, 1, 1, device=META)])

    def features(self, images):
        return [self.network(images)]


@pytest.mark.parametrize("make", [lambda: metrics.create("MSE", META), lambda: metrics.create("SSIM", META), Features])
def test_metrics_stay_on_the_device(make):
    metric = make()
    orig, other = torch.zeros(2, B, 3, 16, 16).unbind()  # on the CPU: a metric sends them
    with Watched() as watched:
        known = metric.prepare(orig)
        distances = metric.compare(known, metric.prepare(other.to(META)))
    assert (distances.device, distances.shape) == (META, (B,))
    assert not watched.scalars
