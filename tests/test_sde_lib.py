"""The SDEs against the published numbers and their own closed forms."""

import pytest
import torch
from helpers import close, golden, small, tensor, wave

import sde_lib
from basics.console import UserError
from sde_lib import per_image

SDES = {"vpsde": sde_lib.VPSDE, "subvpsde": sde_lib.SubVPSDE, "vesde": sde_lib.VESDE}


def published_quantities(sde, x, t):
    score = -x * (1 + per_image(t))
    alpha, std = sde.marginal(t)
    names = ("drift", "diffusion"), ("f", "G"), ("rev_drift", "rev_diffusion"), ("rev_f", "rev_G")
    names += ("ode_drift", "ode_diffusion"), ("ode_f", "ode_G")
    values = [sde.sde(x, t), sde.discretize(x, t), sde.reverse_sde(score, x, t), sde.reverse_discretize(score, x, t)]
    values += [sde.reverse_sde(score, x, t, True), sde.reverse_discretize(score, x, t, True)]
    table = {"mean": per_image(alpha) * x, "std": std, "prior_logp": sde.prior_logp(x)}
    for pair, value in zip(names, values, strict=True):
        table |= dict(zip(pair, value, strict=True))
    return table


@pytest.mark.parametrize("steps", [1000, 50])
@pytest.mark.parametrize("name", SDES)
def test_golden(name, steps):
    numbers = golden("sde")
    t, x = tensor(numbers["t"]), wave((5, 3, 4, 4), float(numbers["x_seed"]))
    for quantity, value in published_quantities(SDES[name](N=steps), x, t).items():
        expected = tensor(numbers[f"{name}_N{steps}_{quantity}"])
        if quantity == "ode_diffusion":
            expected = expected.expand_as(value)
        # atol: the published std and g lose digits to 1 - exp(2L) at small t, ours keep them
        close(value, expected, rtol=1e-5, atol=2e-6)


def test_small_times_keep_their_digits():
    t = torch.tensor([1e-5, 1e-4, 1e-3])
    for sde in (sde_lib.VPSDE(), sde_lib.SubVPSDE()):
        exact = type(sde)().marginal(t.double())[1]
        torch.testing.assert_close(sde.marginal(t)[1].double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        sde_lib.SubVPSDE().sde(torch.zeros(3, 1, 1, 1), t)[1].double(),
        sde_lib.SubVPSDE().sde(torch.zeros(3, 1, 1, 1), t.double())[1],
        rtol=1e-5,
        atol=0,
    )


@pytest.mark.parametrize("name", SDES)
def test_marginal_solves_the_sde(name):
    """d alpha/dt = alpha f'(t) and d std^2/dt = 2 f' std^2 + g^2, by central differences in float64."""
    sde, t, h = SDES[name](), torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64), 1e-5
    ones = torch.ones(3, 1, 1, 1, dtype=torch.float64)
    drift, g = sde.sde(ones, t)
    rate = drift.flatten()
    alpha, std = sde.marginal(t)
    (alpha_up, std_up), (alpha_down, std_down) = sde.marginal(t + h), sde.marginal(t - h)
    torch.testing.assert_close((alpha_up - alpha_down) / (2 * h), alpha * rate, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close((std_up**2 - std_down**2) / (2 * h), 2 * rate * std**2 + g**2, rtol=1e-6, atol=1e-8)


def test_prior_logp_is_a_normal_density():
    z = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1)) * 50
    for sde in (sde_lib.VPSDE(), sde_lib.VESDE(sigma_max=50.0)):
        expected = torch.distributions.Normal(0.0, float(sde.prior_std)).log_prob(z).sum(dim=(1, 2, 3))
        torch.testing.assert_close(sde.prior_logp(z), expected, rtol=1e-5, atol=1e-3)


def test_one_time_for_all_images_broadcasts():
    x = wave((4, 3, 2, 2), 0.1)
    for make in SDES.values():
        sde = make()
        for method in (sde.sde, sde.discretize):
            one, many = method(x, torch.tensor([0.3])), method(x, torch.full((4,), 0.3))
            torch.testing.assert_close(one[0], many[0])
            torch.testing.assert_close(one[1].expand(4), many[1])


def test_unknown_sde_is_named():
    config = small("subvp/cifar10_ddpm_continuous.py")
    config.training.sde = "heat"
    with pytest.raises(UserError, match=r"unknown SDE .*'heat'; choose one of: vpsde, subvpsde, vesde"):
        sde_lib.create_sde(config)
