"""Building blocks shared by the score networks, and the published names of their weights.

Images inside a network are (B, C, H, W); a time embedding is (B, T), or (1, T) when all images share one time, as
in sampling: it is then computed once and broadcast.

Sources: DDPM (arXiv 2006.11239), Score-SDE (arXiv 2011.13456).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from basics.console import choose

GROUP_NORM_EPS = 1e-6
NATIVE_PIXELS = 1024  # from this size of the images on torch takes another algorithm, measured twice as fast as ours

ACTIVATIONS = {
    "swish": F.silu,
    "relu": F.relu,
    "elu": F.elu,
    "lrelu": lambda x: F.leaky_relu(x, 0.2),
}


def activation(name):
    """The nonlinearity a config calls `name`.

    Raises:
        UserError: if there is none.
    """
    return choose(name.lower(), ACTIVATIONS, "nonlinearity")


# ---------------------------------------------------------------------------------------------- initialisation


def variance_scaling_(weight, scale=1.0, fan_in=None, fan_out=None):
    """Fills `weight` in place from U(-a, a), a = sqrt(3 scale / fan_avg); scale 0 stands for 1e-10.

    The fans default to those of a convolution's or linear layer's (out, in, ...) weight.
    """
    receptive = weight[0, 0].numel() if weight.ndim > 1 else 1
    fan_in = fan_in or weight.shape[1] * receptive
    fan_out = fan_out or weight.shape[0] * receptive
    bound = math.sqrt(3 * (scale or 1e-10) / ((fan_in + fan_out) / 2))
    with torch.no_grad():
        return weight.uniform_(-bound, bound)


def conv(channels_in, channels_out, kernel=3, stride=1, padding=None, scale=1.0, bias=True):
    """A kernel x kernel convolution with the published initialisation; `padding` keeps the size by default."""
    layer = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2 if padding is None else padding, bias=bias)
    variance_scaling_(layer.weight, scale)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def linear(features_in, features_out, scale=1.0):
    """A linear layer with the published initialisation."""
    layer = nn.Linear(features_in, features_out)
    variance_scaling_(layer.weight, scale)
    nn.init.zeros_(layer.bias)
    return layer


# -------------------------------------------------------------------------------------------------------- layers


class Projection(nn.Module):
    """A 1x1 convolution whose weight is held as a matrix `W` (in, out), as published ("network in network")."""

    def __init__(self, channels_in, channels_out, scale=0.1):
        super().__init__()
        self.W = nn.Parameter(variance_scaling_(torch.empty(channels_in, channels_out), scale))
        self.b = nn.Parameter(torch.zeros(channels_out))

    def forward(self, x):  # (B, in, H, W) -> (B, out, H, W)
        return F.conv2d(x, self.W.t()[:, :, None, None], self.b)


class NormAct(nn.GroupNorm):
    """Group normalisation (eps 1e-6), then the nonlinearity; a shift of the channels before both, if given.

    Convolutions are fastest channels-last, but torch's group normalisation is slow for that layout on a CPU: its
    backward pass always, its forward pass for less than `NATIVE_PIXELS`.  There the three operations are done together,
    by whole-tensor operations, with a backward pass of our own.

    Args:
        groups, channels: of the normalisation.
        act: the nonlinearity.
    """

    def __init__(self, groups, channels, act):
        super().__init__(groups, channels, eps=GROUP_NORM_EPS)
        self.act = act

    def forward(self, x, shift=None):  # (B, C, H, W), (B or 1, C) -> (B, C, H, W)
        inference = not (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad))
        native = inference and x.shape[-2] * x.shape[-1] >= NATIVE_PIXELS
        if self.act is F.silu and _is_channels_last_on_cpu(x) and not native:
            zero = x.new_zeros(1, x.shape[1]) if shift is None else shift
            return _NormSwish.apply(x, zero, self.weight, self.bias, self.num_groups, self.eps)
        if shift is not None:
            x = x + shift[:, :, None, None]
        y = super().forward(x)
        return F.silu(y, inplace=True) if inference and self.act is F.silu else self.act(y)


def _is_channels_last_on_cpu(x):
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)


class _NormSwish(torch.autograd.Function):
    """swish(group_norm(x + shift)) of a channels-last x.

    With c = x + shift - mean, r = 1 / sqrt(mean(c^2) + eps), y = gamma r c + beta, n values a group, d = dL/dy and the
    group sums A = sum gamma d, Q = sum gamma d c:   dL/dx = gamma r d - c Q r^3 / n - A r / n.
    """

    @staticmethod
    def forward(ctx, x, shift, weight, bias, groups, eps):
        _, channels, height, width = x.shape
        pixels, size = height * width, channels // groups
        x = _rows(x)  # (B, H W, C)
        mean = x.mean(dim=1) + shift  # (B, C)
        offset = mean - _over_groups(mean, groups) / size  # (B, C): the channels' means after centring
        centred = x + (offset - mean + shift)[:, None]  # (B, H W, C)
        y = torch.square(centred)  # its memory serves twice: large fresh tensors are what costs
        rstd = (_over_groups(y.sum(dim=1), groups) / (size * pixels) + eps).rsqrt()  # (B, C)
        torch.addcmul(bias, centred, (rstd * weight)[:, None], out=y)  # (B, H W, C)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(centred, y, offset, rstd, weight)
            ctx.groups, ctx.size, ctx.one_shift = groups, (height, width), len(shift) == 1
            return _images(F.silu(y), height, width)
        return _images(F.silu(y, inplace=True), height, width)

    @staticmethod
    def backward(ctx, grad):
        centred, y, offset, rstd, weight = ctx.saved_tensors
        _, pixels, channels = y.shape
        n = channels // ctx.groups * pixels
        d = torch.ops.aten.silu_backward(_rows(grad.contiguous(memory_format=torch.channels_last)), y)  # (B, H W, C)
        dx = d * centred  # its memory serves twice
        d_sum, dc_sum = d.sum(dim=1), dx.sum(dim=1)  # each (B, C)
        slope = _over_groups(dc_sum * weight, ctx.groups) * rstd**3 / -n  # (B, C)
        level = _over_groups(d_sum * weight, ctx.groups) * rstd / -n  # (B, C)
        scale = rstd * weight  # (B, C)
        torch.addcmul(level[:, None], centred, slope[:, None], out=dx).addcmul_(d, scale[:, None])  # (B, H W, C)
        dshift = scale * d_sum + pixels * (slope * offset + level)  # (B, C): the sum of dx over the pixels
        if ctx.one_shift:
            dshift = dshift.sum(dim=0, keepdim=True)
        return _images(dx, *ctx.size), dshift, (dc_sum * rstd).sum(dim=0), d_sum.sum(dim=0), None, None


def _rows(x):  # (B, C, H, W) channels-last -> (B, H W, C), the same memory
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _images(x, height, width):  # (B, H W, C) -> (B, C, H, W) channels-last, the same memory
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def _over_groups(values, groups):  # (B, C) -> (B, C), the sum over each channel's group
    return values.unflatten(1, (groups, -1)).sum(dim=2).repeat_interleave(values.shape[1] // groups, dim=1)


class Attention(nn.Module):
    """Self-attention over the pixels: one head, scale C^-1/2, plus the input.

    Args:
        channels: C.
        groups: of the group normalisation.
        out_scale: initial scale of the output projection.
        skip_rescale: divide the sum with the input by sqrt 2.
    """

    published = {"norm": "GroupNorm_0", "query": "NIN_0", "key": "NIN_1", "value": "NIN_2", "out": "NIN_3"}

    def __init__(self, channels, groups=32, out_scale=0.0, skip_rescale=False):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=GROUP_NORM_EPS)
        self.query = Projection(channels, channels)
        self.key = Projection(channels, channels)
        self.value = Projection(channels, channels)
        self.out = Projection(channels, channels, out_scale)
        self.rescale = math.sqrt(0.5) if skip_rescale else 1.0

    def forward(self, x):  # (B, C, H, W) -> (B, C, H, W)
        b, c, height, width = x.shape
        projections = (self.query, self.key, self.value)
        weight = torch.cat([p.W for p in projections], dim=1)  # (C, 3C): one matrix product for all three
        bias = torch.cat([p.b for p in projections])  # (3C,)
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (B, H W, C)
        q, k, v = (
            F.linear(pixels, weight.t(), bias).unflatten(2, (3, 1, c)).permute(2, 0, 3, 1, 4)
        )  # each (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (B, H W, C)
        h = F.linear(h, self.out.W.t(), self.out.b)  # (B, H W, C)
        h = h.transpose(1, 2).reshape(b, c, height, width)
        return rescaled_sum(x, h, self.rescale)


class ResidualBlock(nn.Module):
    """GN, act, conv3x3, + Linear(act(temb)), GN, act, dropout, conv3x3, + shortcut.

    Args:
        channels_in, channels_out: where they differ the shortcut is a projection.
        temb_features: T, or None for a network without time conditioning.
        act: the nonlinearity.
        dropout: probability, in training.
        groups: a function channels -> number of groups of the normalisation.
        skip_rescale: divide the sum with the shortcut by sqrt 2.
    """

    published = {
        "norm0": "GroupNorm_0",
        "conv0": "Conv_0",
        "dense": "Dense_0",
        "norm1": "GroupNorm_1",
        "conv1": "Conv_1",
        "shortcut": "NIN_0",
    }

    def __init__(
        self, channels_in, channels_out, temb_features, act, dropout=0.0, groups=lambda c: 32, skip_rescale=False
    ):
        super().__init__()
        self.act = act
        self.norm0 = NormAct(groups(channels_in), channels_in, act)
        self.conv0 = conv(channels_in, channels_out)
        self.dense = linear(temb_features, channels_out) if temb_features else None
        self.norm1 = NormAct(groups(channels_out), channels_out, act)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = conv(channels_out, channels_out, scale=0.0)
        self.shortcut = Projection(channels_in, channels_out) if channels_in != channels_out else None
        self.rescale = math.sqrt(0.5) if skip_rescale else 1.0

    def forward(self, x, temb):  # (B, in, H, W), (B or 1, T) -> (B, out, H, W)
        h = self.conv0(self.norm0(x))
        shift = None if self.dense is None else self.dense(self.act(temb))  # (B or 1, out)
        h = self.conv1(self.dropout(self.norm1(h, shift)))
        return rescaled_sum(x if self.shortcut is None else self.shortcut(x), h, self.rescale)


class Downsample(nn.Module):
    """Halves the size: a stride-2 conv3x3 on the input padded at right and bottom, or a 2x2 mean."""

    published = {"conv": "Conv_0"}

    def __init__(self, channels, with_conv=True):
        super().__init__()
        self.conv = conv(channels, channels, stride=2, padding=0) if with_conv else None

    def forward(self, x):  # (B, C, H, W) -> (B, C, H/2, W/2)
        return F.avg_pool2d(x, 2) if self.conv is None else self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the size by nearest neighbours, then a conv3x3 if `with_conv`."""

    published = {"conv": "Conv_0"}

    def __init__(self, channels, with_conv=True):
        super().__init__()
        self.conv = conv(channels, channels) if with_conv else None

    def forward(self, x):  # (B, C, H, W) -> (B, C, 2H, 2W)
        if self.conv is None:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return doubled_conv(x, self.conv)


