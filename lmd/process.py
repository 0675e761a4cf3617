"""What `config.sampling` says, checked and made ready to be run: solvers, presets, and the `Process`."""

import dataclasses
import math

import torch

import sampling
from basics.console import UserError, choose
from configs.base import TREE
from configs.fields import FIELDS, check_value
from sde_lib import VPSDE, SubVPSDE, create_sde

# `config.sampling.sampler` besides the published one, whose predictor is `config.sampling.predictor`.
SAMPLERS = {
    "ddim": lambda sde, options: sampling.ExponentialIntegrator(sde, eta=options.eta),
    "dpmpp_2m": lambda sde, options: sampling.ExponentialIntegrator(sde, eta=0.0, order=2),
    "sde_dpmpp_2m": lambda sde, options: sampling.ExponentialIntegrator(sde, eta=1.0, order=2),
}
PUBLISHED = "published"


def create_solvers(config, sde, group=None):
    """The predictor and the corrector (None for none) of a config.

    Args:
        config: `config.sampling` is read.
        sde: the SDE.
        group: images per published batch, for Langevin's step size.

    Raises:
        UserError: for an unknown name, or a predictor that the SDE does not have.
    """
    options = config.sampling
    corrector = choose(options.corrector.lower(), sampling.CORRECTORS, "corrector (config.sampling.corrector)")
    if options.sampler == PUBLISHED:
        predictor = choose(options.predictor.lower(), sampling.PREDICTORS, "predictor (config.sampling.predictor)")
        predictor = predictor(sde, options.probability_flow)
    else:
        sampler = choose(options.sampler, {PUBLISHED: None, **SAMPLERS}, "sampler (config.sampling.sampler)")
        predictor = sampler(sde, options)
    return predictor, corrector(sde, options.snr, options.n_steps_each, group)


# Named settings for Lift, Map, Detect (recon.py's --sampler): values of config.sampling, and repetitions of each image.
# benchmarks/quality_vs_cost.py measured them: fresh noise and replacement, few steps where they matter, from a smooth
# fill of the known pixels.
_FEW_STEPS = {
    "method": "pc",
    "sampler": "ddim",
    "probability_flow": False,
    "time_grid": "uniform",
    "returns": 0,
    "lift": "mask",
    "eta": 1.0,
    "constraint": "replace",
    "corrector": "none",
    "t_start": 0.6,
    "t_end": 0.1,
}
PRESETS = {"fast": ({**_FEW_STEPS, "steps": 5}, 4), "best": ({**_FEW_STEPS, "steps": 10}, 10)}


def preset(name, config):
    """A named setting for the SDE of a config.

    The times are those of the sub-VP SDE of images in [-1, 1], on which the settings were measured; for another SDE, or
    images in [0, 1], they become the times of the same noise relative to the images.

    Args:
        name: a key of `PRESETS`.
        config: the config tree.

    Returns:
        values of `config.sampling`, and the repetitions of each image.
    """
    values, reps = choose(name, PRESETS, "preset")
    sde, measured = create_sde(config), SubVPSDE()
    shift = 0.0 if config.data.centered else math.log(2)
    times = torch.tensor([values["t_start"], values["t_end"]], dtype=torch.float64)
    start, end = sde.time_at(measured.log_snr(times) + shift).clamp(sde.eps, sde.T).tolist()
    return {**values, "t_start": round(start, 4), "t_end": round(end, 4)}, reps


@dataclasses.dataclass(frozen=True)
class Process(sampling.InpaintingScheme):
    """How the reverse process is run: what `config.sampling` says, ready to sample and to inpaint."""

    def sample(self, model, noise, on_step=None):
        """As `sampling.sample`.

        Raises:
            UserError: see `check_sampling`.
        """
        self.check_sampling()
        if self.limits is not None:
            model = sampling.ConstrainedScore(model, self.limits)
        return sampling.sample(model, noise, self, on_step)

    def check_sampling(self):
        """Refuses what only inpainting can use: samples start from noise at t = 1, and nothing of them is known.

        Raises:
            UserError: names the fields.
        """
        start, predictor = round(self.times[0].item(), 4), self.predictor
        found = {
            f"t_start={start}": start != predictor.sde.T,
            f"constraint={self.constraint}": self.constraint != "replace",
            f"lift={self.lift}": self.lift != "mask",
            "noise_removal=False": not self.denoise  # refused before for the samplers of few steps
            and (predictor.probability_flow or isinstance(predictor, sampling.NoPredictor)),
        }
        if names := ", ".join(name for name, holds in found.items() if holds):
            raise UserError(
                f"samples cannot be drawn with config.sampling: {names}; give that to recon.py alone, and leave it out "
                "here"
            )

    def inpaint(self, model, data, mask, noise, on_step=None):
        """As `sampling.inpaint`, or as `sampling.inpaint_as_published` with a published predictor."""
        way = sampling.inpaint if self.predictor.ends_clean else sampling.inpaint_as_published
        return way(model, data, mask, noise, self, on_step)


