"""NCSN++ against the published names, the published outputs and a plain second implementation of every option."""

import gzip
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN, fill_, load_config, wave
from helpers import golden as load_golden

from basics.console import UserError
from configs import presets
from models.ddpm import DDPM
from models.ncsnpp import NCSNPP

SHAPES = json.loads(gzip.decompress((GOLDEN / "state_dict_shapes.json.gz").read_bytes()))
NETWORKS = {"ddpm": DDPM, "ncsnpp": NCSNPP}


def small(**options):
    """A VE NCSN++ config of two levels and 16 channels on 8x8 images, with some of its options changed."""
    tiny = {"nf": 16, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,), "num_scales": 10}
    part = {f"model.{name}": value for name, value in {**tiny, **options}.items()}
    return presets.build(presets.CIFAR10, presets.NCSNPP, presets.VE, {"data.image_size": 8}, part)


def network(config):
    net = NCSNPP(config).eval()
    fill_(net.state_dict())
    return net


# ------------------------------------------------------------------------------------------------- published names


@pytest.mark.parametrize("path", SHAPES["config_to_architecture"])
def test_names_shapes_and_order_are_the_published_ones(path):
    config = load_config(path.removeprefix("configs/"))
    with torch.device("meta"):
        net = NETWORKS[config.model.name](config)
    state = net.state_dict()
    published = SHAPES["architectures"][SHAPES["config_to_architecture"][path]]
    assert [[name, list(value.shape)] for name, value in state.items()] == published
    assert state["sigmas"].dtype == torch.float64
    # parameters() come in the same order: the EMA's and the optimizer's positions rely on it
    assert [list(p.shape) for p in net.parameters()] == [shape for name, shape in published if name != "sigmas"]


def test_parameters_are_the_tensors_of_the_state_dict_in_order():
    net = NCSNPP(small())
    state = [value.data_ptr() for name, value in net.state_dict().items() if name != "sigmas"]
    assert [p.data_ptr() for p in net.parameters()] == state


def test_state_dict_round_trip():
    net, other = network(small()), NCSNPP(small()).eval()
    other.load_state_dict(net.state_dict())
    x, labels = wave((2, 3, 8, 8), 0.5), torch.tensor([0.5, 20.0])
    assert torch.equal(net(x, labels), other(x, labels))


# ----------------------------------------------------------------------------------------------- published outputs


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [  # float32 sums in another order; more of them at 256x256
        ("subvp/cifar10_ddpmpp_continuous", 1e-5),
        ("ve/cifar10_ncsnpp_continuous", 1e-5),
        ("ve/celebahq_256_ncsnpp_continuous", 1e-4),
    ],
)
def test_outputs_are_the_published_ones(name, tolerance):
    golden, config = load_golden(f"model_{name.replace('/', '_')}"), load_config(f"{name}.py")
    net, labels, size = network(config), torch.tensor(golden["labels"]).float(), config.data.image_size
    with torch.no_grad():
        output = net(wave((len(labels), 3, size, size), 0.5), labels).numpy()
    expected = golden["output"] if "output" in golden else golden["output_strided"]
    output = output if "output" in golden else output[:, :, ::8, ::8]
    for image, target in zip(output, expected, strict=True):  # image by image: their scales differ
        assert np.abs(image - target).max() <= tolerance * np.abs(target).max()


# -------------------------------------------------------------------------------------------- a plain second network


