"""Lift, Map, Detect as a method: the distances between an image and its reconstructions by inpainting.

Liu, Zhou, Wang and Weinberger, "Unsupervised Out-of-Distribution Detection with Diffusion Inpainting", ICML 2023
(arXiv 2302.10326), algorithm 1.  As published: alternating checkerboards of 8 x 8 blocks, 10 repetitions of 1,000
steps, the median of LPIPS.  Ours by default: the same masks, 4 repetitions of 5 steps (`process.PRESETS`, 'fast'), MSE
and SSIM, which need no other network.

A network of discrete times is asked between its steps, as in the published code: DDPM's at the label t (N - 1), which
need not be whole, SMLD's at the nearest step.  DDPM's label then stands for a little more noise than the image has, of
N = 1000 levels less than 2 % at the times of 'fast' and 'best', and up to 41 % at the published last time, 0.001.
"""

import functools

import numpy as np

import metrics
from basics.console import UserError, choose
from basics.pixels import to_model_range
from lmd.distances import distances_of, median_score
from lmd.methods.base import Examined, Method
from lmd.process import PRESETS, PUBLISHED, preset
from lmd.reconstructor import MaskOptions, Reconstructor
from masks import MASK_TYPES
from metrics import canonical
from sampling import LIFTS

_FAR = 1e6  # a distance that no pixel reaches
_CHOICES = {  # names of settings -> what they may be
    "sampler": {PUBLISHED: None, **PRESETS},
    "mask_type": {name: make for name, make in MASK_TYPES.items() if name not in ("none", "file")},
    "lift": dict.fromkeys(LIFTS),
}
_MASK, _BLOCKS = "checkerboard_alt", 8  # the defaults
_NOTHING = 1e-9  # what a sum of squared distances is divided by, where it is 0
_LEAST_DOUBT = 0.2  # added to the standard deviation of a pixel's reconstructions; .1 to .3 find patches equally well


