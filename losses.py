"""Score-matching losses, the optimiser, the exponential moving average and one training step.

Sources: Score-SDE (arXiv 2011.13456) equation 7, DDPM (arXiv 2006.11239) equation 14, SMLD (arXiv 1907.05600).
"""

import dataclasses
import math

import torch

from basics import noise
from basics.console import UserError, choose
from sde_lib import per_image

TRAINING_EPS = 1e-5  # the smallest time trained on

# ------------------------------------------------------------------------------------------------------- losses


@dataclasses.dataclass(frozen=True)
class Draws:
    """The random numbers of a loss: `uniform` (B,) in [0, 1), or `labels` (B,) in 0..N-1, and `normal` (B, C, H, W)."""

    normal: torch.Tensor
    uniform: torch.Tensor | None = None
    labels: torch.Tensor | None = None

    @classmethod
    def keyed(cls, shape, num_scales, *words, device="cpu", share=slice(None)):
        """The draws that belong to the key `words`, for images of `shape` (B, C, H, W); `share` picks some of the B."""
        rows = noise.image_keys(noise.key(*words, "loss"), torch.arange(shape[0])[share], reps=[0])  # (B,)
        generator = noise.generator(*words, "times")
        send = lambda values: values[share].to(device, non_blocking=True)  # waits for no earlier step
        return cls(
            normal=noise.KeyedNoise(rows.to(device, non_blocking=True), shape[1:], device)(0, "prior"),
            uniform=send(torch.rand(shape[0], generator=generator)),
            labels=send(torch.randint(num_scales, (shape[0],), generator=generator)),
        )


def continuous_loss(model, x, draws, *, reduce_mean, likelihood_weighting):
    """Denoising score matching over continuous times, t = u (T - eps) + eps (Score-SDE equation 7).

    Args:
        model: a `models.score.ScoreModel`.
        x: (B, C, H, W) in the model's range.
        draws: uniform and normal draws.
        reduce_mean: mean over C, H, W, else half the sum.
        likelihood_weighting: weight by g(t)^2 instead of the variance.

    Returns:
        The mean over the batch, a scalar.
    """
    sde = model.sde
    t = draws.uniform * (sde.T - TRAINING_EPS) + TRAINING_EPS  # (B,)
    alpha, std = (per_image(v) for v in sde.marginal(t))
    score = model(alpha * x + std * draws.normal, t)
    if not likelihood_weighting:
        return _reduce((score * std + draws.normal).square(), reduce_mean).mean()
    weight = sde.sde(torch.zeros_like(x), t)[1].square()  # (B,)
    return (_reduce((score + draws.normal / std).square(), reduce_mean) * weight).mean()


def ddpm_loss(model, x, draws, *, reduce_mean, likelihood_weighting=False):
    """DDPM's loss on the predicted noise at discrete steps (equation 14); arguments as `continuous_loss`."""
    alpha_bar = model.sde.table_on("alphas_bar", x.device)[draws.labels]  # (B,)
    noisy = per_image(alpha_bar.sqrt()) * x + per_image((1 - alpha_bar).sqrt()) * draws.normal
    return _reduce((model.net(noisy, draws.labels) - draws.normal).square(), reduce_mean).mean()


def smld_loss(model, x, draws, *, reduce_mean, likelihood_weighting=False):
    """SMLD's loss at discrete noise levels; labels index the descending levels; arguments as `continuous_loss`."""
    sigma = model.sde.table_on("sigmas", x.device).flip(0)[draws.labels]  # (B,)
    noise_ = per_image(sigma) * draws.normal
    target = -noise_ / per_image(sigma) ** 2
    return (_reduce((model.net(x + noise_, draws.labels) - target).square(), reduce_mean) * sigma**2).mean()


def create_loss(config, sde):
    """The loss of a config, called as loss(model, x, draws).

    Raises:
        UserError: if the SDE has no discrete process and the config asks for it, or weights it by likelihood.
    """
    training = config.training
    if training.continuous:
        loss = continuous_loss
    elif training.likelihood_weighting:
        raise UserError("likelihood weighting needs continuous training; set config.training.continuous=True")
    else:
        losses = {"vpsde": ddpm_loss, "vesde": smld_loss}
        loss = choose(training.sde.lower(), losses, "SDE of discrete training (config.training.continuous=False)")
    options = {"reduce_mean": training.reduce_mean, "likelihood_weighting": training.likelihood_weighting}
    return lambda model, x, draws: loss(model, x, draws, **options)


def _reduce(squares, mean):
    """(B, C, H, W) -> (B,): the mean, or half the sum."""
    flat = squares.flatten(1)
    return flat.mean(dim=1) if mean else 0.5 * flat.sum(dim=1)


# ----------------------------------------------------------------------------------- optimiser, EMA, training step