class Plain:
    """The same network written plainly: weights by number in the published order, zero insertion, einsum attention."""

    def __init__(self, config, state):
        self.config, self.model, self.sigmas = config, config.model, state["sigmas"]
        units = {}
        for name, value in state.items():
            if name != "sigmas":
                _, number, rest = name.split(".", 2)
                units.setdefault(int(number), {})[rest] = value
        assert list(units) == list(range(len(units)))
        self.units = iter(units.values())

    def unit(self, prefix=""):
        return {name.removeprefix(prefix): value for name, value in next(self.units).items()}

    def norm(self, x, u, name=""):
        groups = min(x.shape[1] // 4, 32)
        return F.group_norm(x, groups, u[name + "weight"], u[name + "bias"], 1e-6)

    def join(self, a, b):
        return (a + b) / math.sqrt(2) if self.model.skip_rescale else a + b

    def filter(self, x, up=1, down=1, pad=(0, 0)):
        taps = torch.tensor(self.model.fir_kernel, dtype=x.dtype)
        kernel = torch.outer(taps, taps) / taps.sum() ** 2 * up**2
        b, c, h, w = x.shape
        wide = x.new_zeros(b, c, h * up, w * up)
        wide[:, :, ::up, ::up] = x
        full = F.conv2d(F.pad(wide, (*pad, *pad)).flatten(0, 1)[:, None], kernel.flip(0, 1)[None, None])
        return full.unflatten(0, (b, c))[:, :, 0, ::down, ::down]

    def up(self, x):
        if self.model.fir:
            return self.filter(x, up=2, pad=(2, 1))
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def down(self, x):
        if self.model.fir:
            return self.filter(x, down=2, pad=(1, 1))
        return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))

    def conv_up(self, x):
        if not self.model.fir:
            u = self.unit("Conv_0.")
            return F.conv2d(self.up(x), u["weight"], u["bias"], padding=1)
        u = self.unit("Conv2d_0.")
        y = F.conv_transpose2d(x, u["weight"].flip(2, 3).transpose(0, 1), stride=2)
        return self.filter(y, pad=(1, 1)) * 4 + u["bias"][:, None, None]  # gain 4 for the inserted zeros

    def conv_down(self, x):
        if not self.model.fir:
            u = self.unit("Conv_0.")
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), u["weight"], u["bias"], stride=2)
        u = self.unit("Conv2d_0.")
        return F.conv2d(self.filter(x, pad=(2, 2)), u["weight"], u["bias"], stride=2)

    def residual(self, x, temb, change=lambda x: x):
        u = next(self.units)
        h = change(F.silu(self.norm(x, u, "GroupNorm_0.")))
        h = F.conv2d(h, u["Conv_0.weight"], u["Conv_0.bias"], padding=1)
        if temb is not None:
            h = h + F.linear(F.silu(temb), u["Dense_0.weight"], u["Dense_0.bias"])[:, :, None, None]
        h = F.silu(self.norm(h, u, "GroupNorm_1."))
        h = F.conv2d(h, u["Conv_1.weight"], u["Conv_1.bias"], padding=1)
        x = change(x)
        if "NIN_0.W" in u:
            x = torch.einsum("bchw,cd->bdhw", x, u["NIN_0.W"]) + u["NIN_0.b"][:, None, None]
        if "Conv_2.weight" in u:
            x = F.conv2d(x, u["Conv_2.weight"], u["Conv_2.bias"])
        return self.join(x, h)

    def attention(self, x):
        u = next(self.units)
        h = self.norm(x, u, "GroupNorm_0.")
        q, k, v = (torch.einsum("bchw,cd->bdhw", h, u[f"NIN_{i}.W"]) + u[f"NIN_{i}.b"][:, None, None] for i in range(3))
        w = torch.einsum("bchw,bcij->bhwij", q, k) * x.shape[1] ** -0.5
        w = w.flatten(3).softmax(-1).reshape(w.shape)
        h = torch.einsum("bhwij,bcij->bchw", w, v)
        return self.join(x, torch.einsum("bchw,cd->bdhw", h, u["NIN_3.W"]) + u["NIN_3.b"][:, None, None])

    def head(self, h):
        norm, conv = self.unit(), self.unit()
        return F.conv2d(F.silu(self.norm(h, norm)), conv["weight"], conv["bias"], padding=1)

    def resample(self, h, temb, plain, with_conv):
        if self.model.resblock_type == "biggan":
            return self.residual(h, temb, plain)
        return with_conv(h) if self.model.resamp_with_conv else plain(h)

    def embedding(self, labels):
        if self.model.embedding_type == "fourier":
            angles = torch.log(labels)[:, None] * next(self.units)["W"] * 2 * math.pi
        else:
            half = self.model.nf // 2
            angles = labels[:, None] * torch.exp(torch.arange(half) * (-math.log(10000) / (half - 1)))
        temb = torch.cat([angles.sin(), angles.cos()], 1)
        if not self.model.conditional:
            return None
        first, second = self.unit(), self.unit()
        temb = F.silu(F.linear(temb, first["weight"], first["bias"]))
        return F.linear(temb, second["weight"], second["bias"])

    def join_input(self, h, image):
        if self.model.progressive_input == "input_skip":
            image, u = self.down(image), self.unit("Conv_0.")
            joined = F.conv2d(image, u["weight"], u["bias"])
            return (joined + h if self.model.progressive_combine == "sum" else torch.cat([joined, h], 1)), image
        if self.model.progressive_input == "residual":
            h = self.join(self.conv_down(image), h)
            return h, h
        return h, image

    def join_output(self, h, image):
        if self.model.progressive == "output_skip":
            return h, self.head(h) if image is None else self.up(image) + self.head(h)
        if self.model.progressive == "residual":
            if image is None:
                return h, self.head(h)
            h = self.join(self.conv_up(image), h)
            return h, h
        return h, image

    def __call__(self, x, labels):
        temb, levels = self.embedding(labels), len(self.model.ch_mult)
        x = x if self.config.data.centered else 2 * x - 1
        u, image = self.unit(), x
        skips = [F.conv2d(x, u["weight"], u["bias"], padding=1)]
        for level in range(levels):
            for _ in range(self.model.num_res_blocks):
                h = self.residual(skips[-1], temb)
                skips.append(self.attention(h) if h.shape[-1] in self.model.attn_resolutions else h)
            if level < levels - 1:
                h, image = self.join_input(self.resample(skips[-1], temb, self.down, self.conv_down), image)
                skips.append(h)
        h = self.residual(self.attention(self.residual(skips[-1], temb)), temb)
        image = None
        for level in reversed(range(levels)):
            for _ in range(self.model.num_res_blocks + 1):
                h = self.residual(torch.cat([h, skips.pop()], 1), temb)
            h = self.attention(h) if h.shape[-1] in self.model.attn_resolutions else h
            h, image = self.join_output(h, image)
            if level:
                h = self.resample(h, temb, self.up, self.conv_up)
        h = image if self.model.progressive == "output_skip" else self.head(h)
        assert not skips
        assert next(self.units, None) is None
        if not self.model.scale_by_sigma:
            return h
        sigmas = labels if self.model.embedding_type == "fourier" else self.sigmas[labels.long()].float()
        return h / sigmas[:, None, None, None]


