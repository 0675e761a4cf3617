"""The network seen as a score: the one place that knows which labels it takes and what its output means."""

import torch

import sde_lib
from models.inference import Network
from sde_lib import per_image


class Score:
    """What follows from a score: noise and clean-image prediction.

    A subclass is called as score(x, t), gives grad_x log p_t(x), and has the SDE as `sde`.  Times t are (B,), or (1,)
    when all images share one; x is (B, C, H, W) in the model's range.
    """

    def predictions(self, x, t):
        """`eps` and `x0` by one evaluation."""
        return self.predictions_of(self(x, t), x, t)

    def predictions_of(self, score, x, t):
        """`eps` and `x0` that belong to a score (B, C, H, W)."""
        alpha, std = self.sde.marginal(t)
        return -per_image(std) * score, (x + per_image(std**2) * score) / per_image(alpha)

    def in_float32(self):
        """The same score in float32; itself where no network is behind it."""
        return self

    def eps(self, x, t):
        """The predicted noise, -std(t) score: (B, C, H, W)."""
        return self.predictions(x, t)[0]

    def x0(self, x, t):
        """The predicted clean image, (x + std^2 score) / alpha (Tweedie's formula): (B, C, H, W)."""
        return self.predictions(x, t)[1]


class ScoreModel(Score):
    """The score that a network predicts.

    Args:
        net: called as net(x, labels).
        sde: the SDE that it was trained on.
        continuous: `config.training.continuous`: trained on continuous times, not on the N steps of a discrete process.
    """

    def __init__(self, net, sde, continuous=True):
        self.net, self.sde, self.continuous = net, sde, continuous
        self._score = self._ve_score if isinstance(sde, sde_lib.VESDE) else self._vp_score

    def __call__(self, x, t):
        """The score, grad_x log p_t(x): (B, C, H, W)."""
        return self._score(x, t)

    def in_float32(self):
        """The same score by a network that computes in float32, whatever this one does."""
        net = self.net.in_float32() if isinstance(self.net, Network) else self.net
        return ScoreModel(net, self.sde, self.continuous)

    def _vp_score(self, x, t):
        if self.continuous:
            labels, std = t * 999, self.sde.marginal(t)[1]
        else:
            labels, std = t * (self.sde.N - 1), (1 - self.sde.table("alphas_bar", t)).sqrt()
        return -self.net(x, labels) / per_image(std)

    def _ve_score(self, x, t):
        labels = self.sde.sigma(t) if self.continuous else torch.round((self.sde.T - t) * (self.sde.N - 1)).long()
        return self.net(x, labels)
