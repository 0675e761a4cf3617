"""Losses, EMA and the training step against the published numbers and closed forms."""

import pytest
import torch
from helpers import close, fill_, filled_model, golden, small, tensor, wave

import losses
import models
from basics.console import UserError
from losses import Draws
from models.score import ScoreModel
from sde_lib import create_sde

CONTINUOUS = {
    "vpsde": "vp/ddpm/cifar10_continuous.py",
    "subvpsde": "subvp/cifar10_ddpm_continuous.py",
    "vesde": "ve/cifar10_ncsnpp_continuous.py",
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("sde", CONTINUOUS)
def test_continuous_loss_golden(sde, mean, weighted):
    numbers = golden("losses")
    config = small(CONTINUOUS[sde])
    config.training.reduce_mean, config.training.likelihood_weighting = mean, weighted
    model = filled_model(config)
    draws = Draws(normal=tensor(numbers[f"{sde}_z"]), uniform=tensor(numbers[f"{sde}_u"]))
    with torch.no_grad():
        value = losses.create_loss(config, model.sde)(model, wave((4, 3, 16, 16), float(numbers["x_seed"])), draws)
    close(value, numbers[f"{sde}_mean{int(mean)}_lw{int(weighted)}"])


@pytest.mark.parametrize(("name", "path"), [("ddpm", "vp/ddpm/cifar10.py"), ("smld", "ve/cifar10_ddpm.py")])
def test_discrete_loss_golden(name, path):
    numbers = golden("losses")
    config = small(path)
    model = filled_model(config)
    draws = Draws(normal=tensor(numbers[f"{name}_z"]), labels=tensor(numbers[f"{name}_labels"]))
    with torch.no_grad():
        value = losses.create_loss(config, model.sde)(model, wave((4, 3, 16, 16), float(numbers["x_seed"])), draws)
    close(value, numbers[name])


@pytest.fixture(scope="module")
def trained():
    """Five steps of training on the published draws, with the losses seen."""
    numbers = golden("train_small")
    config = small("subvp/cifar10_ddpm_continuous.py", ch_mult=(1, 1), dropout=0.0)
    config.optim.warmup = 3
    net = models.create_model(config).train()
    fill_(net.state_dict())
    state = losses.create_state(config, net)
    sde = create_sde(config)
    model, loss = ScoreModel(net, sde), losses.create_loss(config, sde)
    values = []
    for i in range(5):
        x = wave((4, 3, 16, 16), float(numbers["x_seed"]) + i)
        draws = Draws(normal=tensor(numbers["z"][i]), uniform=tensor(numbers["u"][i]))
        values.append(losses.train_step(state, loss, model, x, draws, config).item())
    return numbers, state, values


def test_training_golden(trained):
    numbers, state, values = trained
    close(torch.tensor(values), numbers["loss"])
    x, labels = wave((2, 3, 16, 16), 9.5), torch.tensor([300.0, 800.0])
    net = state.net.eval()
    with torch.no_grad():
        # Adam divides by the gradient's own size, so that rounding in tiny gradients shows: 1e-4
        close(net(x, labels), numbers["output"], rtol=1e-4)
        state.ema.copy_to(net.parameters())
        close(net(x, labels), numbers["output_ema"], rtol=1e-4)


def test_ema_warm_up_and_positions():
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1), requires_grad=False)]
    parameters.append(torch.nn.Parameter(torch.ones(3)))
    ema = losses.EMA(parameters, rate=0.5)
    assert [tuple(s.shape) for s in ema.shadow] == [(2,), (3,)]
    with torch.no_grad():
        parameters[0].fill_(1.0)
    ema.update(parameters)
    torch.testing.assert_close(ema.shadow[0], torch.full((2,), 1 - 2 / 11))  # decay (1 + 1) / (10 + 1)
    for _ in range(20):
        ema.update(parameters)
    before = ema.shadow[0].clone()
    ema.update(parameters)
    torch.testing.assert_close(1 - ema.shadow[0], (1 - before) * 0.5)  # the rate has become the smaller one


