"""The residual networks of SimCLRv2 (Chen, Kornblith, Swersky, Norouzi and Hinton, NeurIPS 2020).

ResNets (He et al., CVPR 2016) of any depth and width; those with selective kernels (Li et al.,
"Selective Kernel Networks", CVPR 2019) also have the stem and the pooled shortcut of ResNet-D
(He et al., "Bag of Tricks", CVPR 2019).  The modules' numbers are those of the published names.
"""

import dataclasses
import re

import torch
from torch import nn

RATIO, FEWEST = 1 / 16, 32  # selective kernel: width of its bottleneck relative to its output, and at least
_BLOCK = re.compile(r"net\.(\d+)\.blocks\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The shape of a network.

    Attributes:
        blocks: residual blocks in each of the four groups: (3, 4, 6, 3) for ResNet-50, (3, 4, 23, 3) for 101,
            (3, 8, 36, 3) for 152.
        channels: after the stem; 64 times the width multiplier.
        selective: with selective kernels.
        classes: outputs of the supervised classifier, which features do not need; 0 where it is absent.
    """

    blocks: tuple
    channels: int
    selective: bool
    classes: int = 0

    @property
    def features(self):
        """Channels after the last group."""
        return 4 * self.channels * 2 ** (len(self.blocks) - 1)


def infer(shapes):
    """The `Architecture` that weights of these shapes, `{published name: shape}`, point to.

    Raises:
        KeyError, IndexError, ValueError: a weight that every such network has is missing, or has too few axes or
            channels.
    """
    stem = shapes["net.0.0.weight"]  # (C, 3, 7, 7); or (C/2, 3, 3, 3), the first of three
    selective = stem[2] == 3
    channels = (shapes["net.0.4.weight"] if selective else stem)[0]
    if channels < 2:
        raise ValueError(f"{channels} channels")
    blocks = {found.groups() for name in shapes if (found := _BLOCK.match(name))}
    return Architecture(
        blocks=tuple(sum(group == str(wanted) for group, _ in blocks) for wanted in range(1, 5)),
        channels=channels,
        selective=selective,
        classes=shapes["fc.weight"][0] if "fc.weight" in shapes else 0,
    )


class ResNet(nn.Module):
    """Images (B, 3, H, W) in [0, 1] to the spatial mean of the last group, (B, `architecture.features`)."""

    def __init__(self, architecture):
        super().__init__()
        self.architecture = architecture
        channels, selective = architecture.channels, architecture.selective
        groups, width = [_stem(channels, selective)], channels
        for number, count in enumerate(architecture.blocks):
            inner = channels * 2**number
            groups.append(_Group(count, width, inner, 1 if number == 0 else 2, selective))
            width = 4 * inner
        self.net = nn.Sequential(*groups)
        if architecture.classes:
            self.fc = nn.Linear(width, architecture.classes)  # part of the published weights, not of the distance

    def forward(self, images):
        return self.net(images).mean(dim=(2, 3))  # (B, F)


def _conv(channels, out, kernel=1, stride=1):
    return nn.Conv2d(channels, out, kernel, stride, padding=(kernel - 1) // 2, bias=False)


def _norm(channels, relu=True):
    return nn.Sequential(nn.BatchNorm2d(channels), *[nn.ReLU(inplace=True)] * relu)


def _stem(channels, selective):
    """Images (B, 3, H, W) to (B, C, H/4, W/4)."""
    half = channels // 2
    if selective:
        layers = [_conv(3, half, 3, 2), _norm(half), _conv(half, half, 3), _norm(half), _conv(half, channels, 3)]
    else:
        layers = [_conv(3, channels, 7, 2)]
    return nn.Sequential(*layers, _norm(channels), nn.MaxPool2d(3, 2, padding=1))


class _Group(nn.Module):
    """Residual blocks; the first may halve the resolution."""

    def __init__(self, count, channels, inner, stride, selective):
        super().__init__()
        first = _Block(channels, inner, stride, selective, project=True)
        rest = [_Block(4 * inner, inner, 1, selective, project=False) for _ in range(count - 1)]
        self.blocks = nn.Sequential(first, *rest)

    def forward(self, x):
        return self.blocks(x)


class _Block(nn.Module):
    """A bottleneck block: (B, C, H, W) to (B, 4 * inner, H/stride, W/stride)."""

    def __init__(self, channels, inner, stride, selective, project):
        super().__init__()
        self.projection = _Projection(channels, 4 * inner, stride, selective) if project else nn.Identity()
        middle = [_SelectiveKernel(inner, stride)] if selective else [_conv(inner, inner, 3, stride), _norm(inner)]
        self.net = nn.Sequential(
            _conv(channels, inner), _norm(inner), *middle, _conv(inner, 4 * inner), _norm(4 * inner, relu=False)
        )

    def forward(self, x):
        return torch.relu_(self.net(x).add_(self.projection(x)))


class _Projection(nn.Module):
    """The shortcut where channels or resolution change."""

    def __init__(self, channels, out, stride, selective):
        super().__init__()
        if selective:  # a 2x2 mean of the input padded by a row and a column of zeros
            self.shortcut = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.AvgPool2d(2, stride), _conv(channels, out))
        else:
            self.shortcut = _conv(channels, out, stride=stride)
        self.bn = _norm(out, relu=False)

    def forward(self, x):
        return self.bn(self.shortcut(x))


class _SelectiveKernel(nn.Module):
    """Two 3x3 convolutions of (B, C, H, W), mixed per image and channel by weights from both outputs' spatial means."""

    def __init__(self, channels, stride):
        super().__init__()
        inner = max(int(RATIO * channels), FEWEST)
        self.main_conv = nn.Sequential(_conv(channels, 2 * channels, 3, stride), _norm(2 * channels))
        self.mixing_conv = nn.Sequential(_conv(channels, inner), _norm(inner), _conv(inner, 2 * channels))

    def forward(self, x):
        first, second = self.main_conv(x).chunk(2, dim=1)  # (B, C, h, w) each
        pooled = first.mean(dim=(2, 3), keepdim=True) + second.mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
        weight, other = self.mixing_conv(pooled).chunk(2, dim=1)
        weight = torch.sigmoid(weight - other)  # the softmax of two
        return torch.lerp(second, first, weight)
