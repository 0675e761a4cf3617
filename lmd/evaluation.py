"""The evaluation of main.py: losses, likelihoods, samples and their scores, for the numbered checkpoints of a run.

Every file carries what it was made from.  A file that is there is not made again, so an evaluation that was stopped
continues; one that was made from something else is refused.  Random numbers are the same for all checkpoints, so that
differences between checkpoints are not those of the draws: the losses' are keyed by the seed and the batch, the
likelihoods' by the seed and the image's own pixels, the samples' by the seed and their numbers, so they do not depend
on where an evaluation was stopped.
"""

import math
from pathlib import Path

import numpy as np
import torch

from basics import files, noise
from basics.console import UserError, choose, counted, progress, say
from basics.image_lists import say_once
from basics.pixels import dequantize, to_model_range
from configs.base import to_dict
from lmd import likelihood, samples, training
from lmd.batches import in_order
from losses import TRAINING_EPS
from metrics import fidelity
from models import inference, memory
from storage.arrays import read_arrays, write_arrays
from storage.checkpoints import check_division, data_of, load_ema_weights, what_weights_depend_on

PRECISION = "fp32"  # of everything that is computed here
BPD_REPEATS = {"train": 1, "test": 5}  # dequantisations of each image, as published
SOLVER = "RK45 for each image"  # of likelihoods and of `SAMPLER`; earlier versions had one step size for a batch
SAMPLER = f"{SOLVER}, then noise_removal"  # of ODE sampling; earlier versions never removed the last time's noise
ODE = {"solver": SOLVER, "eps": likelihood.EPS, "tolerance": likelihood.TOLERANCE}  # of likelihoods


class Evaluation:
    """What the parts of an evaluation share.

    Args:
        trainer: a `training.Trainer`, whose network gets the weights of each checkpoint.
        folder: where the results go.
    """

    def __init__(self, trainer, folder):
        self.trainer, self.config, self.folder = trainer, trainer.config, Path(folder)
        self.batch_size = self.config.eval.batch_size
        self._images = {}

    def images(self, split):
        """The config's 'train' or 'test' images, loaded once."""
        if split not in self._images:
            self._images[split] = self.trainer.images(split)
        return self._images[split]

    def _tell_of_other_images(self, path, trained_on):
        here = self.config.data.dataset
        if trained_on and trained_on["source"].rstrip("/") != here.rstrip("/"):
            say_once(
                f"{path} was trained on {trained_on['source']}, and is evaluated on {here}; "
                f"--config.data.dataset={trained_on['source']} evaluates it on its own"
            )

    def load(self, path):
        """Gives the network the EMA weights of a checkpoint; returns what all results of it depend on (JSON types)."""
        tree, net = to_dict(self.config), self.trainer.state.net
        with files.unchanged(path) as checkpoint:
            load_ema_weights(path, net, tree)
        net.eval()
        trained_on = data_of(path)
        self._tell_of_other_images(path, trained_on)
        if self.trainer.divides:
            check_division(path, trained_on, self.images("train"))
        return {
            "checkpoint": checkpoint,
            "config": what_weights_depend_on(tree),
            "seed": self.config.seed,
            "noise": noise.SCHEME,
            "batch_size": self.batch_size,
            "precision": PRECISION,
        }


def evaluate(config, workdir, eval_folder, device, data_root, workers=None):
    """Evaluates every numbered checkpoint from eval.begin_ckpt to eval.end_ckpt with its EMA weights.

    What is computed is what `PARTS` lists and the config enables.  Samples are scored at the very end, when all are
    there.

    Args:
        config: the config tree.
        workdir: the work folder of a training run.
        eval_folder: name of the folder for the results.
        device: torch.device.
        data_root: where data sets lie.
        workers: threads that decode images, see `datasets.load`.

    Raises:
        UserError: no checkpoint of the range is there, the config asks for what cannot be done, results of something
            else are there, or what scoring the samples needs cannot be had.
    """
    parts, folder = _enabled(config), _folder(workdir, eval_folder)
    if not Path(workdir).is_dir():
        raise UserError(f"there is no folder {workdir}; give --workdir the folder of a training")
    trainer = training.Trainer(config, workdir, device, data_root, workers)
    run, paths = Evaluation(trainer, folder), _checkpoints(config, trainer.workdir / "checkpoints")
    largest = f"for {counted(config.eval.batch_size, 'image')} at once"
    remedy = f"{largest}; lower --config.eval.batch_size and choose another --eval_folder"
    with memory.explained(device, remedy), inference.arithmetic(PRECISION):
        files.check_writable(folder)  # before the images are read
        _try_out(run, parts, paths)
        with files.owned(folder):  # not the work folder, where training may go on
            _write(run, parts, paths)


