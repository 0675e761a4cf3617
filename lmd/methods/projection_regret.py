"""How far an image moves when it is projected onto the domain, less how far its own projection still moves.

Choi, Lee, Lee and Lee, "Projection Regret: Reducing Background Bias for Novelty Detection via Diffusion Models",
NeurIPS 2023 (arXiv 2312.02615), equation 5: the mean of d(x, P_b(x)) - d(P_a(x), P_b(P_a(x))), where P_t noises to a
level t and denoises, and a is noisier than b.  What both distances owe to the background cancels.  As published: P by a
consistency model in one step, d LPIPS.  Ours: P by a few steps of DDIM, MSE and SSIM, the same draws of P_b(x) for all
of P_a(x).  Cost: n_a n_b + n_a + n_b projections, here 8 of 5 steps, 40 evaluations.
"""

import math

import numpy as np

from basics import noise
from basics.pixels import to_model_range
from lmd.methods.base import Method
from lmd.methods.projection import END, Distances, Projection
from metrics import canonical


class ProjectionRegret(Method):
    """The regret by each metric; a part a metric.

    Args:
        metrics: names in `metrics.METRICS`.
        ratio_a, ratio_b: noise ratios b / a of the two levels.
        draws_a, draws_b: of the noise of each.
        steps: evaluations of the network in a projection.

    Raises:
        UserError: an unknown metric.
    """

    name = "projection_regret"
    limits = {"ratio_a": (END, math.inf), "ratio_b": (END, math.inf)}

    def __init__(self, metrics=("MSE", "SSIM"), ratio_a=2.0, ratio_b=1.0, draws_a=2, draws_b=2, steps=5):
        metrics = [canonical(name) for name in metrics]
        self.parts = tuple(f"{self.name}_{name.lower()}" for name in metrics)
        self.reasons = {
            part: (
                f"structure: it moves more than its own projection when projected onto the domain (by {name})",
                f"smoothness: it moves less than its own projection when projected onto the domain (by {name})",
            )
            for part, name in zip(self.parts, metrics, strict=True)
        }
        self._distances = Distances(metrics)
        self.settings = {
            "metrics": metrics,
            "ratio_a": ratio_a,
            "ratio_b": ratio_b,
            "draws_a": draws_a,
            "draws_b": draws_b,
            "steps": steps,
        }

    def evaluations(self, model):
        self._distances.metrics_on(model.device)  # fetched before anything is measured
        a, b = self.settings["draws_a"], self.settings["draws_b"]
        return (a * b + a + b) * self.settings["steps"]

    def statistics(self, model, images, keys):
        """Two mean distances by each metric (B, 2 M): M of the image from P_b of it, then M of P_a of it likewise."""
        options, orig = self.settings, to_model_range(images, centered=False)
        project_a, project_b = (Projection(model, options[r], options["steps"]) for r in ("ratio_a", "ratio_b"))
        first = noise.repetition_keys(keys, range(options["draws_a"])).view(-1, len(images))  # (n_a, B)
        found = [self._moved(model, orig, keys, project_b)]
        for own in first:
            found.append(self._moved(model, project_a(images, own), own, project_b))
        return np.concatenate([found[0], np.mean(found[1:], axis=0)]).T

    def score_statistics(self, statistics):
        moved, still_moved = np.split(statistics, 2, axis=1)
        return moved - still_moved

    def _moved(self, model, images, keys, project):
        """Mean distances (M, B) between images (B, C, H, W) in [0, 1] and what they are projected to."""
        keys = noise.repetition_keys(noise.seed_keys("projected again", keys), range(self.settings["draws_b"]))
        projected = [project(images, own) for own in keys.view(-1, len(images))]
        return self._distances(images, projected, model.device).mean(axis=1)
