"""The networks, the training step and the inpainting loop written plainly, to be measured against.

NCHW, eager, one module for every operation of the papers: 1x1 projections and attention by einsum over the pixels,
normalisation and nonlinearity apart, nearest upsampling before the convolution, FIR filters by inserting zeros,
convolving everything and dropping what is not kept, Adam and the moving average one tensor after another, fresh noise
from the global generator, SciPy's solver of ODEs.  The weights have the same names, so both hold the same network.
"""

import math

import torch
import torch.nn.functional as F
from scipy.integrate import solve_ivp
from torch import nn

from lmd import likelihood
from models import create_model, layers, ncsnpp, resample
from sampling import probability_flow
from sde_lib import per_image


class PlainProjection(layers.Projection):
    def forward(self, x):
        return torch.einsum("bchw,cd->bdhw", x, self.W) + self.b[None, :, None, None]


class PlainAttention(layers.Attention):
    def forward(self, x):
        b, c, height, width = x.shape
        h = self.norm(x)
        q, k, v = self.query(h), self.key(h), self.value(h)
        weights = torch.einsum("bchw,bcij->bhwij", q, k) * c**-0.5
        weights = F.softmax(weights.reshape(b, height, width, height * width), dim=-1)
        weights = weights.reshape(b, height, width, height, width)
        return layers.rescaled_sum(x, self.out(torch.einsum("bhwij,bcij->bchw", weights, v)), self.rescale)


class PlainNormAct(layers.NormAct):
    def forward(self, x, shift=None):
        x = x if shift is None else x + shift[:, :, None, None]
        return self.act(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps))


class PlainUpsample(layers.Upsample):
    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def upfirdn(x, kernel, up=1, down=1, pad=(0, 0)):
    """StyleGAN2's `upfirdn2d`, step by step.

    Args:
        x: (B, C, H, W).
        kernel: (n, n).
        up: zeros are inserted so that the size grows by this factor.
        down: of the filtered image every so many-th pixel is kept.
        pad: zeros before and after, on each axis.

    Returns:
        (B, C, H', W'), H' the rounded up (up H + pad[0] + pad[1] - n + 1) / down.
    """
    b, c, height, width = x.shape
    wide = x.new_zeros(b * c, 1, height * up, width * up)
    wide[:, :, ::up, ::up] = x.reshape(b * c, 1, height, width)
    filtered = F.conv2d(F.pad(wide, (*pad, *pad)), kernel.flip(0, 1)[None, None])
    return filtered[:, 0, ::down, ::down].unflatten(0, (b, c))


