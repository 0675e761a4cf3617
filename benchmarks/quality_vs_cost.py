"""How well settings of the sampler detect, against what they cost: a table, a CSV file and a plot.

    python -m benchmarks.quality_vs_cost --pair fashion_mnist_vs_mnist \\
        --ckpt_path pretrained/fashion_mnist_small.safetensors \\
        --in_domain demo/fashion_mnist.npz --out_of_domain demo/mnist.npz
    python -m benchmarks.quality_vs_cost --report fashion_mnist_vs_mnist

Every setting of `SETTINGS` (or those that --settings names) reconstructs the first --images of either side; the
distances of every image and repetition are kept in {folder}/{pair}/{setting}/, a file a batch, so a run that was
stopped continues, and several runs can share the work (--part 1/2 and --part 2/2).  benchmarks/scores/ has the
distances that the tables of docs/results.md were made from, of an earlier model and version; a report is of them where
the folder holds nothing of the pair.
The report gives, for each setting and number of repetitions:

- evaluations of the network for an image, and the processor seconds they took;
- ROC-AUC (in-domain against out-of-domain, median over the repetitions);
- its difference to the reference's on the images that both have, with a paired-bootstrap interval (95 %);
- the rank correlation of the images' scores with the reference's, the mean of the two sides';
- the share of repetitions that would do if images were left as soon as their decision is settled, and the ROC-AUC then
  (`stop_early`).
"""

import argparse
import csv
import dataclasses
import io
import itertools
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

import metrics
import sde_lib
from basics import files, noise
from basics.console import UserError, choose, guard, say
from basics.machine import choose_device, keep_freed_memory
from basics.pixels import to_model_range
from benchmarks import machine
from command_line import read_config
from lmd import reconstruction, trained_model
from lmd.distances import distances_of
from lmd.process import create_process
from lmd.reconstructor import MaskOptions, Reconstructor
from models.inference import PRECISIONS, resolve
from storage.arrays import read_arrays, write_arrays
from storage.results_folder import SIDES

BATCH = 32  # images
ROWS = 64  # trajectories at once
RESAMPLES = 2000
REFERENCE = "published_1000"
MASK = MaskOptions("checkerboard_alt", num_blocks=8)
KEPT = Path(__file__).parent / "scores"  # {pair}.npz: distances that came with the repository, for reports


@dataclasses.dataclass(frozen=True)
class Setting:
    """Values of config.sampling, and the repetitions that are made of each image."""

    reps: int
    values: dict


def _ddim(steps, reps=4, **values):
    return Setting(reps, {"sampler": "ddim", "constraint": "project", "steps": steps, **values})


