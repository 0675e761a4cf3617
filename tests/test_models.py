"""The networks' layers against plain forms, the DDPM against the published numbers, and the score wrapper."""

import pytest
import torch
import torch.nn.functional as F
from helpers import close, fill_, filled_model, golden, load_config, small, tensor, wave

import models
import sde_lib
from basics.console import UserError
from benchmarks import plain
from models import layers
from models.score import ScoreModel

CHANNELS_LAST = torch.channels_last


def test_ddpm_golden():
    numbers = golden("model_subvp_cifar10_ddpm_continuous")
    model = filled_model(load_config("subvp/cifar10_ddpm_continuous.py"))
    with torch.no_grad():
        output = model.net(wave((2, 3, 32, 32), 0.5), tensor(numbers["labels"]))
        close(output, numbers["output"])
        fast = model.net.to(memory_format=CHANNELS_LAST)(wave((2, 3, 32, 32), 0.5), tensor(numbers["labels"]))
    close(fast, numbers["output"])


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("subvp/cifar10_ddpm_continuous.py", {}),
        ("subvp/cifar10_ddpmpp_continuous.py", {}),
        ("subvp/cifar10_ddpmpp_continuous.py", {"resblock_type": "ddpm"}),
        ("ve/cifar10_ncsnpp_continuous.py", {"progressive": "residual"}),
        ("ve/celebahq_256_ncsnpp_continuous.py", {"resblock_type": "ddpm"}),
    ],
)
def test_networks_equal_their_plain_form_with_gradients(path, options):
    """Channels-last with all rearrangements against NCHW, einsum and one module per operation."""
    config = small(path, dropout=0.0, **options)
    ours, theirs = models.create_model(config).to(memory_format=CHANNELS_LAST), plain.plain_network(config)
    fill_(ours.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x, labels = wave((3, 3, 16, 16), 0.2), torch.tensor([1.0, 500.0, 900.0])
    outputs = [net(x, labels) for net in (ours, theirs)]
    close(outputs[0].detach(), outputs[1].detach())
    for output in outputs:
        output.square().mean().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if not a.requires_grad:
            continue
        scale = b.grad.abs().max()
        assert (a.grad - b.grad).abs().max() <= 1e-4 * scale + 1e-7, name  # sums over thousands of pixels


@pytest.mark.parametrize("shifts", [None, 1, 3])
@pytest.mark.parametrize(("channels", "groups"), [(32, 32), (64, 32), (96, 4)])
def test_norm_act_channels_last(channels, groups, shifts):
    """The fused form and its gradients against torch's operations in float64; a large mean must not cancel."""
    generator = torch.Generator().manual_seed(channels + groups)
    x = torch.randn(3, channels, 6, 6, generator=generator) * 0.5 + 20
    shift = None if shifts is None else torch.randn(shifts, channels, generator=generator)
    weight, bias = torch.randn(2, channels, generator=generator)
    upstream = torch.randn(3, channels, 6, 6, generator=generator)

    def run(dtype, memory_format):
        module = layers.NormAct(groups, channels, F.silu).to(dtype)
        module.load_state_dict({"weight": weight, "bias": bias})
        inputs = [x.to(dtype).clone(memory_format=memory_format).requires_grad_()]
        inputs += [] if shift is None else [shift.to(dtype).clone().requires_grad_()]
        output = module(*inputs)
        output.backward(upstream.to(dtype))
        return [output.detach(), module.weight.grad, module.bias.grad, *(value.grad for value in inputs)]

    for ours, exact in zip(run(torch.float32, CHANNELS_LAST), run(torch.float64, torch.contiguous_format), strict=True):
        # atol: a shift of whole groups has no effect, so its gradient is rounding
        close(ours, exact, rtol=3e-5, atol=1e-4)


def test_norm_act_without_gradient_is_the_same():
    module = layers.NormAct(32, 32, F.silu)
    x = wave((2, 32, 4, 4), 0.3).contiguous(memory_format=CHANNELS_LAST)
    with torch.no_grad():
        inference = module(x)
    torch.testing.assert_close(inference, module(x).detach(), rtol=0, atol=0)
    assert inference.is_contiguous(memory_format=CHANNELS_LAST)


def test_upsampling_is_nearest_then_convolution():
    module = layers.Upsample(5)
    x = wave((2, 5, 3, 4), 0.1)
    expected = F.conv2d(
        F.interpolate(x, scale_factor=2, mode="nearest"), module.conv.weight, module.conv.bias, padding=1
    )
    close(module(x).detach(), expected.detach())
    assert torch.equal(layers.Upsample(5, with_conv=False)(x), F.interpolate(x, scale_factor=2, mode="nearest"))


def test_downsampling_pads_right_and_bottom():
    module, x = layers.Downsample(3), wave((1, 3, 4, 4), 0.1)
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1)), module.conv.weight, module.conv.bias, stride=2)
    assert torch.equal(module(x), expected)
    assert torch.equal(layers.Downsample(3, with_conv=False)(x), F.avg_pool2d(x, 2))