def create_optimizer(config, parameters):
    """Adam as published: (beta1, 0.999), eps and weight decay from `config.optim`.

    Raises:
        UserError: for another optimiser than Adam.
    """
    optim = config.optim
    choose(optim.optimizer.lower(), {"adam": None}, "optimizer (config.optim.optimizer)")
    return torch.optim.Adam(
        parameters,
        lr=optim.lr,
        betas=(optim.beta1, 0.999),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,  # one pass over the weights; the same numbers up to rounding
    )


class EMA:
    """The exponential moving average of the trainable parameters, by their position.

    decay = min(rate, (1 + n) / (10 + n)), n the number of updates counted from 1.

    Args:
        parameters: of the network, in order.
        rate: the largest decay, in [0, 1].
    """

    def __init__(self, parameters, rate):
        self.rate, self.num_updates = rate, 0
        self.shadow = [p.detach().clone() for p in parameters if p.requires_grad]

    @torch.no_grad()
    def update(self, parameters):
        """Moves the averages towards the parameters."""
        self.num_updates += 1
        decay = min(self.rate, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self.shadow, [p for p in parameters if p.requires_grad], 1 - decay)

    @torch.no_grad()
    def copy_to(self, parameters):
        """Overwrites the parameters by their averages."""
        for average, parameter in zip(self.shadow, [p for p in parameters if p.requires_grad], strict=True):
            parameter.copy_(average)

    def state_dict(self):
        """As published: decay, num_updates and the list shadow_params."""
        return {"decay": self.rate, "num_updates": self.num_updates, "shadow_params": self.shadow}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Takes over a `state_dict` whose shapes were checked before."""
        self.num_updates = state["num_updates"]
        for mine, theirs in zip(self.shadow, state["shadow_params"], strict=True):
            mine.copy_(theirs)


@dataclasses.dataclass
class TrainState:
    """What training changes: network, optimiser, EMA and the number of steps done; and the precision it is done in.

    The precision is 'fp32', 'tf32' or 'bf16', or None where it is not trained.
    """

    net: torch.nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA
    step: int = 0
    precision: str | None = None


def create_state(config, net):
    """A fresh `TrainState` of a network."""
    return TrainState(net, create_optimizer(config, net.parameters()), EMA(net.parameters(), config.model.ema_rate))


@torch.no_grad()
def match_layout(state):
    """Lays out averages and moments in memory as their weights are, which one pass over all of them relies on."""
    like = lambda value, weight: value if value.stride() == weight.stride() else torch.empty_like(weight).copy_(value)
    trained = [p for p in state.net.parameters() if p.requires_grad]
    state.ema.shadow = [like(average, p) for average, p in zip(state.ema.shadow, trained, strict=True)]
    for weight, entry in state.optimizer.state.items():
        entry.update({name: like(value, weight) for name, value in entry.items() if name != "step"})


@torch.no_grad()
def not_finite(state):
    """The parts of a `TrainState` that hold NaN or infinite numbers, in words; waits for the device once."""
    parts = {
        "the weights": list(state.net.parameters()),
        "the averaged weights (EMA)": state.ema.shadow,
        "the optimizer's averages": [
            value for entry in state.optimizer.state.values() for name, value in entry.items() if name != "step"
        ],
    }
    parts = {name: tensors for name, tensors in parts.items() if tensors}
    largest = [torch.stack(torch._foreach_norm(tensors, float("inf"))).max() for tensors in parts.values()]
    return [name for name, value in zip(parts, torch.stack(largest).tolist(), strict=True) if not math.isfinite(value)]


def learning_rate(config, step):
    """`optim.lr`, risen from 0 over the first `optim.warmup` steps and, ours, falling to 0 over the last `cooldown`.

    It falls throughout a training of fewer steps.
    """
    optim, rate = config.optim, config.optim.lr
    if optim.warmup > 0:
        rate *= min(step / optim.warmup, 1.0)
    if cooldown := min(optim.get("cooldown", 0), config.training.n_iters):
        rate *= min((config.training.n_iters - step) / cooldown, 1.0)
    return rate


def train_step(state, loss, model, x, draws, config):
    """One step of training: gradient, learning rate, clipping, Adam, EMA.

    Args:
        state: changed in place.
        loss: from `create_loss`.
        model: the `ScoreModel` of `state.net`.
        x: (B, C, H, W) in the model's range.
        draws: the step's random numbers.
        config: `config.optim` is read, and `training.n_iters`.

    Returns:
        The loss before the step, a scalar tensor without gradient (reading it waits for the device).
    """
    optim, parameters = config.optim, [p for p in state.net.parameters() if p.requires_grad]
    state.optimizer.zero_grad(set_to_none=True)
    value = loss(model, x, draws)
    value.backward()
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)
    if optim.grad_clip >= 0:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm=optim.grad_clip, foreach=True)
    state.optimizer.step()
    state.step += 1
    state.ema.update(parameters)
    return value.detach()