SETTINGS = {
    REFERENCE: Setting(4, {"steps": 1000}),
    "published_100": Setting(4, {"steps": 100}),
    "published_25": Setting(4, {"steps": 25}),
    # x0-replacement, fresh noise: the number of steps
    "ddim_2": _ddim(2),
    "ddim_3": _ddim(3),
    "ddim_5": _ddim(5, reps=10),
    "ddim_10": _ddim(10, reps=10),
    "ddim_20": _ddim(20),
    # one thing changed at a time
    "ddim_5_replace": _ddim(5, constraint="replace"),
    "ddim_10_replace": _ddim(10, constraint="replace"),
    "ddim_20_replace": _ddim(20, constraint="replace"),
    "ddim_10_replace_langevin": _ddim(10, constraint="replace", corrector="langevin"),
    "ddim_10_eta0": _ddim(10, eta=0.0),
    "ddim_10_eta0.5": _ddim(10, eta=0.5),
    "ddim_10_lambda": _ddim(10, time_grid="lambda"),
    "ddim_10_end0.03": _ddim(10, t_end=0.03),
    "ddim_5_start0.5": _ddim(5, t_start=0.5),
    "ddim_10_start0.5": _ddim(10, t_start=0.5),
    "ddim_5_start0.8": _ddim(5, t_start=0.8),
    "ddim_5_returns1": _ddim(5, returns=1),
    "dpmpp_2m_10": _ddim(10, sampler="dpmpp_2m"),
    "sde_dpmpp_2m_10": _ddim(10, sampler="sde_dpmpp_2m"),
    "sde_dpmpp_2m_5": _ddim(5, sampler="sde_dpmpp_2m"),
    # other lifts
    "noise_0.3_5": _ddim(5, lift="noise", constraint="replace", t_start=0.3),
    "noise_0.5_5": _ddim(5, lift="noise", constraint="replace", t_start=0.5),
    "both_0.5_5": _ddim(5, lift="both", t_start=0.5),
    "both_0.8_5": _ddim(5, lift="both", t_start=0.8),
}
# where few steps should lie: from the smoothed known pixels at `start`, or from noise, to the prediction at `end`
SETTINGS |= {
    f"ddim_{steps}_{constraint}_{start:g}-{end:g}": _ddim(steps, reps, constraint=constraint, t_start=start, t_end=end)
    for steps, reps in ((3, 4), (5, 10), (10, 10))
    for constraint in ("replace", "project")
    for start in (1.0, 0.8, 0.6, 0.5, 0.4)
    for end in (0.05, 0.1, 0.2, 0.3)
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", help="name of the pair of image sets, its folder")
    parser.add_argument("--config", default="configs/subvp/fashion_mnist_small.py")
    parser.add_argument("--ckpt_path")
    parser.add_argument("--in_domain")
    parser.add_argument("--out_of_domain")
    parser.add_argument("--data_root", default="./data")
    parser.add_argument("--images", type=machine.count, default=128, help="of either side")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--metric", default="MSE,SSIM")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--part", default="1/1", help="the share of the work that this process does")
    parser.add_argument("--folder", default="results/quality_vs_cost")
    parser.add_argument("--report", help="pairs to report, separated by commas; nothing is computed")
    parser.add_argument("--reference", default=REFERENCE, help="the setting that the others are compared with")
    parser.add_argument("--keep", action="store_true", help="with --report: keep the distances in benchmarks/scores/")
    options = parser.parse_args()
    if options.report:
        return report(options)
    if not (options.pair and options.ckpt_path and options.in_domain and options.out_of_domain):
        raise UserError("give --pair, --ckpt_path, --in_domain and --out_of_domain, or --report")
    return measure(options)


# ------------------------------------------------------------------------------------------------------- measuring


def measure(options):
    """Computes what is missing of the distances."""
    device = choose_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    config = read_config(options.config)
    options.precision = resolve(options.precision, device)  # what was computed is kept with it
    model, _ = trained_model.load_model(config, options.ckpt_path, device, options.precision, options.compile)
    sources = {"pos": (options.in_domain, True), "neg": (options.out_of_domain, True)}
    job = reconstruction.Job(
        config, options.ckpt_path, "", sources, MASK, max_images=options.images, data_root=options.data_root
    )
    sides = reconstruction.load_sides(job)
    tools = [metrics.create(name, device) for name in options.metric.split(",")]
    size = config.data.image_size
    with torch.no_grad():  # what is compiled is compiled before anything is timed
        model(torch.zeros(ROWS, config.data.num_channels, size, size, device=device), torch.ones(1, device=device))
    part, parts = map(int, options.part.split("/"))
    units = [
        (name, side, batch)
        for name in options.settings.split(",")
        for batch in range(reconstruction.batches_of(sides["pos"], BATCH))
        for side in sides
        if batch * BATCH < len(sides[side])
    ]
    for name, side, batch in units[part - 1 :: parts]:
        setting = choose(name, SETTINGS, "setting")
        path = _file(options.folder, options.pair, name, side, batch)
        origin = _origin(config, setting, options, sides[side], batch)
        count = min(BATCH, len(sides[side]) - batch * BATCH)
        shapes = {**{tool.name: (setting.reps, count) for tool in tools}, "seconds": ()}
        if read_arrays(path, origin, shapes) is None:
            arrays = measure_batch(config, model, setting, tools, options.seed, device, sides[side], batch)
            write_arrays(path, origin, **arrays)
            say(f"{options.pair} {name} {side} {batch}: {arrays['seconds']:.1f} s")