def create_process(config, sde, group=None):
    """The `Process` of a config, for the method pc.

    Args:
        config: `config.sampling` and `config.data.centered` are read.
        sde: the SDE of the model.
        group: as in `create_solvers`.

    Raises:
        UserError: unknown names, numbers out of range, or settings that do not go together.
    """
    options = config.sampling
    check_settings(options, sde)
    _, corrector = create_solvers(config, sde, group)  # whose step size is that of the N steps trained on
    if corrector is not None and isinstance(sde, VPSDE) and sde.betas[-1] >= 1:
        raise UserError(
            f"the corrector {options.corrector} needs config.model.num_scales above {sde.beta_max:g}, not {sde.N}: its "
            "step is one of the discrete process; use more, or the corrector none"
        )
    sde = sde.with_steps(options.steps or sde.N)
    predictor, _ = create_solvers(config, sde, group)
    discrete = isinstance(predictor, (sampling.ReverseDiffusion, sampling.AncestralSampling))
    if type(sde) is VPSDE and discrete and sde.betas[-1] >= 1:
        raise UserError(
            f"{options.predictor} needs more than {sde.beta_max:g} steps, not {sde.N}: each is one of the discrete "
            "process; use more, or the sampler ddim"
        )
    times = sampling.time_grid(sde, sde.N, options.t_end or sde.eps, options.t_start, options.time_grid)
    return Process(
        predictor,
        sampling.with_returns(times, options.returns),
        corrector,
        options.noise_removal,
        options.constraint,
        options.lift,
        limits=((-1.0, 1.0) if config.data.centered else (0.0, 1.0)) if predictor.ends_clean else None,
    )


# --------------------------------------------------------------------------------------------------------- checks


def check_settings(options, sde):
    """Refuses values of `config.sampling` out of range, or that do not go together, or would have no effect.

    Args:
        options: `config.sampling`.
        sde: the SDE of the model.

    Raises:
        UserError: names the field and the remedy.
    """
    for name, kind in FIELDS["sampling"].items():
        check_value(f"config.sampling.{name}", options[name], kind)
    if options.method.lower() != "pc":
        raise UserError(f"config.sampling.method is {options.method}, which can only draw samples; set it to pc")
    end = options.t_end or sde.eps
    if end >= options.t_start:
        raise UserError(f"config.sampling: t_end, {end:g}, must be below t_start, {options.t_start:g}; change either")
    if options.sampler == PUBLISHED and options.predictor.lower() == "none" == options.corrector.lower():
        raise UserError(
            "config.sampling: the predictor 'none' needs a corrector, or nothing would happen; choose either"
        )
    check_effects(options, sde)
    if options.lift != "mask" and options.t_start == sde.T:
        raise UserError(
            "config.sampling: the lifts 'noise' and 'both' need t_start < 1, since nothing is left of an image at t = 1"
        )


# Fields of config.sampling and the values that are no choice of the user's: the default, and those of published
# configs, which stand there also where another field leaves them without effect.
USUAL = {name: (default,) for name, default in TREE["sampling"].items()} | {
    "predictor": ("euler_maruyama", "reverse_diffusion", "ancestral_sampling"),
    "corrector": ("none", "langevin"),
    "snr": (0.16, 0.075, 0.15, 0.17),
}


def without_effect(options, sde):
    """Which fields of `config.sampling` the others leave without effect.

    Args:
        options: `config.sampling`.
        sde: the SDE, whose N is the number of steps where `steps` is 0.

    Returns:
        dict: reason -> names of fields; a reason reads on after the names.
    """
    if options.method.lower() == "ode":
        names = [name for name in USUAL if name not in ("method", "noise_removal")]
        return {"not with the method 'ode', where noise_removal alone can be chosen; set method=pc": names}
    own = options.sampler != PUBLISHED
    rules = {
        f"not with the published sampler; choose one of {', '.join(SAMPLERS)}": (
            not own,
            ["time_grid", "t_start", "t_end", "constraint", "returns", "lift"],
        ),
        f"not with the sampler {options.sampler}, which is a predictor itself and ends without noise": (
            own,
            ["predictor", "noise_removal"],
        ),
        f"not with the sampler {options.sampler}; ddim with eta=0 follows the same ODE": (own, ["probability_flow"]),
        "not with the predictor 'none'": (not own and options.predictor.lower() == "none", ["probability_flow"]),
        "eta goes with the sampler ddim": (options.sampler != "ddim", ["eta"]),
        "not without a corrector; choose langevin or ald": (
            options.corrector.lower() == "none",
            ["n_steps_each", "snr"],
        ),
        "not with the lift 'noise', which holds no pixels": (own and options.lift == "noise", ["constraint"]),
        "not with a single step": ((options.steps or sde.N) == 1, ["time_grid", "t_end", "eta", "returns"]),
    }
    return {reason: names for reason, (holds, names) in rules.items() if holds}


def check_effects(options, sde):
    """Refuses values of `config.sampling` that are not `USUAL` and have no effect.

    Raises:
        UserError: names the fields.
    """
    single = options.sampler != PUBLISHED and options.steps == 1  # of a preset, whose t_end nobody typed
    spared = {"t_end"} if single else set()
    _refuse_without_effect(options, sde, lambda name: name not in spared and options[name] not in USUAL[name])


def _refuse_without_effect(options, sde, changed):
    for reason, names in without_effect(options, sde).items():
        if found := [name for name in names if changed(name)]:
            raise UserError(f"config.sampling: {', '.join(found)}: {reason}")


def check_typed(config, typed):
    """Refuses what a command line sets in `config.sampling` and another setting leaves without effect.

    A config file's own values may be without effect, as in published configs; what was typed is meant.

    Args:
        config: the config tree.
        typed: paths of the fields that were set on the command line, such as "sampling.snr".

    Raises:
        UserError: names the fields.
    """
    names = {path.removeprefix("sampling.") for path in typed if path.startswith("sampling.")}
    _refuse_without_effect(config.sampling, create_sde(config), lambda name: name in names)