def doubled_conv(x, conv):
    """A conv3x3 of x (B, C, H, W) doubled in size by nearest neighbours: (B, C_out, 2H, 2W).

    Of the nine taps on the doubled image several always meet the same pixel: with these added up beforehand, both steps
    together are one transposed convolution with a 4x4 kernel, at less than half of the multiplications.
    """
    taps = F.avg_pool2d(F.pad(conv.weight, (1, 1, 1, 1)), 2, stride=1) * 4  # (out, in, 4, 4): sums of 2x2 taps
    return F.conv_transpose2d(x, taps.flip(2, 3).transpose(0, 1), conv.bias, stride=2, padding=1)


def rescaled_sum(x, h, rescale):
    """The sum of two paths, times `rescale`: 1, or sqrt(1/2) so that the variance stays."""
    return x + h if rescale == 1.0 else (x + h) * rescale


# ------------------------------------------------------------------------------------------- time and noise level


class TimeEmbedding(nn.Module):
    """Sinusoids of the labels, then Linear(nf, 4nf), act, Linear(4nf, 4nf)."""

    published = {}

    def __init__(self, features, act, embedded=None):
        super().__init__()
        self.features, self.act = features, act
        self.dense0 = linear(embedded or features, 4 * features)
        self.dense1 = linear(4 * features, 4 * features)

    def forward(self, embedded):  # (B or 1, embedded) -> (B or 1, 4 nf)
        return self.dense1(self.act(self.dense0(embedded)))