def measure_batch(config, model, setting, tools, seed, device, images, batch):
    """Distances (metrics, R, B), and the processor seconds of the reconstructions."""
    config = with_values(config, setting)
    reconstruct = Reconstructor(config, model, device, ROWS)
    pixels = images.read(batch * BATCH, min((batch + 1) * BATCH, len(images)))
    masks = MASK.stack(config.data.image_size, setting.reps)
    began = time.process_time()
    recons = reconstruct(pixels, noise.seed_keys(seed, noise.content_keys(pixels)), masks)
    seconds = time.process_time() - began
    return arrays_of(tools, to_model_range(pixels, centered=False), recons, device, seconds)


def arrays_of(tools, orig, recons, device, seconds):
    """What is kept of a batch: orig (B, C, H, W), recons (R, B, C, H, W)."""
    distances = distances_of(tools, orig, list(recons), device)
    return {**{tool.name: distances[i] for i, tool in enumerate(tools)}, "seconds": np.array(seconds)}


def with_values(config, setting):
    """A copy of the config with the setting's values."""
    config = config.copy_and_resolve_references()
    config.sampling.update(setting.values)
    return config


def _origin(config, setting, options, images, batch):
    job = reconstruction.Job(
        with_values(config, setting), options.ckpt_path, "", {}, MASK, reps=setting.reps, seed=options.seed
    )
    checkpoint = files.file_hash(trained_model.weights_path(options.ckpt_path))
    settings = reconstruction.describe_settings(job, checkpoint, options.precision)
    start = batch * BATCH
    pixels = images.read(start, min(start + BATCH, len(images)))
    return {**settings, "images": images.name, "pixels": machine.digest(pixels), "metric": options.metric}


def _file(folder, pair, name, side, batch):
    return Path(folder) / pair / name / f"{side}_{batch}.npz"


# ------------------------------------------------------------------------------------------------------- reporting


