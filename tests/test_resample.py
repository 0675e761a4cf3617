"""Filtered resampling against its definition: zero insertion, full convolution, dropping of pixels."""

import pytest
import torch
import torch.nn.functional as F

from basics.console import UserError
from models import resample

TAPS = {2: (1, 1), 3: (1, 2, 1), 4: (1, 3, 3, 1), 5: (1, 4, 6, 4, 1), 6: (1, 2, 7, 3, 2, 1)}
SKEWED = (5, -2, 1, 3)  # tells a convolution from a correlation
FILTERS = [*TAPS.values(), SKEWED, (2, 0, 1)]
SIZES = [(8, 8), (5, 8), (7, 3), (1, 2)]


def image(height, width, channels=3):
    generator = torch.Generator().manual_seed(height * 100 + width)
    return torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)


def upfirdn(x, kernel, up=1, down=1, pad=(0, 0)):
    """StyleGAN2's definition, step by step: x (B, C, H, W), kernel (n, n), pad = (before, after) of each axis."""
    b, c, h, w = x.shape
    wide = x.new_zeros(b, c, h * up, w * up)
    wide[:, :, ::up, ::up] = x
    wide = F.pad(wide, (*pad, *pad)).reshape(b * c, 1, h * up + sum(pad), w * up + sum(pad))
    full = F.conv2d(wide, kernel.flip(0, 1)[None, None].to(x.dtype))
    return full[:, :, ::down, ::down].reshape(b, c, *full[0, 0, ::down, ::down].shape)


def assert_equal(actual, expected):
    """Equal up to the order of summation in float64; the kernel itself is held in float32 on both sides."""
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_kernel_is_the_normalised_outer_product():
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    assert torch.equal(resample.fir_kernel((1, 3, 3, 1)), taps[:, None] * taps[None, :])


@pytest.mark.parametrize("taps", [(), (1,), (1, -1)])
def test_what_is_no_filter_is_refused(taps):
    with pytest.raises(UserError, match="no filter"):
        resample.fir_kernel(taps)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("taps", FILTERS)
def test_fir_up(taps, size):
    x, kernel, p = image(*size), resample.fir_kernel(taps), len(taps) - 2
    expected = upfirdn(x, kernel * 4, up=2, pad=((p + 1) // 2 + 1, p // 2))
    assert_equal(resample.fir_up(x, kernel), expected)
    assert expected.shape[2:] == (2 * size[0], 2 * size[1])


@pytest.mark.parametrize("size", SIZES[:3])
@pytest.mark.parametrize("taps", FILTERS)
def test_fir_down(taps, size):
    x, kernel, p = image(*size), resample.fir_kernel(taps), len(taps) - 2
    expected = upfirdn(x, kernel, down=2, pad=((p + 1) // 2, p // 2))
    assert_equal(resample.fir_down(x, kernel), expected)
    assert expected.shape[2:] == (size[0] // 2, size[1] // 2)


@pytest.mark.parametrize("taps", [TAPS[4], TAPS[6]])
def test_up_and_down_keep_brightness_away_from_the_border(taps):
    x, kernel = torch.full((1, 2, 8, 8), 0.7), resample.fir_kernel(taps)
    assert torch.allclose(resample.fir_down(x, kernel)[:, :, 1:-1, 1:-1], torch.tensor(0.7), atol=1e-6)
    if taps == TAPS[4]:  # the even and the odd taps sum alike
        assert torch.allclose(resample.fir_up(x, kernel)[:, :, 2:-2, 2:-2], torch.tensor(0.7), atol=1e-6)


def test_up_is_four_times_the_adjoint_of_down():
    """For the symmetric filter: <up(x), y> = 4 <x, down(y)>."""
    x, y, kernel = image(4, 5), image(8, 10), resample.fir_kernel((1, 3, 3, 1))
    assert_equal((resample.fir_up(x, kernel) * y).sum(), 4 * (x * resample.fir_down(y, kernel)).sum())


def test_without_a_filter():
    x = image(4, 6)
    assert torch.equal(resample.Up()(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert_equal(resample.Down()(x), x.unflatten(3, (3, 2)).unflatten(2, (2, 2)).mean((3, 5)))


def test_modules_use_their_filter():
    x, kernel = image(4, 6), resample.fir_kernel(SKEWED)
    assert torch.equal(resample.Up(SKEWED)(x), resample.fir_up(x, kernel))
    assert torch.equal(resample.Down(SKEWED)(x), resample.fir_down(x, kernel))


def fused_up(x, conv, kernel):
    """StyleGAN2's `upsample_conv_2d`: a transposed convolution, then the filter."""
    p = (kernel.shape[0] - 2) - (3 - 1)
    pad = ((p + 1) // 2 + 1, p // 2 + 1)
    y = F.conv_transpose2d(x, conv.weight.flip(2, 3).transpose(0, 1), stride=2)
    return upfirdn(y, kernel * 4, pad=pad) + conv.bias[:, None, None]


def fused_down(x, conv, kernel):
    """StyleGAN2's `conv_downsample_2d`: the filter, then a convolution of stride 2."""
    p = (kernel.shape[0] - 2) + (3 - 1)
    return F.conv2d(upfirdn(x, kernel, pad=((p + 1) // 2, p // 2)), conv.weight, conv.bias, stride=2)


@pytest.mark.parametrize("taps", FILTERS)
@pytest.mark.parametrize(("module", "fused"), [(resample.ConvUp, fused_up), (resample.ConvDown, fused_down)])
def test_filtered_convolutions(module, fused, taps):
    layer, x = module(3, 5, taps).double(), image(6, 8)
    torch.nn.init.normal_(layer.conv.bias)
    kernel = layer.kernel
    assert_equal(layer(x), fused(x, layer.conv, kernel))
    assert layer(x).shape[1] == 5


def test_plain_convolutions():
    x = image(6, 8)
    up, down = resample.ConvUp(3, 5).double(), resample.ConvDown(3, 5).double()
    assert_equal(up(x), F.conv2d(resample.Up()(x), up.conv.weight, up.conv.bias, padding=1))
    padded = F.pad(x, (0, 1, 0, 1))
    assert_equal(down(x), F.conv2d(padded, down.conv.weight, down.conv.bias, stride=2))


def test_filters_are_no_part_of_the_state_dict():
    assert list(resample.ConvDown(3, 5, (1, 3, 3, 1)).state_dict()) == ["conv.weight", "conv.bias"]
    assert not resample.Up((1, 3, 3, 1)).state_dict()


def test_channels_last_stays():
    x = image(8, 8, channels=4).float().to(memory_format=torch.channels_last)
    for module in (resample.Up((1, 3, 3, 1)), resample.Down((1, 3, 3, 1)), resample.Up(), resample.Down()):
        assert module(x).is_contiguous(memory_format=torch.channels_last)


def test_gradients():
    x, kernel = image(3, 4)[:1, :1].requires_grad_(), resample.fir_kernel(SKEWED)
    assert torch.autograd.gradcheck(lambda x: resample.fir_up(x, kernel), x)
    assert torch.autograd.gradcheck(lambda x: resample.fir_down(x, kernel), x)