def sinusoids(labels, features):
    """[sin, cos] of labels times nf/2 frequencies from 1 to 1/10000: (B,) -> (B, features) (DDPM)."""
    half = features // 2
    frequencies = torch.exp(
        torch.arange(half, device=labels.device, dtype=torch.float32) * -(math.log(10000) / (half - 1))
    )
    angles = labels.float()[:, None] * frequencies  # (B, half)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, features % 2))


class FourierFeatures(nn.Module):
    """[sin, cos](2 pi W ln(labels)), W ~ N(0, scale^2) frozen: labels (B,) > 0 -> (B, 2 features)."""

    def __init__(self, features, scale):
        super().__init__()
        self.W = nn.Parameter(torch.randn(features) * scale, requires_grad=False)

    def forward(self, labels):
        angles = labels.float().log()[:, None] * self.W * 2 * math.pi  # (B, features)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def divided(h, sigmas):
    """Images h (B, C, H, W) divided by noise levels (B,) or (1,), which are never rounded to less than float32."""
    return h / sigmas.to(torch.promote_types(h.dtype, torch.float32))[:, None, None, None]


def sigma_table(sigma_min, sigma_max, num_scales):
    """The descending noise levels exp(linspace(ln sigma_max, ln sigma_min, N)): (N,) float64."""
    # Always on the CPU: on the device `meta`, where checkpoints are held against their config, torch would import its
    # compiler for it, which takes more than a second.
    options = {"dtype": torch.float64, "device": "cpu"}
    return torch.linspace(math.log(sigma_max), math.log(sigma_min), num_scales, **options).exp()