def assert_equals_plain(config, labels=(0.5, 7.0)):
    net, x, labels = network(config), wave((2, 3, 8, 8), 0.5), torch.tensor(labels)
    with torch.no_grad():
        actual, expected = net(x, labels), Plain(config, net.state_dict())(x, labels)
    # float32 sums in another order, relative to the largest value
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert expected.abs().max() > 1e-3


PYRAMIDS = list(
    itertools.product(
        ("none", "output_skip", "residual"),
        (("none", "sum"), ("input_skip", "sum"), ("input_skip", "cat"), ("residual", "sum")),
    )
)


@pytest.mark.parametrize("fir", [True, False])
@pytest.mark.parametrize("block", ["biggan", "ddpm"])
@pytest.mark.parametrize(("output", "input_combine"), PYRAMIDS)
def test_pyramids_blocks_and_filters_equal_the_plain_network(output, input_combine, block, fir):
    kind, combine = input_combine
    options = {"progressive": output, "progressive_input": kind, "progressive_combine": combine}
    assert_equals_plain(small(resblock_type=block, fir=fir, ch_mult=(1, 2, 2), **options))


@pytest.mark.parametrize(
    "options",
    [
        {"skip_rescale": False},
        {"scale_by_sigma": False},
        {"embedding_type": "positional"},
        {"embedding_type": "positional", "scale_by_sigma": False},
        {"conditional": False},
        {"conditional": False, "embedding_type": "positional"},
        {"conditional": False, "resblock_type": "ddpm"},
        {"resblock_type": "ddpm", "resamp_with_conv": False},
        {"resblock_type": "ddpm", "resamp_with_conv": False, "fir": False},
        {"resblock_type": "ddpm", "skip_rescale": False},
        {"fir_kernel": (1, 4, 2, 3)},
        {"attn_resolutions": ()},
        {"attn_resolutions": (8, 4)},
        {"num_res_blocks": 2, "ch_mult": (2, 1)},
        {"ch_mult": (2,), "progressive": "output_skip"},
    ],
    ids=str,
)
def test_other_options_equal_the_plain_network(options):
    assert_equals_plain(small(**options))


