"""NCSN++ and DDPM++ (Score-SDE, arXiv 2011.13456, appendix H), with the published names of their weights."""

import math

import torch
from torch import nn

from basics.console import UserError, choose
from models import layers, resample
from models.ddpm import Stage

FOURIER_SCALE = 16.0  # where a config asks for Fourier features without giving their scale


class NCSNPP(layers.PublishedNames, nn.Module):
    """A U-Net as DDPM's with filtered resampling, other residual blocks and image pyramids beside the features.

    Args:
        config: a config tree; `config.model` and `config.data` are read.

    Shapes: `forward(x, labels)` takes x (B, C, H, W) in the data's range ([-1, 1] if `data.centered`, else [0, 1],
    which is centred here) and labels (B,) or (1,): noise levels for the Fourier embedding, times or noise indices for
    the positional one; returns (B, C, H, W).

    Raises:
        UserError: if the config names an option that there is not.
    """

    def __init__(self, config):
        super().__init__()
        model, data = config.model, config.data
        parts, nf = Parts(model, data), model.nf
        self.centered, self.scale_by_sigma, self.nf, self.act = data.centered, model.scale_by_sigma, nf, parts.act
        self.register_buffer("sigmas", layers.sigma_table(model.sigma_min, model.sigma_max, model.num_scales))

        fourier = choose(model.embedding_type.lower(), EMBEDDINGS, "embedding (config.model.embedding_type)")
        self.fourier = layers.FourierFeatures(nf, model.get("fourier_scale", FOURIER_SCALE)) if fourier else None
        self.time = layers.TimeEmbedding(nf, parts.act, 2 * nf if fourier else nf) if model.conditional else None
        self.conv_in = layers.conv(data.num_channels, nf)

        channels = [nf * m for m in model.ch_mult]
        attended = [data.image_size // 2**i in model.attn_resolutions for i in range(len(channels))]
        self.down, skips = self._down(parts, channels, attended, model.num_res_blocks)
        c = skips[-1]
        self.middle = nn.ModuleList([parts.residual(c, c), parts.attention(c), parts.residual(c, c)])
        self.up, c = self._up(parts, channels, attended, model.num_res_blocks, c, skips)
        self.head = None if parts.progressive is OutputSkip else parts.head(c, parts.image_channels)
        self.use_published_names()

    @staticmethod
    def _down(parts, channels, attended, blocks):
        """The levels from the finest to the coarsest, and the channels of every output they keep."""
        levels, c, image = nn.ModuleList(), parts.nf, parts.image_channels
        skips = [c]
        for level, (c_out, attend) in enumerate(zip(channels, attended, strict=True)):
            stages = []
            for _ in range(blocks):
                stages.append(Stage(parts.residual(c, c_out), parts.attention(c_out) if attend else None))
                c = c_out
                skips.append(c)
            if level == len(channels) - 1:
                levels.append(DownLevel(stages))
                break
            resampler, pyramid = parts.down(c), None
            if parts.progressive_input is not None:
                pyramid = parts.progressive_input(parts, image, c)
                c, image = pyramid.channels_out, pyramid.image_out
            levels.append(DownLevel(stages, resampler, pyramid))
            skips.append(c)
        return levels, skips

    @staticmethod
    def _up(parts, channels, attended, blocks, c, skips):
        """The levels from the coarsest to the finest, and the channels of the last one."""
        levels, skips, image = nn.ModuleList(), list(skips), None  # the pyramid starts at the coarsest level
        for level, (c_out, attend) in reversed(list(enumerate(zip(channels, attended, strict=True)))):
            stages = []
            for block in range(blocks + 1):
                attention = parts.attention(c_out) if attend and block == blocks else None
                stages.append(Stage(parts.residual(c + skips.pop(), c_out), attention, takes_skip=True))
                c = c_out
            pyramid = None
            if parts.progressive is not None:
                pyramid = parts.progressive(parts, image, c)
                image = pyramid.image_out
            levels.append(UpLevel(stages, pyramid, parts.up(c) if level else None))
        return levels, c

    def forward(self, x, labels):
        dtype = self.conv_in.weight.dtype  # from here on, see `models.inference`
        temb = self._embed(labels, dtype)  # (B or 1, 4 nf)
        x = (x if self.centered else 2 * x - 1).to(dtype)
        skips, pyramid = [self.conv_in(x)], x
        for level in self.down:
            outputs, pyramid = level(skips[-1], temb, pyramid)
            skips += outputs
        first, attention, second = self.middle
        h = second(attention(first(skips[-1], temb)), temb)
        pyramid = None
        for level in self.up:
            h, pyramid = level(h, temb, skips, pyramid)
        h = pyramid if self.head is None else self.head(h)  # (B, C, H, W)
        if not self.scale_by_sigma:
            return h
        return layers.divided(h, self.sigmas[labels.long()] if self.fourier is None else labels)

    def _embed(self, labels, dtype):
        if self.time is None:
            return None
        embedded = layers.sinusoids(labels, self.nf) if self.fourier is None else self.fourier(labels)
        return self.time(embedded).to(dtype)


# ------------------------------------------------------------------------------------------------- levels of the U


class DownLevel(nn.Module):
    """Stages at one size, then halving, then the image pyramid joining; the last level has stages alone.

    Shapes: `forward(h, temb, pyramid)` takes h (B, C, H, W), temb (B or 1, T) or None and the image pyramid; returns
    the list of every stage's output and the halved one (B, C', H/2, W/2), and the pyramid at that size.
    """

    def __init__(self, stages, resampler=None, pyramid=None):
        super().__init__()
        self.stages, self.resampler, self.pyramid = nn.ModuleList(stages), resampler, pyramid

    def forward(self, h, temb, pyramid):
        outputs = []
        for stage in self.stages:
            h = stage(h, temb)
            outputs.append(h)
        if self.resampler is not None:
            h = _resample(self.resampler, h, temb)
            if self.pyramid is not None:
                h, pyramid = self.pyramid(h, pyramid)
            outputs.append(h)
        return outputs, pyramid


class UpLevel(nn.Module):
    """Stages at one size, each on [h, skip], then the image pyramid, then doubling except at the last level.

    Shapes: `forward(h, temb, skips, pyramid)` takes h (B, C, H, W), pops its skips off the list and returns h
    (B, C', 2H, 2W) and the pyramid (B, C'', H, W).
    """

    def __init__(self, stages, pyramid=None, resampler=None):
        super().__init__()
        self.stages, self.pyramid, self.resampler = nn.ModuleList(stages), pyramid, resampler

    def forward(self, h, temb, skips, pyramid):
        for stage in self.stages:
            h = stage(h, temb, skips.pop())
        if self.pyramid is not None:
            h, pyramid = self.pyramid(h, pyramid)
        if self.resampler is not None:
            h = _resample(self.resampler, h, temb)
        return h, pyramid


def _resample(resampler, h, temb):
    return resampler(h, temb) if isinstance(resampler, BigGANBlock) else resampler(h)


class BigGANBlock(layers.ResidualBlock):
    """The residual block of BigGAN (arXiv 1809.11096): it resamples inside, on both paths.

    Shapes: `forward(x, temb)` takes x (B, C_in, H, W) and temb (B or 1, T); returns (B, C_out, H', W') with the size as
    `resampler` leaves it.
    """

    published = {**layers.ResidualBlock.published, "shortcut": "Conv_2"}

    def __init__(self, channels_in, channels_out, *args, resampler=None, **kwargs):
        super().__init__(channels_in, channels_out, *args, **kwargs)
        self.resampler = resampler
        if resampler is not None or channels_in != channels_out:
            self.shortcut = layers.conv(channels_in, channels_out, kernel=1)

    def forward(self, x, temb):
        h = self.norm0(x)
        h = self.conv0(h) if self.resampler is None else self.resampler.then_conv(h, self.conv0)
        shift = None if self.dense is None else self.dense(self.act(temb))  # (B or 1, C_out)
        h = self.conv1(self.dropout(self.norm1(h, shift)))
        x = x if self.resampler is None else self.resampler(x)
        return layers.rescaled_sum(h, x if self.shortcut is None else self.shortcut(x), self.rescale)


class Head(nn.Module):
    """GroupNorm, act, conv3x3: (B, C, H, W) -> (B, C_out, H, W)."""

    def __init__(self, channels, channels_out, act, scale):
        super().__init__()
        self.norm = layers.NormAct(groups(channels), channels, act)
        self.conv = layers.conv(channels, channels_out, scale=scale)

    def forward(self, h):
        return self.conv(self.norm(h))


# --------------------------------------------------------------------------------------------------- image pyramids
# On the way down `pyramid` is the input image, halved level by level; on the way up it grows into the output.
# `image_out` says how many channels it has after a level, `channels_out` how many the features have.


class InputSkip(nn.Module):
    """The halved image, through a 1x1 convolution, is added to the features or concatenated with them."""

    published = {"conv": "Conv_0"}

    def __init__(self, parts, image, channels):
        super().__init__()
        self.conv, self.down = layers.conv(image, channels, kernel=1), resample.Down(parts.taps)
        self.combine = parts.combine
        self.channels_out = 2 * channels if parts.combine is _concatenate else channels
        self.image_out = image

    def forward(self, h, pyramid):  # (B, C, H, W), (B, image, 2H, 2W) -> (B, C', H, W), (B, image, H, W)
        pyramid = self.down(pyramid)
        return self.combine(self.conv(pyramid), h), pyramid


class InputResidual(resample.ConvDown):
    """The pyramid, halved by a convolution, takes in the features and replaces them."""

    def __init__(self, parts, image, channels):
        super().__init__(image, channels, parts.taps)
        self.rescale = parts.rescale
        self.channels_out = self.image_out = channels

    def forward(self, h, pyramid):  # (B, C, H, W), (B, image, 2H, 2W) -> twice (B, C, H, W)
        h = layers.rescaled_sum(super().forward(pyramid), h, self.rescale)
        return h, h


class OutputSkip(nn.Module):
    """The output is the sum of an image made at every level, doubled from level to level."""

    def __init__(self, parts, image, channels):
        super().__init__()
        self.head = parts.head(channels, parts.image_channels)
        self.up = None if image is None else resample.Up(parts.taps)
        self.image_out = parts.image_channels

    def forward(self, h, pyramid):  # (B, C, H, W), (B, image, H/2, W/2) -> (B, C, H, W), (B, image, H, W)
        image = self.head(h)
        return h, image if self.up is None else self.up(pyramid) + image


class OutputResidual(resample.ConvUp):
    """The pyramid, doubled by a convolution, takes in the features and replaces them."""

    def __init__(self, parts, image, channels):
        super().__init__(image, channels, parts.taps)
        self.rescale = parts.rescale
        self.image_out = channels

    def forward(self, h, pyramid):  # (B, C, H, W), (B, image, H/2, W/2) -> twice (B, C, H, W)
        h = layers.rescaled_sum(super().forward(pyramid), h, self.rescale)
        return h, h


class OutputResidualStart(nn.Module):
    """At the coarsest level: the pyramid starts from the features, which go on unchanged."""

    def __init__(self, parts, channels):
        super().__init__()
        self.head = Head(channels, channels, parts.act, scale=1.0)
        self.image_out = channels

    def forward(self, h, pyramid):  # (B, C, H, W), None -> twice (B, C, H, W)
        return h, self.head(h)


def _output_residual(parts, image, channels):
    return OutputResidualStart(parts, channels) if image is None else OutputResidual(parts, image, channels)


def _concatenate(image, h):
    return torch.cat([image, h], dim=1)


# ---------------------------------------------------------------------------------------------------------- options

EMBEDDINGS = {"fourier": True, "positional": False}  # whether the labels are noise levels, seen through FourierFeatures
INPUTS = {"none": None, "input_skip": InputSkip, "residual": InputResidual}
OUTPUTS = {"none": None, "output_skip": OutputSkip, "residual": _output_residual}
COMBINE = {"sum": torch.add, "cat": _concatenate}
BLOCKS = {"ddpm": layers.ResidualBlock, "biggan": BigGANBlock}
FIXED = {"normalization": "GroupNorm", "attention_type": "ddpm", "conv_size": 3}  # fields with one value


class Parts:
    """Makes the layers that a config's options ask for.

    Raises:
        UserError: if the config names an option that there is not.
    """

    def __init__(self, model, data):
        for field, only in FIXED.items():
            if model.get(field, only) != only:
                raise UserError(f"config.model.{field} is {model[field]}; set it to {only}, all that ncsnpp supports")
        self.act = layers.activation(model.nonlinearity)
        self.block = choose(model.resblock_type.lower(), BLOCKS, "block (config.model.resblock_type)")
        self.progressive = choose(model.progressive.lower(), OUTPUTS, "pyramid (config.model.progressive)")
        self.progressive_input = choose(
            model.progressive_input.lower(), INPUTS, "pyramid (config.model.progressive_input)"
        )
        self.combine = choose(model.progressive_combine.lower(), COMBINE, "choice (config.model.progressive_combine)")
        self.taps = tuple(model.fir_kernel) if model.fir else None
        self.rescale = math.sqrt(0.5) if model.skip_rescale else 1.0
        self.nf, self.image_channels = model.nf, data.num_channels
        self.temb = 4 * model.nf if model.conditional else None
        self.dropout, self.init_scale = model.dropout, model.init_scale
        self.skip_rescale, self.with_conv = model.skip_rescale, model.resamp_with_conv

    def residual(self, channels_in, channels_out, **resampler):
        """A residual block of the type asked for."""
        block = self.block(
            channels_in,
            channels_out,
            self.temb,
            self.act,
            self.dropout,
            groups=groups,
            skip_rescale=self.skip_rescale,
            **resampler,
        )
        layers.variance_scaling_(block.conv1.weight, self.init_scale)
        return block

    def attention(self, channels):
        """Self-attention over the pixels."""
        return layers.Attention(channels, groups(channels), self.init_scale, self.skip_rescale)

    def down(self, channels):
        """What halves the size of the features between levels."""
        return self._resampler(channels, resample.Down, resample.ConvDown)

    def up(self, channels):
        """What doubles the size of the features between levels."""
        return self._resampler(channels, resample.Up, resample.ConvUp)

    def _resampler(self, channels, plain, with_conv):
        if self.block is BigGANBlock:
            return self.residual(channels, channels, resampler=plain(self.taps))
        return with_conv(channels, channels, self.taps) if self.with_conv else plain(self.taps)

    def head(self, channels, channels_out):
        """GroupNorm, act and a convolution that starts near zero."""
        return Head(channels, channels_out, self.act, self.init_scale)


def groups(channels):
    """Groups of a group normalisation: min(C/4, 32)."""
    return min(channels // 4, 32)