def _enabled(config):
    """The functions of `PARTS` that the config asks for; what they cannot do is told before any work."""
    options = config.eval  # the largest published configs have no switches
    parts = [part for field, (default, part) in PARTS.items() if options.get(field, default)]
    if not parts:
        raise UserError(f"nothing is to be evaluated; set one of {', '.join(PARTS)} (config.eval) to True")
    if options.batch_size < 1:
        raise UserError(f"a batch of {options.batch_size} images cannot be evaluated; raise --config.eval.batch_size")
    if write_bpd in parts:
        choose(options.bpd_dataset, BPD_REPEATS, "split (config.eval.bpd_dataset)")
    if write_samples in parts:
        fidelity.require_package()
        if options.num_samples < fidelity.SPLITS:
            raise UserError(
                f"scores need at least {fidelity.SPLITS} samples, not {options.num_samples}; raise "
                "--config.eval.num_samples"
            )
    return parts


def _folder(workdir, name):
    """The folder of the results, which lies below the work folder and is none of training's.

    Raises:
        UserError: it would not.
    """
    path = Path(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or path.parts[0] in training.FOLDERS:
        raise UserError(
            f"--eval_folder is '{name}'; it must be the name of a folder of its own below --workdir, such as eval"
        )
    return Path(workdir) / path


def _try_out(run, parts, paths):
    """Meets before anything is written what the config, the first checkpoint and the images have in store."""
    run.load(next(iter(paths.values())))
    splits = {write_loss: "test", write_bpd: run.config.eval.get("bpd_dataset")}
    for split in {splits[part] for part in parts if part in splits}:
        run.images(split)
    if write_samples in parts:
        samples.create_sampler(run.config, run.trainer.sde)


def _write(run, parts, paths):
    origins = {}
    for k, path in paths.items():
        origins[k] = run.load(path)
        for part in parts:
            part(run, k, origins[k])
    if write_samples in parts:
        write_reports(run, origins)


def _checkpoints(config, folder):
    """{number: path} of the checkpoints in the config's range that are there; the others are named."""
    wanted = range(config.eval.begin_ckpt, config.eval.end_ckpt + 1)
    present = {k: path for k in wanted if (path := folder / f"checkpoint_{k}.pth").is_file()}
    if not present:
        raise UserError(
            f"{folder} holds none of checkpoint_{wanted.start}.pth to checkpoint_{config.eval.end_ckpt}.pth; set "
            "--config.eval.begin_ckpt and end_ckpt"
        )
    if missing := [str(k) for k in wanted if k not in present]:
        more = f" and {len(missing) - 20} more" if len(missing) > 20 else ""
        say(f"missing checkpoints, left out: {', '.join(missing[:20])}{more}")
    return present


# ---------------------------------------------------------------------------------------------------------- loss


def write_loss(run, k, origin):
    """The mean test loss: `ckpt_{k}_loss.npz` with `all_losses` (one a batch) and `mean_loss` (over images).

    Args:
        run: an `Evaluation` whose network has the weights of checkpoint k.
        k: the checkpoint's number.
        origin: what `Evaluation.load` returned.
    """
    images, options = run.images("test"), run.config.training
    weighting = {name: options[name] for name in ("reduce_mean", "likelihood_weighting")}
    settings = {**origin, "images": images.fingerprint, "loss": {**weighting, "eps": TRAINING_EPS}}
    path, total = run.folder / f"ckpt_{k}_loss.npz", _rounds(len(images), run.batch_size)
    arrays = read_arrays(path, settings, {"all_losses": (total,), "mean_loss": ()})
    if arrays is None:
        values, counts = [], []
        batches = in_order(images, run.batch_size, run.trainer.device, run.config.data.centered)
        for i, x in enumerate(progress(batches, total=total, unit="batch", desc=f"checkpoint {k}, loss")):
            values.append(run.trainer.loss_on(x, "evaluate", i))
            counts.append(len(x))
        arrays = {"all_losses": np.array(values), "mean_loss": np.average(values, weights=counts)}
        write_arrays(path, settings, **arrays)
    mean = f"mean test loss {arrays['mean_loss']:.5f} over {counted(len(images), 'image')}"
    say(f"checkpoint {k}: {mean}; written to {path}")


def _rounds(count, batch_size):
    """The number of batches."""
    return math.ceil(count / batch_size)


# --------------------------------------------------------------------------------------------- bits per dimension


def write_bpd(run, k, origin):
    """Bits per dimension of the images of eval.bpd_dataset, each dequantised `BPD_REPEATS` times.

    Writes `{split}_ckpt_{k}_bpd_{i}.npz`, i counting the batches of all repeats, with `bpd` (one an image) and
    `evaluations` (of the network, the mean over the batch's images).  Arguments as `write_loss`.
    """
    split = run.config.eval.bpd_dataset
    images, repeats = run.images(split), BPD_REPEATS[split]
    settings, rounds = {**origin, "images": images.fingerprint, "ode": ODE}, _rounds(len(images), run.batch_size)
    values, evaluations = [], 0.0
    with progress(total=repeats * rounds, unit="batch", desc=f"checkpoint {k}, bits per dimension") as bar:
        for i in range(repeats * rounds):
            path, (repeat, batch) = run.folder / f"{split}_ckpt_{k}_bpd_{i}.npz", divmod(i, rounds)
            count = min(run.batch_size, len(images) - batch * run.batch_size)
            numbered = {**settings, "batch": i}
            arrays = read_arrays(path, numbered, {"bpd": (count,), "evaluations": ()})
            if arrays is None:
                arrays = _bpd_of_batch(run, images, batch, repeat)
                write_arrays(path, numbered, **arrays)
            values.append(arrays["bpd"])
            evaluations += count * float(arrays["evaluations"])
            bar.set_postfix(bpd=f"{np.concatenate(values).mean():.4f}", refresh=False)
            bar.update()
    bpd = np.concatenate(values).reshape(repeats, -1).mean(axis=0)  # (N,)
    say(
        f"checkpoint {k}: {bpd.mean():.4f} bits per dimension (standard error {_standard_error(bpd):.4f}) over "
        f"{counted(len(images), f'{split} image')}, {counted(repeats, 'time')} each; "
        f"{evaluations / (repeats * len(images)):.0f} network evaluations each time; written to {run.folder}"
    )


def _bpd_of_batch(run, images, batch, repeat):
    rows = slice(batch * run.batch_size, (batch + 1) * run.batch_size)
    pixels = images.read(rows.start, rows.stop)  # (B, C, H, W) uint8
    dequantized, probes = [], []
    for image, content in zip(pixels.split(1), noise.content_keys(pixels).tolist(), strict=True):
        generator = noise.generator(run.config.seed, "bpd", content, repeat)  # on the CPU: the same for every device
        dequantized.append(dequantize(to_model_range(image, centered=False), generator))
        probes.append(likelihood.rademacher(image.shape, generator))
    centered, model, device = run.config.data.centered, run.trainer.model, run.trainer.device
    x = to_model_range(torch.cat(dequantized).to(device), centered)  # (B, C, H, W)
    density, _, evaluations = likelihood.log_likelihood(model, run.trainer.sde, x, torch.cat(probes).to(device))
    bpd = likelihood.bits_per_dimension(density, x[0].numel(), centered)
    return {"bpd": bpd.cpu().numpy(), "evaluations": evaluations.double().mean().cpu().numpy()}


def _standard_error(values):
    return values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan


# -------------------------------------------------------------------------------------------- samples, their scores


def write_samples(run, k, origin):
    """Draws eval.num_samples samples: `ckpt_{k}/samples_{r}.npz` with `samples` (B, H, W, C) uint8.

    Arguments as `write_loss`.
    """
    rounds = range(_rounds(run.config.eval.num_samples, run.batch_size))
    for r in progress(rounds, unit="batch", desc=f"checkpoint {k}, samples"):
        path, settings = _samples_file(run, k, r), _samples_settings(run, origin, r)
        if read_arrays(path, settings, _samples_shapes(run, settings)) is None:
            first = r * run.batch_size
            images = samples.draw(run.trainer, settings["count"], "evaluation", first)
            write_arrays(path, settings, samples=samples.to_pixels(images))
    say(f"checkpoint {k}: {run.config.eval.num_samples} samples are in {run.folder / f'ckpt_{k}'}")


def _samples_file(run, k, r):
    return run.folder / f"ckpt_{k}" / f"samples_{r}.npz"


def _samples_shapes(run, settings):
    size = run.config.data.image_size
    return {"samples": (settings["count"], size, size, run.config.data.num_channels)}


def _samples_settings(run, origin, r):
    """What batch r of the samples depends on."""
    tree = to_dict(run.config)
    return {
        **origin,
        "sampling": tree["sampling"],
        **({"solver": SAMPLER} if tree["sampling"]["method"].lower() == "ode" else {}),
        "num_scales": tree["model"]["num_scales"],  # the steps where sampling.steps is 0, and what steps are a part of
        "image_size": tree["data"]["image_size"],
        "count": min(run.batch_size, tree["eval"]["num_samples"] - r * run.batch_size),
        "batch": r,
    }


def write_reports(run, origins):
    """Scores the samples of every checkpoint: `report_{k}.npz` with `IS`, `fid` and `kid`, see `metrics.fidelity`.

    They are compared with the training images.  The features of the samples are kept in `ckpt_{k}/statistics_{r}.npz`
    (`pool_3`, `logits`), those of the training images in `reference/statistics_{i}.npz` (`pool_3`).

    Args:
        run: an `Evaluation`.
        origins: {k: what `Evaluation.load` returned}.
    """
    images, count = run.images("train"), run.config.eval.num_samples
    extract, reference = _FeatureFiles(run.trainer.device), None
    for k, origin in origins.items():
        path, settings = run.folder / f"report_{k}.npz", _samples_settings(run, origin, 0)
        settings |= {"count": count, "reference": images.fingerprint, "network": fidelity.WEIGHTS}
        scores = read_arrays(path, settings, dict.fromkeys(("IS", "fid", "kid"), ()))
        if scores is None:
            if reference is None:
                reference = extract.of_images(run, images)
            scores = fidelity.scores(extract.of_samples(run, k, origin), reference)
            write_arrays(path, settings, **scores)
        values = ", ".join(f"{name} {value:.5g}" for name, value in scores.items())
        compared = f"{counted(count, 'sample')} against {counted(len(images), 'image')}"
        say(f"checkpoint {k}: {values} of {compared}; written to {path}")


class _FeatureFiles:
    """Features of images, kept in files a batch each; the network is fetched when a file is missing."""

    def __init__(self, device):
        self.device, self.network = device, None

    def of_images(self, run, images):
        """The `pool` features of an image set: (N, 2048)."""
        origin = {"images": images.fingerprint, "batch_size": run.batch_size, "network": fidelity.WEIGHTS}
        pools = []
        for i in progress(range(_rounds(len(images), run.batch_size)), unit="batch", desc="training images"):
            path = run.folder / "reference" / f"statistics_{i}.npz"
            read = lambda i=i: images.read(i * run.batch_size, (i + 1) * run.batch_size)
            settings = {**origin, "count": min(run.batch_size, len(images) - i * run.batch_size), "batch": i}
            pools.append(self._of_batch(path, settings, read, ("pool_3",))["pool_3"])
        return torch.from_numpy(np.concatenate(pools))

    def of_samples(self, run, k, origin):
        """The `Features` of a checkpoint's samples."""
        parts = []
        rounds = range(_rounds(run.config.eval.num_samples, run.batch_size))
        for r in progress(rounds, unit="batch", desc=f"checkpoint {k}, scores"):
            settings = _samples_settings(run, origin, r)

            def read(r=r, settings=settings):
                shapes = _samples_shapes(run, settings)
                pixels = read_arrays(_samples_file(run, k, r), settings, shapes)["samples"]  # (B, H, W, C)
                return torch.from_numpy(pixels).permute(0, 3, 1, 2)

            path = run.folder / f"ckpt_{k}" / f"statistics_{r}.npz"
            settings = {**settings, "network": fidelity.WEIGHTS}
            parts.append(self._of_batch(path, settings, read, ("pool_3", "logits")))
        pool, logits = (np.concatenate([part[name] for part in parts]) for name in ("pool_3", "logits"))
        return fidelity.Features(torch.from_numpy(pool), torch.from_numpy(logits))

    def _of_batch(self, path, settings, read, names):
        arrays = read_arrays(path, settings, dict.fromkeys(names, (settings["count"], None)))
        if arrays is None:
            if self.network is None:
                self.network = fidelity.Inception(self.device)
            features = self.network(read())  # of (B, C, H, W) uint8
            arrays = {"pool_3": features.pool.numpy(), "logits": features.logits.numpy()}
            arrays = {name: arrays[name] for name in names}
            write_arrays(path, settings, **arrays)
        return arrays


PARTS = {  # the switch in config.eval: whether it is on where a config has none, and what it switches
    "enable_loss": (True, write_loss),
    "enable_bpd": (False, write_bpd),
    "enable_sampling": (False, write_samples),
}
