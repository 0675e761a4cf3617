"""What only a GPU can show: its arithmetic, its memory, its layout.  Skipped where there is none."""

import gc

import pytest
import tiny
import torch
from helpers import GaussianScore, small

import metrics
import models
import sde_lib
from lmd import likelihood, training
from lmd.reconstructor import Reconstructor
from models import inference, memory
from models.score import ScoreModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch sees none")
GPU = torch.device("cuda")


@pytest.fixture
def network():
    net = models.create_model(small("subvp/cifar10_ddpm_continuous.py"))
    tiny.randomise(net)
    return net


def images(count=4):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def labels(device="cpu"):
    return torch.tensor([400.0], device=device)


@torch.no_grad()
def test_gpu_precisions_are_what_they_say(network):
    """float32 has 24 bits of mantissa, TF32 11, bfloat16 8; each error is above what the next finer one allows."""
    expected = inference.prepare(network, tiny.CPU, "fp32")(images(), labels())
    errors = {}
    for precision in ("fp32", "tf32", "bf16"):
        result = inference.prepare(network, GPU, precision)(images().to(GPU), labels(GPU)).cpu()
        errors[precision] = ((result - expected).norm() / expected.norm()).item()
    assert errors["fp32"] < 2e-5 < errors["tf32"] < 5e-3 < errors["bf16"] < 5e-2, errors


def test_gpu_networks_run_in_the_layout_that_is_fastest(network):
    prepared = inference.prepare(network, GPU, "fp32")
    weight = network.conv_in.weight
    assert weight.is_contiguous()
    prepared.compile()
    assert weight.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_gpu_memory_that_ran_out_is_given_back():
    total = torch.cuda.mem_get_info(GPU)[1]

    def greedy():
        parts = [torch.empty(total // 4, dtype=torch.uint8, device=GPU) for _ in range(8)]
        return sum(part[0] for part in parts)

    gc.collect()  # what earlier tests left
    before = torch.cuda.memory_allocated(GPU)
    assert memory.attempt(greedy) is None
    assert torch.cuda.memory_allocated(GPU) == before
    assert memory.attempt(lambda: torch.empty(total // 4, dtype=torch.uint8, device=GPU).shape) is not None


def reconstructor(device, rows, precision="fp32"):
    config = tiny.config(model__num_scales=4)
    net = models.create_model(config)
    tiny.randomise(net)
    model = ScoreModel(inference.prepare(net, device, precision), sde_lib.create_sde(config))
    return Reconstructor(config, model, device, rows)


@torch.no_grad()
def test_gpu_reconstructions_are_those_of_the_cpu():
    pixels = torch.from_numpy(tiny.pictures(5))[:, None]
    mine, theirs = (tiny.inpainted(reconstructor(device, 8), pixels) for device in (GPU, tiny.CPU))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3)


@torch.no_grad()
def test_gpu_rows_are_learned_and_halved_where_that_was_too_bold():
    """With 512 MB to be had: what is learned fits, and far too many become few enough, with the same result."""
    pixels = torch.from_numpy(tiny.pictures(20_000))[:, None]
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction(2**29 / total)
    try:
        learned, bold = reconstructor(GPU, 1), reconstructor(GPU, 10**6)
        learned.learn_rows(2 * len(pixels), memory_gb=0.3)
        assert 1 < learned.rows < 40_000
        expected = tiny.inpainted(learned, pixels)
        found = tiny.inpainted(bold, pixels)
        assert bold.rows < 10**6
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_gpu_likelihoods_are_those_of_the_cpu():
    """Whose steps are chosen on the CPU; in float64, so that none is another."""
    generator, sde = torch.Generator().manual_seed(0), sde_lib.SubVPSDE()
    x = (
        torch.randn(5, 1, 2, 2, generator=generator, dtype=torch.float64)
        * torch.logspace(-2, 1, 5)[:, None, None, None]
    )
    mean, cov = torch.linspace(-0.5, 0.5, 4).double(), torch.diag(torch.linspace(0.1, 0.4, 4).double())
    results = []
    for device in (GPU, tiny.CPU):
        model, given = GaussianScore(sde, mean.to(device), cov.to(device)), x.to(device)
        density, latent, evaluations = likelihood.log_likelihood(model, sde, given, torch.ones_like(given))
        assert density.device.type == latent.device.type == device.type
        results.append((density.cpu(), evaluations.cpu()))
    torch.testing.assert_close(*results, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["MSE", "SSIM"])
def test_gpu_distances_are_those_of_the_cpu(name):
    orig, other = torch.rand(2, 6, 3, 32, 32, generator=torch.Generator().manual_seed(0)).unbind()
    expected = metrics.create(name, tiny.CPU)(orig, other)
    torch.testing.assert_close(metrics.create(name, GPU)(orig, other).cpu(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("choice", ["off", "on"])
def test_gpu_training_learns_and_goes_on(choice, tmp_path):
    source = str(tiny.write_pictures(tmp_path / "pictures.npz", 16))
    for last in (12, 20):
        tree = tiny.config(data__dataset=source, training__n_iters=last, training__compile=choice)
        training.train(tree, tmp_path / "run", GPU, "./data")
    said = (tmp_path / "run" / "stdout.txt").read_text()
    assert f", cuda, {inference.resolve('auto', GPU)}" in said
    assert "resuming at step 13" in said