def test_first_step_of_the_warm_up_changes_nothing():
    config = small("subvp/cifar10_ddpm_continuous.py")
    net = models.create_model(config)
    state, sde = losses.create_state(config, net), create_sde(config)
    before = [p.detach().clone() for p in net.parameters()]
    draws = Draws.keyed((2, 3, 16, 16), sde.N, 1, "test")
    losses.train_step(
        state, losses.create_loss(config, sde), ScoreModel(net, sde), wave((2, 3, 16, 16), 1), draws, config
    )
    assert state.step == 1
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_learning_rate_rises_and_falls():
    config = small("subvp/cifar10_ddpm_continuous.py")
    config.optim.update({"lr": 0.1, "warmup": 4, "cooldown": 5})
    config.training.n_iters = 10
    rates = [losses.learning_rate(config, step) for step in range(11)]
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.08, 0.06, 0.04, 0.02, 0])
    config.training.n_iters = 4  # all of it falls, from the full rate
    config.optim.warmup = 0
    assert [losses.learning_rate(config, step) for step in range(5)] == pytest.approx([0.1, 0.075, 0.05, 0.025, 0])
    config.training.n_iters = 10
    config.optim.cooldown = 0
    assert {losses.learning_rate(config, step) for step in range(11)} == {0.1}
    del config.optim["cooldown"]  # as configs of earlier versions
    assert losses.learning_rate(config, 10) == 0.1


def test_training_takes_the_rate_of_its_step():
    config = small("subvp/cifar10_ddpm_continuous.py")
    config.optim.update({"warmup": 0, "cooldown": 2})
    config.training.n_iters = 2
    net = models.create_model(config)
    state, sde = losses.create_state(config, net), create_sde(config)
    state.step = 1
    loss, model, seen = losses.create_loss(config, sde), ScoreModel(net, sde), []
    for step in range(2):
        before = [p.detach().clone() for p in net.parameters()]
        draws = Draws.keyed((2, 3, 16, 16), sde.N, 1, step)
        losses.train_step(state, loss, model, wave((2, 3, 16, 16), 1), draws, config)
        moved = [(a - b).abs().max().item() for a, b in zip(before, net.parameters(), strict=True)]
        seen.append(max(moved))
    assert seen == [pytest.approx(config.optim.lr / 2, rel=0.01), 0]  # Adam's first step is its rate


def test_keyed_draws_repeat_and_differ():
    first, again = Draws.keyed((4, 3, 8, 8), 10, 7, 3), Draws.keyed((4, 3, 8, 8), 10, 7, 3)
    other = Draws.keyed((4, 3, 8, 8), 10, 7, 4)
    for name in ("normal", "uniform", "labels"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    assert first.uniform.min() >= 0
    assert first.uniform.max() < 1


def test_perfect_score_has_the_irreducible_loss():
    """Data at zero: score = -x / std^2 is exact, and score std + z = 0."""
    sde = create_sde(small("subvp/cifar10_ddpm_continuous.py"))

    class Exact:
        def __init__(self):
            self.sde = sde

        def __call__(self, x, t):
            return -x / sde.marginal(t)[1][:, None, None, None] ** 2

    draws = Draws.keyed((8, 1, 4, 4), sde.N, 0, "zero")
    for weighted in (False, True):
        value = losses.continuous_loss(
            Exact(), torch.zeros(8, 1, 4, 4), draws, reduce_mean=True, likelihood_weighting=weighted
        )
        assert value.item() < 1e-9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training.continuous": False}, "discrete training"),
        ({"training.continuous": False, "training.likelihood_weighting": True}, "needs continuous training"),
    ],
)
def test_impossible_losses_are_refused(change, message):
    config = small("subvp/cifar10_ddpm_continuous.py")
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        losses.create_loss(config, create_sde(config))


def test_unknown_optimizer_is_refused():
    config = small("subvp/cifar10_ddpm_continuous.py")
    config.optim.optimizer = "SGD"
    with pytest.raises(UserError, match="unknown optimizer"):
        losses.create_optimizer(config, [torch.nn.Parameter(torch.zeros(1))])