def report(options):
    """Prints the tables and writes quality_vs_cost.csv and quality_vs_cost.png into the folder."""
    rows = []
    for pair in options.report.split(","):
        if options.keep:
            keep(options.folder, pair, options.metric.split(","))
        for metric in options.metric.split(","):
            rows += rows_of(options.folder, pair, metric, options.reference)
    print_table(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(Path(options.folder) / "quality_vs_cost.csv", text.getvalue())
    files.write_bytes(Path(options.folder) / "quality_vs_cost.png", plot(rows, options.reference))
    say(f"written: {Path(options.folder) / 'quality_vs_cost.csv'} and .png")


def rows_of(folder, pair, metric, reference):
    """A row of the table for every setting and number of repetitions of a pair."""
    found = {name: read(folder, pair, name, metric) for name in SETTINGS}
    found = {name: value for name, value in found.items() if value is not None}
    if reference not in found:
        raise UserError(f"{folder}/{pair} holds no scores of the reference '{reference}' for {metric}; measure them")
    base = {side: np.median(d, axis=0) for side, d in found[reference][0].items()}
    rows = []
    for name, (distances, seconds) in found.items():
        full = min(len(d) for d in distances.values())
        for reps in sorted({r for r in (1, 2, 4, 10) if r <= full}):
            scores = {side: np.median(d[:reps], axis=0) for side, d in distances.items()}
            rows.append(
                {"pair": pair, "metric": metric, "setting": name, "reps": reps}
                | {"evaluations": evaluations(name) * reps, "cpu_seconds": round(seconds * reps / full, 4)}
                | {"images": sum(map(len, scores.values())), "auc": round(auc(scores), 4)}
                | against(scores, base)
                | stop_early({side: d[:reps] for side, d in distances.items()})
            )
    return rows


def read(folder, pair, name, metric):
    """({side: distances (R, N)}, processor seconds an image) of a setting, or None where a side is missing.

    Of a pair of which the folder holds nothing the repository's `KEPT` is read; the two are of different models, so
    never mixed.
    """
    parts, seconds, images = {}, 0.0, 0
    for side in SIDES:
        for batch in itertools.count():
            path = _file(folder, pair, name, side, batch)
            if not path.is_file():
                break
            with np.load(path, allow_pickle=False) as arrays:
                parts.setdefault(side, []).append(arrays[metric])
                seconds, images = seconds + float(arrays["seconds"]), images + arrays[metric].shape[1]
    if not (Path(folder) / pair).is_dir():
        return _read_kept(KEPT / f"{pair}.npz", name, metric)
    if parts.keys() != SIDES.keys():
        return None
    return {side: np.concatenate(found, axis=1) for side, found in parts.items()}, seconds / images


def _read_kept(path, name, metric):
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        if f"{name}/seconds" not in arrays:
            return None
        return {side: arrays[f"{name}/{metric}/{side}"] for side in SIDES}, float(arrays[f"{name}/seconds"])


def keep(folder, pair, metric_names):
    """Writes all distances of a pair to one file in `KEPT`."""
    kept = {}
    for name, metric in itertools.product(SETTINGS, metric_names):
        if found := read(folder, pair, name, metric):
            distances, seconds = found
            kept |= {f"{name}/{metric}/{side}": values.astype(np.float32) for side, values in distances.items()}
            kept[f"{name}/seconds"] = np.array(seconds)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **kept)
    files.write_bytes(KEPT / f"{pair}.npz", buffer.getvalue())
    say(f"kept: {KEPT / f'{pair}.npz'}")


def evaluations(name):
    """Evaluations of the network for one repetition of an image."""
    config = with_values(read_config("configs/subvp/fashion_mnist_small.py"), SETTINGS[name])
    return create_process(config, sde_lib.create_sde(config)).evaluations


def auc(scores):
    """ROC-AUC of {'pos': (N,), 'neg': (M,)}, larger = further from the domain."""
    labels = np.repeat([0, 1], [len(scores["pos"]), len(scores["neg"])])
    return float(roc_auc_score(labels, np.concatenate([scores["pos"], scores["neg"]])))