# -------------------------------------------------------------------------------------------------- published names


class PublishedNames:
    """Mixin of a network: its state dict carries the published names `all_modules.N.*`.

    Modules have readable names here.  The published code keeps them in one list in the order of their construction, so
    the N-th unit in the order of registration is `all_modules.N`; inside a unit the names follow its class's
    `published` table (a unit whose table is empty counts each of its children as a unit).  `state_dict()` and
    `load_state_dict()` translate; `parameters()` come in the published order, which the EMA's positions rely on.
    """

    def use_published_names(self):
        """To be called at the end of the network's constructor."""
        table = _published_prefixes(self)

        def rename(state, mapping):
            for name in list(state):
                owner = max((p for p in mapping if name == p or name.startswith(p + ".")), key=len, default=None)
                value = state.pop(name)  # popped and put back in order
                state[name if owner is None else mapping[owner] + name[len(owner) :]] = value

        inverse = {published: readable for readable, published in table.items()}
        self.register_state_dict_post_hook(lambda module, state, prefix, metadata: rename(state, _under(prefix, table)))
        self.register_load_state_dict_pre_hook(
            lambda module, state, prefix, *rest: rename(state, _under(prefix, inverse))
        )


def _under(prefix, table):
    return {prefix + a: prefix + b for a, b in table.items()}


def _published_prefixes(network):
    """Readable prefix -> published prefix of every innermost renamed module."""
    units, table = [], {}

    def collect(module, name):
        if not any(True for _ in module.parameters()):
            return
        if module is not network and (getattr(module, "published", None) or not list(module.children())):
            units.append((name, module))
            return
        for child_name, child in module.named_children():
            collect(child, f"{name}.{child_name}" if name else child_name)

    collect(network, "")
    for number, (name, module) in enumerate(units):
        names = getattr(module, "published", {})
        if not names:
            table[name] = f"all_modules.{number}"
        for child, published in names.items():
            table[f"{name}.{child}"] = f"all_modules.{number}.{published}"
    return table