def test_attention_is_softmax_over_pixels():
    module, x = layers.Attention(32), wave((2, 32, 4, 4), 0.7)
    fill_(module.state_dict())
    h = module.norm(x)
    q, k, v = (
        torch.einsum("bchw,cd->bdhw", h, p.W) + p.b[:, None, None] for p in (module.query, module.key, module.value)
    )
    weights = torch.einsum("bcij,bckl->bijkl", q, k).flatten(3).mul(32**-0.5).softmax(dim=-1)  # (B, H, W, HW)
    mixed = torch.einsum("bijp,bcp->bcij", weights, v.flatten(2))
    out = torch.einsum("bchw,cd->bdhw", mixed, module.out.W) + module.out.b[:, None, None]
    close(module(x).detach(), (x + out).detach())


def test_sinusoids():
    labels = torch.tensor([0.0, 3.0])
    embedding = layers.sinusoids(labels, 8)
    frequencies = 10000 ** (-torch.arange(4) / 3)
    torch.testing.assert_close(embedding[1], torch.cat([(3 * frequencies).sin(), (3 * frequencies).cos()]))
    assert layers.sinusoids(labels, 7).shape == (2, 7)


def test_initialisation():
    torch.manual_seed(0)
    weight = layers.variance_scaling_(torch.empty(64, 32, 3, 3))
    bound = (3 / (9 * (64 + 32) / 2)) ** 0.5
    assert weight.abs().max() <= bound
    assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    block = layers.ResidualBlock(32, 64, 16, F.silu)
    assert block.conv1.weight.abs().max() < 1e-5  # scale 0 stands for 1e-10
    assert not block.conv0.bias.any()


def test_one_time_for_all_images():
    net = filled_model(small("subvp/cifar10_ddpm_continuous.py")).net
    x = wave((3, 3, 16, 16), 0.4)
    with torch.no_grad():
        close(net(x, torch.tensor([250.0])), net(x, torch.full((3,), 250.0)))


def test_published_names_survive_loading():
    config = small("subvp/cifar10_ddpm_continuous.py")
    net, other = models.create_model(config), models.create_model(config)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    assert next(iter(state)) == "sigmas"
    assert all(name.startswith("all_modules.") for name in state if name != "sigmas")
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(dict(list(state.items())[:-1]))
    inside = torch.nn.Sequential(net)  # under a prefix, as another module's part
    inside.load_state_dict(inside.state_dict())
    assert "0.all_modules.0.weight" in inside.state_dict()


def test_unknown_names_are_refused():
    config = small("subvp/cifar10_ddpm_continuous.py", name="transformer")
    with pytest.raises(UserError, match=r"unknown model .*choose one of: ddpm, ncsnpp"):
        models.create_model(config)
    with pytest.raises(UserError, match="unknown nonlinearity"):
        models.create_model(small("subvp/cifar10_ddpm_continuous.py", nonlinearity="tanh"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nf": 16}, "no network can be built from this config: num_channels .*; make config.model.nf a multiple"),
        ({"ch_mult": ()}, "one positive int per level"),
        ({"ch_mult": (1, "x")}, "one positive int per level"),
        ({"ch_mult": (1, 1, 1, 1, 1, 1)}, "16 pixels cannot be halved 5 times"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    config = small("subvp/cifar10_ddpm_continuous.py")
    with config.ignore_type():
        config.model.update(change)
    with pytest.raises(UserError, match=message):
        models.create_model(config)


# --------------------------------------------------------------------------------------------------------- score


class Echo:
    """A network that returns a fixed output and remembers its labels."""

    def __call__(self, x, labels):
        self.labels = labels
        return torch.full_like(x, 2.0)


@pytest.mark.parametrize(
    ("sde", "continuous", "labels", "score"),
    [
        (sde_lib.VPSDE(), True, 999 * 0.4, -2 / sde_lib.VPSDE().marginal(torch.tensor([0.4]))[1].item()),
        (sde_lib.SubVPSDE(), True, 999 * 0.4, -2 / sde_lib.SubVPSDE().marginal(torch.tensor([0.4]))[1].item()),
        (sde_lib.VPSDE(), False, 999 * 0.4, -2 / (1 - sde_lib.VPSDE().alphas_bar[399]).sqrt().item()),
        (sde_lib.VESDE(), True, 0.01 * 5000**0.4, 2.0),
        (sde_lib.VESDE(), False, round(0.6 * 999), 2.0),
    ],
)
def test_labels_and_scale(sde, continuous, labels, score):
    net = Echo()
    value = ScoreModel(net, sde, continuous)(torch.zeros(1, 1, 2, 2), torch.tensor([0.4]))
    assert net.labels.item() == pytest.approx(labels, rel=1e-5)
    torch.testing.assert_close(value, torch.full((1, 1, 2, 2), score), rtol=1e-5, atol=0)


def test_noise_and_clean_image_predictions():
    sde = sde_lib.SubVPSDE()
    alpha, std = sde.marginal(torch.tensor([0.4]))
    model, x = ScoreModel(Echo(), sde), wave((1, 1, 2, 2), 0.5)
    torch.testing.assert_close(model.eps(x, torch.tensor([0.4])), torch.full_like(x, 2.0))
    torch.testing.assert_close(model.x0(x, torch.tensor([0.4])), (x - std * 2) / alpha)
