"""What the network's own blocks say of an image, in one evaluation.

"CFS" (arXiv 2605.11014): at logSNR ln(a^2/b^2) = 5, the means and standard deviations z over the pixels of each channel
of one block of the encoder and one of the decoder; the sum of (z - mu)^2 / var with the mean and variance of fitted
images.  As published: these numbers, and the blocks whose ratio of between-image to within-noise variance is largest on
32 fitted images.  Ours: the encoder's first residual stage and the decoder's first at full size, for every network, so
that what is measured does not depend on what is fitted; on the two models tried they had the largest ratios or nearly
so.  Cost: 1 evaluation of the network.
"""

import contextlib
import math

import torch

from basics import noise
from basics.console import UserError
from lmd.methods import network
from lmd.methods.densities import Independent
from lmd.methods.fitted import DensityMethod
from models.ddpm import Stage


class CFS(DensityMethod):
    """The sum of squared standardised channel statistics.

    Args:
        log_snr: ln(a^2/b^2) of the level.
    """

    name = "cfs"
    limits = {"log_snr": (-math.inf, math.inf)}

    def __init__(self, log_snr=5.0):
        super().__init__({self.name: Independent()})
        self.settings = {"log_snr": log_snr}

    def evaluations(self, model):
        return 1

    def compiled_evaluations(self, model):
        return 0  # see `outputs`

    def statistics(self, model, images, keys):
        """Means, then standard deviations, of every channel of the encoder's block, then of the decoder's (B, F)."""

        def moments(at, x0, draw):
            with outputs(blocks(model)) as seen:
                at.eps(model.score, at.noisy(x0, draw(0, "prior")))
            pixels = [block.flatten(2).double() for block in seen]  # each (n, C, H W)
            return torch.cat([part for p in pixels for part in (p.mean(dim=2), p.std(dim=2, correction=0))], dim=1)

        levels = network.levels_at(model, [math.exp(-self.settings["log_snr"] / 2)])
        return network.measure(model, images, levels, moments, noise.seed_keys(self.name, keys))[:, 0].numpy()

    def features(self, statistics):
        return {self.name: statistics}


def blocks(model):
    """The two residual stages of a `trained_model.TrainedModel` that are looked at.

    Raises:
        UserError: its network has none.
    """
    net = model.score.net
    net = net if isinstance(net, torch.nn.Module) else getattr(net, "net", None)  # as `models.inference` has it
    stages = [] if net is None else [module for module in net.modules() if isinstance(module, Stage)]
    down, up = ([stage for stage in stages if stage.takes_skip == takes] for takes in (False, True))
    if not down or not up:
        raise UserError("cfs looks at the residual stages of a U-Net, and this network has none; use another method")
    return down[0], up[-model.config.model.num_res_blocks - 1 :][0]


@contextlib.contextmanager
def outputs(modules):
    """A block in which the network is not compiled; gives a list that holds each module's last output at its end."""
    seen = [None] * len(modules)

    def keep(i):
        def hook(module, arguments, output):
            seen[i] = output

        return hook

    handles = [module.register_forward_hook(keep(i)) for i, module in enumerate(modules)]
    try:
        with torch.compiler.set_stance("force_eager"):  # what was compiled before knows of no hooks
            yield seen
    finally:
        for handle in handles:
            handle.remove()
