"""Exact log-likelihoods by the probability-flow ODE (Score-SDE, arXiv 2011.13456, section 4.3 and appendix D.2).

Along dx/dt = v(x, t), the ODE with the marginals of the SDE, d log p_t(x)/dt = -div v; so the log density of an image
is that of the prior at the end of its trajectory plus the integral of div v.
"""

import math

import torch

import ode
import sampling

EPS = 1e-5  # the published start of the trajectories, for every SDE
TOLERANCE = 1e-5  # of the solver, relative and absolute, as published


def hutchinson(velocity, x, t, probe):
    """A velocity and its divergence by Skilling and Hutchinson's estimate, probe . (dv/dx) probe.

    It costs one vector-Jacobian product, whose graph is freed at once.  With entries of +-1 it is exact where the
    Jacobian is diagonal, and without bias everywhere.

    Args:
        velocity: takes x and t, gives (B, C, H, W).
        x: (B, C, H, W).
        t: (1,) or (B,).
        probe: (B, C, H, W), of mean 0 and variance 1.

    Returns:
        (B, C, H, W) and (B,), without gradients.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = velocity(x, t)
        (product,) = torch.autograd.grad(v, x, probe)  # (B, C, H, W): the Jacobian's transpose times the probe
    return v.detach(), (product * probe).sum(dim=(1, 2, 3))


def rademacher(shape, generator):
    """Entries of +1 or -1, each with probability 1/2: a float32 tensor on the generator's device."""
    return torch.randint(2, shape, generator=generator, device=generator.device).mul_(2).sub_(1).float()


@torch.no_grad()
def log_likelihood(model, sde, x, probe, *, eps=EPS, rtol=TOLERANCE, atol=TOLERANCE):
    """The log density of images under the model, as published from eps to T by an adaptive Runge-Kutta 4(5).

    As published, one step size holds for all images of a batch; here each has its own, so that its likelihood depends
    on no other image.

    Args:
        model: score(x, t).
        sde: the SDE.
        x: (B, C, H, W) in the model's range, dequantised.
        probe: (B, C, H, W) for `hutchinson`.
        eps: the time that stands for 0.
        rtol, atol: error tolerances of the solver.

    Returns:
        Log densities in nats in the model's range (B,) float64, the ends of the trajectories (B, C, H, W), and the
        number of function evaluations of each image (B,) int64.

    Raises:
        UserError: see `ode.solve`.
    """
    flow = lambda x, t: sampling.probability_flow(model, sde, x, t)

    def velocity(state, t, rows):
        images = state[:, :-1].unflatten(1, x.shape[1:]).to(x.dtype)  # (n, C, H, W)
        v, divergence = hutchinson(flow, images, t.to(x.dtype), probe[rows])
        return torch.cat([v.flatten(1), divergence[:, None]], dim=1)

    start = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1).double()  # (B, C H W + 1)
    end, evaluations = ode.solve(velocity, start, (eps, sde.T), rtol=rtol, atol=atol)
    latent, gained = end[:, :-1].view_as(x), end[:, -1]
    return sde.prior_logp(latent) + gained, latent.to(x.dtype), evaluations


def bits_per_dimension(log_density, dimensions, centered):
    """Bits per dimension of 8-bit images from the log density of their dequantised values (255 x + u)/256.

    Args:
        log_density: (B,) in nats, in the model's range.
        dimensions: C H W.
        centered: the model's range is [-1, 1], twice as wide as [0, 1].

    Returns:
        (B,): on average over u at least the bits that code the 8-bit image (Theis et al., arXiv 1511.01844).
    """
    bits_of_a_level = 7 if centered else 8  # a level of the 256 is 1/128 wide, or 1/256
    return bits_of_a_level - log_density / (dimensions * math.log(2))
