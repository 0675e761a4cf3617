"""The DDPM U-Net of Score-SDE (arXiv 2006.11239, 2011.13456), with the published names of its weights."""

import torch
from torch import nn

from basics.console import choose
from models import layers

# On the way up: whether attention follows the block of this number, `last` being the level's last block.
ATTENTION_UP = {"last": lambda block, last: block == last, "all": lambda block, last: True}


class DDPM(layers.PublishedNames, nn.Module):
    """A U-Net with residual blocks, self-attention at the resolutions asked for, and time conditioning.

    Args:
        config: a config tree; `config.model` and `config.data` are read.
        attention_up: at an attended level on the way up, attention follows the 'last' residual block (Score-SDE), or
            'all' of them (the first DDPM, arXiv 2006.11239, and its weights in diffusers).

    Shapes: `forward(x, labels)` takes x (B, C, H, W) in the data's range ([-1, 1] if `data.centered`, else [0, 1],
    which is centred here) and labels (B,) or (1,), the time or noise index; returns (B, C, H, W).
    """

    def __init__(self, config, attention_up="last"):
        super().__init__()
        model, data = config.model, config.data
        attend_after = choose(attention_up, ATTENTION_UP, "attention on the way up")
        act = layers.activation(model.nonlinearity)
        nf, blocks = model.nf, model.num_res_blocks
        channels = [nf * m for m in model.ch_mult]
        resolutions = [data.image_size // 2**i for i in range(len(channels))]
        attended = [r in model.attn_resolutions for r in resolutions]
        temb = 4 * nf if model.conditional else None

        def residual(c_in, c_out):
            return layers.ResidualBlock(c_in, c_out, temb, act, model.dropout)

        self.centered, self.scale_by_sigma, self.nf = data.centered, model.scale_by_sigma, nf
        self.register_buffer("sigmas", layers.sigma_table(model.sigma_min, model.sigma_max, model.num_scales))
        self.time = layers.TimeEmbedding(nf, act) if model.conditional else None
        self.conv_in = layers.conv(data.num_channels, nf)

        # down: every output is kept for the way up
        self.down, skips, c = nn.ModuleList(), [nf], nf
        for level, (c_out, attend) in enumerate(zip(channels, attended, strict=True)):
            for _ in range(blocks):
                self.down.append(Stage(residual(c, c_out), layers.Attention(c_out) if attend else None))
                c = c_out
                skips.append(c)
            if level < len(channels) - 1:
                self.down.append(layers.Downsample(c, model.resamp_with_conv))
                skips.append(c)

        self.middle = nn.ModuleList([residual(c, c), layers.Attention(c), residual(c, c)])

        # up: one more block per level, each on [h, skip]
        self.up = nn.ModuleList()
        for level, (c_out, attend) in reversed(list(enumerate(zip(channels, attended, strict=True)))):
            for block in range(blocks + 1):
                attention = layers.Attention(c_out) if attend and attend_after(block, blocks) else None
                self.up.append(Stage(residual(c + skips.pop(), c_out), attention, takes_skip=True))
                c = c_out
            if level:
                self.up.append(layers.Upsample(c, model.resamp_with_conv))

        self.norm_out = layers.NormAct(32, c, act)
        self.conv_out = layers.conv(c, data.num_channels, scale=0.0)
        self.use_published_names()

    def forward(self, x, labels):
        dtype = self.conv_in.weight.dtype  # from here on, see `models.inference`
        temb = self.time(layers.sinusoids(labels, self.nf)).to(dtype) if self.time else None  # (B or 1, 4 nf)
        h = self.conv_in((x if self.centered else 2 * x - 1).to(dtype))
        skips = [h]
        for module in self.down:
            h = module(h, temb) if isinstance(module, Stage) else module(h)
            skips.append(h)
        first, attention, second = self.middle
        h = second(attention(first(h, temb)), temb)
        for module in self.up:
            h = module(h, temb, skips.pop()) if isinstance(module, Stage) else module(h)
        h = self.conv_out(self.norm_out(h))  # (B, C, H, W)
        return layers.divided(h, self.sigmas[labels.long()]) if self.scale_by_sigma else h


class Stage(nn.Module):
    """A residual block and the attention after it, if any; on the way up the block sees [h, skip]."""

    def __init__(self, block, attention=None, takes_skip=False):
        super().__init__()
        self.block, self.attention, self.takes_skip = block, attention, takes_skip

    def forward(self, h, temb, skip=None):  # (B, C, H, W), (B or 1, T), skip (B, C', H, W) -> (B, C_out, H, W)
        if self.takes_skip:
            h = torch.cat([h, skip], dim=1)
        h = self.block(h, temb)
        return h if self.attention is None else self.attention(h)