class PlainUp(resample.Up):
    then_conv = resample.Resample.then_conv

    def forward(self, x):
        if self.kernel is None:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        p = len(self.kernel) - 2
        return upfirdn(x, 4 * self.kernel, up=2, pad=((p + 1) // 2 + 1, p // 2))


class PlainDown(resample.Down):
    def forward(self, x):
        if self.kernel is None:
            return F.avg_pool2d(x, 2)
        p = len(self.kernel) - 2
        return upfirdn(x, self.kernel, down=2, pad=((p + 1) // 2, p // 2))


class PlainConvUp(resample.ConvUp):
    def forward(self, x):
        if self.kernel is None:
            return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        y = F.conv_transpose2d(x, self.conv.weight.flip(2, 3).transpose(0, 1), stride=2)
        p = len(self.kernel) - 4
        return upfirdn(y, 4 * self.kernel, pad=((p + 1) // 2 + 1, p // 2 + 1)) + self.conv.bias[:, None, None]


class PlainConvDown(resample.ConvDown):
    def forward(self, x):
        if self.kernel is None:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        p = len(self.kernel)
        return self.conv(upfirdn(x, self.kernel, pad=((p + 1) // 2, p // 2)))


class PlainInputResidual(ncsnpp.InputResidual, PlainConvDown):
    pass


class PlainOutputResidual(ncsnpp.OutputResidual, PlainConvUp):
    pass


PLAIN = {
    layers.Projection: PlainProjection,
    layers.Attention: PlainAttention,
    layers.NormAct: PlainNormAct,
    layers.Upsample: PlainUpsample,
    resample.Up: PlainUp,
    resample.Down: PlainDown,
    resample.ConvUp: PlainConvUp,
    resample.ConvDown: PlainConvDown,
    ncsnpp.InputResidual: PlainInputResidual,
    ncsnpp.OutputResidual: PlainOutputResidual,
}


def plain_network(config):
    """The network of a config with every module replaced by its plain form, NCHW."""
    net = create_model(config)
    for module in net.modules():
        if type(module) in PLAIN:
            module.__class__ = PLAIN[type(module)]
    return net


class PlainTraining:
    """A training step as one would first write it; `step(x)` takes x (B, C, H, W) in the model's range."""

    def __init__(self, net, sde, config):
        self.net, self.sde, self.config, self.steps = net, sde, config, 0
        self.optimizer = torch.optim.Adam(net.parameters(), lr=config.optim.lr, foreach=False)
        self.shadow = [p.detach().clone() for p in net.parameters()]

    def step(self, x):
        self.optimizer.zero_grad()
        t = torch.rand(len(x), device=x.device) * (1 - 1e-5) + 1e-5
        z = torch.randn_like(x)
        alpha, std = (per_image(v) for v in self.sde.marginal(t))
        score = -self.net(alpha * x + std * z, t * 999) / std
        loss = (score * std + z).square().flatten(1).mean(dim=1).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), self.config.optim.grad_clip, foreach=False)
        self.optimizer.step()
        self.steps += 1
        decay = min(self.config.model.ema_rate, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for average, parameter in zip(self.shadow, self.net.parameters(), strict=True):
                average.sub_((1 - decay) * (average - parameter))
        return loss.item()


@torch.no_grad()
def plain_inpaint(net, sde, data, mask, steps):
    """`steps` steps of the published loop for sub-VP: constrain, Euler-Maruyama, constrain; the same for each image."""
    x = data * mask + torch.randn_like(data) * (1 - mask)
    for t in torch.linspace(1, 1e-3, sde.N, device=data.device)[:steps]:
        times = torch.ones(len(data), device=data.device) * t
        x = _constrain(sde, x, data, mask, times)
        _, std = sde.marginal(times)
        drift, diffusion = sde.sde(x, times)
        score = -net(x, times * 999) / per_image(std)
        mean = x - (drift - per_image(diffusion) ** 2 * score) / sde.N
        x = mean + per_image(diffusion) * math.sqrt(1 / sde.N) * torch.randn_like(x)
        x = _constrain(sde, x, data, mask, times)
    return x


def _constrain(sde, x, data, mask, times):
    alpha, std = (per_image(v) for v in sde.marginal(times))
    return x * (1 - mask) + (alpha * data + std * torch.randn_like(data)) * mask


@torch.no_grad()
def plain_log_likelihood(model, sde, x, probe):
    """As `likelihood.log_likelihood`, with the state on the CPU and one step size for the whole batch.

    Returns:
        (B,) float64, and the number of function evaluations.
    """
    flow = lambda x, t: probability_flow(model, sde, x, t)

    def velocity(t, flat):
        images = torch.as_tensor(flat).view(len(x), -1)[:, :-1].view_as(x).to(x)
        v, divergence = likelihood.hutchinson(flow, images, x.new_full((1,), t), probe)
        return torch.cat([v.flatten(1), divergence[:, None]], dim=1).flatten().double().cpu().numpy()

    start = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1).flatten().double().cpu().numpy()
    tolerance = likelihood.TOLERANCE
    solution = solve_ivp(velocity, (likelihood.EPS, sde.T), start, method="RK45", rtol=tolerance, atol=tolerance)
    end = torch.as_tensor(solution.y[:, -1]).view(len(x), -1)
    return sde.prior_logp(end[:, :-1].view(x.shape)) + end[:, -1], solution.nfev