def test_centred_data_equals_the_plain_network():
    config = small()
    config.data.centered = True
    assert_equals_plain(config)


# ------------------------------------------------------------------------------------------------------- behaviour


def test_one_label_for_all_images():
    net, x = network(small()), wave((3, 3, 8, 8), 0.5)
    torch.testing.assert_close(net(x, torch.tensor([2.0])), net(x, torch.full((3,), 2.0)), rtol=1e-6, atol=1e-6)


def test_initialisation():
    torch.manual_seed(0)
    net = NCSNPP(small(nf=64, init_scale=0.0, fourier_scale=4.0, scale_by_sigma=False))
    state = net.state_dict()
    assert state["all_modules.0.W"].std().item() == pytest.approx(4.0, rel=0.3)  # 64 draws
    assert not net.fourier.W.requires_grad
    assert [p.requires_grad for p in net.parameters()].count(False) == 1
    # scale 0 stands for 1e-10: the last convolution and those that end a block; sqrt(3e-10 / (64 * 9)) < 1e-6
    last = [name for name in state if name.endswith("weight")][-1]
    assert 0 < state[last].abs().max() < 1e-5
    ends = [value for name, value in state.items() if name.endswith(("Conv_1.weight", "NIN_3.W"))]
    assert all(0 < value.abs().max() < 1e-5 for value in ends)
    assert net(wave((1, 3, 8, 8), 0.5), torch.tensor([1.0])).abs().max() < 1e-3


def test_init_scale():
    """Uniform on +-sqrt(3 scale / fan_avg): with scale 2, fan_avg 9 * 32, the largest of 9216 draws comes near."""
    torch.manual_seed(0)
    for block in ("biggan", "ddpm"):
        weight = NCSNPP(small(init_scale=2.0, resblock_type=block)).middle[0].conv1.weight
        bound = math.sqrt(3 * 2.0 / (9 * 32))
        assert 0.99 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize("output", ["none", "output_skip", "residual"])
def test_every_trainable_parameter_gets_a_gradient(output):
    net = network(small(progressive=output, dropout=0.1)).train()
    net(wave((2, 3, 8, 8), 0.5), torch.tensor([0.5, 7.0])).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_dropout_acts_in_training_alone():
    net, x, labels = network(small(dropout=0.5)), wave((1, 3, 8, 8), 0.5), torch.tensor([1.0])
    assert torch.equal(net(x, labels), net(x, labels))
    net.train()
    assert not torch.equal(net(x, labels), net(x, labels))


@pytest.mark.parametrize(
    ("option", "value", "choices"),
    [
        ("resblock_type", "vgg", "ddpm, biggan"),
        ("progressive", "input_skip", "none, output_skip, residual"),
        ("progressive_input", "output_skip", "none, input_skip, residual"),
        ("progressive_combine", "max", "sum, cat"),
        ("embedding_type", "learned", "fourier, positional"),
        ("nonlinearity", "tanhh", "swish"),
        ("normalization", "BatchNorm", "GroupNorm"),
        ("attention_type", "linear", "ddpm"),
        ("conv_size", 5, "3"),
        ("fir_kernel", (1,), "two or more taps"),
    ],
)
def test_unknown_options_are_refused(option, value, choices):
    with pytest.raises(UserError, match=choices):
        NCSNPP(small(**{option: value}))