class LMD(Method):
    """The median distance by each metric; a part a metric.

    Args:
        metrics: names in `metrics.METRICS`.
        sampler: a key of `lmd.process.PRESETS`, or 'published' for the sampling of the model's config.
        reps: repetitions of each image; by default the sampler's, 10 for the published one.
        mask_type: as --mask_type, but 'none' and 'file'; random masks are the same for every image.
        num_blocks: blocks an edge of checkerboards; 8, the default, where it does not divide the image, is the next
            lower that does.
        lift: as --lift: 'mask'; 'noise', with which no pixel is known; or 'both'.

    Raises:
        UserError: an unknown name, a number out of range, or a setting that has no effect with the others.
    """

    name = "lmd"

    def __init__(
        self,
        metrics=("MSE", "SSIM"),
        sampler="fast",
        reps=None,
        mask_type=_MASK,
        num_blocks=_BLOCKS,
        lift="mask",
    ):
        metrics = [canonical(name) for name in metrics]
        self.parts = tuple(f"lmd_{name.lower()}" for name in metrics)
        self.reasons = {
            part: (
                f"structure: its parts do not fit together as the domain's do (far from its reconstruction by {name})",
                f"smoothness: it is plainer than the domain's images (too close to its reconstruction by {name})",
            )
            for part, name in zip(self.parts, metrics, strict=True)
        }
        self.settings = {
            "metrics": metrics,
            "sampler": sampler,
            "reps": reps,
            "mask_type": mask_type,
            "num_blocks": num_blocks,
            "lift": lift,
        }
        self._check()
        self._prepared = functools.lru_cache(maxsize=1)(self._prepare)  # for the model last used

    def _check(self):
        options = self.settings
        for name, known in _CHOICES.items():
            choose(options[name], known, f"{name} of lmd")
        if options["lift"] != "mask" and options["sampler"] == PUBLISHED:
            raise UserError(
                f"lmd: the lift '{options['lift']}' is not of the published sampler; choose another sampler"
            )
        held, checkered = options["lift"] != "noise", options["mask_type"].startswith("checkerboard")
        if options["mask_type"] != _MASK and not held:
            raise UserError("lmd: mask_type has no effect with the lift 'noise', with which no pixel is known")
        if options["num_blocks"] != _BLOCKS and not (held and checkered):
            cause = f"the mask type '{options['mask_type']}'" if held else "the lift 'noise'"
            raise UserError(f"lmd: num_blocks has no effect with {cause}; leave it out")
        reps = options["reps"]
        if reps is not None and not (isinstance(reps, int) and reps >= 1):
            raise UserError(f"lmd: reps is {reps}; it must be a whole number of 1 at least")

    def evaluations(self, model):
        reconstruct, masks, _ = self._prepared(model)
        return len(masks) * reconstruct.process().evaluations

    def statistics(self, model, images, keys):
        """The distances (B, M R): by each of M metrics from each of R reconstructions."""
        orig, recons, _ = self._reconstruct(model, images, keys)
        return self._distances(model, orig, recons)

    def examine(self, model, images, keys):
        """With the mean reconstruction of each pixel, and its distance from the nearest one, where it was masked.

        Distances are divided by the standard deviation of the pixel's reconstructions and a little more: what the model
        is sure of must fit.  The misfit is a posterior predictive check (Gelman, Meng and Stern, Statistica Sinica 6,
        1996): if the model's distribution is the domain's, an image and its reconstructions are draws of one
        distribution, given the known pixels, and are equally far from each other on average.
        """
        orig, recons, masks = self._reconstruct(model, images, keys)
        filled = 1 - masks[:, None]  # (R, 1, 1, H, W)
        times = filled.sum(dim=0)  # (1, 1, H, W), how often each pixel was masked
        always_known = (times == 0).float()
        mean = (recons * filled).sum(dim=0) / times.clamp_min(1) + orig * always_known  # (B, C, H, W)
        variance = ((recons - mean).square() * filled).sum(dim=0) / times.clamp_min(1)
        nearest = ((recons - orig).abs() + _FAR * masks[:, None]).amin(dim=0) * (1 - always_known)
        distances = nearest.mean(dim=1) / (variance.mean(dim=1).sqrt() + _LEAST_DOUBT)
        misfit = _misfit(mean - orig, variance, times)
        return Examined(self._distances(model, orig, recons), mean.clamp(0, 1), distances, misfit)

    def score_statistics(self, statistics):
        distances = statistics.reshape(len(statistics), len(self.parts), -1)  # (N, M, R)
        return median_score(distances, axis=2)

    def _reconstruct(self, model, images, keys):
        """orig (B, C, H, W) in [0, 1], recons (R, B, C, H, W), masks (R, 1, H, W), on the CPU."""
        reconstruct, masks, _ = self._prepared(model)
        return to_model_range(images, centered=False), reconstruct(images, keys, masks), masks

    def _distances(self, model, orig, recons):
        distances = distances_of(self._prepared(model)[2], orig, list(recons), model.device)  # (M, R, B)
        return distances.reshape(-1, len(orig)).T.astype(np.float64)

    def _prepare(self, model):
        """The `Reconstructor`, the masks (R, 1, H, W) and the metrics for a model."""
        config, reps, size = model.config.copy_and_resolve_references(), 10, model.config.data.image_size
        if self.settings["sampler"] != PUBLISHED:
            values, reps = preset(self.settings["sampler"], config)
            config.sampling.update({**values, "lift": self.settings["lift"]})
        blocks = self.settings["num_blocks"]
        if blocks == _BLOCKS:
            blocks = next(n for n in range(_BLOCKS, 0, -1) if size % n == 0)
        elif size % blocks:
            fitting = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            raise UserError(
                f"lmd: num_blocks is {blocks}, which does not divide images of {size} pixels; choose one of: {fitting}"
            )
        kind = "none" if self.settings["lift"] == "noise" else self.settings["mask_type"]
        masks = MaskOptions(kind, num_blocks=blocks).stack(size, self.settings["reps"] or reps, "lmd", "mask")
        compared = [metrics.create(name, model.device) for name in self.settings["metrics"]]
        # An image's distances are to depend on no other image.
        return Reconstructor(config, model.score, model.device, model.rows, shared_step=False), masks, compared


def _misfit(bias, variance, times):
    """Mean square distance from the reconstructions by that of two of these from each other, (B,); see `LMD.examine`.

    Args:
        bias, variance: (B, C, H, W) of each pixel's reconstructions in which it was masked.
        times: (1, 1, H, W), how many they are; None is returned where they are fewer than 2 everywhere.
    """
    several = times > 1
    if not several.any():
        return None
    from_image = (bias.square() + variance) * several
    from_each_other = 2 * variance * times / (times - 1).clamp_min(1) * several
    ratio = from_image.flatten(1).sum(dim=1) / from_each_other.flatten(1).sum(dim=1).clamp_min(_NOTHING)
    return ratio.double().numpy()