def against(scores, base):
    """The comparison with the reference's scores, on the images that both have (the first ones of either side)."""
    count = {side: min(len(scores[side]), len(base[side])) for side in scores}
    a, b = ({side: s[side][: count[side]] for side in s} for s in (scores, base))
    difference = auc(a) - auc(b)
    low, high = np.quantile(paired_bootstrap(a, b), [0.025, 0.975])
    same = a["pos"] is b["pos"] or all(np.array_equal(a[side], b[side]) for side in a)
    correlation = 1.0 if same else np.mean([spearmanr(a[side], b[side]).statistic for side in a])
    return {
        "compared": sum(count.values()),
        "difference": round(difference, 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "rank_correlation": round(float(correlation), 3),
    }


def paired_bootstrap(a, b, resamples=RESAMPLES):
    """Differences of the ROC-AUCs of two scorings of the same images, either side's images drawn anew: (resamples,).

    Each ROC-AUC is a mean over pairs of images of the two sides, so a resample is a weighting of these pairs.
    """
    rng = np.random.default_rng(0)
    wins = [_wins(s["pos"], s["neg"]) for s in (a, b)]  # each (N, M)
    pair = wins[0] - wins[1]
    n, m = pair.shape
    rows = rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n  # (resamples, N)
    columns = rng.multinomial(m, np.full(m, 1 / m), size=resamples) / m
    return np.einsum("rn,nm,rm->r", rows, pair, columns, optimize=True)


def _wins(pos, neg):
    return (neg[None] > pos[:, None]) + 0.5 * (neg[None] == pos[:, None])


def stop_early(distances, undecided=(0.5, 0.995)):
    """ROC-AUC and mean repetitions if an image is left as soon as its decision is settled.

    It is settled after two repetitions or more whose running median is outside of the range between two quantiles of
    in-domain scores at that number of repetitions, where thresholds lie that a user would choose.  The quantiles are
    those of every second in-domain image, the ROC-AUC is of the others.

    Args:
        distances: {'pos': (R, N), 'neg': (R, M)}.
        undecided: the two quantiles.
    """
    reps = len(distances["pos"])
    if reps < 4:
        return {"early_reps": reps, "early_auc": None}
    calibration = {"pos": distances["pos"][:, 1::2]}
    tested = {"pos": distances["pos"][:, ::2], "neg": distances["neg"]}
    used, scores = {}, {}
    for side, values in tested.items():
        score, left = np.zeros(values.shape[1]), np.zeros(values.shape[1], dtype=int)
        for r in range(2, reps + 1, 2):  # both checkerboards
            low, high = np.quantile(np.median(calibration["pos"][:r], axis=0), undecided)
            running = np.median(values[:r], axis=0)
            settled = (left == 0) & ((running < low) | (running > high) | (r == reps))
            score[settled], left[settled] = running[settled], r
        used[side], scores[side] = left, score
    return {
        "early_reps": round(float(np.concatenate(list(used.values())).mean()), 2),
        "early_auc": round(auc(scores), 4),
    }


def print_table(rows):
    """The rows as aligned text."""
    for pair, metric in dict.fromkeys((row["pair"], row["metric"]) for row in rows):
        print(f"\n{pair}, {metric}")
        print(
            f"{'setting':26} {'reps':>4} {'evaluations':>11} {'CPU s':>7} {'images':>6} {'AUC':>6}  "
            f"{'difference [95 %] on':>29} {'rank':>5}"
        )
        for row in (r for r in rows if (r["pair"], r["metric"]) == (pair, metric)):
            print(
                f"{row['setting']:26} {row['reps']:4} {row['evaluations']:11} {row['cpu_seconds']:7.3f} "
                f"{row['images']:6} {row['auc']:6.3f}  {row['difference']:+6.3f} "
                f"[{row['low']:+.3f}, {row['high']:+.3f}] {row['compared']:4} {row['rank_correlation']:5.2f}"
            )


def plot(rows, reference):
    """ROC-AUC over evaluations an image, a panel for each pair (the first metric), as PNG bytes."""
    metric = rows[0]["metric"]
    rows = [row for row in rows if row["metric"] == metric]
    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    figure = Figure(figsize=(4.2 * len(pairs), 4), layout="constrained")
    for axes, pair in zip(np.atleast_1d(figure.subplots(1, len(pairs))), pairs, strict=True):
        mine = [row for row in rows if row["pair"] == pair]
        for label, chosen in {
            "published": [r for r in mine if r["setting"].startswith("published")],
            "others": [r for r in mine if not r["setting"].startswith("published")],
        }.items():
            axes.scatter([r["evaluations"] for r in chosen], [r["auc"] for r in chosen], s=14, label=label)
        front, best = [], -1.0
        for row in sorted(mine, key=lambda r: (r["evaluations"], -r["auc"])):
            if row["auc"] > best:
                front.append(row)
                best = row["auc"]
        axes.step(
            [r["evaluations"] for r in front], [r["auc"] for r in front], where="post", lw=1, label="Pareto front"
        )
        axes.set(xscale="log", xlabel="network evaluations an image", ylabel=f"ROC-AUC ({metric})", title=pair)
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


if __name__ == "__main__":
    guard(lambda _: main(), None)
